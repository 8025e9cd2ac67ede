"""One place to ask for predicted properties: the shared network, and proxies that stand beside or instead of it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from discover.errors import RewardError
from envs.crystal import CrystalBatch
from proxies.base import Prediction, Proxy

#: What the shipped network predicts in one pass.
LEARNED = ("formation_energy_per_atom", "band_gap", "e_above_hull")


class Ensemble(Protocol):
    """Predicts every learned property in one pass."""

    def predict_all(self, crystals: CrystalBatch) -> Mapping[str, Prediction]:
        """Predict the properties named in `LEARNED`."""


class Properties:
    """Predicts what is asked for, and runs nothing else.

    Args:
        ensemble: Predicts the learned properties in one pass; None leaves them to `proxies`.
        proxies: Any further proxies; one that predicts a learned property replaces the ensemble's prediction of it.
    """

    def __init__(self, ensemble: Ensemble | None = None, proxies: Iterable[Proxy] = ()) -> None:
        self._ensemble = ensemble
        self._proxies = {proxy.name: proxy for proxy in proxies}

    @property
    def names(self) -> tuple[str, ...]:
        """Every property that can be predicted."""
        return tuple(dict.fromkeys([*(LEARNED if self._ensemble is not None else ()), *self._proxies]))

    def predict(self, crystals: CrystalBatch, names: Collection[str] | None = None) -> dict[str, Prediction]:
        """Return the predictions of `names`, all properties by default.

        Raises:
            RewardError: If a property has no proxy.
        """
        wanted = self.names if names is None else tuple(names)
        if missing := [name for name in wanted if name not in self.names]:
            raise RewardError(f"no proxy predicts {', '.join(missing)}; there are proxies of {', '.join(self.names)}")
        results: dict[str, Prediction] = {}
        if self._ensemble is not None and any(name not in self._proxies for name in wanted):
            results.update(self._ensemble.predict_all(crystals))
        results.update({name: self._proxies[name].predict(crystals) for name in wanted if name in self._proxies})
        return {name: results[name] for name in wanted}
