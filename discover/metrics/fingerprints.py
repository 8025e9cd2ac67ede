"""The two fingerprints that coverage compares: local order of a structure (CrystalNN) and elements (Magpie).

They are those of matminer (Ward et al. 2018, doi:10.1016/j.commatsci.2018.05.018), `CrystalNNFingerprint("ops")` and
`ElementProperty("magpie")`, computed here because matminer cannot be installed beside pandas 3. The neighbour finder
and the order parameters are pymatgen's, as in matminer; the element table is Magpie's (Ward et al. 2016,
doi:10.1038/npjcompumats.2016.28), 22 properties of 118 elements with gaps filled by the mean, as matminer ships it
(copyright 2015, The Regents of the University of California, through Lawrence Berkeley National Laboratory; modified
BSD licence).
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import spglib
from numpy.typing import NDArray
from pymatgen.core import Composition, Structure
from pymatgen.core.local_env import CN_OPT_PARAMS, CrystalNN, LocalStructOrderParams

ELEMENTS = Path(__file__).with_name("magpie_elements.csv")
STATISTICS = ("minimum", "maximum", "range", "mean", "avg_dev", "mode")
N_STRUCTURE_FEATURES = 61
_MAX_NEIGHBOURS = 24
_SAME_SITE = 1e-3  # Å; sites that spglib maps onto each other within this have the same surroundings

#: Order parameters by number of neighbours, in matminer's order; the weight of that number comes before them.
_MOTIFS: dict[int, tuple[str, ...]] = {
    1: ("sgl_bd",),
    2: ("L-shaped", "water-like", "bent 120 degrees", "bent 150 degrees", "linear"),
    3: ("trigonal planar", "trigonal non-coplanar", "T-shaped"),
    4: ("square co-planar", "tetrahedral", "rectangular see-saw-like", "see-saw-like", "trigonal pyramidal"),
    5: ("pentagonal planar", "square pyramidal", "trigonal bipyramidal"),
    6: ("hexagonal planar", "octahedral", "pentagonal pyramidal"),
    7: ("hexagonal pyramidal", "pentagonal bipyramidal"),
    8: ("body-centered cubic", "hexagonal bipyramidal"),
    9: ("q2", "q4", "q6"),
    10: ("q2", "q4", "q6"),
    11: ("q2", "q4", "q6"),
    12: ("cuboctahedral", "q2", "q4", "q6"),
}


def structure_fingerprint(structure: Structure) -> NDArray[np.float64]:
    """Return the mean CrystalNN fingerprint over sites, (61,): weights of coordination numbers times order parameters.

    Zimmermann and Jain 2020, doi:10.1039/C9RA07755C. Sites that are equivalent by symmetry are computed once.

    Raises:
        ValueError: If a site has no neighbours that CrystalNN can find; pymatgen's error.
    """
    sites, counts = np.unique(_equivalent_sites(structure), return_counts=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CrystalNN says at every site that there are no oxidation states
        rows = [_site_fingerprint(structure, site) for site in sites.tolist()]
    return np.average(rows, axis=0, weights=counts)


def composition_fingerprint(composition: Composition) -> NDArray[np.float64]:
    """Return Magpie's statistics of 22 element properties, (132,), in `composition_features()` order.

    Minimum, maximum, range, mean, mean absolute deviation and mode (property of the most frequent element; of several
    the smallest), weighted by atomic fraction.
    """
    amounts = composition.get_el_amt_dict()
    table = _element_table()
    values = np.array([table[symbol] for symbol in amounts])  # (n_elements, 22)
    weights = np.array(list(amounts.values()))
    fractions = (weights / weights.sum())[:, None]
    low, high, mean = values.min(axis=0), values.max(axis=0), (fractions * values).sum(axis=0)
    deviation = (fractions * np.abs(values - mean)).sum(axis=0)
    mode = values[np.isclose(weights, weights.max())].min(axis=0)
    return np.stack([low, high, high - low, mean, deviation, mode], axis=1).reshape(-1)


def composition_features() -> list[str]:
    """Return the names of the composition fingerprint's entries, property by property."""
    return [f"{name} {statistic}" for name in _properties() for statistic in STATISTICS]


@cache
def _order_parameters() -> dict[int, list[LocalStructOrderParams]]:
    """Return the order parameters of each number of neighbours."""
    found: dict[int, list[LocalStructOrderParams]] = {}
    for n, names in _MOTIFS.items():
        found[n] = []
        for name in names:
            setting: list[Any] = CN_OPT_PARAMS.get(n, {}).get(name, [name])
            kind, parameters = setting[0], setting[1] if len(setting) > 1 else None
            found[n].append(LocalStructOrderParams([kind], parameters=[parameters]))
    return found


@cache
def _neighbour_finder() -> CrystalNN:
    return CrystalNN()


def _site_fingerprint(structure: Structure, site: int) -> list[float]:
    neighbours = _neighbour_finder().get_nn_data(structure, site)
    row: list[float] = []
    for n in range(1, _MAX_NEIGHBOURS + 1):
        weight = neighbours.cn_weights.get(n, 0.0)
        row.append(weight)
        for parameter in _order_parameters().get(n, []):
            if weight == 0:
                row.append(0.0)
                continue
            sites: Any = [structure[site], *(item["site"] for item in neighbours.cn_nninfo[n])]
            value = parameter.get_order_parameters(sites, 0, indices_neighs=list(range(1, len(sites))))[0]
            row.append(weight * (value or 0.0))  # None where the order parameter is not defined
    return row


def _equivalent_sites(structure: Structure) -> NDArray[np.int64]:
    """Return for each site the first one that symmetry maps onto it, (n_atoms,)."""
    cell: Any = (structure.lattice.matrix, structure.frac_coords, [site.specie.Z for site in structure])
    try:
        dataset = spglib.get_symmetry_dataset(cell, symprec=_SAME_SITE)
    except spglib.SpglibError:
        dataset = None
    n = len(structure)
    return np.arange(n) if dataset is None else np.asarray(dataset.equivalent_atoms, dtype=np.int64)


@cache
def _properties() -> tuple[str, ...]:
    return tuple(pd.read_csv(ELEMENTS, keep_default_na=False, nrows=0).columns[1:])


@cache
def _element_table() -> dict[str, NDArray[np.float64]]:
    table = pd.read_csv(ELEMENTS, keep_default_na=False, index_col="element")  # "Na" is no missing value
    return {str(symbol): row for symbol, row in zip(table.index, table.to_numpy(dtype=np.float64), strict=True)}
