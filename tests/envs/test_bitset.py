"""Bit sets against Python's sets."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from envs import bitset
from envs.bitset import WORD

CAPACITIES = (1, 61, 62, 63, 124, 125, 248)


@st.composite
def batches_of_sets(draw: st.DrawFn) -> tuple[int, list[set[int]], list[int]]:
    capacity = draw(st.sampled_from(CAPACITIES))
    batch = draw(st.lists(st.sets(st.integers(0, capacity - 1)), min_size=1, max_size=5))
    amounts = st.one_of(st.integers(0, 2 * capacity + WORD), st.sampled_from([0, WORD - 1, WORD, WORD + 1, 2 * WORD]))
    return capacity, batch, draw(st.lists(amounts, min_size=len(batch), max_size=len(batch)))


def packed(batch: list[set[int]], capacity: int) -> Tensor:
    member = torch.zeros(len(batch), capacity, dtype=torch.bool)
    for row, members in zip(member, batch, strict=True):
        row[list(members)] = True
    return bitset.pack(member)


def unpacked(sets: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in bitset.members(sets)]


@given(case=batches_of_sets())
def test_adding_moves_every_member_up_and_drops_those_beyond_the_words(
    case: tuple[int, list[set[int]], list[int]],
) -> None:
    capacity, batch, amounts = case
    room = WORD * bitset.n_words(capacity)
    expected = [{q + d for q in row if q + d < room} for row, d in zip(batch, amounts, strict=True)]
    assert unpacked(bitset.add(packed(batch, capacity), torch.tensor(amounts))) == expected


@given(case=batches_of_sets())
def test_subtracting_moves_every_member_down_and_drops_those_below_zero(
    case: tuple[int, list[set[int]], list[int]],
) -> None:
    capacity, batch, amounts = case
    expected = [{q - d for q in row if q >= d} for row, d in zip(batch, amounts, strict=True)]
    assert unpacked(bitset.subtract(packed(batch, capacity), torch.tensor(amounts))) == expected


@given(case=batches_of_sets())
def test_one_set_broadcasts_against_many_amounts(case: tuple[int, list[set[int]], list[int]]) -> None:
    capacity, batch, amounts = case
    one, many = packed(batch[:1], capacity), torch.tensor(amounts)
    for move in (bitset.add, bitset.subtract):
        assert_close(move(one, many), torch.cat([move(one, many[i : i + 1]) for i in range(len(amounts))]))


@given(case=batches_of_sets())
def test_packing_and_listing_are_inverse_and_leave_the_two_top_bits_free(
    case: tuple[int, list[set[int]], list[int]],
) -> None:
    capacity, batch, _ = case
    sets = packed(batch, capacity)
    assert sets.shape == (len(batch), -(-capacity // WORD))
    assert unpacked(sets) == batch
    assert bool((sets >= 0).all())
    assert bool((sets < 2**WORD).all())


@given(data=st.data(), capacity=st.sampled_from(CAPACITIES))
def test_a_singleton_has_its_one_member(data: st.DataObject, capacity: int) -> None:
    value = data.draw(st.integers(0, capacity - 1))
    assert unpacked(bitset.singleton(value, bitset.n_words(capacity))[None]) == [{value}]
