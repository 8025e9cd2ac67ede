"""The report of a run: a Markdown summary with plots, rebuilt from the files of the run folder at any time.

What it reads: `config.yaml`, `candidates.parquet`, `structures/`, and if they are there `reference.parquet` (as many
crystals of the untrained prior, the same columns) and from `log.jsonl` the events ``train`` (step, loss, log_reward)
and ``result`` (any figures of the run, shown as they are).
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pymatgen.core import Composition

from discover import plots
from discover.candidates import MEANING, Column, read_candidates
from discover.config import ReportConfig, RewardConfig, RunConfig, Target
from discover.errors import RunFolderError, main_guard
from discover.gap_scale import INTERCEPT, RESIDUAL, SLOPE, to_pbe
from discover.options import help_text, parse_args
from discover.oracle.hull import IMPLAUSIBLE
from discover.progress import FINALISTS, LABELS, NEAR_TARGET, ROUNDS, HitRule
from discover.run_folder import RunFolder, open_run_folder

SUMMARY = "summary.md"
REFERENCE = "reference.parquet"
TRAIN_EVENT, RESULT_EVENT = "train", "result"
_SPENT = ("draws", "proxy_queries", "training_seconds")  # what a run has spent over all rounds
_SHOWN = 20

_PROPERTY_OF_REWARD = {
    "bandgap": Column.BAND_GAP,
    "density": Column.DENSITY,
    "formation_energy": Column.FORMATION_ENERGY,
    "stability": Column.E_ABOVE_HULL,
    "oxidation_score": Column.OXIDATION_SCORE,
}
_LABEL = {
    Column.BAND_GAP: "predicted band gap, PBE (eV)",
    Column.BAND_GAP_EXPERIMENT: "estimated band gap, experimental scale (eV)",
    Column.DENSITY: "density (g/cm³)",
    Column.FORMATION_ENERGY: "predicted formation energy (eV/atom)",
    Column.E_ABOVE_HULL: "predicted energy above the hull (eV/atom)",
    Column.OXIDATION_SCORE: "oxidation score (sum of log frequencies)",
    Column.LOG_REWARD: "log reward",
    Column.VOLUME_PER_ATOM: "volume per atom (Å³)",
}


ROUND_HEADER = {
    "round": "round",
    "checked": "checked",
    "failed": "failed",
    "hits": "hits",
    "hit_rate": "hit rate",
    "formulas_of_hits": "formulas",
    "prototypes_of_hits": "prototypes",
    "systems_of_hits": "systems",
    "median_e_above_hull": "median above hull (eV/atom)",
    "mae_formation_energy": "proxy error, formation energy",
    "within_1_std_formation_energy": "within 1σ",
    "mae_band_gap": "proxy error, gap (eV)",
    "within_1_std_band_gap": "within 1σ",
    "oracle_seconds_per_hit": "CPU s per hit",
    "structures_looked_at": "looked at",
    "choosing_seconds": "CPU s choosing",
}
_RATE = {"hit_rate": "hit_rate", "low": "hit_rate_low", "high": "hit_rate_high"}
_ERRORS = {
    "formation_energy": "formation energy (eV/atom)",
    "band_gap": "band gap (eV)",
    "e_above_hull": "energy above hull (eV/atom)",
}
_BEST_HEADER = (
    "id",
    "formula",
    "group",
    "positions",
    "gap, PBE (eV)",
    "formation energy (eV/atom)",
    "above hull (eV/atom)",
    "P(metastable)",
    "g/cm³",
    "oxidation states",
    "score",
    "new",
)
_MEANING = """
## What the numbers mean, and what they do not

- Every crystal obeys its space group, Wyckoff positions and lattice system{ionic} by construction. That is necessary,
  not sufficient, for it to exist.
- Properties are predictions from composition, symmetry and cell, without coordinates; ± is one standard deviation,
  calibrated on held-out materials. A sampler that optimises a prediction also finds its errors: expect the truth to be
  less good than the list, and check with a relaxation.
- A CIF file in `structures/` holds coordinates from the structure generator: a proposal, to be relaxed. Those in
  `relaxed/` were, with the oracle.
- "New" says that the training data hold no material of this composition. That does not yet make it novel: look it up
  in the literature and in larger data bases. A known composition may still have a new structure.
- An oxidation score below -5 means oxidation states that are rarely or never reported: a chemist will object.
"""


@dataclass(frozen=True)
class Wanted:
    """The property that a run is mostly about, and its target."""

    column: Column
    target: Target | None
    near: float  # distance that still counts as on target, in the property's unit

    def on_target(self, table: pd.DataFrame) -> float:
        """Return the share of rows on target; nan without a target."""
        if self.target is None:
            return math.nan
        low, high = (
            self.target if isinstance(self.target, tuple) else (self.target - self.near, self.target + self.near)
        )
        return float(table[self.column].between(low, high).mean())


def wanted_property(config: RewardConfig) -> Wanted:
    """Return the property of the reward's first factor; the log reward stands for a user's own function."""
    name = config.terms[0].name
    column = _PROPERTY_OF_REWARD.get(name, Column.LOG_REWARD)
    if name == "bandgap" and config.gap_scale == "experiment":
        column = Column.BAND_GAP_EXPERIMENT
    return Wanted(column, config.targets().get(name), NEAR_TARGET.get(name, math.nan))


def write_reference(folder: RunFolder, table: pd.DataFrame) -> None:
    """Store samples of the untrained prior, the table that the report compares with."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    folder.write(REFERENCE, buffer.getvalue())


def write_report(folder: RunFolder) -> str:
    """Write the summary and its plots from what the run folder holds, and return the Markdown.

    Raises:
        RunFolderError: If the run has no candidates yet.
    """
    config = folder.config(RunConfig)
    try:
        table = read_candidates(folder)
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{folder.path} has no candidates yet; continue the run with resume={folder.path}"
        ) from error
    reference = pd.read_parquet(folder / REFERENCE) if (folder / REFERENCE).exists() else None
    wanted = wanted_property(config)
    pictures = _write_plots(folder, table, reference, wanted)
    built = {path.stem for path in folder.structures.glob("*.cif")}
    text = "\n".join(
        [
            *_asked(config),
            *_in_short(table, reference, wanted, n_built=len(built)),
            *_facts(folder.read_log(RESULT_EVENT)),
            *_checked(folder, config),
            *_best(table, built),
            *_pictures(pictures),
            *_meaning(config),
        ]
    )
    folder.write(SUMMARY, text)
    return text


def element_shares(formulas: Sequence[str]) -> dict[str, float]:
    """Return the percentage of formulas that contain each element."""
    counts = Counter(symbol for formula in formulas for symbol in Composition(formula).as_dict())
    return {symbol: 100 * count / max(len(formulas), 1) for symbol, count in counts.items()}


def _write_plots(
    folder: RunFolder, table: pd.DataFrame, reference: pd.DataFrame | None, wanted: Wanted
) -> list[tuple[str, str]]:
    """Write the PNG files and return (file, caption) of each."""
    figures = {}
    curve = [r for r in folder.read_log(TRAIN_EVENT) if {"step", "loss", "log_reward"} <= r.keys()]
    curve = [r for r in curve if r.get("round", 1) == curve[-1].get("round", 1)]  # of the last round
    if curve:
        columns = [[record[key] for record in curve] for key in ("step", "loss", "log_reward")]
        figures["training"] = (
            plots.training_curve(*columns),
            "Loss and mean log reward of the sampler's own crystals.",
        )
    figures["target"] = (
        plots.distribution(_columns(table, reference, wanted.column), _LABEL[wanted.column], target=wanted.target),
        "What was asked for: the candidates against as many crystals of the untrained prior."
        if reference is not None
        else "What was asked for, in the candidates.",
    )
    figures["volume"] = (
        plots.distribution(_columns(table, reference, Column.VOLUME_PER_ATOM), _LABEL[Column.VOLUME_PER_ATOM]),
        "Volume per atom: real crystals lie between 5 and 60 Å³.",
    )
    formulas = table[Column.FORMULA].tolist()
    figures["elements"] = (
        plots.bars(element_shares(formulas), "Elements"),
        "How many candidates contain each element.",
    )
    groups = Counter(str(number) for number in table[Column.SPACE_GROUP])
    shares = {number: 100 * count / len(table) for number, count in groups.items()}
    figures["space_groups"] = (plots.bars(shares, "Space groups"), "Space groups of the candidates, by number.")
    if (folder / ROUNDS).exists() and len(checked := pd.read_csv(folder / ROUNDS)) > 1:
        errors = {label: checked[f"mae_{name}"].tolist() for name, label in _ERRORS.items()}
        curves = {name: checked[column].tolist() for name, column in _RATE.items()}
        figures["rounds"] = (
            plots.rounds(checked["round"].tolist(), **curves, errors=errors),
            "Hits round by round with 95 % intervals, and how wrong the proxies were about what they had not yet seen.",
        )
    for name, (figure, _) in figures.items():
        folder.write_plot(f"{name}.png", plots.png(figure))
    return [(f"plots/{name}.png", caption) for name, (_, caption) in figures.items()]


def _columns(table: pd.DataFrame, reference: pd.DataFrame | None, column: Column) -> dict[str, NDArray[np.float64]]:
    """Return the column as a labelled array of each set, the prior first."""
    sets = {} if reference is None else {"prior": reference}
    return {name: frame[column].to_numpy(float) for name, frame in (sets | {"candidates": table}).items()}


def _asked(config: RunConfig) -> list[str]:
    lines = ["# Candidates", "", "## What was asked", "", f"- reward: `{config.reward}`"]
    if config.target is not None:
        lines.append(f"- target: `{config.target}`")
    gap = config.targets().get("bandgap")
    if gap is not None:
        lines.append(f"- {_scale_note(gap, experiment=config.gap_scale == 'experiment')}")
    if config.stability_gate:
        lines.append("- multiplied by P(energy above hull < 0.1 eV/atom); `stability_gate=off` leaves that out")
    if "stability" in (term.name for term in config.terms):
        power = f"`beta={config.beta_of('stability'):g}`"
        lines.append(f"- stability: P(energy above hull < {config.hull_limit_value():g} eV/atom) to the power {power}")
    if config.novelty_gate:
        lines.append("- compositions of the training data count 1e-8; `novelty_gate=off` counts them in full")
    lines.append(f"- space: `env={config.env}`, `chemistry={config.chemistry}`, prior exponent `alpha={config.alpha}`")
    restricted = {key: value for key, value in vars(config.restrict).items() if value is not None}
    lines += [f"- `restrict.{key}={_plain(value)}`" for key, value in restricted.items()]
    return lines


def _scale_note(gap: Target, *, experiment: bool) -> str:
    low, high = gap if isinstance(gap, tuple) else (gap, gap)
    if experiment:
        numbers, scatter = _range_text(to_pbe(low), to_pbe(high)), RESIDUAL / SLOPE
        return f"the target is meant as measured: a PBE gap of about {numbers} eV, give or take {scatter:.1f} eV"
    numbers = _range_text(SLOPE * low + INTERCEPT, SLOPE * high + INTERCEPT)
    return f"gaps are PBE, hence too small: such a crystal measures about {numbers} eV, give or take {RESIDUAL:.1f} eV"


def _range_text(low: float, high: float) -> str:
    return f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"


def _in_short(table: pd.DataFrame, reference: pd.DataFrame | None, wanted: Wanted, *, n_built: int) -> list[str]:
    rows: list[tuple[str, Any, Any]] = [
        ("distinct candidates", len(table), None if reference is None else len(reference))
    ]

    def add(name: str, figure: Any) -> None:
        rows.append((name, figure(table), None if reference is None else figure(reference)))

    if wanted.target is not None:
        near = "inside the window" if isinstance(wanted.target, tuple) else f"within {wanted.near} of the target"
        add(f"{near}", lambda frame: f"{100 * wanted.on_target(frame):.1f} %")
    add(f"median {_LABEL[wanted.column]}", lambda frame: f"{frame[wanted.column].median():.3g}")
    add("mean P(E above hull < 0.1 eV/atom)", lambda frame: f"{frame[Column.P_METASTABLE].mean():.2f}")
    add("mean oxidation score", lambda frame: f"{frame[Column.OXIDATION_SCORE].mean():.2f}")
    add("composition absent from the training data", lambda frame: f"{100 * frame[Column.NOVEL].mean():.0f} %")
    add("different formulas", lambda frame: frame[Column.FORMULA].nunique())
    add("different space groups", lambda frame: frame[Column.SPACE_GROUP].nunique())
    add(
        "volume per atom in 5 to 60 Å³",
        lambda frame: f"{100 * frame[Column.VOLUME_PER_ATOM].between(5, 60).mean():.1f} %",
    )
    rows.append(("CIF files", n_built, None))
    header = ["| | candidates | untrained prior |", "|---|---|---|"]
    if reference is None:
        header = ["| | candidates |", "|---|---|"]
    lines = [
        f"| {name} | {value} |" + ("" if reference is None else f" {'' if other is None else other} |")
        for name, value, other in rows
    ]
    return ["", "## In short", "", *header, *lines]


def _facts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the rounds amount to: sums of what each spent, the rest of the last one."""
    rounds = list({result.get("round", 1): result for result in results}.values())  # one that was killed logs twice
    if not rounds:
        return []
    facts = {key: value for key, value in rounds[-1].items() if key not in ("time", "event", "round")}
    facts |= {key: sum(result[key] for result in rounds) for key in _SPENT if key in facts}
    return [
        "",
        "## This run",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_plain(value)} |" for key, value in facts.items()),
    ]


def _checked(folder: RunFolder, config: RunConfig) -> list[str]:
    """Return what the oracle found, round by round, and the best of it."""
    if not (folder / LABELS).exists() or not (folder / LABELS).read_text(encoding="utf-8").strip():
        return []  # nothing has been checked, or nothing was there to check
    table, rounds = pd.read_csv(folder / LABELS, keep_default_na=False, na_values=[""]), pd.read_csv(folder / ROUNDS)
    hull = ", ".join(sorted(set(table["hull"].astype(str)))) if len(table) else ""
    n_added = int((table["oracle"] != config.oracle.name).sum()) if "oracle" in table else 0
    added = f" {n_added} of {len(table)} have numbers of results that were added." if n_added else ""
    deep = table["formula"][table["e_above_hull"].astype(float) < IMPLAUSIBLE].tolist()
    if deep and config.oracle.hull is not None:
        added += (
            f" {len(deep)} of {len(table)} lie more than {-IMPLAUSIBLE:g} eV/atom below the hull, which probably lacks "
            f"what competes with them: {', '.join(dict.fromkeys(deep))}."
        )
    rule = HitRule.of(config).describe()
    lines = [
        "",
        f"## Checked with {config.oracle.name}",
        "",
        f"A hit: {rule}. Failures count as no hit. Energies above hull are against: {hull}.{added}",
        "",
        "| " + " | ".join(ROUND_HEADER.values()) + " |",
        "|---" * len(ROUND_HEADER) + "|",
    ]
    cells = [[_round_cell(row[name]) for name in ROUND_HEADER] for row in rounds.to_dict("records")]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += ["", "The best, by what was measured (`relaxed/`, `labels.csv`, [all checks](finalists.html)):", ""]
    if not (folder / f"{FINALISTS}.md").is_file():
        return [*lines, "Not written yet: the run was stopped before that; `discover.run resume=DIR` goes on."]
    return [*lines, (folder / f"{FINALISTS}.md").read_text(encoding="utf-8").rstrip()]


def _round_cell(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return str(int(value)) if float(value).is_integer() else f"{value:.3g}"


def _best(table: pd.DataFrame, built: set[str]) -> list[str]:
    head = table.head(_SHOWN)
    lines = [
        "",
        f"## The {len(head)} best",
        "",
        "| " + " | ".join(_BEST_HEADER) + " |",
        "|---" * len(_BEST_HEADER) + "|",
    ]
    for row in head.to_dict("records"):
        name = row[Column.CANDIDATE_ID]
        score = row[Column.OXIDATION_SCORE]
        cells = [
            f"[{name}](structures/{name}.cif)" if name in built else name,
            row[Column.FORMULA],
            row[Column.SPACE_GROUP],
            row[Column.WYCKOFF],
            _with_std(row, Column.BAND_GAP, Column.BAND_GAP_STD),
            _with_std(row, Column.FORMATION_ENERGY, Column.FORMATION_ENERGY_STD),
            _with_std(row, Column.E_ABOVE_HULL, Column.E_ABOVE_HULL_STD),
            f"{row[Column.P_METASTABLE]:.2f}",
            f"{row[Column.DENSITY]:.2f}",
            row[Column.OXIDATION_STATES],
            "" if math.isnan(score) else f"{score:z.1f}",
            "yes" if row[Column.NOVEL] else "no",
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _with_std(row: Mapping[Any, Any], mean: Column, std: Column) -> str:
    return f"{row[mean]:z.2f} ± {row[std]:.2f}"


def _pictures(pictures: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["", "## Plots"]
    for path, caption in pictures:
        lines += ["", f"![{caption}]({path})", "", caption]
    return lines


def _meaning(config: RunConfig) -> list[str]:
    ionic = ", is charge-neutral and Pauling-ordered" if config.chemistry == "ionic" else ""
    return [
        _MEANING.format(ionic=ionic),
        "## Columns of `candidates.csv`",
        "",
        "| column | meaning |",
        "|---|---|",
        *(f"| `{column}` | {MEANING[column]} |" for column in Column),
        "",
    ]


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_plain(item) for item in value) + "]"
    return str(value)


def main(words: Sequence[str]) -> None:
    """Rebuild the report of a run."""
    if any(word in ("-h", "--help") for word in words):
        print(help_text(ReportConfig, "python -m discover.report run=DIR: rebuild the summary and plots of a run"))
        return
    folder = open_run_folder(parse_args(ReportConfig, words).run)
    write_report(folder)
    print(folder / SUMMARY)


if __name__ == "__main__":
    main_guard(main)
