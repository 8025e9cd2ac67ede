import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure

from discover.config import EvaluateConfig
from discover.errors import ConfigError, DataError, RunFolderError
from discover.evaluate import evaluate
from discover.evaluate_dng import evaluate_dng, relaxation_figures, stability_figures, without_nan
from discover.metrics.stability import Outcomes
from discover.options import parse_args
from discover.oracle.relax import relax
from discover.structure_files import extxyz_text


def rock_salt(a: float, cation: str = "Na") -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def write_table(path, structures: list[Structure]) -> None:
    cifs = [structure.to(fmt="cif") for structure in structures]
    ids = [f"m{row}" for row in range(len(cifs))]
    pd.DataFrame({"material_id": ids, "cif": cifs, "e_above_hull": 0.0}).to_csv(path, index=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    write_table(tmp_path / "reference.csv", [rock_salt(5.64), rock_salt(6.3, "K")])
    write_table(tmp_path / "train.csv", [rock_salt(5.64), rock_salt(6.6, "Rb")])
    pd.DataFrame({"formula": ["NaCl", "KCl"], "e_form": [-2.1, -2.2]}).to_csv(tmp_path / "hull.csv", index=False)
    write_table(tmp_path / "generated.csv", [rock_salt(5.6), rock_salt(5.7), rock_salt(5.2, "Li")])
    with (tmp_path / "generated.csv").open("a") as file:
        file.write("m3,prose,0.0\n")
    overlapping = Structure(Lattice.cubic(4), ["K", "Cl"], [[0, 0, 0], [0.05, 0, 0]])
    generated = {"0": rock_salt(5.6), "1": rock_salt(5.7), "2": rock_salt(5.2, "Li"), "3": overlapping}
    (tmp_path / "generated.extxyz").write_text(extxyz_text(generated))
    return tmp_path


def words(folder, *more: str) -> list[str]:
    return ["task=dng", f"reference={folder / 'reference.csv'}", "n_workers=0", *more]


@pytest.mark.filterwarnings("ignore")  # of CHGNet, and of pymatgen's CIF parser
def test_structures_of_any_generator_are_judged_from_validity_to_sun(folder) -> None:
    config = parse_args(
        EvaluateConfig,
        words(
            folder,
            f"structures={folder / 'generated.csv'}",
            f"train_data={folder / 'train.csv'}",
            f"hull={folder / 'hull.csv'}",
            f"output={folder / 'out'}",
        ),
    )
    figures = evaluate_dng(config)
    assert figures["n"] == 4
    assert figures["validity"]["structural"]["rate"] == 0.75
    assert figures["unique"]["hits"] == 2  # one of two NaCl, LiCl; the last cannot be read
    assert figures["novel_against_training"]["hits"] == 1
    assert figures["prototype_in_training"]["hits"] == 3
    found = figures["generated_against_reference"]
    assert found["coverage_precision"] == pytest.approx(0.5)  # both NaCl; lithium is far from sodium and potassium
    assert figures["floor_training_against_reference"]["n_valid"] == 2
    assert found["all_valid"]["space_group_distance"] == pytest.approx(0.0, abs=1e-7)
    stability = figures["stability"]
    assert stability["n"] == 4
    assert stability["relaxation"]["n_failed"] == 1
    assert stability["unknown_element"] == 1  # lithium
    main = stability["novel_by_formula"]["hull_shift_+0"]
    assert main["metastable"]["hits"] == 2  # both NaCl
    assert main["metastable_sun"]["hits"] == 0  # its formula is in the hull file
    assert json.loads((folder / "out" / "figures.json").read_text()) == json.loads(json.dumps(figures))
    table = pd.read_csv(folder / "out" / "relaxed.csv", keep_default_na=False)
    assert table["status"].tolist() == ["converged", "converged", "converged", "failed"]
    assert table["formula"].tolist() == ["NaCl", "NaCl", "LiCl", ""]


def test_overlapping_atoms_have_a_composition_and_no_validity(folder) -> None:
    figures = evaluate_dng(parse_args(EvaluateConfig, words(folder, f"structures={folder / 'generated.extxyz'}")))
    assert figures["validity"]["without_structure"] == 0
    assert figures["validity"]["structural"]["hits"] == 3
    assert figures["validity"]["compositional_cdvae"]["hits"] == 4


@pytest.mark.parametrize("content", ["id\n1\n", "material_id,cif\n"])
def test_a_file_without_structures_is_named(folder, content: str) -> None:
    (folder / "empty.csv").write_text(content)
    with pytest.raises(DataError, match="no rows with a column cif"):
        evaluate_dng(parse_args(EvaluateConfig, words(folder, f"structures={folder / 'empty.csv'}")))


def test_a_reference_that_cannot_be_described_is_named(folder) -> None:
    (folder / "reference.csv").write_text("material_id,cif\na,prose\n")
    with pytest.raises(DataError, match="nothing to compare with"):
        evaluate_dng(parse_args(EvaluateConfig, words(folder, f"structures={folder / 'generated.extxyz'}")))


def test_where_figures_cannot_be_written_is_said_first(folder) -> None:
    (folder / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot create"):
        evaluate(parse_args(EvaluateConfig, words(folder, "n=100000", f"output={folder / 'file'}")))


def test_rates_come_at_every_hull_and_cost_is_per_hit() -> None:
    outcomes = Outcomes(np.array([-0.01, 0.05, np.nan, 0.2]), np.ones(4, dtype=bool), np.ones(4, dtype=bool))
    figures = stability_figures(outcomes, {"all": 12.0})
    assert [figures[f"hull_shift_{shift}"]["sun"]["hits"] for shift in ("-0.06", "+0", "+0.06")] == [0, 1, 2]
    assert figures["cpu_seconds_per_sun"]["all"] == 12.0


def test_relaxations_without_any_success_have_no_medians() -> None:
    figures = relaxation_figures(relax([None, None], n_workers=0, progress=False))
    assert figures["n_failed"] == 2
    assert figures["median_n_steps"] is None
    assert "no structure" in figures["most_common_failure"]


def test_json_gets_no_nan() -> None:
    assert without_nan({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}) == {"a": [None, 1.0], "b": {"c": None}}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reference=null"], "needs reference=FILE.csv to compare with"),
        (["run=x", "structures=y"], "keep one"),
        (["source=templates"], "prior, random or substitution"),
        (["source=substitution"], "train_data=FILE"),
        (["n_relax=5"], "needs hull"),
        (["k=5"], "does not take k"),
        (["run=x", "pick=chgnet"], "pick applies to source=prior; drop it"),
    ],
)
def test_settings_that_make_no_sense_are_named(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(EvaluateConfig, words(Path(), *more))
