"""Train the gap oracle: CHGNet's features of every labelled structure once, then an ensemble of small networks on them.

Rows are split by formula and by chemical system, with the same rule and shares as the proxies' training, so that the
two are compared on the same crystals. The held-out rows serve choices; no other data are looked at.
"""

import copy
import hashlib
import json
import logging
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pymatgen.core import Composition, Lattice, Structure
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from discover.errors import DataError
from discover.oracle.band_gap import GapModel, read
from discover.oracle.gap_network import (
    N_FEATURES,
    AtomBatch,
    Atoms,
    BandGapError,
    GapNetwork,
    GapNetworkConfig,
    clamp_log_scale,
    describe,
)
from discover.oracle.relax import chgnet_model
from discover.structure_files import read_cif, read_table
from discover.worker_pool import TaskFailure, map_in_workers
from proxies.stability import METASTABLE

logger = logging.getLogger(__name__)

METAL_GAP = 1e-4  # eV; smaller gaps are metals
_CHUNK = 256  # structures a file of features
_MIN_ROWS = 100
_EQUAL_FEATURES = 0.02  # atoms of an element whose features differ by less are one atom, counted as often
_SCALE_WEIGHT, _METAL_WEIGHT = 0.1, 0.4
_BATCHES_SORTED = 8  # batches sorted by number of atoms together, so that little padding is computed
_PREDICT_BATCH = 512
_WARM_UP = 200  # steps
_SMALLEST_SCALE = 1e-6  # of a feature; some of those that the energy is read from vary by 4e-5


@dataclass(frozen=True, kw_only=True)
class GapTraining:
    """Settings of one training; the defaults are those of the shipped model."""

    n_members: int = 3
    epochs: int = 60
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    held_out: float = 0.04  # share of formulas, and again of chemical systems
    seed: int = 0
    network: GapNetworkConfig = field(default_factory=GapNetworkConfig)

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BandGapError: If a setting makes no sense.
        """
        if self.n_members < 1 or self.epochs < 1 or self.batch_size < 1:
            raise BandGapError("n_members, epochs and batch_size must be at least 1")
        if not 0.0 < self.held_out < 0.5:
            raise BandGapError(f"held_out must lie between 0 and 0.5, got {self.held_out}")
        if not (self.learning_rate > 0 and self.weight_decay >= 0 and 0 <= self.ema_decay < 1):
            raise BandGapError("learning_rate must be > 0, weight_decay at least 0, ema_decay in [0, 1)")


@dataclass(frozen=True)
class AtomTable:
    """Atoms of many crystals, one after another; atoms that CHGNet cannot tell apart are one, counted as often."""

    offsets: NDArray[np.int64]  # (n + 1,) crystal i has the atoms offsets[i] to offsets[i + 1]
    numbers: NDArray[np.int64]  # (n_atoms,)
    features: NDArray[np.float16]  # (n_atoms, N_FEATURES)
    weights: NDArray[np.float32]  # (n_atoms,) share in the crystal
    log_volumes: NDArray[np.float32]  # (n,) log of Å³/atom

    def __len__(self) -> int:
        """Return the number of crystals."""
        return len(self.log_volumes)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Return (n,) number of different atoms."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, crystals: Sequence[Atoms]) -> Self:
        """Return the table of a few crystals."""
        crystals = [merge_equal(atoms) for atoms in crystals]
        return cls(
            offsets=np.cumsum([0, *(len(atoms.numbers) for atoms in crystals)]),
            numbers=np.concatenate([np.zeros(0, np.int64), *(atoms.numbers for atoms in crystals)]),
            features=np.concatenate(
                [np.zeros((0, N_FEATURES), np.float16), *(atoms.features.astype(np.float16) for atoms in crystals)]
            ),
            weights=np.concatenate([np.zeros(0, np.float32), *(atoms.weights for atoms in crystals)]),
            log_volumes=np.array([atoms.log_volume for atoms in crystals], dtype=np.float32),
        )

    @classmethod
    def concatenate(cls, tables: Sequence[Self]) -> Self:
        """Return the crystals of all tables, in order."""
        return cls(
            offsets=np.concatenate([[0], np.cumsum(np.concatenate([table.sizes for table in tables]))]),
            numbers=np.concatenate([table.numbers for table in tables]),
            features=np.concatenate([table.features for table in tables]),
            weights=np.concatenate([table.weights for table in tables]),
            log_volumes=np.concatenate([table.log_volumes for table in tables]),
        )

    def batch(self, rows: NDArray[np.int64]) -> AtomBatch:
        """Return the padded batch of some crystals."""
        sizes = self.sizes[rows]
        columns = np.arange(sizes.max())
        present = columns < sizes[:, None]
        atoms = self.offsets[rows][:, None] + np.minimum(columns, sizes[:, None] - 1)
        return AtomBatch(
            numbers=torch.from_numpy(self.numbers[atoms] * present),
            features=torch.from_numpy(self.features[atoms]).float(),
            weights=torch.from_numpy(self.weights[atoms] * present),
            log_volume=torch.from_numpy(self.log_volumes[rows]),
        )


@dataclass(frozen=True)
class GapRows:
    """Crystals with a gap, as they stand in a file."""

    atoms: AtomTable
    gaps: NDArray[np.float32]  # (n,) eV
    e_above_hull: NDArray[np.float64]  # (n,) eV/atom, NaN = not given
    formulas: tuple[str, ...]


@dataclass(frozen=True)
class GapData:
    """Crystals with a gap, split for training and for choices."""

    atoms: AtomTable
    gaps: NDArray[np.float32]  # (n,) eV
    train_rows: NDArray[np.int64]
    held_out_rows: NDArray[np.int64]


def train_band_gap(
    data_path: Path | str,
    output: Path | str,
    *,
    settings: GapTraining | None = None,
    n_workers: int = 2,
    progress: bool = True,
) -> GapModel:
    """Train and save a gap model; what an earlier, interrupted call finished is kept.

    Args:
        data_path: CSV in the field's form with the column `band_gap` in eV (see `discover.data`).
        output: Folder that receives features, checkpoints and, complete, `band_gap.safetensors` and `band_gap.json`.
        settings: The defaults are those of the shipped model.
        n_workers: Processes that run CHGNet; 0 runs it in this one.
        progress: Show bars.

    Raises:
        DataError: If the file cannot be used.
        BandGapError: If it holds too few labels, or `output` holds a training with other settings.
    """
    settings = settings or GapTraining()
    output = Path(output)
    data = load_data(Path(data_path), output, settings, n_workers=n_workers, progress=progress)
    members = [train_member(data, settings, k, output, progress=progress) for k in range(settings.n_members)]
    for member in members:
        for parameter in member.parameters():
            parameter.data = parameter.data.half().float()  # as stored, so that figures are of what ships
    facts = {
        "n_train": len(data.train_rows),
        "n_held_out": len(data.held_out_rows),
        "settings": asdict(settings),
        "held_out": figures(predict_rows(members, data.atoms, data.held_out_rows), data.gaps[data.held_out_rows]),
    }
    model = GapModel(members, facts)
    model.save(output)
    return model


def evaluate_band_gap(
    data_path: Path | str,
    features: Path | str,
    *,
    model: GapModel | None = None,
    n_workers: int = 2,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Return the figures of a model on the labelled rows of a file: "all", and by energy above hull where it is given.

    Args:
        data_path: CSV in the field's form with the column `band_gap`.
        features: Folder that keeps CHGNet's features of these rows, so that a second model costs seconds.
        model: The shipped one by default.
        n_workers: Processes that run CHGNet; 0 runs it in this one.
        progress: Show bars.

    Raises:
        DataError: If the file cannot be used.
    """
    model = model or GapModel.load()
    rows = read_rows(Path(data_path), Path(features), n_workers=n_workers, progress=progress)
    outputs = predict_rows(model.members, rows.atoms, np.arange(len(rows.gaps)))
    groups = {
        "all": np.ones(len(rows.gaps), dtype=bool),
        "stable": rows.e_above_hull < METASTABLE,
        "unstable": rows.e_above_hull >= METASTABLE,
    }
    return {
        name: figures(outputs[:, torch.from_numpy(chosen)], rows.gaps[chosen])
        for name, chosen in groups.items()
        if chosen.any()
    }


# --- data ----------------------------------------------------------------------------------------


def load_data(path: Path, output: Path, settings: GapTraining, *, n_workers: int, progress: bool) -> GapData:
    """Return the rows of a file that have a gap and that CHGNet can see, split; features are kept in `output`.

    Raises:
        DataError: If the file cannot be used.
        BandGapError: If too few rows are left.
    """
    rows = read_rows(path, output / "features", n_workers=n_workers, progress=progress)
    held_out = np.array([_is_held_out(formula, settings.held_out) for formula in rows.formulas])
    train_rows, held_out_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if len(train_rows) < _MIN_ROWS or len(held_out_rows) == 0:
        raise BandGapError(
            f"training needs at least {_MIN_ROWS} rows with a band gap and some to hold out, "
            f"got {len(train_rows)} and {len(held_out_rows)}"
        )
    return GapData(rows.atoms, rows.gaps, train_rows, held_out_rows)


def read_rows(path: Path, features: Path, *, n_workers: int, progress: bool) -> GapRows:
    """Return the rows of a file that have a gap and that CHGNet can see; `features` keeps what CHGNet said.

    Raises:
        DataError: If the file cannot be used.
        BandGapError: If a worker failed; calling again continues.
    """
    table = read_table(path)
    missing = [name for name in ("cif", "band_gap") if name not in table.columns]
    if missing:
        raise DataError(f"{path} lacks the column {' and '.join(missing)}; a gap model needs both")
    gaps = pd.to_numeric(table["band_gap"], errors="coerce").to_numpy(dtype=np.float64)
    labelled = np.flatnonzero(np.isfinite(gaps) & (gaps >= 0) & table["cif"].notna().to_numpy())
    cifs = [str(table["cif"].iloc[row]) for row in labelled]
    atoms, seen, formulas = extract(cifs, features, n_workers=n_workers, progress=progress)
    if len(seen) < len(labelled):
        logger.warning("%d of %d structures left out: CHGNet cannot see them", len(labelled) - len(seen), len(labelled))
    chosen = labelled[seen]
    hull = np.full(len(chosen), np.nan)
    if "e_above_hull" in table.columns:
        hull = pd.to_numeric(table["e_above_hull"], errors="coerce").to_numpy(dtype=np.float64)[chosen]
    return GapRows(atoms, gaps[chosen].astype(np.float32), hull, tuple(formulas))


def extract(
    cifs: Sequence[str], folder: Path, *, n_workers: int = 2, progress: bool = True
) -> tuple[AtomTable, NDArray[np.int64], list[str]]:
    """Return what CHGNet sees, the (n,) indices of the CIFs that it can see, and their reduced formulas.

    A file of `folder` per 256 structures holds what is finished; one that was made of other structures is made again.

    Raises:
        BandGapError: If a worker failed; calling again continues.
        DataError: If CHGNet can see none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [
        _Chunk(folder / f"{start // _CHUNK:05d}.npz", start, tuple(cifs[start : start + _CHUNK]))
        for start in range(0, len(cifs), _CHUNK)
    ]
    todo = [chunk for chunk in chunks if _read_chunk(chunk) is None]
    results = map_in_workers(
        _extract_chunk,
        todo,
        n_workers=n_workers if len(todo) > 1 else 0,
        initializer=_start_worker,
        description="CHGNet features",
        unit="chunk",
        progress=progress,
    )
    for result in results:
        if isinstance(result, TaskFailure):
            raise BandGapError(f"features could not be computed ({result.reason}); call again to continue")
    parts = [part for chunk in chunks if (part := _read_chunk(chunk)) is not None]
    if len(parts) < len(chunks):
        raise BandGapError(f"features in {folder} cannot be read back; delete that folder and call again")
    if not sum(len(seen) for _, seen, _ in parts):
        raise DataError("no structure with a band gap that CHGNet can see")
    formulas = [str(formula) for _, _, part in parts for formula in part]
    return AtomTable.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), formulas


def merge_equal(atoms: Atoms) -> Atoms:
    """Return the atoms with those of one element and (nearly) equal features as one, counted as often.

    Atoms of an orbit have equal surroundings; in the Materials Project half of the atoms are left.
    """
    left = np.ones(len(atoms.numbers), dtype=bool)
    kept: list[int] = []
    weights: list[float] = []
    for atom in range(len(left)):
        if left[atom]:
            near = np.abs(atoms.features - atoms.features[atom]).max(axis=1) < _EQUAL_FEATURES
            group = left & near & (atoms.numbers == atoms.numbers[atom])
            kept.append(atom)
            weights.append(float(atoms.weights[group].sum()))
            left &= ~group
    return Atoms(atoms.numbers[kept], atoms.features[kept], np.array(weights, dtype=np.float32), atoms.log_volume)


@dataclass(frozen=True)
class _Chunk:
    """A few structures, and the file that their features go to."""

    path: Path
    start: int  # index of the first
    cifs: tuple[str, ...]

    @property
    def key(self) -> str:
        """Return a hash of the structures."""
        return hashlib.sha256("\0".join(self.cifs).encode()).hexdigest()


def _extract_chunk(chunk: _Chunk) -> None:
    """Write the features of a chunk to its file."""
    crystals: list[Atoms] = []
    seen: list[int] = []
    formulas: list[str] = []
    for index, cif in enumerate(chunk.cifs, start=chunk.start):
        try:
            matrix, coords, numbers = read_cif(cif)
            structure = Structure(Lattice(matrix), numbers.tolist(), coords)
            crystals.append(describe(structure))
        except (DataError, BandGapError) as error:
            logger.info("row %d left out: %s", index, error)
            continue
        seen.append(index)
        formulas.append(structure.composition.reduced_formula)
    table = AtomTable.of(crystals)
    partial = chunk.path.with_suffix(".partial.npz")
    np.savez(
        partial, key=chunk.key, seen=np.array(seen, np.int64), formulas=np.array(formulas, dtype=np.str_), **vars(table)
    )
    partial.replace(chunk.path)


def _read_chunk(chunk: _Chunk) -> tuple[AtomTable, NDArray[np.int64], NDArray[np.str_]] | None:
    """Return what `_extract_chunk` wrote, or None if it is not there, truncated, or of other structures."""
    try:
        with chunk.path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != chunk.key:
                return None
            table = AtomTable(**{item.name: stored[item.name] for item in fields(AtomTable)})
            return table, stored["seen"], stored["formulas"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _start_worker() -> None:
    torch.set_num_threads(1)
    chgnet_model()


def _is_held_out(formula: str, share: float) -> bool:
    """Return whether a formula or its chemical system falls into the share that is held out; by name alone."""
    system = "-".join(sorted(Composition(formula).as_dict()))
    return min(_position("f" + formula), _position("s" + system)) < share


def _position(name: str) -> float:
    """Return a number in [0, 1) that depends on `name` alone."""
    return (zlib.crc32(name.encode()) % 10007) / 10007


# --- training ------------------------------------------------------------------------------------


def train_member(data: GapData, settings: GapTraining, k: int, folder: Path, *, progress: bool = True) -> GapNetwork:
    """Train member `k`, from its checkpoint in `folder` if there is one, and return the averaged network.

    Raises:
        BandGapError: If the checkpoint is truncated or of other settings.
    """
    state = _MemberState.new(data, settings, k)
    path = folder / f"member_{k}.pt"
    state.resume(path)
    per_epoch = max(1, len(data.train_rows) // settings.batch_size)
    gaps = torch.from_numpy(data.gaps)
    epochs = tqdm(range(state.epoch, settings.epochs), desc=f"gap member {k}", unit=" epochs", disable=not progress)
    for epoch in epochs:
        state.network.train()
        seed = 1_000_003 * (1000 * settings.seed + k + 1) + epoch
        torch.manual_seed(seed)  # dropout
        for batch, rows in enumerate(_batches(data, settings.batch_size, np.random.default_rng(seed))):
            step = epoch * per_epoch + batch
            _set_rate(state.optimiser, settings.learning_rate, step, settings.epochs * per_epoch)
            loss = training_loss(state.network(data.atoms.batch(rows)), gaps[rows])
            state.optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
            state.optimiser.step()
            state.average_weights(min(settings.ema_decay, (step + 1) / (step + 101.0)))
        state.epoch = epoch + 1
        state.save(path)
    return state.averaged()


def training_loss(outputs: Tensor, gaps: Tensor) -> Tensor:
    """Return the mean absolute error of non-metals' gaps, plus the likelihood of its scale, plus the cross-entropy.

    Scales are learned on detached errors, so that they cannot excuse errors of the gap.

    Args:
        outputs: (n, 3) of the network.
        gaps: (n,) eV.
    """
    metal = gaps < METAL_GAP
    error = (outputs[:, 0] - gaps).abs()
    log_scale = clamp_log_scale(outputs[:, 1])
    likelihood = error.detach() * torch.exp(-log_scale) + log_scale
    cross_entropy = functional.binary_cross_entropy_with_logits(outputs[:, 2], metal.float(), reduction="none")
    return ((error + _SCALE_WEIGHT * likelihood) * ~metal + _METAL_WEIGHT * cross_entropy).mean()


@torch.no_grad()
def predict_rows(members: Sequence[GapNetwork], atoms: AtomTable, rows: NDArray[np.int64]) -> Tensor:
    """Return (n_members, n, 3) float64 raw outputs for rows of a table."""
    order = np.argsort(atoms.sizes[rows], kind="stable")
    batches = [atoms.batch(rows[order[i : i + _PREDICT_BATCH]]) for i in range(0, len(rows), _PREDICT_BATCH)]
    outputs = torch.cat([torch.stack([member(batch) for member in members]) for batch in batches], dim=1)
    return outputs[:, np.argsort(order)].double()


def figures(outputs: Tensor, gaps: NDArray[np.float32]) -> dict[str, float]:
    """Return mean absolute errors in eV and how well metals are told apart, from (n_members, n, 3) raw outputs."""
    gap, p_metal = read(outputs)
    true = torch.from_numpy(gaps).double()
    metal = true < METAL_GAP
    error = (gap - true).abs()
    result = {"n": len(gaps), "mae": float(error.mean())}
    if 0 < int(metal.sum()) < len(gaps):
        ranks, n_metals = rankdata(p_metal.numpy()), int(metal.sum())
        above = ranks[metal.numpy()].sum() - n_metals * (n_metals + 1) / 2
        result |= {
            "mae_of_non_metals": float(error[~metal].mean()),
            "mae_of_metals": float(error[metal].mean()),
            "metal_roc_auc": float(above / (n_metals * (len(gaps) - n_metals))),
            "metal_accuracy": float(((p_metal >= 0.5) == metal).double().mean()),
        }
    return result


def _batches(data: GapData, size: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield the batches of one epoch; crystals of similar size come together, batches in random order."""
    rows = generator.permutation(data.train_rows)
    size = min(size, len(rows))
    rows = rows[: len(rows) // size * size]
    for group in np.split(rows, range(_BATCHES_SORTED * size, len(rows), _BATCHES_SORTED * size)):
        ordered = group[np.argsort(data.atoms.sizes[group], kind="stable")].reshape(-1, size)
        yield from ordered[generator.permutation(len(ordered))]


def _set_rate(optimiser: torch.optim.AdamW, peak: float, step: int, n_steps: int) -> None:
    """Set the learning rate: a short warm-up, then a cosine to 1 % of the peak."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / n_steps))
    rate = peak * min(1.0, (step + 1) / _WARM_UP) * (0.99 * cosine + 0.01)
    for group in optimiser.param_groups:
        group["lr"] = rate


@dataclass
class _MemberState:
    """Everything that continuing a member needs."""

    network: GapNetwork
    average: dict[str, Tensor]  # exponential moving average of the weights
    optimiser: torch.optim.AdamW
    key: str  # settings and data that it was made for
    epoch: int = 0

    @classmethod
    def new(cls, data: GapData, settings: GapTraining, k: int) -> Self:
        """Return the state before the first step: seeded weights, inputs standardised on the training rows."""
        torch.manual_seed(1000 * settings.seed + k)
        network = GapNetwork(settings.network)
        sizes = data.atoms.sizes
        present = np.repeat(np.isin(np.arange(len(sizes)), data.train_rows), sizes)
        features = data.atoms.features[present].astype(np.float32)
        network.feature_mean.copy_(torch.from_numpy(features.mean(axis=0)))
        network.feature_scale.copy_(torch.from_numpy(features.std(axis=0)).clamp_min(_SMALLEST_SCALE))
        matrices = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
        others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
        average = {name: value.clone() for name, value in network.state_dict().items()}
        digest = hashlib.sha256(data.gaps.tobytes() + data.atoms.offsets.tobytes()).hexdigest()
        return cls(network, average, optimiser, json.dumps([asdict(settings), k, digest]))

    @torch.no_grad()
    def average_weights(self, decay: float) -> None:
        """Move the moving average towards the network."""
        state = self.network.state_dict()
        torch._foreach_lerp_([self.average[name] for name in state], list(state.values()), 1.0 - decay)

    def averaged(self) -> GapNetwork:
        """Return a network with the averaged weights."""
        network = copy.deepcopy(self.network)
        network.load_state_dict(self.average)
        return network.eval()

    def save(self, path: Path) -> None:
        """Write a checkpoint; an interrupted write leaves the one before."""
        content: dict[str, Any] = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "key": self.key,
            "epoch": self.epoch,
        }
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, if there is one.

        Raises:
            BandGapError: If it is truncated, or of other data or settings.
        """
        if not path.is_file():
            return
        try:
            content = torch.load(path, weights_only=True)
            key = content["key"]
            if key == self.key:
                self.network.load_state_dict(content["network"])
                self.average = content["average"]
                self.optimiser.load_state_dict(content["optimiser"])
                self.epoch = int(content["epoch"])
        except Exception as error:  # a broken archive raises many kinds
            raise BandGapError(f"{path} cannot be resumed ({error}); delete it to start this member again") from error
        if key != self.key:
            raise BandGapError(f"{path} was trained on other data or settings; choose another output folder")
