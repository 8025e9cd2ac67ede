"""Train the prior: the sampler's policy by exact maximum likelihood on real crystals.

The state graph is a tree, so the log-likelihood of a crystal is the sum of its decisions' log-probabilities; every
epoch sees each crystal in a random one of its equivalent letter assignments. One network learns two densities, told
apart by an input: that of all crystals, and that of the ionic ones under the masks of the charge rule.
"""

import hashlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from discover.data import PreparedData, prepare
from discover.errors import ConfigError
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.equivalence import log_n_images, random_image
from policies.ema import ExponentialMovingAverage
from policies.marginals import IndependentMarginals
from policies.policy import CrystalPolicy, PolicyConfig
from policies.pretrained import Prior, prior_space, save_policy
from policies.rollout import walk
from policies.trajectories import merge

STABLE = 0.08  # eV/atom above the hull, the criterion of MP-20
_INNER_FOLDS = 20  # one formula in twenty chooses the epoch


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """How the prior is trained."""

    epochs: int = 50
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.05
    width: int = 256
    depth: int = 3
    ema_decay: float = 0.998
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PriorFigures:
    """Likelihood of a set of crystals under one of the two densities."""

    nll: float  # nats per crystal, equivalents merged
    nll_marginals: float | None  # the same for independent marginals, None where none were fitted
    n: int  # crystals in the figures
    representable: float  # share of the stable rows that the space holds


CHEMISTRIES = ("any", "ionic")


def stable_crystals(data: PreparedData) -> tuple[CrystalBatch, list[str]]:
    """Return the crystals below 0.08 eV/atom above the hull and their formulas.

    Raises:
        ConfigError: If there is none.
    """
    above = data.labels["e_above_hull"]
    rows = torch.as_tensor(np.asarray(above) < STABLE).nonzero().flatten()
    if not len(rows):
        raise ConfigError(f"no row has e_above_hull < {STABLE} eV/atom; the prior learns from such crystals only")
    return data.crystals.select(rows), [str(data.formulas[int(row)]) for row in rows]


@dataclass(frozen=True)
class _Corpus:
    """The crystals that one of the two spaces can hold, split for training and for choosing the epoch."""

    env: CrystalEnv
    train: CrystalBatch
    inner: CrystalBatch


def train_prior(data_path: Path | str, output: Path, settings: PriorTraining) -> dict[str, float]:
    """Train on a CSV in the field's form and write ``prior.safetensors`` and ``prior.json`` to ``output``.

    The weights kept are those of the epoch with the lowest negative log-likelihood on one formula in twenty.

    Returns:
        That likelihood in nats per crystal, by chemistry.
    """
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after training, where it cannot be written
    crystals, formulas = stable_crystals(prepare(data_path))
    is_inner = torch.tensor([_fold(formula) == 0 for formula in formulas])
    corpora = {}
    for chemistry in CHEMISTRIES:
        env = CrystalEnv(prior_space(chemistry))
        legal = walk(env, crystals).legal
        corpora[chemistry] = _Corpus(
            env,
            crystals.select((legal & ~is_inner).nonzero().flatten()),
            crystals.select((legal & is_inner).nonzero().flatten()),
        )
        n_train, n_inner = len(corpora[chemistry].train), len(corpora[chemistry].inner)
        if not n_train or not n_inner:
            raise ConfigError(
                f"{len(crystals)} stable crystals leave {n_train} to train on and {n_inner} to choose the epoch with "
                f"(chemistry={chemistry}); both are needed, so give more data"
            )
    torch.manual_seed(settings.seed)
    sizes = PolicyConfig.for_env(
        corpora["any"].env, width=settings.width, depth=settings.depth, dropout=settings.dropout
    )
    policy = CrystalPolicy(sizes)
    best, epoch = _fit(policy, corpora, settings)
    about = {
        "data": Path(data_path).name,
        "n_crystals": {chemistry: len(corpus.train) for chemistry, corpus in corpora.items()},
        "inner_nll": best,
        "best_epoch": epoch,
        "settings": asdict(settings),
        "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
    }
    save_policy(output / "prior", policy, about)
    return best


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


def _fit(policy: CrystalPolicy, corpora: dict[str, _Corpus], settings: PriorTraining) -> tuple[dict[str, float], int]:
    """Train ``policy`` in place, leave the best averaged weights in it, and return their inner NLL and epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    average = ExponentialMovingAverage(policy, settings.ema_decay)
    inner = {chemistry: merge([walk(corpus.env, corpus.inner)]) for chemistry, corpus in corpora.items()}
    n_steps = settings.epochs * sum(1 for _ in _batches(corpora, settings.batch_size, generator))
    step, started, best_epoch = 0, time.monotonic(), 0
    best, kept = dict.fromkeys(corpora, math.inf), average.state_dict()
    for epoch in range(settings.epochs):
        policy.train()
        batches = list(_batches(corpora, settings.batch_size, generator))
        for corpus, rows in tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", disable=None, file=sys.stderr):
            seen = random_image(corpus.train.select(rows), corpus.env.space.box, generator)
            walks = walk(corpus.env, seen)
            loss = -policy.log_prob(walks.records, walks.n)[walks.legal].mean()
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * _schedule(step, n_steps)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 5.0)
            optimiser.step()
            average.update()
            step += 1
        policy.eval()
        with torch.no_grad(), average.swapped_in():
            nll = {name: -float(policy.log_prob(*walks).mean()) for name, walks in inner.items()}
        print(f"epoch {epoch + 1}: inner negative log-likelihood {nll} nats", flush=True)
        if sum(nll.values()) < sum(best.values()):
            best, best_epoch, kept = nll, epoch + 1, average.state_dict()
        if settings.minutes is not None and time.monotonic() - started > 60 * settings.minutes:
            break
    kept.pop("n_updates")
    policy.load_state_dict(kept)
    return best, best_epoch


def _batches(
    corpora: dict[str, _Corpus], size: int, generator: torch.Generator
) -> Iterator[tuple[_Corpus, torch.Tensor]]:
    """Yield the batches of an epoch, those of both spaces in random order."""
    batches = [
        (corpus, rows)
        for corpus in corpora.values()
        for rows in torch.randperm(len(corpus.train), generator=generator).split(size)
    ]
    for index in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[index]


def _schedule(step: int, n_steps: int) -> float:
    """Return the factor of the learning rate: a short rise, then a cosine to a hundredth."""
    return min(1.0, (step + 1) / 200) * max(0.01, 0.5 * (1.0 + math.cos(math.pi * step / n_steps)))


def _fold(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS
