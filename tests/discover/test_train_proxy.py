"""Training proxies end to end on a few hundred made-up crystals: splits, resuming, figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from discover import train_proxy as training
from discover.data import PreparedData, load_prepared, save_prepared
from discover.evaluate_proxy import evaluate_proxy, roc_auc
from discover.train_proxy import ProxyTraining, assemble, split, train_member, train_proxy, train_trees, training_loss
from policies.errors import CheckpointError
from proxies import ProxyError
from proxies.networks import NetworkConfig
from tests.proxies.textbook import random_crystals

SMALL = ProxyTraining(
    n_members=2,
    epochs=2,
    batch_size=128,
    held_out=0.15,
    network=NetworkConfig(width=16, n_blocks=1, n_query=4, position_rank=4, head_width=16),
)


@pytest.fixture(scope="module")
def prepared() -> PreparedData:
    """Crystals whose energies follow the heaviest element and whose gaps follow the space group."""
    crystals = random_crystals(1600, seed=5, max_orbits=3)
    energy = crystals.elements.amax(1).double() / 40.0 - 1.0
    gap = (crystals.space_group.double() / 60.0 - 2.0).clamp_min(0.0)
    unlabelled = torch.arange(len(crystals)) % 10 == 0
    n = len(crystals)
    return PreparedData(
        crystals=crystals,
        positions=torch.zeros(*crystals.elements.shape, 3, dtype=torch.float64),
        labels={
            "formation_energy_per_atom": energy.masked_fill(unlabelled, torch.nan),
            "band_gap": gap.masked_fill(unlabelled, torch.nan),
            "e_above_hull": (energy / 10.0 + 0.1).masked_fill(unlabelled, torch.nan),
        },
        ids=np.array([f"x-{i}" for i in range(n)]),
        formulas=np.array(crystals.formulas()),
        label_source=np.full(n, "made up"),
        geometry=np.full(n, ""),
        failures=(),
    )


def test_no_formula_and_no_new_system_is_on_both_sides(prepared: PreparedData) -> None:
    data = split(prepared, SMALL)
    formulas = np.array(prepared.formulas)
    train, held_out = set(formulas[data.train_rows]), set(formulas[data.held_out_rows])
    assert not train & held_out
    systems = np.array(prepared.crystals.chemical_systems())
    assert not set(systems[data.train_rows]) & set(systems[data.new_system.numpy()])
    assert data.new_system[data.held_out_rows].any()
    assert not data.labels[data.train_rows].isnan().all(dim=1).any()


def test_training_learns_and_resumes_to_the_same_network(prepared: PreparedData, tmp_path: Path, monkeypatch) -> None:
    data = split(prepared, SMALL)
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = train_member(data, SMALL, 0, tmp_path / "whole", progress=False)
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    real, calls = training.training_loss, []

    def interrupted(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 13:  # in the second epoch: what follows must repeat its order
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "training_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_member(data, SMALL, 0, tmp_path / "cut", progress=False)
    assert (tmp_path / "cut" / "member_0.checkpoint.pt").is_file()
    monkeypatch.setattr(training, "training_loss", real)
    resumed = train_member(data, SMALL, 0, tmp_path / "cut", progress=False)
    assert not (tmp_path / "cut" / "member_0.checkpoint.pt").exists()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_csv_becomes_an_ensemble_with_figures(prepared: PreparedData, tmp_path: Path) -> None:
    save_prepared(prepared, tmp_path / "data.npz")
    ensemble = train_proxy(tmp_path / "data.npz", tmp_path / "out", settings=SMALL, progress=False)
    assert len(ensemble.members) == 2
    assert {"ensemble.safetensors", "ensemble.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    figures = evaluate_proxy(tmp_path / "data.npz", ensemble, progress=False)
    energy = figures["formation_energy_per_atom"]
    assert energy["n"] == int((~prepared.labels["formation_energy_per_atom"].isnan()).sum())
    assert 0.0 < energy["mae"] <= energy["rmse"]
    assert 0.5 < energy["coverage_1sigma"] < 0.85
    assert figures["band_gap"]["metal_roc_auc"] > 0.5
    assert figures["scoring_rate_per_s"] > 0
    new = evaluate_proxy(tmp_path / "data.npz", ensemble, train_path=tmp_path / "data.npz", progress=False)
    assert new["new_chemical_systems"] == {}  # every labelled system was seen; unlabelled rows have no figures


def test_proposed_crystals_are_learnt_from_as_they_are(prepared: PreparedData, tmp_path: Path) -> None:
    """They are held out by formula like the rest, never strained, and a training may start from an earlier one."""
    save_prepared(prepared, tmp_path / "data.npz")
    higher = {name: labels + 1.0 for name, labels in prepared.labels.items()}
    save_prepared(PreparedData(**{**vars(prepared), "labels": higher}), tmp_path / "proposed.npz")
    data = split(prepared, SMALL, load_prepared(tmp_path / "proposed.npz"))
    n = len(prepared.crystals)
    assert len(data.crystals) == 2 * n
    assert data.relaxed[:n].any()
    assert not data.relaxed[n:].any()
    formulas = np.tile(prepared.formulas, 2)
    assert not set(formulas[data.train_rows]) & set(formulas[data.held_out_rows])
    first = train_proxy(tmp_path / "data.npz", tmp_path / "first", settings=SMALL, progress=False)
    slow = replace(SMALL, learning_rate=1e-9)
    start = {"start": first, "progress": False}
    same = train_proxy(tmp_path / "data.npz", tmp_path / "same", settings=slow, **start)
    before = first.raw_outputs(prepared.crystals).mean["formation_energy_per_atom"]
    assert torch.allclose(before, same.raw_outputs(prepared.crystals).mean["formation_energy_per_atom"], atol=1e-2)
    few = {k: v.masked_fill(torch.arange(n) % 4 != 1, torch.nan) for k, v in prepared.labels.items()}
    save_prepared(PreparedData(**{**vars(prepared), "labels": few}), tmp_path / "few.npz")
    quick, labels = replace(SMALL, epochs=6, learning_rate=1e-2), tmp_path / "proposed.npz"
    taught = train_proxy(tmp_path / "few.npz", tmp_path / "taught", settings=quick, labels_path=labels, **start)
    rise = taught.raw_outputs(prepared.crystals).mean["formation_energy_per_atom"] - before
    assert float(rise.mean()) > 0.2  # most of what it sees lies 1 eV/atom higher
    assert taught.facts["n_proposed"] == n
    with pytest.raises(CheckpointError, match=r"training with other start; give another output folder"):
        train_proxy(tmp_path / "few.npz", tmp_path / "taught", settings=quick, labels_path=labels, progress=False)
    with pytest.raises(CheckpointError, match="training with other data"):
        train_proxy(tmp_path / "few.npz", tmp_path / "taught", settings=quick, **start)


def test_trees_train_from_the_same_file(prepared: PreparedData, tmp_path: Path) -> None:
    save_prepared(prepared, tmp_path / "data.npz")
    trees = train_trees(tmp_path / "data.npz", tmp_path / "trees", n_trees=5, held_out=0.15, progress=False)
    figures = evaluate_proxy(tmp_path / "data.npz", trees, progress=False)
    assert figures["formation_energy_per_atom"]["mae"] < 0.3


def test_a_broken_checkpoint_is_named(prepared: PreparedData, tmp_path: Path) -> None:
    (tmp_path / "member_0.checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ProxyError, match=r"member_0.checkpoint.pt cannot be resumed"):
        train_member(split(prepared, SMALL), SMALL, 0, tmp_path, progress=False)


def test_nothing_to_assemble_is_said(prepared: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match="no finished member"):
        assemble(split(prepared, SMALL), SMALL, tmp_path)


def test_too_few_labels_are_refused(prepared: PreparedData) -> None:
    nothing = {name: torch.full_like(values, torch.nan) for name, values in prepared.labels.items()}
    with pytest.raises(ProxyError, match="at least 200 rows"):
        split(PreparedData(**{**vars(prepared), "labels": nothing}), SMALL)


@pytest.mark.parametrize("change", [{"n_members": 0}, {"epochs": 0}, {"held_out": 0.7}])
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ProxyError):
        ProxyTraining(**change)


def test_loss_ignores_missing_labels_and_gaps_of_metals() -> None:
    outputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[torch.nan, torch.nan, torch.nan], [1.0, 0.1, 0.0], [1.0, 0.1, torch.nan], [1.0, 0.1, 2.0]])
    training_loss(outputs, labels, 0.0).backward()
    gradient = outputs.grad
    assert (gradient[0] == 0).all()
    assert (gradient[1, 4:6] == 0).all()  # a metal has no gap to learn
    assert gradient[1, 6] != 0
    assert (gradient[2, 4:] == 0).all()
    assert (gradient[3] != 0).all()


def test_area_under_the_roc_curve_counts_ordered_pairs() -> None:
    score, positive = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True])
    assert roc_auc(score, positive) == pytest.approx(3.5 / 4)
    assert np.isnan(roc_auc(score, torch.ones(4, dtype=torch.bool)))
