"""Enumerable spaces with arbitrary rewards, their exact answers, and a policy with one logit per state and action."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv, Observation, Stage
from envs.enumerate import enumerate_crystals
from envs.equivalence import image, log_n_images
from envs.restrictions import Space, mp20_space
from envs.symmetry import SYMMETRY
from policies.distributions import MaskedCategorical, TruncatedLogisticMixture
from policies.policy import CrystalPolicy, PolicyConfig
from policies.rollout import walk
from policies.trajectories import StepRecord, join_observations

#: 174 leaves, of which up to eight are images of one crystal. Cubic, so that the lattice is one coordinate.
CUBIC = replace(
    mp20_space(),
    elements=("Li", "Ti", "O"),
    max_count=5,
    n_atoms=(1, 5),
    n_elements=(2, 3),
    space_groups=(215, 216, 221, 225, 229),
)


@dataclass(frozen=True)
class ExactTarget:
    """A reward drawn once per crystal, and everything that follows from it exactly."""

    env: CrystalEnv
    leaves: CrystalBatch
    records: dict[Stage, StepRecord]  # decisions that lead to each leaf, without the lattice
    crystal: Tensor  # (n_leaves,) int64: leaves that are images of each other share a number
    log_rewards: Tensor  # (n_leaves,) float64, equal for images of each other
    probabilities: Tensor  # (n_leaves,) float64, R / (number of images) over Z
    log_Z: float  # of the leaves with their lattices
    log_Z_without_lattice: float
    keys: Tensor  # (n_leaves,) int64 sorted signatures, to recognise sampled crystals
    order: Tensor  # (n_leaves,) int64 leaf of each key

    @classmethod
    def build(cls, space: Space, *, seed: int = 0, smooth: bool = False) -> "ExactTarget":
        """Enumerate ``space`` and draw log-rewards: one per crystal, or a smooth function of what a crystal holds."""
        env = CrystalEnv(space)
        leaves = enumerate_crystals(env)
        keys, order = signature(leaves).sort()
        crystal = torch.arange(len(leaves))
        for alternative in range(int(SYMMETRY.n_alternatives[leaves.space_group - 1].max())):
            exists = alternative < SYMMETRY.n_alternatives[leaves.space_group - 1]
            moved = image(leaves, torch.where(exists, alternative, 0))
            crystal = torch.minimum(crystal, order[torch.searchsorted(keys, signature(moved))])
        generator = torch.Generator().manual_seed(seed)
        if smooth:
            log_rewards = _smooth_log_rewards(leaves, generator)
        else:
            drawn = torch.randn(len(leaves), generator=generator, dtype=torch.float64)
            log_rewards = (1.5 * drawn)[crystal]
        n_images = torch.bincount(crystal, minlength=len(leaves))[crystal]
        log_mass = log_rewards - n_images.double().log()
        trajectories = walk(env, leaves)
        assert bool(trajectories.legal.all())
        # A reward that does not depend on the volume has the width of its interval as mass.
        widths = trajectories.records[Stage.LATTICE].interval.diff(dim=1)[:, 0]
        assert float(widths.max() - widths.min()) < 1e-9
        log_sum = torch.logsumexp(log_mass, dim=0)
        log_Z = float(log_sum + widths[0].log())
        records = {stage: record for stage, record in trajectories.records.items() if stage != Stage.LATTICE}
        return cls(
            env, leaves, records, crystal, log_rewards, log_mass.softmax(dim=0), log_Z, float(log_sum), keys, order
        )

    def leaf_of(self, crystals: CrystalBatch) -> Tensor:
        """Return (n,) int64 index of the leaf of each crystal."""
        found = signature(crystals)
        place = torch.searchsorted(self.keys, found)
        assert bool((self.keys[place] == found).all())
        return self.order[place]

    def log_reward(self, crystals: CrystalBatch) -> Tensor:
        return self.log_rewards[self.leaf_of(crystals)]

    def log_pb(self, crystals: CrystalBatch) -> Tensor:
        return -log_n_images(crystals, self.env.space.box)

    def total_variation(self, policy: CrystalPolicy) -> float:
        with torch.no_grad():
            p = policy.log_prob(self.records, len(self.leaves)).exp()
        return 0.5 * float((p - self.probabilities).abs().sum())


def _smooth_log_rewards(leaves: CrystalBatch, generator: torch.Generator) -> Tensor:
    """Return (n,) log-rewards from the group, the amount of each element and the number of orbits."""
    of_group = torch.randn(231, generator=generator, dtype=torch.float64)[leaves.space_group]
    of_elements = leaves.composition.double() @ torch.randn(119, generator=generator, dtype=torch.float64)
    n_orbits = (leaves.counts > 0).sum(dim=1)
    return of_group + 0.5 * of_elements - 0.4 * n_orbits


def signature(crystals: CrystalBatch) -> Tensor:
    """Return (n,) int64 of the space group and the multiset of (element, letter, count)."""
    table = torch.randint(-(2**60), 2**60, (119, 28), generator=torch.Generator().manual_seed(11))
    orbits = table[crystals.elements, crystals.letters + 1] * crystals.counts
    return orbits.sum(dim=1) + crystals.space_group * 1_000_003


class TabularPolicy(CrystalPolicy):
    """A free logit for every action of every state that ``records`` visit; lattices are uniform on their interval."""

    def __init__(self, config: PolicyConfig, records: dict[Stage, StepRecord]) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.n_actions = 256
        observations = join_observations([record.observation for record in records.values()])
        self.keys = self._key(observations).unique()
        n_states = len(self.keys)
        self.logits = nn.Parameter(torch.zeros(n_states, self.n_actions, dtype=torch.float64))
        shape = (n_states, config.n_elements + 1, config.max_count + 1)
        self.count_logits = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    @staticmethod
    def _key(observation: Observation) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        parts = (
            observation.stage,
            observation.system,
            observation.point,
            observation.group,
            observation.element,
            observation.origin,  # no more than a network sees
        )
        columns = torch.cat([torch.stack(parts, dim=1).double(), observation.dense.double()], dim=1)
        weights = torch.rand(columns.shape[1], generator=generator, dtype=torch.float64)
        return (columns @ weights * 2**40).round().long() >> 12

    def encode(self, observation: Observation) -> Tensor:
        """Return (n,) float64 number of each state; the lattice stage needs none."""
        return torch.searchsorted(self.keys, self._key(observation)).clamp(max=len(self.keys) - 1).double()

    def symmetry(self, stage: Stage, hidden: Tensor, mask: Tensor) -> MaskedCategorical:
        del stage
        return self.next_element(hidden, mask)

    def next_element(self, hidden: Tensor, mask: Tensor) -> MaskedCategorical:
        return MaskedCategorical(self.logits[hidden.long(), : mask.shape[1]], mask)

    def count(self, hidden: Tensor, element: Tensor, features: Tensor, mask: Tensor) -> MaskedCategorical:
        del features
        return MaskedCategorical(self.count_logits[hidden.long(), element], mask)

    def letter(self, hidden: Tensor, group: Tensor, shifts: Tensor, mask: Tensor) -> MaskedCategorical:
        del group, shifts
        return self.next_element(hidden, mask)

    def lattice(self, hidden: Tensor, coordinate: Tensor, interval: Tensor) -> TruncatedLogisticMixture:
        del hidden, coordinate
        flat = torch.zeros(len(interval), 1, dtype=torch.float64)
        return TruncatedLogisticMixture(flat, flat, flat + 1e6, interval[:, 0], interval[:, 1])
