"""Structural and compositional validity as counted since CDVAE (Xie et al. 2022, arXiv:2110.06197, section 5.1)."""

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Composition, Structure
from smact.screening import smact_validity

MIN_DISTANCE = 0.5  # Å
MIN_VOLUME = 0.1  # Å^3, of the cell

#: Settings of `smact_validity`, to print beside each figure. "cdvae" asks for the oxidation states that SMACT had when
#: CDVAE's function was written: with them 89.9 % of the Materials Project's cells of up to 20 atoms are valid, as
#: published for MP-20. "smact4" is what SMACT 4 takes by default, the states seen in the ICSD; 92 % are valid.
COMPOSITION_PROTOCOLS: dict[str, dict[str, Any]] = {
    "cdvae": {
        "use_pauling_test": True,
        "include_alloys": True,
        "check_metallicity": False,
        "oxidation_states_set": "smact14",
        "mixed_valence": False,
    },
    "smact4": {
        "use_pauling_test": True,
        "include_alloys": True,
        "check_metallicity": False,
        "oxidation_states_set": None,
        "mixed_valence": False,
    },
}


def structural_validity(structures: Sequence[Structure | None]) -> NDArray[np.bool_]:
    """Return which structures have no two atoms closer than 0.5 Å and a cell of at least 0.1 Å^3.

    Protocol: CDVAE, arXiv:2110.06197, section 5.1; the volume limit is that of its code. As there, an atom and its own
    periodic images are not compared.

    Args:
        structures: n structures; None is a failed one.

    Returns:
        (n,) bool, False for a failure.
    """
    return np.array([structure is not None and _has_room(structure) for structure in structures], dtype=np.bool_)


def compositional_validity(compositions: Iterable[Composition | None], *, protocol: str = "cdvae") -> NDArray[np.bool_]:
    """Return which compositions are charge-neutral in Pauling's order, are alloys, or are a single element.

    Protocol: CDVAE, arXiv:2110.06197, section 5.1: one oxidation state per element with a sum of zero, every cation
    less electronegative than every anion; compositions of metals only and of one element pass.

    Args:
        compositions: n compositions; None is a failed one.
        protocol: A key of `COMPOSITION_PROTOCOLS`.

    Returns:
        (n,) bool, False for a failure.

    Raises:
        KeyError: If the protocol is unknown.
    """
    settings = tuple(COMPOSITION_PROTOCOLS[protocol].items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # helium, neon and argon have no electronegativity
        valid = [item is not None and _is_neutral(item.reduced_formula, settings) for item in compositions]
    return np.array(valid, dtype=np.bool_)


def _has_room(structure: Structure) -> bool:
    if not (np.isfinite(structure.frac_coords).all() and np.isfinite(structure.lattice.matrix).all()):
        return False
    if structure.volume < MIN_VOLUME:
        return False
    distances = structure.distance_matrix[np.triu_indices(len(structure), k=1)]
    return bool((distances >= MIN_DISTANCE).all())


@lru_cache(maxsize=65536)
def _is_neutral(formula: str, settings: tuple[tuple[str, Any], ...]) -> bool:
    return bool(smact_validity(Composition(formula), **dict(settings)))
