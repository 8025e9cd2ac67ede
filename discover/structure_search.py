"""Several structures for each crystal, the lowest in energy kept.

The sampler says composition, symmetry and cell. Its own crystal is built with its cell and, where cells are free, with
several that the flow draws; `discover.predict` adds what it takes to be likely for the composition. A single point of a
potential, a fiftieth of the time of a relaxation, tells them apart: of 56 candidates for a band gap the single point of
the best of six lay 0.02 eV/atom (median) above where the sampler's own crystal ended after its relaxation, and below it
in 19; that of the sampler's own crystal 0.14 above.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from pymatgen.core import Structure

from discover.candidates import key_texts
from discover.compositions import cell_contents
from discover.oracle.base import Label, LabelStatus
from discover.predict import predict
from discover.structure.base import StructureGenerator, with_lattices
from discover.structure.flow_matching import SCATTERED, FlowMatching
from envs.crystal import CrystalBatch

#: What labels structures one by one, in order.
Look = Callable[[Sequence[Structure]], Sequence[Label]]
SAMPLED, FREE_CELL, PREDICTED = "sampler", "free cell", "predicted"  # what was built
_EVERY_GROUP = 230


@dataclass(frozen=True)
class Found:
    """The structure that was kept for one crystal."""

    crystal: CrystalBatch  # (1,) what was built: symmetry and cell may differ from what was asked
    structure: Structure
    source: str  # `SAMPLED`, `FREE_CELL` or `PREDICTED`
    look: Label


def lowest_in_energy(
    crystals: CrystalBatch,
    *,
    generator: StructureGenerator,
    with_free_cell: StructureGenerator | None,
    n_predicted: int,
    space_groups: Collection[int],
    look: Look,
    rng: torch.Generator,
    taken: Collection[str] | None = None,
    keep_unknown: bool = False,
) -> list[Found | None]:
    """Return the structure of lowest formation energy for each crystal, None where there is none.

    Args:
        crystals: (n,) crystals.
        generator: Builds every crystal.
        with_free_cell: Does so too, with cells that it finds, every draw a structure of its own unless it is the same
            generator, and finds coordinates of predicted structures; None where cells are restricted.
        n_predicted: Structures that `discover.predict` adds for the contents of each cell, once however many crystals
            have these.
        space_groups: Those that predicted structures may have.
        look: Gives the energies.
        rng: Of coordinates.
        taken: Keys of crystals that are not to be proposed again, and then no key is returned twice; None: any may.
        keep_unknown: Keep the first structure of a crystal of which none has an energy.
    """
    tries = _built(crystals, generator, SAMPLED, rng)
    if with_free_cell is not None:
        tries += [] if with_free_cell is generator else _drawn(crystals, with_free_cell, rng)
        tries += _predicted(crystals, n_predicted, with_free_cell, space_groups, rng)
    labels = look([trial.structure for trial in tries])
    best: list[Found | None] = [None] * len(crystals)
    used = set(taken or ())
    for trial, label in sorted(zip(tries, labels, strict=True), key=lambda pair: _energy(pair[1])):
        key = key_texts(trial.crystal)[0]
        unknown = math.isinf(_energy(label)) and not keep_unknown
        if unknown or best[trial.row] is not None or key in used:
            continue
        if taken is not None:
            used.add(key)
        best[trial.row] = Found(trial.crystal, trial.structure, trial.source, label)
    return best


def _energy(label: Label) -> float:
    energy = label.formation_energy_per_atom
    return math.inf if label.status is LabelStatus.FAILED or math.isnan(energy) else energy


@dataclass(frozen=True)
class _Trial:
    row: int
    crystal: CrystalBatch
    structure: Structure
    source: str


def _built(crystals: CrystalBatch, generator: StructureGenerator, source: str, rng: torch.Generator) -> list[_Trial]:
    structures = generator.generate(crystals, rng)
    built = with_lattices(crystals, structures)
    return [
        _Trial(row, built.select([row]), structure, source)
        for row, structure in enumerate(structures)
        if structure is not None
    ]


def _drawn(crystals: CrystalBatch, generator: StructureGenerator, rng: torch.Generator) -> list[_Trial]:
    """Return all draws of each crystal: energies tell them apart better than the generator does."""
    if not isinstance(generator, FlowMatching):
        return _built(crystals, generator, FREE_CELL, rng)
    owner = torch.arange(len(crystals)).repeat_interleave(generator.n_draws)
    single = replace(generator, n_draws=1, lattice_temperature=SCATTERED)
    trials = _built(crystals.select(owner), single, FREE_CELL, rng)
    return [replace(trial, row=int(owner[trial.row])) for trial in trials]


def _predicted(
    crystals: CrystalBatch,
    n: int,
    generator: StructureGenerator,
    space_groups: Collection[int],
    rng: torch.Generator,
) -> list[_Trial]:
    if not n:
        return []
    contents = cell_contents(crystals)
    first: dict[tuple[tuple[str, int], ...], int] = {}
    for row, cell in enumerate(contents):
        first.setdefault(tuple(sorted(cell.items())), row)
    rows = list(first.values())
    found = predict(
        [contents[row] for row in rows],
        n,
        generator=generator,
        space_groups=None if len(space_groups) == _EVERY_GROUP else space_groups,
        sparing=False,
        rng=rng,
    )
    return [
        _Trial(row, prediction.crystal, prediction.structure, PREDICTED)
        for row, predictions in zip(rows, found, strict=True)
        for prediction in predictions
        if prediction.structure is not None
    ]
