"""Train the prior: the sampler's policy by exact maximum likelihood on real crystals.

The state graph is a tree, so the log-likelihood of a crystal is the sum of its decisions' log-probabilities; every
epoch sees each crystal in a random one of its equivalent letter assignments.
"""

import hashlib
import math
import sys
import time
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
from envs.equivalence import random_image
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

    epochs: int = 40
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.02
    dropout: float = 0.0
    width: int = 256
    depth: int = 3
    ema_decay: float = 0.998
    minutes: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class PriorFigures:
    """Likelihood of a set of crystals."""

    nll: float  # nats per crystal, equivalents merged
    nll_marginals: float  # the same for independent marginals, nan where none were fitted
    n: int  # crystals in the figures
    representable: float  # share of the stable rows that the space holds


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


def train_prior(data_path: Path | str, output: Path, settings: PriorTraining) -> PriorFigures:
    """Train on a CSV in the field's form and write ``prior.safetensors`` and ``prior.json`` to ``output``.

    The weights kept are those of the epoch with the lowest negative log-likelihood on one formula in twenty.
    """
    crystals, formulas = stable_crystals(prepare(data_path))
    env = CrystalEnv(prior_space())
    legal = walk(env, crystals).legal
    is_inner = torch.tensor([_fold(formula) == 0 for formula in formulas])
    inner = crystals.select((legal & is_inner).nonzero().flatten())
    outer = crystals.select((legal & ~is_inner).nonzero().flatten())
    torch.manual_seed(settings.seed)
    policy = CrystalPolicy(
        PolicyConfig.for_env(env, width=settings.width, depth=settings.depth, dropout=settings.dropout)
    )
    best, epoch = _fit(policy, env, outer, inner, settings)
    about = {
        "data": Path(data_path).name,
        "n_crystals": len(outer),
        "inner_nll": best,
        "best_epoch": epoch,
        "settings": asdict(settings),
        "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
    }
    save_policy(output / "prior", policy, about)
    return prior_figures(Prior(policy), inner, float(legal.double().mean()))


def prior_figures(
    prior: Prior, crystals: CrystalBatch, representable: float, train: CrystalBatch | None = None
) -> PriorFigures:
    """Return the likelihood of representable ``crystals``; with ``train``, that of independent marginals too."""
    log_prob = prior.log_prob(crystals)
    marginals = math.nan
    if train is not None:
        fitted = IndependentMarginals.fit(walk(prior.env, train).records)
        walks = walk(prior.env, crystals)
        images = log_prob - prior.policy.log_prob(walks.records, walks.n).detach()
        marginals = -float((fitted.log_prob(walks.records, walks.n) + images).mean())
    return PriorFigures(-float(log_prob.mean()), marginals, len(crystals), representable)


def evaluate_prior(data_path: Path | str, prior: Prior, train_path: Path | str | None = None) -> PriorFigures:
    """Return the likelihood of the stable crystals of a CSV; with the training CSV, the baseline's beside it."""
    crystals, _ = stable_crystals(prepare(data_path))
    legal = walk(prior.env, crystals).legal
    train = None
    if train_path is not None:
        train, _ = stable_crystals(prepare(train_path))
        train = train.select(walk(prior.env, train).legal.nonzero().flatten())
    return prior_figures(prior, crystals.select(legal.nonzero().flatten()), float(legal.double().mean()), train)


def _fit(
    policy: CrystalPolicy, env: CrystalEnv, train: CrystalBatch, inner: CrystalBatch, settings: PriorTraining
) -> tuple[float, int]:
    """Train ``policy`` in place, leave the best averaged weights in it, and return their inner NLL and epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    average = ExponentialMovingAverage(policy, settings.ema_decay)
    records, n_inner = merge([walk(env, inner)])
    batches = max(1, len(train) // settings.batch_size)
    n_steps, step, started = settings.epochs * batches, 0, time.monotonic()
    best, best_epoch, kept = math.inf, 0, {name: value.clone() for name, value in policy.state_dict().items()}
    for epoch in range(settings.epochs):
        order = torch.randperm(len(train), generator=generator)
        policy.train()
        bar = tqdm(range(batches), desc=f"epoch {epoch + 1}/{settings.epochs}", disable=None, file=sys.stderr)
        for index in bar:
            rows = order[index * settings.batch_size : (index + 1) * settings.batch_size]
            walks = walk(env, random_image(train.select(rows), env.space.box, generator))
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
            nll = -float(policy.log_prob(records, n_inner).mean())
            if nll < best:
                best, best_epoch = nll, epoch + 1
                kept = {name: value.clone() for name, value in policy.state_dict().items()}
        print(f"epoch {epoch + 1}: inner negative log-likelihood {nll:.3f} nats (best {best:.3f})", flush=True)
        if settings.minutes is not None and time.monotonic() - started > 60 * settings.minutes:
            break
    policy.load_state_dict(kept)
    return best, best_epoch


def _schedule(step: int, n_steps: int) -> float:
    """Return the factor of the learning rate: a short rise, then a cosine to a hundredth."""
    return min(1.0, (step + 1) / 200) * max(0.01, 0.5 * (1.0 + math.cos(math.pi * step / n_steps)))


def _fold(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS
