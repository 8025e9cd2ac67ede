"""Writing assignments of letters with trained networks, and the beam search over them.

The search keeps the most probable unfinished assignments of each composition, whatever their space groups, and prunes
exactly: what is less probable than the last of the finished ones that are kept cannot become better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from envs import lattice
from envs.assignment import Assignments, Compositions, Packing, Walk, canonical
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from envs.reference_volume import log_reference_volume
from envs.symmetry import SYMMETRY
from policies.composition_network import STABLE, CompositionNetwork, Encoded

_WIDER = 2.0  # beam over proposals asked for: equivalents take places in it that they give up at the end
_NARROWEST = 48
_FLATTEST = 0.1  # (volume / abc)² of the flattest cell that is proposed


@dataclass(frozen=True)
class _Memory:
    """What one network has read of the compositions and keeps of the symmetry tables."""

    network: CompositionNetwork
    encoded: Encoded
    groups: Tensor  # (230, width)
    positions: Tensor  # (230, 27, width)
    keys: Tensor  # (230, 27, key_width)

    def element(self, query: Tensor, slot: Tensor) -> Tensor:
        """Return (m, width) encoded elements; where all are placed, the last one, whose value is then not used."""
        return self.encoded.elements[query, slot.clamp(max=self.encoded.elements.shape[1] - 1)]


@dataclass
class Partial:
    """Assignments that are being written, (m,) of them."""

    query: Tensor  # (m,) int64 row of the composition
    walk: Walk
    log_prob: Tensor  # (m,) float64
    placed: list[Tensor]  # per network (m, width) sum of what is placed
    own: list[Tensor]  # per network (m, width) the part of the element that is being placed
    slot: Tensor  # (m, w) int64 what is written so far
    letter: Tensor  # (m, w) int64

    def select(self, rows: Tensor) -> "Partial":
        """Return the assignments at ``rows``."""
        return Partial(
            self.query[rows],
            self.walk.select(rows),
            self.log_prob[rows],
            [part[rows] for part in self.placed],
            [part[rows] for part in self.own],
            self.slot[rows],
            self.letter[rows],
        )

    @classmethod
    def cat(cls, parts: Sequence["Partial"]) -> "Partial":
        """Return assignments as one batch, padded to the longest."""
        width = max(part.slot.shape[1] for part in parts)

        def padded(table: Tensor) -> Tensor:
            return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=-1)

        return cls(
            torch.cat([part.query for part in parts]),
            Walk.cat([part.walk for part in parts]),
            torch.cat([part.log_prob for part in parts]),
            [torch.cat(column) for column in zip(*(part.placed for part in parts), strict=True)],
            [torch.cat(column) for column in zip(*(part.own for part in parts), strict=True)],
            torch.cat([padded(part.slot) for part in parts]),
            torch.cat([padded(part.letter) for part in parts]),
        )

    def assignments(self) -> Assignments:
        """Return what is written."""
        return Assignments(self.walk.compositions, self.walk.group, self.slot, self.letter)


class AssignmentWriter:
    """Writes assignments of some compositions letter by letter.

    Args:
        networks: Their decisions' probabilities are averaged.
        compositions: Read once, for any number of assignments.
    """

    def __init__(self, networks: Sequence[CompositionNetwork], compositions: Compositions) -> None:
        self.compositions = compositions.trimmed()
        self.packing = Packing.for_counts(compositions.counts)
        stability = torch.full((len(compositions),), STABLE)
        self._memories = []
        for network in networks:
            positions = network.position_vectors()
            encoded = network.encode(self.compositions, stability)
            keys = network.key(positions)
            self._memories.append(_Memory(network, encoded, network.group_vectors(), positions, keys))

    def group_log_probs(self, allowed: Tensor) -> Tensor:
        """Return (n, 230) float64 log-probabilities of space groups among those ``allowed`` (n, 230)."""
        return _mean_log_softmax([memory.network.group_scores(memory.encoded) for memory in self._memories], allowed)

    def start(self, query: Tensor, group: Tensor, log_prob: Tensor) -> Partial:
        """Return assignments of compositions ``query`` (m,) that have chosen a space group (m,) and no letter."""
        empty = torch.zeros(len(query), 0, dtype=torch.int64)
        placed = [torch.zeros(len(query), memory.groups.shape[1]) for memory in self._memories]
        walk = Walk.start(self.packing, self.compositions.select(query), group)
        return Partial(query, walk, log_prob, placed, list(placed), empty, empty)

    def letter_log_probs(self, partial: Partial) -> Tensor:
        """Return (m, 27) float64 log-probabilities of the next letter, -inf where illegal."""
        walk, scores = partial.walk, []
        for memory, placed, own in zip(self._memories, partial.placed, partial.own, strict=True):
            element = memory.element(partial.query, walk.slot)
            summary, group = memory.encoded.summary[partial.query], memory.groups[walk.group]
            queries = memory.network.letter_queries(element, summary, group, placed, own, walk.n_left)
            scores.append(memory.network.letter_scores(queries, memory.keys, walk.group, walk.n_left))
        return _mean_log_softmax(scores, walk.letter_mask())

    def write(self, partial: Partial, letter: Tensor, log_p: Tensor) -> None:
        """Put the next orbit of every unfinished assignment on ``letter`` (m,), with ``letter_log_probs`` at hand."""
        walk, moves, slot = partial.walk, ~partial.walk.done, partial.walk.slot
        gained = log_p.gather(1, letter[:, None])[:, 0]
        partial.log_prob = partial.log_prob + torch.where(moves, gained, 0.0)
        partial.slot = torch.cat([partial.slot, slot.masked_fill(~moves, -1)[:, None]], dim=1)
        partial.letter = torch.cat([partial.letter, letter.masked_fill(~moves, -1)[:, None]], dim=1)
        walk.step(letter)
        stays = (walk.slot == slot)[:, None]
        for index, memory in enumerate(self._memories):
            element = memory.element(partial.query, slot)
            orbit = memory.network.place(element, memory.positions[walk.group, letter]) * moves[:, None]
            partial.placed[index] = partial.placed[index] + orbit
            partial.own[index] = (partial.own[index] + orbit) * stays

    def crystals(self, partial: Partial) -> CrystalBatch:
        """Return finished assignments as crystals with the mean lattice that the networks expect."""
        group, compositions = partial.walk.group, partial.walk.compositions
        system = SYMMETRY.lattice_system[group]
        mean = torch.zeros(len(group), lattice.N_COORDINATES, dtype=torch.float64)
        for memory, placed in zip(self._memories, partial.placed, strict=True):
            network, summary = memory.network, memory.encoded.summary[partial.query]
            scaled = network.lattice_coordinates(summary, memory.groups[group], placed)
            mean += network.lattice_mean[system] + scaled * network.lattice_spread[system]
        values = _closed(mean / len(self._memories))
        table = torch.zeros(len(group), MAX_ATOMIC_NUMBER + 1, dtype=torch.int64)
        table.scatter_add_(1, compositions.elements, compositions.counts)
        numbers = torch.arange(MAX_ATOMIC_NUMBER + 1)
        reference = log_reference_volume(table * SYMMETRY.centring[group][:, None], numbers)
        return partial.assignments().crystals(lattice.lattice_parameters(values, reference))


def beam_search(writer: AssignmentWriter, allowed: Tensor, n: int) -> tuple[Partial, CrystalBatch]:
    """Return the best ``n`` crystals of each composition, sorted by composition and probability, equivalents as one.

    Args:
        writer: Of the compositions.
        allowed: (n_compositions, 230) bool space groups to choose from.
        n: Crystals per composition.
    """
    beam, n_queries = max(int(_WIDER * n), _NARROWEST), len(allowed)
    log_p = writer.group_log_probs(allowed)
    query, group = torch.isfinite(log_p).nonzero().unbind(dim=1)
    active = writer.start(query, group, log_p[query, group])
    active = active.select(_best_of_each(active.query, active.log_prob, beam))
    finished: list[Partial] = []
    floor = torch.full((n_queries,), -torch.inf, dtype=torch.float64)
    while len(active.query):
        log_p = writer.letter_log_probs(active)
        total = active.log_prob[:, None] + log_p
        parent, letter = (torch.isfinite(total) & (total > floor[active.query][:, None])).nonzero().unbind(dim=1)
        kept = _best_of_each(active.query[parent], total[parent, letter], beam)
        parent, letter = parent[kept], letter[kept]
        active = active.select(parent)
        writer.write(active, letter, log_p[parent])
        done = active.walk.done
        finished.append(active.select(done.nonzero().flatten()))
        active = active.select((~done).nonzero().flatten())
        floor = _nth_best(finished, n_queries, beam)
    found = Partial.cat(finished)
    return _merge(writer, found.select(_best_of_each(found.query, found.log_prob, beam)), n)


def log_sum_by(log_prob: Tensor, owner: Tensor, n: int) -> Tensor:
    """Return (n,) float64 log of the sum of probabilities that belong to each ``owner``, -inf where there is none."""
    highest = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owner, log_prob, "amax")
    shift = torch.where(torch.isfinite(highest), highest, 0.0)
    total = torch.zeros(n, dtype=torch.float64).index_add(0, owner, (log_prob - shift[owner]).exp())
    return total.log() + shift


def _merge(writer: AssignmentWriter, found: Partial, n: int) -> tuple[Partial, CrystalBatch]:
    """Add up equivalents, keep the most probable of each and the best ``n`` of each composition."""
    crystals = writer.crystals(found)
    smallest, _ = canonical(crystals)
    key = torch.cat([found.query[:, None], smallest.group[:, None], smallest.slot, smallest.letter], dim=1)
    _, owner = key.unique(dim=0, return_inverse=True)
    n_unique = int(owner.max()) + 1
    total = log_sum_by(found.log_prob, owner, n_unique)
    best = _best_of_each(owner, found.log_prob, 1)  # sorted by owner
    kept = _best_of_each(found.query[best], total, n)
    return replace(found.select(best[kept]), log_prob=total[kept]), crystals.select(best[kept])


def _best_of_each(query: Tensor, log_prob: Tensor, n: int) -> Tensor:
    """Return the rows of the ``n`` most probable of each query, sorted by query, then probability."""
    order = log_prob.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    sorted_query = query[order]
    first = torch.searchsorted(sorted_query, sorted_query)
    return order[torch.arange(len(order)) - first < n]


def _nth_best(finished: list[Partial], n_queries: int, n: int) -> Tensor:
    """Return (n_queries,) log-probability of the n-th best finished assignment, -inf where there are fewer."""
    query = torch.cat([part.query for part in finished])
    log_prob = torch.cat([part.log_prob for part in finished])
    best = _best_of_each(query, log_prob, n)
    floor = torch.full((n_queries,), torch.inf, dtype=torch.float64)
    floor = floor.scatter_reduce(0, query[best], log_prob[best], "amin")
    return torch.where(torch.bincount(query[best], minlength=n_queries) >= n, floor, -torch.inf)


def _mean_log_softmax(scores: list[Tensor], mask: Tensor) -> Tensor:
    """Return (m, k) float64 log of the mean probability over networks, -inf where ``mask`` (m, k) is False."""
    masked = torch.stack([score.double().masked_fill(~mask, -torch.inf) for score in scores])
    mean = masked.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(scores))
    return mean.masked_fill(~mask, -torch.inf)  # rows without a legal choice, which softmax makes nan


def _closed(values: Tensor) -> Tensor:
    """Return lattice coordinates with angles pulled towards 90 degrees where they would not close a cell."""
    angles = values[:, : lattice.VOLUME].clamp(60.0, 120.0)
    cosines = torch.cos(torch.deg2rad(angles))
    squared = 1.0 + 2.0 * cosines.prod(dim=1) - cosines.square().sum(dim=1)
    angles = torch.where((squared > _FLATTEST)[:, None], angles, 90.0 + (angles - 90.0) / 2)
    return torch.cat([angles, values[:, lattice.VOLUME :]], dim=1)
