"""Train the learned proxies: an ensemble of small networks on the labelled rows of a CSV.

Rows are split by formula and by chemical system, so that no polymorph of a held-out crystal is trained on. The held-out
rows serve early choices and calibration; no other data are looked at.
"""

import json
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from discover.data import LABELS, PreparedData, prepare
from discover.run_folder import write_atomic
from envs.crystal import CrystalBatch
from policies.training_state import check_same_training, digest
from proxies import PRETRAINED, ProxyError
from proxies.augment import AugmentConfig, draw_strain, drop_letters, random_alternative, strain
from proxies.calibration import LogitCalibration, StdCalibration, interval_coverage, spearman
from proxies.elements import element_properties
from proxies.ensemble import Calibration, PropertyEnsemble, occupied_width, take
from proxies.equation_of_state import EquationOfState
from proxies.features import Features, featurise
from proxies.networks import NetworkConfig, OrbitNetwork
from proxies.sklearn_ensemble import TreeEnsemble
from proxies.stability import METASTABLE

logger = logging.getLogger(__name__)

METAL_GAP = 1e-4  # eV; smaller gaps are metals
TRAINING = "training.json"  # in the output folder: what its members are trained on
_MIN_ROWS = 200
_SECONDS_BETWEEN_CHECKPOINTS = 45.0
_NORMAL_EXCESS = 0.45  # |log(volume / reference)| beyond which a cell is not taken for relaxed
_NORMAL_VOLUME = 60.0  # Å³/atom; larger cells in the Materials Project are expanded ones
_LABEL_ORDER = ("formation_energy_per_atom", "e_above_hull", "band_gap")  # columns of TrainingData.labels
_ERROR_WEIGHT = {"formation_energy_per_atom": 1.0, "e_above_hull": 0.5, "band_gap": 0.35}
_SCALE_WEIGHT, _METAL_WEIGHT = 0.1, 0.2
#: How calibration weighs the two intervals; chosen on the held-out rows.
_ONE_SIGMA_SHARE = {"formation_energy_per_atom": 0.85, "e_above_hull": 1.0, "band_gap": 0.6}
_FEWEST_ROWS = 10  # for a figure


@dataclass(frozen=True, kw_only=True)
class ProxyTraining:
    """Settings of one training; the defaults are those of the shipped ensemble's first one."""

    n_members: int = 3
    epochs: int = 80
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    ema_decay: float = 0.999
    held_out: float = 0.04  # share of formulas, and again of chemical systems
    stable_weight: float = 0.0  # extra weight of rows below 0.1 eV/atom above the hull
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ProxyError: If a setting makes no sense.
        """
        if self.n_members < 1 or self.epochs < 1 or self.batch_size < 1:
            raise ProxyError("n_members, epochs and batch_size must be at least 1")
        if not 0.0 < self.held_out < 0.5:
            raise ProxyError(f"held_out must lie between 0 and 0.5, got {self.held_out}")


@dataclass(frozen=True)
class TrainingData:
    """Crystals with labels, split for training and for choices."""

    crystals: CrystalBatch
    labels: Tensor  # (n, 3) float32 in the order formation energy, energy above hull, gap; NaN = none
    relaxed: Tensor  # (n,) bool, cells near equilibrium
    stretchable: Tensor  # (n,) bool, cells with a free c/a
    train_rows: Tensor  # int64
    held_out_rows: Tensor  # int64
    new_system: Tensor  # (n,) bool, chemical systems that no training row has
    log_volumes: Tensor  # (119,) float32 log of the elemental volumes in Å³/atom


def train_proxy(
    data_path: Path | str,
    output: Path | str,
    *,
    settings: ProxyTraining | None = None,
    labels_path: Path | str | None = None,
    start: PropertyEnsemble | None = None,
    members: Sequence[int] | None = None,
    n_workers: int = 2,
    progress: bool = True,
) -> PropertyEnsemble:
    """Train, calibrate and save an ensemble; what an earlier, interrupted call finished is kept.

    Args:
        data_path: CSV in the field's form with at least one of the labels (see `discover.data`).
        output: Folder that receives checkpoints and, complete, `ensemble.safetensors` and `ensemble.json`.
        settings: The defaults are those of the shipped ensemble, before it learnt from labels of proposals.
        labels_path: Proposed crystals in the same form, whose labels are those after a relaxation; they are learnt as
            they are, never strained.
        start: Whose members training starts from, with their sizes; None starts from nothing.
        members: Which members to train now, all by default; the ensemble holds every member finished so far.
        n_workers: Processes that prepare the data.
        progress: Show bars.

    Raises:
        DataError: If a CSV cannot be used.
        ProxyError: If it holds too few labels.
        CheckpointError: If the folder holds members of another training.
    """
    settings = settings or ProxyTraining()
    if start is not None:
        settings = replace(settings, n_members=len(start.members), network=start.members[0].config)
    output = Path(output)
    proposed = None if labels_path is None else prepare(labels_path, n_workers=n_workers, progress=progress)
    data = split(prepare(data_path, n_workers=n_workers, progress=progress), settings, proposed)
    output.mkdir(parents=True, exist_ok=True)
    _claim(output, data, settings, start)
    for k in members if members is not None else range(settings.n_members):
        train_member(data, settings, k, output, start=None if start is None else start.members[k], progress=progress)
    about = {"n_proposed": 0 if proposed is None else len(proposed), "start": None if start is None else start.facts}
    return assemble(data, settings, output, about)


def _claim(folder: Path, data: TrainingData, settings: ProxyTraining, start: PropertyEnsemble | None) -> None:
    """Note what the members in a folder are trained on, or refuse a folder with members of another training.

    Raises:
        CheckpointError: If there are.
    """
    ours = {
        "settings": {name: value for name, value in asdict(settings).items() if name != "n_members"},
        "data": digest(*vars(data.crystals).values(), data.labels, data.relaxed),
        "start": None if start is None else digest_of(start),
    }
    ours = json.loads(json.dumps(ours))  # as it reads back
    path = folder / TRAINING
    if path.is_file() or any(folder.glob("member_*.pt")):
        check_same_training(path, json.loads(path.read_text()) if path.is_file() else {}, ours)
    write_atomic(path, json.dumps(ours, indent=1) + "\n")


def digest_of(ensemble: PropertyEnsemble) -> str:
    """Return what tells an ensemble's weights from others."""
    return digest(*(value for member in ensemble.members for value in member.state_dict().values()))


def train_trees(
    data_path: Path | str,
    output: Path | str,
    *,
    n_trees: int = 100,
    held_out: float = 0.04,
    seed: int = 0,
    n_workers: int = 2,
    progress: bool = True,
) -> TreeEnsemble:
    """Train the scikit-learn alternative on the rows that the networks train on, and save it.

    Raises:
        DataError: If the CSV cannot be used.
        ProxyError: If it holds too few labels.
    """
    data = split(prepare(data_path, n_workers=n_workers, progress=progress), ProxyTraining(held_out=held_out))
    labels = dict(zip(_LABEL_ORDER, data.labels[data.train_rows].double().T, strict=True))
    crystals = data.crystals.select(data.train_rows)
    trees = TreeEnsemble.fit(crystals, labels, data.log_volumes, n_trees=n_trees, seed=seed, n_jobs=n_workers)
    trees.save(Path(output))
    return trees


def split(data: PreparedData, settings: ProxyTraining, proposed: PreparedData | None = None) -> TrainingData:
    """Return labelled crystals with a held-out part that shares no formula with the rest.

    The split depends on nothing but names, so that every member and every resumed run has the same one.

    Args:
        data: Relaxed crystals.
        settings: Of the training.
        proposed: Crystals as they were proposed, labelled with what they relax to.

    Raises:
        ProxyError: If there are too few labelled rows.
    """
    parts = [data] if proposed is None else [data, proposed]
    crystals = CrystalBatch.cat([part.crystals for part in parts])
    labels = torch.cat([torch.stack([part.labels[name] for name in _LABEL_ORDER], 1) for part in parts])
    labelled = ~labels.isnan().all(dim=1)
    system = np.array([_share("s" + name) for name in crystals.chemical_systems()])
    formula = np.array([_share("f" + name) for part in parts for name in part.formulas])
    new_system = torch.from_numpy(system < settings.held_out)
    held_out = new_system | torch.from_numpy(formula < settings.held_out)
    train_rows, held_out_rows = (labelled & ~held_out).nonzero().flatten(), (labelled & held_out).nonzero().flatten()
    if len(train_rows) < _MIN_ROWS or len(held_out_rows) == 0:
        raise ProxyError(
            f"training needs at least {_MIN_ROWS} rows with one of {', '.join(LABELS)} and some to hold out, "
            f"got {len(train_rows)} and {len(held_out_rows)}"
        )
    is_relaxed = torch.arange(len(crystals)) < len(data.crystals)
    volumes = elemental_volumes(crystals.select(train_rows[is_relaxed[train_rows]]))
    fractions = crystals.counts.double() / crystals.n_atoms[:, None]
    excess = (crystals.volume_per_atom / (fractions * volumes[crystals.elements]).sum(1)).log()
    return TrainingData(
        crystals=crystals,
        labels=labels.float(),
        relaxed=is_relaxed & (excess.abs() < _NORMAL_EXCESS) & (crystals.volume_per_atom < _NORMAL_VOLUME),
        stretchable=(crystals.space_group > 2) & (crystals.space_group < 195),
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        new_system=new_system,
        log_volumes=volumes.log().float(),
    )


def elemental_volumes(crystals: CrystalBatch) -> Tensor:
    """Return (119,) float64 volume in Å³/atom that each element contributes, by non-negative least squares.

    Elements that no crystal holds, or that come out below 1 Å³, get the median.
    """
    normal = crystals.volume_per_atom < _NORMAL_VOLUME
    chosen = crystals.select(normal)
    fractions = chosen.composition.double() / chosen.n_atoms[:, None]
    volumes, _ = nnls((fractions / chosen.volume_per_atom[:, None]).numpy(), np.ones(len(chosen)))
    volumes = np.where(volumes < 1.0, np.median(volumes[volumes >= 1.0]), volumes)
    return torch.from_numpy(volumes)


def train_member(
    data: TrainingData,
    settings: ProxyTraining,
    k: int,
    folder: Path,
    *,
    start: OrbitNetwork | None = None,
    progress: bool = True,
) -> OrbitNetwork:
    """Train member `k`, from its checkpoint in `folder` if there is one, and return the averaged network.

    Without a checkpoint it starts from the weights and the standardisation of `start`, or from nothing.
    """
    finished = folder / f"member_{k}.pt"
    if finished.is_file():
        return _load_network(finished, data, settings)
    seed = 1000 * settings.seed + k
    torch.manual_seed(seed)  # initial weights
    network = new_network(data, settings)
    if start is not None:
        network.load_state_dict(start.state_dict())
    average = {name: value.clone() for name, value in network.state_dict().items()}
    state = _MemberState(network, average, _optimiser(network, settings), torch.Generator().manual_seed(seed))
    checkpoint = folder / f"member_{k}.checkpoint.pt"
    state.resume(checkpoint)
    equation = EquationOfState.load(PRETRAINED / "equation_of_state.json")
    steps_per_epoch = max(1, len(data.train_rows) // settings.batch_size)
    n_steps = settings.epochs * steps_per_epoch
    saved = time.monotonic()
    batches = _batches(data.train_rows, steps_per_epoch, settings.batch_size, seed, range(state.step, n_steps))
    bar = {"desc": f"proxy member {k}", "unit": " steps", "total": n_steps, "initial": state.step}
    for rows in tqdm(batches, disable=not progress, **bar):
        _set_rate(state.optimiser, settings.learning_rate, state.step, n_steps)
        crystals, labels = augmented(data, rows, settings.augment, equation, state.generator)
        features = featurise(crystals, network.properties, network.log_volumes)
        loss = training_loss(run_buckets(network, features), labels, settings.stable_weight)
        state.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        state.optimiser.step()
        state.step += 1
        _update_average(average, network, min(settings.ema_decay, state.step / (state.step + 100.0)))
        if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            state.save(checkpoint)
            saved = time.monotonic()
    _save_atomically({"network": average, "settings": json.dumps(asdict(settings))}, finished)
    checkpoint.unlink(missing_ok=True)
    return _load_network(finished, data, settings)


def new_network(data: TrainingData, settings: ProxyTraining) -> OrbitNetwork:
    """Return an untrained network whose inputs are standardised on the training rows."""
    properties = torch.from_numpy(element_properties())
    network = OrbitNetwork(settings.network, properties, data.log_volumes)
    features = featurise(data.crystals.select(data.train_rows), properties, data.log_volumes)
    network.crystal_mean.copy_(features.crystal.mean(dim=0))
    network.crystal_scale.copy_(features.crystal.std(dim=0).clamp_min(1e-2))
    return network


def augmented(
    data: TrainingData, rows: Tensor, config: AugmentConfig, equation: EquationOfState, generator: torch.Generator
) -> tuple[CrystalBatch, Tensor]:
    """Return the crystals of `rows` in a random equivalent form, some strained, and their labels.

    Strain adds what it costs to the energy labels; the gap is unknown unless the strain is small.
    """
    crystals = random_alternative(data.crystals.select(rows), generator)
    log_volume, log_stretch = draw_strain(data.relaxed[rows], data.stretchable[rows], config, generator)
    crystals, cost = strain(crystals, log_volume, log_stretch, equation)
    labels = data.labels[rows] + torch.stack([cost, cost, torch.zeros_like(cost)], dim=-1).float()
    far = (log_volume.abs() > 4.0 * config.small_width) | (log_stretch.abs() > 4.0 * config.small_width)
    labels[:, 2] = labels[:, 2].masked_fill(far, torch.nan)
    letterless = torch.rand(len(rows), generator=generator) < config.without_letters
    return drop_letters(crystals, letterless), labels


def run_buckets(network: OrbitNetwork, features: Features) -> Tensor:
    """Return (n, n_outputs) of a batch in three passes of similar width, so that little padding is computed."""
    widths = occupied_width(features.fractions)
    order = widths.argsort()
    used, positions = features.positions.unique(return_inverse=True)
    features = replace(features, positions=positions)
    tables = network.element_table(), network.position_table(used)
    n = len(order)
    parts = [part for part in order.tensor_split([int(0.55 * n), int(0.85 * n)]) if len(part)]
    outputs = torch.cat([network.outputs(take(features, part, int(widths[part].max())), *tables) for part in parts])
    return outputs[order.argsort()]


def training_loss(outputs: Tensor, labels: Tensor, stable_weight: float) -> Tensor:
    """Return the mean absolute errors plus the likelihood of their scales plus the cross-entropy of "metal".

    Scales are learned on detached errors (the β-NLL idea, Seitzer et al. 2022, arXiv:2203.09168, taken to its end), so
    that they cannot excuse errors of the mean.

    Args:
        outputs: (n, 7) of the network.
        labels: (n, 3) formation energy, energy above hull, gap; NaN = none.
        stable_weight: Extra weight of rows below 0.1 eV/atom above the hull.
    """
    known = ~labels.isnan()
    target = labels.nan_to_num()
    metal = target[:, 2] < METAL_GAP
    weight = 1.0 + stable_weight * (known[:, 1] & (target[:, 1] < 0.1)).float()
    total = outputs.new_zeros(())
    for column, name in enumerate(_LABEL_ORDER):
        counted = known[:, column] & ~metal if name == "band_gap" else known[:, column]
        error = (outputs[:, 2 * column] - target[:, column]).abs()
        log_scale = outputs[:, 2 * column + 1].clamp(-6.0, 3.0)
        scale_loss = error.detach() * torch.exp(-log_scale) + log_scale
        loss = _ERROR_WEIGHT[name] * (2.0 * error + _SCALE_WEIGHT * scale_loss)
        total = total + (loss * counted * weight).sum()
    cross_entropy = functional.binary_cross_entropy_with_logits(outputs[:, 6], metal.float(), reduction="none")
    return (total + _METAL_WEIGHT * (cross_entropy * known[:, 2] * weight).sum()) / len(outputs)


def assemble(
    data: TrainingData, settings: ProxyTraining, folder: Path, about: Mapping[str, Any] | None = None
) -> PropertyEnsemble:
    """Calibrate all finished members of `folder` on the held-out rows and save the ensemble, with more facts about it.

    Raises:
        ProxyError: If no member is finished.
    """
    finished = sorted(folder.glob("member_[0-9]*.pt"))
    finished = [path for path in finished if "checkpoint" not in path.name]
    if not finished:
        raise ProxyError(f"no finished member in {folder}; train at least one")
    members = [_load_network(path, data, settings) for path in finished]
    for member in members:
        for parameter in member.parameters():
            parameter.data = parameter.data.half().float()  # as stored, so that calibration sees what ships
    ensemble = PropertyEnsemble(members, Calibration.none())
    calibration, figures = calibrate(ensemble, data)
    facts = {
        "n_train": len(data.train_rows),
        "n_held_out": len(data.held_out_rows),
        "settings": asdict(settings),
        "held_out": figures,
        **(about or {}),
    }
    ensemble = ensemble.with_calibration(calibration, facts)
    ensemble.save(folder)
    return ensemble


def calibrate(ensemble: PropertyEnsemble, data: TrainingData) -> tuple[Calibration, dict[str, dict[str, float]]]:
    """Return the calibration on the held-out rows, and the figures there: over all, and over those near the hull."""
    rows = data.held_out_rows
    raw = ensemble.raw_outputs(data.crystals.select(rows))
    labels = data.labels[rows].double()
    metal = labels[:, 2] < METAL_GAP
    near_hull = labels[:, 1] < METASTABLE
    hull = raw.mean["e_above_hull"]
    std: dict[str, StdCalibration] = {}
    figures: dict[str, dict[str, float]] = {}
    for column, name in enumerate(_LABEL_ORDER):
        known = ~labels[:, column].isnan()
        known = known & ~metal if name == "band_gap" else known
        error = raw.mean[name] - labels[:, column]
        std[name] = StdCalibration.fit(
            error[known],
            raw.std[name][known],
            None if name == "band_gap" else hull[known],
            one_sigma_share=_ONE_SIGMA_SHARE[name],
        )
        calibrated = std[name](raw.std[name], hull)
        for rows_name, chosen in (("all", known), ("near_hull", known & near_hull)):
            if int(chosen.sum()) < _FEWEST_ROWS:
                continue
            one, two = interval_coverage(error[chosen], calibrated[chosen])
            figures[f"{name}_{rows_name}"] = {
                "n": int(chosen.sum()),
                "mae": float(error[chosen].abs().mean()),
                "coverage_1sigma": one,
                "coverage_2sigma": two,
                "spearman_error_sigma": spearman(error[chosen].abs(), calibrated[chosen]),
            }
    known = ~labels[:, 2].isnan()
    return Calibration(std, LogitCalibration.fit(raw.metal_logit[known], metal[known])), figures


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone."""
    return (zlib.crc32(name.encode()) % 10007) / 10007


def _batches(rows: Tensor, per_epoch: int, size: int, seed: int, steps: range) -> Iterator[Tensor]:
    """Yield the batch of each step; the order in an epoch depends on seed and epoch alone, so resuming repeats it."""
    for epoch in range(steps.start // per_epoch, -(-steps.stop // per_epoch)):
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
        batches = rows[torch.randperm(len(rows), generator=generator)].split(size)
        first = max(steps.start - epoch * per_epoch, 0)
        yield from batches[first : min(per_epoch, steps.stop - epoch * per_epoch)]


def _optimiser(network: OrbitNetwork, settings: ProxyTraining) -> torch.optim.AdamW:
    """Return AdamW; norms and biases do not decay."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))


def _set_rate(optimiser: torch.optim.AdamW, peak: float, step: int, n_steps: int) -> None:
    """Set the learning rate: a short warm-up, then a cosine to 1 % of the peak."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
    rate = peak * min(1.0, (step + 1) / 300.0) * (0.99 * cosine + 0.01)
    for group in optimiser.param_groups:
        group["lr"] = rate


@torch.no_grad()
def _update_average(average: dict[str, Tensor], network: OrbitNetwork, decay: float) -> None:
    """Move the exponential moving average towards the network, in place."""
    state = network.state_dict()
    torch._foreach_lerp_([average[name] for name in state], list(state.values()), 1.0 - decay)


def _save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write tensors so that an interrupted write leaves no file under `path`."""
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


@dataclass
class _MemberState:
    """Everything that continuing a member needs."""

    network: OrbitNetwork
    average: dict[str, Tensor]  # exponential moving average of the weights
    optimiser: torch.optim.AdamW
    generator: torch.Generator
    step: int = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        content = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }
        _save_atomically(content, path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, if there is one.

        Raises:
            ProxyError: If it is truncated or of another network.
        """
        if not path.is_file():
            return
        try:
            content = torch.load(path, weights_only=True)
            self.network.load_state_dict(content["network"])
            self.average.update(content["average"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.generator.set_state(content["generator"])
            self.step = int(content["step"])
        except Exception as error:  # a broken archive raises many kinds
            raise ProxyError(f"{path} cannot be resumed ({error}); delete it to start this member again") from error


def _load_network(path: Path, data: TrainingData, settings: ProxyTraining) -> OrbitNetwork:
    """Return a finished member.

    Raises:
        ProxyError: If the file is truncated or of another network.
    """
    network = new_network(data, settings)
    try:
        network.load_state_dict(torch.load(path, weights_only=True)["network"])
    except Exception as error:  # a broken archive raises many kinds
        raise ProxyError(f"{path} is no member of this ensemble ({error}); delete it to train it again") from error
    return network.eval()
