"""Train the prior: the sampler's policy by exact maximum likelihood on real crystals.

The state graph is a tree, so the log-likelihood of a crystal is the sum of its decisions' log-probabilities; every
epoch sees each crystal in a random one of its equivalent letter assignments. One network learns two densities, told
apart by an input: that of all crystals, and that of the ionic ones under the masks of the charge rule.
"""

import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from discover.data import PreparedData, prepare
from discover.errors import ConfigError
from discover.oxidation import usual_charges
from discover.run_folder import load_checkpoint, save_checkpoint
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.equivalence import log_n_images, random_image
from policies.element_sharing import ordinary_weights, share_by_properties
from policies.ema import ExponentialMovingAverage
from policies.marginals import IndependentMarginals
from policies.policy import CrystalPolicy, PolicyConfig
from policies.pretrained import Prior, load_policy, prior_space, save_policy
from policies.rollout import walk
from policies.training_state import (
    check_same_training,
    digest,
    learning_rate_factor,
    part,
    restore_training,
    training_tensors,
)
from policies.trajectories import merge
from proxies.elements import element_properties

STABLE = 0.08  # eV/atom above the hull, the criterion of MP-20
NEARLY_STABLE = 0.3  # eV/atom above the hull; half as many crystals again, which the first epochs learn from too
_INNER_FOLDS = 20  # one formula in twenty chooses the epoch
_OXIDATION_STATES = range(-4, 9)
_KIND = "prior"  # of the checkpoint
_PROGRESS = ("epoch", "seconds", "best_nll", "best_epoch")


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """How the prior is trained."""

    epochs: int = 110
    pretraining: float = 0.6  # share of the training that sees the nearly stable crystals too, before the stable alone
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    width: int = 256
    depth: int = 3
    ema_decay: float = 0.998
    minutes: float | None = None  # the learning rate is annealed in this time, or with the epochs
    seed: int = 0


@dataclass(frozen=True)
class PriorFigures:
    """Likelihood of a set of crystals under one of the two densities."""

    nll: float  # nats per crystal, equivalents merged
    nll_marginals: float | None  # the same for independent marginals, None where none were fitted
    n: int  # crystals in the figures
    representable: float  # share of the stable rows that the space holds


CHEMISTRIES = ("any", "ionic")


def stable_crystals(data: PreparedData, limit: float = STABLE) -> tuple[CrystalBatch, list[str]]:
    """Return the crystals less than `limit` (eV/atom) above the hull and their formulas.

    Raises:
        ConfigError: If there is none.
    """
    above = data.labels["e_above_hull"]
    rows = torch.as_tensor(np.asarray(above) < limit).nonzero().flatten()
    if not len(rows):
        raise ConfigError(f"no row has e_above_hull < {limit} eV/atom; the prior learns from such crystals only")
    return data.crystals.select(rows), [str(data.formulas[int(row)]) for row in rows]


@dataclass(frozen=True)
class Corpus:
    """The crystals that one of the two spaces can hold, split for training and for choosing the epoch."""

    env: CrystalEnv
    nearly_stable: CrystalBatch
    stable: CrystalBatch
    inner: CrystalBatch  # stable too


def train_prior(
    data_path: Path | str, output: Path, settings: PriorTraining, *, start: Path | None = None
) -> dict[str, float]:
    """Train on a CSV in the field's form and write ``prior.safetensors`` and ``prior.json`` to ``output``.

    The weights kept are those of the epoch with the lowest negative log-likelihood on one formula in twenty. Called
    again with the same arguments it continues from the checkpoint in ``output``.

    Args:
        data_path: The data.
        output: Receives the weights.
        settings: How.
        start: Folder of a prior to start from, see `Trainer`; None starts from nothing.

    Returns:
        That likelihood in nats per crystal, by chemistry.

    Raises:
        ConfigError: If the data leave nothing to train on.
        CheckpointError: If ``start`` holds no prior, or ``output`` the checkpoint of a training with other settings.
    """
    begun = None if start is None else load_policy(start / "prior")
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after training, where it cannot be written
    corpora = corpora_of(prepare(data_path))
    trainer = Trainer(corpora, settings, begun)
    stem = output / "checkpoint"
    if stem.with_name("checkpoint.json").is_file():
        trainer.load(stem)
    while trainer.progress < 1.0:
        nll = trainer.run_epoch()
        print(f"epoch {trainer.epoch}: inner negative log-likelihood {nll} nats", flush=True)
        trainer.save(stem)
    about = {
        "data": Path(data_path).name,
        "n_crystals": {chemistry: len(corpus.stable) for chemistry, corpus in corpora.items()},
        "n_nearly_stable": {chemistry: len(corpus.nearly_stable) for chemistry, corpus in corpora.items()},
        "inner_nll": trainer.best_nll,
        "best_epoch": trainer.best_epoch,
        "epochs": trainer.epoch,
        "minutes": round(trainer.seconds / 60, 1),
        "settings": asdict(settings),
        "start": None if start is None else start.resolve().name,
        "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
    }
    save_policy(output / "prior", trainer.best(), about)
    return trainer.best_nll


def corpora_of(data: PreparedData) -> dict[str, Corpus]:
    """Return what the space of each chemistry holds of the data.

    Raises:
        ConfigError: If nothing is left to train on or to choose the epoch with.
    """
    corpora = {}
    for chemistry in CHEMISTRIES:
        env = CrystalEnv(prior_space(chemistry))
        stable, inner = _split(env, data, STABLE)
        nearly_stable, _ = _split(env, data, NEARLY_STABLE)
        if not len(stable) or not len(inner):
            raise ConfigError(
                f"the stable crystals leave {len(stable)} to train on and {len(inner)} to choose the epoch with "
                f"(chemistry={chemistry}); both are needed, so give more data"
            )
        corpora[chemistry] = Corpus(env, nearly_stable, stable, inner)
    return corpora


def _split(env: CrystalEnv, data: PreparedData, limit: float) -> tuple[CrystalBatch, CrystalBatch]:
    """Return the crystals below `limit` (eV/atom above the hull) that `env` holds: to train on, and held out."""
    crystals, formulas = stable_crystals(data, limit)
    legal = walk(env, crystals).legal
    held_out = torch.tensor([_fold(formula) == 0 for formula in formulas])
    train, inner = (crystals.select((legal & rows).nonzero().flatten()) for rows in (~held_out, held_out))
    return train, inner


def evaluate_prior(data_path: Path | str, prior: Prior, train_path: Path | str | None = None) -> PriorFigures:
    """Return the likelihood of the stable crystals of a CSV; with the training CSV, the baseline's beside it."""
    crystals, _ = stable_crystals(prepare(data_path))
    legal = walk(prior.env, crystals).legal
    crystals = crystals.select(legal.nonzero().flatten())
    log_prob = prior.log_prob(crystals)
    marginals = None
    if train_path is not None:
        train, _ = stable_crystals(prepare(train_path))
        fitted = IndependentMarginals.fit(
            walk(prior.env, train.select(walk(prior.env, train).legal.nonzero().flatten())).records
        )
        walks = walk(prior.env, crystals)
        merged = fitted.log_prob(walks.records, walks.n) + log_n_images(crystals, prior.space.box)
        marginals = -float(merged.mean())
    return PriorFigures(-float(log_prob.mean()), marginals, len(crystals), float(legal.double().mean()))


def properties_of_elements(env: CrystalEnv) -> Tensor:
    """Return (n_elements, d) standardised physical properties, and which oxidation states each element has."""
    numbers = [element.atomic_number for element in env.elements]
    states = torch.tensor([[q in element.oxidation_states for q in _OXIDATION_STATES] for element in env.elements])
    return torch.cat([torch.from_numpy(element_properties()[numbers]), states.float()], dim=1)


class Trainer:
    """The prior in training, with all that is needed to continue it.

    A training that starts from a prior sees the stable crystals alone, and lets the policy reckon with charges. Learned
    from the beginning charges do harm (`docs/choices.md`).

    Args:
        corpora: What to learn from, by chemistry.
        settings: How; the sizes are those of `start` where there is one.
        start: Where the weights come from; None: nowhere.
    """

    def __init__(self, corpora: dict[str, Corpus], settings: PriorTraining, start: CrystalPolicy | None = None) -> None:
        self.corpora, self.settings, self.refines = corpora, settings, start is not None
        torch.manual_seed(settings.seed)
        env = next(iter(corpora.values())).env
        sizes = PolicyConfig.for_env(env, width=settings.width, depth=settings.depth, dropout=settings.dropout)
        if start is not None:
            charges = start.config.assignments or usual_charges([element.atomic_number for element in env.elements])
            sizes = replace(sizes, width=start.config.width, depth=start.config.depth, assignments=charges)
        self.policy = CrystalPolicy(sizes)
        if start is not None:
            self.policy.load_state_dict(self.policy.state_dict() | start.state_dict())
        share_by_properties(self.policy, properties_of_elements(env))
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.average = ExponentialMovingAverage(self.policy, settings.ema_decay)
        self.epoch, self.seconds = 0, 0.0
        self.best_nll, self.best_epoch = dict.fromkeys(corpora, math.inf), 0
        self._kept = self._averaged()
        data = (rows for corpus in corpora.values() for rows in (corpus.nearly_stable, corpus.stable, corpus.inner))
        self._identity = asdict(settings) | {
            "data": digest(*(x for rows in data for x in vars(rows).values())),
            "start": None if start is None else digest(*start.state_dict().values()),
        }
        self._inner = {name: merge([walk(corpus.env, corpus.inner)]) for name, corpus in corpora.items()}

    @property
    def progress(self) -> float:
        """How much of the schedule is over at the end of an epoch, 0 to 1, by epochs or by time."""
        return self._progress(float(self.epoch), self.seconds)

    def _progress(self, epochs: float, seconds: float) -> float:
        over = epochs / self.settings.epochs
        if self.settings.minutes is not None:
            over = max(over, seconds / (60.0 * self.settings.minutes))
        return min(over, 1.0)

    @property
    def lesson(self) -> list[tuple[CrystalEnv, CrystalBatch]]:
        """What the coming epoch learns from: each chemistry's space and crystals."""
        pretraining = not self.refines and self.progress < self.settings.pretraining
        return [
            (corpus.env, corpus.nearly_stable if pretraining else corpus.stable) for corpus in self.corpora.values()
        ]

    def run_epoch(self) -> dict[str, float]:
        """Pass over the data once and return the negative log-likelihoods on the inner split, nats per crystal."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1000 + self.epoch)
        torch.manual_seed(settings.seed * 1000 + self.epoch)  # dropout; an epoch that is repeated repeats itself
        batches = _batches(self.lesson, settings.batch_size, generator)
        started = time.monotonic()
        self.policy.train()
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        for index, (env, crystals) in enumerate(tqdm(batches, desc=title, disable=None, file=sys.stderr)):
            walks = walk(env, random_image(crystals, env.space.box, generator))
            loss = -self.policy.log_prob(walks.records, walks.n)[walks.legal].mean()
            over = self._progress(self.epoch + index / len(batches), self.seconds + time.monotonic() - started)
            for group in self.optimiser.param_groups:
                group["lr"] = settings.lr * learning_rate_factor(over)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.policy.parameters(), 5.0)
            self.optimiser.step()
            self.average.update()
        self.epoch += 1
        self.seconds += time.monotonic() - started
        self.policy.eval()
        with torch.no_grad(), self.average.swapped_in():
            nll = {name: -float(self.policy.log_prob(*walks).mean()) for name, walks in self._inner.items()}
        if sum(nll.values()) < sum(self.best_nll.values()):
            self.best_nll, self.best_epoch, self._kept = nll, self.epoch, self._averaged()
        return nll

    def best(self) -> CrystalPolicy:
        """Return a policy with the averaged weights of the best epoch."""
        policy = CrystalPolicy(self.policy.config)
        policy.load_state_dict(self._kept)
        return policy

    def save(self, stem: Path) -> None:
        """Write a checkpoint from which ``load`` continues."""
        tensors = training_tensors(self.policy, self.average, self.optimiser)
        tensors |= {f"kept.{name}": value for name, value in self._kept.items()}
        state = {name: getattr(self, name) for name in _PROGRESS}
        save_checkpoint(stem, _KIND, tensors, {**state, "settings": self._identity})

    def load(self, stem: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            CheckpointError: If the checkpoint is missing, or of a training with other settings or data.
        """
        tensors, state = load_checkpoint(stem, _KIND)
        check_same_training(stem, state["settings"], self._identity)
        restore_training(tensors, self.policy, self.average, self.optimiser)
        self._kept = part(tensors, "kept.")
        for name in _PROGRESS:
            setattr(self, name, state[name])

    def _averaged(self) -> dict[str, Tensor]:
        with self.average.swapped_in():
            return ordinary_weights(self.policy)


def _batches(
    data: Sequence[tuple[CrystalEnv, CrystalBatch]], size: int, generator: torch.Generator
) -> list[tuple[CrystalEnv, CrystalBatch]]:
    """Return the batches of an epoch, those of both spaces in random order."""
    batches = [
        (env, crystals.select(rows))
        for env, crystals in data
        for rows in torch.randperm(len(crystals), generator=generator).split(size)
    ]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def _fold(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS
