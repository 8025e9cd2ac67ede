"""Averages of parameters."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from policies.ema import ExponentialMovingAverage
from policies.errors import CheckpointError


def _module(value: float) -> nn.Linear:
    module = nn.Linear(3, 2)
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    return module


def _set(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)


def test_the_average_follows_its_recursion_with_a_warm_up() -> None:
    module = _module(1.0)
    average, expected = ExponentialMovingAverage(module, decay=0.5), 1.0
    for step, value in enumerate([2.0, -1.0, 5.0, 0.0, 7.0, 1.0, 3.0, 4.0, 8.0, 2.0], start=1):
        _set(module, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert_close(average.state_dict()["weight"], torch.full((2, 3), expected))


def test_swapping_in_is_undone_also_after_an_error() -> None:
    module = _module(1.0)
    average = ExponentialMovingAverage(module)
    _set(module, 3.0)

    def sample_and_fail() -> None:
        with average.swapped_in() as swapped:
            assert_close(swapped.get_parameter("weight").detach(), torch.full((2, 3), 1.0))
            raise KeyError

    with pytest.raises(KeyError):
        sample_and_fail()
    assert_close(module.weight.detach(), torch.full((2, 3), 3.0))
    assert_close(average.state_dict()["weight"], torch.full((2, 3), 1.0))


def test_the_optimiser_keeps_training_the_module_after_a_swap() -> None:
    module = _module(1.0)
    average, optimiser = ExponentialMovingAverage(module), torch.optim.SGD(module.parameters(), lr=0.5)
    with average.swapped_in():
        pass
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    assert_close(module.weight.detach(), torch.full((2, 3), 0.5))
    assert_close(average.state_dict()["weight"], torch.full((2, 3), 1.0))


def test_a_resumed_average_continues_identically() -> None:
    module = _module(1.0)
    average = ExponentialMovingAverage(module)
    _set(module, 2.0)
    average.update()
    resumed = ExponentialMovingAverage(_module(9.0))
    resumed.load_state_dict(average.state_dict())
    resumed_module = resumed._module
    for each, target in ((average, module), (resumed, resumed_module)):
        _set(target, 4.0)
        each.update()
    assert_close(resumed.state_dict(), average.state_dict(), rtol=0, atol=0)


def test_the_average_of_another_network_is_refused() -> None:
    average = ExponentialMovingAverage(_module(1.0))
    state = ExponentialMovingAverage(nn.Linear(3, 5)).state_dict()
    with pytest.raises(CheckpointError, match=r"\['bias', 'weight'\]"):
        average.load_state_dict(state)


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        ExponentialMovingAverage(_module(1.0), decay=1.0)
