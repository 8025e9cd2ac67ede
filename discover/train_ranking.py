"""Train the ranking of proposals on crystals whose own formula is hidden from the templates.

``python -m discover.train_ranking data=PATH``: for every training crystal the prototypes of other formulas are its
hypotheses, and those that fingerprints call equal to it are right. The loss is minus the log of the probability on
them. Two networks are trained, for templates that are rows of a data set and for the aggregate; the aggregate of the
second is made without the formulas that it is trained on.
"""

import hashlib
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from discover.data import prepare
from discover.errors import main_guard
from discover.options import option, parse_args
from discover.proposals import Proposals
from discover.ranking import (
    N_HYPOTHESES,
    N_PRIOR,
    Hypotheses,
    Kind,
    Pool,
    Ranking,
    RankingNetwork,
    arrangement_keys,
    cover,
    describe,
    found_probability,
    hypotheses_of,
    of_prior,
    save_ranking,
)
from discover.structure.fingerprint import match_probability, pairwise_distances
from discover.templates import Query, Templates, as_proposals, templates_of_data
from discover.train_templates import aggregate
from policies.composition_prior import CompositionPrior, load_composition_prior

_FOLDS = 20
_HIDDEN_FOLDS = 5  # that the aggregate which trains a network has not seen
_POOL_QUERIES = 600
_POWERS, _UNSEEN, _FOUND = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (1e-6, 1e-3), (1.0, 0.9, 0.8)
_TOP = (1, 5, 20)
_FLOOR = 1e-4  # smallest probability that a hypothesis is right, where none is


@dataclass(frozen=True, kw_only=True)
class RankingTraining:
    """Everything `python -m discover.train_ranking` can be told."""

    data: str = option("", "CSV, folder of CIF files or extxyz file with the crystals")
    output: str = option("ranking", "stem of the files to write; what ships is discover/pretrained/ranking")
    n_queries: int = option(25000, "crystals whose structure is to be found, at most")
    epochs: int = option(6, "passes over them")
    batch_size: int = option(64, "crystals per step")
    lr: float = option(2e-3, "largest learning rate")
    weight_decay: float = option(1e-3, "of AdamW")
    seed: int = option(0, "of everything random")
    n_workers: int = option(2, "processes that analyse structures")


@dataclass(frozen=True)
class Examples:
    """Compositions with their hypotheses and which of them are right."""

    hypotheses: Hypotheses  # (n, N_HYPOTHESES, ...)
    right: Tensor  # (n, N_HYPOTHESES) float32 probability that a hypothesis is equal to the true structure
    n_hypotheses: Tensor  # (n,) int64

    def __len__(self) -> int:
        """Return the number of compositions."""
        return len(self.right)

    def select(self, rows: Tensor) -> "Examples":
        """Return the examples at `rows`."""
        parts = (self.hypotheses.seen, self.hypotheses.given, self.hypotheses.shares, self.hypotheses.scalars)
        return Examples(Hypotheses(*(part[rows] for part in parts)), self.right[rows], self.n_hypotheses[rows])


def formula_folds(formulas: Iterable[str]) -> NDArray[np.int64]:
    """Return the fold, 0 to 19, of each reduced formula; fold 0 is held out, as it is by the priors."""
    return np.array([int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) % _FOLDS for name in formulas])


def query_of(crystals: Templates, row: int) -> Query:
    """Return the composition of one row of a data set."""
    counts = tuple(n for n in crystals.kind_counts[row].tolist() if n)
    return Query(crystals.kind_elements[row, : len(counts), 0], counts, str(crystals.formulas[row]))


def make_examples(templates: Templates, crystals: Templates, rows: Sequence[int], *, progress: bool = True) -> Examples:
    """Return the hypotheses about crystals that templates of other formulas make.

    Crystals about which there is no hypothesis are left out.

    Args:
        templates: Where hypotheses come from.
        crystals: Templates that are the rows of a data set.
        rows: Of the crystals that are asked for.
        progress: Show a bar.
    """
    place = {row: i for members in crystals.groups.values() for i, row in enumerate(members.tolist())}
    width = crystals.kind_counts.shape[1]
    parts: list[tuple[Tensor, ...]] = []
    for row in tqdm(rows, desc="hypotheses", disable=None if progress else True, file=sys.stderr):
        query = query_of(crystals, row)
        counts = query.counts
        found = hypotheses_of(templates, query, other_formulas=True)
        if not len(found.rows):
            continue
        truth = crystals.fingerprints(counts)[place[row]][None]
        same_group = templates.space_group[found.rows] == crystals.space_group[row]
        right = match_probability(pairwise_distances(found.fingerprints, truth)[:, 0], same_group)
        described = describe(templates, query, found)
        missing, kinds = N_HYPOTHESES - len(right), width - len(counts)
        both = (0, kinds, 0, missing)
        pad = torch.nn.functional.pad
        parts.append(
            (
                pad(described.seen, both).to(torch.uint8),
                pad(described.given, both).to(torch.uint8),
                pad(described.shares, both),
                pad(described.scalars, (0, 0, 0, missing)),
                pad(right.float(), (0, missing)),
                torch.tensor(len(right)),
            )
        )
    seen, given, shares, scalars, right, n = (torch.stack(column) for column in zip(*parts, strict=True))
    return Examples(Hypotheses(seen.long(), given.long(), shares, scalars), right, n)


def ranking_loss(network: RankingNetwork, examples: Examples) -> Tensor:
    """Return (n,) minus the log of the probability that the network puts on the right hypotheses."""
    exists = torch.arange(examples.right.shape[1]) < examples.n_hypotheses[:, None]
    log_p = torch.log_softmax(network(examples.hypotheses).masked_fill(~exists, -torch.inf), dim=1)
    return -torch.logsumexp(log_p + examples.right.clamp(min=_FLOOR).log(), dim=1)


def fit(examples: Examples, held_out: Examples, settings: RankingTraining) -> tuple[RankingNetwork, float]:
    """Return a trained network and its mean loss on held-out formulas, in nats."""
    torch.manual_seed(settings.seed)
    network = RankingNetwork()
    network.standardise(examples.select(torch.randperm(len(examples))[:500]).hypotheses)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    n_steps, step = settings.epochs * math.ceil(len(examples) / settings.batch_size), 0
    inner = math.inf
    for epoch in range(settings.epochs):
        network.train()
        batches = torch.randperm(len(examples)).split(settings.batch_size)
        for rows in tqdm(batches, desc=f"epoch {epoch + 1}/{settings.epochs}", disable=None, file=sys.stderr):
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * _schedule(step, n_steps)
            optimiser.zero_grad(set_to_none=True)
            ranking_loss(network, examples.select(rows)).mean().backward()
            optimiser.step()
            step += 1
        network.eval()
        with torch.no_grad():
            parts = [ranking_loss(network, held_out.select(rows)) for rows in torch.arange(len(held_out)).split(256)]
        inner = float(torch.cat(parts).mean())
        print(f"epoch {epoch + 1}: held-out loss {inner:.4f} nats", flush=True)
    return network, inner


def fit_pool(
    ranking: Ranking, templates: Templates, crystals: Templates, rows: Sequence[int], prior: CompositionPrior
) -> tuple[Pool, dict[str, list[float]]]:
    """Return the pooling that finds most structures of held-out formulas, and the figures of all that were tried.

    Figures are the means of the largest probability among the first 1, 5, 20 proposals to be equal to the true
    structure, by fingerprints; the choice maximises their sum.

    Args:
        ranking: With trained networks; its own pools do not matter.
        templates: The prototypes, of one kind.
        crystals: Templates that are the rows of a data set.
        rows: Of the crystals that are asked for; their formulas are unknown to the networks and to the prior.
        prior: Of compositions.
    """
    tables = []
    place = {row: i for members in crystals.groups.values() for i, row in enumerate(members.tolist())}
    for row in tqdm(rows, desc="held-out compositions", disable=None, file=sys.stderr):
        query = query_of(crystals, row)
        known = ranking.prototypes(templates, query, other_formulas=True)
        parts = [of_prior(prior, [query.composition()], N_PRIOR)]
        if len(known.log_weight):
            found = hypotheses_of(templates, query, other_formulas=True)
            parts.append(as_proposals(templates, query, found, 0))
        proposals = Proposals.cat(parts)
        elements = crystals.kind_elements[row : row + 1, : len(query.counts), 0]
        truth = arrangement_keys(crystals.realise(torch.tensor([row]), elements)[0])
        right = (arrangement_keys(proposals.crystals) == truth).double() * found_probability(proposals.crystals)
        if len(known.log_weight):
            same_group = known.space_group == crystals.space_group[row]
            distances = pairwise_distances(known.fingerprints, crystals.fingerprints(query.counts)[place[row]][None])
            right[proposals.has_coordinates] = match_probability(distances[:, 0], same_group).double()
        tables.append((proposals, query, known, right))
    shares = {}
    tried = [Pool(*values) for values in itertools.product(_POWERS, _UNSEEN, _FOUND)]
    for pool in tqdm(tried, desc="pooling", disable=None, file=sys.stderr):
        pooling = Ranking(ranking.networks, dict.fromkeys(ranking.networks, pool))
        first = []
        for proposals, query, known, right in tables:
            order, _ = cover(*pooling.weigh(proposals, query, known), n=max(_TOP))
            first.append([float(right[order[:k]].max()) for k in _TOP])
        shares[pool] = np.mean(first, axis=0)
    figures = {
        f"prior_power={pool.prior_power} unseen={pool.unseen} found={pool.found}": share.round(4).tolist()
        for pool, share in shares.items()
    }
    return max(shares, key=lambda pool: float(shares[pool].sum())), figures


def train_ranking(settings: RankingTraining) -> Path:
    """Train both networks and the pooling, and return the stem of the files.

    Raises:
        DataError: If the data cannot be used.
    """
    torch.manual_seed(settings.seed)
    crystals = templates_of_data(prepare(settings.data, n_workers=settings.n_workers))
    fold = torch.from_numpy(formula_folds(crystals.formulas))
    held_out = (fold == 0).nonzero().flatten().tolist()
    order = torch.randperm(len(crystals)).tolist()
    networks: dict[Kind, RankingNetwork] = {}
    losses = {}
    kinds: tuple[tuple[Kind, Templates, range], ...] = (
        ("rows", crystals, range(1, _FOLDS)),
        ("aggregate", aggregate(crystals.select(fold >= _HIDDEN_FOLDS)), range(1, _HIDDEN_FOLDS)),
    )
    for name, templates, folds in kinds:
        rows = [row for row in order if int(fold[row]) in folds][: settings.n_queries]
        examples = make_examples(templates, crystals, rows)
        networks[name], losses[name] = fit(examples, make_examples(templates, crystals, held_out), settings)
    ranking, figures = fit_pools(networks, crystals, fold)
    about = {
        "held_out_loss": losses,
        "pool_figures": figures,
        "settings": {**asdict(settings), "data": Path(settings.data).name, "output": Path(settings.output).name},
        "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
    }
    stem = Path(settings.output)
    save_ranking(stem, ranking, about)
    return stem


def fit_pools(
    networks: Mapping[Kind, RankingNetwork], crystals: Templates, fold: Tensor
) -> tuple[Ranking, dict[str, dict[str, list[float]]]]:
    """Return the ranking of trained networks, each kind of prototypes with its pooling, and the figures of all tried.

    Args:
        networks: For rows and for the aggregate.
        crystals: Templates that are the rows of a data set.
        fold: (n,) of their formulas; the aggregate is made without fold 0, whose structures are asked for.
    """
    prior, untried = load_composition_prior(), Ranking(networks, {})
    held_out = (fold == 0).nonzero().flatten().tolist()[:_POOL_QUERIES]
    pools: dict[Kind, Pool] = {}
    figures: dict[str, dict[str, list[float]]] = {}
    pools["rows"], figures["rows"] = fit_pool(untried, crystals, crystals, held_out, prior)
    kept = aggregate(crystals.select(fold > 0))
    pools["aggregate"], figures["aggregate"] = fit_pool(untried, kept, crystals, held_out, prior)
    return Ranking(networks, pools), figures


def main(words: Sequence[str]) -> None:
    """Train the ranking on a data set."""
    stem = train_ranking(parse_args(RankingTraining, words))
    print(f"{stem}.safetensors and .json")


def _schedule(step: int, n_steps: int) -> float:
    """Return the factor of the learning rate: a short rise, then a cosine to a fiftieth."""
    return min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1.0 + math.cos(math.pi * step / n_steps)))


if __name__ == "__main__":
    main_guard(main)
