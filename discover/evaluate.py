"""``python -m discover.evaluate task=...``: published metrics with their protocol, as a table and one line of JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from discover.config import EvaluateConfig
from discover.csp_predictors import predictor_of
from discover.errors import main_guard
from discover.evaluate_csp import evaluate_csp
from discover.evaluate_dng import evaluate_dng
from discover.evaluate_proxy import evaluate_proxy
from discover.evaluate_sampler import evaluate_sampler
from discover.options import help_text, parse_args
from discover.oracle.band_gap import GapModel
from discover.oracle.train_band_gap import evaluate_band_gap
from discover.run_folder import make_folder
from discover.train_prior import CHEMISTRIES, evaluate_prior
from policies.pretrained import SHIPPED, Prior, load_policy
from proxies import load_ensemble, load_pretrained

USAGE = (
    "python -m discover.evaluate task=proxy data=FILE.csv.gz | task=prior data=FILE.csv.gz | task=sampler run=DIR | "
    "task=gap data=FILE.csv.gz | "
    "task=csp data=FILE.csv.gz n=500 k=20 [source=templates templates=FILE.csv.gz] [given=wyckoff source=generator] | "
    "task=dng [reference=FILE.csv.gz] [train_data=FILE.csv.gz hull=FOLDER]"
)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Return the figures that a configuration asks for.

    Raises:
        RunFolderError: If they cannot be written where it says.
    """
    if config.output is not None:
        make_folder(Path(config.output))  # said before anything slow
    if config.task == "sampler":
        return evaluate_sampler(config)
    if config.task == "csp":
        return evaluate_csp(config, predictor_of(config))
    if config.task == "dng":
        return evaluate_dng(config)
    if config.task == "gap":
        model = GapModel.load(None if config.weights is None else Path(config.weights))
        with TemporaryDirectory() as scratch:  # CHGNet's features, kept where an output folder is named
            features = Path(config.output or scratch) / "features"
            return dict(evaluate_band_gap(config.data or "", features, model=model, n_workers=config.n_workers))
    if config.task == "prior":
        policy = load_policy(SHIPPED if config.weights is None else Path(config.weights) / "prior")
        return {
            chemistry: asdict(evaluate_prior(config.data or "", Prior(policy, chemistry), config.train_data))
            for chemistry in CHEMISTRIES
        }
    ensemble = load_pretrained() if config.weights is None else load_ensemble(Path(config.weights))
    return dict(evaluate_proxy(config.data or "", ensemble, train_path=config.train_data))


def print_table(figures: Mapping[str, Any], indent: str = "") -> None:
    """Print nested figures, one a line; a rate with its interval is one figure."""
    for name, value in figures.items():
        if isinstance(value, Mapping) and {"rate", "interval_95", "hits", "n"} == value.keys():
            low, high = (nan if end is None else end for end in value["interval_95"])
            rate = nan if value["rate"] is None else value["rate"]
            print(f"{indent}{name:<40} {rate:.4g} [{low:.3g}, {high:.3g}] ({value['hits']} of {value['n']})")
        elif isinstance(value, Mapping):
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{name:<40} {shown}")


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(EvaluateConfig, USAGE))
        return
    figures = evaluate(parse_args(EvaluateConfig, words))
    print_table(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main_guard(main)
