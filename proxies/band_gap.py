"""Band gap on the PBE scale, which lies below experiment (`discover.gap_scale` converts)."""

import torch
from torch import Tensor

from proxies.base import Prediction, ProxyError
from proxies.views import PropertyView


class BandGapProxy(PropertyView):
    """Band gap: a point mass at zero (metals) and a distribution above it; mean and std are those of the whole."""

    name = "band_gap"
    unit = "eV"


def median_gap(prediction: Prediction) -> Tensor:
    """Return (n,) median of the predicted distribution in eV: 0 where a metal is more likely than not.

    Given that there is a gap it is taken for Gaussian, cut at zero.

    Raises:
        ProxyError: If the prediction is not of a band gap.
    """
    if prediction.p_metal is None:
        raise ProxyError("only a prediction of a band gap has p_metal")
    p_gap = 1.0 - prediction.p_metal
    mean = prediction.mean / p_gap
    std = ((prediction.std**2 + prediction.mean**2) / p_gap - mean**2).clamp_min(1e-12).sqrt()
    rank = ((0.5 - prediction.p_metal) / p_gap).clamp(1e-6, 1.0 - 1e-6)
    value = (mean + std * torch.special.ndtri(rank)).clamp_min(0.0)
    return torch.where(prediction.p_metal >= 0.5, torch.zeros_like(value), value)
