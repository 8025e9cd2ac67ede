"""An oracle for tests that does what the first element of a structure says, faults included."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Lattice, Structure

from discover.oracle.base import Label, LabelStatus


def crystal(symbol: str, a: float = 3.0) -> Structure:
    return Structure(Lattice.cubic(a), [symbol], [[0, 0, 0]])


@dataclass(frozen=True)
class FaultyOracle:
    """H sleeps, He hangs, Li raises, Be kills itself, B eats memory, C gives NaN, N nonsense, O infinity; others work.

    F kills itself only the first time: it leaves a note in `notes`. Ne waits for a program that it starts.
    """

    notes: str = ""
    start_fault: str = ""

    @property
    def name(self) -> str:
        return "faulty"

    def describe(self) -> Mapping[str, Any]:
        return {"notes": self.notes}

    def start(self) -> None:
        if self.start_fault == "raise":
            raise RuntimeError("no weights")
        if self.start_fault == "die":
            os._exit(3)

    def label(self, structure: Structure) -> Any:  # noqa: C901, PLR0912 - one case per fault
        energy = float(structure.volume)
        match structure[0].specie.symbol:
            case "H":
                if self.notes:
                    (Path(self.notes) / f"owner {os.getppid()}").touch()  # of this process: the engine's worker
                time.sleep(energy / 100)
            case "He":
                time.sleep(600)
            case "Li":
                raise ValueError("no such crystal\nsecond line")
            case "Be":
                os.kill(os.getpid(), signal.SIGKILL)
            case "B":
                blocks = []
                while True:
                    blocks.append(np.ones(2**24))  # 128 MiB
            case "C":
                energy = math.nan
            case "N":
                return {"energy": 1.0}
            case "O":
                energy = math.inf
            case "F":
                note = Path(self.notes) / "seen"
                if not note.exists():
                    note.touch()
                    os._exit(9)
            case "Ne":
                program = subprocess.Popen(["sleep", "600"])  # noqa: S607
                (Path(self.notes) / "program").write_text(str(program.pid))
                time.sleep(600)
        return Label(status=LabelStatus.CONVERGED, energy_per_atom=energy, structure=structure)
