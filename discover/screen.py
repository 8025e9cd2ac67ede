"""What a single point of a built structure says of how it will relax, put together with what the proxies say.

The proxies see no coordinates, a single point sees nothing else. The tables below are means and standard deviations of
1,104 crystals of the untrained sampler before and after a relaxation with CHGNet (`benchmarks.prior_labels`), by the
energy above hull as built: the further above the hull a structure is as built, the more it falls, and the wider its gap
opens. Structures that were chosen for their predictions differ from those; what a campaign has labelled corrects the
tables (`Trust`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discover.oracle.base import P_METAL, Label
from proxies.base import Prediction

SCREENED = "screened."  # before the names of predictions that a look went into
#: Energy above hull as built; mean and standard deviation of that after relaxation, eV/atom.
_BUILT = np.array([-0.01, 0.06, 0.15, 0.26, 0.38, 0.56, 0.80, 1.30, 3.40])
_RELAXED = np.array([-0.04, 0.02, 0.07, 0.13, 0.19, 0.28, 0.36, 0.48, 0.50])
_SPREAD = np.array([0.05, 0.05, 0.07, 0.08, 0.11, 0.15, 0.23, 0.34, 0.60])
#: What the gap of a non-metal gains by relaxation per eV/atom above hull as built, and its standard deviation, eV.
_OPENS, _MOST_ABOVE = 0.9, 1.2
_GAP_STD, _GAP_STD_SLOPE = 0.2, 1.0
#: Logit of P(metal after relaxation) from those of the gap model as built and of the proxy.
_METAL = (-0.41, 0.68, 0.54)
_SURE = 0.01  # probabilities are kept this far from 0 and 1
PRIOR_LABELS = 10.0  # labels that the tables count for against those of the campaign
_WORST = 4.0  # standard deviations that one label counts for at most


@dataclass(frozen=True)
class Trust:
    """How far off screened predictions were: shift of the mean and factor on the standard deviation of each."""

    shift: Mapping[str, float]
    factor: Mapping[str, float]

    @classmethod
    def of(
        cls, predicted: Mapping[str, Sequence[tuple[float, float]]], found: Mapping[str, Sequence[float]]
    ) -> "Trust":
        """Return the trust that labels justify; without any, the tables as they are.

        Args:
            predicted: Mean and standard deviation of each label's screened prediction, by property.
            found: What the oracle found, NaN where unknown.
        """
        shift, factor = {}, {}
        for name, pairs in predicted.items():
            mean, std = np.array(pairs, dtype=float).reshape(-1, 2).T
            error = np.array(found[name], dtype=float) - mean
            known = np.isfinite(error) & np.isfinite(std)
            z = (error[known] / std[known]).clip(-_WORST, _WORST)
            moved = z.sum() / (PRIOR_LABELS + len(z))
            shift[name] = float(moved * std[known].mean()) if len(z) else 0.0
            factor[name] = math.sqrt((PRIOR_LABELS + float(((z - moved) ** 2).sum())) / (PRIOR_LABELS + len(z)))
        return cls(shift, factor)

    def corrected(self, name: str, prediction: Prediction) -> Prediction:
        """Return a prediction, shifted and with another width."""
        shift, factor = self.shift.get(name, 0.0), self.factor.get(name, 1.0)
        return Prediction(prediction.mean + shift, prediction.std * factor, prediction.p_metal)


def after_relaxation(built: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean energy above hull after relaxation, eV/atom, of (n,) energies above hull as built."""
    return np.where(built < _BUILT[0], built - _BUILT[0] + _RELAXED[0], np.interp(built, _BUILT, _RELAXED))


def screened(
    predictions: Mapping[str, Prediction], looks: Sequence[Label], above_hull: Sequence[float], trust: Trust
) -> dict[str, Prediction]:
    """Return predictions that know what single points of the built structures said.

    Args:
        predictions: Of the proxies, (n,) each.
        looks: Single points of the n structures.
        above_hull: Energy above hull of each, as built, eV/atom.
        trust: From the labels so far.
    """
    known = dict(predictions)
    built = np.array(above_hull, dtype=float)
    relaxed = after_relaxation(built)
    spread = torch.from_numpy(np.interp(built, _BUILT, _SPREAD))
    energies = np.array([look.formation_energy_per_atom for look in looks], dtype=float)
    for name, mean in (("formation_energy_per_atom", energies - built + relaxed), ("e_above_hull", relaxed)):
        if name in known:
            known[name] = trust.corrected(name, _joined(known[name], torch.from_numpy(mean), spread))
    if "band_gap" in known:
        known["band_gap"] = _gap(known["band_gap"], looks, built, trust)
    return known


def _gap(proxy: Prediction, looks: Sequence[Label], built: NDArray[np.float64], trust: Trust) -> Prediction:
    """Return the gap of what will relax, as a mixture of a metal and a non-metal."""
    gaps = torch.tensor([look.band_gap for look in looks], dtype=torch.float64)
    metal = torch.tensor([look.properties.get(P_METAL, math.nan) for look in looks], dtype=torch.float64)
    if proxy.p_metal is None or bool(metal.isnan().all()):
        return proxy
    above = torch.from_numpy(np.clip(built, 0.0, _MOST_ABOVE))
    offset, own, others = _METAL
    p_metal = torch.sigmoid(offset + own * _logit(metal) + others * _logit(proxy.p_metal.double()))
    p_metal = torch.where(metal.isnan(), proxy.p_metal.double(), p_metal)
    # A median gap of zero says metal; how wide the gap of the non-metal would be, the proxy knows better.
    share = (1.0 - proxy.p_metal.double()).clamp_min(_SURE)
    mean, square = proxy.mean.double() / share, (proxy.std.double() ** 2 + proxy.mean.double() ** 2) / share
    given = Prediction(mean, (square - mean**2).clamp_min(_SURE**2).sqrt())
    seen = torch.where(gaps > 0, gaps + _OPENS * above, torch.nan)
    given = trust.corrected("band_gap", _joined(given, seen, _GAP_STD + _GAP_STD_SLOPE * above))
    present = 1.0 - p_metal
    whole = present * given.mean
    return Prediction(whole, (present * (given.std**2 + given.mean**2) - whole**2).clamp_min(0.0).sqrt(), p_metal)


def _joined(first: Prediction, mean: Tensor, std: Tensor) -> Prediction:
    """Return the product of two normal distributions; `first` where the second is not known."""
    a, b = first.std.double() ** -2, std.double() ** -2
    joint = (a * first.mean.double() + b * mean) / (a + b)
    unknown = mean.isnan()
    return Prediction(
        torch.where(unknown, first.mean.double(), joint), torch.where(unknown, first.std.double(), (a + b) ** -0.5)
    )


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(_SURE, 1.0 - _SURE))
