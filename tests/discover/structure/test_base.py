"""A CIF says what the structure is."""

import pytest
from pymatgen.core import Lattice, Structure

from discover.structure.base import cif_text


@pytest.fixture
def nearly_symmetric() -> Structure:
    """FeO in Pmn2_1 that is 1e-3 Å short of Pmmn: operations of the latter would double its oxygen."""
    cell = Lattice.from_parameters(2.89217209815979, 3.6376421451568604, 3.963006019592285, 90.0, 90.0, 90.0)
    coordinates = [
        [0.0, 0.7497560978149468, 0.8102806213578156],
        [0.5, 0.25024390351644843, 0.3102806213063754],
        [0.0, 0.7490081187968285, 0.3103898767548556],
        [0.5, 0.25099187978553317, 0.8103898768062957],
    ]
    return Structure(cell, ["Fe", "Fe", "O", "O"], coordinates)


def test_a_cif_of_nearly_another_symmetry_reads_back_as_the_same_atoms(nearly_symmetric: Structure) -> None:
    read = Structure.from_str(cif_text(nearly_symmetric), fmt="cif")
    assert read.composition == nearly_symmetric.composition
    assert read.density == pytest.approx(nearly_symmetric.density, rel=1e-6)
    assert min(read.distance_matrix[read.distance_matrix > 0]) > 1.5


def test_a_cif_of_atoms_on_one_spot_holds_every_atom() -> None:
    doubled = Structure(Lattice.cubic(4.0), ["Na", "Na", "Cl"], [[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0.5]])
    text = cif_text(doubled)
    assert "_symmetry_Int_Tables_number   1\n" in text
    assert text.count("Na0") + text.count("Na1") >= 2
