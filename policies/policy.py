"""The forward policy over crystals: one trunk, one head per kind of decision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from envs.conventions import LATTICE_SYSTEMS, MAX_LETTERS, N_SPACE_GROUPS, POINT_SYMMETRIES
from envs.crystal_env import Stage
from envs.lattice import N_COORDINATES, VOLUME, VOLUME_RANGE
from envs.symmetry import SYMMETRY
from policies.distributions import MaskedCategorical, TruncatedLogisticMixture
from policies.trajectories import join_observations

if TYPE_CHECKING:
    from torch import Tensor

    from envs.crystal_env import CrystalEnv, Observation, States
    from policies.trajectories import StepRecord

_MIN_SCALE, _MAX_SCALE = 1e-3, 2.0  # of the logistic components, in unit coordinates
_COUNT_WIDTH = 64
_POSITION_WIDTH = 32  # of what every Wyckoff position of every group has of its own
_LEAST_CHARGE, _MOST_CHARGE = -16, 40  # of what is chosen so far; sums beyond it look like its ends
_UNBALANCED = 10  # charge after a count from which it makes no difference how large it is
DistributionT = TypeVar("DistributionT", MaskedCategorical, TruncatedLogisticMixture)
_RESOLUTION = 16  # machine epsilons: intervals of unit coordinates below this width are widened to it


@dataclass(frozen=True)
class PolicyConfig:
    """Sizes of the network. ``n_elements``, ``max_count`` and ``n_features`` are the environment's."""

    n_elements: int
    max_count: int
    n_features: int
    width: int = 256
    depth: int = 3
    n_components: int = 6
    dropout: float = 0.0  # while training on data
    #: Ways to give every element an oxidation state, in the environment's order: the policy sees what they add up to.
    assignments: tuple[tuple[int, ...], ...] = ()
    feature_atoms: int = 1  # atoms that an observation shows as 1

    def __post_init__(self) -> None:
        """Make tuples of what was read from a file as lists."""
        object.__setattr__(self, "assignments", tuple(map(tuple, self.assignments)))

    @classmethod
    def for_env(cls, env: CrystalEnv, *, width: int = 256, depth: int = 3, dropout: float = 0.0) -> PolicyConfig:
        """Return the configuration that fits an environment."""
        scale = env.space.feature_scale[0]
        return cls(env.n_elements, env.max_count, env.n_features, width, depth, dropout=dropout, feature_atoms=scale)


class CrystalPolicy(nn.Module):
    """P_F over the stages of ``envs.crystal_env``.

    The first layer adds embeddings of what is categorical (stage and coordinate, lattice system, point
    symmetry, space group, last element, origin) to a linear map of the rest and to vectors of the occupied Wyckoff
    positions; ``depth`` layers of ``width`` follow.
    With assignments of oxidation states it also adds an embedding of the total charge so far under each, and counts
    are chosen in view of the charge that they leave: sums that layers would have to learn.
    """

    first_row: Tensor
    first_charge: Tensor
    charges: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.dense = nn.Linear(config.n_features, width)
        self.stage = nn.Embedding(len(Stage) + N_COORDINATES, width)
        self.system = nn.Embedding(len(LATTICE_SYSTEMS) + 1, width)
        self.point = nn.Embedding(len(POINT_SYMMETRIES) + 1, width)
        self.group = nn.Embedding(N_SPACE_GROUPS + 1, width)
        self.element = nn.Embedding(config.n_elements + 1, width)
        self.origin = nn.Embedding(SYMMETRY.shift_letters.shape[1], width)
        tables = (self.stage, self.system, self.point, self.group, self.element, self.origin)
        for table in tables[:-1]:
            nn.init.normal_(table.weight, std=0.3)
        nn.init.zeros_(self.origin.weight)
        first_row = torch.tensor([0, *(table.num_embeddings for table in tables[:-1])]).cumsum(dim=0)
        self.register_buffer("first_row", first_row, persistent=False)  # of each table when they are stacked
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(config.depth - 1))
        self.system_head = nn.Linear(width, len(LATTICE_SYSTEMS))
        self.point_head = nn.Linear(width, len(POINT_SYMMETRIES))
        self.group_head = nn.Linear(width, N_SPACE_GROUPS)
        self.element_head = nn.Linear(width, config.n_elements + 1)
        self.count_in = nn.Linear(width, _COUNT_WIDTH)
        self.count_element = nn.Embedding(config.n_elements + 1, _COUNT_WIDTH)
        self.count_out = nn.Linear(_COUNT_WIDTH, config.max_count + 1)
        self.n_site_symmetries = len(SYMMETRY.site_symmetry_names)
        self.letter_head = nn.Linear(width, self.n_site_symmetries + MAX_LETTERS)
        self.letter_bias = nn.Embedding(N_SPACE_GROUPS, MAX_LETTERS)
        self.order_head = nn.Linear(width, MAX_LETTERS)
        self.position_query = nn.Linear(width, _POSITION_WIDTH)
        self.position_key = nn.Embedding(N_SPACE_GROUPS, MAX_LETTERS * _POSITION_WIDTH)
        self.position_in = nn.Linear(2 * _POSITION_WIDTH, width, bias=False)
        self.lattice_head = nn.Linear(width, N_COORDINATES * 3 * config.n_components)
        self._start_near_uniform()
        if config.assignments:
            self._add_charges(config.assignments)

    def _add_charges(self, assignments: tuple[tuple[int, ...], ...]) -> None:
        n, width, n_charges = len(assignments), self.config.width, _MOST_CHARGE - _LEAST_CHARGE + 1
        end = self.first_row[-1] + self.origin.num_embeddings
        self.register_buffer("first_charge", end + n_charges * torch.arange(n), persistent=False)
        # The end of the composition, one column more, carries none.
        charges = nn.functional.pad(torch.tensor(assignments), (0, 1))
        self.register_buffer("charges", charges, persistent=False)  # (n, n_elements + 1) int64
        self.charge = nn.Embedding(n * n_charges, width)
        self.balance = nn.Linear(width, n * (2 * _UNBALANCED + 1))
        for parameter in (self.charge.weight, self.balance.weight, self.balance.bias):
            nn.init.zeros_(parameter)

    def _start_near_uniform(self) -> None:
        """Start with all legal actions about equally likely, and lattices spread over the physical box."""
        for head in (self.system_head, self.point_head, self.group_head, self.element_head, self.count_out):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
        nn.init.normal_(self.letter_head.weight, std=0.01)
        nn.init.zeros_(self.letter_head.bias)
        nn.init.zeros_(self.letter_bias.weight)
        nn.init.zeros_(self.order_head.weight)
        nn.init.zeros_(self.order_head.bias)
        nn.init.zeros_(self.position_key.weight)
        nn.init.zeros_(self.position_in.weight)
        nn.init.normal_(self.lattice_head.weight, std=0.01)
        low, high = VOLUME_RANGE
        k = self.config.n_components
        bias = torch.zeros(N_COORDINATES, 3, k)
        bias[:, 1] = torch.linspace(0.05, 0.95, k)
        bias[:, 2] = torch.tensor(0.15).log()
        bias[VOLUME, 1] = (torch.linspace(-0.4, 0.5, k) - low) / (high - low)
        bias[VOLUME, 2] = torch.tensor(0.2 / (high - low)).log()
        with torch.no_grad():
            self.lattice_head.bias.copy_(bias.flatten())

    def total_charges(self, features: Tensor) -> Tensor:
        """Return (n, n_assignments) int64 charges of what is chosen, from the dense features of observations."""
        atoms = features[:, : self.config.n_elements] * self.config.feature_atoms
        return (atoms @ self.charges[:, :-1].t().to(atoms.dtype)).round().long()

    def encode(self, observation: Observation) -> Tensor:
        """Return (n, width) hidden state of each observation; observations may mix stages."""
        kind = torch.where(observation.coordinate >= 0, len(Stage) + observation.coordinate, observation.stage)
        chosen = (observation.system, observation.point, observation.group, observation.element)
        index = torch.stack([kind, *(value + 1 for value in chosen), observation.origin], dim=1) + self.first_row
        tables = [self.system.weight, self.point.weight, self.group.weight, self.element.weight, self.origin.weight]
        if self.config.assignments:
            total = self.total_charges(observation.dense).clamp(_LEAST_CHARGE, _MOST_CHARGE)
            index = torch.cat([index, total - _LEAST_CHARGE + self.first_charge], dim=1)
            tables.append(self.charge.weight)
        # One sum over all tables and a product on top of it move a quarter of the memory that one sum per table does.
        weights = torch.cat([self.stage.weight + self.dense.bias, *tables])
        dense = observation.dense.to(weights.dtype)
        x = nn.functional.embedding_bag(index, weights, mode="sum").addmm_(dense, self.dense.weight.t())
        x.add_(self.position_in(self._occupied(observation.group, dense)))
        forget = not torch.is_grad_enabled()  # a gradient needs what went into the activation
        x = nn.functional.silu(x, inplace=forget)
        for layer in self.hidden:
            x = nn.functional.silu(layer(x), inplace=forget).add_(x)
            if self.config.dropout > 0.0:
                x = nn.functional.dropout(x, self.config.dropout, self.training)
        return x

    def _occupied(self, group: Tensor, dense: Tensor) -> Tensor:
        """Return (n, 2 * _POSITION_WIDTH) sums of the keys of occupied positions, by atoms and weighted by element."""
        first = self.config.n_elements
        shares = dense[:, first : first + 2 * MAX_LETTERS].unflatten(1, (2, MAX_LETTERS)).flatten(0, 1)
        row, letter = shares.nonzero().unbind(dim=1)  # few of the 27 letters are in use
        n_used = torch.bincount(row, minlength=len(shares))
        offsets = n_used.cumsum(dim=0) - n_used
        index = group[row // 2] * MAX_LETTERS + letter
        keys = self.position_key.weight.view(-1, _POSITION_WIDTH)
        weights = shares[row, letter]
        sums = nn.functional.embedding_bag(index, keys, offsets, mode="sum", per_sample_weights=weights)
        return sums.unflatten(0, (-1, 2)).flatten(1)

    def symmetry(self, stage: Stage, hidden: Tensor, mask: Tensor) -> MaskedCategorical:
        """Return the choice of lattice system, point symmetry or space group."""
        head = (self.system_head, self.point_head, self.group_head)[stage]
        return MaskedCategorical(head(hidden), mask)

    def next_element(self, hidden: Tensor, mask: Tensor) -> MaskedCategorical:
        """Return the choice of the next element, or of the end of the composition."""
        return MaskedCategorical(self.element_head(hidden), mask)

    def count(self, hidden: Tensor, element: Tensor, features: Tensor, mask: Tensor) -> MaskedCategorical:
        """Return the choice of how many atoms of ``element`` (n,); ``features`` are those of the observations."""
        x = nn.functional.silu(self.count_in(hidden) + self.count_element(element))
        logits = self.count_out(x)
        if self.config.assignments:
            scores = self.balance(hidden).unflatten(1, (len(self.charges), -1))
            added = self.charges.t()[element][:, :, None] * torch.arange(self.config.max_count + 1)
            after = (self.total_charges(features)[:, :, None] + added).clamp(-_UNBALANCED, _UNBALANCED)
            logits = logits + scores.gather(2, after + _UNBALANCED).sum(dim=1)
        return MaskedCategorical(logits, mask)

    def letter(self, hidden: Tensor, group: Tensor, shifts: Tensor, mask: Tensor) -> MaskedCategorical:
        """Return the choice of a Wyckoff letter; ``shifts`` are those of the observations, which say what is seen.

        Letters of the same site symmetry share weights across groups. Letters that the crystal so far cannot tell
        apart, because a shift exchanges them, are seen as the same one; ``order_head`` and the origin in ``hidden``
        are left to say which of them comes first in the order of an element's letters.
        """
        scores = self.letter_head(hidden)
        shared = scores[:, : self.n_site_symmetries].gather(1, SYMMETRY.site_symmetry.index_select(0, group))
        seen = shared + scores[:, self.n_site_symmetries :] + self.letter_bias(group)
        least = SYMMETRY.least_letters(group, shifts)
        row, letter = mask.nonzero().unbind(dim=1)  # few of the 27 letters are legal
        index = group[row] * MAX_LETTERS + least[row, letter]
        keys = nn.functional.embedding(index, self.position_key.weight.view(-1, _POSITION_WIDTH))
        own = (keys * self.position_query(hidden)[row]).sum(dim=1)
        logits = (seen.gather(1, least) + self.order_head(hidden)).index_put((row, letter), own, accumulate=True)
        return MaskedCategorical(logits, mask)

    def lattice(self, hidden: Tensor, coordinate: Tensor, interval: Tensor) -> TruncatedLogisticMixture:
        """Return the density of lattice ``coordinate`` (n,) on ``interval`` (n, 2)."""
        k = self.config.n_components
        raw = self.lattice_head(hidden).unflatten(-1, (N_COORDINATES, 3, k))
        raw = raw.gather(1, coordinate[:, None, None, None].expand(-1, 1, 3, k))[:, 0]
        # Clamped before the exponential, whose overflow would have no gradient.
        scale = raw[:, 2].clamp(math.log(_MIN_SCALE), math.log(_MAX_SCALE)).exp()
        low, high = interval.to(raw.dtype).unbind(dim=-1)
        # Bounds on lengths can leave less than the network's precision resolves.
        resolution = _RESOLUTION * torch.finfo(raw.dtype).eps
        narrow = high - low < resolution
        low, high = torch.where(narrow, low - resolution, low), torch.where(narrow, high + resolution, high)
        return TruncatedLogisticMixture(raw[:, 0], raw[:, 1], scale, low, high)

    def log_prob(self, records: dict[Stage, StepRecord], n: int) -> Tensor:
        """Return (n,) Σ_t log P_F of walks 0..n-1 from their recorded decisions, with one pass of the trunk."""
        hidden = self.encode(join_observations([record.observation for record in records.values()]))
        hidden = hidden.split([len(record.observation) for record in records.values()])
        total = torch.zeros(n, dtype=torch.float64)
        for part, record in zip(hidden, records.values(), strict=True):
            log_p = self._log_prob(part, record)
            total = total.index_add(0, record.walk, log_p.double())
        return total

    def _log_prob(self, distinct: Tensor, record: StepRecord) -> Tensor:
        hidden = distinct[record.source] if len(distinct) < len(record.source) else distinct
        if record.stage == Stage.LATTICE:
            return self.lattice(hidden, record.action, record.interval).log_prob(record.unit.to(hidden.dtype))
        if record.stage == Stage.COMPOSITION:
            log_p = self.next_element(hidden, record.mask).log_prob(record.action)
            features = record.observation.dense
            features = features[record.source] if len(distinct) < len(record.source) else features
            return log_p + self.count(hidden, record.action, features, record.count_mask).log_prob(record.count)
        if record.stage == Stage.WYCKOFF:
            observation = record.observation
            return self.letter(hidden, observation.group, observation.shifts, record.mask).log_prob(record.action)
        return self.symmetry(record.stage, hidden, record.mask).log_prob(record.action)


@dataclass(frozen=True)
class Exploration:
    """How a behaviour policy departs from the learned one."""

    epsilon: float = 0.0  # share of uniform choices over legal actions
    temperature: float = 1.0  # above 1 flattens


class PolicyChooser:
    """Draws actions from a policy, with an explicit generator and optional exploration.

    With ``keep_log_prob`` it adds up log P_F of what it draws, under the policy itself whatever the exploration; where
    gradients are enabled they flow through that sum, so that on-policy training needs no second pass of the network.
    """

    def __init__(
        self,
        policy: CrystalPolicy,
        generator: torch.Generator,
        exploration: Exploration | None = None,
        *,
        keep_log_prob: bool = False,
    ) -> None:
        self.policy = policy
        self.generator = generator
        self.exploration = exploration or Exploration()
        self.keep_log_prob = keep_log_prob
        self._kept: list[tuple[Tensor, Tensor]] = []

    def encode(self, observation: Observation) -> Tensor:
        """Return the trunk's output."""
        return self.policy.encode(observation)

    def discrete(
        self, stage: Stage, hidden: Tensor, states: States, rows: Tensor, mask: Tensor, *, source: Tensor | None
    ) -> Tensor:
        """Return (n,) int64 drawn actions."""
        if stage == Stage.COMPOSITION:
            distribution = self.policy.next_element(hidden, mask)
        elif stage == Stage.WYCKOFF:
            distribution = self.policy.letter(hidden, states.group[rows], states.shifts[rows], mask)
        else:
            distribution = self.policy.symmetry(stage, hidden, mask)
        return self._draw_action(distribution, rows, source)

    def count(self, hidden: Tensor, element: Tensor, states: States, rows: Tensor, mask: Tensor) -> Tensor:
        """Return (n,) int64 drawn counts."""
        return self._draw_action(self.policy.count(hidden, element, states.features[rows], mask), rows, None)

    def unit(self, hidden: Tensor, rows: Tensor, coordinate: Tensor, interval: Tensor) -> Tensor:
        """Return (n,) float64 drawn unit coordinates."""
        distribution = self.policy.lattice(hidden, coordinate, interval)
        drawn = self._behaviour(distribution).sample_with(self.generator).double()
        unit = torch.maximum(torch.minimum(drawn, interval[:, 1]), interval[:, 0])
        if self.keep_log_prob:
            self._kept.append((rows, distribution.log_prob(unit.to(distribution.loc.dtype))))
        return unit

    def log_prob(self, n: int) -> Tensor:
        """Return (n,) float64 Σ_t log P_F of walks 0..n-1, as ``CrystalPolicy.log_prob`` gives it for their records."""
        total = torch.zeros(n, dtype=torch.float64)
        if not self._kept:
            return total
        rows, log_p = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return total.index_add(0, rows, log_p.double())

    def _draw_action(self, distribution: MaskedCategorical, rows: Tensor, source: Tensor | None) -> Tensor:
        action = self._behaviour(distribution).sample_with(self.generator, source)
        if self.keep_log_prob:
            self._kept.append((rows, distribution.log_prob_of(action, source)))
        return action

    def _behaviour(self, distribution: DistributionT) -> DistributionT:
        """Return ``distribution`` as exploration changes it."""
        with torch.no_grad():
            if self.exploration.temperature != 1.0:
                distribution = distribution.tempered(self.exploration.temperature)
            if self.exploration.epsilon > 0.0:
                distribution = distribution.mixed_with_uniform(self.exploration.epsilon)
        return distribution
