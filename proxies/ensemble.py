"""The shipped ensemble: every learned property of a crystal in one pass, calibrated."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from envs.crystal import CrystalBatch
from proxies.base import Prediction, ProxyError
from proxies.calibration import LogitCalibration, StdCalibration
from proxies.features import Features, featurise
from proxies.networks import N_OUTPUTS, NetworkConfig, OrbitNetwork
from proxies.storage import StorageError, WeightFiles

LEARNED = ("formation_energy_per_atom", "band_gap", "e_above_hull")
WEIGHTS, DESCRIPTION = "ensemble.safetensors", "ensemble.json"
FILES = WeightFiles(WEIGHTS, DESCRIPTION, "crystal-discover property ensemble 1")
_SHARED = ("properties", "log_volumes", "crystal_mean", "crystal_scale")
_CHUNK, _SMALLEST_CHUNK = 512, 128  # crystals a pass: activations stay in the cache of one core
_MIN_LOG_SCALE, _MAX_LOG_SCALE = -6.0, 2.0
_MAX_LOGIT = 9.0  # P(metal) keeps 1e-4 from 0 and 1, so that moments of non-metals can be recovered


@dataclass(frozen=True)
class RawOutputs:
    """Moments of the ensemble before calibration, each (n,) float64."""

    mean: dict[str, Tensor]  # of formation energy, energy above hull, and the gap of non-metals
    std: dict[str, Tensor]
    metal_logit: Tensor


@dataclass(frozen=True)
class Calibration:
    """How raw moments become calibrated ones."""

    std: dict[str, StdCalibration]  # one of each property in LEARNED
    metal: LogitCalibration

    @classmethod
    def none(cls) -> Self:
        """Return the calibration that changes nothing."""
        return cls({name: StdCalibration.none() for name in LEARNED}, LogitCalibration(1.0, 0.0))


class PropertyEnsemble:
    """Members that differ in seed, read as one prediction.

    Attributes:
        members: Networks of equal shape.
        calibration: Fitted on rows that no member was trained on.
        facts: What the model card says: data, training, figures.
    """

    def __init__(
        self, members: Sequence[OrbitNetwork], calibration: Calibration, facts: dict[str, Any] | None = None
    ) -> None:
        if not members:
            raise ProxyError("an ensemble needs at least one member")
        self.members = [member.eval().requires_grad_(requires_grad=False) for member in members]
        self.calibration = calibration
        self.facts = dict(facts or {})
        with torch.no_grad():
            self._tables = [(member.element_table(), member.position_table()) for member in self.members]

    def predict_all(self, crystals: CrystalBatch) -> dict[str, Prediction]:
        """Return the calibrated prediction of each property in `LEARNED`; `crystals` are left unchanged.

        A band gap is a point mass at zero (metals, probability `p_metal`) and a distribution above it; `mean` and `std`
        are those of the whole.
        """
        raw = self.raw_outputs(crystals)
        hull = raw.mean["e_above_hull"]
        std = {name: self.calibration.std[name](raw.std[name], hull) for name in LEARNED}
        p_metal = self.calibration.metal(raw.metal_logit).clamp(_sigmoid(-_MAX_LOGIT), _sigmoid(_MAX_LOGIT))
        gap, spread = raw.mean["band_gap"], std["band_gap"]
        mean = (1.0 - p_metal) * gap
        variance = (1.0 - p_metal) * (spread**2 + gap**2) - mean**2
        return {
            "formation_energy_per_atom": Prediction(
                raw.mean["formation_energy_per_atom"], std["formation_energy_per_atom"]
            ),
            "band_gap": Prediction(mean, variance.sqrt(), p_metal),
            "e_above_hull": Prediction(raw.mean["e_above_hull"], std["e_above_hull"]),
        }

    @torch.no_grad()
    def raw_outputs(self, crystals: CrystalBatch) -> RawOutputs:
        """Return the moments of the ensemble before calibration."""
        first = self.members[0]
        if len(crystals) == 0:
            return _combine(torch.zeros(len(self.members), 0, N_OUTPUTS, dtype=torch.float64))
        widths = occupied_width(crystals.counts)
        order = widths.argsort()

        def outputs(rows: Tensor) -> Tensor:
            chunk = cut(crystals.select(rows), int(widths[rows[-1]]))
            features = featurise(chunk, first.properties, first.log_volumes)
            passes = zip(self.members, self._tables, strict=True)
            return torch.stack([member.outputs(features, *tables) for member, tables in passes])

        stacked = torch.cat(map_in_threads(outputs, order.split(chunk_size(len(order)))), dim=1)
        restored = torch.empty_like(stacked)
        restored[:, order] = stacked
        return _combine(restored.double())

    def with_calibration(self, calibration: Calibration, facts: dict[str, Any] | None = None) -> Self:
        """Return the same members under another calibration."""
        return type(self)(self.members, calibration, self.facts if facts is None else facts)

    def save(self, folder: Path) -> None:
        """Write weights (half precision) and description into `folder`; each file appears complete or not at all."""
        tensors = {f"shared.{name}": getattr(self.members[0], name).clone() for name in _SHARED}
        for k, member in enumerate(self.members):
            for name, value in member.state_dict().items():
                if name not in _SHARED:
                    tensors[f"members.{k}.{name}"] = value.half().contiguous()
        description = {
            "n_members": len(self.members),
            "network": asdict(self.members[0].config),
            "calibration": {
                "std": {name: item.to_json() for name, item in self.calibration.std.items()},
                "metal": self.calibration.metal.to_json(),
            },
            "facts": self.facts,
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
        except StorageError as error:
            raise ProxyError(
                f"{folder} holds no readable proxy ensemble ({error}); retrain with "
                f"`python -m discover.train what=proxy data=PATH` or reinstall the package"
            ) from error
        try:
            config = NetworkConfig(**description["network"])
            members = [_member(config, tensors, k) for k in range(description["n_members"])]
            calibration = Calibration(
                {name: StdCalibration.from_json(description["calibration"]["std"][name]) for name in LEARNED},
                LogitCalibration.from_json(description["calibration"]["metal"]),
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise ProxyError(f"{folder}: weights and description do not fit together ({error}); retrain it") from error
        return cls(members, calibration, description["facts"])


def chunk_size(n: int) -> int:
    """Return how many of `n` crystals make one pass: at most 512, fewer where that leaves threads without work."""
    share = -(-n // (2 * torch.get_num_threads()))  # two passes a thread, since passes differ in width
    return min(_CHUNK, max(share, _SMALLEST_CHUNK))


def map_in_threads(function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the function of each part, computed on as many threads as torch may use.

    Operations on a few hundred crystals are too short to be split themselves: one thread a part is 1.4 times as fast on
    two cores, where splitting operations gains nothing.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(parts) == 1:
        return [function(part) for part in parts]
    try:
        with ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(n_threads)


def occupied_width(counts: Tensor) -> Tensor:
    """Return (n,) number of columns up to the last orbit of (n, width) counts or fractions, at least 1."""
    columns = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    return (columns * (counts > 0)).amax(dim=-1).clamp_min(1)


def cut(crystals: CrystalBatch, width: int) -> CrystalBatch:
    """Return the crystals with their first `width` orbits."""
    return CrystalBatch(
        crystals.space_group,
        crystals.elements[:, :width],
        crystals.letters[:, :width],
        crystals.counts[:, :width],
        crystals.lattice_parameters,
    )


def take(features: Features, rows: Tensor, width: int) -> Features:
    """Return the features of `rows`, cut to the first `width` orbits."""
    return Features(
        features.elements[rows, :width],
        features.positions[rows, :width],
        features.fractions[rows, :width],
        features.space_group[rows],
        features.crystal[rows],
    )


def _member(config: NetworkConfig, tensors: dict[str, Tensor], k: int) -> OrbitNetwork:
    """Return member `k` of stored weights."""
    member = OrbitNetwork(config, tensors["shared.properties"], tensors["shared.log_volumes"])
    prefix = f"members.{k}."
    state = {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}
    member.load_state_dict({**state, **{name: tensors[f"shared.{name}"] for name in _SHARED}})
    return member


def _combine(outputs: Tensor) -> RawOutputs:
    """Return the moments of a mixture of (n_members, n, 7) outputs.

    Scales are those of Laplace distributions, whose standard deviation is √2 times as large. The variance of the
    mixture is the mean of the members' variances plus the variance of their means; a member counts in the gap of
    non-metals as far as it sees a non-metal.
    """
    std = math.sqrt(2.0) * outputs[..., 1:6:2].clamp(_MIN_LOG_SCALE, _MAX_LOG_SCALE).exp()
    mean = outputs[..., 0:6:2]
    mean = torch.cat([mean[..., :2], mean[..., 2:].clamp_min(0.0)], dim=-1)
    energy_mean, energy_var = mean[..., :2].mean(0), (std[..., :2] ** 2 + mean[..., :2] ** 2).mean(0)
    energy_var = energy_var - energy_mean**2
    p_metal = outputs[..., 6].sigmoid()
    share = (1.0 - p_metal).clamp_min(1e-6)
    share = share / share.sum(0)
    gap_mean = (share * mean[..., 2]).sum(0)
    gap_var = (share * (std[..., 2] ** 2 + mean[..., 2] ** 2)).sum(0) - gap_mean**2
    return RawOutputs(
        mean={"formation_energy_per_atom": energy_mean[:, 0], "e_above_hull": energy_mean[:, 1], "band_gap": gap_mean},
        std={
            "formation_energy_per_atom": energy_var[:, 0].clamp_min(1e-8).sqrt(),
            "e_above_hull": energy_var[:, 1].clamp_min(1e-8).sqrt(),
            "band_gap": gap_var.clamp_min(1e-8).sqrt(),
        },
        metal_logit=p_metal.mean(0).clamp(_sigmoid(-_MAX_LOGIT), _sigmoid(_MAX_LOGIT)).logit(),
    )


def _sigmoid(value: float) -> float:
    """Return the logistic function of a number."""
    return 1.0 / (1.0 + math.exp(-value))
