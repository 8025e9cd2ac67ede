"""What a structure generator is, and how a structure is written."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SymmetryUndeterminedError

from envs.crystal import CrystalBatch

NO_COORDINATES = "no coordinates without overlapping atoms were found"
_CIF_SYMPREC = 1e-3  # Å; coordinates are exact to rounding, so nothing but the symmetry that is there is found


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
    """Return a CIF with the symmetry operations of the structure and its asymmetric unit, in the cell as given."""
    try:
        return str(CifWriter(structure, symprec=_CIF_SYMPREC, refine_struct=False))
    except SymmetryUndeterminedError:  # atoms on one spot: every atom is written, without symmetry
        return str(CifWriter(structure))


def with_lattices(crystals: CrystalBatch, structures: Sequence[Structure | None]) -> CrystalBatch:
    """Return the crystals with the cell of their structure, which a generator may have refined."""
    lattices = crystals.lattice_parameters.clone()
    for row, structure in enumerate(structures):
        if structure is not None:
            lattices[row] = torch.tensor(structure.lattice.parameters, dtype=lattices.dtype)
    return replace(crystals, lattice_parameters=lattices)
