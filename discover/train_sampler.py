"""Train a policy to draw crystals in proportion to a reward, from its own samples, replay and the prior's.

Trajectory balance (Malkin et al. 2022, arXiv:2201.13259), with learned log Z (``loss=tb``) or with the
batch-optimal one (``loss=vargrad``). The state graph is a tree, so log P_B is minus the log of the
number of equivalent letter assignments.

Several processes share a batch: each draws its part, with a generator and a replay buffer of its own, the loss is that
of the whole batch, and all take the same step.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discover.config import TrainingConfig
from discover.errors import CheckpointError, ConfigError, TrainingError
from discover.target import SamplingTarget, Terms
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from policies.ema import ExponentialMovingAverage
from policies.losses import huber, log_partition_variance_loss, trajectory_balance_loss, trajectory_balance_residual
from policies.parallel import ALONE, Processes
from policies.policy import CrystalPolicy, Exploration, PolicyChooser
from policies.replay import ReplayBuffer
from policies.rollout import rollout, walk
from policies.training_state import optimiser_tensors, part, restore_optimiser

_PENALTY = huber(10.0)  # square where training ends, linear for the outliers of its start
_GRADIENT_NORM = 10.0
_EMA_DECAY = 0.99
_REPLAY = 50_000
_WARM_UP = 0.3  # share of training over which the reward's exponent rises to 1
_START_SHARPNESS = 0.1
_CRYSTAL_COLUMNS = ("space_group", "elements", "letters", "counts", "lattice_parameters")
_TERM_COLUMNS = ("log_reward", "log_prior", "log_measure", "log_images")
_ANOTHER = "the checkpoint belongs to a different policy or version: {}"


@dataclass(frozen=True)
class StepReport:
    """What one step of training shows."""

    step: int
    loss: float
    log_Z: float
    mean_log_reward: float  # of the on-policy crystals
    n_queries: int  # crystals scored so far


class Trainer:
    """State of one training: everything that ``state`` saves and ``restore`` continues.

    Args:
        env: Where crystals are built.
        policy: The policy to train.
        target: What to draw in proportion to.
        config: Steps, batch, learning rates, exploration, sources of the batch.
        data: Terminals to learn from besides the policy's own; None leaves their share to the policy.
        loss: ``"vargrad"`` or ``"tb"``.
        seed: Of every draw in training, another one in each process.
        warm_up: Raise the reward's exponent over the first part of training; a trained policy needs none.
        processes: That train together; ``config.batch_size`` is their whole batch.

    Raises:
        ConfigError: If there are more processes than trajectories in a batch.
    """

    def __init__(
        self,
        env: CrystalEnv,
        policy: CrystalPolicy,
        target: SamplingTarget,
        config: TrainingConfig,
        *,
        data: CrystalBatch | None = None,
        loss: str = "vargrad",
        seed: int = 0,
        warm_up: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        if processes.world > config.batch_size:
            raise ConfigError(f"train.batch_size={config.batch_size} is too small for {processes.world} processes")
        self.processes, self.batch_size = processes, processes.share(config.batch_size)
        self.env, self.policy, self.target, self.config, self.loss = env, policy, target, config, loss
        # Of the whole batch and then shared: rounded in each process, small parts would vanish or exceed its share.
        n_data = round(config.data_fraction * config.batch_size) if data is not None else 0
        n_replay = min(round(config.replay_fraction * config.batch_size), config.batch_size - n_data)
        self.n_data, self.n_replay = processes.share(n_data), processes.share(n_replay, start=n_data)
        self.data = data
        self.data_terms = target.terms(data) if data is not None else None
        self.data_odds = _odds(self.data_terms.log_reward) if self.data_terms is not None else None
        self.generator = torch.Generator().manual_seed(seed)
        self.log_Z = nn.Parameter(torch.zeros((), dtype=torch.float64))
        groups = [
            {"params": list(policy.parameters()), "lr": config.lr},
            {"params": [self.log_Z], "lr": config.lr_log_Z, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=1e-4)
        self.base_lr = [config.lr, config.lr_log_Z]
        self.ema = ExponentialMovingAverage(policy, decay=_EMA_DECAY)
        self.replay = ReplayBuffer(_REPLAY)
        self.warm_up = warm_up
        self.in_step = False  # True while a step is half done
        self.step = 0
        self.n_queries = 0
        self.seconds = 0.0  # spent in training, over all resumptions

    # --- one step -------------------------------------------------------------------------------

    def progress(self) -> float:
        """Return the share of training that is done, by steps or by time, whichever is further."""
        share = self.step / self.config.n_steps
        if self.config.minutes is not None:
            share = max(share, self.seconds / (60.0 * self.config.minutes))
        return min(share, 1.0)

    def train_step(self) -> StepReport:
        """Draw a batch, score what is new, and take one gradient step; all processes take it together."""
        started = time.perf_counter()
        self.in_step = True
        progress = self.progress()
        warmth = progress / _WARM_UP if self.warm_up else 1.0
        sharpness = min(1.0, _START_SHARPNESS + (1.0 - _START_SHARPNESS) * warmth)
        log_pf, terms, fresh = self._draw(progress)
        log_reward = torch.cat([self.target.log_target(part, sharpness) for part in terms])
        log_pb = -torch.cat([part.log_images for part in terms])
        total = self.processes.total
        if self.loss == "tb":
            residual = trajectory_balance_residual(self.log_Z, log_pf, log_pb, log_reward)
            loss, log_Z = trajectory_balance_loss(residual, _PENALTY, total), float(self.log_Z.detach())
        else:
            loss, log_Zs = log_partition_variance_loss(log_pf, log_pb, log_reward, penalty=_PENALTY, total=total)
            log_Z = float(log_Zs)
            residual = trajectory_balance_residual(log_Zs[0], log_pf, log_pb, log_reward)
        self._descend(loss, progress)
        residual = residual.detach()
        self._remember(fresh, terms[0], residual[: len(fresh)])
        # The clock of the first process counts for all, so that all stop at the same step.
        seconds = time.perf_counter() - started if self.processes.rank == 0 else 0.0
        own = [float(loss.detach()), float(terms[0].log_reward.sum()), len(fresh), seconds]
        whole_loss, log_rewards, n_fresh, seconds = total(torch.tensor(own, dtype=torch.float64))
        self.step += 1
        self.n_queries += int(n_fresh)
        self.seconds += float(seconds)
        self.in_step = False
        return StepReport(self.step, float(whole_loss), log_Z, float(log_rewards / n_fresh), self.n_queries)

    def _draw(self, progress: float) -> tuple[Tensor, list[Terms], CrystalBatch]:
        """Return (n,) log P_F of the batch, its terms by source, and the crystals that the policy just made.

        Gradients flow through log P_F; the policy's own walks come first, and their network passes are not repeated.
        """
        config = self.config
        n_data, n_replay = self.n_data, self.n_replay if len(self.replay) else 0
        exploration = Exploration(config.epsilon * (1.0 - 0.8 * progress), config.temperature)
        chooser = PolicyChooser(self.policy, self.generator, exploration, keep_log_prob=True)
        own = rollout(self.env, self.batch_size - n_data - n_replay, chooser, record=False)
        fresh = self.env.crystals(own.states)
        given, terms = [], [self.target.terms(fresh)]
        if n_replay:
            drawn = self.replay.sample(n_replay, self.generator)
            given.append(CrystalBatch(*(drawn.rows[name] for name in _CRYSTAL_COLUMNS)))
            terms.append(Terms(*(drawn.rows[name] for name in _TERM_COLUMNS)))
        if n_data and self.data is not None and self.data_terms is not None and self.data_odds is not None:
            rows = torch.multinomial(self.data_odds, n_data, replacement=True, generator=self.generator)
            given.append(self.data.select(rows))
            terms.append(self.data_terms.select(rows))
        log_pf = chooser.log_prob(own.n)
        if given:
            walks = walk(self.env, CrystalBatch.cat(given))
            log_pf = torch.cat([log_pf, self.policy.log_prob(walks.records, walks.n)])
        return log_pf, terms, fresh

    def _descend(self, loss: Tensor, progress: float) -> None:
        decay = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress))
        warm = min(1.0, (self.step + 1) / 50)
        for group, lr in zip(self.optimiser.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * decay * warm
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.sum_gradients([*self.policy.parameters(), self.log_Z])
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), _GRADIENT_NORM)
        if not bool(norm.isfinite()):
            raise TrainingError(
                f"the training diverged at step {self.step + 1}: the gradient is not finite. Start again with a lower "
                f"train.lr than {self.config.lr:g}"
            )
        self.optimiser.step()
        self.ema.update()

    def _remember(self, crystals: CrystalBatch, terms: Terms, residual: Tensor) -> None:
        if self.config.replay_fraction == 0.0:
            return
        padded = _padded(crystals, self.env.max_orbits)
        rows = {name: getattr(padded, name) for name in _CRYSTAL_COLUMNS}
        rows |= {name: getattr(terms, name) for name in _TERM_COLUMNS}
        self.replay.add(composition_keys(padded), rows, self.target.log_target(terms), residual)

    # --- whole training --------------------------------------------------------------------------

    def run(self, *, on_step: Callable[[StepReport], None]) -> None:
        """Train to the end, every process from the state of the first one.

        ``on_step`` may save, show or log, and an exception in it ends the training.
        """
        if self.processes.world > 1:
            tensors, state = self.processes.from_first(self._shared_state())
            if self.processes.rank:
                self.restore(tensors, state)
        while self.progress() < 1.0:
            on_step(self.train_step())

    def use_average(self) -> None:
        """Leave the averaged weights in the policy, which is what is sampled from."""
        average = self.ema.state_dict()
        average.pop("n_updates")
        self.policy.load_state_dict(average)

    @staticmethod
    def load_averaged(policy: CrystalPolicy, tensors: Mapping[str, Tensor]) -> None:
        """Put the averaged weights in what ``state`` returned into a policy.

        Raises:
            CheckpointError: If they belong to a different network.
        """
        average = part(tensors, "ema.")
        average.pop("n_updates", None)
        try:
            policy.load_state_dict(average)
        except RuntimeError as error:
            raise CheckpointError(_ANOTHER.format(error)) from error

    # --- state ---------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything needed to continue, as tensors and as JSON."""
        tensors = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        tensors |= {f"replay.{name}": value for name, value in self.replay.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser)
        tensors |= {"generator": self.generator.get_state(), "log_Z": self.log_Z.detach()}
        return tensors, {"step": self.step, "n_queries": self.n_queries, "seconds": self.seconds}

    def _shared_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what all processes have in common: everything but generator and replay."""
        tensors, state = self.state()
        kept = {name: value for name, value in tensors.items() if not name.startswith(("generator", "replay."))}
        return kept, state

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Of several processes the first one continues exactly. The others take everything from it but generator and
        replay, which start anew: the buffer empty, the generator with a seed of the step.

        Raises:
            CheckpointError: If it belongs to a different network.
        """
        try:
            self.policy.load_state_dict(part(tensors, "policy."))
            self.ema.load_state_dict(part(tensors, "ema."))
            self.replay.load_state_dict(part(tensors, "replay."))
            restore_optimiser(tensors, self.optimiser)
            with torch.no_grad():
                self.log_Z.copy_(tensors["log_Z"])
            self.step, self.n_queries = int(state["step"]), int(state["n_queries"])
            self.seconds = float(state["seconds"])
            if self.processes.rank == 0:
                self.generator.set_state(tensors["generator"].to(torch.uint8))
            else:
                self.generator.manual_seed(self.generator.initial_seed() + self.step)
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(_ANOTHER.format(error)) from error


def composition_keys(crystals: CrystalBatch) -> Tensor:
    """Return (n,) int64 hash of space group, elements, letters and counts, the same for any order of orbits."""
    code = ((crystals.elements * 32 + crystals.letters + 1) * 128 + crystals.counts) * 256 + crystals.space_group[
        :, None
    ]
    mixed = code * 0x9E3779B97F4A7C1 + 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    mixed ^= mixed >> 32
    return torch.where(crystals.counts > 0, mixed, 0).sum(dim=1) + crystals.space_group


def draw_crystals(
    env: CrystalEnv, policy: CrystalPolicy, n: int, generator: torch.Generator, *, batch_size: int = 2048
) -> Iterator[tuple[CrystalBatch, Tensor]]:
    """Yield batches of crystals and their (m,) log P_F until ``n`` are drawn; nothing is rejected."""
    while n > 0:
        size = min(n, batch_size)
        with torch.no_grad():
            chooser = PolicyChooser(policy, generator, keep_log_prob=True)
            walks = rollout(env, size, chooser, record=False)
        yield env.crystals(walks.states), chooser.log_prob(size)
        n -= size


def _padded(crystals: CrystalBatch, width: int) -> CrystalBatch:
    missing = width - crystals.elements.shape[1]
    pad = nn.functional.pad
    return CrystalBatch(
        crystals.space_group,
        pad(crystals.elements, (0, missing)),
        pad(crystals.letters, (0, missing), value=-1),
        pad(crystals.counts, (0, missing)),
        crystals.lattice_parameters,
    )


def _odds(log_reward: Tensor) -> Tensor:
    """Return (n,) odds with which data are drawn: half of the draws uniform, half in proportion to √reward."""
    return 0.5 / len(log_reward) + 0.5 * torch.softmax(0.5 * log_reward, dim=0)
