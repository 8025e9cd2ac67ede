"""An oracle that only waits, for `benchmarks.labelling`; it imports nothing heavy, so that many workers fit."""

import time

from pymatgen.core import Structure


def nap(structure: Structure) -> float:
    """Wait as many seconds as the cell has Å^3, and return them."""
    time.sleep(structure.volume)
    return float(structure.volume)
