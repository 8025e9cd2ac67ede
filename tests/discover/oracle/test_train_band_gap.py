"""Training the gap model end to end on a few dozen textbook prototypes with made-up gaps."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Element, Lattice, Structure

from discover.errors import DataError
from discover.oracle import train_band_gap as training
from discover.oracle.band_gap import GapModel
from discover.oracle.gap_network import Atoms, BandGapError, GapNetworkConfig, describe
from discover.oracle.train_band_gap import (
    AtomTable,
    GapTraining,
    evaluate_band_gap,
    extract,
    figures,
    merge_equal,
    train_band_gap,
)
from discover.structure_files import plain_cif

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CHGNet's, of its own imports

SMALL = GapTraining(
    n_members=2,
    epochs=3,
    batch_size=32,
    held_out=0.1,
    network=GapNetworkConfig(width=16, n_blocks=1, head_width=16),
)
CATIONS = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Ti", "Zr", "Fe", "Ni", "Zn", "Al"]
ANIONS = ["F", "Cl", "Br", "I", "O", "S", "Se", "N", "P"]


def binary(cation: str, anion: str) -> Structure:
    """Rock salt in its primitive cell."""
    a = 2.0 * float(Element(cation).atomic_radius + Element(anion).atomic_radius)
    lattice = Lattice([[0, a / 2, a / 2], [a / 2, 0, a / 2], [a / 2, a / 2, 0]])
    return Structure(lattice, [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def cif(structure: Structure) -> str:
    symbols = [site.specie.symbol for site in structure]
    return plain_cif(np.array(structure.lattice.parameters), structure.frac_coords, symbols)


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rock salts whose gap follows the electronegativities; half of them metals."""
    rows = []
    for cation in CATIONS:
        for anion in ANIONS:
            gap = max(0.0, 3.0 * (Element(anion).X - Element(cation).X) - 4.5)
            structure = binary(cation, anion)
            rows.append({"material_id": f"x-{len(rows)}", "cif": cif(structure), "band_gap": gap, "e_above_hull": 0.0})
    lonely = Structure(Lattice.cubic(9.0), ["Ar"], [[0, 0, 0]])
    rows.append({"material_id": "lonely", "cif": cif(lonely), "band_gap": 8.0})
    rows.append({"material_id": "broken", "cif": "no crystal", "band_gap": 1.0})
    rows.append({"material_id": "unlabelled", "cif": rows[0]["cif"], "band_gap": np.nan})
    path = tmp_path_factory.mktemp("gap") / "data.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def trained(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GapModel, Path]:
    folder = tmp_path_factory.mktemp("trained")
    return train_band_gap(csv, folder, settings=SMALL, n_workers=0, progress=False), folder


def test_training_writes_a_model_that_loads_and_predicts_the_same(trained: tuple[GapModel, Path]) -> None:
    model, folder = trained
    structures = [binary("Na", "Cl"), binary("Fe", "P")]
    assert np.array_equal(GapModel.load(folder).predict(structures), model.predict(structures))
    assert model.facts["n_train"] + model.facts["n_held_out"] == len(CATIONS) * len(ANIONS)
    assert model.facts["held_out"]["n"] == model.facts["n_held_out"] > 0


def test_evaluation_repeats_the_figures_of_the_training(csv: Path, trained: tuple[GapModel, Path]) -> None:
    model, folder = trained
    result = evaluate_band_gap(csv, folder / "features", model=model, n_workers=0, progress=False)
    assert result["all"]["n"] == len(CATIONS) * len(ANIONS)
    assert result["all"]["mae"] == pytest.approx(result["stable"]["mae"])
    assert "unstable" not in result


def test_longer_training_learns_the_gaps(csv: Path, trained: tuple[GapModel, Path], tmp_path: Path) -> None:
    settings = GapTraining(
        n_members=1, epochs=60, batch_size=16, held_out=0.1, network=GapNetworkConfig(width=32, head_width=32)
    )
    (tmp_path / "features").symlink_to(trained[1] / "features")
    model = train_band_gap(csv, tmp_path, settings=settings, n_workers=0, progress=False)
    gaps = model.predict([binary("K", "F"), binary("Na", "Cl"), binary("Fe", "P"), binary("Zr", "Se")])
    assert gaps[0] > gaps[1] > 0.3
    assert gaps[2] == gaps[3] == 0.0


def test_an_interrupted_training_continues_to_the_same_weights(
    csv: Path, trained: tuple[GapModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "features").symlink_to(trained[1] / "features")
    saves = 0
    save = training._MemberState.save

    def save_and_stop(state: training._MemberState, path: Path) -> None:
        nonlocal saves
        save(state, path)
        saves += 1
        if saves == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._MemberState, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_band_gap(csv, tmp_path, settings=SMALL, n_workers=0, progress=False)
    model = train_band_gap(csv, tmp_path, settings=SMALL, n_workers=0, progress=False)
    for one, other in zip(model.members, trained[0].members, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_folder_of_another_training_is_refused(csv: Path, trained: tuple[GapModel, Path]) -> None:
    with pytest.raises(BandGapError, match="other data or settings"):
        train_band_gap(csv, trained[1], settings=GapTraining(epochs=2), n_workers=0, progress=False)


def test_features_of_other_structures_or_truncated_ones_are_made_again(tmp_path: Path) -> None:
    first, second = cif(binary("Na", "Cl")), cif(binary("K", "Cl"))
    table, seen, formulas = extract([first], tmp_path, n_workers=0, progress=False)
    assert formulas == ["NaCl"]
    other, _, formulas = extract([second], tmp_path, n_workers=0, progress=False)
    assert formulas == ["KCl"]
    assert not np.array_equal(table.features, other.features)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:500])
    again, seen, _ = extract([second], tmp_path, n_workers=0, progress=False)
    assert np.array_equal(again.features, other.features)
    assert seen.tolist() == [0]


def test_equal_atoms_become_one() -> None:
    atoms = describe(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.463), ["Ca", "F"], [[0] * 3, [0.25] * 3]))
    merged = merge_equal(atoms)
    assert sorted(merged.numbers.tolist()) == [9, 20]
    assert dict(zip(merged.numbers.tolist(), merged.weights.tolist(), strict=True)) == pytest.approx(
        {20: 1 / 3, 9: 2 / 3}
    )


def test_batches_hold_the_crystals_that_were_asked_for() -> None:
    generator = np.random.default_rng(0)
    crystals = [
        Atoms(
            np.arange(1, n + 1),
            generator.normal(size=(n, 256)).astype(np.float32),
            np.full(n, 1.0 / n, np.float32),
            float(n),
        )
        for n in (1, 4, 2)
    ]
    table = AtomTable.concatenate([AtomTable.of(crystals[:2]), AtomTable.of([]), AtomTable.of(crystals[2:])])
    batch = table.batch(np.array([2, 0]))
    assert batch.numbers.tolist() == [[1, 2], [1, 0]]
    assert batch.weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert batch.log_volume.tolist() == [2.0, 1.0]
    assert np.allclose(batch.features[0], crystals[2].features, atol=1e-2)


def test_figures_of_a_known_case() -> None:
    outputs = torch.tensor([[[1.0, -6.0, -20.0], [1.0, -6.0, 20.0], [3.0, -6.0, -20.0], [1.0, -6.0, -20.0]]]).double()
    result = figures(outputs, np.array([1.0, 0.0, 2.0, 0.0], dtype=np.float32))
    assert result["mae"] == pytest.approx(0.5, abs=1e-3)
    assert result["mae_of_non_metals"] == pytest.approx(0.5, abs=1e-3)
    assert result["metal_accuracy"] == 0.75
    assert 0.5 < result["metal_roc_auc"] < 1.0


def test_data_that_cannot_train_is_refused(tmp_path: Path, csv: Path) -> None:
    table = pd.read_csv(csv)
    few = tmp_path / "few.csv"
    table.head(3).to_csv(few, index=False)
    with pytest.raises(BandGapError, match="at least 100 rows"):
        train_band_gap(few, tmp_path / "a", settings=SMALL, n_workers=0, progress=False)
    table.drop(columns="band_gap").to_csv(few, index=False)
    with pytest.raises(DataError, match="band_gap"):
        train_band_gap(few, tmp_path / "b", settings=SMALL, n_workers=0, progress=False)
    table[table.material_id == "lonely"].to_csv(few, index=False)
    with pytest.raises(DataError, match="no structure"):
        train_band_gap(few, tmp_path / "c", settings=SMALL, n_workers=0, progress=False)
    with pytest.raises(BandGapError, match="held_out"):
        GapTraining(held_out=0.7)
    with pytest.raises(BandGapError, match="at least 1"):
        GapTraining(epochs=0)
