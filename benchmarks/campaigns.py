"""Hits of finished runs against element substitution at the same oracle budget, filtered by the same proxies.

    python -m benchmarks.campaigns 'runs=[runs/a,runs/b]' train_data=train.csv.gz hull=HULL output=FOLDER

For each run: known structures have one or two elements replaced (`discover.substitution`), as many proposals as the run
sampled; the shipped proxies score them with the run's reward, limits on formulas and systems are the run's, and the
best are labelled with the run's oracle. With `looks=8` single points say which of eight times as many substituted
structures are labelled; a run looks at several structures of each candidate and learns how far to trust a look. A hit
obeys the run's rule; a distinct novel hit has a formula that the hull file lacks, each counted once over all runs.
Labels already in the output folder are not bought again.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pymatgen.core import Structure

from discover.acquire import Picker
from discover.build import build_oracle, build_properties, run_space, seeded
from discover.choose import candidates_of
from discover.config import RunConfig
from discover.data import Orbits, batch_orbits, orbits_of_structure, prepare
from discover.engine import Limits, Task, open_engine
from discover.errors import ConfigError, main_guard
from discover.evaluate_dng import Training
from discover.labelling import single_points
from discover.options import option, parse_args
from discover.oracle.hull import Hull
from discover.progress import LABELS, HitRule, label_table
from discover.reward import build_reward
from discover.run_folder import RunFolder, open_run_folder
from discover.screen import Trust, screened
from discover.store import Candidate, Store
from discover.substitution import substitute
from discover.worker_pool import map_in_workers
from envs.crystal import CrystalBatch
from envs.restrictions import restrict

_RESAMPLES = 10_000
_MOST_BATCHES = 20
_ORACLE = "baseline"


@dataclass(frozen=True, kw_only=True)
class CampaignsConfig:
    """Everything this benchmark can be told."""

    runs: tuple[str, ...] = option((), "folders of finished runs of one reward and target, with different seeds")
    train_data: str = option("", "CSV file of known materials, the parents")
    hull: str = option("", "CSV file of formulas and formation energies, or folder with it")
    output: str = option("", "folder for the labels of the baseline")
    looks: int = option(1, "substituted structures looked at (`discover.screen`) for each that is labelled; 1: none is")
    n_workers: int = option(2, "processes that label")


def main(words: Sequence[str]) -> None:
    """Label the baseline of each run and compare."""
    config = parse_args(CampaignsConfig, words)
    torch.set_num_threads(1)
    hull = Hull.load(config.hull)
    training = Training(Path(config.train_data), prepare(config.train_data))
    parents = training.structures(training.stable_rows())
    folders = [open_run_folder(run) for run in config.runs]
    for folder in folders:
        used = folder.config(RunConfig).oracle.hull
        if used is None or Path(used).resolve() != Path(config.hull).resolve():
            raise ConfigError(f"{folder.path} was checked against another hull ({used}); hits would not compare")
    ours = pd.concat([_read(folder) for folder in folders], ignore_index=True)
    theirs = pd.concat([_baseline(config, folder, parents, hull) for folder in folders], ignore_index=True)
    figures = compare(ours, theirs, set(hull.formulas))
    print(json.dumps(figures, indent=1))


def compare(ours: pd.DataFrame, theirs: pd.DataFrame, known: set[str]) -> dict[str, object]:
    """Return distinct novel hits per label of both, and their ratio.

    The 95 % interval resamples labels; what differs from run to run as a whole it does not see.
    """
    counts = []
    for table in (ours, theirs):
        hit = table["hit"].astype(bool) & ~table["formula"].isin(known)
        counts.append((hit & ~table["formula"].where(hit).duplicated()).to_numpy())
    rates = [float(count.mean()) for count in counts]
    generator = np.random.default_rng(0)
    draws = [
        generator.choice(count, (_RESAMPLES, len(count))).mean(axis=1) + 0.5 / len(count) * (count.sum() == 0)
        for count in counts
    ]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(draws[0] / draws[1], [0.025, 0.975])
    return {
        "labels": [len(ours), len(theirs)],
        "hits": [int(ours["hit"].sum()), int(theirs["hit"].sum())],
        "distinct_novel_hits": [int(count.sum()) for count in counts],
        "per_label": rates,
        "ratio": rates[0] / rates[1] if rates[1] else None,
        "ratio_interval_95": [value if np.isfinite(value) else None for value in (float(low), float(high))],
        "novel_formulas": [
            sorted(table.loc[count, "formula"]) for table, count in zip((ours, theirs), counts, strict=True)
        ],
    }


def _read(folder: RunFolder) -> pd.DataFrame:
    return pd.read_csv(folder / LABELS, keep_default_na=False, na_values=[""])


def _baseline(config: CampaignsConfig, folder: RunFolder, parents: list[Structure], hull: Hull) -> pd.DataFrame:
    """Return the label table of the baseline of one run."""
    run = folder.config(RunConfig)
    name = f"substitution for {run.reward} {run.target} {run.restrict} seed {run.seed}"
    name += f" limits {run.acquire.per_formula} {run.acquire.per_system} {run.acquire.per_prototype}"
    name += f" looks {config.looks}" if config.looks > 1 else ""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    reward = build_reward(run, build_properties(run.proxies))
    oracle = build_oracle(run.oracle)
    with Store.open(output / "baseline.sqlite") as store:
        store.start_run(name, {"seed": run.seed})
        if not store.rounds(name):
            store.add_round(name, 1, _chosen(config, run, parents, hull), {})
        waiting = {item.candidate_id: item for item in store.unlabelled(name, 1, _ORACLE)}
        tasks = [Task(key, item.structure) for key, item in waiting.items() if item.structure is not None]
        with open_engine("local", n_workers=config.n_workers, config_file=None) as engine:
            for key, label in engine.label(oracle, tasks, _limits(run)):
                structure = label.structure or waiting[key].structure
                above = float(hull.e_above_hull([structure.composition], [label.formation_energy_per_atom])[0])  # type: ignore[union-attr]
                store.add_label(name, key, _ORACLE, label, e_above_hull=above, hull=config.hull, settings={})
        return label_table(store.labels(name, _ORACLE), HitRule.of(run), reward)


def _limits(run: RunConfig) -> Limits:
    return Limits(seconds=run.oracle.time_limit + 60, memory_gb=run.oracle.memory_limit, retries=3)


def _chosen(config: CampaignsConfig, run: RunConfig, parents: list[Structure], hull: Hull) -> list[Candidate]:
    """Return the best substituted structures by the run's reward, under the run's limits."""
    allowed = set(restrict(run_space(run), run.restrict.to_restrictions()).allowed or ())
    n = run.n_candidates * run.rounds
    draws = seeded(run.seed, "substitution")
    proposed: list[Structure] = []
    for _ in range(_MOST_BATCHES):  # substitution does not aim at the elements that are allowed
        batch = substitute(parents, n, known=hull.formulas, generator=draws)
        proposed += [item for item in batch if {site.specie.symbol for site in item} <= allowed]
        if len(proposed) >= n:
            break
    proposed = proposed[:n]
    if not proposed:
        raise ConfigError(f"substitution found nothing made of {', '.join(sorted(allowed))} alone")
    found = map_in_workers(orbits_of_structure, proposed, n_workers=config.n_workers, description="symmetry")
    kept = [(item, orbits) for item, orbits in zip(proposed, found, strict=True) if isinstance(orbits, Orbits)]
    crystals: CrystalBatch = batch_orbits([orbits for _, orbits in kept])[0]
    properties = build_properties(run.proxies)
    predictions = properties.predict(crystals)
    score = build_reward(run, properties).from_predictions(crystals, predictions)
    names = [f"s{row:05d}" for row in range(len(crystals))]
    candidates = candidates_of(1, crystals, names, predictions, score)
    first = {item.key: row for row, item in reversed(list(enumerate(candidates)))}
    picker = Picker(
        [((item.formula,), (item.chemical_system,), (item.prototype,)) for item in candidates],
        (run.acquire.per_formula, run.acquire.per_system * run.rounds, run.acquire.per_prototype * run.rounds),
        excluded=[row for row, item in enumerate(candidates) if first[item.key] != row],
    )
    if config.looks > 1:
        rows = picker.widened(config.looks).take(score, config.looks * run.budget)
        looks = single_points([kept[row][0] for row in rows], n_workers=config.n_workers)
        energies = [look.formation_energy_per_atom for look in looks]
        above = hull.e_above_hull([kept[row][0].composition for row in rows], energies).tolist()
        seen = screened(properties.predict(crystals.select(rows)), looks, above, Trust({}, {}))
        score = torch.full_like(score, -torch.inf)
        score[rows] = build_reward(run, properties).from_predictions(crystals.select(rows), seen)
        known = {row for row, energy in zip(rows, energies, strict=True) if math.isfinite(energy)}
        picker.exclude(set(range(len(score))) - known)
    rows = picker.take(score, run.budget)
    return [replace(candidates[row], source="substitution", structure=kept[row][0]) for row in rows]


if __name__ == "__main__":
    main_guard(main)
