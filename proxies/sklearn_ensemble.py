"""Randomised trees from scikit-learn under the same interface as the networks: quick to train, a check on them.

Trees are fitted with scikit-learn and kept as plain arrays, so that nothing has to be unpickled and predictions do not
depend on the installed version. They do not know what a wrong volume costs beyond what labelled crystals show.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesRegressor
from torch import Tensor

from envs.crystal import CrystalBatch
from proxies.base import Prediction, ProxyError
from proxies.calibration import LogitCalibration, StdCalibration
from proxies.elements import element_properties
from proxies.features import N_LATTICE_SYSTEMS, N_POINT_SYMMETRIES, featurise, position_table
from proxies.storage import StorageError, WeightFiles
from proxies.views import TREES

FILES = WeightFiles("trees.safetensors", TREES, "crystal-discover tree ensemble 1")
METAL_GAP = 1e-4  # eV; smaller gaps are metals
ENERGIES = ("formation_energy_per_atom", "e_above_hull")
_ARRAYS = ("feature", "threshold", "left", "right", "mean", "variance", "roots")
_CHUNK = 4096
_MIN_ROWS = 200
_HELD_OUT = 0.1  # share of formulas kept for calibration
_LOWEST_P = 1e-3


@dataclass(frozen=True)
class Forest:
    """Trees as arrays over all their nodes; a leaf is its own child."""

    feature: Tensor  # (n_nodes,) int64
    threshold: Tensor  # (n_nodes,) float32, go left if the feature is at most this
    left: Tensor  # (n_nodes,) int64
    right: Tensor  # (n_nodes,) int64
    mean: Tensor  # (n_nodes,) float32 of the training rows in the node
    variance: Tensor  # (n_nodes,) float32
    roots: Tensor  # (n_trees,) int64

    @classmethod
    def from_sklearn(cls, model: ExtraTreesRegressor) -> Self:
        """Return the trees of a fitted forest."""
        parts: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in _ARRAYS}
        offset = 0
        for estimator in model.estimators_:
            tree = estimator.tree_
            nodes = np.arange(tree.node_count) + offset
            leaf = tree.children_left < 0
            parts["feature"].append(np.where(leaf, 0, tree.feature))
            parts["threshold"].append(tree.threshold.astype(np.float32))
            parts["left"].append(np.where(leaf, nodes, tree.children_left + offset))
            parts["right"].append(np.where(leaf, nodes, tree.children_right + offset))
            parts["mean"].append(tree.value[:, 0, 0].astype(np.float32))
            parts["variance"].append(tree.impurity.astype(np.float32))
            parts["roots"].append(np.array([offset]))
            offset += tree.node_count
        arrays = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
        return cls(**{name: array.long() if not array.is_floating_point() else array for name, array in arrays.items()})

    def moments(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n,) mean and variance of the mixture of the trees' leaves, float64, for (n, n_features) inputs."""
        nodes = self.roots.expand(len(inputs), -1)
        while True:
            goes_left = inputs.gather(1, self.feature[nodes]) <= self.threshold[nodes]
            following = torch.where(goes_left, self.left[nodes], self.right[nodes])
            if torch.equal(following, nodes):
                break
            nodes = following
        means, variances = self.mean[nodes].double(), self.variance[nodes].double()
        mean = means.mean(dim=1)
        return mean, (variances + means**2).mean(dim=1) - mean**2


@dataclass(frozen=True)
class TreeEnsemble:
    """Forests for formation energy, energy above hull, the gap of non-metals and the share of metals."""

    forests: dict[str, Forest]  # keys: ENERGIES, "gap_of_non_metals", "metal"
    std: dict[str, StdCalibration]  # keys: ENERGIES, "band_gap"
    metal: LogitCalibration
    properties: Tensor  # (119, n_properties) float32 table of the elements, as of the training
    log_volumes: Tensor  # (119,) float32

    @classmethod
    def fit(
        cls,
        crystals: CrystalBatch,
        labels: Mapping[str, Tensor],
        log_volumes: Tensor,
        *,
        n_trees: int = 100,
        min_leaf: int = 2,
        seed: int = 0,
        n_jobs: int = 2,
    ) -> Self:
        """Fit forests and calibrate them on a tenth of the formulas, which no tree sees.

        Args:
            crystals: n crystals.
            labels: {name: (n,) values, NaN = none} of both energies and the band gap.
            log_volumes: (119,) float32 log of the elemental volumes in Å³/atom.
            n_trees: Trees of each forest.
            min_leaf: Fewest rows of a leaf.
            seed: Of the forests.
            n_jobs: Threads.

        Raises:
            ProxyError: If a label has too few rows.
        """
        properties = torch.from_numpy(np.array(element_properties()))
        inputs = tree_inputs(crystals, properties, log_volumes)
        held_out = torch.tensor([zlib.crc32(name.encode()) % 1000 < 1000 * _HELD_OUT for name in crystals.formulas()])
        gap = labels["band_gap"].double()
        metal = torch.where(gap.isnan(), torch.nan, (gap < METAL_GAP).double())
        targets = {name: labels[name].double() for name in ENERGIES}
        targets |= {"gap_of_non_metals": torch.where(metal == 0.0, gap, torch.nan), "metal": metal}
        forests, moments = {}, {}
        for name, target in targets.items():
            rows = ~target.isnan() & ~held_out
            if int(rows.sum()) < _MIN_ROWS:
                raise ProxyError(f"trees need at least {_MIN_ROWS} rows with {name}, got {int(rows.sum())}")
            model = ExtraTreesRegressor(
                n_trees, min_samples_leaf=min_leaf, max_features=0.4, random_state=seed, n_jobs=n_jobs
            )
            forests[name] = Forest.from_sklearn(model.fit(inputs[rows].numpy(), target[rows].numpy()))
            moments[name] = forests[name].moments(inputs[held_out])
        std = {}
        for name, key in (*((e, e) for e in ENERGIES), ("gap_of_non_metals", "band_gap")):
            target = targets[name][held_out]
            known = ~target.isnan()
            mean, variance = (moment[known] for moment in moments[name])
            std[key] = StdCalibration.fit(mean - target[known], variance.clamp_min(1e-8).sqrt())
        known = ~metal[held_out].isnan()
        logit = moments["metal"][0].clamp(_LOWEST_P, 1.0 - _LOWEST_P).logit()
        calibration = LogitCalibration.fit(logit[known], metal[held_out][known] > 0.5)
        return cls(forests, std, calibration, properties, log_volumes)

    def predict_all(self, crystals: CrystalBatch) -> dict[str, Prediction]:
        """Return the calibrated prediction of each property, as `PropertyEnsemble.predict_all` does."""
        inputs = tree_inputs(crystals, self.properties, self.log_volumes)
        chunks = [[forest.moments(part) for part in inputs.split(_CHUNK)] for forest in self.forests.values()]
        moments = {
            name: (torch.cat([mean for mean, _ in parts]), torch.cat([variance for _, variance in parts]))
            for name, parts in zip(self.forests, chunks, strict=True)
        }
        results = {}
        for name in ENERGIES:
            mean, variance = moments[name]
            results[name] = Prediction(
                mean, self.std[name](variance.clamp_min(1e-8).sqrt(), moments["e_above_hull"][0])
            )
        p_metal = self.metal(moments["metal"][0].clamp(_LOWEST_P, 1.0 - _LOWEST_P).logit())
        p_metal = p_metal.clamp(_LOWEST_P / 10.0, 1.0 - _LOWEST_P / 10.0)
        gap, variance = moments["gap_of_non_metals"]
        spread = self.std["band_gap"](variance.clamp_min(1e-8).sqrt(), moments["e_above_hull"][0])
        mean = (1.0 - p_metal) * gap
        total = (1.0 - p_metal) * (spread**2 + gap**2) - mean**2
        results["band_gap"] = Prediction(mean, total.sqrt(), p_metal)
        return results

    def save(self, folder: Path) -> None:
        """Write arrays and description into `folder`."""
        tensors = {"properties": self.properties, "log_volumes": self.log_volumes}
        for name, forest in self.forests.items():
            for array in _ARRAYS:
                value: Tensor = getattr(forest, array)
                tensors[f"{name}.{array}"] = value if value.is_floating_point() else value.int()
        description = {
            "forests": list(self.forests),
            "std": {name: item.to_json() for name, item in self.std.items()},
            "metal": self.metal.to_json(),
        }
        FILES.write(folder, tensors, description)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ProxyError: If a file is missing, truncated or foreign.
        """
        try:
            tensors, description = FILES.read(folder)
            forests = {}
            for name in description["forests"]:
                arrays = {array: tensors[f"{name}.{array}"] for array in _ARRAYS}
                forests[name] = Forest(**{k: v if v.is_floating_point() else v.long() for k, v in arrays.items()})
            std = {name: StdCalibration.from_json(item) for name, item in description["std"].items()}
            metal = LogitCalibration.from_json(description["metal"])
            properties = tensors.get("properties")  # the first trees were saved without it, from the table of today
            if properties is None:
                properties = torch.from_numpy(np.array(element_properties()))
            return cls(forests, std, metal, properties, tensors["log_volumes"])
        except (StorageError, KeyError, TypeError) as error:
            raise ProxyError(f"{folder} holds no readable tree ensemble ({error}); train it again") from error


def tree_inputs(crystals: CrystalBatch, properties: Tensor, log_volumes: Tensor) -> Tensor:
    """Return (n, n_features) float32: composition statistics, cell, space group and mean facts of the positions."""
    features = featurise(crystals, properties, log_volumes)
    facts = _position_facts()[features.positions]
    mean_facts = (facts * features.fractions[..., None]).sum(dim=1)
    return torch.cat([features.crystal, features.space_group.float()[:, None], mean_facts], dim=-1)


def _position_facts() -> Tensor:
    """Return the position table without its one-hot site symmetries."""
    n_kept = 5 + 2 + N_LATTICE_SYSTEMS + N_POINT_SYMMETRIES
    return position_table()[:, -n_kept:]
