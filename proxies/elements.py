"""Physical properties of the elements that proxies read: a table that ships with every trained network."""

import math
import warnings
from functools import cache

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Element

from envs.crystal import MAX_ATOMIC_NUMBER

PROPERTIES = (
    "electronegativity",
    "row",
    "group",
    "mendeleev_no",
    "atomic_radius",
    "atomic_radius_calculated",
    "van_der_waals_radius",
    "ionization_energy",
    "electron_affinity",
    "melting_point",
    "log_molar_volume",
    "log_bulk_modulus",
    "valence_s",
    "valence_p",
    "valence_d",
    "valence_f",
    "n_unfilled",
    "n_valence",
    "max_oxidation_state",
    "min_oxidation_state",
    "is_transition_metal",
    "is_f_block",
    "is_alkali_or_alkaline",
    "is_nonmetal",
)
LAST_KNOWN = 103  # pymatgen has no electronic structures beyond lawrencium
_SHELL_SIZE = {"s": 2, "p": 6, "d": 10, "f": 14}


@cache
def element_properties() -> NDArray[np.float32]:
    """Return (119, len(PROPERTIES)) float32 z-scored properties; row 0 (padding) and unknown values are 0."""
    table = np.full((MAX_ATOMIC_NUMBER + 1, len(PROPERTIES)), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns once for every missing value
        for number in range(1, LAST_KNOWN + 1):
            table[number] = _properties_of(Element.from_Z(number))
    known = table[1 : LAST_KNOWN + 1]
    table = (table - np.nanmean(known, axis=0)) / np.nanstd(known, axis=0)
    return np.asarray(np.nan_to_num(table), dtype=np.float32)


def _properties_of(element: Element) -> list[float]:
    """Return the properties of one element in the order of `PROPERTIES`, NaN where pymatgen has none."""
    shells = dict.fromkeys("spdf", 0) | {shell: n_electrons for _, shell, n_electrons in _valence_shells(element)}
    unfilled = sum(_SHELL_SIZE[shell] - n for shell, n in shells.items() if n > 0)
    volume, modulus = _number(element, "molar_volume"), _number(element, "bulk_modulus")
    return [
        _number(element, "X"),
        float(element.row),
        float(element.group),
        _number(element, "mendeleev_no"),
        _number(element, "atomic_radius"),
        _number(element, "atomic_radius_calculated"),
        _number(element, "van_der_waals_radius"),
        _number(element, "ionization_energy"),
        _number(element, "electron_affinity"),
        _number(element, "melting_point"),
        math.log(volume) if volume > 0 else math.nan,
        math.log(modulus) if modulus > 0 else math.nan,
        *(float(shells[shell]) for shell in "spdf"),
        float(unfilled),
        float(sum(shells.values())),
        float(max(element.oxidation_states, default=math.nan)),
        float(min(element.oxidation_states, default=math.nan)),
        float(element.is_transition_metal),
        float(element.is_lanthanoid or element.is_actinoid),
        float(element.is_alkali or element.is_alkaline),
        float(not element.is_metal and not element.is_metalloid),
    ]


def _valence_shells(element: Element) -> list[tuple[int, str, int]]:
    """Return (n, shell, electrons) of the shells outside the last noble gas; full d and f below p are core."""
    shells = [(n, shell, count) for n, shell, count in element.full_electronic_structure]
    outer = max(n for n, _, _ in shells)
    has_p = any(n == outer and shell == "p" for n, shell, _ in shells)
    kept = []
    for n, shell, count in shells:
        depth = outer - n
        is_outer = depth == 0
        is_open_d = shell == "d" and depth == 1 and not (count == 10 and has_p)
        is_open_f = shell == "f" and depth == 2 and not (count == 14 and element.Z > 71)
        if is_outer or is_open_d or is_open_f:
            kept.append((n, shell, count))
    return kept


def _number(element: Element, name: str) -> float:
    """Return an attribute as float, NaN if pymatgen has no value."""
    try:
        value = getattr(element, name)
    except (AttributeError, KeyError, TypeError, ValueError):
        return math.nan
    try:
        return float(value) if value is not None else math.nan
    except (TypeError, ValueError):
        return math.nan
