"""Assignments of letters: masks are exact, writing is unique, walks fill what they are given."""

from itertools import combinations_with_replacement, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.assignment import BUILDING_RANK, Compositions, Packing, Walk, canonical, images, possible_space_groups
from envs.crystal import CrystalBatch
from envs.equivalence import image
from envs.errors import RepresentationError
from envs.symmetry import SYMMETRY
from tests.strategies import generators

ROCK_SALT = {"Na": 1, "Cl": 1}


def crystal(space_group: int, orbits: list[tuple[int, int]], lengths: tuple[float, float, float]) -> CrystalBatch:
    """Return one crystal from (atomic number, letter index) pairs."""
    elements, letters = torch.tensor(orbits, dtype=torch.int64).T
    counts = SYMMETRY.primitive_multiplicity[space_group - 1, letters]
    parameters = torch.tensor([[*lengths, 90.0, 90.0, 90.0]], dtype=torch.float64)
    return CrystalBatch(torch.tensor([space_group]), elements[None], letters[None], counts[None], parameters)


def brute_force_fillings(group: int, counts: list[int]) -> set[tuple[tuple[int, ...], ...]]:
    """Return every way to give each element its letters, by trying all of them."""
    n_letters = int(SYMMETRY.n_letters[group])
    multiplicity = SYMMETRY.primitive_multiplicity[group].tolist()
    fixed = {i for i in range(n_letters) if int(SYMMETRY.n_free_coords[group, i]) == 0}
    per_element = [
        [
            letters
            for size in range(1, count + 1)
            for letters in combinations_with_replacement(range(n_letters), size)
            if sum(multiplicity[i] for i in letters) == count
        ]
        for count in counts
    ]
    fillings = set()
    for filling in product(*per_element):
        used = [i for letters in filling for i in letters if i in fixed]
        if len(used) == len(set(used)):
            fillings.add(filling)
    return fillings


def walked_fillings(group: int, counts: list[int]) -> set[tuple[tuple[int, ...], ...]]:
    """Return every way that the masks of a walk lead to; a dead end is an error."""
    compositions = Compositions(torch.arange(3, 3 + len(counts))[None], torch.tensor([counts]))
    walk = Walk.start(Packing.for_counts(compositions.counts), compositions, torch.tensor([group]))
    written = torch.zeros(1, 0, 2, dtype=torch.int64)
    fillings = set()
    while len(walk.group):
        legal = walk.letter_mask()
        assert bool((legal.any(dim=1) | walk.done).all()), "dead end"
        for row in written[walk.done].tolist():
            fillings.add(tuple(tuple(i for slot, i in row if slot == e) for e in range(len(counts))))
        parent, letter = legal.nonzero().unbind(dim=1)
        walk = walk.select(parent)
        written = torch.cat([written[parent], torch.stack([walk.slot, letter], dim=1)[:, None]], dim=1)
        walk.step(letter)
    return fillings


@pytest.mark.parametrize("space_group", [1, 2, 12, 47, 62, 123, 166, 194, 216, 221, 225, 227])
@pytest.mark.parametrize("counts", [[1, 1], [2, 1], [1, 3, 1]])
def test_walks_reach_every_filling_and_no_dead_end(space_group: int, counts: list[int]) -> None:
    expected = brute_force_fillings(space_group - 1, counts)
    assert bool(possible_space_groups(counts)[space_group - 1]) == bool(expected)
    if expected:
        assert walked_fillings(space_group - 1, counts) == expected


def test_tables_hold_more_atoms_than_any_training_set() -> None:
    possible = possible_space_groups([40, 60])
    assert bool(possible[0])  # P1 holds everything
    assert not bool(possible_space_groups([1, 1, 1])[226])  # Fd-3c has no position of one atom


def test_elements_are_written_by_increasing_electronegativity() -> None:
    compositions = Compositions.of_amounts([{"O": 3, "Ti": 1, "Sr": 1}])
    assert compositions.elements.tolist() == [[38, 22, 8]]
    assert compositions.counts.tolist() == [[1, 1, 3]]
    assert compositions.amounts() == [{"Sr": 1, "Ti": 1, "O": 3}]


def test_every_element_has_a_place_of_its_own() -> None:
    assert sorted(BUILDING_RANK[1:].tolist()) == list(range(118))


@pytest.mark.parametrize("amounts", [{}, {"Xx": 1}, {"Na": 0}, {"Na": 1.5}, {"Na": 100_000}])
def test_malformed_compositions_are_refused(amounts: dict[str, int]) -> None:
    with pytest.raises(RepresentationError, match="composition 1"):
        Compositions.of_amounts([ROCK_SALT, amounts])


@given(generator=generators(), row=st.integers(0, 3))
@settings(max_examples=40)
def test_all_images_are_written_alike(generator: torch.Generator, row: int) -> None:
    space_group, orbits = [
        (221, [(38, 1), (22, 0), (8, 2)]),
        (62, [(20, 2), (22, 1), (8, 2), (8, 3)]),
        (47, [(3, 0), (8, 5), (9, 12)]),
        (71, [(29, 0), (16, 4), (16, 8)]),
    ][row]
    batch = crystal(space_group, orbits, (4.0, 5.0, 6.0))
    n = int(SYMMETRY.n_alternatives[space_group - 1])
    other = image(batch, torch.randint(n, (1,), generator=generator))
    first, _ = canonical(batch)
    second, choice = canonical(other)
    assert first.letter.tolist() == second.letter.tolist()
    assert first.slot.tolist() == second.slot.tolist()
    again, _ = canonical(image(other, choice))
    assert again.letter.tolist() == second.letter.tolist()


def test_images_lists_each_distinct_assignment_once() -> None:
    both = CrystalBatch.cat(
        [crystal(221, [(55, 0), (17, 1)], (4.0, 4.0, 4.0)), crystal(1, [(55, 0), (17, 0)], (4.0,) * 3)]
    )
    assignments, owner = images(both)
    assert owner.tolist() == [0, 0, 1]  # Cs on a or on b in Pm-3m; P1 has one position
    assert assignments.letter[owner == 0].tolist() == [[0, 1], [1, 0]]


def test_crystals_of_assignments_hold_the_composition() -> None:
    batch = crystal(62, [(20, 2), (22, 1), (8, 2), (8, 3)], (5.4, 7.6, 5.3))
    assignments, choice = canonical(batch)
    back = assignments.crystals(image(batch, choice).lattice_parameters)
    assert back.composition.tolist() == batch.composition.tolist()
    assert back.space_group.tolist() == [62]


def test_nothing_has_no_images() -> None:
    nothing = crystal(225, [(11, 0), (17, 1)], (5.6, 5.6, 5.6)).select([])
    for assignments, rows in (canonical(nothing), images(nothing)):
        assert len(assignments) == len(rows) == 0
