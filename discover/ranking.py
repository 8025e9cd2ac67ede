"""Learned ranking of structure proposals: how probable is it that one of them is the true structure, and which first.

Every known prototype whose elements resemble those of a composition is a hypothesis about its structure. A network
gives hypotheses their probabilities; the fingerprints say how probable it is that a proposal would be called equal to
each of them. A proposal's probability is the sum over hypotheses, so prototypes vote. Of many proposals the list starts
with the most probable one and goes on with what adds most to the probability that any in the list is right (greedy
maximum coverage, Nemhauser et al. 1978, doi:10.1007/BF01588971): near repeats come late.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from ase.data import covalent_radii
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from discover.errors import CheckpointError
from discover.proposals import SOURCES, Proposals
from discover.structure.fingerprint import RADII, fingerprints, match_probability, pairwise_distances
from discover.templates import Candidates, Query, Templates, as_proposals, element_distances, nearest
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import is_rigid
from policies.composition_prior import CompositionPrior
from policies.storage import save_weights
from proxies.elements import PROPERTIES, element_properties

Kind = Literal["rows", "aggregate"]  # of prototypes: those of a data set, or statistics of them
SHIPPED = Path(__file__).parent / "pretrained" / "ranking"
N_PRIOR = 40  # proposals of the composition prior for each composition
N_HYPOTHESES = 200  # prototypes that are weighed for each composition
_NEAREST, _LOOKED_AT, _OF_EACH_PROTOTYPE = 100, 1000, 3  # see `hypotheses_of`
_VOTE_SHARPNESS = (1.0, 4.0, 16.0)
_UNSTABLE = 0.1  # eV/atom, the largest energy above the hull that the network is told
#: Probability that the structure generator finds coordinates and lattice of the true sequence, from matches on one
#: formula in forty of the training data: where the letters leave atoms free, and where they leave the lattice alone.
FOUND_FREE, FOUND_RIGID = 0.77, 0.99
_CONTACT_WIDTH = 0.15  # of log(distance over sum of radii), above the shortest
N_SCALARS = 11 + 2 * len(_VOTE_SHARPNESS)
_RADII = torch.from_numpy(covalent_radii)  # Å, by atomic number
_HASH = torch.randint(-(2**62), 2**62, ((MAX_ATOMIC_NUMBER + 1) * 32,), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Hypotheses:
    """What the network is told of the prototypes of some compositions, padded to the same numbers."""

    seen: Tensor  # (..., h, k) int64 element on each kind of atom in the prototype, 0 = padding
    given: Tensor  # (..., h, k) int64 element that takes its place
    shares: Tensor  # (..., h, k) float32 share of the kind among the atoms
    scalars: Tensor  # (..., h, N_SCALARS) float32


@dataclass(frozen=True)
class RankingConfig:
    """Sizes of the network."""

    width: int = 48
    embedding: int = 16
    site_width: int = 32
    n_site_scores: int = 4
    dropout: float = 0.1


class RankingNetwork(nn.Module):
    """The log-weight of a hypothesis from the exchange of elements that it asks for.

    Args:
        config: Sizes.
    """

    properties: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(self, config: RankingConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RankingConfig()
        n = len(PROPERTIES)
        n_inputs = 5 * n + N_SCALARS
        n_read = n_inputs + 2 * config.n_site_scores
        self.register_buffer("properties", torch.from_numpy(np.array(element_properties())), persistent=False)
        self.register_buffer("centre", torch.zeros(n_inputs))
        self.register_buffer("scale", torch.ones(n_inputs))
        self.embedding = nn.Embedding(MAX_ATOMIC_NUMBER + 1, config.embedding)
        self.dropout = nn.Dropout(config.dropout)
        self.site = nn.Sequential(
            nn.Linear(n + 2 * config.embedding + 1, config.site_width),
            nn.SiLU(),
            nn.Linear(config.site_width, config.n_site_scores),
        )
        self.linear = nn.Linear(n_read, 1)
        self.head = nn.Sequential(
            nn.Linear(n_read, config.width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.width),
            nn.SiLU(),
            nn.Linear(config.width, 1),
        )
        nn.init.normal_(self.embedding.weight, std=0.3)

    def standardise(self, hypotheses: Hypotheses) -> None:
        """Set centre and scale of the inputs from training data."""
        inputs = self.inputs(hypotheses)[hypotheses.given[..., 0] > 0]
        self.centre.copy_(inputs.mean(dim=0))
        self.scale.copy_(inputs.std(dim=0) + 1e-3)

    def inputs(self, hypotheses: Hypotheses) -> Tensor:
        """Return (..., h, n_inputs).

        The mean, the largest, the common and the uneven change of each property, the composition's mean property, and
        the scalars.
        """
        shares = hypotheses.shares[..., None]
        new = self.properties[hypotheses.given]
        change = new - self.properties[hypotheses.seen]
        mean, largest = (change.abs() * shares).sum(dim=-2), change.abs().amax(dim=-2)
        common = (change * shares).sum(dim=-2)
        uneven = ((change - common[..., None, :]).abs() * shares).sum(dim=-2)
        return torch.cat([mean, largest, common.abs(), uneven, (new * shares).sum(dim=-2), hypotheses.scalars], dim=-1)

    def forward(self, hypotheses: Hypotheses) -> Tensor:
        """Return (..., h) log-weights; a softmax over the hypotheses of a composition gives probabilities."""
        old, new = self.embedding(hypotheses.seen), self.dropout(self.embedding(hypotheses.given))
        change = (self.properties[hypotheses.seen] - self.properties[hypotheses.given]).abs()
        shares = hypotheses.shares[..., None]
        sites = torch.cat([change, self.dropout((old - new).abs()), new, shares], dim=-1)
        scores = self.site(sites) * (hypotheses.seen > 0)[..., None]
        standard = ((self.inputs(hypotheses) - self.centre) / self.scale).clamp(-6.0, 6.0)
        read = torch.cat([standard, (scores * shares).sum(dim=-2), scores.sum(dim=-2)], dim=-1)
        weight: Tensor = (self.head(read) + self.linear(read))[..., 0]
        return weight


def hypotheses_of(templates: Templates, query: Query, *, other_formulas: bool = False) -> Candidates:
    """Return the prototypes that are weighed: the nearest ones, then others of which not too many are the same.

    Args:
        templates: Where to look.
        query: What to look for.
        other_formulas: Leave out templates of the query's own reduced formula.
    """
    found = nearest(templates, query, _LOOKED_AT, other_formulas=other_formulas)
    keys = arrangement_keys(templates.realise(found.rows, query.elements[found.order])[0])
    order = keys.argsort(stable=True)
    place = torch.arange(len(keys))
    first = torch.searchsorted(keys[order], keys[order])
    earlier = torch.empty_like(place).scatter_(0, order, place - first)  # better ones of the same prototype
    kept = (place < _NEAREST) | (earlier < _OF_EACH_PROTOTYPE)
    return found.select(place[kept][:N_HYPOTHESES])


def describe(templates: Templates, query: Query, found: Candidates) -> Hypotheses:
    """Return what the network is told of the prototypes found for one composition, best first; (h, ...) each."""
    rows, k = found.rows, len(query.counts)
    given = query.elements[found.order]
    kind_elements = templates.kind_elements[rows, :k]
    # Of the elements seen on a kind, the one that speaks most for the exchange.
    weight = templates.kind_shares[rows, :k] * torch.exp(-element_distances()[kind_elements, given[:, :, None]])
    seen = kind_elements.gather(2, weight.argmax(dim=2, keepdim=True))[..., 0]
    crystals, _ = templates.realise(rows, given)
    distances = pairwise_distances(found.fingerprints, found.fingerprints)
    groups = templates.space_group[rows]
    alike = match_probability(distances, groups[:, None] == groups).double()
    keys = arrangement_keys(crystals)
    same = (keys[:, None] == keys).double()
    votes = [
        (table @ torch.softmax(sharpness * found.affinity, dim=0)).log()
        for table in (alike, same)
        for sharpness in _VOTE_SHARPNESS
    ]
    scalars = [
        found.affinity,
        found.affinity - found.affinity[0],
        templates.e_above_hull[rows].nan_to_num(0.0).clamp(max=_UNSTABLE),
        groups / 230.0,
        templates.cells[rows, :3].log().sum(dim=1),
        templates.n_materials[rows].log(),
        alike.tril().sum(dim=1).log(),  # hypotheses that are more alike in elements and have the same structure
        *_contacts(templates, query, found, seen),
        *votes,
    ]
    shares = (torch.tensor(query.counts) / sum(query.counts)).expand(len(rows), -1)
    return Hypotheses(seen, given, shares.float(), torch.stack(scalars, dim=1).float())


def _contacts(templates: Templates, query: Query, found: Candidates, seen: Tensor) -> list[Tensor]:
    """Return what exchanging the elements does to the contacts, four (h,) tensors of logs of distance over radii.

    The shortest contact before and after; the mean and the largest change, over contacts weighed by how short they are.
    """
    shares = torch.tensor(query.counts) / sum(query.counts)
    within = found.fingerprints / shares[:, None, None]  # neighbours of one atom
    nearest_one = RADII[(within >= 0.5).to(torch.int8).argmax(dim=3)].double()
    touching = (within >= 0.5).any(dim=3)
    on_kind = found.order.argsort(dim=1)
    logs = []
    for elements in (seen, query.elements[found.order]):
        crystals, _ = templates.realise(found.rows, elements)
        unit = crystals.volume_per_atom ** (1.0 / 3.0)
        radius = _RADII[elements.gather(1, on_kind)]
        logs.append((nearest_one * unit[:, None, None] / (radius[:, :, None] + radius[:, None])).log())
    before, after = logs
    shortest = torch.where(touching, before, torch.inf).amin(dim=(1, 2))
    weight = torch.exp(-(before - shortest[:, None, None]) / _CONTACT_WIDTH) * touching
    change = (after - before).abs() * weight
    return [
        shortest,
        torch.where(touching, after, torch.inf).amin(dim=(1, 2)),
        change.sum(dim=(1, 2)) / weight.sum(dim=(1, 2)),
        change.amax(dim=(1, 2)),
    ]


def arrangement_keys(crystals: CrystalBatch) -> Tensor:
    """Return (n,) int64 that are equal for equal space group and elements on equivalent letters."""
    group = crystals.space_group - 1
    width = int(SYMMETRY.n_alternatives[group].max()) if len(crystals) else 1
    maps = SYMMETRY.alternative_letters[group, :width]
    letters = maps.gather(2, crystals.letters.clamp(min=0)[:, None].expand(-1, width, -1))
    code = torch.where(crystals.counts[:, None] > 0, _HASH[crystals.elements[:, None] * 32 + letters], 0)
    key: Tensor = code.sum(dim=-1).amin(dim=1) ^ (crystals.space_group * 0x9E3779B97F4A7C1)
    return key


def found_probability(crystals: CrystalBatch) -> Tensor:
    """Return (n,) float64 probabilities that the structure generator finds a crystal, its letters being right."""
    rigid = is_rigid(crystals.space_group, crystals.letters)
    return torch.where(rigid, FOUND_RIGID, FOUND_FREE).double()


def cover(mass: Tensor, match: Tensor, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the order in which proposals add most to the probability that any of them is right, and what each adds.

    Args:
        mass: (h,) probability of each hypothesis.
        match: (m, h) probability that a proposal is equal to a hypothesis.
        n: How many to order; None: all.

    Returns:
        (n,) int64 order and (n,) gains in that order, decreasing.
    """
    left, free = mass.clone(), torch.ones(len(match), dtype=torch.bool)
    order, gains = [], []
    for _ in range(len(match) if n is None else min(n, len(match))):
        gain = torch.where(free, match @ left, -1.0)
        best = int(gain.argmax())
        order.append(best)
        gains.append(gain[best])
        free[best] = False
        left = left * (1.0 - match[best])
    return torch.tensor(order, dtype=torch.int64), torch.stack(gains) if gains else mass[:0]


def save_ranking(stem: Path, ranking: "Ranking", about: Mapping[str, object]) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json`` (sizes of the networks, pools and whatever ``about`` says)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for name, network in ranking.networks.items()
        for key, tensor in network.state_dict().items()
    }
    save_weights(Path(f"{stem}.safetensors"), tensors)
    content = {
        "kind": "ranking",
        "configs": {name: asdict(network.config) for name, network in ranking.networks.items()},
        "pools": {name: asdict(pool) for name, pool in ranking.pools.items()},
    }
    stem.with_suffix(".json").write_text(json.dumps({**content, **about}, indent=2) + "\n")


def propose_templates(templates: Templates, compositions: Sequence[Mapping[str, int]]) -> Proposals:
    """Return all prototypes that are weighed for each composition as proposals, most alike elements first."""
    parts = []
    for index, composition in enumerate(compositions):
        query = Query.of(dict(composition))
        parts.append(as_proposals(templates, query, hypotheses_of(templates, query), index))
    return Proposals.cat(parts)


def of_prior(
    prior: CompositionPrior,
    compositions: Sequence[Mapping[str, int]],
    n: int,
    *,
    space_groups: Collection[int] | None = None,
) -> Proposals:
    """Return up to `n` proposals of the composition prior for each composition, without coordinates.

    Raises:
        RepresentationError: If a composition is malformed or none of ``space_groups`` can hold it.
    """
    found = prior.propose(compositions, n, space_groups=None if space_groups is None else sorted(space_groups))
    nothing = torch.full((*found.crystals.letters.shape, 3), torch.nan, dtype=torch.float64)
    source = torch.full((len(found.query),), SOURCES.index("prior"))
    return Proposals(found.crystals, nothing, found.query, found.log_prob, source)


@dataclass(frozen=True)
class Prototypes:
    """The hypotheses that templates make about one composition."""

    kind: Kind
    log_weight: Tensor  # (h,) float64 log-probability
    keys: Tensor  # (h,) int64 see `arrangement_keys`
    space_group: Tensor  # (h,) int64
    fingerprints: Tensor  # (h, k, k, N_BINS)


@dataclass(frozen=True)
class Pool:
    """How prototypes are weighed against the composition prior.

    Args:
        prior_power: Exponent of the prior in the probability of a Wyckoff sequence; that of the prototypes has the
            rest.
        unseen: Probability that the prototypes leave to each sequence that none of them has.
        found: Probability that the coordinates of the right prototype are right, as `found_probability` has it for
            those of the generator. Means of an aggregate are less often right than those of a row.
    """

    prior_power: float
    unseen: float
    found: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """Orders proposals of several sources by the probability that they are the true structure.

    Args:
        networks: Weigh prototypes of each kind.
        pools: Of each kind of prototypes.
    """

    networks: Mapping[Kind, RankingNetwork]
    pools: Mapping[Kind, Pool]

    def rank(
        self,
        proposals: Proposals,
        compositions: Sequence[Mapping[str, int]],
        templates: Templates | None,
        *,
        other_formulas: bool = False,
    ) -> tuple[Proposals, Tensor]:
        """Return the proposals, best first within each composition, and what each adds to being right.

        Args:
            proposals: Of any sources; the score of those of the prior is their log-probability given the composition.
            compositions: That the proposals' `query` points to.
            templates: The prototypes that vote; None: the prior alone decides.
            other_formulas: Leave out templates of the composition's own reduced formula.

        Returns:
            Sorted proposals and (m,) float64: the probability that a proposal is equal to the true structure and none
            before it is. Over a composition they add up to at most 1.
        """
        order, gains = [], []
        for index, composition in enumerate(compositions):
            rows = (proposals.query == index).nonzero().flatten()
            if not len(rows):
                continue
            query = Query.of(dict(composition))
            known = self.prototypes(templates, query, other_formulas=other_formulas)
            mass, match = self.weigh(proposals.select(rows), query, known)
            best, gain = cover(mass, match)
            order.append(rows[best])
            gains.append(gain)
        if not order:
            return proposals, torch.zeros(0, dtype=torch.float64)
        return proposals.select(torch.cat(order)), torch.cat(gains)

    def weigh(self, proposals: Proposals, query: Query, known: Prototypes) -> tuple[Tensor, Tensor]:
        """Return (h,) probabilities of hypotheses and (m, h) those that a proposal is equal to each.

        Hypotheses are the prototypes, and the sequences that the prior proposes and no prototype has. Probabilities of
        sequences are pooled log-linearly.

        Args:
            proposals: For one composition.
            query: The composition.
            known: Its prototypes.
        """
        pool = self.pools[known.kind]
        keys = arrangement_keys(proposals.crystals)
        of_prior = proposals.source == SOURCES.index("prior")
        log_p = known.log_weight
        sequences, which = torch.cat([known.keys, keys[of_prior]]).unique(return_inverse=True)
        seen = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, which[: len(log_p)], log_p.exp())
        if bool(of_prior.any()):
            listed = torch.full((len(sequences),), float(proposals.score[of_prior].min()), dtype=torch.float64)
            listed[which[len(log_p) :]] = proposals.score[of_prior]
            power = pool.prior_power if len(log_p) else 1.0
            pooled = torch.softmax((1.0 - power) * (seen + pool.unseen).log() + power * listed, dim=0)
        else:
            pooled = seen
        without = seen == 0
        mass = torch.cat([(log_p + (pooled / seen).log()[which[: len(log_p)]]).exp(), pooled[without]])
        same_sequence = (keys[:, None] == torch.cat([known.keys, sequences[without]])).double()
        match = same_sequence * found_probability(proposals.crystals)[:, None]
        complete = proposals.has_coordinates.nonzero().flatten()
        if len(complete) and len(log_p):
            chosen = proposals.select(complete)
            kinds = (chosen.crystals.elements[:, :, None] == query.elements).to(torch.int8).argmax(dim=2)
            own = fingerprints(chosen.crystals, chosen.parameters, kinds, len(query.counts))
            same_group = chosen.crystals.space_group[:, None] == known.space_group
            equal = match_probability(pairwise_distances(own, known.fingerprints), same_group).double()
            match[complete, : len(log_p)] = pool.found * equal
        return mass, match

    def prototypes(self, templates: Templates | None, query: Query, *, other_formulas: bool = False) -> Prototypes:
        """Return the prototypes of a composition with the probabilities that the network gives them."""
        none = torch.zeros(0, dtype=torch.int64)
        if templates is None:
            return Prototypes("aggregate", none.double(), none, none, torch.zeros(0))
        kind: Kind = "rows" if (templates.formulas != "").any() else "aggregate"
        found = hypotheses_of(templates, query, other_formulas=other_formulas)
        if not len(found.rows):
            return Prototypes(kind, none.double(), none, none, torch.zeros(0))
        crystals, _ = templates.realise(found.rows, query.elements[found.order])
        with torch.no_grad():
            log_weight = self.networks[kind](describe(templates, query, found)).double().log_softmax(dim=0)
        return Prototypes(kind, log_weight, arrangement_keys(crystals), crystals.space_group, found.fingerprints)


@cache
def load_ranking(stem: Path = SHIPPED) -> Ranking:
    """Return the ranking that ships, or another one.

    Raises:
        CheckpointError: If its files are missing or damaged.
    """
    try:
        content = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(f"{stem}.safetensors")
        networks = {}
        for name, sizes in content["configs"].items():
            network = RankingNetwork(RankingConfig(**sizes))
            start = f"{name}."
            network.load_state_dict(
                {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
            )
            networks[name] = network.eval().requires_grad_(requires_grad=False)
        pools = {name: Pool(**content["pools"][name]) for name in networks}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{stem}.json and .safetensors are not a ranking of this version: {error}") from error
    return Ranking(networks, pools)
