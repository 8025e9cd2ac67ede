"""What a structure is asked for: a formula, read and checked, and how much of it the primitive cell may hold."""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from pymatgen.core import Composition, Element

from discover.formula_units import probabilities
from discover.oxidation import assign
from envs.assignment import possible_space_groups
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch

MOST_ATOMS_OF_ONE_ELEMENT = 512  # per primitive cell: the largest tables of `envs.assignment`
_SYMBOLS = tuple(Element.from_Z(z).symbol for z in range(1, MAX_ATOMIC_NUMBER + 1))
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_HYDRATE_DOT = re.compile(r"[·•∙*]")
_LEADING_NUMBER = re.compile(r"^(\d*)\s*(.+)$", re.DOTALL)
_SYMBOL = re.compile(r"[A-Z][a-z]?")


def cell_contents(crystals: CrystalBatch) -> list[dict[str, int]]:
    """Return the atoms of each element in the primitive cell of each crystal."""
    return [{_SYMBOLS[z - 1]: row[z] for z in range(1, len(row)) if row[z]} for row in crystals.composition.tolist()]


class CompositionError(ValueError):
    """A formula that cannot be read, or that asks for something impossible."""


@dataclass(frozen=True)
class CompositionQuery:
    """The contents of a primitive cell, or of several that are tried.

    `shares` gives p(Z) of each number of formula units Z; it sums to 1.
    """

    formula: str  # as pymatgen writes it, such as "TiO2"
    unit: Mapping[str, int]  # atoms of each element in one formula unit
    shares: Mapping[int, float]

    def cell(self, n_formula_units: int) -> dict[str, int]:
        """Return the atoms of each element in a primitive cell of so many formula units."""
        return {symbol: count * n_formula_units for symbol, count in self.unit.items()}

    @property
    def largest(self) -> int:
        """Return the atoms of the largest cell that is tried."""
        return max(self.shares) * sum(self.unit.values())


def read_query(
    text: str, *, n_formula_units: int | None = None, space_group: int | None = None, chemistry: str = "any"
) -> CompositionQuery:
    """Return what a formula and the settings beside it ask for.

    A reduced formula (TiO2) leaves the size of the cell open; any other (Ti4O8) is the contents of the primitive cell.

    Args:
        text: The formula; hydrates and brackets are understood.
        n_formula_units: Formula units in the primitive cell; None tries 1 to as many as `MAX_ATOMS` atoms make.
        space_group: The only one that is wanted, 1 to 230; sizes of the cell that it cannot hold are left out.
        chemistry: "ionic" refuses what cannot be charge-neutral, "any" takes everything.

    Raises:
        CompositionError: If the formula cannot be read, or contradicts what is asked; the message says the remedy.
    """
    counts = parse_formula(text)
    formula, unit, written_units = _formula_unit(counts)
    if chemistry == "ionic":
        _check_neutral(formula, unit)
    if written_units > 1:
        if n_formula_units not in (None, written_units):
            raise CompositionError(
                f"composition={text} already says {written_units} formula units of {formula}, "
                f"n_formula_units={n_formula_units} another number; write composition={formula} or drop n_formula_units"
            )
        n_formula_units = written_units
    shares = {n_formula_units: 1.0} if n_formula_units is not None else _shares(unit)
    _check_size(formula, unit, max(shares))
    if space_group is not None:
        shares = _with_space_group(formula, unit, shares, space_group)
    return CompositionQuery(formula, unit, shares)


def parse_formula(text: str) -> dict[str, int]:
    """Return the atoms of each element in a formula such as TiO2, Ca(OH)2 or CuSO4·5H2O.

    Raises:
        CompositionError: If it is no formula, names something that is no element, or an amount is not whole.
    """
    plain = text.translate(_SUBSCRIPTS).strip()
    total = Composition()
    parts = _HYDRATE_DOT.split(plain)
    for part in parts:
        times, formula = _split_number(part) if len(parts) > 1 else ("", part)
        try:
            total += Composition(formula) * int(times or 1)
        except ValueError:
            raise CompositionError(f"cannot read composition={text!r}; {_hint(plain)}") from None
    amounts = {str(key): float(amount) for key, amount in total.items()}
    for symbol in dict.fromkeys(_SYMBOL.findall(plain)):  # X is a dummy of pymatgen's, D and T become H, Ti0 nothing
        if symbol not in _SYMBOLS or symbol not in amounts:
            raise CompositionError(_no_element(symbol, text))
    if any(abs(amount - round(amount)) > 1e-6 or amount < 0.5 for amount in amounts.values()):
        listed = ", ".join(f"{symbol} {amount:g}" for symbol, amount in amounts.items())
        whole = f"composition={_whole_formula(total)}" if "." in plain else "whole numbers"
        raise CompositionError(
            f"composition={text} has amounts that are no whole numbers ({listed}): a primitive cell holds whole atoms. "
            f"Write {whole}; a hydrate takes a raised dot, as in CuSO4·5H2O"
        )
    return {symbol: round(amount) for symbol, amount in amounts.items()}


def _split_number(part: str) -> tuple[str, str]:
    match = _LEADING_NUMBER.match(part.strip())
    return (match[1], match[2]) if match else ("", part)


def _hint(text: str) -> str:
    """Return what to write instead of a text that is no formula."""
    if re.search(r"[+\-]", text):
        return "leave charges, ranges and variables out, as in TiO2"
    guesses = Composition.ranked_compositions_from_indeterminate_formula(text.lower()) if text.isalnum() else []
    if guesses:
        return f"did you mean {guesses[0].reduced_formula}? Symbols start with a capital"
    return "write element symbols and whole numbers, as in TiO2, Ca(OH)2 or CuSO4·5H2O"


def _no_element(symbol: str, text: str) -> str:
    if symbol in ("D", "T"):
        return f"composition={text}: {symbol} is an isotope of hydrogen; write H" + (" (or Ti?)" * (symbol == "T"))
    if symbol in _SYMBOLS:
        return f"composition={text} holds no {symbol}: its amount is 0; leave it out"
    near = get_close_matches(symbol, _SYMBOLS, n=1)
    return f"composition={text}: {symbol} is no element" + (
        f"; did you mean {near[0]}?" if near else "; check its symbol"
    )


def _whole_formula(amounts: Composition) -> str:
    return str(amounts.get_integer_formula_and_factor(max_denominator=100)[0])


def _formula_unit(counts: Mapping[str, int]) -> tuple[str, dict[str, int], int]:
    """Return formula, atoms of one formula unit, and how many units were written.

    The unit is pymatgen's, which keeps Na2O2 and Cl2 whole; where that is no whole part of what is written, as of NaO,
    Cl and N5, it is the smallest one, NaO, Cl and N.
    """
    composition = Composition(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns that helium and neon have no electronegativity
        formula, factor = composition.get_reduced_formula_and_factor()
    units = int(factor)
    if factor != units:
        units = math.gcd(*counts.values())
        smallest = {symbol: count // units for symbol, count in counts.items()}
        formula = "".join(f"{symbol}{count if count > 1 else ''}" for symbol, count in smallest.items())
    return formula, {symbol: count // units for symbol, count in counts.items()}, units


def _shares(unit: Mapping[str, int]) -> dict[int, float]:
    """Return p(Z) of every size of the cell; Z counts `unit`, which may be twice what the statistics count."""
    counts = list(unit.values())
    base = math.gcd(*counts)
    likely = probabilities([count // base for count in counts])
    chosen = {z // base: share for z, share in likely.items() if z % base == 0}
    if not chosen:
        return {1: 1.0}
    total = sum(chosen.values())
    return {z: share / total for z, share in chosen.items()}


def _check_neutral(formula: str, unit: Mapping[str, int]) -> None:
    amounts = torch.zeros(1, MAX_ATOMIC_NUMBER + 1, dtype=torch.int64)
    for symbol, count in unit.items():
        amounts[0, Element(symbol).Z] = count
    if not bool(assign(amounts).score.isfinite()):
        raise CompositionError(
            f"{formula} is not charge-balanced: no choice of one oxidation state per element is neutral and gives the "
            "negative ones to the most electronegative elements. chemistry=any takes it all the same (alloys, elements "
            "and mixed valence such as Fe3O4 need that)"
        )


def _check_size(formula: str, unit: Mapping[str, int], units: int) -> None:
    symbol = max(unit, key=lambda key: unit[key])
    if unit[symbol] * units > MOST_ATOMS_OF_ONE_ELEMENT:
        raise CompositionError(
            f"{units} formula units of {formula} put {unit[symbol] * units} atoms of {symbol} in the primitive cell; "
            f"the tables of Wyckoff positions hold up to {MOST_ATOMS_OF_ONE_ELEMENT}. Ask for fewer formula units"
        )


def _with_space_group(
    formula: str, unit: Mapping[str, int], shares: Mapping[int, float], space_group: int
) -> dict[int, float]:
    possible = {z: possible_space_groups([count * z for count in unit.values()]) for z in shares}
    kept = {z: share for z, share in shares.items() if bool(possible[z][space_group - 1])}
    if not kept:
        groups = torch.stack(list(possible.values())).any(dim=0).nonzero().flatten().add(1).tolist()
        sizes = ", ".join(map(str, shares))
        raise CompositionError(
            f"space group {space_group} has no Wyckoff positions for {formula} with {sizes} formula units in the "
            f"primitive cell. Possible are {ranges(groups)}"
        )
    total = sum(kept.values())
    return {z: share / total for z, share in kept.items()}


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers as text such as "1-15, 17"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
