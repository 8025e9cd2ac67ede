"""What a generator's structures save a relaxation: CHGNet energy drop and steps, flow against random coordinates.

    python -m benchmarks.relaxation n=100 seed=0

The same crystals of the prior (space group, letters, lattice) are given coordinates by both and relaxed in the same way
(`discover.oracle.relax`, fmax 0.1 eV/Å, 200 steps). Medians are over the crystals that both relaxed; those that either
failed are counted beside them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from discover.build import seeded
from discover.errors import main_guard
from discover.options import option, parse_args
from discover.oracle.relax import Relaxation, RelaxStatus, relax, values
from discover.structure.base import StructureGenerator
from discover.structure.flow_matching import FlowMatching
from discover.structure.random_baseline import RandomCoordinates
from discover.train_sampler import draw_crystals
from envs.crystal import CrystalBatch
from policies.pretrained import load_prior


@dataclass(frozen=True, kw_only=True)
class RelaxationConfig:
    """Everything this benchmark can be told."""

    n: int = option(100, "crystals of the prior")
    n_workers: int = option(2, "processes that relax")
    seed: int = option(0, "random seed")


def main(words: Sequence[str]) -> None:
    """Relax the structures of both generators and print what they have in common."""
    config = parse_args(RelaxationConfig, words)
    torch.set_num_threads(1)
    prior = load_prior("any")
    drawn = draw_crystals(prior.env, prior.policy, config.n, seeded(config.seed, "relaxation"))
    crystals = CrystalBatch.cat([batch for batch, _ in drawn])
    generators: dict[str, StructureGenerator] = {"flow": FlowMatching.load(), "random": RandomCoordinates()}
    relaxed: dict[str, list[Relaxation]] = {}
    for name, generator in generators.items():
        structures = generator.generate(crystals, seeded(config.seed, name))
        relaxed[name] = relax(structures, n_workers=config.n_workers)
    both = np.all([[item.status is not RelaxStatus.FAILED for item in items] for items in relaxed.values()], axis=0)
    figures = {"n": config.n, "n_compared": int(both.sum()), **{k: summary(v, both) for k, v in relaxed.items()}}
    for name in generators:
        print(name, figures[name])
    print(json.dumps(figures))


def summary(relaxed: list[Relaxation], compared: np.ndarray) -> dict[str, float]:
    """Return medians over the compared crystals, and how many failed or did not converge."""
    return {
        "failed": sum(item.status is RelaxStatus.FAILED for item in relaxed),
        "converged": sum(item.converged for item in relaxed),
        "median_energy_drop": float(np.median(values(relaxed, "energy_drop")[compared])),
        "median_steps": float(np.median(values(relaxed, "n_steps")[compared])),
        "mean_steps": float(np.mean(values(relaxed, "n_steps")[compared])),
        "median_formation_energy": float(np.median(values(relaxed, "formation_energy")[compared])),
        "mean_cpu_seconds": float(np.mean(values(relaxed, "seconds"))),
    }


if __name__ == "__main__":
    main_guard(main)
