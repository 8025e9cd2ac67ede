"""``python -m discover.generate n=1000``: crystals of the shipped priors, without any reward, as full structures.

The prior draws a crystal. Of it, ``letters=composition`` keeps the composition alone: the composition prior draws
space group and letters anew, and the flow finds the lattice along with the coordinates. ``letters=likeliest`` takes
the composition prior's most probable ones, which are stable more often and vary less. ``letters=prior`` keeps all.
Rows are consecutive draws: nothing is ranked, dropped or drawn again, and a crystal without a structure keeps its row.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pymatgen.core import Structure
from torch import Tensor
from tqdm import tqdm

from discover.build import build_properties, careful_generator, seeded
from discover.candidates import CSV, Column, crystal_columns, numbered
from discover.compositions import cell_contents
from discover.config import GenerateConfig
from discover.errors import ConfigError, main_guard
from discover.labelling import single_points
from discover.options import help_text, parse_args
from discover.properties import Properties
from discover.run_folder import RunFolder, create_run_folder
from discover.structure.base import NO_COORDINATES, StructureGenerator, with_lattices
from discover.structure.flow_matching import LatticeMode
from discover.structure_files import StructureFormat, write_structures
from discover.structure_search import PREDICTED, Found, lowest_in_energy
from discover.train_sampler import draw_crystals
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.restrictions import Restrictions, Space, restrict
from policies.composition_prior import load_composition_prior
from policies.pretrained import SHIPPED, Prior, load_policy, load_prior

USAGE = "python -m discover.generate n=1000 ['restrict.elements=[Fe,O]'] [output=DIR]"
KEPT = "kept"  # column of the table: which structure is, the crystal's own or one that `discover.predict` added
ENERGY = "chgnet_formation_energy_per_atom"  # eV/atom of that structure as it is, by CHGNet
FAILURE = "failure"  # column of the table: why a row has no structure, empty where it has one
_BATCH = 1000  # crystals drawn at once, or as many as are asked for
Letters = Literal["composition", "likeliest", "prior"]


@dataclass(frozen=True)
class Generated:
    """Consecutive draws."""

    crystals: CrystalBatch  # (n,) with the lattice of the structure, where there is one
    log_prob: Tensor | None  # (n,) float64 log probability (density) under the prior; None: its letters were not kept
    structures: list[Structure | None]  # (n,) conventional cells; None where none could be had
    found: list[Found | None] | None = None  # (n,) which structure was kept, where several were tried

    @property
    def failures(self) -> list[int]:
        """Return the rows without a structure."""
        return [row for row, structure in enumerate(self.structures) if structure is None]


def generate(
    n: int,
    *,
    prior: Prior | None = None,
    letters: Letters | None = None,
    restrictions: Restrictions | None = None,
    generator: StructureGenerator | None = None,
    predicted: int = 0,
    n_workers: int = 2,
    seed: int = 0,
) -> Generated:
    """Return `n` crystals of the prior with their structures.

    Args:
        n: How many are drawn.
        prior: What to draw from; None: the prior that ships, over crystals of any chemistry.
        letters: What writes space group and letters; None: see `default_letters`.
        restrictions: What the crystals may contain; None leaves the prior as it is, rare elements included.
        generator: Finds coordinates, and lattices unless ``letters="prior"``; None: the flow that ships, the best of
            eight draws without a potential. The command has `careful_generator(pick="chgnet")`.
        predicted: Structures that `discover.predict` adds to each crystal's own; the one of lowest CHGNet energy is
            kept.
        n_workers: Processes that compute them.
        seed: Of the crystals and of their coordinates.

    Raises:
        ConfigError: If lattices are restricted or `predicted` is asked, against ``letters``.
    """
    batches = list(
        generate_batches(
            n,
            prior=prior,
            letters=letters,
            restrictions=restrictions,
            generator=generator,
            predicted=predicted,
            n_workers=n_workers,
            seed=seed,
        )
    )
    log_probs = [batch.log_prob for batch in batches if batch.log_prob is not None]
    found = [item for batch in batches if batch.found is not None for item in batch.found]
    return Generated(
        CrystalBatch.cat([batch.crystals for batch in batches]),
        torch.cat(log_probs) if log_probs else None,
        [structure for batch in batches for structure in batch.structures],
        found if predicted else None,
    )


def default_letters(restrictions: Restrictions | None, generator: StructureGenerator | None) -> Letters:
    """Return "composition" where it can be had: where no lattice is restricted, and the shipped flow may find it."""
    bound = restrictions is not None and restrictions.binds_cells
    return "prior" if generator is not None or bound else "composition"


def generate_batches(
    n: int,
    *,
    prior: Prior | None = None,
    letters: Letters | None = None,
    restrictions: Restrictions | None = None,
    generator: StructureGenerator | None = None,
    predicted: int = 0,
    n_workers: int = 2,
    seed: int = 0,
) -> Iterator[Generated]:
    """Yield what `generate` returns, a thousand crystals at a time, with progress."""
    prior = _shipped() if prior is None else prior
    letters = default_letters(restrictions, generator) if letters is None else letters
    rewrite = letters != "prior"
    if rewrite and restrictions is not None and restrictions.binds_cells:
        raise ConfigError(
            f"letters={letters} leaves the lattice to the flow, which no restriction binds; use letters=prior, or "
            "drop the restriction of lengths, angles or volumes"
        )
    if predicted and not rewrite:
        raise ConfigError("predicted structures have letters and cells of their own, which letters=prior rules out")
    if generator is None:
        generator = careful_generator(lattice=lattice_mode(letters))
    env = environment(prior, restrictions)
    draws = seeded(seed, "generate")
    with tqdm(total=n, desc="generating", unit="crystal", disable=None, file=sys.stderr) as bar:
        for index, (crystals, log_prob) in enumerate(draw_crystals(env, prior.policy, n, draws, batch_size=_BATCH)):
            drawn = _rewritten(env, crystals, letters, seeded(seed, f"letters {index}")) if rewrite else crystals
            rng = seeded(seed, f"structures {index}")
            if predicted:
                yield searched(drawn, env, generator, generator, predicted, rng, n_workers=n_workers)
            else:
                structures = generator.generate(drawn, rng)
                yield Generated(with_lattices(drawn, structures), None if rewrite else log_prob, structures)
            bar.update(len(crystals))


def searched(
    crystals: CrystalBatch,
    env: CrystalEnv,
    generator: StructureGenerator,
    with_free_cell: StructureGenerator,
    n_predicted: int,
    rng: torch.Generator,
    *,
    n_workers: int,
) -> Generated:
    """Return the structure of lowest energy for each crystal (`discover.structure_search`)."""
    found = lowest_in_energy(
        crystals,
        generator=generator,
        with_free_cell=with_free_cell,
        n_predicted=n_predicted,
        space_groups=env.space_groups,
        look=partial(single_points, n_workers=n_workers),
        rng=rng,
        keep_unknown=True,
    )
    rows = [crystals.select([row]) if item is None else item.crystal for row, item in enumerate(found)]
    structures = [None if item is None else item.structure for item in found]
    return Generated(CrystalBatch.cat(rows), None, structures, found)


def _rewritten(env: CrystalEnv, crystals: CrystalBatch, letters: Letters, generator: torch.Generator) -> CrystalBatch:
    """Return crystals of the same compositions with space group and letters from the composition prior."""
    prior, contents, groups = load_composition_prior(), cell_contents(crystals), sorted(env.space_groups)
    if letters == "likeliest":
        return prior.propose(contents, 1, space_groups=groups).crystals
    return prior.sample(contents, 1, generator, space_groups=groups).crystals


@cache
def _shipped() -> Prior:
    return load_prior("any")


def lattice_mode(letters: Letters) -> LatticeMode:
    """Return what the flow does with lattices: it finds them, unless they are the prior's."""
    return "fixed" if letters == "prior" else "free"


def environment(prior: Prior, restrictions: Restrictions | None) -> CrystalEnv:
    """Return where the prior draws crystals under restrictions.

    Raises:
        RestrictionError: If they contradict each other or leave no crystal.
    """
    return prior.env if restrictions is None else _environment(restrict(prior.space, restrictions))


@lru_cache(maxsize=1)
def _environment(space: Space) -> CrystalEnv:
    return CrystalEnv(space)  # its tables take seconds, and calls in a row share them


def generated_table(generated: Generated, properties: Properties, ids: Sequence[str]) -> pd.DataFrame:
    """Return one row a crystal, with predicted properties and the reason where it has no structure."""
    crystals = generated.crystals
    columns: dict[Column, object] = {
        Column.CANDIDATE_ID: ids,
        **({} if generated.log_prob is None else {Column.LOG_PROB: generated.log_prob.numpy()}),
        **crystal_columns(crystals, properties.predict(crystals)),
    }
    table = pd.DataFrame({str(column): columns[column] for column in Column if column in columns})
    if generated.found is not None:
        kept = generated.found
        table[KEPT] = ["" if item is None else "predicted" if item.source == PREDICTED else "own" for item in kept]
        table[ENERGY] = [math.nan if item is None else item.look.formation_energy_per_atom for item in kept]
    table[FAILURE] = [NO_COORDINATES if structure is None else "" for structure in generated.structures]
    return table


def write_generated(folder: RunFolder, generated: Generated, table: pd.DataFrame, file_format: StructureFormat) -> None:
    """Write structures under the ids of the table, and the table as CSV."""
    named = zip(table[Column.CANDIDATE_ID], generated.structures, strict=True)
    built = {name: structure for name, structure in named if structure is not None}
    write_structures(folder.structures, built, file_format)
    folder.write(CSV, table.to_csv(index=False, float_format="%.6g"))


def figures(table: pd.DataFrame) -> dict[str, float]:
    """Return what a table of generated crystals amounts to."""
    return {
        "n": len(table),
        "structures": int((table[FAILURE] == "").sum()),
        "formulas": table[Column.FORMULA].nunique(),
        "space_groups": table[Column.SPACE_GROUP].nunique(),
        "median_formation_energy_per_atom": float(table[Column.FORMATION_ENERGY].median()),
        "mean_p_metastable": float(table[Column.P_METASTABLE].mean()),
    }


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(GenerateConfig, USAGE))
        return
    config = parse_args(GenerateConfig, words)
    torch.set_num_threads(config.threads)
    policy = load_policy(SHIPPED if config.prior is None else Path(config.prior) / "prior")
    prior = Prior(policy, config.chemistry, mixed_valence=config.mixed_valence)
    restrictions = config.restrict.to_restrictions()
    properties = build_properties(config.proxies)
    lattice = lattice_mode(config.letters or "composition")
    generator = careful_generator(
        config.structure,
        config.flow,
        lattice=lattice,
        n_draws=config.draws,
        pick=config.pick,
        n_workers=config.n_workers,
    )
    environment(prior, restrictions)  # before the folder, so that restrictions that leave nothing leave no folder
    folder = create_run_folder(config, name="generate", output=config.output, argv=list(words))
    generated = generate(
        config.n,
        prior=prior,
        letters=config.letters,
        restrictions=restrictions,
        generator=generator,
        predicted=config.predicted,
        n_workers=config.n_workers,
        seed=config.seed,
    )
    table = generated_table(generated, properties, numbered("g", config.n))
    write_generated(folder, generated, table, config.format)
    result = figures(table)
    folder.log("result", **result)
    print(f"{result['n']} crystals, {result['structures']} with a structure, in {folder.path}")
    if generated.failures:
        print(f"{len(generated.failures)} without: {NO_COORDINATES} ({CSV} names them in the column {FAILURE!r})")
    print(json.dumps(result))


if __name__ == "__main__":
    main_guard(main)
