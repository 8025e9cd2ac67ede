"""The capacity automaton and the letter table against packing by brute force."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from envs.capacity import DEAD, CapacityTable, build_capacity_table
from envs.conventions import MAX_LETTERS, N_SPACE_GROUPS
from envs.wyckoff import LetterTable, build_letter_table
from tests.envs import brute_force

MAX_COUNT = 6
#: Few and many letters, several centrings, no free position of small multiplicity, fixed positions only at the top.
GROUPS = (1, 2, 12, 16, 47, 62, 139, 166, 198, 216, 225, 227, 229, 230)


@cache
def capacity(*, conventional: bool) -> CapacityTable:
    return build_capacity_table(MAX_COUNT, conventional=conventional)


@cache
def letters() -> LetterTable:
    return build_letter_table(capacity(conventional=False))


@pytest.mark.parametrize("conventional", [False, True])
@pytest.mark.parametrize("space_group", GROUPS)
def test_the_automaton_packs_what_brute_force_packs(space_group: int, conventional: bool) -> None:
    table = capacity(conventional=conventional)
    positions = brute_force.positions(space_group, conventional=conventional)
    for counts in product(range(1, MAX_COUNT + 1), repeat=3):
        state = int(table.start[space_group - 1])
        for count in counts:
            state = DEAD if state == DEAD else int(table.next_state[state, count])
        assert (state != DEAD) == brute_force.packable(positions, counts)


def test_no_count_is_zero_and_every_group_starts_somewhere() -> None:
    for conventional in (False, True):
        table = capacity(conventional=conventional)
        assert bool((table.next_state[:, 0] == DEAD).all())
        assert table.start.shape == (N_SPACE_GROUPS,)
        assert bool((table.start >= 0).all())
        assert bool((table.start < table.n_states).all())


@pytest.mark.parametrize("space_group", GROUPS)
def test_the_residual_after_any_use_of_fixed_letters_packs_what_is_left(space_group: int) -> None:
    table, group = letters(), torch.tensor([space_group - 1])
    positions = brute_force.positions(space_group, conventional=False)
    fixed = [i for i, multiplicity, once in positions if once and multiplicity <= MAX_COUNT]
    for n_used in (0, 1, len(fixed) // 2, len(fixed)):
        taken = fixed[:n_used]
        used = table.fixed_bit[space_group - 1, taken].sum() if taken else torch.tensor(0)
        residual = int(table.residual(group, used[None])[0])
        state = int(capacity(conventional=False).residual_state[space_group - 1, residual])
        left = tuple(p for p in positions if p[0] not in taken)
        for count in range(1, MAX_COUNT + 1):
            packs = int(capacity(conventional=False).next_state[state, count]) != DEAD
            assert packs == brute_force.packable(left, (count,))


def letter_walks(space_group: int, count: int, good: Tensor) -> list[tuple[int, ...]]:
    """Return every sequence of letters that the masks allow while ``count`` atoms are placed."""
    table, group = letters(), torch.tensor([space_group - 1])
    finished, open_walks = [], [((), 0, 0, count)]
    while open_walks:
        walk, used, first, left = open_walks.pop()
        mask = table.letter_mask(group, torch.tensor([used]), torch.tensor([first]), torch.tensor([left]), good)
        assert mask.shape == (1, MAX_LETTERS)
        for letter in mask[0].nonzero().flatten().tolist():
            bit = int(table.fixed_bit[space_group - 1, letter])
            remaining = left - int(table.multiplicity[space_group - 1, letter])
            after = ((*walk, letter), used | bit, letter + int(bit > 0), remaining)
            if remaining:
                open_walks.append(after)
            else:
                finished.append(after[0])
    return finished


@pytest.mark.parametrize("space_group", GROUPS)
def test_letter_masks_list_every_placement_once(space_group: int) -> None:
    positions = sorted(brute_force.positions(space_group, conventional=False))
    anything = torch.tensor([-1])  # all bits: every residual is good
    for count in range(1, 5):
        expected = [
            tuple(positions[i][0] for i in placement)
            for placement in brute_force.placements(positions, count, frozenset())
        ]
        assert sorted(letter_walks(space_group, count, anything)) == sorted(expected)


def test_letters_that_leave_no_good_residual_are_illegal() -> None:
    # Group 225 holds one atom of the primitive cell on 4a and one on 4b; two more need 8c.
    full = letters().full_residual[224]
    nothing_used = (torch.ones((), dtype=torch.int64) << full)[None]
    assert letter_walks(225, 1, nothing_used) == []
    one_of_two_used = nothing_used >> letters().stride[224, 0]
    assert sorted(letter_walks(225, 1, one_of_two_used)) == [(0,), (1,)]
