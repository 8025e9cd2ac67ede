"""Does a live campaign learn a chemistry that its proxies have never seen? Oxides known, nitrides wanted.

    python -m benchmarks.transfer data=train.csv.gz validation=val.csv.gz hull=HULL output=FOLDER

Proxies are trained from nothing on a few thousand oxides, the prior on all rows without nitrogen (flow, templates and
composition prior are those that ship: they say where atoms sit, not how stable that is). A campaign with
`reward=stability beta=1 hull_limit=0.1` then asks for nitrides and buys CHGNet labels; with `per_check=1` single points
are not asked beforehand, so that all it knows of nitrides are its labels. Reported after each round: the error of its
proxies on the formation energies of the validation rows that hold nitrogen and no oxygen, and the share of its labels
below 0.1 eV/atom above hull, those left out that were bought for being uncertain. What is in the output folder already
is not done again.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pymatgen.core import Composition
from torch import Tensor

from discover import run
from discover.choose import EXPLORE
from discover.data import PreparedData, prepare
from discover.errors import main_guard
from discover.metrics.intervals import wilson_interval
from discover.options import option, parse_args
from discover.plots import png
from discover.progress import LABELS
from discover.reward import METASTABLE
from discover.run_folder import write_atomic
from discover.structure_files import read_table
from discover.train_prior import PriorTraining, train_prior
from discover.train_proxy import ProxyTraining, train_proxy
from envs.crystal import CrystalBatch
from proxies import load_ensemble

_NEW, _OLD = "N", "O"
_ENERGY = "formation_energy_per_atom"


@dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Everything this benchmark can be told."""

    data: str = option("", "CSV file of labelled structures to train on")
    validation: str = option("", "CSV file of labelled structures to measure on")
    hull: str = option("", "CSV file of formulas and formation energies, or folder with it")
    output: str = option("", "folder for proxies, prior, runs, table and plot")
    n_oxides: int = option(3000, "rows that the proxies are trained on")
    epochs: int = option(40, "passes over them")
    members: int = option(2, "networks of the ensemble")
    prior_minutes: float = option(8.0, "how long the prior is trained")
    rounds: int = option(5, "rounds")
    budget: int = option(100, "labels over all rounds")
    per_check: int = option(1, "candidates looked at for each label, 8 by default in runs; 1: none")
    per_element: int | None = option(None, "labels of a round that may share an element other than nitrogen")
    explore: float = option(0.1, "share of them for what the proxies are least sure of; none in the last round")
    seeds: int = option(3, "campaigns")
    n_steps: int = option(150, "steps of the sampler in the first round; half as many in later ones")


def main(words: Sequence[str]) -> None:
    """Train without nitrogen, run the campaigns, measure every round."""
    config = parse_args(TransferConfig, words)
    torch.set_num_threads(1)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    without, oxides = output / "without_nitrogen.csv", output / "oxides.csv"
    if not oxides.exists():
        table = read_table(Path(config.data))
        elements = [{str(item) for item in Composition(text)} for text in _formulas(config.data, table)]
        lacking = table[[_NEW not in found for found in elements]]
        write_atomic(without, lacking.to_csv(index=False))
        is_oxide = [_OLD in found and _NEW not in found for found in elements]
        chosen = table[is_oxide].sample(min(config.n_oxides, sum(is_oxide)), random_state=0)
        write_atomic(oxides, chosen.to_csv(index=False))
    _once(output / "proxies", lambda folder: train_proxy(oxides, folder, settings=_proxy_settings(config)))
    _once(output / "prior", lambda folder: train_prior(without, folder, PriorTraining(minutes=config.prior_minutes)))
    wanted = _nitrides(prepare(config.validation))
    rows = [row for seed in range(config.seeds) for row in _campaign(config, output, wanted, seed)]
    table = pd.DataFrame(rows)
    write_atomic(output / "transfer.csv", table.to_csv(index=False))
    write_atomic(output / "transfer.png", png(_plot(table)))
    print(json.dumps(_figures(table, len(wanted[0])), indent=1))


def _formulas(path: str, table: pd.DataFrame) -> list[str]:
    """Return the formula of each row of a table, from its column or from its structures."""
    if "pretty_formula" in table:
        return [str(text) for text in table["pretty_formula"]]
    data = prepare(path)
    known = dict(zip(data.ids.tolist(), data.formulas.tolist(), strict=True))
    return [known.get(str(name), _NEW) for name in table["material_id"]]  # unreadable rows are left out


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    done = folder / "done"
    if not done.exists():
        make(folder)
        done.touch()


def _proxy_settings(config: TransferConfig) -> ProxyTraining:
    return ProxyTraining(n_members=config.members, epochs=config.epochs, batch_size=64, ema_decay=0.99)


def _nitrides(data: PreparedData) -> tuple[CrystalBatch, Tensor]:
    """Return the crystals with nitrogen and without oxygen, and (n,) formation energies in eV/atom."""
    elements = data.crystals.elements
    rows = (elements == 7).any(dim=1) & ~(elements == 8).any(dim=1) & ~data.labels[_ENERGY].isnan()
    return data.crystals.select(rows), data.labels[_ENERGY][rows]


def _campaign(
    config: TransferConfig, output: Path, wanted: tuple[CrystalBatch, Tensor], seed: int
) -> list[dict[str, object]]:
    """Run one campaign, or read it, and return what its proxies and labels were worth round by round."""
    folder = output / f"seed{seed}"
    if not (folder / "summary.md").exists():
        words = [
            *("reward=stability", "beta=1", f"hull_limit={METASTABLE}"),
            *(f"restrict.required=[{_NEW}]", f"restrict.exclude=[{_OLD}]"),
            *(f"proxies={output / 'proxies'}", f"prior={output / 'prior'}", f"learn.data={output / 'oxides.csv'}"),
            *(f"rounds={config.rounds}", f"oracle.budget={config.budget}", f"oracle.hull={config.hull}"),
            *(f"train.n_steps={config.n_steps}", f"learn.sampler_steps={config.n_steps // 2}"),
            *([f"acquire.explore={config.explore}"] if config.rounds > 1 else []),
            *([f"acquire.per_element={config.per_element}"] if config.per_element else []),
            *("acquire.new=off", f"screen.per_check={config.per_check}"),
            *(f"seed={seed}", f"output={folder}"),
        ]
        run.main([f"resume={folder}"] if folder.exists() else words)
    labels = pd.read_csv(folder / LABELS)
    aimed = labels[labels["source"] != EXPLORE]
    crystals, truth = wanted
    rows: list[dict[str, object]] = []
    for number in range(1, config.rounds + 2):
        weights = output / "proxies" if number == 1 else folder / "rounds" / f"{number:02d}" / "proxies"
        if not weights.exists():  # one round learns nothing
            continue
        predicted = load_ensemble(weights).predict_all(crystals)[_ENERGY]
        error = (predicted.mean.double() - truth).abs()
        n_labels = int((labels["round"] < number).sum())
        row: dict[str, object] = {"seed": seed, "round": number, "labels": n_labels, "mae": float(error.mean())}
        if number <= config.rounds:
            this = aimed[aimed["round"] == number]
            row |= {"checked": len(this), "hits": int(this["hit"].sum())}
        rows.append(row)
    return rows


def _figures(table: pd.DataFrame, n_wanted: int) -> dict[str, object]:
    """Return the errors before and after, and the pooled hit rates of the first and the last round."""
    first, last = int(table["round"].min()), int(table["round"].max())
    mae = table.pivot_table(index="round", columns="seed", values="mae")
    pooled = table.dropna(subset=["hits"]).groupby("round")[["hits", "checked"]].sum().astype(int)
    rates = {}
    for number, row in pooled.iterrows():
        low, high = wilson_interval(int(row["hits"]), int(row["checked"]))
        rates[str(number)] = {"hits": int(row["hits"]), "checked": int(row["checked"]), "interval_95": [low, high]}
    return {
        "n_validation_nitrides": n_wanted,
        "mae_before": mae.loc[first].round(4).tolist(),
        "mae_after": mae.loc[last].round(4).tolist(),
        "falls_by": round(float(mae.loc[first].mean() / mae.loc[last].mean()), 3),
        "hit_rate": rates,
    }


def _plot(table: pd.DataFrame) -> Figure:
    """Return error and hit rate against rounds, with the range over seeds and 95 % intervals of the pooled rate."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve = table.groupby("round")["mae"]
    left.plot(curve.mean().index - 1, curve.mean(), marker="o", markersize=3)
    left.fill_between(curve.mean().index - 1, curve.min(), curve.max(), alpha=0.2)
    left.set(xlabel="rounds of labels", ylabel="error on validation nitrides (eV/atom)", ylim=(0, None))
    pooled = table.dropna(subset=["hits"]).groupby("round")[["hits", "checked"]].sum()
    rate = pooled["hits"] / pooled["checked"]
    bounds = np.array([wilson_interval(int(row.hits), int(row.checked)) for row in pooled.itertuples()])
    right.plot(rate.index, rate, marker="o", markersize=3)
    right.fill_between(rate.index, bounds[:, 0], bounds[:, 1], alpha=0.2)
    right.set(xlabel="round", ylabel="labels below 0.1 eV/atom above hull", ylim=(0, 1), xticks=list(rate.index))
    return figure


if __name__ == "__main__":
    main_guard(main)
