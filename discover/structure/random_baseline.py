"""Random coordinates on the chosen Wyckoff positions: the baseline that every learned generator must beat.

Letters and lattice are given, so only the free parameters of each position are drawn, uniformly; positions and their
operations are PyXtal's. Of many draws the one whose shortest distance is largest, in units of the sum of covalent
radii, is kept. A crystal without letters first gets random ones that its space group allows.
"""

import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from tqdm import tqdm

from discover.structure.base import StructureError
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

_NEIGHBOURS = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3, indexing="ij"), axis=-1).reshape(-1, 3).astype(float)  # (27, 3)
_HOME = 13  # row of _NEIGHBOURS that is no shift

Orbit = tuple[int, int]  # atomic number, index of the letter


@dataclass(frozen=True)
class RandomCoordinates:
    """Draws coordinates at random and keeps the least crowded draw.

    Args:
        n_tries: Draws per crystal; a crystal without letters gets new ones every `batch` draws.
        good_enough: Stop as soon as every distance is this multiple of the sum of covalent radii.
        min_ratio: Give up on the crystal if the best draw stays below this multiple.
        time_limit: Seconds after which a crystal counts as failed, a guard against very large cells.
        batch: Draws looked at together.
        progress: Show a progress bar.
    """

    n_tries: int = 256
    good_enough: float = 0.9
    min_ratio: float = 0.6
    time_limit: float = 10.0
    batch: int = 32
    progress: bool = False

    def generate(self, crystals: CrystalBatch, generator: torch.Generator) -> list[Structure | None]:
        """Return a structure of each crystal in its conventional cell, or None where every draw was too crowded.

        Each crystal has its own random numbers, so its structure does not depend on its neighbours in the batch.

        Raises:
            StructureError: If letters and counts of a crystal contradict each other.
        """
        seeds = torch.randint(2**62, (len(crystals),), generator=generator).tolist()
        bar = tqdm(seeds, desc="structures", unit="crystal", disable=not self.progress)
        return [self._one(crystals.select([row]), seed) for row, seed in enumerate(bar)]

    def _one(self, crystal: CrystalBatch, seed: int) -> Structure | None:
        """Return the structure of a batch of one."""
        space_group = int(crystal.space_group)
        columns = zip(*(part[0].tolist() for part in (crystal.elements, crystal.letters, crystal.counts)), strict=True)
        placed = [(z, letter, count) for z, letter, count in columns if count]
        lattice = Lattice.from_parameters(*crystal.lattice_parameters[0].tolist())
        rng = np.random.default_rng(seed)
        with_letters = all(letter >= 0 for _, letter, _ in placed)
        if with_letters:
            _check_counts(space_group, placed)
        orbits: list[Orbit] = [(z, letter) for z, letter, _ in placed]
        best_ratio, best = 0.0, None
        start = time.monotonic()
        for _ in range(0, self.n_tries, self.batch):
            if not with_letters:
                orbits = random_letters(space_group, [(z, count) for z, _, count in placed], rng)
            draws = draw_coordinates(space_group, orbits, self.batch, rng)
            ratios = shortest_ratios(space_group, orbits, draws, lattice.matrix)
            winner = int(ratios.argmax())
            if ratios[winner] > best_ratio:
                best_ratio, best = float(ratios[winner]), (orbits, draws[winner])
            if best_ratio >= self.good_enough or not _has_freedom(space_group, orbits, with_letters=with_letters):
                break
            if time.monotonic() - start > self.time_limit:
                return None
        if best is None or best_ratio < self.min_ratio:
            return None
        return _structure(lattice, space_group, *best)


@lru_cache(maxsize=256)
def wyckoff_operations(space_group: int) -> tuple[NDArray[np.float64], ...]:
    """Return the operations of each Wyckoff position, "a" first: (multiplicity, 3, 4) rotation and translation."""
    from pyxtal.symmetry import Group  # noqa: PLC0415 - takes a second to import, and only structures need it

    positions = sorted(Group(space_group).Wyckoff_positions, key=lambda position: _letter_order(position.letter))
    return tuple(np.stack([op.affine_matrix[:3] for op in position.ops]) for position in positions)


def draw_coordinates(
    space_group: int, orbits: list[Orbit], n: int, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Return `n` random draws of all atoms, each (n_atoms, 3) fractional in [0, 1), orbits one after another."""
    operations = wyckoff_operations(space_group)
    parts = []
    for _, letter in orbits:
        ops = operations[letter]
        free = rng.random((n, 3))
        parts.append((np.einsum("mij,nj->nmi", ops[:, :, :3], free) + ops[:, :, 3]) % 1.0)
    return list(np.concatenate(parts, axis=1))


def shortest_ratios(
    space_group: int, orbits: list[Orbit], draws: list[NDArray[np.float64]], matrix: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return for each draw the smallest distance between two atoms over the sum of their covalent radii, (n,).

    By symmetry the distances from one atom of each orbit suffice; periodic images next to the cell are looked at.

    Args:
        space_group: International number.
        orbits: Atomic number and letter of each orbit.
        draws: Fractional coordinates of each draw, (n_atoms, 3), orbits one after another.
        matrix: (3, 3) rows a, b, c in Å.
    """
    operations = wyckoff_operations(space_group)
    sizes = np.array([len(operations[letter]) for _, letter in orbits])
    first = np.concatenate([[0], sizes.cumsum()[:-1]])
    radii = np.array([covalent_radii[z] for z, _ in orbits])
    radius = radii.repeat(sizes)
    coords = np.stack(draws)  # (n, atoms, 3)
    difference = coords[:, None, :, :] - coords[:, first, None, :]
    difference -= np.round(difference)
    shifted = (difference @ matrix)[..., None, :] + _NEIGHBOURS @ matrix  # (n, orbits, atoms, 27, 3)
    squared = np.einsum("noaki,noaki->noak", shifted, shifted)
    squared[:, np.arange(len(orbits)), first, _HOME] = np.inf  # an atom and itself
    distance = np.sqrt(squared.min(axis=-1))
    ratios: NDArray[np.float64] = (distance / (radii[:, None] + radius)).min(axis=(1, 2))
    return ratios


def random_letters(space_group: int, amounts: list[tuple[int, int]], rng: np.random.Generator) -> list[Orbit]:
    """Return random Wyckoff letters that hold the given atoms, by depth-first search with memory of dead ends.

    Args:
        space_group: International number.
        amounts: (atomic number, atoms per primitive cell) of each element.
        rng: Source of randomness.

    Raises:
        StructureError: If the space group cannot hold these numbers.
    """
    group = space_group - 1
    n_letters = int(SYMMETRY.n_letters[group])
    sizes = SYMMETRY.primitive_multiplicity[group, :n_letters].tolist()
    fixed = (SYMMETRY.n_free_coords[group, :n_letters] == 0).tolist()
    dead: set[tuple[int, int, int]] = set()

    def place(index: int, left: int, used: int) -> list[Orbit] | None:
        if left == 0:
            return [] if index + 1 == len(amounts) else place(index + 1, amounts[index + 1][1], used)
        if (index, left, used) in dead:
            return None
        for letter in rng.permutation(n_letters).tolist():
            if sizes[letter] > left or (fixed[letter] and used >> letter & 1):
                continue
            rest = place(index, left - sizes[letter], used | (1 << letter if fixed[letter] else 0))
            if rest is not None:
                return [(amounts[index][0], letter), *rest]
        dead.add((index, left, used))
        return None

    orbits = place(0, amounts[0][1], 0)
    if orbits is None:
        raise StructureError(f"space group {space_group} has no positions for {amounts} (atomic number, atoms)")
    return orbits


def _letter_order(letter: str) -> int:
    return 26 if letter == "A" else ord(letter) - ord("a")


def _check_counts(space_group: int, placed: list[tuple[int, int, int]]) -> None:
    for z, letter, count in placed:
        size = int(SYMMETRY.primitive_multiplicity[space_group - 1, letter])
        if size != count:
            raise StructureError(
                f"letter {letter} of space group {space_group} holds {size} atoms per primitive cell, "
                f"the crystal puts {count} of element {z} there"
            )


def _has_freedom(space_group: int, orbits: list[Orbit], *, with_letters: bool) -> bool:
    """Return whether another draw could differ from the last one."""
    return not with_letters or any(int(SYMMETRY.n_free_coords[space_group - 1, letter]) > 0 for _, letter in orbits)


def _structure(lattice: Lattice, space_group: int, orbits: list[Orbit], coords: NDArray[np.float64]) -> Structure:
    operations = wyckoff_operations(space_group)
    species = [Element.from_Z(z) for z, letter in orbits for _ in range(len(operations[letter]))]
    return Structure(lattice, species, coords).get_sorted_structure()
