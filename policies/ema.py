"""Exponential moving average of parameters: the average samples better than the last step of training."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from policies.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn


class ExponentialMovingAverage:
    """Average of a module's parameters over training, recent steps first.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the random start is soon forgotten. Buffers are not
    averaged.

    Args:
        module: The module in training; the average starts at its present parameters.
        decay: Weight of the past, in [0, 1); 0.999 averages over about the last thousand steps.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.n_updates = 0
        self._module = module
        self._average = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present parameters into the average; call it after each optimiser step."""
        self.n_updates += 1
        weight = 1.0 - min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        parameters = dict(self._module.named_parameters())
        current: list[Tensor] = [parameters[name] for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), current, weight)

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """Give the module the averaged parameters inside the ``with`` block, and its own ones back after it."""
        self._swap()
        try:
            yield self._module
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._module.named_parameters():
            self._average[name], parameter.data = parameter.data, self._average[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the averaged parameters by name, and ``n_updates``."""
        average = {name: value.clone() for name, value in self._average.items()}
        return average | {"n_updates": torch.tensor(self.n_updates)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what ``state_dict`` returned.

        Raises:
            CheckpointError: If names or shapes are not those of the module.
        """
        expected = {name: tuple(value.shape) for name, value in self._average.items()} | {"n_updates": ()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise CheckpointError(f"the average was saved for another network; entries that differ: {wrong[:5]}")
        self.n_updates = int(state["n_updates"])
        for name, value in self._average.items():
            value.copy_(state[name])
