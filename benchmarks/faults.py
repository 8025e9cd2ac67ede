"""Kill a campaign again and again, resume it, and compare its store with that of an undisturbed run.

    python -m benchmarks.faults n_kills=50 output=FOLDER

The oracle is a toy that also raises, hangs, returns NaN, eats memory and kills its own process, for structures that
their composition picks, so that both runs meet the same faults. A third of the kills come at any instant, a third while
structures are being labelled, and a third kill one of the workers then. Reported: labels in both stores, differences,
labels bought twice.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from discover.errors import main_guard
from discover.options import option, parse_args
from discover.progress import LABELS
from discover.run_folder import write_atomic

ORACLE = '''
import os, time, zlib

def label(structure):
    """A formation energy that depends on the structure alone, or one of the faults."""
    with open(os.environ["FAULTS_CALLS"], "a") as calls:
        calls.write(structure.composition.formula.replace(" ", "") + f" {structure.volume:.6f}" + chr(10))
    fault = zlib.crc32(structure.composition.reduced_formula.encode()) % 12
    time.sleep(0.3)
    if fault == 0:
        raise RuntimeError("this structure does not converge")
    if fault == 1:
        time.sleep(3600)
    if fault == 2:
        return float("nan")
    if fault == 3:
        hoard = [bytearray(10**8) for _ in range(10**4)]
    if fault == 4:
        os._exit(9)
    return -1.0 - 0.01 * structure.density
'''
SETTINGS = (
    *("reward=stability", "rounds=4", "train.n_steps=6", "train.batch_size=32", "learn.sampler_steps=4"),
    *("n_candidates=150", "n_structures=0", "oracle.name=callable", "oracle.model=faulty_oracle:label"),
    *("oracle.time_limit=2", "oracle.memory_limit=2", "engine.workers=2"),
)


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Everything this benchmark can be told."""

    output: str = option("", "folder for both runs")
    n_kills: int = option(50, "kills of the campaign or of one of its workers")
    budget: int = option(120, "structures to check")
    longest: float = option(16.0, "seconds between kills, at most")
    seed: int = option(0, "of the instants")


def main(words: Sequence[str]) -> None:
    """Run both campaigns and compare."""
    config = parse_args(FaultsConfig, words)
    output = Path(config.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "faulty_oracle.py", ORACLE)
    settings = [*SETTINGS, f"oracle.budget={config.budget}"]
    whole, killed = output / "undisturbed", output / "killed"
    if not (whole / LABELS).exists():
        _start([*settings, f"output={whole}"], output, "undisturbed").wait()
    kills = _disturb(config, settings, output, killed)
    wanted, found = (pd.read_csv(run / LABELS, keep_default_na=False, na_values=[""]) for run in (whole, killed))
    columns = ["candidate_id", "formula", "status", "formation_energy"]
    merged = wanted[columns].merge(found[columns], on="candidate_id", how="outer", suffixes=("", "_killed"))
    energy = (merged["formation_energy"] - merged["formation_energy_killed"]).abs()
    one_sided = merged["formation_energy"].isna() != merged["formation_energy_killed"].isna()
    differ = (merged["status"] != merged["status_killed"]) | (energy > 1e-4) | one_sided
    calls = {run: len((output / f"{run}.calls").read_text().splitlines()) for run in ("undisturbed", "killed")}
    figures = {
        **kills,
        "labels": [len(wanted), len(found)],
        "failed": [int((table["status"] == "failed").sum()) for table in (wanted, found)],
        "different": int(differ.sum()),
        "duplicated": int(found["candidate_id"].duplicated().sum()),
        "oracle_calls": list(calls.values()),
    }
    print(json.dumps(figures))
    if differ.any():
        print(merged[differ].to_string())


def _disturb(config: FaultsConfig, settings: list[str], output: Path, folder: Path) -> dict[str, int]:
    """Run to the end through kills, and return how many there were of each kind."""
    draws = random.Random(config.seed)
    runs = workers = 0
    process = _start([*settings, f"output={folder}"], output, "killed")
    while runs + workers < config.n_kills and process.poll() is None:
        kind = (runs + workers) % 3
        if kind == 0:
            time.sleep(draws.uniform(0.2, config.longest))
        else:
            while not _children(process.pid) and process.poll() is None:
                time.sleep(0.05)
            time.sleep(draws.uniform(0.0, 3.0))
        children = _children(process.pid)
        if kind == 2 and children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draws.choice(children), signal.SIGKILL)
                workers += 1
        elif process.poll() is None:
            process.kill()
            process.wait()
            runs += 1
            begun = (folder / "config.yaml").exists()
            process = _start([f"resume={folder}"] if begun else [*settings, f"output={folder}"], output, "killed")
    process.wait()
    return {"run_kills": runs, "worker_kills": workers, "exit": int(process.returncode)}


def _start(words: Sequence[str], place: Path, name: str) -> "subprocess.Popen[bytes]":
    paths = [str(place), str(Path(__file__).resolve().parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FAULTS_CALLS": str(place / f"{name}.calls")}
    with (place / f"{name}.log").open("ab") as log:
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "discover.run", *words], cwd=place, env=environment, stdout=log, stderr=log
        )


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


if __name__ == "__main__":
    main_guard(main)
