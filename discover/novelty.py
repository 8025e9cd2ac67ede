"""Which compositions the training data already hold: a compact fingerprint that ships with the package.

Each known reduced formula is one 40-bit hash; the file keeps the sorted hashes as differences, 44,000 formulas in about
180 kB. A composition that is not among them is called known by mistake once in 25 million. Only hashes ship, no rows.

A composition that is absent is *not yet novel*: it may be in another data base, in the literature, or known as a
compound whose composition varies. A composition that is present may still come with a new structure.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition

from discover.errors import DataError, main_guard
from discover.options import option, parse_args
from discover.run_folder import write_atomic
from discover.structure_files import read_table

SHIPPED = Path(__file__).parent / "known_compositions.npz"
_KEPT_BITS = 40
_FORMULA_COLUMN = "pretty_formula"


@dataclass(frozen=True, kw_only=True)
class FingerprintConfig:
    """Everything `python -m discover.novelty` can be told."""

    data: str = option("", "CSV file with a column pretty_formula")
    output: str = option(SHIPPED.name, "file to write; what ships is not touched")


def hash_formulas(formulas: Iterable[str]) -> NDArray[np.uint64]:
    """Return the 40-bit hash of each reduced formula, (n,)."""
    digests = b"".join(hashlib.blake2b(formula.encode(), digest_size=8).digest() for formula in formulas)
    whole = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    return whole >> np.uint64(64 - _KEPT_BITS)


def build_fingerprint(formulas: Iterable[str]) -> bytes:
    """Return the fingerprint of the compositions as the bytes of an npz file.

    Args:
        formulas: Formulas in any notation; they are reduced as pymatgen does.
    """
    reduced = {Composition(formula).reduced_formula for formula in set(formulas)}
    hashes = np.unique(hash_formulas(sorted(reduced)))
    differences = np.diff(hashes, prepend=np.uint64(0))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, differences=differences.astype(np.uint64), n_formulas=np.int64(len(reduced)))
    return buffer.getvalue()


@cache
def load_fingerprint(path: Path = SHIPPED) -> NDArray[np.uint64]:
    """Return the sorted hashes of the known compositions, (n,)."""
    with np.load(path, allow_pickle=False) as table:
        hashes: NDArray[np.uint64] = np.cumsum(table["differences"], dtype=np.uint64)
    return hashes


def is_known(formulas: Sequence[str], path: Path = SHIPPED) -> NDArray[np.bool_]:
    """Return for each reduced formula whether the training data hold a material of that composition, (n,) bool."""
    known = load_fingerprint(path)
    wanted = hash_formulas(formulas)
    place = np.searchsorted(known, wanted).clip(max=max(len(known) - 1, 0))
    found: NDArray[np.bool_] = known[place] == wanted
    return found


def main(words: Sequence[str]) -> None:
    """Build the fingerprint of a data set's compositions."""
    config = parse_args(FingerprintConfig, words)
    table = read_table(Path(config.data))
    if _FORMULA_COLUMN not in table.columns:
        raise DataError(f"{config.data} has no column {_FORMULA_COLUMN}; the fingerprint is made of it")
    formulas = table[_FORMULA_COLUMN].dropna().unique()
    if not len(formulas):
        raise DataError(f"{config.data} has no formula, so there is nothing to make a fingerprint of")
    content = build_fingerprint(formulas)
    write_atomic(Path(config.output), content)
    print(f"{config.output}: {len(formulas)} formulas, {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    main_guard(main)
