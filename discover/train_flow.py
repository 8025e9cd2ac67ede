"""Prepare data for the flow and train it: ``python -m discover.train what=flow data=FILE.csv output=DIR``."""

import hashlib

import numpy as np
import torch

from discover.data import PreparedData
from discover.structure.orbit_batch import OrbitBatch
from discover.structure.orbits import orbit_batch, parameters_of_data
from discover.train_prior import STABLE

_INNER_FOLDS = 40  # one formula in forty watches the training


def flow_data(data: PreparedData) -> tuple[OrbitBatch, OrbitBatch]:
    """Return the stable crystals to train on, and those of one formula in forty to watch the training with."""
    above = np.asarray(data.labels["e_above_hull"])
    stable = torch.from_numpy(above < STABLE) if np.isfinite(above).any() else torch.ones(len(data), dtype=torch.bool)
    watched = torch.tensor([_fold(str(formula)) == 0 for formula in data.formulas])
    whole = orbit_batch(data.crystals, parameters_of_data(data))
    return whole.select((stable & ~watched).nonzero().flatten()), whole.select((stable & watched).nonzero().flatten())


def _fold(formula: str) -> int:
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS
