"""Losses as pure functions of log-probabilities and log-rewards."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from policies.errors import BatchShapeError
from policies.losses import (
    huber,
    log_partition_variance_loss,
    square,
    trajectory_balance_loss,
    trajectory_balance_residual,
)


def _trajectories(n: int = 12, max_steps: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    log_pf, log_pb = -torch.rand((2, n, max_steps), generator=generator, dtype=torch.float64)
    return log_pf, log_pb, torch.randn(n, generator=generator, dtype=torch.float64)


def test_the_residual_is_zero_when_flows_match() -> None:
    log_pf, log_pb, _ = _trajectories()
    log_reward = 1.7 + (log_pf - log_pb).sum(dim=-1)
    residual = trajectory_balance_residual(torch.tensor(1.7, dtype=torch.float64), log_pf, log_pb, log_reward)
    assert_close(residual, torch.zeros(12, dtype=torch.float64))


def test_the_residual_has_the_signs_of_the_paper() -> None:
    values = [torch.tensor([value]) for value in (1.0, 2.0, 4.0, 8.0)]
    assert_close(trajectory_balance_residual(*values), torch.tensor([1.0 + 2.0 - 4.0 - 8.0]))


def test_summed_and_stepwise_log_probabilities_give_the_same() -> None:
    log_pf, log_pb, log_reward = _trajectories()
    log_Z = torch.tensor(0.3, dtype=torch.float64)
    stepwise = trajectory_balance_residual(log_Z, log_pf, log_pb, log_reward)
    assert_close(trajectory_balance_residual(log_Z, log_pf.sum(-1), log_pb, log_reward), stepwise)
    assert_close(trajectory_balance_residual(log_Z.expand(12), log_pf.sum(-1), log_pb.sum(-1), log_reward), stepwise)


def test_penalties_agree_near_zero_and_differ_far_away() -> None:
    small, large = torch.tensor([1e-3, -1e-3]), torch.tensor([6.0, -6.0])
    for penalty in (square, huber(5.0)):
        assert_close(penalty(small), torch.tensor([1e-6, 1e-6]))
    assert_close(square(large), torch.tensor([36.0, 36.0]))
    assert_close(huber(5.0)(large), torch.full((2,), 2 * 5.0 * (6.0 - 2.5)))
    assert_close(trajectory_balance_loss(torch.tensor([1.0, 3.0])), torch.tensor(5.0))
    assert_close(trajectory_balance_loss(torch.tensor([1.0, 3.0]), huber(1.0)), torch.tensor((1.0 + 2 * 2.5) / 2))


def test_the_variance_loss_is_the_variance_and_its_log_partition_minimises_the_squares() -> None:
    log_pf, log_pb, log_reward = _trajectories()
    loss, log_Z = log_partition_variance_loss(log_pf, log_pb, log_reward)
    ratio = (log_pf - log_pb).sum(dim=-1) - log_reward
    assert_close(loss, ratio.var(correction=0))
    for shift in (-0.1, 0.1):
        residual = trajectory_balance_residual(log_Z + shift, log_pf, log_pb, log_reward)
        assert_close(trajectory_balance_loss(residual) - loss, torch.tensor(0.01, dtype=torch.float64))


def test_the_gradient_of_the_variance_loss_is_that_of_the_variance() -> None:
    log_pf, log_pb, log_reward = _trajectories()
    log_pf.requires_grad_()
    (detached,) = torch.autograd.grad(log_partition_variance_loss(log_pf, log_pb, log_reward)[0], log_pf)
    ratio = (log_pf - log_pb).sum(dim=-1) - log_reward
    (full,) = torch.autograd.grad(ratio.var(correction=0), log_pf)
    assert_close(detached, full)


def test_each_group_has_its_own_log_partition() -> None:
    log_pf, log_pb, log_reward = _trajectories()
    group = torch.arange(12) % 3 * 2  # groups 0, 2 and 4; 1 and 3 stay empty
    loss, log_Z = log_partition_variance_loss(log_pf, log_pb, log_reward, group)
    separate = [
        log_partition_variance_loss(log_pf[group == g], log_pb[group == g], log_reward[group == g]) for g in (0, 2, 4)
    ]
    assert_close(log_Z[[0, 2, 4]], torch.cat([part[1] for part in separate]))
    assert log_Z[[1, 3]].isnan().all()
    assert_close(loss, torch.stack([part[0] for part in separate]).mean())
    shifted, _ = log_partition_variance_loss(log_pf, log_pb, log_reward + 10.0 * group, group)
    assert_close(shifted, loss)


def test_a_matching_tree_gives_the_log_partition_without_any_variance() -> None:
    log_reward = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    log_pf = log_reward.log_softmax(dim=0)
    loss, log_Z = log_partition_variance_loss(log_pf, torch.zeros_like(log_pf), log_reward)
    assert_close(log_Z, log_reward.logsumexp(dim=0, keepdim=True))
    assert loss.item() == pytest.approx(0.0, abs=1e-24)


def test_arguments_of_different_batches_are_refused() -> None:
    log_pf, log_pb, log_reward = _trajectories()
    with pytest.raises(BatchShapeError, match="same trajectories"):
        trajectory_balance_residual(torch.zeros(()), log_pf, log_pb, log_reward[:1])
    with pytest.raises(BatchShapeError, match="group must have shape"):
        log_partition_variance_loss(log_pf, log_pb, log_reward, torch.zeros(1, dtype=torch.int64))
