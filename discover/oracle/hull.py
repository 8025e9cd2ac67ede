"""Energy above the convex hull of known materials.

The hull file is the user's: a CSV of formulas and formation energies on the Materials Project's MP2020 scale. What
ships is the energy of the elements on that scale: 89 numbers of the Materials Project (CC BY 4.0; Jain et al. 2013,
doi:10.1063/1.4812323), corrected as in Wang et al. 2021 (doi:10.1038/s41598-021-94550-5).
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pymatgen.core import Composition
from scipy.optimize import linprog

from discover.structure_files import read_table

ELEMENTAL_ENERGIES = Path(__file__).parent / "elemental_references.csv"
ENTRIES = "entries.csv.gz"
FORMULA_COLUMNS = ("formula", "pretty_formula")
ENERGY_COLUMNS = ("e_form", "formation_energy_per_atom")
#: Energy above hull in eV/atom below which the file lacks what competes, rather than a compound being that stable: with
#: the relaxed samples of the untrained sampler it met NiBr2 and LuCl3.
IMPLAUSIBLE = -0.25
_NO_SHARE = 1e-7  # of the atoms: what the linear programme leaves of a phase that takes no part


class HullError(ValueError):
    """A hull file that cannot be used."""


@cache
def elemental_energies() -> Mapping[str, float]:
    """Return the MP2020 energy in eV/atom of each element's ground state."""
    table = pd.read_csv(ELEMENTAL_ENERGIES, keep_default_na=False)  # "Na" is no missing value
    return dict(zip(table["element"], table["energy_per_atom"].astype(float), strict=True))


def formation_energy_per_atom(composition: Composition, energy_per_atom: float) -> float:
    """Return the formation energy in eV/atom of a total energy on the MP2020 scale, NaN without a reference.

    Args:
        composition: What the energy is of.
        energy_per_atom: Total energy in eV/atom, such as CHGNet's.
    """
    references = elemental_energies()
    amounts = composition.get_el_amt_dict()
    if not amounts.keys() <= references.keys():
        return math.nan
    return energy_per_atom - sum(n * references[symbol] for symbol, n in amounts.items()) / sum(amounts.values())


@dataclass(frozen=True)
class _Phases:
    """Known phases of one set of elements."""

    fractions: NDArray[np.float64]  # (n_phases, n_elements) atomic fractions, elements in alphabetical order
    energies: NDArray[np.float64]  # (n_phases,) formation energy, eV/atom
    formulas: tuple[str, ...]  # reduced


class Hull:
    """The lower convex hull of formation energies over composition.

    Args:
        energies: Formation energy in eV/atom of each formula; of formulas that reduce to the same the lowest counts.
            Elements are at zero by definition.

    Raises:
        HullError: If there is no entry, or a formula is none.
    """

    def __init__(self, energies: Mapping[str, float]) -> None:
        if not energies:
            raise HullError("a hull needs at least one entry, got none")
        lowest: dict[str, tuple[Composition, float]] = {}
        for formula, energy in energies.items():
            composition = _composition(formula)
            reduced = composition.reduced_formula
            if reduced not in lowest or energy < lowest[reduced][1]:
                lowest[reduced] = composition, energy
        self.formulas = frozenset(lowest)
        #: The same for the same phases and energies, in whatever order and file.
        self.digest = hashlib.sha256(repr(sorted((name, e) for name, (_, e) in lowest.items())).encode()).hexdigest()
        grouped: dict[tuple[str, ...], list[tuple[dict[str, float], float, str]]] = {}
        for reduced, (composition, energy) in lowest.items():
            amounts = composition.get_el_amt_dict()
            total = sum(amounts.values())
            fractions = {symbol: n / total for symbol, n in amounts.items()}
            grouped.setdefault(tuple(sorted(fractions)), []).append((fractions, energy, reduced))
        self.elements = frozenset(symbol for elements in grouped for symbol in elements)
        self._groups = {
            elements: _Phases(
                np.array([[fractions[symbol] for symbol in elements] for fractions, _, _ in entries]),
                np.array([energy for _, energy, _ in entries]),
                tuple(formula for _, _, formula in entries),
            )
            for elements, entries in grouped.items()
        }
        self._systems: dict[tuple[str, ...], _Phases] = {}

    @classmethod
    def load(cls, path: Path | str) -> "Hull":
        """Return the hull of a file, or of `entries.csv.gz` in a folder.

        Raises:
            HullError: If there is no such file, or it lacks formulas, energies, or a finite number, or has a formula
                that is none.
        """
        path = Path(path)
        path = path / ENTRIES if path.is_dir() else path
        if not path.is_file():
            raise HullError(
                f"no hull file at {path}; give a CSV with a column {' or '.join(FORMULA_COLUMNS)} and a column "
                f"{' or '.join(ENERGY_COLUMNS)} (eV/atom, MP2020 corrections), or a folder with {ENTRIES}"
            )
        table = read_table(path)
        formulas = _column(table, FORMULA_COLUMNS, path).fillna("").astype(str)
        given = _column(table, ENERGY_COLUMNS, path)
        if n_empty := int(given.isna().sum()):
            print(f"{path}: {n_empty} of {len(table)} rows have no formation energy and are left out", file=sys.stderr)
            formulas, given = formulas[given.notna()], given[given.notna()]
        energies = pd.to_numeric(given, errors="coerce").to_numpy(dtype=np.float64)
        broken = np.flatnonzero(~np.isfinite(energies))
        if len(broken):
            raise HullError(f"{path}: row {broken[0]} ({formulas.iloc[broken[0]]}) has no finite formation energy")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns that helium, neon and argon have no electronegativity
            try:
                return cls(pd.Series(energies).groupby(formulas.to_numpy()).min().to_dict())
            except HullError as error:
                raise HullError(f"{path}: {error}") from error

    def energy(self, composition: Composition) -> float:
        """Return the hull's formation energy in eV/atom at a composition; NaN if it lacks one of its elements.

        The hull at a composition is the cheapest mixture of known phases that makes it up, a linear programme.
        """
        if self.lacks(composition):
            return math.nan
        phases, mixture = self._cheapest(composition)
        return float(phases.energies @ mixture)

    def decomposition(self, composition: Composition) -> dict[str, float]:
        """Return the phases that a composition decays into, by reduced formula; {} if the hull lacks an element.

        Each comes with the share of all atoms that it takes up; shares sum to 1, the largest first. A stable
        phase is its own only product.
        """
        if self.lacks(composition):
            return {}
        phases, mixture = self._cheapest(composition)
        shares: dict[str, float] = {}
        for i in np.argsort(-mixture, kind="stable"):
            if mixture[i] > _NO_SHARE:
                shares[phases.formulas[i]] = shares.get(phases.formulas[i], 0.0) + float(mixture[i])
        return shares

    def e_above_hull(
        self, compositions: Iterable[Composition], formation_energies: Sequence[float] | NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return energies above hull in eV/atom, negative below it; (n,), NaN where unknown.

        A candidate is no part of the hull itself, so a new stable one is below zero. Unknown are structures without an
        energy and those with an element that the hull lacks (`lacks` names it).
        """
        pairs = zip(compositions, formation_energies, strict=True)
        return np.array([e - self.energy(c) if math.isfinite(e) else math.nan for c, e in pairs], dtype=np.float64)

    def lacks(self, composition: Composition) -> tuple[str, ...]:
        """Return the elements of a composition that no entry of the hull contains."""
        return tuple(sorted(composition.get_el_amt_dict().keys() - self.elements))

    def _cheapest(self, composition: Composition) -> tuple[_Phases, NDArray[np.float64]]:
        """Return all phases of the elements, and the (n_phases,) shares of atoms of the cheapest mixture of them."""
        amounts = composition.get_el_amt_dict()
        elements = tuple(sorted(amounts))
        phases = self._system(elements)
        target = np.array([amounts[symbol] for symbol in elements]) / sum(amounts.values())
        solution = linprog(phases.energies, A_eq=phases.fractions.T, b_eq=target, method="highs")
        if not solution.success:  # the elements themselves are among the phases, so there is always a mixture
            raise HullError(f"no hull energy of {composition.reduced_formula}: {solution.message}")
        return phases, np.asarray(solution.x, dtype=np.float64)

    def _system(self, elements: tuple[str, ...]) -> _Phases:
        """Return all phases made of some of these elements, the elements themselves at zero among them."""
        if elements not in self._systems:
            n = len(elements)
            fractions, energies = [np.eye(n)], [np.zeros(n)]
            formulas = [Composition(symbol).reduced_formula for symbol in elements]
            for size in range(1, n + 1):
                for places in combinations(range(n), size):
                    group = self._groups.get(tuple(elements[i] for i in places))
                    if group is not None:
                        spread = np.zeros((len(group.energies), n))
                        spread[:, places] = group.fractions
                        fractions.append(spread)
                        energies.append(group.energies)
                        formulas.extend(group.formulas)
            self._systems[elements] = _Phases(np.concatenate(fractions), np.concatenate(energies), tuple(formulas))
        return self._systems[elements]


def _composition(formula: str) -> Composition:
    try:
        composition = Composition(formula)
    except ValueError:
        composition = Composition()
    if not composition or not composition.valid:
        raise HullError(f"{formula!r} is no chemical formula; correct it, or leave the row out")
    return composition


def _column(table: pd.DataFrame, names: tuple[str, ...], path: Path) -> pd.Series:
    for name in names:
        if name in table.columns:
            return table[name]
    raise HullError(f"{path} has no column {' or '.join(names)}; it has {', '.join(map(str, table.columns))}")
