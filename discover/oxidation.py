"""How usual the oxidation states of a composition are.

Charge neutrality with the Pauling order is necessary, not sufficient: the table of states admits Cu4+, Ca+ and Fe4-.
`assign` therefore finds, among all charge-neutral, Pauling-ordered assignments of one state per element, the one whose
states are most frequent in the ICSD, and scores it by the sum of log frequencies. Frequencies are counts of structures
per state over all counted states of the element, as SMACT ships them (ICSD, 2024). A score of 0 is the usual state of
every element; below -5 something is exotic: of compounds with a gap in the training data 94 % lie above, of random
charge-neutral, Pauling-ordered compositions 19 % (area under the curve 0.95). Mixed valence (Fe3O4) has no assignment
of one state per element.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from envs.chemistry import load_elements

_CHUNK = 2_000_000  # combinations looked at together: about 100 MB


@dataclass(frozen=True)
class OxidationStates:
    """Per atomic number, the states of each sign with their log frequencies.

    Attributes:
        electronegativity: (119,) float64 Pauling; nan where the element has none.
        n_states: (2, 119) number of positive (row 0) and negative (row 1) states.
        states: (2, 119, most) int64 states, the most frequent first, 0 = padding.
        log_frequency: (2, 119, most) float64 natural log of each state's share of the element's counts.
    """

    electronegativity: Tensor
    n_states: Tensor
    states: Tensor
    log_frequency: Tensor


@dataclass(frozen=True)
class Assignments:
    """The most frequent assignment of each composition.

    Attributes:
        score: (n,) float64 sum of log frequencies; -inf where no neutral, Pauling-ordered assignment exists.
        states: (n, 119) int64 oxidation state per atomic number, 0 where the element is absent or nothing fits.
    """

    score: Tensor
    states: Tensor


@cache
def load_oxidation_states() -> OxidationStates:
    """Return the oxidation states of `envs.chemistry` with their frequencies in the ICSD, from SMACT's counts."""
    counts: dict[str, dict[int, int]] = {}
    for row in json.loads((files("smact") / "data" / "oxidation_states_icsd24_counts.json").read_text()):
        counts.setdefault(row["element"], {})[row["oxidation_state"]] = row["results_count"]
    electronegativity = torch.full((119,), torch.nan, dtype=torch.float64)
    ranked: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for symbol, element in load_elements().items():
        electronegativity[element.atomic_number] = element.electronegativity
        total = sum(counts[symbol][state] for state in element.oxidation_states)
        for state in element.oxidation_states:
            row_of_sign = ranked.setdefault((0 if state > 0 else 1, element.atomic_number), [])
            row_of_sign.append((math.log(counts[symbol][state] / total), state))
    most = max(len(options) for options in ranked.values())
    n_states = torch.zeros(2, 119, dtype=torch.int64)
    states = torch.zeros(2, 119, most, dtype=torch.int64)
    log_frequency = torch.zeros(2, 119, most, dtype=torch.float64)
    for (sign, z), options in ranked.items():
        for i, (log_share, state) in enumerate(sorted(options, reverse=True)):
            states[sign, z, i], log_frequency[sign, z, i] = state, log_share
        n_states[sign, z] = len(options)
    return OxidationStates(electronegativity, n_states, states, log_frequency)


_USUAL = 0.03  # share of an element's structures from which a state is one of its usual ones
#: Electronegativity from which an element is an anion, where it can be, and which state cations have, in the order of
#: how usual they are (0 the first).
_ASSIGNMENTS = (
    (2.04, 0),  # Ca3P2, Fe2Te3, NaH
    (2.04, 1),  # FeTe
    (2.5, 0),  # Na3PS4
    (3.0, 0),  # CaSO4, Ca3P2O8
    (3.0, 1),  # FeSO4, SnCl2
    (3.4, 0),  # KNO3, KClO4
)


def usual_charges(atomic_numbers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the oxidation states of n elements, one row of n for each of six usual ways to assign them.

    They differ in which nonmetals are anions and in whether cations have their most or second most frequent state, as
    the compounds of the ICSD do: phosphorus is P3- in Ca3P2 and P5+ in CaP2O6, iron Fe3+ or Fe2+.
    """
    table = load_oxidation_states()
    usual = table.log_frequency[:, atomic_numbers] >= math.log(_USUAL)  # (2, n, most)
    n_cation, n_anion = (usual & (table.states[:, atomic_numbers] != 0)).sum(dim=2)
    rows = []
    for threshold, rank in _ASSIGNMENTS:
        may_be = (table.electronegativity[atomic_numbers] >= threshold) | (n_cation == 0)
        is_anion = (n_anion > 0) & may_be
        place = torch.where(is_anion, 0, (n_cation - 1).clamp(0, rank))
        rows.append(tuple(table.states[is_anion.long(), atomic_numbers, place].tolist()))
    return tuple(rows)


def oxidation_score(composition: Tensor) -> Tensor:
    """Return the score of the most frequent assignment of each composition.

    Args:
        composition: (n, 119) atoms per atomic number.

    Returns:
        (n,) float64, at most 0; -inf where no charge-neutral, Pauling-ordered assignment exists.
    """
    return assign(composition).score


def assign(composition: Tensor) -> Assignments:
    """Return the most frequent oxidation states of each composition, exactly, by ordered enumeration.

    In order of electronegativity the cations come first, so an assignment is a place to split the elements and one
    state of the right sign for each; an element as electronegative as its neighbour cannot be split from it.

    Args:
        composition: (n, 119) atoms per atomic number.
    """
    n = composition.shape[0]
    table = load_oxidation_states()
    score = torch.full((n,), -torch.inf, dtype=torch.float64)
    states = torch.zeros(n, 119, dtype=torch.int64)
    n_elements = (composition > 0).sum(dim=-1)
    for width in sorted(set(n_elements.tolist())):
        if width < 2:
            continue
        rows = (n_elements == width).nonzero().flatten()
        elements = (composition[rows] > 0).nonzero()[:, 1].reshape(-1, width)
        order = table.electronegativity[elements].nan_to_num(nan=torch.inf).argsort(dim=-1, stable=True)
        elements = elements.gather(1, order)
        counts = composition[rows].gather(1, elements)
        best, chosen = _best_of_width(table, elements, counts)
        score[rows] = best
        states[rows.unsqueeze(1).expand_as(elements), elements] = chosen
    return Assignments(score, states)


def assignment_strings(assignments: Assignments) -> list[str]:
    """Return each assignment as text such as "Fe3+ O2-", in order of electronegativity; "" where nothing fits."""
    symbols = {element.atomic_number: symbol for symbol, element in load_elements().items()}  # in building order
    strings = []
    for row, fits in zip(assignments.states.tolist(), assignments.score.isfinite().tolist(), strict=True):
        strings.append(" ".join(_ion(symbols[z], row[z]) for z in symbols if row[z]) if fits else "")
    return strings


def _ion(symbol: str, state: int) -> str:
    return f"{symbol}{abs(state)}{'+' if state > 0 else '-'}"


def _best_of_width(table: OxidationStates, elements: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return score (n,) and states (n, width) of compositions with the same number of elements, in building order."""
    n, width = elements.shape
    negativity = table.electronegativity[elements]
    # One problem per (row, split): the first `split` elements are cations, the rest anions.
    split = torch.arange(1, width).repeat(n)
    row = torch.arange(n).repeat_interleave(width - 1)
    sign = (torch.arange(width) >= split.unsqueeze(1)).long()  # (problems, width) 0 = cation, 1 = anion
    sizes = table.n_states[sign, elements[row]]  # (problems, width)
    allowed = negativity[row, split - 1] < negativity[row, split]  # False also for nan
    n_combinations = torch.where(allowed, sizes.prod(dim=-1), 0)
    best = torch.full((n,), -torch.inf, dtype=torch.float64)
    chosen = torch.zeros(n, width, dtype=torch.int64)
    most = table.states.shape[-1]
    slots = (sign * 119 + elements[row]) * most  # where the options of each element start in the flattened tables
    charges = table.states.flatten()
    log_frequency = table.log_frequency.flatten()
    for problem, options in _neutral_combinations(n_combinations, sizes, slots, counts[row], charges):
        value = log_frequency[options].sum(dim=-1)
        # Of equal rows the last one is kept, so ascending values leave the best.
        order = value.argsort()
        order = order[value[order] > best[row[problem[order]]]]
        picked = row[problem[order]]
        _assign_last(best, picked, value[order])
        _assign_last(chosen, picked, charges[options[order]])
    return best, chosen


def _assign_last(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values[i] to target[rows[i]]; where a row repeats, the last one."""
    last = torch.full((target.shape[0],), -1, dtype=torch.int64)
    last.scatter_reduce_(0, rows, torch.arange(len(rows)), reduce="amax")
    written = last >= 0
    target[written] = values[last[written]]


def _neutral_combinations(
    n_combinations: Tensor, sizes: Tensor, slots: Tensor, counts: Tensor, charges: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the charge-neutral combinations among all combinations of all problems, in chunks of bounded memory.

    Args:
        n_combinations: (problems,) how many each has.
        sizes: (problems, width) options per element.
        slots: (problems, width) index of each element's first option in `charges`.
        counts: (problems, width) atoms per element.
        charges: (options,) oxidation state of each option.

    Yields:
        (m,) index of the problem and (m, width) the option of each element.
    """
    ends = n_combinations.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _CHUNK):
        flat = torch.arange(start, min(start + _CHUNK, total))
        problem = torch.searchsorted(ends, flat, right=True)
        rest = flat - (ends - n_combinations)[problem]
        options = []
        charge = torch.zeros_like(rest)
        for column in range(sizes.shape[1]):
            size = sizes[:, column][problem]
            quotient = torch.div(rest, size, rounding_mode="floor")
            options.append(slots[:, column][problem] + rest - quotient * size)
            charge += charges[options[-1]] * counts[:, column][problem]
            rest = quotient
        neutral = (charge == 0).nonzero().flatten()
        yield problem[neutral], torch.stack([option[neutral] for option in options], dim=-1)
