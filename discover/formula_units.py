"""How many formula units a primitive cell holds: p(Z | kind of formula), counted in known crystals.

TiO2 crystallises with one, two, four and more formula units per primitive cell; which are likely depends mostly on the
kind of formula (one of one element, two of another). Counts per kind are drawn towards those of all formulas with as
many atoms, which answer alone for a kind never seen.
`python -m discover.formula_units data=CSV` counts again; what ships is `discover/formula_units.json`: counts only, of
the Materials Project (Jain et al. 2013, doi:10.1063/1.4812323, CC BY 4.0).
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from discover.data import prepare
from discover.errors import DataError, main_guard
from discover.options import help_text, option, parse_args
from discover.run_folder import write_atomic

SHIPPED = Path(__file__).parent / "formula_units.json"
MAX_ATOMS = 20  # per primitive cell, in the data that are counted and of the cells that are tried
MAX_E_ABOVE_HULL = 0.08  # eV/atom; materials further above the hull are not counted
USAGE = "python -m discover.formula_units data=FILE.csv [output=FILE.json]"
_FEWEST = 3  # materials of a kind below which its counts stay out of the table
_PULL = 10.0  # materials that the counts of all formulas of this size weigh
_FLOOR = 0.5  # and a number of formula units that was never seen

Counts = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class FormulaUnitsConfig:
    """Everything `python -m discover.formula_units` can be told."""

    data: str = option("", "CSV file with structures and e_above_hull")
    output: str = option(SHIPPED.name, "file to write; what ships is not touched")


def kind_of(counts: Sequence[int]) -> tuple[str, int]:
    """Return the kind of formula of atoms per cell, such as ("1-2", 4) for Ti4O8, and the number of formula units."""
    units = math.gcd(*counts)
    return "-".join(str(count // units) for count in sorted(counts)), units


def count_formula_units(composition: Tensor) -> tuple[Counts, Counts]:
    """Return {kind of formula: {Z: materials}} and {atoms of the formula: {Z: materials}}.

    Args:
        composition: (n, 119) atoms per primitive cell of each atomic number.
    """
    by_kind: dict[str, Counter[int]] = defaultdict(Counter)
    by_atoms: dict[str, Counter[int]] = defaultdict(Counter)
    for row in composition.tolist():
        kind, units = kind_of([count for count in row if count])
        by_kind[kind][units] += 1
        by_atoms[str(sum(row) // units)][units] += 1
    seen = {kind: counter for kind, counter in by_kind.items() if counter.total() >= _FEWEST}
    return _sorted(seen), _sorted(by_atoms)


@cache
def load_counts(path: Path = SHIPPED) -> tuple[Counts, Counts]:
    """Return the two tables of `count_formula_units` that ship."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["by_kind"], content["by_atoms"]


def probabilities(counts: Sequence[int], *, max_atoms: int = MAX_ATOMS) -> dict[int, float]:
    """Return p(Z) of a reduced formula for Z = 1 to the most that fit `max_atoms`, at least 1.

    Args:
        counts: Atoms of each element in the reduced formula.
        max_atoms: Most atoms in the primitive cell.
    """
    by_kind, by_atoms = load_counts()
    kind, _ = kind_of(counts)
    units = range(1, max(1, max_atoms // sum(counts)) + 1)
    of_size, of_kind = by_atoms.get(str(sum(counts)), {}), by_kind.get(kind, {})
    expected = np.array([of_size.get(str(z), 0) + _FLOOR for z in units])
    weight = np.array([of_kind.get(str(z), 0) for z in units]) + _PULL * expected / expected.sum()
    return dict(zip(units, (weight / weight.sum()).tolist(), strict=True))


def _sorted(table: Mapping[str, Counter[int]]) -> Counts:
    return {key: {str(z): counter[z] for z in sorted(counter)} for key, counter in sorted(table.items())}


def main(words: Sequence[str]) -> None:
    """Count the formula units of a data set."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(FormulaUnitsConfig, USAGE))
        return
    config = parse_args(FormulaUnitsConfig, words)
    data = prepare(config.data)
    rows = (data.labels["e_above_hull"] < MAX_E_ABOVE_HULL) & (data.crystals.n_atoms <= MAX_ATOMS)
    if not bool(rows.any()):
        raise DataError(
            f"{config.data} has no material below {MAX_E_ABOVE_HULL} eV/atom above the hull (column e_above_hull) with "
            f"up to {MAX_ATOMS} atoms, so there is nothing to count"
        )
    by_kind, by_atoms = count_formula_units(data.crystals.composition[rows])
    content: dict[str, Any] = {
        "source": (
            f"Primitive cells with 1, 2, ... formula units among {int(rows.sum())} materials of the Materials Project "
            f"(CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323) below {MAX_E_ABOVE_HULL} eV/atom above the hull and "
            f"up to {MAX_ATOMS} atoms; kinds of formula with {_FEWEST} materials or more"
        ),
        "by_kind": by_kind,
        "by_atoms": by_atoms,
    }
    write_atomic(Path(config.output), json.dumps(content, indent=1) + "\n")
    print(f"{config.output}: {len(by_kind)} kinds of formula from {int(rows.sum())} materials")


if __name__ == "__main__":
    main_guard(main)
