"""``python -m discover.train what=prior|composition_prior|proxy|trees|flow|gap data=FILE.csv output=DIR``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from discover.config import TrainConfig
from discover.errors import ConfigError, main_guard
from discover.options import help_text, parse_args
from discover.oracle.train_band_gap import GapTraining, train_band_gap
from discover.structure.flow_training import FlowTraining
from discover.train_composition_prior import CompositionPriorTraining, train_composition_prior
from discover.train_flow import train_flow
from discover.train_prior import PriorTraining, train_prior
from discover.train_proxy import ProxyTraining, train_proxy, train_trees
from proxies import PropertyEnsemble

USAGE = "python -m discover.train what=prior|composition_prior|proxy|trees|flow|gap data=FILE.csv output=DIR"


def train(config: TrainConfig) -> dict[str, Any]:
    """Train what the configuration names, write the weights, and return the figures that were used for choices."""
    output = Path(config.output)
    given = {name: getattr(config, name) for name in ("epochs", "batch_size", "lr", "seed", "n_networks")}
    given = {name: value for name, value in given.items() if value is not None}
    start = None if config.start is None else Path(config.start)
    if config.what == "prior":
        return dict(train_prior(config.data, output, PriorTraining(**given, minutes=config.minutes), start=start))
    if config.what == "composition_prior":
        priors = CompositionPriorTraining(**given, minutes=config.minutes)
        return dict(train_composition_prior(config.data, output, priors))
    if config.what == "flow":
        settings = FlowTraining(**given, minutes=config.minutes)
        return train_flow(config.data, output, settings, device=config.device, start=start)
    if config.what == "trees":
        if given.keys() - {"seed"} or config.minutes is not None:
            raise ConfigError("what=trees takes data, output and seed only; the trees have no epochs")
        train_trees(config.data, output, **given)
        return {}
    if config.minutes is not None:
        raise ConfigError(
            "minutes applies to the priors and the flow; a proxy training can be stopped and called again to continue"
        )
    if "lr" in given:
        given["learning_rate"] = given.pop("lr")
    if config.what == "gap":
        return dict(train_band_gap(config.data, output, settings=GapTraining(**given)).facts["held_out"])
    proxies = train_proxy(
        config.data,
        output,
        settings=ProxyTraining(**given),
        labels_path=config.labels,
        start=None if start is None else PropertyEnsemble.load(start),
    )
    return dict(proxies.facts["held_out"])


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(TrainConfig, USAGE))
        return
    config = parse_args(TrainConfig, words)
    figures = train(config)
    print(f"weights in {config.output}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main_guard(main)
