"""Replay of distinct terminals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

from policies.errors import CheckpointError, ReplayError
from policies.replay import LARGEST_WEIGHT, ReplayBuffer, _descending_order
from tests.strategies import seeds

Batch = tuple[list[int], list[float], list[float]]


def _rows(keys: Tensor) -> dict[str, Tensor]:
    """Return contents from which the key can be read again."""
    return {"state": torch.stack([keys, -keys], dim=-1), "unit": keys.to(torch.float32) / 8}


def _add(buffer: ReplayBuffer, keys: list[int], log_reward: list[float], residual: list[float]) -> None:
    key = torch.tensor(keys, dtype=torch.int64)
    buffer.add(key, _rows(key), torch.tensor(log_reward), torch.tensor(residual))


def _stored(buffer: ReplayBuffer) -> dict[int, tuple[float, float]]:
    state = buffer.state_dict()
    if not state:
        return {}
    values = zip(state["log_reward"].tolist(), state["residual"].tolist(), strict=True)
    return dict(zip(state["keys"].tolist(), values, strict=True))


@st.composite
def batches(draw: st.DrawFn) -> list[Batch]:
    number = st.floats(-100, 100, width=32)
    item = st.tuples(st.one_of(st.integers(0, 12), st.integers(-(2**63), 2**63 - 1)), number, number)
    drawn = draw(st.lists(st.lists(item, max_size=8), max_size=6))
    return [tuple(map(list, zip(*batch, strict=True))) if batch else ([], [], []) for batch in drawn]


@given(history=batches(), capacity=st.integers(1, 10))
def test_terminals_stay_distinct_hold_their_newest_values_and_fit_the_capacity(
    history: list[Batch], capacity: int
) -> None:
    buffer, newest = ReplayBuffer(capacity), {}
    for keys, log_reward, residual in history:
        before = set(_stored(buffer))
        _add(buffer, keys, log_reward, residual)
        newest |= dict(zip(keys, zip(log_reward, residual, strict=True), strict=True))
        stored = _stored(buffer)
        assert len(stored) == len(buffer) == min(capacity, len(before | set(keys)))
        assert stored.items() <= newest.items()
        assert set(stored) <= before | set(keys)
    if len(buffer):
        state = buffer.state_dict()
        assert_close(state["rows.state"], _rows(state["keys"])["state"], rtol=0, atol=0)
        assert_close(state["rows.unit"], _rows(state["keys"])["unit"], rtol=0, atol=0)


@given(history=batches(), more=batches(), seed=seeds)
def test_a_resumed_buffer_behaves_identically(history: list[Batch], more: list[Batch], seed: int) -> None:
    buffer = ReplayBuffer(7)
    for batch in history:
        _add(buffer, *batch)
    resumed = ReplayBuffer(7)
    resumed.load_state_dict(buffer.state_dict())
    for batch in more:
        _add(buffer, *batch)
        _add(resumed, *batch)
    assert_close(resumed.state_dict(), buffer.state_dict(), rtol=0, atol=0)
    if len(buffer):
        draws = [each.sample(6, torch.Generator().manual_seed(seed)) for each in (buffer, resumed)]
        assert_close(draws[0].keys, draws[1].keys, rtol=0, atol=0)


def test_the_least_useful_terminal_leaves_a_full_buffer() -> None:
    buffer = ReplayBuffer(3)
    _add(buffer, [1, 2, 3], [5.0, 1.0, 2.0], [0.1, 9.0, 0.1])  # best, most surprising, neither
    _add(buffer, [4], [3.0], [0.1])
    assert set(_stored(buffer)) == {1, 2, 4}
    _add(buffer, [5], [-8.0], [0.0])
    assert set(_stored(buffer)) == {1, 2, 4}


def test_a_sample_returns_rows_that_belong_to_their_keys_without_repetition_in_a_half() -> None:
    buffer = ReplayBuffer(50)
    _add(buffer, list(range(100, 140)), [float(k) for k in range(40)], [1.0] * 40)
    sample = buffer.sample(31, torch.Generator().manual_seed(0))
    assert_close(sample.rows["state"], _rows(sample.keys)["state"])
    assert_close(sample.log_reward, sample.keys.to(torch.float32) - 100)
    assert len(sample.keys) == 31
    assert len(set(sample.keys[:16].tolist())) == 16
    assert len(set(sample.keys[16:].tolist())) == 15
    assert len(buffer.sample(200, torch.Generator().manual_seed(0)).keys) == 80


@pytest.mark.parametrize("half", ["reward", "residual"])
def test_draws_follow_the_priorities(half: str) -> None:
    buffer, generator = ReplayBuffer(4), torch.Generator().manual_seed(0)
    _add(buffer, [0, 1, 2, 3], [2.0, 3.0, -1.0, 7.0], [-4.0, 1.0, 3.0, -1e9])
    weights = {"reward": [1 / 3, 1 / 2, 1 / 4, 1.0], "residual": [4.0, 1.0, 3.0, LARGEST_WEIGHT]}[half]
    place = 0 if half == "reward" else 1
    draws = torch.stack([buffer.sample(2, generator).keys for _ in range(3000)])[:, place]
    counts = torch.bincount(draws, minlength=4).double()
    expected = 3000 * torch.tensor(weights, dtype=torch.float64) / sum(weights)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4


@given(values=st.lists(st.floats(width=32, allow_nan=False), max_size=40))
def test_ranks_descend_and_equals_keep_their_order(values: list[float]) -> None:
    expected = sorted(range(len(values)), key=lambda position: -values[position])
    assert _descending_order(torch.tensor(values)).tolist() == expected


def test_what_cannot_be_stored_or_drawn_is_refused() -> None:
    buffer = ReplayBuffer(5)
    with pytest.raises(ReplayError, match="add terminals before sampling"):
        buffer.sample(2, torch.Generator())
    with pytest.raises(ReplayError, match=r"log_reward must be finite, it is not in 1 rows, first rows \[1\]"):
        _add(buffer, [1, 2], [0.0, float("nan")], [0.0, 0.0])
    assert len(buffer) == 0
    _add(buffer, [1], [0.0], [0.0])
    with pytest.raises(ReplayError, match="expected columns of shape"):
        buffer.add(torch.tensor([2]), {"state": torch.zeros(1, 3)}, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ReplayError, match="capacity must be at least 1, got 0"):
        ReplayBuffer(0)


def test_a_foreign_or_too_large_state_is_refused() -> None:
    buffer = ReplayBuffer(5)
    _add(buffer, [1, 2, 3], [0.0] * 3, [0.0] * 3)
    with pytest.raises(CheckpointError, match="3 terminals were saved, the buffer holds 2"):
        ReplayBuffer(2).load_state_dict(buffer.state_dict())
    with pytest.raises(CheckpointError, match="not the state of a replay buffer"):
        ReplayBuffer(2).load_state_dict({"weight": torch.zeros(2)})
