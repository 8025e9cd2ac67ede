"""The record of crystals: volumes, formulas and the operations that keep rows apart."""

import numpy as np
import pytest
import torch
from pymatgen.core import Composition, Lattice
from torch.testing import assert_close

from envs.crystal import CrystalBatch, CrystalError, LatticeError, cell_volume
from envs.symmetry import SYMMETRY


@pytest.fixture
def crystals() -> CrystalBatch:
    """Rock salt, rutile and corundum (hexagonal axes)."""
    return CrystalBatch(
        space_group=torch.tensor([225, 136, 167]),
        elements=torch.tensor([[11, 17], [22, 8], [13, 8]]),
        letters=torch.tensor([[0, 1], [0, 5], [2, 4]]),
        counts=torch.tensor([[1, 1], [2, 4], [4, 6]]),
        lattice_parameters=torch.tensor(
            [[5.64, 5.64, 5.64, 90, 90, 90], [4.594, 4.594, 2.959, 90, 90, 90], [4.76, 4.76, 12.99, 90, 90, 120]],
            dtype=torch.float64,
        ),
    )


def test_volume_agrees_with_pymatgen_for_random_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = 2.0 + 10.0 * torch.rand(50, 3, generator=generator, dtype=torch.float64)
    angles = 70.0 + 40.0 * torch.rand(50, 3, generator=generator, dtype=torch.float64)
    parameters = torch.cat([lengths, angles], dim=1)
    expected = torch.tensor([Lattice.from_parameters(*row).volume for row in parameters.tolist()], dtype=torch.float64)
    assert_close(cell_volume(parameters), expected)


def test_cells_that_do_not_close_are_named() -> None:
    parameters = torch.tensor([[3.0, 3, 3, 90, 90, 90], [3.0, 3, 3, 60, 60, 150]], dtype=torch.float64)
    with pytest.raises(LatticeError, match=r"first rows \[1\]"):
        cell_volume(parameters)


def test_tensors_that_do_not_fit_together_are_named(crystals: CrystalBatch) -> None:
    with pytest.raises(CrystalError, match=r"letters must have shape \(3, 2\), got \(3, 1\)"):
        CrystalBatch(
            crystals.space_group,
            crystals.elements,
            crystals.letters[:, :1],
            crystals.counts,
            crystals.lattice_parameters,
        )


def test_centring_agrees_with_the_symmetry_table() -> None:
    groups = torch.arange(1, 231)
    n = len(groups)
    columns = torch.ones(n, 1, dtype=torch.int64)
    batch = CrystalBatch(groups, columns, columns, columns, torch.full((n, 6), 90.0, dtype=torch.float64))
    assert torch.equal(batch.centring, SYMMETRY.centring)


def test_formulas_and_positions_read_as_chemists_write_them(crystals: CrystalBatch) -> None:
    assert crystals.formulas() == ["NaCl", "TiO2", "Al2O3"]
    assert crystals.chemical_systems() == ["Cl-Na", "O-Ti", "Al-O"]
    assert crystals.wyckoff_strings() == ["Na:4a Cl:4b", "Ti:2a O:4f", "Al:12c O:18e"]


def test_volume_per_atom_counts_the_centring(crystals: CrystalBatch) -> None:
    # corundum: 30 atoms in the hexagonal cell, 8.5 Å³ each
    assert crystals.volume_per_atom[2].item() == pytest.approx(4.76**2 * 12.99 * 3**0.5 / 2 / 30)
    assert crystals.n_atoms.tolist() == [2, 6, 10]


def test_composition_counts_every_atom(crystals: CrystalBatch) -> None:
    composition = crystals.composition
    assert composition.shape == (3, 119)
    assert composition[1, 22].item() == 2
    assert composition[1, 8].item() == 4
    assert torch.equal(composition.sum(dim=1), crystals.n_atoms)


def test_merging_letters_keeps_composition_and_order_of_elements() -> None:
    spinel_like = CrystalBatch(
        torch.tensor([1, 1]),
        torch.tensor([[26, 8, 26, 8], [11, 17, 0, 0]]),
        torch.tensor([[0, 0, 0, 0], [0, 0, -1, -1]]),
        torch.tensor([[1, 1, 2, 3], [1, 1, 0, 0]]),
        torch.tensor([[5.0, 6, 7, 80, 85, 95], [5.0, 6, 7, 80, 85, 95]], dtype=torch.float64),
    )
    merged = spinel_like.without_letters()
    assert merged.elements.tolist() == [[26, 8], [11, 17]]
    assert merged.counts.tolist() == [[3, 4], [1, 1]]
    assert (merged.letters == -1).all()
    assert merged.wyckoff_strings() == ["", ""]
    assert torch.equal(merged.composition, spinel_like.composition)
    assert torch.equal(merged.without_letters().counts, merged.counts)


def test_cat_pads_to_the_widest_and_select_takes_it_apart(crystals: CrystalBatch) -> None:
    wide = CrystalBatch(
        torch.tensor([1]),
        torch.tensor([[3, 25, 8]]),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 3, dtype=torch.int64),
        torch.tensor([[3.0, 4, 5, 90, 90, 90]], dtype=torch.float64),
    )
    joined = CrystalBatch.cat([crystals, wide])
    assert len(joined) == joined.n == 4
    assert joined.letters[0].tolist() == [0, 1, -1]
    assert joined.formulas() == ["NaCl", "TiO2", "Al2O3", "LiMnO"]
    for rows in ([3, 0], torch.tensor([3, 0]), torch.tensor([True, False, False, True])):
        picked = joined.select(rows)
        assert sorted(picked.formulas()) == ["LiMnO", "NaCl"]
    assert joined.select(slice(1, 3)).formulas() == ["TiO2", "Al2O3"]
    with pytest.raises(CrystalError, match="at least one batch"):
        CrystalBatch.cat([])


def test_rows_are_chosen_by_number_or_by_mask_of_any_kind(crystals: CrystalBatch) -> None:
    masks = ([False, False, True], np.array([False, False, True]), torch.tensor([False, False, True]))
    for rows in (*masks, [2], np.array([2]), torch.tensor([2], dtype=torch.int32), slice(2, None)):
        assert crystals.select(rows).space_group.tolist() == [167]
    assert len(crystals.select([])) == len(crystals.select(np.array([]))) == 0


def test_formulas_agree_with_pymatgen_on_elements_too() -> None:
    oxygen = CrystalBatch(
        torch.tensor([1]),
        torch.tensor([[8]]),
        torch.tensor([[0]]),
        torch.tensor([[4]]),
        torch.tensor([[3.0, 4, 5, 90, 90, 90]], dtype=torch.float64),
    )
    assert oxygen.formulas() == [Composition("O4").reduced_formula]
