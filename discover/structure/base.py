"""What a structure generator is, and how a structure is written."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SymmetryUndeterminedError

from envs.crystal import CrystalBatch

NO_COORDINATES = "no coordinates without overlapping atoms were found"
_CIF_SYMPREC = (1e-3, 1e-5)  # Å; the wider also finds what relaxed coordinates have, the other is exact to rounding


class StructureError(ValueError):
    """A crystal whose letters and counts do not describe a structure."""


class StructureGenerator(Protocol):
    """Finds coordinates for crystals."""

    def generate(self, crystals: CrystalBatch, generator: torch.Generator) -> list[Structure | None]:
        """Return a structure of each crystal, in order, or None where none could be found.

        Structures are conventional cells in PyXtal's setting with the lattice of the crystal, or a refined one. A None
        is a failure and counts in the denominator of every rate.
        """


def cif_text(structure: Structure) -> str:
    """Return a CIF with the symmetry operations of the structure and its asymmetric unit, in the cell as given.

    Operations that hold only nearly put copies of an atom beside it, and a reader then sees other atoms: what does not
    read back as it was is written with exact operations, or with every atom and none.
    """
    for symprec in _CIF_SYMPREC:
        try:
            text = str(CifWriter(structure, symprec=symprec, refine_struct=False))
        except SymmetryUndeterminedError:  # atoms on one spot
            continue
        if _reads_back(text, structure):
            return text
    return str(CifWriter(structure))


def _reads_back(text: str, structure: Structure) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the sites that are too many
        try:
            read = Structure.from_str(text, fmt="cif")
        except ValueError:
            return False
    return bool(read.composition == structure.composition)


def with_lattices(crystals: CrystalBatch, structures: Sequence[Structure | None]) -> CrystalBatch:
    """Return the crystals with the cell of their structure, which a generator may have refined."""
    lattices = crystals.lattice_parameters.clone()
    for row, structure in enumerate(structures):
        if structure is not None:
            lattices[row] = torch.tensor(structure.lattice.parameters, dtype=lattices.dtype)
    return replace(crystals, lattice_parameters=lattices)
