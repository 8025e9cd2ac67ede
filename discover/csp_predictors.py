"""What structure prediction is evaluated with: `discover.predict` and its parts, each behind one interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pymatgen.core import Structure

from discover.build import build_generator, careful_generator
from discover.config import EvaluateConfig
from discover.data import prepare
from discover.evaluate_csp import Predictor, Queries
from discover.predict import Sources, predict
from discover.structure.base import StructureGenerator
from discover.structure.orbits import to_structures
from discover.templates import Templates, load_templates, retrieve, templates_of_data


@dataclass(frozen=True)
class FromComposition:
    """`discover.predict` with some of its sources."""

    sources: Sources
    generator: StructureGenerator

    def __call__(self, queries: Queries, k: int, generator: torch.Generator) -> list[list[Structure | None]]:
        """Return up to `k` structures for the contents of each primitive cell, the most likely first."""
        found = predict(queries.compositions, k, sources=self.sources, generator=self.generator, rng=generator)
        return [[prediction.structure for prediction in row] for row in found]


@dataclass(frozen=True)
class FromTemplates:
    """Plain retrieval, the baseline: known prototypes in the order of how alike their elements are."""

    templates: Templates

    def __call__(self, queries: Queries, k: int, generator: torch.Generator) -> list[list[Structure | None]]:  # noqa: ARG002 - nothing is random
        """Return up to `k` prototypes for the contents of each primitive cell, most alike elements first."""
        found = retrieve(self.templates, queries.compositions, k)
        rows: list[list[Structure | None]] = [[] for _ in queries.compositions]
        for row, structure in zip(
            found.query.tolist(), to_structures(found.crystals, found.parameters, primitive=True), strict=True
        ):
            rows[row].append(structure)
        return rows


@dataclass(frozen=True)
class FromWyckoff:
    """The flow in its free-lattice mode, `k` times for each crystal; the first of more are the same as of fewer."""

    flow: StructureGenerator

    def __call__(self, queries: Queries, k: int, generator: torch.Generator) -> list[Sequence[Structure | None]]:
        """Return `k` structures with the space group and letters of each query.

        Raises:
            ValueError: If the queries have none.
        """
        crystals = queries.crystals
        if crystals is None:
            raise ValueError("space groups and letters are needed: queries of given=wyckoff")
        return list(zip(*(self.flow.generate(crystals, generator) for _ in range(k)), strict=True))


def predictor_of(config: EvaluateConfig) -> Predictor:
    """Return the predictor that a configuration of task=csp asks for.

    Raises:
        CheckpointError: If weights that ship are damaged.
        DataError: If the data set of templates cannot be used.
    """
    pick = config.pick or "agreement"  # no flow, nothing to pick
    if config.given == "wyckoff":
        return FromWyckoff(careful_generator(n_draws=config.draws, pick=pick))
    templates = None if config.templates is None else Path(config.templates)
    if config.source == "templates":
        return FromTemplates(load_templates() if templates is None else templates_of_data(prepare(templates)))
    if config.source == "random":
        return FromComposition(Sources.load("generator"), build_generator("random", None))
    source = "templates" if config.source == "ranked" else str(config.source)
    return FromComposition(Sources.load(source, templates), careful_generator(n_draws=config.draws, pick=pick))
