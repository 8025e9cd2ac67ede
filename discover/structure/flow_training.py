"""Training of the flow: rectified flow on the torus of free parameters and in normalised lattice coordinates.

Imports torch and numpy only and reads an `OrbitBatch`, so it runs wherever these two are. Several processes, started by
``torchrun``, share the work; one process needs nothing. A checkpoint holds everything, and a killed training continues.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from discover.structure.network import FlowConfig, OrbitFormer
from discover.structure.orbit_batch import Frame, LatticeScale, OrbitBatch, make_frame
from discover.structure.torus import nearest_equivalent, wrap
from envs.lattice import IS_FREE
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import free_mask, transform_parameters
from policies.ema import ExponentialMovingAverage
from policies.parallel import join_processes
from policies.training_state import check_same_training, digest, restore_training, training_tensors

_CHECKPOINT_SECONDS = 60.0
_BATCHES_SORTED_TOGETHER = 16  # crystals of a batch have similar numbers of orbits, so that little is padding
#: Shares of training examples by clock of the lattice: in step with the parameters, later than them, at its end.
_IN_STEP, _LATER = 0.45, 0.40


@dataclass(frozen=True, kw_only=True)
class FlowTraining:
    """Settings of one training; the shipped network had two (its model card)."""

    epochs: int = 150
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.999
    lattice_weight: float = 0.02  # relative to the squared error of the parameters
    pairing: bool = True  # pair noise with the nearest equivalent parameters
    minutes: float | None = None  # the learning rate falls to its end within this time, or with the epochs
    seed: int = 0
    network: FlowConfig = field(default_factory=partial(FlowConfig, dropout=0.1))


@dataclass(frozen=True)
class Example:
    """A batch on its way: where it is, and how fast it should go."""

    frame: Frame
    parameters: Tensor  # (n, w, 3) now
    lattice: Tensor  # (n, 6) normalised, now
    cell: Tensor  # (n, 6) now
    clocks: Tensor  # (n, 2)
    parameter_velocity: Tensor  # (n, w, 3)
    lattice_velocity: Tensor  # (n, 6)
    lattice_moves: Tensor  # (n,) bool: clocks of the lattice before its end

    def to(self, device: torch.device) -> "Example":
        """Return the example on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return Example(**moved)


def random_setting(batch: OrbitBatch, generator: torch.Generator) -> OrbitBatch:
    """Return each crystal in a random one of the equivalent settings of its space group."""
    group = batch.space_group - 1
    n_alternatives = SYMMETRY.n_alternatives[group]
    alternative = (torch.rand(len(batch), generator=generator) * n_alternatives).long().clamp(max=n_alternatives - 1)
    relabelled = SYMMETRY.alternative_letters[group, alternative].gather(1, batch.letters.clamp(min=0))
    letters = torch.where(batch.letters >= 0, relabelled, -1)
    parameters = transform_parameters(batch.space_group, batch.letters, batch.parameters, alternative)
    axes = SYMMETRY.alternative_axes[group, alternative]
    cell = torch.cat([batch.cell[:, :3].gather(1, axes), batch.cell[:, 3:]], dim=1)
    return replace(
        batch,
        letters=letters,
        parameters=parameters * free_mask(batch.space_group, letters),
        cell=cell,
    )


def draw_example(
    batch: OrbitBatch, scale: LatticeScale, generator: torch.Generator, *, pairing: bool = True
) -> Example:
    """Return noise, its partner in the data, and a random instant of the straight path between them.

    The lattice has a clock of its own, so that one network flows from noise in both (`free`), moves coordinates in a
    lattice that is nearly right (`refine`) or given (`fixed`).
    """
    n = len(batch)
    frame = make_frame(batch.space_group, batch.elements, batch.letters)
    start = torch.rand(batch.parameters.shape, generator=generator) * frame.is_free
    target = batch.parameters
    if pairing:
        target = nearest_equivalent(batch.space_group, batch.elements, batch.letters, target, start)
    velocity = wrap(target - start) * frame.is_free
    clock = torch.rand(n, generator=generator)
    kind = torch.rand(n, generator=generator)
    later = clock + (1.0 - clock) * torch.rand(n, generator=generator).sqrt()
    lattice_clock = torch.where(kind < _IN_STEP, clock, torch.where(kind < _IN_STEP + _LATER, later, 1.0))
    system = batch.lattice_system
    end = scale.normalise(batch.cell, batch.log_reference, system)
    noise = torch.randn(n, 6, generator=generator) * IS_FREE[system]
    now = torch.lerp(noise, end, lattice_clock[:, None])
    return Example(
        frame=frame,
        parameters=(start + clock[:, None, None] * velocity) % 1.0 * frame.is_free,
        lattice=now,
        cell=scale.cell(now, batch.log_reference, system),
        clocks=torch.stack([clock, lattice_clock], dim=1),
        parameter_velocity=velocity,
        lattice_velocity=end - noise,
        lattice_moves=lattice_clock < 1.0,
    )


def flow_loss(network: nn.Module, example: Example) -> tuple[Tensor, Tensor]:
    """Return the mean squared errors of the velocities of the parameters and of the lattice.

    Orbits count by their atoms. Crystals without free parameters have no part in the first, given lattices none in the
    second.
    """
    frame = example.frame
    velocity, lattice_velocity = network(frame, example.parameters, example.lattice, example.cell, example.clocks)
    error = (velocity - example.parameter_velocity).square() * frame.is_free
    weight = frame.multiplicity.float() / frame.multiplicity.sum(dim=1, keepdim=True)
    has_freedom = frame.is_free.any(dim=2).any(dim=1)
    per_crystal = (error.sum(dim=2) * weight).sum(dim=1)
    is_free = IS_FREE.to(error.device)[frame.lattice_system] & example.lattice_moves[:, None]
    lattice_error = (lattice_velocity - example.lattice_velocity).square() * is_free
    return per_crystal.sum() / has_freedom.sum().clamp(min=1), lattice_error.sum() / is_free.sum().clamp(min=1)


class FlowTrainer:
    """Trains a network, with checkpoints.

    Args:
        data: Crystals to train on.
        held_out: Crystals whose loss is reported after every epoch.
        settings: How.
        descriptors: (119, n) properties of the elements, saved with the weights.
        folder: Receives ``flow.checkpoint.npz`` and ``log.jsonl``.
        device: Where the network lives; data are prepared on the CPU.
        start: Network, and the statistics of its lattices, to start from; None starts from nothing.
    """

    def __init__(
        self,
        data: OrbitBatch,
        held_out: OrbitBatch,
        settings: FlowTraining,
        descriptors: Tensor,
        folder: Path,
        device: torch.device | str = "cpu",
        start: tuple[OrbitFormer, LatticeScale] | None = None,
    ) -> None:
        self.data, self.held_out, self.settings, self.folder = data, held_out, settings, folder
        self.device = torch.device(device)
        self.processes = join_processes(self.device)
        self.rank, self.world = self.processes.rank, self.processes.world
        torch.manual_seed(settings.seed)
        self.network = OrbitFormer(settings.network, descriptors).to(self.device)
        self.scale = LatticeScale.fit(data) if start is None else start[1]
        if start is not None:
            self.network.load_state_dict(start[0].state_dict())
        begun = None if start is None else digest(*self.network.state_dict().values())
        self._identity = asdict(settings) | {"data": digest(*vars(data).values()), "start": begun}
        self.average = ExponentialMovingAverage(self.network, settings.ema_decay)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.step, self.epoch, self.seconds = 0, 0, 0.0
        self.n_batches = max(1, len(data) // (settings.batch_size * self.world))
        self._run = self._parallel()
        if self.checkpoint.is_file():
            self.restore()

    @property
    def checkpoint(self) -> Path:
        """The file that a killed training continues from."""
        return self.folder / "flow.checkpoint.npz"

    @property
    def progress(self) -> float:
        """Share of the training that is done, by epochs or by time, whichever is further."""
        done = self.step / (self.settings.epochs * self.n_batches)
        if self.settings.minutes is not None:
            done = max(done, self.seconds / (60.0 * self.settings.minutes))
        return min(done, 1.0)

    def run(self, on_step: Callable[[float], None] | None = None) -> None:
        """Train to the end; afterwards the network holds the averaged weights."""
        saved = time.monotonic()
        while self.progress < 1.0:
            sums, started = torch.zeros(3), time.monotonic()
            for rows in self._batches():
                tick = time.monotonic()
                losses = self._train_step(rows)
                sums += torch.tensor([*losses, 1.0])
                self.seconds += self._for_all(time.monotonic() - tick)
                if on_step is not None:
                    on_step(losses[0])
                if self.rank == 0 and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if self.progress >= 1.0:
                    break
            self.epoch += 1
            if self.rank == 0:
                self._log(sums, time.monotonic() - started)
        if self.rank == 0:
            self.save()
        self.network.load_state_dict(self.averaged_weights())

    def _for_all(self, seconds: float) -> float:
        """Return the time of the first process, whose clock counts for all: they step alike and stop together."""
        if self.settings.minutes is None:
            return seconds
        own = torch.tensor([seconds if self.rank == 0 else 0.0], dtype=torch.float32, device=self.device)
        return float(self.processes.total(own))

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return the averaged weights, on the CPU, under their own names."""
        with self.average.swapped_in():
            return {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}

    def save(self) -> None:
        """Write the checkpoint; an interrupted write leaves the old one."""
        arrays = training_tensors(self.network, self.average, self.optimiser)
        arrays |= {"scale.mean": self.scale.mean, "scale.std": self.scale.std}
        facts = {"step": self.step, "epoch": self.epoch, "seconds": self.seconds, "settings": self._identity}
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".partial")
        with partial.open("wb") as handle:
            tensors = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
            np.savez(handle, allow_pickle=False, facts=np.array(json.dumps(facts)), **tensors)
        partial.replace(self.checkpoint)

    def restore(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: If it belongs to other settings, data or weights to start from; a training may get longer
                or shorter.
        """
        with np.load(self.checkpoint, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "facts"}
            facts: dict[str, Any] = json.loads(str(stored["facts"]))
        check_same_training(self.checkpoint, facts["settings"], self._identity)
        restore_training(arrays, self.network, self.average, self.optimiser)
        self.scale = LatticeScale(arrays["scale.mean"], arrays["scale.std"])
        self.step, self.epoch, self.seconds = facts["step"], facts["epoch"], facts["seconds"]

    def held_out_loss(self) -> tuple[float, float]:
        """Return both losses of the averaged network on the held-out crystals, with the same noise every time."""
        generator = torch.Generator().manual_seed(1)
        totals, n = np.zeros(2), 0
        self.network.eval()
        with torch.no_grad(), self.average.swapped_in():
            for rows in torch.arange(len(self.held_out)).split(self.settings.batch_size):
                example = draw_example(self.held_out.select(rows), self.scale, generator, pairing=self.settings.pairing)
                losses = flow_loss(self.network, example.to(self.device))
                totals += len(rows) * np.array([float(loss) for loss in losses])
                n += len(rows)
        self.network.train()
        mean = totals / max(n, 1)
        return float(mean[0]), float(mean[1])

    def _train_step(self, rows: Tensor) -> tuple[float, float]:
        seed = hash((self.settings.seed, self.step, self.rank)) % 2**62
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout; a step that is repeated repeats itself
        batch = random_setting(self.data.select(rows), generator)
        example = draw_example(batch, self.scale, generator, pairing=self.settings.pairing).to(self.device)
        lr = (
            self.settings.lr
            * min(1.0, (self.step + 1) / 300)
            * max(0.01, 0.5 * (1 + math.cos(math.pi * self.progress)))
        )
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            parameters, lattice = flow_loss(self._run, example)
            loss = parameters + self.settings.lattice_weight * lattice
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.average.update()
        self.step += 1
        return float(parameters.detach()), float(lattice.detach())

    def _batches(self) -> Iterator[Tensor]:
        """Yield this process's rows of every batch of an epoch; a batch holds crystals of similar size."""
        size = self.settings.batch_size * self.world
        generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.data), generator=generator)
        n_orbits = (self.data.letters >= 0).sum(dim=1)
        batches: list[Tensor] = []
        for chunk in order.split(size * _BATCHES_SORTED_TOGETHER):
            batches += list(chunk[n_orbits[chunk].argsort(stable=True)].split(size))
        for index in torch.randperm(len(batches), generator=generator)[: self.n_batches].tolist():
            yield batches[index][self.rank :: self.world]

    def _parallel(self) -> nn.Module:
        network: nn.Module = self.network
        if self.device.type == "cuda":
            network.compile(dynamic=True)
        if self.world > 1:
            network = nn.parallel.DistributedDataParallel(network)
        return network

    def _log(self, sums: Tensor, seconds: float) -> None:
        held_out = self.held_out_loss()
        count = max(float(sums[2]), 1.0)
        line = {
            "epoch": self.epoch,
            "step": self.step,
            "train": float(sums[0]) / count,
            "train_lattice": float(sums[1]) / count,
            "held_out": held_out[0],
            "held_out_lattice": held_out[1],
            "epoch_seconds": round(seconds, 1),
            "seconds": round(self.seconds, 1),
            "progress": round(self.progress, 4),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.jsonl").open("a") as handle:
            handle.write(json.dumps(line) + "\n")
