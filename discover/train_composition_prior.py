"""Train the composition-conditioned prior: p(space group, letters | composition) by exact maximum likelihood.

Every crystal is written as the smallest of its equivalents, so that the network need not spread its probability over
them. Crystals above 0.08 eV/atom and those without a label teach too, with a flag that says what they are; figures are
of stable ones, of formulas that were held out. What is kept are the averaged weights at the end of the schedule.
"""

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from discover.composition_corpus import Corpus, element_table, lattice_scale, split
from discover.data import prepare
from discover.run_folder import load_checkpoint, save_checkpoint
from envs import lattice
from envs.assignment import Compositions, canonical
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY
from policies.composition_network import STABLE, CompositionNetwork, NetworkConfig
from policies.composition_prior import CompositionPrior, save_composition_prior
from policies.ema import ExponentialMovingAverage
from policies.training_state import (
    check_same_training,
    digest,
    learning_rate_factor,
    restore_training,
    training_tensors,
)

_KIND = "composition prior"
_POOL = 8  # batches that are sorted by size together


@dataclass(frozen=True, kw_only=True)
class CompositionPriorTraining:
    """How the prior is trained."""

    epochs: int = 22
    batch_size: int = 512
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    other_weight: float = 0.5  # of crystals that are not known to be stable, beside 1 of the stable ones
    lattice_weight: float = 0.1
    smoothing: float = 0.02  # of the space group's target over the possible groups
    ema_decay: float = 0.999
    n_networks: int = 3  # members of the ensemble
    minutes: float | None = None  # of all networks together; the learning rate is annealed in this time
    seed: int = 0


@dataclass(frozen=True)
class Terms:
    """Negative log-likelihoods of a batch in nats, and the squared error of its lattices."""

    group: Tensor  # (n,)
    letters: Tensor  # (n,)
    lattice: Tensor  # (n,) mean over free coordinates, in units of their spread

    @property
    def nll(self) -> Tensor:
        """(n,) nats per crystal."""
        return self.group + self.letters


def evaluate_terms(network: CompositionNetwork, corpus: Corpus, *, smoothing: float = 0.0) -> Terms:
    """Return the terms of the loss, every decision given those before it.

    Args:
        network: In training or evaluation mode.
        corpus: The batch.
        smoothing: Share of the space group's target that is spread over the possible groups.
    """
    assignments = corpus.assignments
    compositions, group = assignments.compositions, assignments.group
    held = assignments.slot >= 0
    encoded = network.encode(compositions, corpus.stability)
    scores = network.group_scores(encoded).masked_fill(~corpus.group_mask, -torch.inf).log_softmax(dim=1)
    group_nll = -scores.gather(1, group[:, None])[:, 0]
    if smoothing > 0:
        possible = corpus.group_mask
        uniform = -scores.masked_fill(~possible, 0.0).sum(dim=1) / possible.sum(dim=1)
        group_nll = (1 - smoothing) * group_nll + smoothing * uniform

    group_vector = network.group_vectors()[group]
    positions = network.position_vectors()
    n, width = assignments.slot.shape
    row, step = held.nonzero().unbind(dim=1)
    slot, letter = assignments.slot[row, step], assignments.letter[row, step]
    element = encoded.elements[row, slot]
    placed = network.place(element, positions[group[row], letter])
    orbits = placed.new_zeros(n, width, placed.shape[1]).index_put((row, step), placed)
    earlier = torch.ones(width, width).tril(-1)
    same = (assignments.slot[:, :, None] == assignments.slot[:, None, :]) * earlier
    queries = network.letter_queries(
        element,
        encoded.summary[row],
        group_vector[row],
        (earlier @ orbits)[row, step],
        (same @ orbits)[row, step],
        corpus.n_left[row, step],
    )
    letter_scores = network.letter_scores(queries, network.key(positions), group[row], corpus.n_left[row, step])
    letter_scores = letter_scores.masked_fill(~corpus.letter_mask[row, step], -torch.inf).log_softmax(dim=1)
    chosen = -letter_scores.gather(1, letter[:, None])[:, 0]
    letters_nll = torch.zeros(n).index_add(0, row, chosen)

    system = SYMMETRY.lattice_system[group]
    mean, spread = network.lattice_mean[system], network.lattice_spread[system]
    free = lattice.IS_FREE[system]
    predicted = network.lattice_coordinates(encoded.summary, group_vector, orbits.sum(dim=1))
    wanted = (corpus.lattice.float() - mean) / spread.clamp(min=1e-3)
    error = F.smooth_l1_loss(predicted, wanted, reduction="none") * free
    return Terms(group_nll, letters_nll, error.sum(dim=1) / free.sum(dim=1))


class Trainer:
    """A network in training with all that is needed to continue it.

    Args:
        train: Crystals to learn from.
        inner: Stable crystals that choose the epoch.
        config: Sizes of the network.
        settings: How to train.
    """

    def __init__(self, train: Corpus, inner: Corpus, config: NetworkConfig, settings: CompositionPriorTraining) -> None:
        self.train, self.inner, self.settings = train, inner, settings
        torch.manual_seed(settings.seed)
        self.network = CompositionNetwork(config, element_table())
        self.network.seen[train.assignments.compositions.elements.unique()] = True
        self.network.lattice_mean, self.network.lattice_spread = lattice_scale(train)
        self.average = ExponentialMovingAverage(self.network, settings.ema_decay)
        self.optimiser = torch.optim.AdamW(_decayed(self.network, settings.weight_decay), lr=settings.lr)
        self.epoch = 0
        self.seconds = 0.0  # spent in the epochs so far
        self.history: list[dict[str, float]] = []
        data = digest(*vars(train.assignments.compositions).values(), train.assignments.slot, train.stability)
        self._identity = asdict(settings) | {"data": data}

    @property
    def progress(self) -> float:
        """How much of the schedule is over at the end of an epoch, 0 to 1, by epochs or by time."""
        return self._progress(float(self.epoch), self.seconds)

    def _progress(self, epochs: float, seconds: float) -> float:
        settings = self.settings
        over = epochs / settings.epochs
        if settings.minutes is not None:
            over = max(over, seconds / (60 * settings.minutes / settings.n_networks))
        return min(over, 1.0)

    def run_epoch(self) -> dict[str, float]:
        """Pass over the data once and return the figures on the inner split."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1000 + self.epoch)
        torch.manual_seed(settings.seed * 1000 + self.epoch)  # dropout; an epoch that is repeated repeats itself
        batches = self._batches(generator)
        self.network.train()
        seen, started = 0.0, time.monotonic()
        title = f"epoch {self.epoch + 1}/{settings.epochs}"
        for index, rows in enumerate(tqdm(batches, desc=title, disable=None, file=sys.stderr)):
            batch = self.train.select(rows)
            terms = evaluate_terms(self.network, batch, smoothing=settings.smoothing)
            weight = torch.where(batch.stability == STABLE, 1.0, settings.other_weight)
            loss = (weight * (terms.nll + settings.lattice_weight * terms.lattice)).sum() / weight.sum()
            over = self._progress(self.epoch + index / len(batches), self.seconds + time.monotonic() - started)
            for group in self.optimiser.param_groups:
                group["lr"] = settings.lr * learning_rate_factor(over)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 2.0)
            self.optimiser.step()
            self.average.update()
            seen += float(loss.detach())
        self.epoch += 1
        self.seconds += time.monotonic() - started
        with self.average.swapped_in():
            figures = inner_figures(self.network, self.inner)
        figures = {"epoch": self.epoch, "train_loss": seen / len(batches), **figures}
        self.history.append(figures)
        return figures

    def _batches(self, generator: torch.Generator) -> list[Tensor]:
        """Return the rows of each batch; crystals of like size go together, which saves padding."""
        sizes = self.train.assignments.compositions.counts.gt(0).sum(dim=1) * 32 + self.train.n_orbits
        pools = torch.randperm(len(self.train), generator=generator).split(_POOL * self.settings.batch_size)
        batches = [
            batch for pool in pools for batch in pool[sizes[pool].argsort(stable=True)].split(self.settings.batch_size)
        ]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def averaged(self) -> CompositionNetwork:
        """Return a copy of the network with the averaged weights."""
        with self.average.swapped_in():
            return copy.deepcopy(self.network)

    def save(self, stem: Path) -> None:
        """Write a checkpoint from which ``load`` continues."""
        tensors = training_tensors(self.network, self.average, self.optimiser)
        about = {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
            "config": asdict(self.network.config),
        }
        save_checkpoint(stem, _KIND, tensors, {**about, "settings": self._identity})

    def load(self, stem: Path) -> None:
        """Continue from what ``save`` wrote.

        Raises:
            CheckpointError: If the checkpoint is missing, or of a training with other settings or data.
        """
        tensors, state = load_checkpoint(stem, _KIND)
        check_same_training(stem, state["settings"], self._identity)
        restore_training(tensors, self.network, self.average, self.optimiser)
        self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])
        self.history = list(state["history"])


def inner_figures(network: CompositionNetwork, inner: Corpus) -> dict[str, float]:
    """Return likelihoods in nats per crystal, the share of space groups ranked first, and the lattice's error."""
    network.eval()
    parts, hits = [], 0
    with torch.no_grad():
        for rows in torch.arange(len(inner)).split(1024):
            batch = inner.select(rows)
            parts.append(evaluate_terms(network, batch))
            scores = network.group_scores(network.encode(batch.assignments.compositions, batch.stability))
            best = scores.masked_fill(~batch.group_mask, -torch.inf).argmax(dim=1)
            hits += int((best == batch.assignments.group).sum())
    return {
        "nll": float(torch.cat([part.nll for part in parts]).mean()),
        "nll_group": float(torch.cat([part.group for part in parts]).mean()),
        "nll_letters": float(torch.cat([part.letters for part in parts]).mean()),
        "lattice": float(torch.cat([part.lattice for part in parts]).mean()),
        "group_accuracy": hits / len(inner),
    }


def _decayed(network: CompositionNetwork, weight_decay: float) -> list[dict[str, object]]:
    """Return parameter groups: matrices decay, biases and norms do not."""
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def train_composition_prior(
    data_path: Path | str, output: Path, settings: CompositionPriorTraining, sizes: NetworkConfig | None = None
) -> dict[str, float]:
    """Train on a CSV in the field's form and write ``composition_prior.safetensors`` and ``.json`` to ``output``.

    Every network of the ensemble starts from its own seed. A training that was stopped goes on from the last epoch
    that it finished when it is called again with the same folder.

    Returns:
        Figures on one formula in twenty, which was held out.

    Raises:
        ConfigError: If the data leave nothing to train on or nothing to measure.
    """
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after training, where it cannot be written
    data = prepare(data_path)
    train, inner, held_out = split(data)
    config = NetworkConfig() if sizes is None else sizes
    networks = []
    for member in range(settings.n_networks):
        trainer = Trainer(train, inner, config, replace(settings, seed=settings.seed + member))
        stem = output / f"checkpoint-{member}"
        if stem.with_name(f"{stem.name}.json").is_file():
            trainer.load(stem)
        while trainer.progress < 1:
            figures = trainer.run_epoch()
            print(json.dumps({name: round(value, 4) for name, value in figures.items()}), flush=True)
            trainer.save(stem)
        networks.append(trainer.averaged())
    prior = CompositionPrior(networks)
    figures = ranking_figures(prior, held_out).as_dict()
    about = {
        "data": Path(data_path).name,
        "n_crystals": {"stable": int((train.stability == STABLE).sum()), "all": len(train)},
        "held_out": figures,
        "settings": asdict(settings),
        "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
    }
    save_composition_prior(output / "composition_prior", networks, about)
    return figures


@dataclass(frozen=True)
class RankingFigures:
    """How well the prior finds the space group and letters of known crystals from their compositions."""

    top: dict[int, float]  # {k: share of crystals among the k most probable proposals}
    nll: float  # nats per crystal, equivalents together
    n: int

    def as_dict(self) -> dict[str, float]:
        """Return the figures by name."""
        return {**{f"top_{k}": share for k, share in self.top.items()}, "nll": self.nll, "n": self.n}


def ranks(prior: CompositionPrior, crystals: CrystalBatch, n: int) -> Tensor:
    """Return (m,) int64 place of each crystal among the ``n`` proposals for its composition, 0 = first, n = absent."""
    place = torch.full((len(crystals),), n)
    for rows in tqdm(torch.arange(len(crystals)).split(64), desc="proposing", disable=None, file=sys.stderr):
        truth = crystals.select(rows)
        proposals = prior.propose(Compositions.of_crystals(truth).amounts(), n)
        wanted, found = _writing(truth), _writing(proposals.crystals)
        same = [wanted[query] == writing for query, writing in zip(proposals.query.tolist(), found, strict=True)]
        hits = torch.tensor(same).nonzero().flatten()
        first = torch.searchsorted(proposals.query, proposals.query[hits])
        place[rows[proposals.query[hits]]] = hits - first
    return place


def ranking_figures(prior: CompositionPrior, crystals: CrystalBatch, top: Sequence[int] = (1, 5, 20)) -> RankingFigures:
    """Return the shares of crystals that are among the most probable proposals, and their likelihood."""
    place = ranks(prior, crystals, max(top))
    nll = -prior.log_prob(crystals).mean()
    return RankingFigures({k: float((place < k).double().mean()) for k in top}, float(nll), len(crystals))


def _writing(crystals: CrystalBatch) -> list[tuple[object, ...]]:
    """Return space group, elements and letters of the smallest image of each crystal, comparable across batches."""
    assignments, _ = canonical(crystals)
    elements = assignments.crystals(crystals.lattice_parameters).elements
    rows = zip(assignments.group.tolist(), elements.tolist(), assignments.letter.tolist(), strict=True)
    return [
        (group, *((element, letter) for element, letter in zip(numbers, letters, strict=True) if element > 0))
        for group, numbers, letters in rows
    ]
