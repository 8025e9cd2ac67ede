"""Training the flow from a data file to the weights that `discover` loads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from discover.data import save_prepared
from discover.structure.flow_matching import load_flow
from discover.structure.flow_training import FlowTraining
from discover.structure.network import FlowConfig
from discover.train_flow import train_flow
from policies.errors import CheckpointError
from tests.discover.structure_types import of_known_types, prepared

SMALL = FlowTraining(epochs=2, batch_size=64, network=FlowConfig(width=16, n_layers=1, n_heads=2, pair_width=8))


def test_a_training_refines_another_and_takes_its_sizes(tmp_path: Path) -> None:
    save_prepared(prepared(of_known_types(240), torch.zeros(240, dtype=torch.float64)), tmp_path / "data.npz")
    train_flow(tmp_path / "data.npz", tmp_path / "first", SMALL, device="cpu")
    bare = replace(SMALL, epochs=1, network=FlowConfig(dropout=0.5))
    errors = train_flow(tmp_path / "data.npz", tmp_path / "second", bare, device="cpu", start=tmp_path / "first")
    assert errors["lattice_error"] > 0
    network, scale = load_flow(tmp_path / "second" / "flow")
    assert network.config == replace(SMALL.network, dropout=0.5)
    torch.testing.assert_close(scale.mean, load_flow(tmp_path / "first" / "flow")[1].mean)
    assert json.loads((tmp_path / "second" / "flow.json").read_text())["start"] == "first"


def test_a_start_that_is_no_flow_is_refused(tmp_path: Path) -> None:
    save_prepared(prepared(of_known_types(240), torch.zeros(240, dtype=torch.float64)), tmp_path / "data.npz")
    with pytest.raises(CheckpointError):
        train_flow(tmp_path / "data.npz", tmp_path / "out", SMALL, device="cpu", start=tmp_path / "nothing")
