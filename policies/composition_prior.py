"""The composition-conditioned prior: the most probable space groups and Wyckoff letters of a given composition.

p(space group | composition) and p(letters | space group, composition) are exact products of masked decisions, so that
every proposal holds exactly the atoms asked for. Crystals that differ by a shift of the origin or an exchange of axes
are one proposal.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from envs.assignment import Assignments, Compositions, Packing, images
from envs.conventions import N_SPACE_GROUPS
from envs.crystal import CrystalBatch
from envs.errors import RepresentationError
from policies.composition_network import CompositionNetwork, NetworkConfig
from policies.composition_search import AssignmentWriter, beam_search, log_sum_by
from policies.errors import CheckpointError
from policies.storage import save_weights

SHIPPED = Path(__file__).parent / "weights" / "composition_prior"
TRAINED_ATOMS = 20  # atoms per primitive cell that the training data reach
_SEARCHED = 16  # compositions searched at once
_SAMPLED = 64  # compositions sampled at once
_EVALUATED = 4096  # assignments evaluated at once


@dataclass(frozen=True)
class CompositionProposals:
    """Ways to realise compositions, best first within each query."""

    crystals: CrystalBatch  # (m,) with letters, and the mean lattice that the network expects
    query: Tensor  # (m,) int64 index of the composition asked for
    log_prob: Tensor  # (m,) float64

    @classmethod
    def cat(cls, parts: Sequence["CompositionProposals"]) -> "CompositionProposals":
        """Return proposals as one batch."""
        return cls(
            CrystalBatch.cat([part.crystals for part in parts]),
            torch.cat([part.query for part in parts]),
            torch.cat([part.log_prob for part in parts]),
        )


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
        for rows in torch.arange(len(asked)).split(_SEARCHED):
            found, crystals = beam_search(AssignmentWriter(self.networks, asked.select(rows)), allowed[rows], n)
            parts.append(CompositionProposals(crystals, rows[found.query], found.log_prob))
        return CompositionProposals.cat(parts)

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
        for rows in torch.arange(len(asked)).split(_SAMPLED):
            writer = AssignmentWriter(self.networks, asked.select(rows))
            query = torch.arange(len(rows)).repeat_interleave(n)
            log_p = writer.group_log_probs(allowed[rows])[query]
            group = torch.multinomial(log_p.exp(), 1, generator=generator)
            partial = writer.start(query, group[:, 0], log_p.gather(1, group)[:, 0])
            while not bool(partial.walk.done.all()):
                log_p = writer.letter_log_probs(partial)
                weights = torch.where(partial.walk.done[:, None], 1.0, log_p.exp())
                writer.write(partial, torch.multinomial(weights, 1, generator=generator)[:, 0], log_p)
            parts.append(CompositionProposals(writer.crystals(partial), rows[query], partial.log_prob))
        return CompositionProposals.cat(parts)

    def log_prob(self, crystals: CrystalBatch) -> Tensor:
        """Return (n,) float64 log p of crystals given their compositions, all equivalent assignments together.

        The lattice plays no part. A crystal that no assignment of its composition can be has log p = -inf.
        """
        if not len(crystals):
            return torch.zeros(0, dtype=torch.float64)
        assignments, owner = images(crystals)
        chunks = torch.arange(len(owner)).split(_EVALUATED)
        parts = [self._log_prob_as_written(assignments.select(rows)) for rows in chunks]
        return log_sum_by(torch.cat(parts), owner, len(crystals))

    def _log_prob_as_written(self, assignments: Assignments) -> Tensor:
        """Return (n,) float64 log p of assignments, letter by letter; -inf where one is illegal."""
        writer = AssignmentWriter(self.networks, assignments.compositions)
        log_p = writer.group_log_probs(writer.packing.group_mask(assignments.compositions.counts))
        log_p = log_p.gather(1, assignments.group[:, None])[:, 0]
        partial = writer.start(torch.arange(len(assignments)), assignments.group, log_p)
        legal = torch.isfinite(log_p)
        for slot, letter in zip(assignments.slot.unbind(dim=1), assignments.letter.unbind(dim=1), strict=True):
            legal &= (slot < 0) | (slot == partial.walk.slot)
            writer.write(partial, letter.clamp(min=0), writer.letter_log_probs(partial))
        return torch.where(legal & partial.walk.done, partial.log_prob, -torch.inf)

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
    save_weights(Path(f"{stem}.safetensors"), tensors)
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
