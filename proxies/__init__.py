"""Properties of finished crystals, predicted with their uncertainty and without coordinates.

`load_pretrained` returns the shipped ensemble, which predicts formation energy, band gap and energy above hull in one
pass; `DensityProxy` is exact. Every proxy follows the protocol of `proxies.base`.
"""

from functools import cache
from pathlib import Path

from proxies.base import Prediction, Proxy, ProxyError
from proxies.density import DensityProxy
from proxies.ensemble import PropertyEnsemble

PRETRAINED = Path(__file__).parent / "pretrained"


@cache
def load_pretrained() -> PropertyEnsemble:
    """Return the shipped ensemble (read once per process).

    Raises:
        ProxyError: If its files are missing or damaged.
    """
    return PropertyEnsemble.load(PRETRAINED)


__all__ = ["PRETRAINED", "DensityProxy", "Prediction", "PropertyEnsemble", "Proxy", "ProxyError", "load_pretrained"]
