"""Lists of small spaces of crystals that share no code and no table with the environment.

Wyckoff positions come from PyXtal, chemistry from SMACT; everything else is plain enumeration.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, product

from pymatgen.core import Composition, Element
from pyxtal.symmetry import Group
from smact.screening import smact_validity

from envs.restrictions import Space

Leaf = tuple[
    int, tuple[tuple[int, int, int], ...]
]  # space group, sorted (atomic number, letter, atoms per primitive cell)
LETTERS = "abcdefghijklmnopqrstuvwxyzA"
CENTRING = {"P": 1, "A": 2, "B": 2, "C": 2, "I": 2, "R": 3, "F": 4}


@cache
def positions(space_group: int, *, conventional: bool) -> tuple[tuple[int, int, bool], ...]:
    """Return (letter, multiplicity in the chosen cell, holds one orbit only) of every Wyckoff position."""
    group = Group(space_group)
    divisor = 1 if conventional else CENTRING[group.symbol[0]]
    return tuple(
        (LETTERS.index(position.letter), position.multiplicity // divisor, position.get_dof() == 0)
        for position in group.Wyckoff_positions
    )


@cache
def is_ionic(formula: tuple[tuple[str, int], ...], *, mixed_valence: bool) -> bool:
    return bool(
        smact_validity(
            Composition(dict(formula)), use_pauling_test=True, include_alloys=False, mixed_valence=mixed_valence
        )
    )


def compositions(space: Space) -> Iterator[tuple[tuple[str, int], ...]]:
    """Yield every composition that the limits and the chemistry of ``space`` allow."""
    symbols = [s for s in (space.allowed or space.elements) if s in space.elements]
    highest = min(space.max_count, space.max_atoms_per_element or space.max_count)
    exact = dict(space.counts)
    at_least = max(space.n_elements[0], 2 if space.chemistry == "ionic" else 1)
    for size in range(at_least, space.n_elements[1] + 1):
        for chosen in combinations(symbols, size):
            if not set(space.required) <= set(chosen):
                continue
            choices = [[n for n in range(1, highest + 1) if s not in exact or n in exact[s]] for s in chosen]
            for counts in product(*choices):
                formula = tuple(zip(chosen, counts, strict=True))
                if not space.n_atoms[0] <= sum(counts) <= space.n_atoms[1]:
                    continue
                if space.chemistry == "any" or is_ionic(formula, mixed_valence=space.mixed_valence):
                    yield formula


def placements(
    letters: tuple[tuple[int, int, bool], ...], count: int, used: frozenset[int], start: int = 0
) -> Iterator[tuple[int, ...]]:
    """Yield every multiset of letters (indices into ``letters``) that holds ``count`` atoms."""
    if count == 0:
        yield ()
        return
    for i in range(start, len(letters)):
        _, multiplicity, once = letters[i]
        if multiplicity > count or (once and i in used):
            continue
        for rest in placements(letters, count - multiplicity, used | {i} if once else used, i):
            yield (i, *rest)


def assignments(
    letters: tuple[tuple[int, int, bool], ...], counts: tuple[int, ...], used: frozenset[int] = frozenset()
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield every way to place each count on letters, positions that hold one orbit shared between none."""
    if not counts:
        yield ()
        return
    for chosen in placements(letters, counts[0], used):
        fixed = frozenset(i for i in chosen if letters[i][2])
        for rest in assignments(letters, counts[1:], used | fixed):
            yield (chosen, *rest)


def packable(letters: tuple[tuple[int, int, bool], ...], counts: tuple[int, ...]) -> bool:
    return next(assignments(letters, counts), None) is not None


def leaves(space: Space) -> list[Leaf]:
    """Return every crystal of ``space`` without its lattice; letter -1 where the space has none."""
    found: list[Leaf] = []
    formulas = list(compositions(space))
    for space_group in space.space_groups:
        letters = positions(space_group, conventional=space.conventional)
        divisor = CENTRING[Group(space_group).symbol[0]] if space.conventional else 1
        for formula in formulas:
            numbers = [Element(symbol).Z for symbol, _ in formula]
            counts = tuple(count for _, count in formula)
            if not space.wyckoff:
                if packable(letters, counts):
                    found.append(
                        (space_group, _leaf([(z, -1, n // divisor) for z, n in zip(numbers, counts, strict=True)]))
                    )
                continue
            for assignment in assignments(letters, counts):
                orbits = [
                    (z, letters[i][0], letters[i][1] // divisor)
                    for z, chosen in zip(numbers, assignment, strict=True)
                    for i in chosen
                ]
                found.append((space_group, _leaf(orbits)))
    return found


def _leaf(orbits: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple(sorted(orbits))
