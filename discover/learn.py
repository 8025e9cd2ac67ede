"""Teach the proxies what an oracle found, without forgetting what they know.

Every round starts from the ensemble that the campaign started with and sees all labels and looks so far, so that a
round's proxies depend on nothing but those and can be made again. Half of each batch are labels, half is rehearsal:
crystals whose predictions must stay (pseudo-rehearsal, Robins 1995, Connection Science 7, 123), or rows of the user's
own data. How wrong the proxies were about the newest labels, before they learnt from them, sets their uncertainty.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from discover.train_proxy import TrainingData as ProxyData
from discover.train_proxy import augmented, run_buckets, training_loss
from envs.crystal import CrystalBatch
from proxies import PRETRAINED
from proxies.augment import AugmentConfig, draw_strain, random_alternative, strain
from proxies.ensemble import LEARNED, Calibration, PropertyEnsemble
from proxies.equation_of_state import EquationOfState
from proxies.features import featurise
from proxies.networks import OrbitNetwork

LABEL_ORDER = ("formation_energy_per_atom", "e_above_hull", "band_gap")
_PRIOR_LABELS = 10.0  # labels that the old uncertainty counts for against the newest ones
_WORST = 4.0  # standard deviations that one label counts for at most
_FACTORS = "std_factor"


@dataclass(frozen=True)
class Lesson:
    """Labelled crystals."""

    crystals: CrystalBatch
    labels: Tensor  # (n, 3) float64 in the order of `LABEL_ORDER`, NaN where unknown

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.crystals)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """How proxies learn from labels; the defaults were chosen on labelled samples of the untrained sampler."""

    passes: float = 25.0  # over the labels
    min_steps: int = 60
    max_steps: int = 600
    batch_size: int = 96  # labels per step, and as many rows of rehearsal
    learning_rate: float = 2e-4
    weight_decay: float = 0.02
    rehearsal_weight: float = 2.0

    def n_steps(self, n_labels: int) -> int:
        """Return the gradient steps for a number of labels."""
        return min(max(round(self.passes * n_labels / self.batch_size), self.min_steps), self.max_steps)


class Rehearsal:
    """Crystals on which an ensemble is to say what it said before, or what the data say.

    Args:
        crystals: Crystals like those that the ensemble is asked about; some are strained here, at random.
        ensemble: Whose predictions are kept.
        generator: Of the strain.
    """

    def __init__(self, crystals: CrystalBatch, ensemble: PropertyEnsemble, generator: torch.Generator) -> None:
        group = crystals.space_group
        always = torch.ones(len(crystals), dtype=torch.bool)
        strains = draw_strain(always, (group > 2) & (group < 195), AugmentConfig(), generator)
        self.crystals, _ = strain(crystals, *strains, EquationOfState.load(PRETRAINED / "equation_of_state.json"))
        self._outputs = [_outputs(member, self.crystals) for member in ensemble.members]

    def loss(self, network: OrbitNetwork, member: int, rows: Tensor) -> Tensor:
        """Return how far a network has moved from what `member` of the ensemble said, mean absolute difference."""
        return functional.l1_loss(_outputs(network, self.crystals.select(rows)), self._outputs[member][rows])

    def __len__(self) -> int:
        """Return the number of crystals."""
        return len(self.crystals)


class DataRehearsal:
    """Rows of a data set with their labels, as the ensemble was trained on them."""

    def __init__(self, data: ProxyData) -> None:
        self._data = data
        self._equation = EquationOfState.load(PRETRAINED / "equation_of_state.json")
        self._generator = torch.Generator().manual_seed(0)

    def loss(self, network: OrbitNetwork, member: int, rows: Tensor) -> Tensor:
        """Return the training loss on some of the rows."""
        del member
        chosen = self._data.train_rows[rows]
        crystals, labels = augmented(self._data, chosen, AugmentConfig(), self._equation, self._generator)
        features = featurise(crystals, network.properties, network.log_volumes)
        return training_loss(run_buckets(network, features), labels, 0.0)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._data.train_rows)


def learn(
    ensemble: PropertyEnsemble,
    lesson: Lesson,
    rehearsal: Rehearsal | DataRehearsal,
    *,
    looks: Lesson | None = None,
    settings: LearnSettings | None = None,
    seed: int = 0,
) -> PropertyEnsemble:
    """Return the ensemble after it has learnt from labels; the one given is left as it is.

    Args:
        ensemble: Where learning starts.
        lesson: Labels; rows without any are left out.
        rehearsal: What must not be forgotten.
        looks: What is known less well, half of what is learnt from.
        settings: None takes the defaults.
        seed: Of the batches.
    """
    settings = settings or LearnSettings()
    lessons = [_known(given) for given in (lesson, looks) if given is not None]
    if not len(lessons[0]):
        return ensemble
    lessons = [given for given in lessons if len(given)]
    members = [
        _taught(member, k, lessons, rehearsal, settings, torch.Generator().manual_seed(1000 * seed + k))
        for k, member in enumerate(ensemble.members)
    ]
    return PropertyEnsemble(members, ensemble.calibration, {**ensemble.facts, "n_labels_learnt": len(lessons[0])})


def std_factors(ensemble: PropertyEnsemble, newest: Lesson) -> dict[str, float]:
    """Return by how much the standard deviation of each property was too small on labels not yet learnt from.

    The square is the mean squared standardised error, with ten labels' worth of the old uncertainty, so that a few
    labels change little. Multiplied onto what `ensemble` was scaled by before.
    """
    before = dict(ensemble.facts.get(_FACTORS, {}))
    factors = {name: float(before.get(name, 1.0)) for name in LABEL_ORDER}
    if not len(newest):
        return factors
    raw = ensemble.raw_outputs(newest.crystals)
    for column, name in enumerate(LABEL_ORDER):
        std = ensemble.calibration.std[name](raw.std[name], raw.mean["e_above_hull"])
        z = (newest.labels[:, column] - raw.mean[name]) / std
        known = ~newest.labels[:, column].isnan()
        if name == "band_gap":  # mean and std are those of non-metals
            known = known & (newest.labels[:, column] > 0)
        squared = z[known].abs().clamp_max(_WORST) ** 2
        ratio = (_PRIOR_LABELS + float(squared.sum())) / (_PRIOR_LABELS + len(squared))
        factors[name] = float(before.get(name, 1.0)) * math.sqrt(ratio)
    return factors


def scaled(ensemble: PropertyEnsemble, factors: Mapping[str, float]) -> PropertyEnsemble:
    """Return the ensemble with its standard deviations multiplied by `factors`, relative to the unscaled ensemble."""
    before = ensemble.facts.get(_FACTORS, {})
    std = {
        name: ensemble.calibration.std[name].scaled(factors.get(name, 1.0) / float(before.get(name, 1.0)))
        for name in LEARNED
    }
    calibration = Calibration(std, ensemble.calibration.metal)
    return ensemble.with_calibration(calibration, {**ensemble.facts, _FACTORS: dict(factors)})


def _taught(
    member: OrbitNetwork,
    k: int,
    lessons: Sequence[Lesson],
    rehearsal: Rehearsal | DataRehearsal,
    settings: LearnSettings,
    generator: torch.Generator,
) -> OrbitNetwork:
    """Return a copy of member `k` that has seen the lessons, an equal share of each in every batch."""
    crystals, labels = CrystalBatch.cat([given.crystals for given in lessons]), torch.cat([x.labels for x in lessons])
    network = copy.deepcopy(member).requires_grad_(requires_grad=True)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    n_steps = settings.n_steps(len(crystals))
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
        rows, start = [], 0
        for given in lessons:
            n = min(settings.batch_size // len(lessons), 4 * len(given))
            rows.append(start + torch.randint(len(given), (n,), generator=generator))
            start += len(given)
        chosen = torch.cat(rows)
        old = torch.randint(len(rehearsal), (settings.batch_size,), generator=generator)
        seen = random_alternative(crystals.select(chosen), generator)
        features = featurise(seen, network.properties, network.log_volumes)
        loss = training_loss(run_buckets(network, features), labels[chosen].float(), 0.0)
        loss = loss + settings.rehearsal_weight * rehearsal.loss(network, k, old)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
    return network.eval().requires_grad_(requires_grad=False)


def _known(lesson: Lesson) -> Lesson:
    """Return the rows that have a label."""
    known = ~lesson.labels.isnan().all(dim=1)
    return Lesson(lesson.crystals.select(known), lesson.labels[known])


def _outputs(network: OrbitNetwork, crystals: CrystalBatch) -> Tensor:
    return run_buckets(network, featurise(crystals, network.properties, network.log_volumes))
