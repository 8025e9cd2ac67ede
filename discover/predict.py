"""``python -m discover.predict composition=TiO2``: crystal structures for a composition, the most likely first.

Proposals come from two sources, the composition-conditioned prior and known prototypes; a learned ranking pools them;
those without coordinates get them from the structure generator. Everything works on many compositions at once.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pandas as pd
import torch
from pymatgen.core import Structure
from torch import Tensor

from discover.build import build_properties, careful_generator, seeded
from discover.candidates import Column, crystal_columns
from discover.compositions import CompositionError, CompositionQuery, read_query
from discover.config import PredictConfig
from discover.data import batch_orbits, orbits_of_structure, prepare
from discover.errors import main_guard
from discover.options import help_text, parse_args
from discover.oracle.relax import Relaxation, RelaxSettings, relax
from discover.properties import Properties
from discover.proposals import SOURCES, Proposals
from discover.ranking import (
    FOUND_FREE,
    FOUND_RIGID,
    Ranking,
    arrangement_keys,
    found_probability,
    load_ranking,
    of_prior,
    propose_templates,
)
from discover.run_folder import RunFolder, check_new_folder, create_run_folder
from discover.structure.base import NO_COORDINATES, StructureGenerator, with_lattices
from discover.structure.flow_matching import FlowMatching
from discover.structure.orbits import to_structures
from discover.structure_files import StructureFormat, write_structures
from discover.templates import Templates, load_templates, retrieve, templates_of_data
from envs.crystal import CrystalBatch
from envs.wyckoff_operations import is_rigid
from policies.composition_prior import CompositionPrior, load_composition_prior

USAGE = "python -m discover.predict composition=TiO2 [n_formula_units=2] [space_group=136] [n=20] [output=DIR]"
CSV = "predictions.csv"
_LIKELY = 0.1  # probability from which a proposal is worth several draws
_SPARING_STEPS = 20  # of one draw for the others, of which there are many
_SHOWN = 10
#: Chance that the best of eight draws of coordinates and lattice, then a second, third, ... single one, is the first to
#: match, letters being right; the second line where letters leave nothing free but the lattice. A first draw that is a
#: single one, of unlikely letters or with draws=1, finds 0.05 fewer than is said here, one chosen by energy 0.06 more.
_GAINS = (FOUND_FREE, 0.035, 0.03, 0.02, 0.015, 0.01)
_GAINS_RIGID = (FOUND_RIGID, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4)
_RELAX_STEPS = 50  # of CHGNet, which puts most proposals in their order and costs seconds each
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9]")


@dataclass(frozen=True)
class Prediction:
    """One way to realise a composition."""

    structure: Structure | None  # None where no coordinates were found
    crystal: CrystalBatch  # one row: symmetry, letters and cell, that of the structure where there is one
    source: str  # one of `SOURCES`
    score: float  # the source's own, higher is better
    probability: float  # that this is the stable structure and nothing before it in the list is
    energy: float = math.nan  # eV/atom by CHGNet, where it was asked
    failure: str = ""  # why there is no structure, or no energy where it was asked


@dataclass(frozen=True)
class Sources:
    """Where proposals come from, and what ranks them.

    Args:
        prior: The composition-conditioned prior, or None.
        templates: Known prototypes, or None.
        ranking: Weighs prototypes and pools both sources; without it, and without prototypes, each source has its own
            order.
    """

    prior: CompositionPrior | None
    templates: Templates | None
    ranking: Ranking | None

    @classmethod
    def load(cls, source: str = "both", templates: Path | None = None) -> "Sources":
        """Return what ships.

        Args:
            source: "generator" for the prior, "templates" for known prototypes, "both".
            templates: A data set whose rows are searched for prototypes in place of the aggregate that ships.

        Raises:
            CheckpointError: If shipped weights are damaged.
            DataError: If the data set cannot be used.
        """
        prior = None if source == "templates" else load_composition_prior()
        if source == "generator":
            return cls(prior, None, None)
        known = load_templates() if templates is None else templates_of_data(prepare(templates))
        return cls(prior, known, load_ranking())

    def propose(
        self, compositions: Sequence[Mapping[str, int]], n: int, *, space_groups: Collection[int] | None = None
    ) -> tuple[Proposals, Tensor]:
        """Return up to `n` proposals for each composition, best first, and their weights (m,).

        The weight is the probability that a proposal is right and none before it is, coordinates that are still to be
        found taken for right. Prototypes that are not ranked have how alike their elements are, 1 for the same ones.

        Args:
            compositions: {element symbol: atoms in the primitive cell}.
            n: Proposals for each.
            space_groups: The only ones to propose; None: any.
        """
        known = self.templates
        if known is not None and space_groups is not None:
            known = known.select(torch.isin(known.space_group, torch.tensor(sorted(space_groups))))
        parts = []
        if self.prior is not None:
            parts.append(of_prior(self.prior, compositions, n, space_groups=space_groups))
        if known is not None and self.ranking is not None:
            parts.append(propose_templates(known, compositions))
        elif known is not None:
            parts.append(retrieve(known, [dict(composition) for composition in compositions], n))
        proposals = Proposals.cat(parts)
        if known is None or self.ranking is None:
            return proposals, proposals.score.exp()
        ranked, gain = self.ranking.rank(proposals, compositions, known)
        distinct = ~repeats_of_rigid(ranked)
        ranked, gain = ranked.select(distinct), gain[distinct]
        weight = torch.where(ranked.has_coordinates, gain, gain / found_probability(ranked.crystals))
        kept = _best_of_each(ranked.query, gain, n)
        return ranked.select(kept), weight[kept]


def repeats_of_rigid(proposals: Proposals) -> Tensor:
    """Return (m,) bool: given structures without free parameters that an earlier one of the composition equals.

    They have the same letters up to equivalence, and ratios of cell lengths and angles within about two per cent.
    """
    crystals = proposals.crystals
    cells = crystals.lattice_parameters
    ratios = (cells[:, 1:3] / cells[:, :1]).log().div(0.04).round().long()
    angles = cells[:, 3:].deg2rad().div(0.04).round().long()
    table = torch.cat([proposals.query[:, None], arrangement_keys(crystals)[:, None], ratios, angles], dim=1)
    repeated = torch.tensor(pd.DataFrame(table.numpy()).duplicated().tolist(), dtype=torch.bool)
    return repeated & is_rigid(crystals.space_group, crystals.letters) & proposals.has_coordinates


def with_repeats(proposals: Proposals, weight: Tensor) -> tuple[Proposals, Tensor, Tensor]:
    """Return proposals that may be realised several times, their weights and which draw of coordinates each is.

    Another draw of coordinates for likely letters can be worth more than a first one for unlikely letters. The weight
    of a draw is the chance that it is the first to be right: `weight` (m,) times what a draw of its number adds
    (``_GAINS``, match rates on one formula in forty of the training data). Proposals with coordinates stay as they are.
    """
    crystals = proposals.crystals
    rigid = is_rigid(crystals.space_group, crystals.letters)
    gains = torch.where(rigid[:, None], torch.tensor(_GAINS_RIGID), torch.tensor(_GAINS)).double()
    given = torch.zeros(gains.shape[1], dtype=torch.float64)
    given[0] = 1.0
    gains = torch.where(proposals.has_coordinates[:, None], given, gains)
    row, draw = gains.nonzero().unbind(dim=1)
    return proposals.select(row), weight[row] * gains[row, draw], draw


def predict(
    compositions: Sequence[Mapping[str, int]],
    n: int = 20,
    *,
    sources: Sources | None = None,
    generator: StructureGenerator | None = None,
    space_groups: Collection[int] | None = None,
    sparing: bool = True,
    rng: torch.Generator | None = None,
) -> list[list[Prediction]]:
    """Return up to `n` structures for the contents of each primitive cell, the most likely first.

    Args:
        compositions: {element symbol: atoms in the primitive cell}.
        n: Structures for each.
        sources: Where proposals come from; None: both that ship.
        generator: Finds coordinates of proposals that have none (see `build`); None: the flow that ships, the best of
            eight draws without a potential. The command has `careful_generator(pick="chgnet")`.
        space_groups: The only ones to propose; None: any.
        sparing: Give proposals that are not likely, and further ones of the same letters, one draw of few steps,
            where the generator is a flow.
        rng: Of the coordinates; None: seed 0.
    """
    queries = [CompositionQuery("", composition, {1: 1.0}) for composition in compositions]
    return predict_queries(
        queries, n, sources=sources, generator=generator, space_groups=space_groups, sparing=sparing, rng=rng
    )


def predict_queries(
    queries: Sequence[CompositionQuery],
    n: int = 20,
    *,
    sources: Sources | None = None,
    generator: StructureGenerator | None = None,
    space_groups: Collection[int] | None = None,
    sparing: bool = True,
    rng: torch.Generator | None = None,
) -> list[list[Prediction]]:
    """Return up to `n` structures for each query, over all sizes of its cell, the most likely first.

    The probability of a structure is p(Z) times its weight among the cells of Z formula units. The other arguments are
    those of `predict`.
    """
    sources = Sources.load() if sources is None else sources
    generator = careful_generator() if generator is None else generator
    rng = seeded(0, "predict") if rng is None else rng
    cells = [(row, query.cell(z), share) for row, query in enumerate(queries) for z, share in query.shares.items()]
    proposals, weight = sources.propose([cell for _, cell, _ in cells], n, space_groups=space_groups)
    proposals, probability, draw = with_repeats(proposals, weight)
    owner = torch.tensor([row for row, _, _ in cells])[proposals.query]
    probability = probability * torch.tensor([share for _, _, share in cells], dtype=torch.float64)[proposals.query]
    kept = _best_of_each(owner, probability, n)
    proposals, owner, probability = proposals.select(kept), owner[kept], probability[kept]
    # The first of a composition counts most, however unsure it is; further draws make up for what the first may lack.
    is_likely = (probability >= _LIKELY) | (torch.cat([torch.tensor([-1]), owner[:-1]]) != owner)
    is_likely = is_likely & (draw[kept] == 0) if sparing else torch.ones_like(is_likely)
    structures = build(proposals, is_likely, draw[kept], generator, rng)
    crystals = with_lattices(proposals.crystals, structures)
    results: list[list[Prediction]] = [[] for _ in queries]
    for row, structure in enumerate(structures):
        prediction = Prediction(
            structure=structure,
            crystal=crystals.select([row]),
            source=SOURCES[int(proposals.source[row])],
            score=float(proposals.score[row]),
            probability=float(probability[row]),
            failure="" if structure is not None else NO_COORDINATES,
        )
        results[int(owner[row])].append(prediction)
    return results


def build(
    proposals: Proposals, is_likely: Tensor, draw: Tensor, generator: StructureGenerator, rng: torch.Generator
) -> list[Structure | None]:
    """Return the structure of each proposal, in its conventional cell; None where no coordinates were found.

    Args:
        proposals: With or without coordinates.
        is_likely: (m,) bool, proposals that are worth the generator's own draws and steps.
        draw: (m,) how many draws of the same letters come before it.
        generator: Finds missing coordinates: as it is those of likely proposals, a flow with one draw of few steps the
            others. It starts a first draw from the mean of the lattices, further ones from all of them.
        rng: Of the coordinates.
    """
    complete = proposals.has_coordinates
    given = complete.nonzero().flatten()
    found: dict[int, Structure | None] = dict(
        zip(given.tolist(), to_structures(proposals.crystals.select(given), proposals.parameters[given]), strict=True)
    )
    quick = generator
    if isinstance(generator, FlowMatching):
        steps = min(generator.n_steps, _SPARING_STEPS)
        quick = replace(generator, n_draws=1, n_steps=steps, energies=None, lattice_temperature=0.0)
    is_first = draw == 0
    for finder, wanted in (
        (generator, is_likely & is_first),
        (quick, ~is_likely & is_first),
        (_varied(generator), is_likely & ~is_first),
        (_varied(quick), ~is_likely & ~is_first),
    ):
        rows = (wanted & ~complete).nonzero().flatten()
        if len(rows):
            found.update(zip(rows.tolist(), finder.generate(proposals.crystals.select(rows), rng), strict=True))
    return [found[row] for row in range(len(proposals))]


def _varied(generator: StructureGenerator) -> StructureGenerator:
    """Return what draws lattices too, where they are its own, and does not find the lowest energy once more."""
    if not isinstance(generator, FlowMatching):
        return generator
    return replace(generator, energies=None, lattice_temperature=1.0)


def rank_by_energy(
    predictions: Sequence[Prediction], settings: RelaxSettings, *, n_workers: int = 2
) -> list[Prediction]:
    """Return predictions of one composition after a relaxation with CHGNet, lowest energy per atom first.

    A relaxed structure takes the place of the one it came from, with symmetry and cell as they are found in it. What
    has no energy stays as it is, behind the rest, with the reason.
    """
    relaxations = relax([prediction.structure for prediction in predictions], settings, n_workers=n_workers)
    relaxed = [_with_energy(*pair) for pair in zip(predictions, relaxations, strict=True)]
    return sorted(relaxed, key=lambda prediction: (math.isnan(prediction.energy), prediction.energy))


def _with_energy(prediction: Prediction, relaxation: Relaxation) -> Prediction:
    if prediction.structure is None:
        return prediction
    if relaxation.structure is None:
        return replace(prediction, failure=relaxation.reason)
    crystal, _ = batch_orbits([orbits_of_structure(relaxation.structure)])
    return replace(prediction, structure=relaxation.structure, crystal=crystal, energy=relaxation.energy)


def _best_of_each(owner: Tensor, probability: Tensor, n: int) -> Tensor:
    """Return the rows of the `n` most probable of each owner, sorted by owner, then by probability."""
    order = probability.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    place = torch.arange(len(order)) - torch.searchsorted(owner[order], owner[order])
    return order[place < n]


# --- command -------------------------------------------------------------------------------------


class PredictionColumn(StrEnum):
    """Columns of the table of predictions beside those of the candidate table, in order."""

    RANK = "rank"
    FILE = "file"  # name of the structure, without suffix; empty where there is none
    N_FORMULA_UNITS = "n_formula_units"  # in the primitive cell
    SOURCE = "source"
    SCORE = "score"
    PROBABILITY = "probability"
    ENERGY = "energy_per_atom"  # eV/atom by CHGNet, empty where it was not asked
    FAILURE = "failure"  # why there is no structure or no energy


def prediction_table(
    predictions: Sequence[Prediction], query: CompositionQuery, properties: Properties
) -> pd.DataFrame:
    """Return one row a prediction, in their order, with predicted properties."""
    crystals = CrystalBatch.cat([prediction.crystal for prediction in predictions])
    n, formula = len(predictions), _NO_FILE_NAME.sub("", query.formula)
    stems = [
        f"{rank + 1:0{max(3, len(str(n)))}d}-{formula}-{g}" for rank, g in enumerate(crystals.space_group.tolist())
    ]
    own = {
        PredictionColumn.RANK: range(1, n + 1),
        PredictionColumn.FILE: [
            "" if prediction.structure is None else stem for prediction, stem in zip(predictions, stems, strict=True)
        ],
        PredictionColumn.N_FORMULA_UNITS: (crystals.n_atoms // sum(query.unit.values())).numpy(),
        PredictionColumn.SOURCE: [prediction.source for prediction in predictions],
        PredictionColumn.SCORE: [prediction.score for prediction in predictions],
        PredictionColumn.PROBABILITY: [prediction.probability for prediction in predictions],
        PredictionColumn.ENERGY: [prediction.energy for prediction in predictions],
        PredictionColumn.FAILURE: [prediction.failure for prediction in predictions],
    }
    known = crystal_columns(crystals, properties.predict(crystals))
    ordered = {str(column): own[column] for column in PredictionColumn} | {
        str(column): known[column] for column in Column if column in known
    }
    return pd.DataFrame(ordered)


def write_predictions(
    folder: RunFolder, predictions: Sequence[Prediction], table: pd.DataFrame, file_format: StructureFormat
) -> None:
    """Write structures under the names in the table, and the table as CSV."""
    named = zip(table[PredictionColumn.FILE], predictions, strict=True)
    built = {name: item.structure for name, item in named if item.structure is not None}
    write_structures(folder.structures, built, file_format)
    folder.write(CSV, table.to_csv(index=False, float_format="%.6g"))


def summary(table: pd.DataFrame) -> str:
    """Return the best of a table as text for a terminal."""
    columns: dict[str, str] = {
        PredictionColumn.RANK: "rank",
        PredictionColumn.N_FORMULA_UNITS: "Z",
        Column.SPACE_GROUP: "group",
        Column.WYCKOFF: "positions",
        PredictionColumn.SOURCE: "source",
        PredictionColumn.PROBABILITY: "prob.",
        PredictionColumn.ENERGY: "eV/atom",
        Column.DENSITY: "g/cm^3",
        Column.VOLUME_PER_ATOM: "Å^3/atom",
        Column.FORMATION_ENERGY: "E_form",
        Column.E_ABOVE_HULL: "E_hull",
        Column.BAND_GAP: "gap",
        PredictionColumn.FAILURE: "failure",
    }
    best = table.head(_SHOWN)[list(columns)].rename(columns=columns)
    shown = best.loc[:, [not (best[name].isna() | (best[name] == "")).all() for name in best]]
    return str(shown.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print what models say of a query beyond their training, one line each, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {message}", file=sys.stderr)


def run(config: PredictConfig, argv: Sequence[str]) -> tuple[RunFolder, pd.DataFrame]:
    """Predict what a configuration asks for; return the folder with everything in it, and the table."""
    torch.set_num_threads(config.threads)
    query = read_query(
        config.composition,
        n_formula_units=config.n_formula_units,
        space_group=config.space_group,
        chemistry=config.chemistry,
    )
    if config.output is not None:
        check_new_folder(Path(config.output))  # said before anything slow
    sources = Sources.load(config.source, None if config.templates is None else Path(config.templates))
    properties = build_properties(config.proxies)
    generator = careful_generator(config.structure, config.flow, n_draws=config.draws, pick=config.pick)
    with _warnings_as_lines():
        (predictions,) = predict_queries(
            [query],
            config.n,
            sources=sources,
            generator=generator,
            space_groups=None if config.space_group is None else [config.space_group],
            rng=seeded(config.seed, "predict"),
        )
    if not predictions:
        raise CompositionError(
            f"no known prototype is like {query.formula} with {', '.join(map(str, query.shares))} formula units; "
            "source=both or source=generator proposes structures without one"
        )
    if config.rank == "chgnet":
        settings = RelaxSettings(max_steps=_RELAX_STEPS if config.relax_steps is None else config.relax_steps)
        predictions = rank_by_energy(predictions, settings, n_workers=config.n_workers)
    folder = create_run_folder(config, name=f"predict-{query.formula}", output=config.output, argv=list(argv))
    table = prediction_table(predictions, query, properties)
    write_predictions(folder, predictions, table, config.format)
    return folder, table


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(PredictConfig, USAGE))
        return
    config = parse_args(PredictConfig, words)
    folder, table = run(config, words)
    print(summary(table))
    failures = int((table[PredictionColumn.FILE] == "").sum())
    print(f"{len(table) - failures} structures of {config.composition} in {folder.structures}")
    print(f"{folder / CSV} lists all of them")
    if failures:
        print(f"{failures} proposals have no structure; the column {PredictionColumn.FAILURE} says why")
    print(json.dumps({"n": len(table), "structures": len(table) - failures}))


if __name__ == "__main__":
    main_guard(main)
