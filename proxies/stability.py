"""Energy above the convex hull of the Materials Project (MP2020-corrected PBE), and the chance to be metastable."""

import torch
from torch import Tensor

from proxies.base import Prediction
from proxies.views import PropertyView

METASTABLE = 0.1  # eV/atom; most synthesised crystals lie below (Sun et al. 2016, doi:10.1126/sciadv.1600225)


class StabilityProxy(PropertyView):
    """Energy above the hull of the crystal, plus what the given cell costs if it is far from relaxed."""

    name = "e_above_hull"
    unit = "eV/atom"


def p_metastable(prediction: Prediction, limit: float = METASTABLE) -> Tensor:
    """Return (n,) P(energy above hull < limit) under the predicted Gaussian; `limit` in eV/atom."""
    probability: Tensor = torch.special.ndtr((limit - prediction.mean) / prediction.std)
    return probability
