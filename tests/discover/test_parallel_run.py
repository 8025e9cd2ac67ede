"""A run under ``torchrun``: all processes train, the first one does the rest, and a run that was cut goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor, nn

from discover import run
from discover.build import build_parts, start_trainer
from discover.campaign import Campaign
from discover.config import RestrictConfig, RunConfig, TrainingConfig
from discover.errors import ConfigError, RunPaused
from discover.progress import LABELS
from discover.run_folder import open_run_folder
from discover.train_sampler import Trainer
from policies.parallel import Processes

WORDS = [
    "reward=stability",
    "train.n_steps=40",
    "train.minutes=0.01",  # ten steps of the clock below
    "train.batch_size=33",
    "learn.sampler_steps=3",
    "n_candidates=40",
    "n_structures=2",
    "rounds=2",
    "oracle.budget=4",
    "oracle.name=callable",
    "oracle.model=toy_oracle:energy",
    "engine.workers=0",
    "screen.per_check=1",
    "restrict.elements=[Na,Mg,Al,O,S,Cl]",
    "restrict.n_elements=[2,3]",
]
ORACLE = "def energy(structure):\n    return -1.0 - 0.001 * structure.density\n"
#: The run, in which each process writes after the training of a round what it has come to. A step takes 1/16 s on the
#: clock of the first process and so long on that of the second that it would stop at once. The first one can be stopped
#: as by Ctrl-C after two steps.
SCRIPT = """
import itertools, json, os
from pathlib import Path
from types import SimpleNamespace
from discover import run, train_sampler
from discover.errors import main_guard
from policies.training_state import digest
from tests.discover.crystals import crystal_batch

CRYSTALS = crystal_batch(["NaCl", "TiO2"])
rank = int(os.environ["RANK"])
start = run.start_trainer
train_sampler.time = SimpleNamespace(perf_counter=itertools.count(0.0, 100.0 if rank else 0.0625).__next__)

def start_trainer(config, parts, *, number):
    trainer = start(config, parts, number=number)
    train = trainer.run

    def train_and_tell(*, on_step):
        def step(report):
            on_step(report)
            if "STOP" in os.environ and rank == 0 and report.step == 2:
                raise KeyboardInterrupt
        train(on_step=step)
        tensors, state = trainer._shared_state()
        told = {
            **state,
            "proxies": digest(parts.target.reward.log_reward(CRYSTALS)),
            "weights": {name: digest(value) for name, value in tensors.items()},
            "generator": digest(trainer.generator.get_state()),
            "batch": trainer.batch_size,
        }
        Path(f"{number}-{rank}.json").write_text(json.dumps(told))

    trainer.run = train_and_tell
    return trainer

run.start_trainer = start_trainer
main_guard(run.main)
"""


def start(here: Path, *words: str, **environment: str) -> tuple[int, str, str]:
    """Return the exit code of torchrun and what the processes wrote; ends all of them if they wait for ever."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", *words]
    paths = os.pathsep.join([str(here), str(Path(__file__).parents[2])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=here, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    return process.returncode, out, err


@pytest.mark.slow
def test_processes_that_train_together_agree_in_every_round_and_after_a_stop(tmp_path: Path) -> None:
    (tmp_path / "toy_oracle.py").write_text(ORACLE)
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "run"
    code, _, err = start(tmp_path, *WORDS, f"output={folder}", STOP="yes")
    assert code != 0
    assert f"resume={folder}" in err
    assert [event["step"] for event in open_run_folder(folder).read_log("train")] == [1, 2]
    code, out, err = start(tmp_path, f"resume={folder}")
    assert code == 0, err
    assert out.count("is the report") == 1
    told: dict[tuple[int, int], dict[str, Any]] = {
        (number, rank): json.loads((tmp_path / f"{number}-{rank}.json").read_text())
        for number in (1, 2)
        for rank in (0, 1)
    }
    for number in (1, 2):
        first, second = told[number, 0], told[number, 1]
        assert first.pop("generator") != second.pop("generator")
        assert (first.pop("batch"), second.pop("batch")) == (17, 16)
        assert first == second
    assert told[1, 0]["proxies"] != told[2, 0]["proxies"]
    steps = [(event["round"], event["step"]) for event in open_run_folder(folder).read_log("train")]
    assert steps == [(1, step + 1) for step in range(10)] + [(2, 1), (2, 2), (2, 3)]
    assert set(pd.read_csv(folder / LABELS)["round"]) == {1, 2}


def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the first process will tell the others, and do itself, in order of time."""
    events: list[str] = []

    class First(Processes):
        def from_first(self, value: Any = None) -> Any:
            match value:
                case RunConfig():
                    events.append("config")
                case None:
                    events.append("end")
                case (number, _):
                    events.append(f"train {number}")
            return value

    def noted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def note(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        monkeypatch.setattr(owner, name, note)

    monkeypatch.setattr(run, "join_processes", lambda **_: First())
    noted(run, "sample_distinct")
    noted(Campaign, "check")
    return events


def test_the_others_end_with_the_last_training_and_with_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = told(monkeypatch)
    folder = tmp_path / "run"
    words = [word for word in WORDS if not word.startswith(("oracle.model", "engine", "train.minutes"))]
    words += ["oracle.name=external", "train.n_steps=2", f"output={folder}"]
    with pytest.raises(RunPaused):
        run.main(words)
    assert events == ["config", "train 1", "sample_distinct", "check", "end"]
    answer(folder, 1)
    events.clear()
    with pytest.raises(RunPaused):
        run.main([f"resume={folder}"])
    assert events == ["config", "check", "train 2", "end", "sample_distinct", "check"]
    answer(folder, 2)
    events.clear()
    run.main([f"resume={folder}"])
    assert events == ["config", "check", "end", "check"]


def answer(folder: Path, number: int) -> None:
    form = folder / "external" / f"{number:02d}" / "results.csv"
    table = pd.read_csv(form, dtype=str, keep_default_na=False)
    table.assign(formation_energy_per_atom="-1.5").to_csv(form, index=False)


class Unheard(Processes):
    """One of several processes, whose steps are of its own part alone."""

    def total(self, value: Tensor) -> Tensor:
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass


def test_small_shares_keep_the_mixture_of_the_batch() -> None:
    space = RestrictConfig(elements=("Na", "Mg", "O", "Cl"), n_elements=(2, 2))
    halves = TrainingConfig(n_steps=2, replay_fraction=0.5, data_fraction=0.5)
    for world, train, wanted in (
        (4, replace(halves, batch_size=12), [(2, 1), (2, 1), (1, 2), (1, 2)]),
        (8, TrainingConfig(n_steps=2, batch_size=16), [(1, 0)] * 4 + [(0, 1)] * 4),
        (1, replace(halves, batch_size=3), [(2, 1)]),  # both round up to 2
    ):
        config = RunConfig(reward="stability", restrict=space, train=train)
        parts = build_parts(config)
        shares = []
        for rank in range(world):
            trainer = start_trainer(config, replace(parts, processes=Unheard(rank, world)))
            shares.append((trainer.n_data, trainer.n_replay))
        assert shares == wanted
        own = trainer.batch_size - trainer.n_data
        assert trainer.train_step().n_queries == own  # nothing to replay yet
        assert trainer.train_step().n_queries == 2 * own - trainer.n_replay


def test_more_processes_than_trajectories_are_refused() -> None:
    with pytest.raises(ConfigError, match="too small for 3 processes"):
        Trainer(None, None, None, TrainingConfig(batch_size=2), processes=Processes(0, 3))  # type: ignore[arg-type]
