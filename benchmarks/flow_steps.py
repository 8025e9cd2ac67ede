"""``python -m benchmarks.flow_steps data=FILE.csv.gz output=PLOT.png``: quality of the flow against number of steps.

Space groups and Wyckoff letters are given, lattice and coordinates are found, one prediction a material. The plot has
the match rate with its 95 % interval, RMSE-all, and the CPU time of a structure; the last line printed is JSON.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from discover.csp_predictors import FromWyckoff
from discover.errors import ConfigError, main_guard
from discover.evaluate_csp import Targets, figures_at, predict_targets, read_targets
from discover.metrics.matching import match_predictions
from discover.options import help_text, option, parse_args
from discover.plots import ACCENT, TRAINED, png
from discover.run_folder import write_atomic
from discover.structure.flow_matching import FlowMatching

USAGE = "python -m benchmarks.flow_steps data=FILE.csv.gz [output=flow_steps.png] [n=300]"
SOLVERS = ("euler", "heun")


@dataclass(frozen=True, kw_only=True)
class FlowStepsConfig:
    """What to integrate how often."""

    data: str = option("", "CSV file with structures")
    output: str = option("flow_steps.png", "file of the plot")
    n: int = option(300, "random rows, at most all")
    steps: tuple[int, ...] = option((5, 10, 20, 50, 100), "numbers of steps")
    solvers: tuple[str, ...] = option(SOLVERS, "euler, or heun, which calls the network twice a step")
    n_draws: int = option(1, "draws of each structure, the best of which is kept")
    seed: int = option(0, "which rows, and the draws")
    n_workers: int = option(2, "processes that compare structures")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting.
        """
        if not self.data:
            raise ConfigError("structures to predict are needed: data=FILE.csv.gz")
        if unknown := set(self.solvers) - set(SOLVERS):
            raise ConfigError(f"solvers takes {' and '.join(SOLVERS)}, got {', '.join(sorted(unknown))}")
        for name in ("n", "n_draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"steps takes numbers of at least 1, got {list(self.steps)}")


def measure(targets: Targets, flow: FlowMatching, config: FlowStepsConfig) -> dict[str, Any]:
    """Return the figures of one setting of the flow."""
    start = time.process_time()
    outcome = predict_targets(targets, FromWyckoff(flow), k=1, given="wyckoff", seed=config.seed)
    seconds = time.process_time() - start
    matches = match_predictions(outcome.predictions, targets.structures, n_workers=config.n_workers)
    return {
        "solver": flow.solver,
        "n_steps": flow.n_steps,
        **figures_at(matches, 1),
        "cpu_seconds_per_structure": seconds / len(targets),
    }


def plot(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Return match rate, RMSE-all and time against the number of steps, one line a solver."""
    figure = Figure(figsize=(6.4, 7.2), layout="constrained")
    panels: list[Axes] = list(figure.subplots(3, 1, sharex=True))
    for solver, colour in zip(SOLVERS, (TRAINED, ACCENT), strict=True):
        mine = [row for row in rows if row["solver"] == solver]
        if not mine:
            continue
        steps = [row["n_steps"] for row in mine]
        for axes, key in zip(panels, ("match_rate", "rmse_all", "cpu_seconds_per_structure"), strict=True):
            values = np.array([row[key] for row in mine], dtype=float)
            ends = np.array(
                [row.get(f"{key}_interval", (value, value)) for row, value in zip(mine, values, strict=True)]
            )
            error = np.abs(ends.reshape(-1, 2).T - values)
            axes.errorbar(steps, values, yerr=error, color=colour, marker="o", capsize=3, label=solver)
    for axes, label in zip(panels, ("match rate", "RMSE-all", "CPU seconds per structure"), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_title(title)
    panels[0].legend()
    panels[2].set_yscale("log")
    panels[2].set_xscale("log")
    shown = sorted({row["n_steps"] for row in rows})
    panels[2].set_xticks(shown, [str(step) for step in shown])
    panels[2].minorticks_off()
    panels[2].set_xlabel("steps of the integration")
    return figure


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(FlowStepsConfig, USAGE))
        return
    config = parse_args(FlowStepsConfig, words)
    targets = read_targets(config.data, config.n, config.seed, n_workers=config.n_workers)
    rows = []
    for solver in config.solvers:
        for n_steps in config.steps:
            flow = FlowMatching.load(lattice="free", n_steps=n_steps, solver=solver, n_draws=config.n_draws)
            row = measure(targets, flow, config)
            rows.append(row)
            print(
                f"{solver:6s}{n_steps:5d} steps  match rate {row['match_rate']:.3f}  RMSE-all {row['rmse_all']:.4f}  "
                f"{1000 * row['cpu_seconds_per_structure']:.1f} CPU ms per structure"
            )
    title = f"space group and letters given, {len(targets)} structures, K={config.n_draws}"
    write_atomic(Path(config.output), png(plot(rows, title)))
    print(json.dumps({"n": len(targets), "n_draws": config.n_draws, "rows": rows}))


if __name__ == "__main__":
    main_guard(main)
