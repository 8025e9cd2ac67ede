"""Losses of generative flow networks: pure functions of log-probabilities and log-rewards.

They know neither environment nor network. ``log_pf`` and ``log_pb`` are (n, max_steps), 0 where padded, or (n,) if the
caller has summed them; in a tree P_B is 1 and ``log_pb`` is 0 (or the log of a known constant per terminal).

Where several processes share a batch, ``total`` sums a tensor over them (`policies.parallel.Processes.total`), and a
loss is this process's part of the loss of the whole batch: the parts add up to it, and so do their gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from policies.errors import BatchShapeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Penalty = Callable[[Tensor], Tensor]
    Total = Callable[[Tensor], Tensor]


def _own(value: Tensor) -> Tensor:
    return value


def square(residual: Tensor) -> Tensor:
    """Return the square of each residual (n,)."""
    return residual.square()


def huber(delta: float) -> Penalty:
    """Return the penalty that is square up to ``delta`` nats and linear beyond, on the scale of ``square``."""

    def penalty(residual: Tensor) -> Tensor:
        return 2.0 * functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=delta)

    return penalty


def trajectory_balance_residual(log_Z: Tensor, log_pf: Tensor, log_pb: Tensor, log_reward: Tensor) -> Tensor:
    """Return (n,) log Z + Σ_t log P_F - log R(x) - Σ_t log P_B, zero when flows match.

    Trajectory balance, Malkin et al. 2022, arXiv:2201.13259, eq. 14 under the logarithm. Relative trajectory balance
    (Venkatraman et al. 2024, arXiv:2405.20971) is the same residual with log R = log r + log p_prior.

    Args:
        log_Z: Scalar, or (n,) where the partition function depends on a condition.
        log_pf: (n,) or (n, max_steps) forward log-probabilities.
        log_pb: (n,) or (n, max_steps) backward log-probabilities.
        log_reward: (n,) finite.

    Raises:
        BatchShapeError: If the arguments do not describe the same n trajectories.
    """
    return log_Z + _log_flow_ratio(log_pf, log_pb, log_reward)


def trajectory_balance_loss(residual: Tensor, penalty: Penalty = square, total: Total = _own) -> Tensor:
    """Return the mean of ``penalty`` over residuals (n,), or this process's part of the mean over those of all."""
    return penalty(residual).sum() / total(torch.tensor(len(residual), device=residual.device))


def log_partition_variance_loss(
    log_pf: Tensor,
    log_pb: Tensor,
    log_reward: Tensor,
    group: Tensor | None = None,
    penalty: Penalty = square,
    total: Total = _own,
) -> tuple[Tensor, Tensor]:
    """Return trajectory balance with the log Z that fits the batch best, and that log Z.

    With ξ = Σ log P_F - Σ log P_B - log R, the best constant is log Z = -mean(ξ), and the squared residual becomes the
    variance of ξ (Richter et al. 2020, arXiv:2010.10436; Zhang et al. 2023, arXiv:2302.05446, eq. 8). No gradient flows
    through log Z; for the square that changes nothing. The optimum does not depend on how trajectories were drawn.

    Args:
        log_pf: (n,) or (n, max_steps) forward log-probabilities.
        log_pb: (n,) or (n, max_steps) backward log-probabilities.
        log_reward: (n,) finite.
        group: (n,) int64 index of the condition of each trajectory, 0 to n_groups - 1; each group has its own log Z and
            should have at least 32 members, since a group of one teaches nothing. None: all belong together.
        penalty: Of each residual.
        total: Sums over the processes that share the batch; without ``group``.

    Returns:
        The scalar loss, and log Z as estimated from the whole batch: (n_groups,), NaN for a group without members.

    Raises:
        BatchShapeError: If the arguments do not describe the same n trajectories.
    """
    ratio = _log_flow_ratio(log_pf, log_pb, log_reward)
    index = torch.zeros_like(ratio, dtype=torch.int64) if group is None else group
    if index.shape != ratio.shape:
        raise BatchShapeError(f"group must have shape {tuple(ratio.shape)} like log_reward, got {tuple(index.shape)}")
    detached = ratio.detach()
    size = torch.bincount(index)
    sums = torch.zeros(size.shape, dtype=ratio.dtype, device=ratio.device).index_add(0, index, detached)
    log_Z = -total(sums) / total(size)
    return trajectory_balance_loss(ratio + log_Z[index], penalty, total), log_Z


def _log_flow_ratio(log_pf: Tensor, log_pb: Tensor, log_reward: Tensor) -> Tensor:
    """Return (n,) Σ_t log P_F - Σ_t log P_B - log R."""
    forward, backward = (part.sum(dim=-1) if part.ndim > 1 else part for part in (log_pf, log_pb))
    if not forward.shape == backward.shape == log_reward.shape:
        raise BatchShapeError(
            "log_pf, log_pb and log_reward must describe the same trajectories, got shapes "
            f"{tuple(log_pf.shape)}, {tuple(log_pb.shape)} and {tuple(log_reward.shape)}"
        )
    return forward - backward - log_reward
