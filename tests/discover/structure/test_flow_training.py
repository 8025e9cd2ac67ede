"""The flow learns, continues after a kill, and needs nothing but torch and numpy."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher

from discover.structure.flow_training import FlowTrainer, FlowTraining, draw_example, flow_loss, random_setting
from discover.structure.network import FlowConfig
from discover.structure.orbit_batch import LatticeScale, OrbitBatch
from discover.structure.orbits import to_structures
from discover.structure.torus import wrap
from envs.wyckoff_operations import free_mask
from policies.errors import CheckpointError
from tests.discover.structure.examples import textbook, textbook_batch

SMALL = FlowTraining(
    epochs=3,
    batch_size=6,
    ema_decay=0.9,
    network=FlowConfig(width=16, n_layers=1, n_heads=2, pair_width=8, n_descriptors=2, dropout=0.1),
)
DESCRIPTORS = torch.randn(119, 2, generator=torch.Generator().manual_seed(0))


def repeated(copies: int) -> OrbitBatch:
    batch = textbook_batch()
    return batch.select(torch.arange(len(batch)).repeat(copies))


def trainer(folder: Path, settings: FlowTraining = SMALL) -> FlowTrainer:
    return FlowTrainer(repeated(4), textbook_batch(), settings, DESCRIPTORS, folder)


def test_every_setting_is_the_same_crystal() -> None:
    crystals, parameters = textbook()
    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.5)
    for seed in range(4):
        batch = random_setting(textbook_batch(), torch.Generator().manual_seed(seed))
        moved = replace(crystals, letters=batch.letters, lattice_parameters=batch.cell.double())
        pairs = zip(to_structures(crystals, parameters), to_structures(moved, batch.parameters), strict=True)
        assert all(matcher.fit(*pair) for pair in pairs)


def test_a_path_ends_at_the_crystal() -> None:
    batch = textbook_batch()
    scale = LatticeScale.fit(batch)
    example = draw_example(batch, scale, torch.Generator().manual_seed(0), pairing=False)
    rest = 1.0 - example.clocks[:, 0]
    end = example.parameters + rest[:, None, None] * example.parameter_velocity
    assert (wrap(end - batch.parameters) * free_mask(batch.space_group, batch.letters)).abs().max() < 1e-5
    lattice_rest = 1.0 - example.clocks[:, 1]
    lattice_end = example.lattice + lattice_rest[:, None] * example.lattice_velocity
    cell = scale.cell(lattice_end, batch.log_reference, batch.lattice_system)
    torch.testing.assert_close(cell, batch.cell, atol=1e-3, rtol=1e-4)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, replace(SMALL, epochs=60, lr=5e-3))
    example = draw_example(textbook_batch(), run.scale, torch.Generator().manual_seed(1))
    before = flow_loss(run.network, example)
    run.run()
    after = flow_loss(run.network, example)
    assert after[0] < before[0]
    assert after[1] < 0.9 * before[1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 60


def test_a_killed_training_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    part = trainer(tmp_path / "part")
    for _ in range(2):
        for rows in part._batches():
            part._train_step(rows)
        part.epoch += 1
    part.save()
    resumed = trainer(tmp_path / "part")
    assert resumed.step == part.step
    resumed.run()
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(value, resumed.network.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("network", replace(SMALL, network=replace(SMALL.network, width=32))),
        ("pairing", replace(SMALL, pairing=False)),
        ("lr", replace(SMALL, lr=0.5)),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(name: str, settings: FlowTraining, tmp_path: Path) -> None:
    trainer(tmp_path).save()
    with pytest.raises(CheckpointError, match=f"with other {name};"):
        trainer(tmp_path, settings)


def test_a_training_starts_from_given_weights_and_their_scale(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first")
    first.run()
    scale = LatticeScale(first.scale.mean + 1.0, 2.0 * first.scale.std)  # of other data
    start = (first.network, scale)
    second = FlowTrainer(repeated(4), textbook_batch(), SMALL, DESCRIPTORS, tmp_path / "second", start=start)
    for name, value in first.network.state_dict().items():
        torch.testing.assert_close(second.averaged_weights()[name], value)
    second.run()
    resumed = FlowTrainer(repeated(4), textbook_batch(), SMALL, DESCRIPTORS, tmp_path / "second", start=start)
    assert resumed.step == second.step
    torch.testing.assert_close(resumed.scale.mean, scale.mean)
    torch.testing.assert_close(resumed.scale.std, scale.std)
    with pytest.raises(CheckpointError, match="with other start;"):
        trainer(tmp_path / "second")
    with pytest.raises(CheckpointError, match="with other data;"):
        FlowTrainer(repeated(5), textbook_batch(), SMALL, DESCRIPTORS, tmp_path / "second", start=start)


def test_a_training_may_get_longer(tmp_path: Path) -> None:
    short = trainer(tmp_path)
    short.run()
    longer = trainer(tmp_path, replace(SMALL, epochs=SMALL.epochs + 1))
    assert longer.step == short.step
    assert longer.progress < 1.0


def test_the_training_core_imports_torch_and_numpy_only() -> None:
    code = (
        "import sys, json; import discover.structure.flow_training; "
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    loaded = set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))
    assert not loaded & {"pymatgen", "pyxtal", "spglib", "ase", "scipy", "pandas", "smact", "sklearn", "safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("length", ["epochs=2", "epochs=10_000, minutes=0.03"])
def test_two_processes_train_together(tmp_path: Path, length: str) -> None:
    repeated(8).save(tmp_path / "data.npz")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\n"
        "from discover.structure.flow_training import FlowTrainer, FlowTraining\n"
        "from discover.structure.network import FlowConfig\n"
        "from discover.structure.orbit_batch import OrbitBatch\n"
        "torch.set_num_threads(1)\n"
        "folder = Path(sys.argv[1])\n"
        "data = OrbitBatch.load(folder / 'data.npz')\n"
        "network = FlowConfig(width=16, n_layers=1, n_heads=2, pair_width=8, n_descriptors=2)\n"
        f"settings = FlowTraining({length}, batch_size=6, network=network)\n"
        "run = FlowTrainer(data, data, settings, torch.zeros(119, 2), folder / str('out'))\n"
        "run.run()\n"
        "total = sum(float(p.sum()) for p in run.network.parameters())\n"
        "sys.stdout.write(f'WORLD {run.world} {total}\\n')\n"  # at once, so that lines stay whole
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*command, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("WORLD 2")]
    assert len(lines) == 2
    assert lines[0] == lines[1]  # both hold the same weights
