"""What the parts of the flow contribute: networks trained equally long with and without each of them.

    python -m benchmarks.flow_parts data=train.csv.gz validation=val.csv.gz output=DIR

Space groups and Wyckoff letters of validation materials are given, lattice and coordinates are found with one draw. The
first network is trained with the default settings but for the epochs; it is also sampled without anti-annealing and
without pushing atoms apart. Differences are paired. A network that the output folder has is not trained again, so other
data need another folder; the last line printed is JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from discover.csp_predictors import FromWyckoff
from discover.errors import ConfigError, main_guard
from discover.evaluate_csp import Targets, figures_at, predict_targets, read_targets
from discover.metrics.intervals import paired_difference
from discover.metrics.matching import first_hits, match_predictions
from discover.options import help_text, option, parse_args
from discover.run_folder import write_atomic
from discover.structure.flow_matching import FlowMatching
from discover.structure.flow_training import FlowTraining
from discover.train_flow import train_flow

USAGE = "python -m benchmarks.flow_parts data=FILE.csv.gz validation=FILE.csv.gz output=DIR [epochs=10]"
#: name: how the network is trained, and how it is sampled
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all parts": ({}, {}),
    "without pairing": ({"pairing": False}, {}),
    "without pair force": ({"network": replace(FlowTraining().network, pair_force=False)}, {}),
    "without anti-annealing": ({}, {"anneal": 0.0}),
    "without repair of contacts": ({}, {"repair": False}),
}


@dataclass(frozen=True, kw_only=True)
class FlowPartsConfig:
    """How long to train and what to measure on."""

    data: str = option("", "CSV file of structures to train on")
    validation: str = option("", "CSV file of structures to predict")
    output: str = option("", "folder for networks and figures")
    epochs: int = option(10, "passes over the data of each training; the shipped network had 239")
    n: int = option(1000, "random validation rows, at most all")
    seed: int = option(0, "which rows, the trainings and the draws")
    n_workers: int = option(2, "processes that compare structures")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting.
        """
        for name in ("data", "validation", "output"):
            if not getattr(self, name):
                raise ConfigError(f"{name}=PATH is needed; {USAGE}")
        for name in ("epochs", "n"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def measure(config: FlowPartsConfig, targets: Targets) -> dict[str, dict[str, Any]]:
    """Train what is missing; return match rate and RMSE-all of each variant, and what it lacks against all parts."""
    rows: dict[str, dict[str, Any]] = {}
    whole = None
    for name, (training, sampling) in PARTS.items():
        settings = FlowTraining(epochs=config.epochs, seed=config.seed, **training)
        trained = name.replace(" ", "_") if training else "all_parts"
        folder = Path(config.output) / f"{trained}-{config.epochs}-epochs-seed-{config.seed}"
        train_flow(config.data, folder, settings, device="cpu")
        flow = FlowMatching.load(folder / "flow", lattice="free", **sampling)
        outcome = predict_targets(targets, FromWyckoff(flow), k=1, given="wyckoff", seed=config.seed)
        matches = match_predictions(outcome.predictions, targets.structures, n_workers=config.n_workers)
        hits = first_hits(matches.rms, 1).astype(float)
        whole = hits if whole is None else whole
        rows[name] = {
            **figures_at(matches, 1),
            "difference": paired_difference(hits, whole)._asdict(),
        }
        print(
            f"{name:28s} match rate {rows[name]['match_rate']:.3f}  RMSE-all {rows[name]['rmse_all']:.4f}  "
            f"{100 * rows[name]['difference']['mean']:+.1f} points",
            flush=True,
        )
    return rows


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(FlowPartsConfig, USAGE))
        return
    config = parse_args(FlowPartsConfig, words)
    torch.set_num_threads(1)
    targets = read_targets(config.validation, config.n, config.seed, n_workers=config.n_workers)
    shown = {**asdict(config), "n": len(targets), "parts": measure(config, targets)}
    write_atomic(Path(config.output) / "figures.json", json.dumps(shown, indent=2) + "\n")
    print(json.dumps(shown))


if __name__ == "__main__":
    main_guard(main)
