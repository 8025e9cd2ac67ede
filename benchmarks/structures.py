"""``python -m benchmarks.structures``: seconds per structure, from a draw of the prior to pymatgen objects.

Rates are wall time per crystal of one batch, on the threads that torch has; the sampler's tables, the weights and the
libraries are loaded before the clock starts.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from discover.build import seeded
from discover.errors import ConfigError, main_guard
from discover.options import help_text, option, parse_args
from discover.structure.flow_matching import FlowMatching
from discover.structure.orbits import to_structures
from discover.structure.random_baseline import RandomCoordinates
from discover.train_sampler import draw_crystals
from policies.pretrained import load_prior

USAGE = "python -m benchmarks.structures [n=1000] [draws=1]"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to time."""

    n: int = option(1000, "crystals in the batch")
    draws: int | None = option(1, "draws of coordinates per crystal; null: as many as a run makes")
    steps: int | None = option(None, "steps of the integration; null: as many as a run makes")
    random: bool = option(False, "also time random coordinates, on a tenth of the crystals")
    device: str = option("cpu", "where the network runs: cpu or cuda")
    threads: int | None = option(None, "threads of torch; null: as many as torch takes")
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting.
        """
        for name in ("n", "draws", "steps", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


def measure(config: BenchmarkConfig) -> dict[str, Any]:
    """Return seconds per crystal of each part."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    prior, flow = load_prior("any"), FlowMatching.load()
    flow = replace(flow, n_draws=config.draws or flow.n_draws, n_steps=config.steps or flow.n_steps)
    flow.network.to(config.device)
    for crystals, _ in draw_crystals(prior.env, prior.policy, 64, seeded(config.seed, "warm up")):
        flow.generate(crystals, seeded(config.seed, "warm up"))
    start = time.perf_counter()
    crystals, _ = next(
        iter(draw_crystals(prior.env, prior.policy, config.n, seeded(config.seed, "draw"), batch_size=config.n))
    )
    sampled = time.perf_counter()
    draws = flow.best_draws(crystals, seeded(config.seed, "coordinates"))
    flown = time.perf_counter()
    structures = to_structures(replace(crystals, lattice_parameters=draws.cell), draws.parameters)
    built = time.perf_counter()
    per_crystal = {"sample": sampled - start, "flow": flown - sampled, "structures": built - flown}
    figures: dict[str, Any] = {f"{name}_ms": 1000.0 * value / config.n for name, value in per_crystal.items()}
    figures |= {
        "total_ms": 1000.0 * (built - start) / config.n,
        "n": len(structures),
        "failed": int((draws.score == -torch.inf).sum()),
        "draws": flow.n_draws,
        "steps": flow.n_steps,
        "threads": torch.get_num_threads(),
        "device": config.device,
    }
    if config.random:
        few = crystals.select(slice(0, max(1, config.n // 10)))
        start = time.perf_counter()
        RandomCoordinates().generate(few, seeded(config.seed, "random"))
        figures["random_ms"] = 1000.0 * (time.perf_counter() - start) / len(few)
    return figures


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(BenchmarkConfig, USAGE))
        return
    print(json.dumps(measure(parse_args(BenchmarkConfig, words))))


if __name__ == "__main__":
    main_guard(main)
