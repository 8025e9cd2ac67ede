"""The table of candidates: one row a crystal, best first, each composition-and-symmetry once."""

import io
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from discover.gap_scale import to_experiment
from discover.novelty import is_known
from discover.oxidation import assign, assignment_strings
from discover.reward import METASTABLE, log_probability_below, non_metal_moments
from discover.run_folder import RunFolder
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY
from proxies.band_gap import median_gap
from proxies.base import Prediction

CSV = "candidates.csv"
PARQUET = "candidates.parquet"


class Column(StrEnum):
    """Columns of the candidate table, in order."""

    CANDIDATE_ID = "candidate_id"
    FORMULA = "formula"
    SPACE_GROUP = "space_group"
    WYCKOFF = "wyckoff"
    A = "a"
    B = "b"
    C = "c"
    ALPHA = "alpha"
    BETA = "beta"
    GAMMA = "gamma"
    N_ATOMS = "n_atoms"
    VOLUME_PER_ATOM = "volume_per_atom"
    DENSITY = "density"
    FORMATION_ENERGY = "formation_energy_per_atom"
    FORMATION_ENERGY_STD = "formation_energy_per_atom_std"
    BAND_GAP = "band_gap"
    BAND_GAP_STD = "band_gap_std"
    E_ABOVE_HULL = "e_above_hull"
    E_ABOVE_HULL_STD = "e_above_hull_std"
    LOG_REWARD = "log_reward"
    LOG_PROB = "log_prob"
    NOVEL = "novel"
    BAND_GAP_EXPERIMENT = "band_gap_experiment"
    BAND_GAP_EXPERIMENT_STD = "band_gap_experiment_std"
    P_METAL = "p_metal"
    P_METASTABLE = "p_metastable"
    OXIDATION_STATES = "oxidation_states"
    OXIDATION_SCORE = "oxidation_score"


#: What each column holds, with its unit; shown in the report.
MEANING: dict[Column, str] = {
    Column.CANDIDATE_ID: "rank in this run or round, also the name of the CIF file (an added f: with another cell, p: "
    "with a predicted structure)",
    Column.FORMULA: "reduced formula",
    Column.SPACE_GROUP: "international number, 1 to 230",
    Column.WYCKOFF: "element:multiplicity and letter, conventional cell",
    Column.A: "Å, conventional cell (R groups: hexagonal axes)",
    Column.B: "Å",
    Column.C: "Å",
    Column.ALPHA: "degrees",
    Column.BETA: "degrees",
    Column.GAMMA: "degrees",
    Column.N_ATOMS: "atoms in the primitive cell",
    Column.VOLUME_PER_ATOM: "Å^3",
    Column.DENSITY: "g/cm^3, exact for this cell",
    Column.FORMATION_ENERGY: "eV/atom, predicted on the Materials Project's corrected PBE scale",
    Column.FORMATION_ENERGY_STD: "eV/atom, standard deviation of that prediction",
    Column.BAND_GAP: "eV, predicted on the PBE scale: the median, 0 where a metal is more likely than not",
    Column.BAND_GAP_STD: "eV, standard deviation of that prediction, the chance of a metal included",
    Column.E_ABOVE_HULL: "eV/atom above the Materials Project's convex hull, predicted",
    Column.E_ABOVE_HULL_STD: "eV/atom",
    Column.LOG_REWARD: "natural log of the reward",
    Column.LOG_PROB: "natural log of the probability (density) with which the sampler draws it",
    Column.NOVEL: "composition absent from the training data, which does not yet make it new",
    Column.BAND_GAP_EXPERIMENT: "eV, estimate on the experimental scale",
    Column.BAND_GAP_EXPERIMENT_STD: "eV, scatter of the PBE-to-experiment line included",
    Column.P_METAL: "predicted probability that there is no gap",
    Column.P_METASTABLE: "predicted probability of less than 0.1 eV/atom above the hull",
    Column.OXIDATION_STATES: "most usual charge-neutral oxidation states, empty where there are none",
    Column.OXIDATION_SCORE: "sum of log ICSD frequencies of those states; below -5 is exotic",
}


def candidate_table(
    crystals: CrystalBatch,
    predictions: Mapping[str, Prediction],
    log_reward: Tensor,
    log_prob: Tensor,
    *,
    distinct: bool = True,
    prefix: str = "c",
) -> tuple[pd.DataFrame, CrystalBatch]:
    """Return the table of candidates, best first, and the crystals in the order of its rows.

    Args:
        crystals: The sampled crystals.
        predictions: density, formation_energy_per_atom, band_gap and e_above_hull of each.
        log_reward: (n,) log reward.
        log_prob: (n,) log probability under the sampler.
        prefix: What the ids begin with.
        distinct: Keep one row, the best, of each composition, space group and set of letters.

    Returns:
        Table with the columns of `Column`, and the crystals of its rows.
    """
    order = torch.argsort(log_reward.cpu(), descending=True, stable=True)
    if distinct:
        order = order[first_of_each(crystal_keys(crystals.select(order)))]
    ranked = crystals.select(order).to("cpu")
    picked = {name: _select(prediction, order) for name, prediction in predictions.items()}
    values = {
        Column.CANDIDATE_ID: numbered(prefix, len(ranked)),
        Column.LOG_REWARD: log_reward.cpu()[order].numpy(),
        Column.LOG_PROB: log_prob.cpu()[order].numpy(),
        **crystal_columns(ranked, picked),
    }
    return pd.DataFrame({str(column): values[column] for column in Column}), ranked


def numbered(prefix: str, n: int) -> list[str]:
    """Return `n` names such as "c0001", with four digits or as many as they need, so that they sort by number."""
    return [f"{prefix}{i + 1:0{max(4, len(str(n)))}d}" for i in range(n)]


def crystal_columns(crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> dict[Column, object]:
    """Return what the table says of crystals themselves: every column but the id and those of a sampler.

    Args:
        crystals: The crystals, in the order of the rows.
        predictions: density, formation_energy_per_atom, band_gap and e_above_hull of each.
    """
    lattice = crystals.lattice_parameters.numpy()
    formulas = crystals.formulas()
    return {
        Column.FORMULA: formulas,
        Column.SPACE_GROUP: crystals.space_group.numpy(),
        Column.WYCKOFF: crystals.wyckoff_strings(),
        **dict(zip((Column.A, Column.B, Column.C, Column.ALPHA, Column.BETA, Column.GAMMA), lattice.T, strict=True)),
        Column.N_ATOMS: crystals.n_atoms.numpy(),
        Column.VOLUME_PER_ATOM: crystals.volume_per_atom.numpy(),
        Column.NOVEL: ~is_known(formulas),
        **_property_columns(predictions),
        **_oxidation_columns(crystals),
    }


def crystal_keys(crystals: CrystalBatch) -> list[tuple[int, ...]]:
    """Return what makes two candidates the same: space group, elements, counts and letters, not the lattice.

    Letters that the group's normaliser maps onto each other describe the same arrangement and give the same key.
    """
    group = crystals.space_group.cpu() - 1
    elements, letters, counts = crystals.elements.cpu(), crystals.letters.cpu(), crystals.counts.cpu()
    maps = SYMMETRY.alternative_letters[group]  # (n, alternatives, 27)
    renamed = maps.gather(2, letters.clamp_min(0).unsqueeze(1).expand(-1, maps.shape[1], -1))
    renamed = torch.where(letters.unsqueeze(1) >= 0, renamed, letters.unsqueeze(1))
    codes = (elements.unsqueeze(1) * 32 + renamed + 1) * 1024 + counts.unsqueeze(1)
    codes = torch.where(counts.unsqueeze(1) > 0, codes, 0).sort(dim=-1).values
    # Padding is left out, so that batches of different widths agree on what is the same.
    return [
        (number, *(code for code in min(rows) if code))
        for number, rows in zip(group.tolist(), codes.tolist(), strict=True)
    ]


def key_texts(crystals: CrystalBatch) -> list[str]:
    """Return the same as `crystal_keys`, as text."""
    return [" ".join(map(str, key)) for key in crystal_keys(crystals)]


def first_of_each(keys: list[tuple[int, ...]]) -> Tensor:
    """Return the (m,) indices at which each key appears first, ascending."""
    seen: dict[tuple[int, ...], int] = {}
    for index, key in enumerate(keys):
        seen.setdefault(key, index)
    return torch.tensor(list(seen.values()), dtype=torch.int64)


def write_candidates(folder: RunFolder, table: pd.DataFrame) -> None:
    """Write the table as CSV and as Parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    folder.write(PARQUET, buffer.getvalue())
    folder.write(CSV, table.to_csv(index=False, float_format="%.6g"))


def read_candidates(folder: RunFolder) -> pd.DataFrame:
    """Return the table of a run.

    Raises:
        OSError: If the run has none.
    """
    return pd.read_parquet(Path(folder / PARQUET))


def _select(prediction: Prediction, order: Tensor) -> Prediction:
    p_metal = None if prediction.p_metal is None else prediction.p_metal.cpu()[order]
    return Prediction(prediction.mean.cpu()[order], prediction.std.cpu()[order], p_metal)


def _property_columns(predictions: Mapping[str, Prediction]) -> dict[Column, object]:
    energy, above, gap = (predictions[name] for name in ("formation_energy_per_atom", "e_above_hull", "band_gap"))
    p_metal = torch.zeros_like(gap.mean) if gap.p_metal is None else gap.p_metal
    mean, std = to_experiment(*non_metal_moments(gap)[:2])
    # A crystal that is more likely a metal has no gap on either scale.
    mean = torch.where(p_metal > 0.5, torch.zeros_like(mean), mean)
    return {
        Column.DENSITY: predictions["density"].mean.numpy(),
        Column.FORMATION_ENERGY: energy.mean.numpy(),
        Column.FORMATION_ENERGY_STD: energy.std.numpy(),
        Column.BAND_GAP: (gap.mean if gap.p_metal is None else median_gap(gap)).numpy(),
        Column.BAND_GAP_STD: gap.std.numpy(),
        Column.E_ABOVE_HULL: above.mean.numpy(),
        Column.E_ABOVE_HULL_STD: above.std.numpy(),
        Column.BAND_GAP_EXPERIMENT: mean.numpy(),
        Column.BAND_GAP_EXPERIMENT_STD: std.numpy(),
        Column.P_METAL: p_metal.numpy(),
        Column.P_METASTABLE: log_probability_below(above.mean.double(), above.std.double(), METASTABLE).exp().numpy(),
    }


def _oxidation_columns(crystals: CrystalBatch) -> dict[Column, object]:
    assignments = assign(crystals.composition)
    score: NDArray[np.float64] = assignments.score.numpy().copy()
    score[~np.isfinite(score)] = np.nan
    return {Column.OXIDATION_STATES: assignment_strings(assignments), Column.OXIDATION_SCORE: score}
