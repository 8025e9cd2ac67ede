"""Prepare data for the flow and train it: ``python -m discover.train what=flow data=FILE.csv output=DIR``."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from discover.data import PreparedData, prepare
from discover.errors import ConfigError
from discover.structure.flow_matching import load_flow, save_flow
from discover.structure.flow_training import FlowTrainer, FlowTraining
from discover.structure.orbit_batch import OrbitBatch
from discover.structure.orbits import orbit_batch, parameters_of_data
from discover.train_prior import STABLE
from proxies.elements import element_properties

_INNER_FOLDS = 40  # one formula in forty watches the training


def train_flow(
    data_path: Path | str,
    output: Path,
    settings: FlowTraining,
    *,
    device: str | None = None,
    start: Path | None = None,
) -> dict[str, float]:
    """Train on a data set and write ``flow.safetensors`` and ``flow.json`` to ``output``.

    Called again with the same arguments it continues from the checkpoint in ``output``, or does nothing if the training
    is complete. Under ``torchrun`` all processes train together and the first one writes.

    Args:
        data_path: CSV in the field's form, folder of CIF files, or extxyz file.
        output: Folder for weights, checkpoint and ``log.jsonl``.
        settings: How to train.
        device: "cpu" or "cuda"; None takes CUDA where there is one.
        start: Folder whose ``flow.safetensors`` the training starts from, to refine it or to fit it to other data; its
            sizes replace those of `settings`. None starts from nothing.

    Returns:
        Mean squared errors of the two velocities on the watched formulas.

    Raises:
        ConfigError: If nothing is left to train on, or the device does not exist.
        CheckpointError: If `start` holds no flow, or `output` the checkpoint of a training with other settings.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here; drop it to train on the CPU")
    given = None if start is None else load_flow(start / "flow")
    if given is not None:
        sizes = replace(given[0].config, dropout=settings.network.dropout)
        settings = replace(settings, network=sizes)
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after training, where it cannot be written
    data, watched = flow_data(prepare(data_path))
    if not len(data) or not len(watched):
        raise ConfigError(
            f"{len(data)} crystals to train on and {len(watched)} to watch the training with; both are needed, so give "
            f"more data (rows with e_above_hull < {STABLE} eV/atom count, or all where there is no such column)"
        )
    trainer = FlowTrainer(data, watched, settings, torch.from_numpy(element_properties()), output, device, given)
    with tqdm(total=100, initial=round(100 * trainer.progress), unit="%", desc="training", disable=None) as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", epoch=trainer.epoch + 1)
            bar.update(int(100 * trainer.progress) - bar.n)

        trainer.run(show)
    errors = dict(zip(("parameter_error", "lattice_error"), trainer.held_out_loss(), strict=True))
    if trainer.rank == 0:
        about = {
            "data": Path(data_path).name,
            "n_crystals": len(data),
            "n_watched": len(watched),
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "hours": round(trainer.seconds / 3600, 2),
            "device": device,
            "start": None if start is None else start.resolve().name,
            "settings": asdict(settings),
            **errors,
            "attribution": "Materials Project, CC BY 4.0, Jain et al. 2013, doi:10.1063/1.4812323",
        }
        save_flow(output / "flow", trainer.network.cpu(), trainer.scale, about)
    return errors


def flow_data(data: PreparedData) -> tuple[OrbitBatch, OrbitBatch]:
    """Return the stable crystals to train on, and those of one formula in forty to watch the training with."""
    above = np.asarray(data.labels["e_above_hull"])
    stable = torch.from_numpy(above < STABLE) if np.isfinite(above).any() else torch.ones(len(data), dtype=torch.bool)
    watched = torch.tensor([_fold(str(formula)) == 0 for formula in data.formulas])
    whole = orbit_batch(data.crystals, parameters_of_data(data))
    return whole.select((stable & ~watched).nonzero().flatten()), whole.select((stable & watched).nonzero().flatten())


def _fold(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS
