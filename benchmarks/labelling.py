"""How fast engines label: CHGNet labels per hour, an engine's own time per task, and how busy many workers are kept.

    python -m benchmarks.labelling n=24 n_naps=640
    python -m benchmarks.labelling n=0 n_empty=0 n_naps=10000     # the simulation in full: 64 workers, 3 minutes

Workers are started before the clock. CHGNet labels crystals of the prior, both stages. The simulation is one round of
tasks that wait a second each, in workers without torch; its share of busy time includes the last, half-empty wave.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Lattice, Structure

from discover.engine import Engine, Limits, Task, open_engine
from discover.errors import main_guard
from discover.generate import generate
from discover.options import option, parse_args
from discover.oracle.base import Label, Oracle
from discover.oracle.callable import CallableOracle
from discover.oracle.chgnet import ChgnetOracle

LIMITS = Limits(seconds=600, memory_gb=6)
NAP = CallableOracle("benchmarks.napping:nap", quantity="slept")


@dataclass(frozen=True, kw_only=True)
class LabellingConfig:
    """Everything this benchmark can be told."""

    n: int = option(24, "crystals that CHGNet labels with each engine; 0 leaves that out")
    n_empty: int = option(500, "tasks without any work, for the engine's own time; 0 leaves that out")
    n_naps: int = option(640, "tasks of the simulation; 0 leaves that out")
    n_nappers: int = option(64, "workers of the simulation")
    nap: float = option(1.0, "seconds that each of its tasks waits")
    parsl: str | None = option(None, "Parsl config file, such as docs/engines/local.py; null: Parsl is left out")
    seed: int = option(0, "random seed of the crystals")


def main(words: Sequence[str]) -> None:
    """Measure what is asked for and print it."""
    config = parse_args(LabellingConfig, words)
    figures: dict[str, dict[str, float]] = {}
    if config.n or config.n_empty:
        torch.set_num_threads(1)
        drawn = generate(config.n, seed=config.seed).structures if config.n else []
        structures = [structure for structure in drawn if structure is not None]
        for name in ("1 worker", "2 workers", *(["parsl"] if config.parsl else [])):
            with engine_named(name, config.parsl) as engine:
                figures[name] = {
                    **(chgnet_rate(engine, structures) if structures else {}),
                    **(overhead(engine, config.n_empty) if config.n_empty else {}),
                }
            print(name, figures[name], flush=True)
    if config.n_naps:
        with open_engine("local", n_workers=config.n_nappers, config_file=None) as engine:
            figures["simulation"] = simulation(engine, config.n_naps, config.nap)
        print("simulation", figures["simulation"])
    print(json.dumps(figures))


def engine_named(name: str, parsl: str | None) -> Engine:
    """Return one of the engines that are compared."""
    if name == "parsl":
        return open_engine("parsl", n_workers=None, config_file=Path(str(parsl)))
    return open_engine("local", n_workers=int(name.split(maxsplit=1)[0]), config_file=None)


def chgnet_rate(engine: Engine, structures: Sequence[Structure]) -> dict[str, float]:
    """Return labels per hour with CHGNet and CPU seconds per label."""
    oracle = ChgnetOracle()
    timed(engine, oracle, structures[: engine.n_workers] * 2)  # so that every worker has its model
    seconds, labels = timed(engine, oracle, structures)
    return {
        "labels_per_hour": round(3600 * len(labels) / seconds, 1),
        "cpu_seconds_per_label": round(float(np.mean([label.seconds for label in labels])), 3),
    }


def overhead(engine: Engine, n: int) -> dict[str, float]:
    """Return milliseconds of a worker's time per task that does nothing: sending, receiving, waiting."""
    crystals = [crystal(1e-9)] * n
    timed(engine, NAP, crystals[: 4 * engine.n_workers])
    seconds, _ = timed(engine, NAP, crystals)
    return {"overhead_ms_per_task": round(1000 * seconds * engine.n_workers / n, 2)}


def simulation(engine: Engine, n: int, nap: float) -> dict[str, float]:
    """Return the share of the workers' time in which they were busy."""
    timed(engine, NAP, [crystal(nap)] * engine.n_workers)
    seconds, _ = timed(engine, NAP, [crystal(nap)] * n)
    waves = -(-n // engine.n_workers)
    return {
        "workers": engine.n_workers,
        "tasks": n,
        "seconds": round(seconds, 2),
        "busy": round(n * nap / (seconds * engine.n_workers), 4),
        "busy_at_best": round(n / (waves * engine.n_workers), 4),
    }


def timed(engine: Engine, oracle: Oracle, structures: Sequence[Structure]) -> tuple[float, list[Label]]:
    """Return wall seconds and labels."""
    tasks = [Task(str(i), structure) for i, structure in enumerate(structures)]
    start = time.perf_counter()
    labels = [label for _, label in engine.label(oracle, tasks, LIMITS)]
    return time.perf_counter() - start, labels


def crystal(volume: float) -> Structure:
    """Return a crystal whose cell has this volume in Å^3."""
    return Structure(Lattice.cubic(volume ** (1 / 3)), ["H"], [[0, 0, 0]])


if __name__ == "__main__":
    main_guard(main)
