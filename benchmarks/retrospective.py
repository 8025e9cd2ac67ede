"""Does learning from labels find more? A campaign on a pool whose labels are known, against controls.

    python -m benchmarks.retrospective data=val.csv.gz output=FOLDER

The pool is the data's compositions. Proxies trained from nothing on 500 random rows choose 100 more in each of five
rounds, see their true labels, and are trained again; the shipped proxies play no part. The shipped prior, which knows
none of these rows, gives the probability of each crystal. Strategies: the density that a trained sampler draws from
(expected reward times prior), expected reward, upper confidence bound, greedy, random, and substitution: the pool's
nearest by elements to a known hit of the same prototype. Reported against the number of labels: hits (gap within
0.25 eV of 1.34 eV, less than 0.1 eV/atom above hull) and the share found of the 5 % of highest true reward.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from discover.acquire import acquisition_scores
from discover.build import seeded
from discover.campaign_records import METAL
from discover.config import RewardConfig
from discover.data import PreparedData, prepare
from discover.errors import main_guard
from discover.options import option, parse_args
from discover.plots import png
from discover.properties import Properties
from discover.prototypes import prototype_keys
from discover.reward import build_reward
from discover.run_folder import write_atomic
from discover.train_proxy import ProxyTraining, TrainingData, elemental_volumes, train_member
from envs.crystal import CrystalBatch
from policies.pretrained import load_prior
from proxies import PropertyEnsemble
from proxies.base import Prediction
from proxies.elements import element_properties
from proxies.ensemble import Calibration

STRATEGIES = ("sampler", "expected", "ucb", "greedy", "substitution", "random")
_TOP = 0.05
_BATCH = 64
_LABELS = ("formation_energy_per_atom", "e_above_hull", "band_gap")


@dataclass(frozen=True, kw_only=True)
class RetrospectiveConfig:
    """Everything this benchmark can be told."""

    data: str = option("", "CSV file of labelled structures that the shipped prior was not trained on")
    output: str = option("", "folder for the table and the plot")
    target: float = option(1.34, "band gap in eV")
    first: int = option(500, "rows that the first proxies are trained on")
    n_per_round: int = option(100, "labels per round")
    rounds: int = option(5, "rounds")
    seeds: int = option(3, "campaigns with different first rows")
    members: int = option(2, "networks of an ensemble")
    steps: int = option(1200, "gradient steps of a network")
    strategies: tuple[str, ...] = option(STRATEGIES, "which to run")


@dataclass(frozen=True)
class Pool:
    """Crystals with everything that is true of them."""

    crystals: CrystalBatch
    labels: Tensor  # (n, 3) float64
    true_reward: Tensor  # (n,) log
    hit: Tensor  # (n,) bool
    top: Tensor  # (n,) bool
    log_prior: Tensor  # (n,)
    prototypes: Tensor  # (n,) int64
    elements: Tensor  # (n, n_properties) mean properties of the elements


def main(words: Sequence[str]) -> None:
    """Run every strategy from every start, and write hits against labels."""
    config = parse_args(RetrospectiveConfig, words)
    torch.set_num_threads(1)
    pool = _pool(prepare(config.data), config.target)
    print(f"{len(pool.crystals)} crystals, {int(pool.hit.sum())} hits, {int(pool.top.sum())} in the top 5 %")
    rows = []
    for seed in range(config.seeds):
        for strategy in config.strategies:
            rows += _campaign(config, pool, strategy, seed)
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "retrospective.csv", table.to_csv(index=False))
    write_atomic(output / "retrospective.png", png(_plot(table)))
    last = table[table["labels"] == table["labels"].max()].groupby("strategy")
    figures = {
        name: {"hits": part["hits"].tolist(), "top_share": part["top_share"].round(4).tolist()} for name, part in last
    }
    print(json.dumps(figures))


def _pool(data: PreparedData, target: float) -> Pool:
    labels = torch.stack([data.labels[name] for name in _LABELS], dim=1)
    known = ~labels.isnan().any(dim=1)
    crystals, labels = data.crystals.select(known), labels[known]
    energy, hull, gap = labels.T
    nothing = torch.full_like(gap, 1e-3)
    truth = {
        "e_above_hull": Prediction(hull, nothing),
        "band_gap": Prediction(gap, nothing * (gap > METAL), (gap < METAL).double()),
        "formation_energy_per_atom": Prediction(energy, nothing),
    }
    reward = build_reward(RewardConfig(reward="bandgap", target=target), Properties(None, _names()))
    score = reward.from_predictions(crystals, truth)
    fractions = crystals.composition.double() / crystals.n_atoms[:, None]
    return Pool(
        crystals,
        labels,
        score,
        ((gap - target).abs() <= 0.25) & (hull < 0.1),
        score >= score.sort(descending=True).values[round(_TOP * len(score)) - 1],
        load_prior("any").log_prob(crystals),
        prototype_keys(crystals),
        fractions @ torch.from_numpy(element_properties()).double(),
    )


def _campaign(config: RetrospectiveConfig, pool: Pool, strategy: str, seed: int) -> list[dict[str, object]]:
    """Return hits and the share of the top after every round."""
    generator = seeded(seed, "retrospective")
    order = torch.randperm(len(pool.crystals), generator=generator)
    known = torch.zeros(len(order), dtype=torch.bool)
    known[order[: config.first]] = True
    start = known.clone()
    rows = []
    for number in range(config.rounds + 1):
        found = known & ~start
        rows.append(
            {
                "strategy": strategy,
                "seed": seed,
                "labels": int(found.sum()),
                "hits": int((pool.hit & found).sum()),
                "top_share": float((pool.top & found).sum() / (pool.top & ~start).sum()),
            }
        )
        if number < config.rounds:
            score = _score(config, pool, known, strategy, seed, generator).masked_fill(known, -torch.inf)
            known[score.argsort(descending=True, stable=True)[: config.n_per_round]] = True
    return rows


def _score(
    config: RetrospectiveConfig, pool: Pool, known: Tensor, strategy: str, seed: int, generator: torch.Generator
) -> Tensor:
    if strategy == "random":
        return torch.rand(len(known), generator=generator, dtype=torch.float64)
    if strategy == "substitution":
        score = torch.full((len(known),), -1e6, dtype=torch.float64)
        for row in (known & pool.hit).nonzero().flatten().tolist():
            near = -(pool.elements - pool.elements[row]).norm(dim=1)
            score = torch.maximum(score, torch.where(pool.prototypes == pool.prototypes[row], near, near - 1e3))
        return score
    ensemble = _fit(config, pool, known, seed)
    predictions = ensemble.predict_all(pool.crystals)
    reward = build_reward(RewardConfig(reward="bandgap", target=config.target), Properties(ensemble))
    name = "expected" if strategy == "sampler" else strategy
    score = acquisition_scores(name, reward, pool.crystals, predictions, kappa=1.0, generator=generator)  # type: ignore[arg-type]
    return score + pool.log_prior if strategy == "sampler" else score


def _fit(config: RetrospectiveConfig, pool: Pool, known: Tensor, seed: int) -> PropertyEnsemble:
    """Return proxies trained from nothing on the known rows; Laplace scales are their uncertainty."""
    rows = known.nonzero().flatten()
    n = len(known)
    epochs = max(1, config.steps // max(1, len(rows) // _BATCH))
    settings = ProxyTraining(n_members=config.members, epochs=epochs, batch_size=_BATCH, ema_decay=0.99, seed=seed)
    data = TrainingData(
        crystals=pool.crystals,
        labels=pool.labels.float(),
        relaxed=torch.ones(n, dtype=torch.bool),
        stretchable=(pool.crystals.space_group > 2) & (pool.crystals.space_group < 195),
        train_rows=rows,
        held_out_rows=rows[:0],
        new_system=torch.zeros(n, dtype=torch.bool),
        log_volumes=elemental_volumes(pool.crystals.select(rows)).log().float(),
    )
    with TemporaryDirectory() as folder:
        members = [train_member(data, settings, k, Path(folder), progress=False) for k in range(config.members)]
    return PropertyEnsemble(members, Calibration.none())


class _Named:
    """A property that is given, never predicted."""

    unit = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def predict(self, crystals: CrystalBatch) -> Prediction:
        """Refuse.

        Raises:
            NotImplementedError: Always; true labels are passed in.
        """
        raise NotImplementedError(f"{self.name} of {len(crystals)} crystals is known, not predicted")


def _names() -> list[_Named]:
    return [_Named(name) for name in _LABELS]


def _plot(table: pd.DataFrame) -> Figure:
    """Return hits and the share of the top against labels; bands are the range over seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2), ("hits", "top_share"), ("hits", "share of the top 5 % found"), strict=True
    ):
        for strategy, part in table.groupby("strategy", sort=False):
            curve = part.groupby("labels")[column]
            mean = curve.mean()
            axes.plot(mean.index, mean, marker="o", markersize=3, label=strategy)
            axes.fill_between(mean.index, curve.min(), curve.max(), alpha=0.15)
        axes.set_xlabel("labels")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main_guard(main)
