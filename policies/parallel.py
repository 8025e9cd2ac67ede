"""Several processes that train one network: each has a part of every batch, and all take the same step.

``torchrun`` starts them. One process alone needs nothing, and for it every function here changes nothing. Where one has
ended before its time, the others raise a ProcessError as soon as they need it.
"""

from __future__ import annotations

import atexit
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from policies.errors import ProcessError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import timedelta

    from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Args:
        rank: Its number, from 0.
        world: How many there are.
        patient: The group in which others wait for the first; None: the one in which they train.
    """

    rank: int = 0
    world: int = 1
    patient: distributed.ProcessGroup | None = field(default=None, compare=False, repr=False)

    def share(self, n: int, *, start: int = 0) -> int:
        """Return how many of the rows ``start`` to ``start + n`` of a batch are this process's.

        Rows are dealt in turn, so that the shares of every part and of the whole differ by one at most.
        """
        return len(range((self.rank - start) % self.world, n, self.world))

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor, of the same shape everywhere, over all processes; no gradient passes."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        with _others():
            distributed.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every parameter the sum of its gradients over all processes.

        One that no process used keeps none, so that an optimiser leaves it alone, as it does with one process.
        """
        if self.world == 1:
            return
        by_type: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_type.setdefault(parameter.dtype, []).append(parameter)
        for group in by_type.values():
            used = group[0].new_tensor([parameter.grad is not None for parameter in group])
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = self.total(torch.cat([*(part.flatten() for part in parts), used]))
            *sums, users = flat.split([*(part.numel() for part in parts), len(group)])
            for parameter, gradient, n_users in zip(group, sums, users.tolist(), strict=True):
                parameter.grad = gradient.view_as(parameter) if n_users else None

    def from_first(self, value: Any = None) -> Any:
        """Return what the first process gave, anything that can be pickled; those who come early wait for it."""
        if self.world == 1:
            return value
        carried = [value]
        with _others():
            distributed.broadcast_object_list(carried, group=self.patient)
        return carried[0]


ALONE = Processes()


def join_processes(device: torch.device | str = "cpu", *, patience: timedelta | None = None) -> Processes:
    """Return this process among those that ``torchrun`` started, or alone.

    Args:
        device: Where the tensors are that processes exchange.
        patience: How long the others wait for what the first one gives. They wait for each other to join and to train,
            and with None for the first one too, as long as torch thinks fit, which is less than an hour.

    Raises:
        ProcessError: If not all of them come.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not distributed.is_initialized():
        _join("nccl" if torch.device(device).type == "cuda" else "gloo")
    patient = None
    if patience is not None:  # gloo, as what can be pickled goes through main memory
        with _others():
            patient = distributed.new_group(timeout=patience, backend="gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size(), patient)


def _join(backend: str) -> None:
    """Meet the processes that the environment announces, who may not exist where it is inherited."""
    try:
        distributed.init_process_group(backend)
    except (RuntimeError, ValueError) as error:  # out of reach, or no address
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ProcessError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} announce other processes, but they "
            f"did not meet at {where} ({error}); start all of them with torchrun, or unset RANK to run one alone"
        ) from error
    # Threads of the group drop tensors of Python a little late; one that does so while Python ends aborts the process.
    # Those of a group to which nothing refers are joined here.
    atexit.register(distributed.destroy_process_group)


@contextmanager
def _others() -> Iterator[None]:
    """Say in one sentence that another process is gone; it has said why."""
    try:
        yield
    except RuntimeError as error:  # of any kind, as the backend likes
        raise ProcessError("another process of this training has ended or is out of reach; it says why") from error
