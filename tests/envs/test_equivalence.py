"""Images under the Euclidean normaliser are the same crystal, and are counted right."""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pyxtal.symmetry import Group
from torch import Tensor
from torch.testing import assert_close

from envs.conventions import LETTERS
from envs.crystal import CrystalBatch
from envs.equivalence import alternatives_inside, image, log_n_images, random_image
from envs.lattice import Box
from envs.symmetry import SYMMETRY

Affine = tuple[np.ndarray, np.ndarray]  # rotation and translation in fractional coordinates
WIDE = Box()
SHIFTS = np.array(list(product((-2, -1, 0, 1, 2), repeat=3)), dtype=float)


def affine(operation: str) -> Affine:
    """Parse ``"z,x+1/2,-y"`` without any table."""
    rotation, translation = np.zeros((3, 3)), np.zeros(3)
    for i, part in enumerate(operation.replace(" ", "").split(",")):
        for sign, numerator, denominator, axis in re.findall(r"([+-]?)(?:(\d+)(?:/(\d+))?)?([xyz]?)", part):
            size = (-1 if sign == "-" else 1) * int(numerator or 1) / int(denominator or 1)
            if axis:
                rotation[i, "xyz".index(axis)] += size
            elif numerator:
                translation[i] += size
    return rotation, translation


class Positions:
    """Wyckoff positions of one group as affine subspaces of the torus."""

    def __init__(self, space_group: int) -> None:
        group = Group(space_group)
        found = sorted(group.Wyckoff_positions, key=lambda position: LETTERS.index(position.letter))
        self.operations = [[(op.rotation_matrix, op.translation_vector) for op in position.ops] for position in found]
        self.kind = [(position.multiplicity, position.get_dof()) for position in found]
        alternatives = group.get_alternatives()
        self.normaliser = [affine(operation) for operation in alternatives["Coset Representative"]]

    def __len__(self) -> int:
        return len(self.kind)

    def point(self, letter: int, rng: np.random.Generator) -> np.ndarray:
        rotation, translation = self.operations[letter][0]
        return np.asarray(rotation @ rng.random(3) + translation)

    def letter_of(self, point: np.ndarray, kind: tuple[int, int]) -> int:
        """Return the position of this (multiplicity, number of free coordinates) that ``point`` lies on."""
        found = [
            letter
            for letter in range(len(self))
            if self.kind[letter] == kind and any(_contains(op, point) for op in self.operations[letter])
        ]
        assert len(found) == 1
        return found[0]

    def orbit(self, letter: int, point: np.ndarray) -> np.ndarray:
        """Return all atoms of the orbit through a generic ``point`` of the position."""
        general = self.operations[-1]
        atoms = np.array([rotation @ point + translation for rotation, translation in general]) % 1.0
        distinct = [atoms[0]]
        for atom in atoms[1:]:
            away = np.array(distinct) - atom
            if np.abs(away - away.round()).max(axis=1).min() > 1e-4:
                distinct.append(atom)
        assert len(distinct) == self.kind[letter][0]
        return np.array(distinct)


def _contains(operation: Affine, point: np.ndarray) -> bool:
    rotation, translation = operation
    away = point - translation + SHIFTS
    return bool((np.abs(away @ np.linalg.pinv(rotation).T @ rotation.T - away).max(axis=1) < 1e-6).any())


def is_orthorhombic(space_group: int) -> bool:
    return 16 <= space_group <= 74


def derived(positions: Positions, operation: Affine, rng: np.random.Generator, *, axes: bool) -> tuple[int, ...]:
    """Return where ``operation`` takes each letter, and which old axis becomes each new one, from coordinates alone."""
    rotation, translation = operation
    letters = [
        positions.letter_of(rotation @ positions.point(letter, rng) + translation, positions.kind[letter])
        for letter in range(len(positions))
    ]
    return (*letters, *(np.abs(rotation).argmax(axis=1).tolist() if axes else (0, 1, 2)))


def table_rows(space_group: int, n_letters: int) -> list[tuple[int, ...]]:
    g = space_group - 1
    rows = torch.cat([SYMMETRY.alternative_letters[g, :, :n_letters], SYMMETRY.alternative_axes[g]], dim=1)
    return [tuple(row) for row in rows[: SYMMETRY.n_alternatives[g]].tolist()]


@pytest.mark.parametrize("space_group", [5, 12, 14, 16, 19, 62, 71, 99, 123, 141, 166, 194, 198, 216, 225, 227])
def test_the_table_holds_exactly_the_relabellings_that_the_operations_cause(space_group: int) -> None:
    positions, rng = Positions(space_group), np.random.default_rng(space_group)
    axes = is_orthorhombic(space_group)
    expected = {derived(positions, operation, rng, axes=axes) for operation in positions.normaliser}
    rows = table_rows(space_group, len(positions))
    assert len(rows) == len(set(rows))
    assert set(rows) == expected


def structure(positions: Positions, lattice: list[float], orbits: list[tuple[str, int, np.ndarray]]) -> Structure:
    atoms = [(symbol, xyz) for symbol, letter, point in orbits for xyz in positions.orbit(letter, point)]
    return Structure(Lattice.from_parameters(*lattice), [symbol for symbol, _ in atoms], [xyz for _, xyz in atoms])


@pytest.mark.parametrize("space_group", [19, 47, 71])
def test_an_image_with_permuted_axes_is_the_same_structure(space_group: int) -> None:
    positions, rng = Positions(space_group), np.random.default_rng(space_group)
    letters = [0, len(positions) - 1]
    lengths = [4.0, 5.5, 7.0]  # no two alike, so that a wrong permutation is another crystal
    points = [positions.point(letter, rng) for letter in letters]
    rows = table_rows(space_group, len(positions))
    crystal = batch(space_group, [(11, letters[0]), (17, letters[1])], lengths)
    original = structure(positions, [*lengths, 90, 90, 90], list(zip(["Na", "Cl"], letters, points, strict=True)))
    seen_axes = set()
    for operation in positions.normaliser:
        row = derived(positions, operation, rng, axes=True)
        if row[-3:] in seen_axes:
            continue
        seen_axes.add(row[-3:])
        moved = image(crystal, torch.tensor([rows.index(row)]))
        transformed = [operation[0] @ point + operation[1] for point in points]
        orbits = list(zip(["Na", "Cl"], moved.letters[0].tolist(), transformed, strict=True))
        again = structure(positions, moved.lattice_parameters[0].tolist(), orbits)
        matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.1, primitive_cell=False, scale=False)
        assert matcher.fit(original, again)
    assert len(seen_axes) > 1


def batch(space_group: int, orbits: list[tuple[int, int]], lengths: list[float]) -> CrystalBatch:
    """Return one crystal from (atomic number, letter) pairs."""
    g = torch.tensor([space_group])
    letters = torch.tensor([[letter for _, letter in orbits]])
    angles = [90.0, 90.0, 120.0] if 143 <= space_group <= 194 else [90.0, 90.0, 90.0]
    return CrystalBatch(
        space_group=g,
        elements=torch.tensor([[element for element, _ in orbits]]),
        letters=letters,
        counts=SYMMETRY.primitive_multiplicity[g - 1].gather(1, letters),
        lattice_parameters=torch.tensor([[*lengths, *angles]], dtype=torch.float64),
    )


def key(crystal: CrystalBatch) -> tuple[object, ...]:
    orbits = sorted(zip(crystal.elements[0].tolist(), crystal.letters[0].tolist(), strict=True))
    return (tuple(orbits), *crystal.lattice_parameters[0].round(decimals=6).tolist())


def images(crystal: CrystalBatch) -> list[CrystalBatch]:
    n = int(SYMMETRY.n_alternatives[crystal.space_group - 1])
    return [image(crystal, torch.tensor([a])) for a in range(n)]


CASES = [
    (225, [(11, 0), (17, 1)], 2),  # rock salt: cations on 4a or 4b
    (225, [(11, 2)], 1),
    (221, [(38, 0), (22, 1), (8, 2)], 2),  # perovskite
    (227, [(12, 0), (13, 3), (8, 4)], 2),  # spinel
    (216, [(30, 0), (16, 2)], 8),  # zinc blende: four choices of the origin, and inversion
    (166, [(3, 0), (27, 1), (8, 2)], 2),
    (12, [(3, 0), (27, 3), (8, 8)], 4),
    (14, [(29, 4)], 1),
]


@pytest.mark.parametrize(("space_group", "orbits", "n_images"), CASES)
def test_known_crystals_have_their_number_of_images(
    space_group: int, orbits: list[tuple[int, int]], n_images: int
) -> None:
    crystal = batch(space_group, orbits, [5.0, 5.0, 5.0])
    assert len({key(moved) for moved in images(crystal)}) == n_images
    assert float(log_n_images(crystal, WIDE)[0]) == pytest.approx(math.log(n_images))


def random_crystals(n: int, seed: int) -> CrystalBatch:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(1, 231, (n,), generator=generator)
    crystals = []
    for g in groups.tolist():
        n_letters = int(SYMMETRY.n_letters[g - 1])
        letters = torch.randint(n_letters, (3,), generator=generator).tolist()
        elements = torch.tensor([8, 14, 26])[torch.randint(3, (3,), generator=generator)].tolist()
        lengths = 4.0 + 3.0 * torch.rand(3, generator=generator, dtype=torch.float64)
        if not is_orthorhombic(g):
            lengths = lengths[0].expand(3)
        crystals.append(batch(g, list(zip(elements, letters, strict=True)), lengths.tolist()))
    return CrystalBatch.cat(crystals)


def distinct_images(crystal: CrystalBatch, box: Box) -> set[tuple[object, ...]]:
    inside = alternatives_inside(crystal, box)[0]
    return {key(moved) for a, moved in enumerate(images(crystal)) if inside[a]}


@pytest.mark.parametrize("box", [WIDE, Box(length=(3.0, 9.0))])
def test_the_number_of_images_is_that_of_brute_force(box: Box) -> None:
    crystals = random_crystals(300, seed=1)
    counted = log_n_images(crystals, box).exp()
    expected = [len(distinct_images(crystals.select([i]), box)) for i in range(len(crystals))]
    assert max(expected) > 8
    assert_close(counted, torch.tensor(expected, dtype=torch.float64))


def test_images_outside_the_box_of_axis_ratios_do_not_count() -> None:
    # log(b/a) of orthorhombic cells lies in (-1.85, 2.45): b = 8 a has an image outside, where a and b are exchanged.
    inside, edge = batch(47, [(8, 26)], [3.0, 4.0, 5.0]), batch(47, [(8, 26)], [2.0, 16.0, 4.0])
    assert bool(alternatives_inside(inside, WIDE)[0, : SYMMETRY.n_alternatives[46]].all())
    assert not bool(alternatives_inside(edge, WIDE)[0, : SYMMETRY.n_alternatives[46]].all())
    assert float(log_n_images(inside, WIDE)[0].exp()) == pytest.approx(6.0)
    lengths = torch.tensor([2.0, 16.0, 4.0]).log()
    permuted = [lengths[list(axes)] for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
    fits = sum(bool((((p[1:] - p[0]) >= -1.85) & ((p[1:] - p[0]) <= 2.45)).all()) for p in permuted)
    assert float(log_n_images(edge, WIDE)[0].exp()) == pytest.approx(float(fits))


def test_images_of_images_are_images() -> None:
    crystals = random_crystals(60, seed=2)
    for i in range(len(crystals)):
        crystal = crystals.select([i])
        orbit = {key(moved) for moved in images(crystal)}
        for moved in images(crystal):
            assert {key(again) for again in images(moved)} == orbit


def test_images_have_equally_many_images_and_keep_everything_but_letters_and_axes() -> None:
    crystals = random_crystals(400, seed=3)
    generator = torch.Generator().manual_seed(4)
    alternative = (
        torch.rand(len(crystals), generator=generator) * SYMMETRY.n_alternatives[crystals.space_group - 1]
    ).long()
    moved = image(crystals, alternative)
    inside = alternatives_inside(crystals, WIDE).gather(1, alternative[:, None])[:, 0]
    assert_close(log_n_images(moved, WIDE)[inside], log_n_images(crystals, WIDE)[inside])
    for name in ("space_group", "elements", "counts"):
        assert_close(getattr(moved, name), getattr(crystals, name))
    assert_close(moved.volume, crystals.volume)
    multiplicity = SYMMETRY.primitive_multiplicity[crystals.space_group - 1]
    assert_close(multiplicity.gather(1, moved.letters), multiplicity.gather(1, crystals.letters))
    assert not torch.equal(moved.letters, crystals.letters)


def test_crystals_without_letters_count_their_axes_only() -> None:
    crystals = CrystalBatch.cat([batch(g, [(8, 0)], [4.0, 5.0, 6.0]) for g in (47, 16, 62)]).without_letters()
    assert_close(log_n_images(crystals, WIDE).exp(), torch.tensor([6.0, 6.0, 1.0], dtype=torch.float64))


def test_random_images_visit_every_image_equally_often_and_stay_in_the_box() -> None:
    n = 4000
    zinc_blende = CrystalBatch.cat([batch(216, [(30, 0), (16, 2)], [5.4, 5.4, 5.4])] * n)
    drawn = random_image(zinc_blende, WIDE, torch.Generator().manual_seed(0))
    numbers = torch.bincount(drawn.letters[:, 0], minlength=4)[:4].double()
    assert int(numbers.sum()) == n
    assert bool(((numbers / n - 0.25).abs() < 5 * math.sqrt(0.25 * 0.75 / n)).all())
    edge = CrystalBatch.cat([batch(47, [(8, 26)], [2.0, 16.0, 4.0])] * 200)
    drawn = random_image(edge, WIDE, torch.Generator().manual_seed(1))
    ratios: Tensor = (drawn.lattice_parameters[:, 1:3] / drawn.lattice_parameters[:, :1]).log()
    assert bool(((ratios >= -1.85) & (ratios <= 2.45)).all())
