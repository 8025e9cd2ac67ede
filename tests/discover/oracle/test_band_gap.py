import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from discover.oracle.band_gap import DESCRIPTION, PRETRAINED, WEIGHTS, GapModel, read
from discover.oracle.gap_network import Atoms, BandGapError, GapNetwork, GapNetworkConfig, collate, describe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CHGNet's, of its own imports


@pytest.fixture(scope="module")
def model() -> GapModel:
    return GapModel.load()


def crystal(group: str, a: float, species: list[str], coords: list[list[float]]) -> Structure:
    return Structure.from_spacegroup(group, Lattice.cubic(a), species, coords)


NACL = crystal("Fm-3m", 5.69, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
MGO = crystal("Fm-3m", 4.25, ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
SILICON = crystal("Fd-3m", 5.47, ["Si"], [[0, 0, 0]])
COPPER = crystal("Fm-3m", 3.62, ["Cu"], [[0, 0, 0]])
BRASS = crystal("Pm-3m", 2.97, ["Cu", "Zn"], [[0, 0, 0], [0.5, 0.5, 0.5]])
LONELY = Structure(Lattice.cubic(7.5), ["Ar"], [[0, 0, 0]])  # no neighbour within 6 Å


# PBE gaps of the Materials Project: NaCl 5.0, MgO 4.4, Si 0.6 eV
@pytest.mark.parametrize(("structure", "gap", "width"), [(NACL, 5.0, 0.6), (MGO, 4.4, 0.9), (SILICON, 0.6, 0.6)])
def test_textbook_insulators_have_their_gap(model: GapModel, structure: Structure, gap: float, width: float) -> None:
    prediction = model.predict_one(structure)
    assert prediction.gap == pytest.approx(gap, abs=width)
    assert prediction.p_metal < 0.5


@pytest.mark.parametrize("structure", [COPPER, BRASS])
def test_textbook_metals_have_none(model: GapModel, structure: Structure) -> None:
    prediction = model.predict_one(structure)
    assert prediction.gap == 0.0
    assert prediction.p_metal > 0.9


def test_many_structures_are_answered_in_order_with_nan_where_chgnet_sees_nothing(model: GapModel) -> None:
    half = Structure(Lattice.cubic(4.0), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    gaps, p_metal = model.predict_with_metal([COPPER, LONELY, NACL, half])
    assert gaps.dtype == np.float64
    assert np.isnan(gaps).tolist() == np.isnan(p_metal).tolist() == [False, True, False, True]
    assert gaps[2] == pytest.approx(model.predict_one(NACL).gap, abs=1e-4)  # batches differ by rounding
    assert np.array_equal(gaps, model.predict([COPPER, LONELY, NACL, half]), equal_nan=True)
    assert model.predict([]).shape == (0,)


def test_the_same_structure_gives_the_same_gap_in_any_cell(model: GapModel) -> None:
    gap = model.predict_one(MGO).gap
    assert model.predict_one(MGO).gap == gap
    larger = MGO * (2, 1, 1)
    larger.translate_sites(range(len(larger)), [0.1, 0.2, 0.3])
    assert model.predict_one(larger).gap == pytest.approx(gap, abs=1e-3)
    rotated = Structure.from_sites(MGO.get_primitive_structure()[::-1])
    assert model.predict_one(rotated).gap == pytest.approx(gap, abs=1e-3)


def test_atoms_may_be_given_once_or_several_times(model: GapModel) -> None:
    atoms = describe(MGO)
    twice = Atoms(
        np.tile(atoms.numbers, 2), np.tile(atoms.features, (2, 1)), np.tile(atoms.weights, 2) / 2, atoms.log_volume
    )
    assert torch.allclose(model.outputs([twice]), model.outputs([atoms]), atol=1e-4)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (LONELY, "isolated"),
        (Structure(Lattice.cubic(4.0), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]), "disordered"),
        (Structure(Lattice.cubic(40.0), ["Na", "Cl"], [[0, 0, 0], [0.05, 0, 0]]), "per atom"),
        (Structure(Lattice.cubic(3.6), ["Am"], [[0, 0, 0]]), "plutonium"),
        (Structure(Lattice.cubic(4.0), ["Na", "Cl"], [[0, 0, 0], [np.nan, 0, 0]]), "not finite"),
        (Structure(Lattice.cubic(4.0), [], []), "without atoms"),
    ],
)
def test_what_cannot_be_seen_is_refused_with_the_reason(model: GapModel, structure: Structure, message: str) -> None:
    with pytest.raises(BandGapError, match=message):
        model.predict_one(structure)


def test_hooks_on_the_shared_chgnet_are_gone_afterwards() -> None:
    first, second = describe(NACL), describe(NACL)
    assert np.array_equal(first.features, second.features)
    assert first.features.shape == (2, 256)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    network = GapNetwork(GapNetworkConfig(width=16, n_blocks=2, head_width=16)).eval()
    small, large = describe(COPPER), describe(SILICON)
    with torch.no_grad():
        alone, together = network(collate([small])), network(collate([small, large]))
    assert torch.allclose(alone[0], together[0], atol=1e-5)


def test_the_median_is_zero_for_metals_and_the_gap_for_what_is_surely_none() -> None:
    outputs = torch.tensor([[[2.0, 0.0, 9.0], [2.0, 0.0, -30.0], [2.0, -2.0, -1.0], [2.0, 2.0, -0.01]]])
    gap, p_metal = read(outputs.double())
    assert gap[0] == 0.0
    assert gap[1] == pytest.approx(2.0)
    assert 1.9 < gap[2] < 2.0
    assert gap[3] == 0.0  # median of a broad distribution that is half metal
    assert p_metal.tolist() == pytest.approx(outputs[0, :, 2].sigmoid().tolist())


def test_a_saved_model_predicts_the_same(tmp_path: Path, model: GapModel) -> None:
    model.save(tmp_path / "copy")
    copy = GapModel.load(tmp_path / "copy")
    assert copy.predict_one(NACL) == model.predict_one(NACL)
    assert copy.facts == model.facts
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [DESCRIPTION, WEIGHTS]


def test_a_model_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BandGapError, match="no readable gap model"):
        GapModel.load(tmp_path)
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copy(PRETRAINED / name, folder / name)
    (folder / WEIGHTS).write_bytes((PRETRAINED / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(BandGapError, match="no readable gap model"):
        GapModel.load(folder)
    shutil.copy(PRETRAINED / WEIGHTS, folder / WEIGHTS)
    description = json.loads((PRETRAINED / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | {"format": "another"}))
    with pytest.raises(BandGapError, match="not of the format"):
        GapModel.load(folder)
    (folder / DESCRIPTION).write_text(json.dumps(description | {"n_members": 9}))
    with pytest.raises(BandGapError, match="do not fit together"):
        GapModel.load(folder)
    with pytest.raises(BandGapError, match="at least one member"):
        GapModel([])
    with pytest.raises(BandGapError, match="at least 1"):
        GapNetworkConfig(width=0)


def test_the_shipped_model_is_small_and_says_what_it_was_trained_on() -> None:
    assert (PRETRAINED / WEIGHTS).stat().st_size < 3_000_000
    card = (PRETRAINED / "BAND_GAP_CARD.md").read_text()
    assert "CC BY 4.0" in card
    assert "Materials Project" in card
