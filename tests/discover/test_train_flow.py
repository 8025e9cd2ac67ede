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


def save_data(path: Path, n: int) -> Path:
    save_prepared(prepared(of_known_types(n), torch.zeros(n, dtype=torch.float64)), path)
    return path


def test_a_training_refines_another_and_takes_its_sizes_and_scale(tmp_path: Path) -> None:
    train_flow(save_data(tmp_path / "first.npz", 240), tmp_path / "first", SMALL, device="cpu")
    bare = replace(SMALL, epochs=1, lr=1e-9, network=FlowConfig(dropout=0.5))
    other = save_data(tmp_path / "other.npz", 300)
    train_flow(other, tmp_path / "second", bare, device="cpu", start=tmp_path / "first")
    train_flow(other, tmp_path / "alone", SMALL, device="cpu")
    (first, scale), (second, its_scale) = (load_flow(tmp_path / name / "flow") for name in ("first", "second"))
    assert second.config == replace(SMALL.network, dropout=0.5)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    torch.testing.assert_close(its_scale.mean, scale.mean)
    assert not torch.equal(load_flow(tmp_path / "alone" / "flow")[1].mean, scale.mean)
    assert json.loads((tmp_path / "second" / "flow.json").read_text())["start"] == "first"


def test_a_start_that_is_no_flow_is_refused(tmp_path: Path) -> None:
    data = save_data(tmp_path / "data.npz", 240)
    with pytest.raises(CheckpointError, match="do not hold a flow"):
        train_flow(data, tmp_path / "out", SMALL, device="cpu", start=tmp_path / "nothing")
