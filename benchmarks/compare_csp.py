"""``python -m benchmarks.compare_csp A.csv B.csv``: two structure predictions of the same materials, pair by pair.

The tables are ``structures.csv`` of ``python -m discover.evaluate task=csp output=DIR``. Materials that are in both are
compared; differences are A minus B with paired bootstrap intervals.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from discover.errors import ConfigError, main_guard
from discover.evaluate import print_table
from discover.metrics.intervals import paired_difference, wilson_interval
from discover.metrics.matching import STOL
from discover.structure_files import read_table

USAGE = "python -m benchmarks.compare_csp A/structures.csv B/structures.csv"
_MISSED_AT = 20  # predictions of B that all miss, or as many as there are


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Return differences of match rate and RMSE-all at every k that both tables have, and A's rate where B misses.

    Raises:
        ConfigError: If they share no material or no k.
    """
    a, b = (read_table(path).set_index("material_id") for path in (first, second))
    ids = a.index.intersection(b.index)
    ks = sorted(_ks(a) & _ks(b))
    if not len(ids) or not ks:
        raise ConfigError(f"{first} and {second} share no material or no k; evaluate both with one data, n, seed and k")
    a, b = a.loc[ids], b.loc[ids]
    return {
        "n": len(ids),
        "by_k": {str(k): _differences(a[f"rms_{k}"], b[f"rms_{k}"]) for k in ks},
        "missed_by_b": _where_missed(a, b, max(k for k in ks if k <= _MISSED_AT)),
    }


def _differences(a: pd.Series, b: pd.Series) -> dict[str, Any]:
    return {
        "match_rate_a": float(a.notna().mean()),
        "match_rate_b": float(b.notna().mean()),
        "match_rate_difference": paired_difference(a.notna(), b.notna())._asdict(),
        "rmse_all_difference": paired_difference(a.fillna(STOL), b.fillna(STOL))._asdict(),
    }


def _where_missed(a: pd.DataFrame, b: pd.DataFrame, k: int) -> dict[str, Any]:
    missed = b[f"rms_{k}"].isna()
    hits = a.loc[missed, f"rms_{k}"].notna()
    rate = float(hits.mean()) if len(hits) else None
    interval = wilson_interval(int(np.sum(hits)), len(hits)) if len(hits) else None
    return {"k": k, "n": len(hits), "match_rate_of_a": rate, "match_rate_interval": interval}


def _ks(table: pd.DataFrame) -> set[int]:
    return {int(name.removeprefix("rms_")) for name in table.columns if name.removeprefix("rms_").isdigit()}


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if len(words) != 2 or any(word in ("-h", "--help", "help") for word in words):
        print(USAGE)
        return
    compared = compare(Path(words[0]), Path(words[1]))
    print_table(compared)
    print(json.dumps(compared))


if __name__ == "__main__":
    main_guard(main)
