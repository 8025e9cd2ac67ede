"""Export the facts of the 230 space groups, their operations and the elements to the small tables that ship.

Run once when PyXtal or SMACT change: ``python -m envs.export_tables``. Building every group with
PyXtal takes about ten seconds, reading the exported table a few milliseconds.
"""

import json
import re
from collections.abc import Iterable
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element
from pymatgen.core.operations import SymmOp
from pyxtal.symmetry import Group
from smact import element_dictionary
from smact.screening import MIXED_VALENCE_ELEMENTS, ICSD24FilterConfig
from smact.screening import _get_icsd24_oxidation_states as icsd24_oxidation_states

from envs.conventions import (
    GRID,
    LATTICE_SYSTEMS,
    LETTERS,
    MAX_LETTERS,
    N_SPACE_GROUPS,
    TABLES,
    point_symmetry_of_class,
)

AXES = "xyz"


def lattice_system_index(space_group: int) -> int:
    """Return the crystal-lattice system (0-7, order of ``LATTICE_SYSTEMS``) of a space group 1-230."""
    if space_group in (146, 148, 155, 160, 161, 166, 167):
        return LATTICE_SYSTEMS.index("rhombohedral")
    last_of_system = (2, 15, 74, 142, 167, 194, 230)
    names = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
    return LATTICE_SYSTEMS.index(names[sum(space_group > last for last in last_of_system)])


def axis_permutation(coset_representative: str) -> tuple[int, int, int]:
    """Return which old axis becomes each new axis, from a string such as ``"z,x+1/2,y"``."""
    parts = coset_representative.replace(" ", "").split(",")
    letters = [re.sub(r"[^xyz]", "", re.sub(r"\d+/\d+", "", part)) for part in parts]
    return (AXES.index(letters[0]), AXES.index(letters[1]), AXES.index(letters[2]))


def group_alternatives(group: Group, n_letters: int, *, orthorhombic: bool) -> dict[tuple[int, ...], str]:
    """Return the distinct (letter becomes, new axis was) rows of the Euclidean normaliser, identity first.

    Each row comes with the first operation that causes it. Axes count in orthorhombic groups only; elsewhere the
    listed operations leave the six conventional lattice parameters as they are.
    """
    found = group.get_alternatives()
    rows: dict[tuple[int, ...], str] = {}
    for operation, letters in zip(found["Coset Representative"], found["Transformed WP"], strict=True):
        # PyXtal lists, for each letter of the transformed crystal, the letter that it came from.
        came_from = [LETTERS.index(letter) for letter in letters.split()]
        letter_map = tuple(came_from.index(i) for i in range(n_letters))
        axes = axis_permutation(operation) if orthorhombic else (0, 1, 2)
        rows.setdefault((*letter_map, *range(n_letters, MAX_LETTERS), *axes), operation)
    return rows


def integer_left_inverse(rotation: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the (3, 3) integer matrix that takes ``rotation @ u`` back to the free coordinates of u.

    The free coordinates of a Wyckoff position are the columns that are not zero. Of all 14,433 operations each has rows
    that form a unimodular matrix with them, so a position fixes its parameters up to whole numbers.

    Raises:
        ValueError: If there are no such rows.
    """
    inverse = np.zeros((3, 3), dtype=np.int64)
    free = np.flatnonzero(np.abs(rotation).sum(axis=0))
    if not len(free):
        return inverse
    for rows in map(np.array, combinations(range(3), len(free))):
        block = rotation[rows[:, None], free]
        if round(abs(np.linalg.det(block))) == 1:
            inverse[free[:, None], rows] = np.linalg.inv(block).round().astype(np.int64)
            return inverse
    raise ValueError(f"no unimodular rows in {rotation.tolist()}")


def parse_operations(operations: Iterable[SymmOp]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rotations (n, 3, 3) and translations (n, 3) in units of 1/24.

    Raises:
        ValueError: If an entry is no whole number of these units.
    """
    affine = np.stack([operation.affine_matrix[:3] for operation in operations])
    rotation, translation = affine[:, :, :3].round().astype(np.int64), (affine[:, :, 3] * GRID).round().astype(np.int64)
    if not (np.allclose(affine[:, :, :3], rotation) and np.allclose(affine[:, :, 3] * GRID, translation)):
        raise ValueError("an operation is not on the grid of 1/24")
    return rotation, translation % GRID


def parameter_map(
    move: tuple[NDArray[np.int64], NDArray[np.int64]],
    source: tuple[NDArray[np.int64], NDArray[np.int64]],
    target: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> NDArray[np.int64]:
    """Return (3, 4): how the parameters of a position change when an operation moves it onto another one.

    Args:
        move: Rotation (3, 3) and translation (3,) of the operation.
        source: Operations of the old position; the first one defines its parameters.
        target: Operations of the new position.

    Raises:
        ValueError: If the operation does not take the old position to the new one.
    """
    rotation, translation = move[0] @ source[0][0], move[0] @ source[1][0] + move[1]
    for target_rotation, target_translation in zip(*target, strict=True):
        inverse = integer_left_inverse(target_rotation)
        linear, shift = inverse @ rotation, inverse @ (translation - target_translation)
        away = target_rotation @ shift - (translation - target_translation)
        if (target_rotation @ linear == rotation).all() and not (away % GRID).any():
            return np.concatenate([linear, shift[:, None] % GRID], axis=1)
    raise ValueError("the operation does not map one position to the other")


def export_operations(path: Path) -> None:
    """Write the operations of every Wyckoff position, and how the normaliser moves their parameters."""
    rotations, translations, maps = [], [], []
    for g in range(N_SPACE_GROUPS):
        group = Group(g + 1)
        found = sorted(group.Wyckoff_positions, key=lambda position: LETTERS.index(position.letter))
        operations = [parse_operations(position.ops) for position in found]
        rotations += [rotation for rotation, _ in operations]
        translations += [translation for _, translation in operations]
        orthorhombic = LATTICE_SYSTEMS[lattice_system_index(g + 1)] == "orthorhombic"
        for row, operation in group_alternatives(group, len(found), orthorhombic=orthorhombic).items():
            rotation, translation = parse_operations([SymmOp.from_xyz_str(operation)])
            table = np.zeros((MAX_LETTERS, 3, 4), dtype=np.int64)
            for letter in range(len(found)):
                table[letter] = parameter_map(
                    (rotation[0], translation[0]), operations[letter], operations[row[letter]]
                )
            maps.append(table)
    np.savez_compressed(
        path,
        rotation=np.concatenate(rotations).astype(np.int8),
        translation=np.concatenate(translations).astype(np.int8),
        left_inverse=np.stack([integer_left_inverse(r) for r in np.concatenate(rotations)]).astype(np.int8),
        alternative_map=np.stack(maps).astype(np.int8),
        pyxtal_version=np.array(version("pyxtal")),
    )


def export_symmetry(path: Path) -> None:
    """Write the Wyckoff positions, lattice systems and normaliser alternatives of all groups."""
    shape = (N_SPACE_GROUPS, MAX_LETTERS)
    multiplicity = np.zeros(shape, dtype=np.int16)
    n_free_coords = np.full(shape, -1, dtype=np.int8)
    site_symmetry = np.zeros(shape, dtype=np.int16)
    names = [""]
    n_letters = np.zeros(N_SPACE_GROUPS, dtype=np.int8)
    centring = np.zeros(N_SPACE_GROUPS, dtype=np.int8)
    lattice_system = np.zeros(N_SPACE_GROUPS, dtype=np.int8)
    point_symmetry = np.zeros(N_SPACE_GROUPS, dtype=np.int8)
    alternatives = []
    for g in range(N_SPACE_GROUPS):
        group = Group(g + 1)
        lattice_system[g] = lattice_system_index(g + 1)
        point_symmetry[g] = point_symmetry_of_class(group.point_group)
        centring[g] = {"P": 1, "A": 2, "B": 2, "C": 2, "I": 2, "R": 3, "F": 4}[group.symbol[0]]
        n_letters[g] = len(group.Wyckoff_positions)
        for position in group.Wyckoff_positions:
            i = LETTERS.index(position.letter)
            position.get_site_symmetry()
            name = position.site_symm
            if name not in names:
                names.append(name)
            multiplicity[g, i] = position.multiplicity
            n_free_coords[g, i] = position.get_dof()
            site_symmetry[g, i] = names.index(name)
        orthorhombic = LATTICE_SYSTEMS[lattice_system[g]] == "orthorhombic"
        alternatives.append(group_alternatives(group, int(n_letters[g]), orthorhombic=orthorhombic))
    rows = np.array([(g, *row) for g, found in enumerate(alternatives) for row in found], dtype=np.int16)
    np.savez_compressed(
        path,
        multiplicity=multiplicity,
        n_free_coords=n_free_coords,
        site_symmetry=site_symmetry,
        site_symmetry_names=np.array(names),
        n_letters=n_letters,
        centring=centring,
        lattice_system=lattice_system,
        point_symmetry=point_symmetry,
        alternatives=rows,
        pyxtal_version=np.array(version("pyxtal")),
    )


def export_chemistry(path: Path) -> None:
    """Write Pauling electronegativities and the oxidation states that ``smact_validity`` uses by default."""
    config = ICSD24FilterConfig()
    elements = {}
    for symbol, element in element_dictionary().items():
        states = icsd24_oxidation_states([element], config)
        if element.pauling_eneg is None or states is None or not states[0]:
            continue
        elements[symbol] = {
            "atomic_number": Element(symbol).Z,
            "electronegativity": float(element.pauling_eneg),
            "oxidation_states": sorted({int(q) for q in states[0]}),
            "mixed_valence": symbol in MIXED_VALENCE_ELEMENTS,
        }
    path.write_text(json.dumps({"smact_version": version("smact"), "elements": elements}, indent=1) + "\n")


if __name__ == "__main__":
    export_symmetry(TABLES / "symmetry.npz")
    export_operations(TABLES / "operations.npz")
    export_chemistry(TABLES / "chemistry.json")
