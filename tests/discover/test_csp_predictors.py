"""The predictors that are evaluated, with templates of a few textbook structures and an untrained flow."""

import pandas as pd
import pytest
import torch
from pymatgen.io.cif import CifWriter

from discover.config import EvaluateConfig
from discover.csp_predictors import FromComposition, FromTemplates, FromWyckoff, predictor_of
from discover.data import prepare
from discover.evaluate_csp import evaluate_csp, predict_targets, read_targets
from discover.structure.flow_matching import FlowMatching
from discover.structure.network import FlowConfig, OrbitFormer
from discover.structure.orbit_batch import LatticeScale
from discover.templates import templates_of_data
from tests.discover.textbook import corundum, perovskite, rock_salt, rutile


@pytest.fixture(scope="module")
def csv(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("csp") / "textbook.csv"
    cifs = [str(CifWriter(build().get_primitive_structure())) for build in (rock_salt, rutile, perovskite, corundum)]
    pd.DataFrame({"material_id": ["a", "b", "c", "d"], "cif": cifs}).to_csv(path, index=False)
    return str(path)


def untrained_flow() -> FlowMatching:
    torch.manual_seed(0)
    network = OrbitFormer(FlowConfig(width=16, n_layers=1, n_heads=2, pair_width=4))
    scale = LatticeScale(torch.zeros(8, 6), torch.ones(8, 6))
    return FlowMatching(network.eval(), scale, lattice="free", n_steps=2, n_draws=1, min_ratio=0.0)


def test_retrieval_finds_what_it_was_given(csv) -> None:
    config = EvaluateConfig(task="csp", data=csv, n=4, k=2, source="templates", n_workers=0)
    shown = evaluate_csp(config, FromTemplates(templates_of_data(prepare(csv, use_cache=False))))
    assert shown["by_k"]["1"]["match_rate"] == 1.0
    assert shown["rmse"] < 0.01
    assert (shown["source"], shown["given"], shown["n"], shown["k"]) == ("templates", "composition", 4, 2)


def test_structures_with_given_letters_have_their_composition_and_do_not_depend_on_k(csv) -> None:
    targets = read_targets(csv, 4, 0)
    predictor = FromWyckoff(untrained_flow())
    three, one = (predict_targets(targets, predictor, k=k, given="wyckoff", seed=0).predictions for k in (3, 1))
    for row, (first,), truth in zip(three, one, targets.structures, strict=True):
        assert len(row) == 3
        assert row[0] == first
        assert first is not None
        assert first.composition.reduced_formula == truth.composition.reduced_formula


@pytest.mark.parametrize("settings", [{"given": "wyckoff", "source": "generator"}, {"source": "generator"}])
def test_what_picks_among_draws_reaches_the_flow(settings: dict[str, str]) -> None:
    for pick in (None, "chgnet", "agreement"):
        predictor = predictor_of(EvaluateConfig(task="csp", data="val.csv", draws=3, pick=pick, **settings))
        flow = predictor.flow if isinstance(predictor, FromWyckoff) else predictor.generator
        assert isinstance(predictor, FromWyckoff | FromComposition)
        assert (flow.n_draws, flow.energies is None) == (3, pick == "agreement")
