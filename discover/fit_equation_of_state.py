"""Fit how stiff crystals are against a change of volume, with CHGNet, for the proxies' off-equilibrium labels.

Labelled crystals are relaxed, so a network trained on them alone would not know that a wrong volume costs energy.
CHGNet's energies of uniformly scaled cells give a few hundred crystals a curve E(V) each; the two parameters of the
universal equation of state are then regressed on composition (`proxies.equation_of_state`).
Run `python -m discover.fit_equation_of_state CSV OUTPUT.json`; what ships is
`proxies/pretrained/equation_of_state.json`.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from tqdm import tqdm

from discover.data import PreparedData, prepare
from discover.errors import DataError, main_guard
from discover.structure_files import read_cif, read_table
from proxies.equation_of_state import EquationOfState, fit_curve

VOLUME_RATIOS = (0.75, 0.85, 0.93, 1.0, 1.07, 1.18, 1.35, 1.6)
MAX_E_ABOVE_HULL = 0.1  # eV/atom
MAX_ATOMS = 12


def choose_rows(data: PreparedData, n: int, seed: int) -> NDArray[np.int64]:
    """Return `n` random rows of small, nearly stable crystals with PBE-relaxed or similar cells, one a formula."""
    stable = (data.labels["e_above_hull"] < MAX_E_ABOVE_HULL).numpy()
    small = (data.crystals.n_atoms <= MAX_ATOMS).numpy() & (data.crystals.volume_per_atom < 60.0).numpy()
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(stable & small))
    _, first = np.unique(data.formulas[rows], return_index=True)
    return rows[np.sort(first)][:n]


def scaled_structures(cif: str) -> Iterator[Structure]:
    """Yield the crystal at each of `VOLUME_RATIOS`."""
    matrix, coords, numbers = read_cif(cif)
    species = [Element.from_Z(int(number)) for number in numbers]
    for ratio in VOLUME_RATIOS:
        yield Structure(Lattice(matrix * ratio ** (1.0 / 3.0)), species, coords)


def chgnet_curves(cifs: list[str], *, progress: bool = True) -> NDArray[np.float64]:
    """Return (n, len(VOLUME_RATIOS)) CHGNet energies in eV/atom, NaN where an atom is left without neighbours."""
    from chgnet.model import CHGNet  # noqa: PLC0415 - importing CHGNet takes five seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CHGNet.load(use_device="cpu", verbose=False)
        energies = []
        for cif in tqdm(cifs, desc="equation of state", unit=" crystals", disable=not progress):
            structures = list(scaled_structures(cif))
            try:
                results: Any = model.predict_structure(structures, task="e", batch_size=len(structures))
            except (ValueError, RuntimeError, AssertionError):
                energies.append([np.nan] * len(structures))
                continue
            energies.append([float(result["e"]) for result in results])
    return np.array(energies)


def fit(data_path: Path, output: Path, *, n: int = 800, seed: int = 0) -> EquationOfState:
    """Fit the equation of state on `n` crystals of a CSV and write it to `output`."""
    data = prepare(data_path)
    rows = choose_rows(data, n, seed)
    cif_of = dict(zip(*read_table(data_path)[["material_id", "cif"]].to_numpy().T, strict=True))
    curves = chgnet_curves([cif_of[data.ids[row]] for row in rows])
    parameters = np.array([fit_curve(np.array(VOLUME_RATIOS), curve) for curve in curves])
    model = EquationOfState.fit(data.crystals.select(torch.from_numpy(rows)), parameters)
    model.save(output)
    return model


def main(arguments: Sequence[str]) -> None:
    """Fit on a CSV and write the JSON file that is named second."""
    if len(arguments) != 2:
        raise DataError("usage: python -m discover.fit_equation_of_state CSV OUTPUT.json")
    model = fit(Path(arguments[0]), Path(arguments[1]))
    stiffness, width = model.residual
    print(f"{model.n_curves} curves; residual of log stiffness {stiffness:.3f}, of log width {width:.3f}")


if __name__ == "__main__":
    main_guard(main)
