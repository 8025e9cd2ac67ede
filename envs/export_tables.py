"""Export the facts of the 230 space groups and of the elements to the small tables that ship.

Run once when PyXtal or SMACT change: ``python -m envs.export_tables``. Building every group with
PyXtal takes about ten seconds, reading the exported table a few milliseconds.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pymatgen.core import Element
from pyxtal.symmetry import Group
from smact import element_dictionary
from smact.screening import MIXED_VALENCE_ELEMENTS, ICSD24FilterConfig
from smact.screening import _get_icsd24_oxidation_states as icsd24_oxidation_states

from envs.conventions import (
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


def group_alternatives(group: Group, n_letters: int, *, orthorhombic: bool) -> list[tuple[int, ...]]:
    """Return the distinct (letter becomes, new axis was) rows of the Euclidean normaliser, identity first.

    Axes count in orthorhombic groups only; elsewhere the listed operations leave the six
    conventional lattice parameters as they are.
    """
    found = group.get_alternatives()
    rows: dict[tuple[int, ...], None] = {}
    for operation, letters in zip(found["Coset Representative"], found["Transformed WP"], strict=True):
        # PyXtal lists, for each letter of the transformed crystal, the letter that it came from.
        came_from = [LETTERS.index(letter) for letter in letters.split()]
        letter_map = tuple(came_from.index(i) for i in range(n_letters))
        axes = axis_permutation(operation) if orthorhombic else (0, 1, 2)
        rows[(*letter_map, *range(n_letters, MAX_LETTERS), *axes)] = None
    return list(rows)


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
    export_chemistry(TABLES / "chemistry.json")
