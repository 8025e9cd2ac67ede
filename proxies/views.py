"""One learned property as a proxy: a view of an ensemble that predicts several in one pass."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

from envs.crystal import CrystalBatch
from proxies.base import Prediction, ProxyError
from proxies.ensemble import DESCRIPTION as NETWORKS
from proxies.ensemble import PropertyEnsemble

PRETRAINED = Path(__file__).parent / "pretrained"
TREES = "trees.json"


class PredictsAll(Protocol):
    """Predicts several properties in one pass; networks and trees both do."""

    def predict_all(self, crystals: CrystalBatch) -> Mapping[str, Prediction]:
        """Return a prediction of each property it knows."""


@cache
def load_pretrained() -> PropertyEnsemble:
    """Return the shipped ensemble (read once per process).

    Raises:
        ProxyError: If its files are missing or damaged.
    """
    return PropertyEnsemble.load(PRETRAINED)


def load_ensemble(folder: Path) -> PredictsAll:
    """Return the ensemble in `folder`, whichever kind was saved there: networks or trees.

    Raises:
        ProxyError: If there is none, there are both, or its files are damaged.
    """
    if (folder / TREES).is_file() and (folder / NETWORKS).is_file():
        raise ProxyError(f"{folder} holds trees and networks; move {TREES} or {NETWORKS} away to say which are meant")
    if (folder / TREES).is_file():
        from proxies.sklearn_ensemble import TreeEnsemble  # noqa: PLC0415 - scikit-learn takes a second to import

        return TreeEnsemble.load(folder)
    return PropertyEnsemble.load(folder)


class PropertyView:
    """One property of an ensemble.

    To score several properties of the same crystals call `predict_all` of the ensemble once instead.
    """

    name: str
    unit: str

    def __init__(self, ensemble: PredictsAll | None = None) -> None:
        self._ensemble = load_pretrained() if ensemble is None else ensemble

    def predict(self, crystals: CrystalBatch) -> Prediction:
        """Predict every crystal of the batch, in order, without changing it."""
        return self._ensemble.predict_all(crystals)[self.name]
