"""Structure prediction scored against textbook structures with predictors of known skill."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.io.cif import CifWriter

from benchmarks.compare_csp import compare
from discover.config import EvaluateConfig
from discover.errors import ConfigError
from discover.evaluate_csp import (
    Outcome,
    Queries,
    Targets,
    figures,
    predict_targets,
    read_targets,
    write_results,
)
from discover.metrics.matching import Matches, match_predictions
from tests.discover.textbook import corundum, diamond, perovskite, rock_salt, rutile, spinel, wurtzite

BUILDERS = (rock_salt, rutile, perovskite, diamond, wurtzite, corundum, spinel)


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("csp") / "textbook.csv"
    cifs = [str(CifWriter(build().get_primitive_structure())) for build in BUILDERS]
    ids = [build.__name__ for build in BUILDERS]
    pd.DataFrame({"material_id": ids, "cif": cifs}).to_csv(path, index=False)
    return path


def textbook_predictor(queries: Queries, k: int, generator: torch.Generator) -> list[list[Structure | None]]:
    """Know every structure but rutile's; the best guess is always wrong, the second fails, the third is noisy."""
    assert queries.crystals is None
    known = {build().composition.reduced_formula: build() for build in BUILDERS if build is not rutile}
    rows: list[list[Structure | None]] = []
    for composition in queries.compositions:
        formula = Composition(composition).reduced_formula
        wrong = Structure(Lattice.cubic(20.0), [*Composition(composition).elements], np.eye(3)[: len(composition)] / 5)
        rows.append([wrong, None])
        if formula in known:
            seed = int(torch.randint(2**31, (), generator=generator))
            rows[-1].append(known[formula].get_primitive_structure().perturb(0.03, seed=seed))
    return [row[:k] for row in rows]


@pytest.fixture(scope="module")
def evaluated(csv) -> tuple[Targets, Outcome, Matches]:
    targets = read_targets(csv, 7, 0)
    outcome = predict_targets(targets, textbook_predictor, k=5, given="composition", seed=0)
    matches = match_predictions(outcome.predictions, targets.structures, n_workers=0)
    return targets, outcome, matches


def test_figures_of_a_predictor_of_known_skill(evaluated) -> None:
    shown = figures(evaluated[2], evaluated[1], 5)
    assert list(shown["by_k"]) == ["1", "5"]
    assert shown["match_rate"] == pytest.approx(6 / 7)
    assert shown["by_k"]["1"]["match_rate"] == 0.0
    assert shown["by_k"]["1"]["rmse_all"] == 0.5
    assert 0.0 < shown["rmse"] < 0.05
    assert shown["rmse_all"] == pytest.approx((6 * shown["rmse"] + 0.5) / 7)
    low, high = shown["match_rate_interval"]
    assert low < 6 / 7 < high
    assert shown["missing_predictions"] == pytest.approx(1 - (7 + 6) / 35)
    assert (shown["n"], shown["k"]) == (7, 5)
    json.dumps(shown, allow_nan=False)


def test_fewer_rows_of_the_same_seed_are_the_first_of_more(csv) -> None:
    everything = read_targets(csv, 7, 3).prepared.ids.tolist()
    assert sorted(everything) == sorted(build.__name__ for build in BUILDERS)
    assert read_targets(csv, 3, 3).prepared.ids.tolist() == everything[:3]
    assert read_targets(csv, 7, 4).prepared.ids.tolist() != everything


def test_truth_is_the_structure_of_its_own_row(evaluated) -> None:
    targets: Targets = evaluated[0]
    for name, structure in zip(targets.prepared.ids, targets.structures, strict=True):
        built = next(build for build in BUILDERS if build.__name__ == name)()
        assert structure.composition.reduced_formula == built.composition.reduced_formula


def test_of_rows_with_one_id_the_same_one_is_asked_and_answered(tmp_path: Path) -> None:
    builds = (rock_salt, rutile, diamond)
    table = pd.DataFrame({"material_id": ["a", "b", "a"], "cif": [str(CifWriter(build())) for build in builds]})
    table.to_csv(tmp_path / "twice.csv", index=False)
    for seed in range(4):
        targets = read_targets(tmp_path / "twice.csv", 3, seed)
        assert targets.n_skipped == 1
        for formula, structure in zip(targets.prepared.formulas, targets.structures, strict=True):
            assert structure.composition.reduced_formula == formula


def test_figures_of_one_material_are_json(csv) -> None:
    targets = read_targets(csv, 1, 0)
    outcome = predict_targets(targets, textbook_predictor, k=1, given="composition", seed=0)
    matches = match_predictions(outcome.predictions, targets.structures, n_workers=0)
    json.dumps(figures(matches, outcome, 1), allow_nan=False)


def test_a_predictor_sees_neither_lattice_nor_coordinates(evaluated) -> None:
    targets: Targets = evaluated[0]
    composition, wyckoff = (targets.queries(slice(0, 7), given) for given in ("composition", "wyckoff"))
    assert composition.crystals is None
    assert wyckoff.crystals is not None
    assert wyckoff.crystals.lattice_parameters.isnan().all()
    assert wyckoff.crystals.wyckoff_strings() == targets.prepared.crystals.wyckoff_strings()
    row = targets.prepared.ids.tolist().index("spinel")
    assert composition.compositions[row] == {"Mg": 2, "Al": 4, "O": 8}


def test_results_of_two_evaluations_are_compared_in_pairs(evaluated, tmp_path) -> None:
    targets, outcome, matches = evaluated
    write_results(tmp_path / "a", targets, matches, outcome, figures(matches, outcome, 5))
    nothing = match_predictions([[] for _ in targets.structures], targets.structures, n_workers=0)
    write_results(tmp_path / "b", targets, nothing, outcome, figures(nothing, outcome, 5))
    compared = compare(tmp_path / "a" / "structures.csv", tmp_path / "b" / "structures.csv")
    assert compared["n"] == 7
    assert compared["by_k"]["5"]["match_rate_difference"]["mean"] == pytest.approx(6 / 7)
    assert compared["by_k"]["1"]["match_rate_difference"]["mean"] == 0.0
    assert compared["missed_by_b"]["n"] == 7
    assert compared["missed_by_b"]["match_rate_of_a"] == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"given": "wyckoff"}, "use source=generator"),
        ({"source": "random", "templates": "train.csv"}, "drop it"),
        ({"source": "templates", "pick": "agreement"}, "pick applies to source=both and source=generator"),
        ({"source": "random", "draws": 2}, "draws applies to source=both and source=generator"),
        ({"weights": "folder"}, "drop them"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(task="csp", data="val.csv", **settings)
