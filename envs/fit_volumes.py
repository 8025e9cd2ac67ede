"""Fit the elemental volumes whose sum is the reference volume of a crystal.

One set for crystals of metals only, one for all others (Materials Project, CC BY 4.0, Jain et al.
2013, doi:10.1063/1.4812323): non-negative least squares on volume per atom, re-weighted by relative
error, elements with few crystals drawn towards the volume of the element itself.
"""

import json
from pathlib import Path

import numpy as np
from pymatgen.core import Element
from scipy.optimize import nnls
from smact import metals

from envs.conventions import TABLES

N_ELEMENTS = 118
_PULL = 0.3  # weight of one pseudo-crystal per element at its prior volume


def is_all_metal(composition: np.ndarray) -> np.ndarray:
    """Return (n,) bool for compositions (n, 119): True where every element is one of SMACT's metals."""
    metal = np.zeros(N_ELEMENTS + 1, dtype=bool)
    metal[[Element(symbol).Z for symbol in metals]] = True
    return np.asarray((composition[:, ~metal] == 0).all(axis=1))


def fit_elemental_volumes(composition: np.ndarray, volume_per_atom: np.ndarray) -> np.ndarray:
    """Return (119,) volume per atom of each element in Å³ (row 0 is unused).

    Args:
        composition: (n, 119) atoms per cell by atomic number.
        volume_per_atom: (n,) Å³.
    """
    fractions = composition / composition.sum(axis=1, keepdims=True)
    typical = float(np.median(volume_per_atom))
    volumes = np.full(N_ELEMENTS + 1, typical)
    for _ in range(8):
        predicted = fractions @ volumes
        # Relative residuals, with Huber weights beyond 15 %.
        relative = np.abs(predicted / volume_per_atom - 1.0)
        weight = np.sqrt(np.minimum(1.0, 0.15 / np.maximum(relative, 1e-9))) / volume_per_atom
        pull = np.eye(N_ELEMENTS + 1) * _PULL / typical
        design = np.vstack([fractions * weight[:, None], pull])
        target = np.concatenate([volume_per_atom * weight, np.full(N_ELEMENTS + 1, typical) * _PULL / typical])
        volumes = np.maximum(nnls(design, target)[0], 2.0)
    return volumes


def write_elemental_volumes(
    composition: np.ndarray, volume_per_atom: np.ndarray, path: Path | None = None
) -> dict[str, float]:
    """Fit both sets, write them, and return the spread (standard deviation) of log(volume / reference) of each."""
    metal = is_all_metal(composition)
    sets: dict[str, list[float] | list[int]] = {"metals": sorted(Element(symbol).Z for symbol in metals)}
    spread = {}
    for name, rows in (("all_metal", metal), ("other", ~metal)):
        volumes = fit_elemental_volumes(composition[rows], volume_per_atom[rows])
        residual = np.log(volume_per_atom[rows] * composition[rows].sum(axis=1) / (composition[rows] @ volumes))
        spread[name] = float(residual.std())
        sets[name] = [round(float(v), 3) for v in volumes]
    (path or TABLES / "elemental_volumes.json").write_text(json.dumps(sets) + "\n")
    return spread
