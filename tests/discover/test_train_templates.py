"""The aggregate: what shares a Wyckoff sequence is merged in one setting, and no row is in the file."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from discover.errors import CheckpointError, DataError
from discover.structure.orbits import to_structures
from discover.templates import Templates, load_templates, retrieve, save_templates, templates_of_data
from discover.train_templates import FEWEST_MATERIALS, aggregate
from tests.discover.test_templates import prepared
from tests.discover.textbook import perovskite, rock_salt, rutile


def a_rutile(metal: str, a: float, c: float, u: float, origin: float = 0.0) -> Structure:
    shift = np.array([0, 0, origin])
    coords = np.array([[0, 0, 0], [u, u, 0]]) + shift
    return Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(a, c), [metal, "O"], coords % 1.0)


def a_rock_salt(metal: str, other: str, length: float, *, swapped: bool = False) -> Structure:
    elements = [other, metal] if swapped else [metal, other]
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(length), elements, [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture(scope="module")
def rows() -> Templates:
    structures = [
        a_rutile("Ti", 4.594, 2.959, 0.305),
        a_rutile("Sn", 4.737, 3.186, 0.306, origin=0.5),  # metals on the other letter
        a_rutile("Ru", 4.49, 3.11, 0.307),
        a_rock_salt("Na", "Cl", 5.64),
        a_rock_salt("K", "Br", 6.6, swapped=True),
        a_rock_salt("Mg", "O", 4.21),
        a_rock_salt("Li", "F", 4.03, swapped=True),
        perovskite(),  # alone, so that it may not be in an aggregate
    ]
    return templates_of_data(prepared(structures, [0.0] * len(structures)))


@pytest.fixture(scope="module")
def merged(rows: Templates) -> Templates:
    return aggregate(rows, progress=False)


def test_each_shared_sequence_is_one_template(merged: Templates) -> None:
    assert sorted(zip(merged.space_group.tolist(), merged.n_materials.tolist(), strict=True)) == [(136, 3), (225, 4)]
    assert int(merged.n_materials.min()) >= FEWEST_MATERIALS


def test_parameters_and_cells_are_means_in_one_setting(rows: Templates, merged: Templates) -> None:
    (found,) = (merged.space_group == 136).nonzero().flatten().tolist()
    free = merged.parameters[found][merged.parameters[found] != 0]
    (u,) = free.tolist()
    assert min(u, 1 - u, abs(u - 0.5), abs(0.5 - u)) == pytest.approx(min(0.306, 0.5 - 0.306), abs=1e-6)
    expected = rows.cells[:3, :3].log().mean(dim=0).exp()
    torch.testing.assert_close(merged.cells[found, :3], expected)
    torch.testing.assert_close(merged.cell_spread[found, :3], rows.cells[:3, :3].log().std(dim=0))
    (proposal,) = to_structures(*merged.realise(torch.tensor([found]), torch.tensor([[22, 8]])), primitive=True)
    assert StructureMatcher(ltol=0.1, stol=0.1, angle_tol=2).fit(proposal, rutile())


def test_elements_are_counted_on_the_kind_they_belong_to(merged: Templates) -> None:
    """In rock salt both kinds are the same to symmetry; the electropositive elements make up one of them."""
    (found,) = (merged.space_group == 225).nonzero().flatten().tolist()
    shares = merged.kind_shares[found].sum(dim=1)
    torch.testing.assert_close(shares, torch.ones(2, dtype=torch.float64))
    seen = [set(kind.tolist()) - {0} for kind in merged.kind_elements[found]]
    assert seen == [{3, 11, 12, 19}, {8, 9, 17, 35}]


def test_an_aggregate_is_searched_like_rows(merged: Templates) -> None:
    proposals = retrieve(merged, [{"Rb": 1, "I": 1}, {"Pb": 2, "O": 4}], 1)
    assert proposals.crystals.space_group.tolist() == [225, 136]
    built = to_structures(proposals.crystals, proposals.parameters, primitive=True)
    assert StructureMatcher(scale=True).fit_anonymous(built[0], rock_salt())


def test_the_file_holds_no_row_and_loads_again(merged: Templates, tmp_path: Path) -> None:
    path = tmp_path / "templates.npz"
    assert save_templates(merged, path) == path.stat().st_size
    with np.load(path) as stored:
        assert not {"formulas", "ids", "e_above_hull"} & set(stored.files)
    loaded = load_templates(path)
    for field in fields(Templates):
        old, new = getattr(merged, field.name), getattr(loaded, field.name)
        if field.name == "formulas":
            assert (new == "").all()
        else:
            torch.testing.assert_close(new, old, atol=1e-3, rtol=1e-3, equal_nan=True)


def test_what_ships_comes_from_at_least_three_materials_each() -> None:
    shipped = load_templates()
    assert len(shipped) > 2000
    assert int(shipped.n_materials.min()) >= FEWEST_MATERIALS
    proposals = retrieve(shipped, [{"Sr": 1, "Ti": 1, "O": 3}], 3)
    assert 221 in proposals.crystals.space_group.tolist()


def test_too_few_crystals_and_damaged_files_are_refused(rows: Templates, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Wyckoff sequence is shared by 3 of the 2 materials"):
        aggregate(rows.select(torch.tensor([0, 7])), progress=False)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="holds no templates"):
        load_templates(tmp_path / "broken.npz")
