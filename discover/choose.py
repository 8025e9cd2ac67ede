"""Which candidates of a round are checked, as structures.

Without a screen candidates are built, as their scores say, until the budget is spent. With one, several times as many
are built, each in several ways, and a single point of CHGNet says which structure of each is kept and, with the
proxies, which are worth a relaxation.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pymatgen.core import Structure
from torch import Tensor
from tqdm import tqdm

from discover.acquire import Picker, acquisition_scores, drawn_order, uncertainty
from discover.build import Parts, seeded
from discover.campaign_records import LOOKS, implied_hull, look_record, record_of
from discover.candidates import key_texts
from discover.config import RunConfig
from discover.labelling import LOOKING, labels_of, look_oracle
from discover.novelty import is_known
from discover.oracle.base import Label
from discover.oracle.hull import Hull
from discover.prototypes import prototype_keys
from discover.reward import non_metal_moments
from discover.screen import SCREENED, Trust, screened
from discover.store import Candidate, Labelled
from discover.structure_search import FREE_CELL, PREDICTED, SAMPLED, Found, lowest_in_energy
from envs.crystal import CrystalBatch
from proxies import PropertyEnsemble
from proxies.base import Prediction

_MOST_TRIED = 4  # candidates built per structure that is wanted
_BUT_ELEMENTS = 3  # limits: formula, set of elements, prototype; that on elements is the last
EXPLORE = "explore"
#: What is added to the name of a candidate whose structure is not what the sampler drew.
SUFFIXES = {SAMPLED: "", FREE_CELL: "f", PREDICTED: "p"}


@dataclass(frozen=True)
class Choice:
    """What a round checks, and what it took to choose."""

    proposed: list[Candidate]  # without structures
    chosen: list[Candidate]
    info: Mapping[str, Any]


@dataclass(frozen=True)
class Chooser:
    """Chooses candidates of one round.

    Args:
        config: The run.
        number: The round, from 1.
        parts: Reward, proxies and structure generator of the round.
        hull: Of energies above hull; None: the one that `start` implies.
        start: The proxies that the run began with; None where they are of a kind that implies no hull.
        earlier: What was chosen before.
        labelled: What is known of that.
        elsewhere: Formulas that other runs of the store have chosen.
    """

    config: RunConfig
    number: int
    parts: Parts
    hull: Hull | None
    start: PropertyEnsemble | None
    earlier: Sequence[Candidate]
    labelled: Sequence[Labelled]
    elsewhere: frozenset[str] = frozenset()
    _looks: list[Label] = field(default_factory=list, init=False)
    _records: list[Mapping[str, Any]] = field(default_factory=list, init=False)

    def choose(self, crystals: CrystalBatch, names: Sequence[str], log_reward: Tensor) -> Choice:
        """Return the candidates to check, with their structures.

        Without a screen, what could not be built is among them.

        Args:
            crystals: (m,) distinct crystals of the sampler.
            names: Their ids.
            log_reward: (m,) of each.
        """
        predictions = self.parts.properties.predict(crystals)
        proposed = candidates_of(self.number, crystals, names, predictions, log_reward)
        picker = self._picker(proposed)
        budget, started = self.config.round_budget(self.number), time.process_time()
        chosen: list[Candidate] = []
        unsure = uncertainty(predictions, self.parts.reward.needs or ("formation_energy_per_atom",))
        chosen += self._built(proposed, crystals, EXPLORE, unsure, unsure, self._n_explore, picker)
        left = budget - _n_built(chosen)
        score = self._score(crystals, predictions)
        if self.config.looks_per_check > 1:
            chosen += self._looked_at(proposed, crystals, score, left, picker, chosen)
        else:
            chosen += self._built(proposed, crystals, SAMPLED, score, self._ranking(score, "candidates"), left, picker)
        if _n_built(chosen) < budget:
            text = (
                f"round {self.number}: {_n_built(chosen)} of {budget} structures: no more candidates, or {_MOST_TRIED} "
                "times as many as were wanted tried"
            )
            if self.config.acquire.new:
                text += "; acquire.new=off takes compositions that are known or that other runs chose"
            print(text, file=sys.stderr)
        torch.set_num_threads(self.config.threads)  # a look in this process may have changed it
        in_workers = self.config.engine.workers != 0
        info = {
            "acquisition": self.config.acquire.name,
            "proposed": len(crystals),
            "per_check": self.config.looks_per_check,
            "looked_at": len(self._looks),
            LOOKS: self._records,
            "seconds": time.process_time() - started + in_workers * sum(look.seconds for look in self._looks),
        }
        return Choice(proposed, chosen, info)

    @property
    def _n_explore(self) -> int:
        """How many are chosen for being uncertain; the last round does not explore."""
        aimless = self.number == self.config.rounds or self.config.acquire.name == "random"
        return 0 if aimless else round(self.config.explore_share * self.config.round_budget(self.number))

    def _score(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        settings = self.config.acquire
        return acquisition_scores(
            settings.name,
            self.parts.reward,
            crystals,
            predictions,
            kappa=settings.kappa,
            generator=seeded(self.config.seed, f"acquire {self.number}"),
        )

    def _ranking(self, score: Tensor, of: str) -> Tensor:
        """Return the order in which candidates are taken, the highest first."""
        draws = seeded(self.config.seed, f"acquire {self.number} {of}")
        return drawn_order(score, self.config.acquire_temperature, draws)

    def _picker(self, proposed: Sequence[Candidate]) -> Picker:
        """Return what keeps a round from repeating itself, earlier rounds and, by default, what is known."""
        settings, budget = self.config.acquire, self.config.round_budget(self.number)
        names = [self._names(candidate) for candidate in proposed]
        # Where there is little to choose from, each formula, system, prototype and element gets an even share at least.
        limits = zip(
            (settings.per_formula, settings.per_system, settings.per_prototype, settings.per_element),
            (self.config.budget, budget, budget, budget),
            zip(*names, strict=True),
            strict=True,
        )
        seen = {candidate.key for candidate in self.earlier}
        known = self._known([item.formula for item in proposed]) if settings.new else [False] * len(proposed)
        return Picker(
            names,
            limits=[_limit(most, n, column) for most, n, column in limits],
            taken=[candidate.formula for candidate in self.earlier],
            excluded=[row for row, item in enumerate(proposed) if item.key in seen or known[row]],
        )

    def _names(self, candidate: Candidate) -> tuple[tuple[str, ...], ...]:
        """Return what the limits count; elements that every candidate has to have are no repetition."""
        elements = set(candidate.chemical_system.split("-")) - set(self.config.restrict.required or ())
        prototype = (candidate.prototype,) if candidate.prototype else ()
        return (candidate.formula,), (candidate.chemical_system,), prototype, tuple(sorted(elements))

    def _known(self, formulas: Sequence[str]) -> list[bool]:
        """Return which reduced formulas the training data, the hull file or other runs of the store hold."""
        taken = self.elsewhere | (frozenset() if self.hull is None else self.hull.formulas)
        return [bool(known) or formula in taken for known, formula in zip(is_known(formulas), formulas, strict=True)]

    # --- without a screen ------------------------------------------------------------------------

    def _built(
        self,
        proposed: Sequence[Candidate],
        crystals: CrystalBatch,
        source: str,
        score: Tensor,
        ranking: Tensor,
        n: int,
        picker: Picker,
    ) -> list[Candidate]:
        """Return candidates with structures, as ranked, until `n` are built; those that could not be come too."""
        found: list[Candidate] = []
        with tqdm(total=n, desc="building", disable=None if n else True, file=sys.stderr) as bar:
            while _n_built(found) < n and len(found) < _MOST_TRIED * n:
                rows = _take(picker, ranking, n - _n_built(found))
                if not rows:
                    break
                draws = seeded(self.config.seed, f"structures {self.number} {source} {len(found)}")
                structures = self.parts.generator.generate(crystals.select(rows), draws)
                for row, structure in zip(rows, structures, strict=True):
                    found.append(
                        replace(proposed[row], source=source, acquisition=float(score[row]), structure=structure)
                    )
                    bar.update(structure is not None)
        return found

    # --- with one --------------------------------------------------------------------------------

    def _looked_at(
        self,
        proposed: Sequence[Candidate],
        crystals: CrystalBatch,
        score: Tensor,
        n: int,
        picker: Picker,
        chosen: Sequence[Candidate],
    ) -> list[Candidate]:
        """Return `n` candidates by their scores once their structures have been looked at.

        Where too few can be built, more are tried.
        """
        per_check = self.config.looks_per_check
        pool = picker.widened(per_check)
        ranking = self._ranking(score, "candidates")
        taken = [candidate.key for candidate in (*self.earlier, *chosen)]
        candidates: dict[int, Candidate] = {}
        n_tried = 0
        while n and len(candidates) < n and n_tried < _MOST_TRIED * n * per_check:
            rows = _take(pool, ranking, (n - len(candidates)) * per_check)
            if not rows:
                break
            found = lowest_in_energy(
                crystals.select(rows),
                generator=self.parts.generator,
                with_free_cell=self.parts.with_free_cell,
                n_predicted=self.config.screen.predicted,
                space_groups=self.parts.env.space_groups,
                look=self._look,
                rng=seeded(self.config.seed, f"looks {self.number} {n_tried}"),
                taken=[*taken, *(candidate.key for candidate in candidates.values())],
            )
            kept = {row: item for row, item in zip(rows, found, strict=True) if item is not None}
            candidates |= self._screened(proposed, kept) if kept else {}
            n_tried += len(rows)
        order = torch.full((len(proposed),), -torch.inf, dtype=torch.float64)
        for row, candidate in candidates.items():  # prototypes are those of what was built
            order[row] = candidate.acquisition
            picker.names[row] = self._names(candidate)
        picker.exclude(row for row in range(len(proposed)) if row not in candidates)
        return [candidates[row] for row in _take(picker, self._ranking(order, "looked at"), n)]

    def _look(self, structures: Sequence[Structure]) -> list[Label]:
        oracle = look_oracle(self.config.oracle.time_limit)
        named = {str(place): structure for place, structure in enumerate(structures)}
        labels = dict(labels_of(self.config, oracle, named, description=LOOKING))
        self._looks.extend(labels.values())
        return [labels[name] for name in named]

    def _screened(self, proposed: Sequence[Candidate], kept: Mapping[int, Found]) -> dict[int, Candidate]:
        """Return the candidates of what was kept, scored by what is predicted of them now."""
        built = CrystalBatch.cat([item.crystal for item in kept.values()])
        proxies = self.parts.properties.predict(built)
        looks = [item.look for item in kept.values()]
        above = self._above_hull(built, list(kept.values()))
        # What is kept for later trust is what the tables said, or trust would correct its own corrections.
        plain = screened(proxies, looks, above, Trust({}, {}))
        score = self._score(built, screened(proxies, looks, above, trust_of(self.labelled)))
        names = [f"{proposed[row].candidate_id}{SUFFIXES[item.source]}" for row, item in kept.items()]
        self._records.extend(
            look_record(name, built, place, look.formation_energy_per_atom, above[place])
            for place, (name, look) in enumerate(zip(names, looks, strict=True))
        )
        reward = self.parts.reward.from_predictions(built, proxies)
        candidates = {}
        for place, (row, fresh) in enumerate(
            zip(kept, candidates_of(self.number, built, names, proxies, reward), strict=True)
        ):
            moments = {
                f"{SCREENED}{name}": (float(mean[place]), float(std[place]))
                for name, (mean, std) in _moments(plain).items()
            }
            candidates[row] = replace(
                fresh,
                source=kept[row].source,
                structure=kept[row].structure,
                acquisition=float(score[place]),
                predictions={**fresh.predictions, **moments},
            )
        return candidates

    def _above_hull(self, built: CrystalBatch, kept: Sequence[Found]) -> list[float]:
        """Return the energies above hull of structures as built, in eV/atom; NaN where unknown."""
        energies = [item.look.formation_energy_per_atom for item in kept]
        if self.hull is not None:
            return self.hull.e_above_hull([item.structure.composition for item in kept], energies).tolist()
        if self.start is None:
            return [math.nan] * len(kept)
        return (torch.tensor(energies, dtype=torch.float64) - implied_hull(self.start, built)).tolist()


def candidates_of(
    number: int,
    crystals: CrystalBatch,
    names: Sequence[str],
    predictions: Mapping[str, Prediction],
    log_reward: Tensor,
) -> list[Candidate]:
    """Return crystals of the sampler as the store takes them, without structures."""
    lettered = bool((crystals.letters >= 0).any())
    prototypes = prototype_keys(crystals).tolist() if lettered else [""] * len(crystals)
    columns = zip(
        names,
        key_texts(crystals),
        crystals.formulas(),
        crystals.chemical_systems(),
        crystals.space_group.tolist(),
        crystals.n_atoms.tolist(),
        prototypes,
        log_reward.tolist(),
        strict=True,
    )
    return [
        Candidate(
            candidate_id=name,
            round=number,
            source="sampler",
            crystal=record_of(crystals, row),
            key=key,
            formula=formula,
            chemical_system=system,
            space_group=group,
            n_atoms=n_atoms,
            prototype=str(prototype),
            log_reward=value,
            acquisition=value,
            predictions={prop: (float(item.mean[row]), float(item.std[row])) for prop, item in predictions.items()},
            structure=None,
        )
        for row, (name, key, formula, system, group, n_atoms, prototype, value) in enumerate(columns)
    ]


def trust_of(labelled: Sequence[Labelled]) -> Trust:
    """Return how far screened predictions are to be trusted, from the labels of what was screened."""
    seen = [item for item in labelled if any(name.startswith(SCREENED) for name in item.candidate.predictions)]
    found = {
        "formation_energy_per_atom": [item.label.formation_energy_per_atom for item in seen],
        "e_above_hull": [item.e_above_hull for item in seen],
        "band_gap": [item.label.band_gap if item.label.band_gap > 0 else math.nan for item in seen],
    }
    missing = (math.nan, math.nan)
    predicted = {
        name: [item.candidate.predictions.get(f"{SCREENED}{name}", missing) for item in seen] for name in found
    }
    return Trust.of(predicted, found)


def _moments(predictions: Mapping[str, Prediction]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of each property; of the band gap those of a non-metal."""
    return {
        name: non_metal_moments(item)[:2] if item.p_metal is not None else (item.mean, item.std)
        for name, item in predictions.items()
    }


def _limit(most: int | None, n: int, names: Sequence[Sequence[str]]) -> float:
    """Return how many of `n` may share a name: `most`, None being no limit, or an even share if that is more."""
    uses = [name for row in names for name in row]
    if most is None or not uses:
        return math.inf
    return max(most, math.ceil(n * len(uses) / (len(names) * len(set(uses)))))


def _n_built(candidates: Sequence[Candidate]) -> int:
    return sum(candidate.structure is not None for candidate in candidates)


def _take(picker: Picker, ranking: Tensor, n: int) -> list[int]:
    """Return up to `n` rows; where limits would leave budget, that on elements is lifted, and if need be all."""
    rows = picker.take(ranking, n)
    for first in (_BUT_ELEMENTS, 0):
        if len(rows) < n:
            picker.lift_limits(first)
            rows += picker.take(ranking, n - len(rows))
    return rows
