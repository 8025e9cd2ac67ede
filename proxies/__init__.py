"""Properties of finished crystals, predicted with their uncertainty and without coordinates.

`load_pretrained` returns the shipped ensemble, which predicts formation energy, band gap and energy above hull in one
pass; the proxies are views of it. `DensityProxy` is exact. Every proxy follows the protocol of `proxies.base`.
"""

from proxies.band_gap import BandGapProxy, median_gap
from proxies.base import Prediction, Proxy, ProxyError
from proxies.density import DensityProxy
from proxies.ensemble import PropertyEnsemble
from proxies.formation_energy import FormationEnergyProxy
from proxies.stability import StabilityProxy, p_metastable
from proxies.views import PRETRAINED, load_ensemble, load_pretrained

__all__ = [
    "PRETRAINED",
    "BandGapProxy",
    "DensityProxy",
    "FormationEnergyProxy",
    "Prediction",
    "PropertyEnsemble",
    "Proxy",
    "ProxyError",
    "StabilityProxy",
    "load_ensemble",
    "load_pretrained",
    "median_gap",
    "p_metastable",
]
