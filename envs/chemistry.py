"""Elements in the order in which compositions are built, and the charges each can contribute.

Rules are SMACT's: one oxidation state per element out of its default list, charge neutrality, and
every cation strictly less electronegative than every anion (``smact_validity(...,
include_alloys=False)``). ``mixed_valence`` lets the elements that SMACT names take two states of
one sign at once, counted over the atoms of the cell where SMACT counts those of the reduced formula;
``chemistry="any"`` has no rule.
"""

import json
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from envs.conventions import TABLES
from envs.errors import RestrictionError


@dataclass(frozen=True)
class Element:
    """One row of the shipped table of elements."""

    symbol: str
    atomic_number: int
    electronegativity: float
    oxidation_states: tuple[int, ...]
    mixed_valence: bool

    def charges(self, count: int, *, mixed_valence: bool) -> set[int]:
        """Return the total charges that ``count`` atoms can carry together."""
        totals = {count * q for q in self.oxidation_states}
        if mixed_valence and self.mixed_valence:
            same_sign = ((p, q) for p, q in product(self.oxidation_states, repeat=2) if p * q > 0)
            totals |= {n * p + (count - n) * q for p, q in same_sign for n in range(1, count)}
        return totals


@cache
def load_elements() -> dict[str, Element]:
    """Return the elements that have an electronegativity and oxidation states, in building order.

    The order is increasing Pauling electronegativity, then atomic number.
    """
    rows = json.loads((TABLES / "chemistry.json").read_text())["elements"]
    elements = [
        Element(
            symbol=symbol,
            atomic_number=row["atomic_number"],
            electronegativity=row["electronegativity"],
            oxidation_states=tuple(row["oxidation_states"]),
            mixed_valence=row["mixed_valence"],
        )
        for symbol, row in rows.items()
    ]
    elements.sort(key=lambda element: (element.electronegativity, element.atomic_number))
    return {element.symbol: element for element in elements}


@dataclass(frozen=True)
class ChargeRule:
    """The charges of every (element, count), split by sign.

    Attributes:
        positive: (n_elements, max_count + 1, n_options) int64 charge added while only cations were
            chosen, -1 = padding.
        negative: same, charge removed when the element is an anion.
        neutral: True if a finished composition must have met an anion and have charge zero;
            False where there is no charge rule (all charges are zero).
        capacity: charges stay below this number.
    """

    positive: Tensor
    negative: Tensor
    neutral: bool
    capacity: int


def charge_rule(
    elements: list[Element], max_count: int, max_atoms: int, chemistry: str, *, mixed_valence: bool
) -> ChargeRule:
    """Tabulate the charges that a composition can take.

    Args:
        elements: In building order.
        max_count: Largest number of atoms of one element.
        max_atoms: Largest number of atoms of all elements.
        chemistry: ``"ionic"`` or ``"any"``.
        mixed_valence: Whether elements of mixed valence may take two states.

    Raises:
        RestrictionError: If ``chemistry`` is unknown.
    """
    if chemistry == "any":
        zero = torch.zeros(len(elements), max_count + 1, 1, dtype=torch.int64)
        return ChargeRule(positive=zero, negative=torch.full_like(zero, -1), neutral=False, capacity=1)
    if chemistry != "ionic":
        raise RestrictionError(f"chemistry must be 'ionic' or 'any', got {chemistry!r}")
    totals = [
        [element.charges(count, mixed_valence=mixed_valence) for count in range(max_count + 1)] for element in elements
    ]
    highest = max((q for element in elements for q in element.oxidation_states), default=0)
    lowest = -min((q for element in elements for q in element.oxidation_states), default=0)
    # A charge is only useful if the atoms that are left can take it back.
    capacity = 1 + max(min(highest * n, lowest * (max_atoms - n)) for n in range(max_atoms + 1))
    return ChargeRule(
        positive=_pad([[sorted(q for q in charges if 0 < q < capacity) for charges in row] for row in totals]),
        negative=_pad([[sorted(-q for q in charges if -capacity < q < 0) for charges in row] for row in totals]),
        neutral=True,
        capacity=max(capacity, 1),
    )


def _pad(rows: list[list[list[int]]]) -> Tensor:
    width = max((len(options) for row in rows for options in row), default=0) or 1
    return torch.tensor([[options + [-1] * (width - len(options)) for options in row] for row in rows])
