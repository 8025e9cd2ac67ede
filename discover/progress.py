"""What a campaign amounts to: every label as a row, and how each round did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from discover.campaign_records import METAL, crystals_of, measured
from discover.config import RewardConfig, Target
from discover.gap_scale import to_experiment
from discover.metrics.intervals import wilson_interval
from discover.oracle.base import LabelStatus
from discover.reward import METASTABLE, Reward
from discover.screen import SCREENED
from discover.store import Labelled

NEAR_TARGET = {"bandgap": 0.25, "density": 0.25}  # eV and g/cm^3: what counts as on target
LABELS, ROUNDS, FINALISTS = "labels.csv", "rounds.csv", "finalists"  # files of a run, the last with several endings
_PREDICTED = {"formation_energy_per_atom": "formation_energy", "e_above_hull": "e_above_hull", "band_gap": "band_gap"}


@dataclass(frozen=True)
class HitRule:
    """When a checked structure counts as found: near the hull, and on target where there is one.

    Args:
        limit: Energy above hull in eV/atom.
        targets: Target of each property that has one, and the distance that still counts around a number.
        experiment: The band-gap target is meant on the experimental scale.
    """

    limit: float
    targets: dict[str, tuple[Target, float]]
    experiment: bool = False

    @classmethod
    def of(cls, config: RewardConfig) -> "HitRule":
        """Return the rule of a run: less than 0.1 eV/atom above hull, or what `hull_limit` says."""
        targets = {name: (target, NEAR_TARGET.get(name, math.nan)) for name, target in config.targets().items()}
        limit = METASTABLE if config.hull_limit is None else config.hull_limit
        return cls(limit, targets, experiment=config.gap_scale == "experiment")

    def __call__(self, table: pd.DataFrame) -> NDArray[np.bool_]:
        """Return which rows of a label table are hits, (n,); unknown numbers are none."""
        hits: NDArray[np.bool_] = (table["e_above_hull"] < self.limit).to_numpy()
        hits = hits & (table["status"] != LabelStatus.FAILED).to_numpy()
        for name, (target, near) in self.targets.items():
            values = table["band_gap" if name == "bandgap" else name].to_numpy(dtype=float, copy=True)
            if name == "bandgap" and self.experiment:  # a metal is one on either scale
                estimate = to_experiment(torch.from_numpy(values), torch.zeros(len(values)))[0].numpy()
                values = np.where(values < METAL, 0.0, estimate)
            low, high = target if isinstance(target, tuple) else (target - near, target + near)
            hits = hits & (values >= low) & (values <= high)
        return hits

    def describe(self) -> str:
        """Return the rule in words."""
        parts = [f"energy above hull below {self.limit:g} eV/atom"]
        for name, (target, near) in self.targets.items():
            place = f"in {list(target)}" if isinstance(target, tuple) else f"within {near:g} of {target:g}"
            parts.append(f"{name} {place}")
        return " and ".join(parts)


def label_table(labelled: Sequence[Labelled], rule: HitRule, reward: Reward) -> pd.DataFrame:
    """Return one row a label, in the order of rounds and candidates, with what was predicted when it was chosen.

    `oracle` is what the numbers of the row come from.
    `predicted_*` is what the proxies said, `screened_*` what the tables of `discover.screen` made of it and of a single
    point (for the gap: of a non-metal), before labels corrected them; missing where nothing was looked at.
    """
    crystals = crystals_of([item.candidate.crystal for item in labelled])
    properties = measured(labelled, crystals)
    score = reward.from_predictions(crystals, properties) if labelled else torch.zeros(0)
    rows = []
    for i, item in enumerate(labelled):
        candidate, label = item.candidate, item.label
        failed = label.status is LabelStatus.FAILED
        structure = None if failed else label.structure or candidate.structure  # an oracle may give numbers alone
        predicted = {
            f"{prefix}_{short}{suffix}": candidate.predictions.get(f"{key}{name}", (math.nan, math.nan))[k]
            for prefix, key in (("predicted", ""), ("screened", SCREENED))
            for name, short in _PREDICTED.items()
            for k, suffix in enumerate(("", "_std"))
        }
        rows.append(
            {
                "candidate_id": candidate.candidate_id,
                "round": candidate.round,
                "source": candidate.source,
                "formula": candidate.formula,
                "chemical_system": candidate.chemical_system,
                "prototype": candidate.prototype,
                "n_atoms": candidate.n_atoms,
                "oracle": item.oracle,
                "status": str(label.status),
                "reason": label.reason,
                "formation_energy": label.formation_energy_per_atom,
                "initial_formation_energy": label.initial_formation_energy_per_atom,
                "e_above_hull": item.e_above_hull,
                "hull": item.hull,
                "band_gap": label.band_gap,
                "density": math.nan if structure is None else float(structure.density),
                "space_group": candidate.space_group,
                "space_group_before": label.space_group_before,
                "space_group_after": label.space_group_after,
                "n_steps": label.n_steps,
                "seconds": label.seconds,
                "log_reward": candidate.log_reward,
                "checked_log_reward": math.nan if failed else float(score[i]),
                **predicted,
                **{f"property.{key}": value for key, value in label.properties.items()},
            }
        )
    table = pd.DataFrame(rows)
    if len(table):
        table["hit"] = rule(table)
    return table


def round_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a round of what a label table says.

    Failures count in every rate. Errors and coverage are those of the proxies when the round chose, before they learnt
    from it.
    """
    rows: list[dict[str, object]] = []
    if table.empty:
        return pd.DataFrame(rows)
    for number, batch in table.groupby("round"):
        hits, so_far = batch[batch["hit"]], table[table["round"] <= number]
        low, high = wilson_interval(len(hits), len(batch))
        row: dict[str, object] = {
            "round": number,
            "checked": len(batch),
            "failed": int((batch["status"] == LabelStatus.FAILED).sum()),
            "hits": len(hits),
            "hit_rate": len(hits) / len(batch),
            "hit_rate_low": low,
            "hit_rate_high": high,
            "hits_so_far": int(so_far["hit"].sum()),
            "best_checked_log_reward": so_far["checked_log_reward"].max(),
            "lowest_e_above_hull": so_far["e_above_hull"].min(),
            "median_e_above_hull": batch["e_above_hull"].median(),
            "formulas_of_hits": hits["formula"].nunique(),
            "prototypes_of_hits": hits.loc[hits["prototype"] != "", "prototype"].nunique(),
            "systems_of_hits": hits["chemical_system"].nunique(),
        }
        for short in _PREDICTED.values():
            error = (batch[f"predicted_{short}"] - batch[short]).abs()
            known = error.notna()
            inside = error[known] <= batch[f"predicted_{short}_std"][known]
            row[f"mae_{short}"] = error.mean() if known.any() else math.nan
            row[f"within_1_std_{short}"] = inside.mean() if known.any() else math.nan
        row["oracle_seconds"] = batch["seconds"].sum()
        row["oracle_seconds_per_hit"] = batch["seconds"].sum() / len(hits) if len(hits) else math.nan
        rows.append(row)
    return pd.DataFrame(rows)
