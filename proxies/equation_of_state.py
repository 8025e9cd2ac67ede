"""What a wrong volume costs: the energies of crystals away from equilibrium, for training proxies.

Universal equation of state (Rose, Smith, Guinea and Ferrante 1984, Phys. Rev. B 29, 2963):
``ΔE(x) = D [1 - (1 + a) exp(-a)]`` with ``a = (exp(x / 3) - 1) / l``, ``x = log(V / V0)`` and ``D = 9 l² B V0``.
The stiffness ``B V0`` (eV/atom) and the width ``l`` follow from composition by a ridge regression on curves that
CHGNet computes (`discover.fit_equation_of_state`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor

from envs.crystal import CrystalBatch
from proxies.base import ProxyError
from proxies.elements import PROPERTIES, element_properties
from proxies.features import composition_statistics

MAX_RISE = 5.0  # eV/atom; larger rises are squeezed below this, no sampler needs to know more
SHAPE_STIFFNESS = 0.4  # stiffness of a shear of the axes, as a share of B V0 (isotropic solids: 4 G / 3 B ≈ 0.4 to 0.8)
_RIDGE = 30.0
_LOG_STIFFNESS = (-1.0, 4.0)  # 0.4 to 55 eV/atom; solid nitrogen to tungsten
_LOG_WIDTH = (-2.6, -0.9)  # 0.07 to 0.4; metals are near 0.2, ionic crystals near 0.3


def rise(log_ratio: Tensor, stiffness: Tensor, width: Tensor) -> Tensor:
    """Return the energy above equilibrium in eV/atom, at most `MAX_RISE`.

    Args:
        log_ratio: (n,) log(V / V0).
        stiffness: (n,) B V0 in eV/atom.
        width: (n,) l, without unit.
    """
    a = (torch.exp(log_ratio / 3.0) - 1.0) / width
    energy = 9.0 * width**2 * stiffness * (1.0 - (1.0 + a) * torch.exp(-a))
    return MAX_RISE * (1.0 - torch.exp(-energy / MAX_RISE))


def fit_curve(ratios: NDArray[np.float64], energies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (2,) log stiffness (eV/atom) and log width of one curve, NaN if it has no minimum inside.

    Args:
        ratios: (k,) V / V0, with V0 near the minimum.
        energies: (k,) eV/atom.
    """
    finite = np.isfinite(energies)
    if finite.sum() < len(ratios) - 1 or int(np.nanargmin(energies)) in (0, len(ratios) - 1):
        return np.full(2, np.nan)
    x, y = np.log(ratios[finite]), energies[finite]

    def residual(p: NDArray[np.float64]) -> NDArray[np.float64]:
        a = (np.exp((x - p[3]) / 3.0) - 1.0) / np.exp(p[1])
        return np.asarray(p[2] + 9.0 * np.exp(2.0 * p[1] + p[0]) * (1.0 - (1.0 + a) * np.exp(-a)) - y)

    start = np.array([2.0, -1.5, float(y.min()), 0.0])
    bounds = ([_LOG_STIFFNESS[0], _LOG_WIDTH[0], -np.inf, -0.2], [_LOG_STIFFNESS[1], _LOG_WIDTH[1], np.inf, 0.2])
    found = least_squares(residual, start, bounds=bounds, loss="soft_l1", f_scale=0.05)
    return np.asarray(found.x[:2])


@dataclass(frozen=True)
class EquationOfState:
    """Stiffness and width of any crystal from its composition."""

    coefficients: Tensor  # (n_features + 1, 2) float64, the last row is the intercept
    residual: tuple[float, float]  # standard deviation of the two logarithms on the fitted curves
    n_curves: int

    @classmethod
    def fit(cls, crystals: CrystalBatch, parameters: NDArray[np.float64]) -> Self:
        """Regress (n, 2) log stiffness and log width, rows with NaN left out, on composition.

        Raises:
            ProxyError: If fewer than 20 curves are usable.
        """
        usable = np.isfinite(parameters).all(axis=1)
        if usable.sum() < 20:
            raise ProxyError(f"an equation of state needs at least 20 usable curves, got {int(usable.sum())}")
        design = _design(crystals).numpy()[usable]
        target = parameters[usable]
        penalty = np.eye(design.shape[1]) * _RIDGE
        penalty[-1, -1] = 0.0
        coefficients = np.linalg.solve(design.T @ design + penalty, design.T @ target)
        spread = (target - design @ coefficients).std(axis=0)
        return cls(torch.from_numpy(coefficients), (float(spread[0]), float(spread[1])), int(usable.sum()))

    def parameters(self, crystals: CrystalBatch) -> tuple[Tensor, Tensor]:
        """Return (n,) stiffness in eV/atom and (n,) width."""
        logs = _design(crystals) @ self.coefficients
        return logs[:, 0].clamp(*_LOG_STIFFNESS).exp(), logs[:, 1].clamp(*_LOG_WIDTH).exp()

    def rise(self, crystals: CrystalBatch, log_ratio: Tensor) -> Tensor:
        """Return (n,) energy in eV/atom that a volume off by log(V / V0) costs."""
        return rise(log_ratio, *self.parameters(crystals))

    def shape_rise(self, crystals: CrystalBatch, log_stretch: Tensor) -> Tensor:
        """Return (n,) energy in eV/atom that a ratio of axes off by `log_stretch` costs, at equal volume."""
        stiffness, _ = self.parameters(crystals)
        return MAX_RISE * (1.0 - torch.exp(-0.5 * SHAPE_STIFFNESS * stiffness * log_stretch**2 / MAX_RISE))

    def save(self, path: Path) -> None:
        """Write the model as JSON."""
        content = {
            "what": "log(B V0 / eV per atom) and log(width) as linear functions of composition statistics",
            "properties": list(PROPERTIES),
            "n_curves": self.n_curves,
            "residual": list(self.residual),
            "coefficients": [[round(value, 6) for value in row] for row in self.coefficients.tolist()],
        }
        path.write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ProxyError: If the file is missing, truncated or made for other elemental properties.
        """
        try:
            content = json.loads(path.read_text())
            if tuple(content["properties"]) != PROPERTIES:
                raise ProxyError(f"{path} was fitted on other elemental properties; fit it again")
            coefficients = torch.tensor(content["coefficients"], dtype=torch.float64)
            return cls(coefficients, (content["residual"][0], content["residual"][1]), int(content["n_curves"]))
        except (OSError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ProxyError(f"{path} is no equation of state ({error}); fit it again") from error


def _design(crystals: CrystalBatch) -> Tensor:
    """Return (n, n_features + 1) float64 composition statistics and a column of ones."""
    table = torch.from_numpy(element_properties())
    fractions = crystals.counts.float() / crystals.n_atoms[:, None]
    statistics = composition_statistics(table[crystals.elements], fractions).double()
    return torch.cat([statistics, torch.ones(len(crystals), 1, dtype=torch.float64)], dim=-1)
