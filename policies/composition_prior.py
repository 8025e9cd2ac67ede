"""The composition-conditioned prior: the most probable space groups and Wyckoff letters of a given composition.

p(space group | composition) and p(letters | space group, composition) are exact products of masked decisions, so that
every proposal holds exactly the atoms asked for. The search is a beam over (space group, letters) with exact pruning:
what is less probable than the n-th finished proposal cannot become better. Crystals that differ by a shift of the
origin or an exchange of axes are one proposal.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from envs import lattice
from envs.assignment import Assignments, Compositions, Packing, Walk, canonical, images
from envs.conventions import N_SPACE_GROUPS
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from envs.errors import RepresentationError
from envs.reference_volume import log_reference_volume
from envs.symmetry import SYMMETRY
from policies.composition_network import STABLE, CompositionNetwork, Encoded, NetworkConfig
from policies.errors import CheckpointError

SHIPPED = Path(__file__).parent / "weights" / "composition_prior"
TRAINED_ATOMS = 20  # atoms per primitive cell that the training data reach
_ROWS = 16  # compositions searched at once
_SAMPLES = 4096  # assignments evaluated at once
_WIDER = 2.0  # beam over proposals asked for: equivalents take places in it that they give up at the end
_NARROWEST = 48


@dataclass(frozen=True)
class CompositionProposals:
    """Ways to realise compositions, best first within each query."""

    crystals: CrystalBatch  # (m,) with letters, and the mean lattice that the network expects
    query: Tensor  # (m,) int64 index of the composition asked for
    log_prob: Tensor  # (m,) float64


@dataclass(frozen=True)
class _Memory:
    """What one network has read of the compositions and keeps of the symmetry tables."""

    network: CompositionNetwork
    encoded: Encoded
    groups: Tensor  # (230, width)
    positions: Tensor  # (230, 27, width)
    keys: Tensor  # (230, 27, key_width)


@dataclass
class _Partial:
    """Assignments that are being written, (m,) of them."""

    query: Tensor  # (m,) row of the composition
    walk: Walk
    log_prob: Tensor  # (m,) float64
    placed: list[Tensor]  # per network (m, width) sum of what is placed
    own: list[Tensor]  # per network (m, width) the part of the element that is being placed
    slot: Tensor  # (m, w) int64 what is written so far
    letter: Tensor  # (m, w) int64

    def select(self, rows: Tensor) -> "_Partial":
        """Return the assignments at ``rows``."""
        return _Partial(
            self.query[rows],
            self.walk.select(rows),
            self.log_prob[rows],
            [part[rows] for part in self.placed],
            [part[rows] for part in self.own],
            self.slot[rows],
            self.letter[rows],
        )

    def assignments(self) -> Assignments:
        """Return what is written."""
        return Assignments(self.walk.compositions, self.walk.group, self.slot, self.letter)


class CompositionPrior:
    """p(space group, letters | composition), searched, sampled and evaluated.

    Args:
        networks: One, or several whose decisions' probabilities are averaged.
    """

    def __init__(self, networks: Sequence[CompositionNetwork]) -> None:
        self.networks = tuple(network.eval().requires_grad_(requires_grad=False) for network in networks)

    def propose(
        self, compositions: Sequence[Mapping[str, int]], n: int, *, space_groups: Sequence[int] | None = None
    ) -> CompositionProposals:
        """Return up to ``n`` most probable ways to realise each composition, best first, without repeats.

        Args:
            compositions: {symbol: atoms per primitive cell}.
            n: Proposals per composition.
            space_groups: International numbers to choose from; None = all.

        Returns:
            Proposals; ``log_prob`` is that of the crystal, summed over the equivalents that the search met.

        Raises:
            RepresentationError: If a composition is malformed or none of ``space_groups`` can hold it.
        """
        asked, allowed = self._read(compositions, space_groups)
        parts = []
        for rows in torch.arange(len(asked)).split(_ROWS):
            found, crystals = self._search(asked.select(rows), allowed[rows], n)
            parts.append(CompositionProposals(crystals, rows[found.query], found.log_prob))
        return CompositionProposals(
            CrystalBatch.cat([part.crystals for part in parts]),
            torch.cat([part.query for part in parts]),
            torch.cat([part.log_prob for part in parts]),
        )

    def sample(
        self,
        compositions: Sequence[Mapping[str, int]],
        n: int,
        generator: torch.Generator,
        *,
        space_groups: Sequence[int] | None = None,
    ) -> CompositionProposals:
        """Return ``n`` independent samples for each composition; ``log_prob`` is that of the letters as written.

        Raises:
            RepresentationError: As ``propose``.
        """
        asked, allowed = self._read(compositions, space_groups)
        parts = []
        for query in torch.arange(len(asked)).repeat_interleave(n).split(_SAMPLES):
            memories = self._encode(asked.select(query))
            log_p = self._group_log_probs(memories, allowed[query])
            group = torch.multinomial(log_p.exp(), 1, generator=generator)[:, 0]
            partial = self._start(asked.select(query), query, group, log_p.gather(1, group[:, None])[:, 0], memories)
            rows = torch.arange(len(query))
            while not bool(partial.walk.done.all()):
                log_p = self._letter_log_probs(partial, memories, rows)
                weights = torch.where(partial.walk.done[:, None], 1.0, log_p.exp())
                self._write(partial, memories, rows, torch.multinomial(weights, 1, generator=generator)[:, 0], log_p)
            crystals = self._crystals(partial, memories, rows)
            parts.append(CompositionProposals(crystals, query, partial.log_prob))
        return CompositionProposals(
            CrystalBatch.cat([part.crystals for part in parts]),
            torch.cat([part.query for part in parts]),
            torch.cat([part.log_prob for part in parts]),
        )

    def log_prob(self, crystals: CrystalBatch) -> Tensor:
        """Return (n,) float64 log p of crystals given their compositions, all equivalent assignments together.

        The lattice plays no part. A crystal that no assignment of its composition can be has log p = -inf.
        """
        assignments, owner = images(crystals)
        chunks = torch.arange(len(owner)).split(_SAMPLES)
        parts = [self._log_prob_as_written(assignments.select(rows)) for rows in chunks]
        return _log_sum_by(torch.cat(parts), owner, len(crystals))

    def _read(
        self, compositions: Sequence[Mapping[str, int]], space_groups: Sequence[int] | None
    ) -> tuple[Compositions, Tensor]:
        """Return the compositions and (n, 230) bool groups to choose from, with a warning beyond what was trained."""
        asked = Compositions.of_amounts(compositions)
        if not len(asked):
            raise RepresentationError("no composition was given; name at least one")
        self._warn(asked)
        possible = Packing.for_counts(asked.counts).group_mask(asked.counts)
        if space_groups is None:
            return asked, possible
        wrong = [number for number in space_groups if not 1 <= number <= N_SPACE_GROUPS]
        if wrong:
            raise RepresentationError(f"space groups are international numbers 1-230, got {wrong}")
        wanted = torch.zeros(N_SPACE_GROUPS, dtype=torch.bool)
        wanted[torch.tensor(list(space_groups), dtype=torch.int64) - 1] = True
        for row in (~(possible & wanted).any(dim=1)).nonzero().flatten().tolist():
            numbers = (possible[row].nonzero().flatten() + 1).tolist()
            raise RepresentationError(
                f"composition {dict(compositions[row])} cannot be placed in space groups {sorted(set(space_groups))}; "
                f"possible are {numbers}"
            )
        return asked, possible & wanted

    def _warn(self, asked: Compositions) -> None:
        n_atoms = int(asked.counts.sum(dim=1).max())
        if n_atoms > TRAINED_ATOMS:
            warnings.warn(
                f"a composition has {n_atoms} atoms per primitive cell; the prior has seen no more than "
                f"{TRAINED_ATOMS}, so its proposals are an extrapolation",
                UserWarning,
                stacklevel=4,
            )
        unseen = asked.elements[~self.networks[0].seen[asked.elements] & (asked.elements > 0)].unique().tolist()
        if unseen:
            warnings.warn(
                f"the prior has seen no crystal with the element(s) of atomic number {unseen}; it judges them by their "
                "tabulated properties alone",
                UserWarning,
                stacklevel=4,
            )

    def _encode(self, compositions: Compositions) -> list[_Memory]:
        stability = torch.full((len(compositions),), STABLE)
        memories = []
        for network in self.networks:
            positions = network.position_vectors()
            encoded = network.encode(compositions.trimmed(), stability)
            memories.append(_Memory(network, encoded, network.group_vectors(), positions, network.key(positions)))
        return memories

    def _group_log_probs(self, memories: list[_Memory], allowed: Tensor) -> Tensor:
        """Return (n, 230) float64."""
        scores = [memory.network.group_scores(memory.encoded) for memory in memories]
        return _mean_log_softmax(scores, allowed)

    def _start(
        self, compositions: Compositions, query: Tensor, group: Tensor, log_prob: Tensor, memories: list[_Memory]
    ) -> _Partial:
        packing = Packing.for_counts(compositions.counts)
        empty = torch.zeros(len(query), 0, dtype=torch.int64)
        placed = [torch.zeros(len(query), memory.groups.shape[1]) for memory in memories]
        walk = Walk.start(packing, compositions, group)
        return _Partial(query, walk, log_prob, placed, list(placed), empty, empty)

    def _letter_log_probs(self, partial: _Partial, memories: list[_Memory], rows: Tensor) -> Tensor:
        """Return (m, 27) float64 log-probabilities of the next letter, -inf where illegal.

        ``rows`` (m,) says which of the encoded compositions each assignment belongs to.
        """
        walk = partial.walk
        scores = []
        for memory, placed, own in zip(memories, partial.placed, partial.own, strict=True):
            element = memory.encoded.elements[rows, _inside(walk.slot, memory)]
            queries = memory.network.letter_queries(
                element, memory.encoded.summary[rows], memory.groups[walk.group], placed, own, walk.n_left
            )
            scores.append(memory.network.letter_scores(queries, memory.keys, walk.group, walk.n_left))
        return _mean_log_softmax(scores, walk.letter_mask())

    def _write(self, partial: _Partial, memories: list[_Memory], rows: Tensor, letter: Tensor, log_p: Tensor) -> None:
        """Put the next orbit of every unfinished assignment on ``letter`` (m,)."""
        walk, moves = partial.walk, ~partial.walk.done
        slot = walk.slot
        gained = log_p.gather(1, letter[:, None])[:, 0]
        partial.log_prob = partial.log_prob + torch.where(moves, gained, 0.0)
        partial.slot = torch.cat([partial.slot, slot.masked_fill(~moves, -1)[:, None]], dim=1)
        partial.letter = torch.cat([partial.letter, letter.masked_fill(~moves, -1)[:, None]], dim=1)
        walk.step(letter)
        stays = (walk.slot == slot)[:, None]
        for index, memory in enumerate(memories):
            element = memory.encoded.elements[rows, _inside(slot, memory)]
            orbit = memory.network.place(element, memory.positions[walk.group, letter]) * moves[:, None]
            partial.placed[index] = partial.placed[index] + orbit
            partial.own[index] = (partial.own[index] + orbit) * stays

    def _log_prob_as_written(self, assignments: Assignments) -> Tensor:
        """Return (n,) float64 log p of assignments, letter by letter; -inf where one is illegal."""
        compositions = assignments.compositions
        rows = torch.arange(len(assignments))
        memories = self._encode(compositions)
        allowed = Packing.for_counts(compositions.counts).group_mask(compositions.counts)
        log_p = self._group_log_probs(memories, allowed).gather(1, assignments.group[:, None])[:, 0]
        partial = self._start(compositions, rows, assignments.group, log_p, memories)
        legal = torch.isfinite(log_p)
        for slot, letter in zip(assignments.slot.unbind(dim=1), assignments.letter.unbind(dim=1), strict=True):
            legal &= (slot < 0) | (slot == partial.walk.slot)
            log_p = self._letter_log_probs(partial, memories, rows)
            self._write(partial, memories, rows, letter.clamp(min=0), log_p)
        return torch.where(legal & partial.walk.done, partial.log_prob, -torch.inf)

    def _search(self, compositions: Compositions, allowed: Tensor, n: int) -> tuple[_Partial, CrystalBatch]:
        """Return the best ``n`` crystals of each composition, sorted by composition and probability."""
        beam = max(int(_WIDER * n), _NARROWEST)
        memories = self._encode(compositions)
        log_p = self._group_log_probs(memories, allowed)
        query, group = torch.isfinite(log_p).nonzero().unbind(dim=1)
        active = self._start(compositions.select(query), query, group, log_p[query, group], memories)
        active = active.select(_best_of_each(active.query, active.log_prob, beam))
        finished: list[_Partial] = []
        floor = torch.full((len(compositions),), -torch.inf, dtype=torch.float64)
        while len(active.query):
            log_p = self._letter_log_probs(active, memories, active.query)
            total = active.log_prob[:, None] + log_p
            parent, letter = (torch.isfinite(total) & (total > floor[active.query][:, None])).nonzero().unbind(dim=1)
            kept = _best_of_each(active.query[parent], total[parent, letter], beam)
            parent, letter = parent[kept], letter[kept]
            active = active.select(parent)
            self._write(active, memories, active.query, letter, log_p[parent])
            done = active.walk.done
            finished.append(active.select(done.nonzero().flatten()))
            active = active.select((~done).nonzero().flatten())
            floor = _nth_best(finished, len(compositions), beam)
        found = _join(finished)
        return self._merge(found.select(_best_of_each(found.query, found.log_prob, beam)), memories, n)

    def _merge(self, found: _Partial, memories: list[_Memory], n: int) -> tuple[_Partial, CrystalBatch]:
        """Add up equivalents, keep the most probable of each and the best ``n`` of each composition."""
        crystals = self._crystals(found, memories, found.query)
        smallest, _ = canonical(crystals)
        key = torch.cat([found.query[:, None], smallest.group[:, None], smallest.slot, smallest.letter], dim=1)
        _, owner = key.unique(dim=0, return_inverse=True)
        n_unique = int(owner.max()) + 1
        total = _log_sum_by(found.log_prob, owner, n_unique)
        order = found.log_prob.argsort(descending=True, stable=True)
        first = torch.full((n_unique,), len(owner)).scatter_reduce(
            0, owner[order], torch.arange(len(owner)), "amin", include_self=True
        )
        best = order[first]
        kept = _best_of_each(found.query[best], total, n)
        merged = replace(found.select(best[kept]), log_prob=total[kept])
        return merged, crystals.select(best[kept])

    def _crystals(self, partial: _Partial, memories: list[_Memory], rows: Tensor) -> CrystalBatch:
        """Return finished assignments as crystals with the mean lattice that the networks expect."""
        group, compositions = partial.walk.group, partial.walk.compositions
        system = SYMMETRY.lattice_system[group]
        mean = torch.zeros(len(group), lattice.N_COORDINATES, dtype=torch.float64)
        for memory, placed in zip(memories, partial.placed, strict=True):
            network = memory.network
            scaled = network.lattice_coordinates(memory.encoded.summary[rows], memory.groups[group], placed)
            mean += network.lattice_mean[system] + scaled * network.lattice_spread[system]
        values = _closed(mean / len(memories))
        table = torch.zeros(len(group), MAX_ATOMIC_NUMBER + 1, dtype=torch.int64)
        table.scatter_add_(1, compositions.elements, compositions.counts)
        reference = log_reference_volume(table * SYMMETRY.centring[group][:, None], torch.arange(MAX_ATOMIC_NUMBER + 1))
        return partial.assignments().crystals(lattice.lattice_parameters(values, reference))


def _inside(slot: Tensor, memory: _Memory) -> Tensor:
    """Return slots of assignments that are done as the last one, whose values are then not used."""
    return slot.clamp(max=memory.encoded.elements.shape[1] - 1)


def _closed(values: Tensor) -> Tensor:
    """Return lattice coordinates with angles pulled towards 90 degrees where they would not close a cell."""
    angles = values[:, : lattice.VOLUME].clamp(60.0, 120.0)
    cosines = torch.cos(torch.deg2rad(angles))
    squared = 1.0 + 2.0 * cosines.prod(dim=1) - cosines.square().sum(dim=1)
    angles = torch.where((squared > 0.1)[:, None], angles, 90.0 + (angles - 90.0) / 2)
    return torch.cat([angles, values[:, lattice.VOLUME :]], dim=1)


def _mean_log_softmax(scores: list[Tensor], mask: Tensor) -> Tensor:
    """Return (m, k) float64 log of the mean probability over networks; all -inf in rows without a legal choice."""
    logs = [score.double().masked_fill(~mask, -torch.inf).log_softmax(dim=1) for score in scores]
    mean = torch.stack(logs).logsumexp(dim=0) - torch.tensor(float(len(logs))).log()
    return mean.masked_fill(~mask, -torch.inf)


def _best_of_each(query: Tensor, log_prob: Tensor, n: int) -> Tensor:
    """Return the rows of the ``n`` most probable of each query, sorted by query, then probability."""
    order = log_prob.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    sorted_query = query[order]
    first = torch.searchsorted(sorted_query, sorted_query)
    return order[torch.arange(len(order)) - first < n]


def _nth_best(finished: list[_Partial], n_queries: int, n: int) -> Tensor:
    """Return (n_queries,) log-probability of the n-th best finished assignment, -inf where there are fewer."""
    query = torch.cat([part.query for part in finished])
    log_prob = torch.cat([part.log_prob for part in finished])
    best = _best_of_each(query, log_prob, n)
    floor = torch.full((n_queries,), -torch.inf, dtype=torch.float64)
    is_full = torch.bincount(query[best], minlength=n_queries) >= n
    floor = floor.index_put((query[best],), torch.zeros_like(log_prob[best]))
    floor = floor.scatter_reduce(0, query[best], log_prob[best], "amin")
    return torch.where(is_full, floor, -torch.inf)


def _log_sum_by(log_prob: Tensor, owner: Tensor, n: int) -> Tensor:
    """Return (n,) float64 log of the sum of probabilities that belong to each owner."""
    highest = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owner, log_prob, "amax")
    shift = torch.where(torch.isfinite(highest), highest, 0.0)
    total = torch.zeros(n, dtype=torch.float64).index_add(0, owner, (log_prob - shift[owner]).exp())
    return total.log() + shift


def _join(parts: list[_Partial]) -> _Partial:
    """Return partials as one, padded to the longest."""
    width = max(part.slot.shape[1] for part in parts)
    first = parts[0].walk

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part.walk, name) for part in parts])

    compositions = Compositions(
        torch.cat([part.walk.compositions.elements for part in parts]),
        torch.cat([part.walk.compositions.counts for part in parts]),
    )
    names = ("group", "slot", "n_left", "used", "first_letter", "good")
    walk = Walk(first.packing, compositions, *(joined(name) for name in names))

    def padded(table: Tensor) -> Tensor:
        return torch.nn.functional.pad(table, (0, width - table.shape[1]), value=-1)

    return _Partial(
        torch.cat([part.query for part in parts]),
        walk,
        torch.cat([part.log_prob for part in parts]),
        [torch.cat(column) for column in zip(*(part.placed for part in parts), strict=True)],
        [torch.cat(column) for column in zip(*(part.own for part in parts), strict=True)],
        torch.cat([padded(part.slot) for part in parts]),
        torch.cat([padded(part.letter) for part in parts]),
    )


def save_composition_prior(
    stem: Path, networks: Sequence[CompositionNetwork], about: Mapping[str, object] | None = None
) -> None:
    """Write ``<stem>.safetensors`` (half precision) and ``<stem>.json`` (sizes and whatever ``about`` says)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{index}.{name}": (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for index, network in enumerate(networks)
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, f"{stem}.safetensors")
    configs = [asdict(network.config) for network in networks]
    content = {"kind": "composition prior", "configs": configs, **(about or {})}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


@cache
def load_composition_prior(stem: Path = SHIPPED) -> CompositionPrior:
    """Return the prior that ships with the package, or the one that ``save_composition_prior`` wrote to ``stem``.

    Raises:
        CheckpointError: If the files are missing, truncated or of something else.
    """
    try:
        content = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(f"{stem}.safetensors")
        networks = []
        for index, config in enumerate(content["configs"]):
            network = CompositionNetwork(NetworkConfig(**config))
            prefix = f"{index}."
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            network.load_state_dict(state)
            networks.append(network)
    except (
        OSError,
        SafetensorError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"{stem}.json and .safetensors are not a composition prior of this version: {error}"
        ) from error
    return CompositionPrior(networks)
