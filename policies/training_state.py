"""What trainings share: the schedule, and their state as named tensors, so that one that was killed continues."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch

from policies.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from policies.ema import ExponentialMovingAverage

#: Settings that may change between calls that continue a training: it may get longer or shorter, or more networks.
_MAY_CHANGE = ("epochs", "minutes", "n_networks")


def training_tensors(
    network: nn.Module, average: ExponentialMovingAverage, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the state of a training by name."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    return tensors | optimiser_tensors(optimiser)


def restore_training(
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    average: ExponentialMovingAverage,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Continue from what ``training_tensors`` returned.

    Raises:
        CheckpointError: If the tensors are of another network.
    """
    try:
        network.load_state_dict(part(tensors, "network."))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint is of another network: {error}") from error
    average.load_state_dict(part(tensors, "average."))
    restore_optimiser(tensors, optimiser)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the moments of an optimiser by name."""
    return {
        f"optimiser.{index}.{name}": torch.as_tensor(value)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimiser(tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> None:
    """Give an optimiser the moments that ``optimiser_tensors`` returned; its settings stay as they are."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in part(tensors, "optimiser.").items():
        index, _, key = name.partition(".")
        moments.setdefault(int(index), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def learning_rate_factor(progress: float) -> float:
    """Return what the learning rate is multiplied by: a short rise, then a cosine to a hundredth, over 0 to 1."""
    return min(1.0, 0.01 + 20.0 * progress) * max(0.01, 0.5 * (1.0 + math.cos(math.pi * progress)))


def digest(*tensors: Tensor) -> str:
    """Return what tells these tensors from others, to know the data of a training again."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_same_training(checkpoint: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to continue a training with other settings or other data than those it was begun with.

    Args:
        checkpoint: Where it was found.
        theirs: Settings in the checkpoint, and what else must be the same, such as the ``digest`` of the data.
        ours: The same of the training that should continue.

    Raises:
        CheckpointError: Naming what differs.
    """
    other = [name for name in ours if name not in _MAY_CHANGE and theirs.get(name) != ours[name]]
    if other:
        raise CheckpointError(
            f"{checkpoint} belongs to a training with other {', '.join(other)}; give another output folder, or the same"
        )
