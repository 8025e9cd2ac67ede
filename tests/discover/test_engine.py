import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from discover.engine import Engine, EngineError, Limits, LocalEngine, ParslEngine, Task, default_workers, open_engine
from discover.oracle.base import Label, LabelStatus
from tests.discover.faulty_oracle import FaultyOracle, crystal

LIMITS = Limits(seconds=30.0, memory_gb=0.5, retries=1)  # long enough to fill the memory on a busy machine
FAULTS = {
    "Li": "ValueError: no such crystal",
    "Be": "the worker process died with exit code -9",
    "B": "out of memory (limit 0.5 GB)",
    "C": "the oracle returned no number (NaN)",
    "N": "the oracle returned dict, expected Label",
    "O": "the oracle returned an infinite energy_per_atom",
    "He": "killed after 30 s",
}


@pytest.fixture(scope="module")
def local() -> Iterator[LocalEngine]:
    with LocalEngine(2) as engine:
        yield engine


@pytest.fixture(scope="module")
def parsl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    pytest.importorskip("parsl")
    folder = tmp_path_factory.mktemp("parsl")
    config = folder / "local.py"
    example = Path(__file__).parents[2] / "docs" / "engines" / "local.py"
    own = (
        f"config.run_dir = {str(folder)!r}",
        "config.initialize_logging = False",  # Parsl leaves its log open
        # the oracle of these tests is not installed
        f"config.executors[0].provider.worker_init = 'export PYTHONPATH={os.pathsep.join(sys.path)}'",
    )
    config.write_text("\n".join([example.read_text(), *own]))
    with open_engine("parsl", n_workers=None, config_file=config) as engine:
        yield engine


def labels(engine: Engine, oracle: FaultyOracle, symbols: str, limits: Limits = LIMITS) -> dict[str, Label]:
    tasks = [Task(symbol, crystal(symbol)) for symbol in symbols.split()]
    found = list(engine.label(oracle, tasks, limits))
    assert sorted(name for name, _ in found) == sorted(task.name for task in tasks)
    return dict(found)


def check_faults(found: dict[str, Label]) -> None:
    assert {name: found[name].reason for name in FAULTS} == FAULTS
    assert all(found[name].status is LabelStatus.FAILED for name in FAULTS)
    for name in ("Mg", "Al", "Si"):
        assert found[name].status is LabelStatus.CONVERGED
        assert found[name].energy_per_atom == pytest.approx(27.0)
        assert found[name].structure == crystal(name)
        assert found[name].seconds > 0


def test_every_fault_costs_only_its_own_structure(local: LocalEngine) -> None:
    check_faults(labels(local, FaultyOracle(), "Mg Li Be B C N O He Al Si"))


def test_a_lost_worker_is_tried_again(local: LocalEngine, tmp_path: Path) -> None:
    oracle = FaultyOracle(notes=str(tmp_path))
    assert labels(local, oracle, "F")["F"].status is LabelStatus.CONVERGED
    (tmp_path / "seen").unlink()
    once = labels(local, oracle, "F", Limits(seconds=3, retries=0))
    assert once["F"].reason == "the worker process died with exit code 9"


def test_workers_killed_from_outside_lose_nothing(local: LocalEngine) -> None:
    list(local.label(FaultyOracle(), [Task("warm", crystal("Mg"))], LIMITS))
    tasks = [Task(str(i), crystal("H", 3.0)) for i in range(12)]  # 0.27 s each
    killed = []

    def kill() -> None:
        for _ in range(3):
            time.sleep(0.4)
            killed.extend(local.worker_pids[:1])
            os.kill(killed[-1], signal.SIGKILL)

    assassin = threading.Thread(target=kill)
    assassin.start()
    found = list(local.label(FaultyOracle(), tasks, Limits(seconds=30, retries=5)))
    assassin.join()
    assert len(set(killed)) == 3
    assert sorted(name for name, _ in found) == sorted(task.name for task in tasks)
    assert all(label.status is LabelStatus.CONVERGED for _, label in found)


def test_programs_of_an_oracle_are_killed_with_it(local: LocalEngine, tmp_path: Path) -> None:
    found = labels(local, FaultyOracle(notes=str(tmp_path)), "Ne", Limits(seconds=0.5))
    assert found["Ne"].reason == "killed after 0.5 s"
    assert gone(int((tmp_path / "program").read_text()))


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    code = (
        "from tests.discover.faulty_oracle import FaultyOracle, crystal\n"
        "from discover.engine import LocalEngine, Limits, Task\n"
        "with LocalEngine(1) as engine:\n"
        f"    list(engine.label(FaultyOracle({str(tmp_path)!r}), [Task('a', crystal('Ne'))], Limits()))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 60
    while not ((tmp_path / "program").exists() and (tmp_path / "program").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    assert gone(int((tmp_path / "program").read_text()))


def gone(pid: int, *, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_closing_the_iterator_gives_up_what_is_not_finished(local: LocalEngine) -> None:
    running = local.label(FaultyOracle(), [Task("a", crystal("Mg"))] + [Task("b", crystal("He"))] * 5, Limits())
    assert next(running)[0] == "a"
    running.close()
    start = time.monotonic()
    assert labels(local, FaultyOracle(), "Mg")["Mg"].status is LabelStatus.CONVERGED
    assert time.monotonic() - start < 30


def test_an_oracle_that_cannot_start_is_an_error_and_no_label(local: LocalEngine) -> None:
    with pytest.raises(EngineError, match="'faulty' cannot start: RuntimeError: no weights"):
        labels(local, FaultyOracle(start_fault="raise"), "Mg Al")
    with pytest.raises(EngineError, match="exit code 3"):
        labels(local, FaultyOracle(start_fault="die"), "Mg")
    with LocalEngine(0) as here, pytest.raises(EngineError, match="no weights"):
        labels(here, FaultyOracle(start_fault="raise"), "Mg")


def test_without_workers_labels_are_computed_here() -> None:
    with open_engine("local", n_workers=0, config_file=None) as engine:
        found = labels(engine, FaultyOracle(), "Mg Li C N O Al")
    assert all(found[name].reason == FAULTS[name] for name in ("Li", "C", "N", "O"))
    assert found["Mg"].energy_per_atom == pytest.approx(27.0)


def test_settings_are_checked(tmp_path: Path) -> None:
    bad = tmp_path / "config.py"
    bad.write_text("config = 3\n")
    settings: list[tuple[Any, int | None, Path | None, str]] = [
        ("slurm", None, None, "local and parsl"),
        ("local", 1, bad, "engine.name=parsl"),
        ("local", -1, None, "at least 0"),
        ("parsl", None, None, r"engine\.config"),
        ("parsl", 2, bad, "config file"),
    ]
    for name, n_workers, config_file, message in settings:
        with pytest.raises(EngineError, match=message):
            open_engine(name, n_workers=n_workers, config_file=config_file)
    limits: list[dict[str, Any]] = [{"seconds": 0}, {"seconds": math.nan}, {"memory_gb": 0}, {"retries": -1}]
    for limit in limits:
        with pytest.raises(EngineError, match=next(iter(limit))):
            Limits(**limit)
    assert default_workers() >= 1


def test_a_parsl_config_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    bad = tmp_path / "config.py"
    bad.write_text("config = 3\n")
    with pytest.raises(EngineError, match="must define"):
        ParslEngine(bad)
    with pytest.raises(EngineError, match="no Parsl config"):
        ParslEngine(tmp_path / "absent.py")


def test_parsl_labels_like_the_local_engine(parsl: Engine) -> None:
    assert parsl.n_workers == 2
    check_faults(labels(parsl, FaultyOracle(), "Mg Li Be B C N O He Al Si"))


def test_a_dropped_parsl_worker_loses_nothing(parsl: Engine, tmp_path: Path) -> None:
    tasks = [Task(str(i), crystal("H")) for i in range(8)]  # 0.27 s each
    victims: list[int] = []

    def owners() -> set[int]:
        return {int(note.name.split()[1]) for note in tmp_path.glob("owner *")}

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not victims and time.monotonic() < deadline:
            time.sleep(0.05)
            victims.extend(owners())
        os.kill(victims[0], signal.SIGKILL)

    assassin = threading.Thread(target=kill)
    assassin.start()
    found = list(parsl.label(FaultyOracle(notes=str(tmp_path)), tasks, Limits(seconds=30, retries=2)))
    assassin.join()
    assert gone(victims[0])
    assert sorted(name for name, _ in found) == sorted(task.name for task in tasks)
    assert all(label.status is LabelStatus.CONVERGED for _, label in found)
    assert owners() - {victims[0]}  # another worker took over
