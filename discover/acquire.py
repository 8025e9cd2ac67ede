"""Which candidates are worth an oracle's time: a score, limits on repetition, and a share for exploration.

Scores that raise the uncertain belong here and nowhere else: the final list is ordered by what the oracle found.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from discover.reward import Reward, non_metal_moments
from envs.crystal import CrystalBatch
from proxies.base import Prediction

Acquisition = Literal["expected", "ucb", "greedy", "random"]
ACQUISITIONS: tuple[Acquisition, ...] = ("expected", "ucb", "greedy", "random")
_SURE = 1e-3  # of the spread is left where a property is taken at its word


def acquisition_scores(
    name: Acquisition,
    reward: Reward,
    crystals: CrystalBatch,
    predictions: Mapping[str, Prediction],
    *,
    kappa: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the (n,) score of each crystal, higher is better.

    Args:
        name: ``expected`` is the log reward, which integrates the uncertainty; ``greedy`` the log reward of the most
            likely values; ``ucb`` the log reward of the best values within `kappa` standard deviations (upper
            confidence bound, Srinivas et al. 2010, arXiv:0912.3995, for rewards of any form); ``random`` is a control.
        reward: What the run is asked for.
        crystals: Candidates.
        predictions: Of every property that the reward needs.
        kappa: Standard deviations, for ``ucb``.
        generator: For ``random``.
    """
    if name == "random":
        return torch.rand(len(crystals), generator=generator, dtype=torch.float64)
    if name == "expected":
        return reward.from_predictions(crystals, predictions)
    best = {prop: taken_at(prediction, 0.0) for prop, prediction in predictions.items()}
    score = reward.from_predictions(crystals, best)
    if name == "greedy":
        return score
    for prop, prediction in predictions.items():  # factors depend on one property each, so one after another will do
        for shift in (-kappa, -kappa / 2, kappa / 2, kappa):
            moved = taken_at(prediction, shift)
            value = reward.from_predictions(crystals, {**best, prop: moved})
            best[prop] = _where(value > score, moved, best[prop])
            score = torch.maximum(score, value)
    return score


def taken_at(prediction: Prediction, shift: float) -> Prediction:
    """Return a prediction that is all but sure of its mean plus `shift` standard deviations.

    A band gap is one of non-metals, and a metal is one where that is more likely than not.
    """
    if prediction.p_metal is None:
        return Prediction(prediction.mean + shift * prediction.std, _SURE * prediction.std)
    mean, std, _ = non_metal_moments(prediction)
    value = (mean + shift * std).clamp_min(0.0)
    p_metal = (prediction.p_metal > 0.5).double()
    share = 1.0 - p_metal
    return Prediction(share * value, (share * (_SURE * std) ** 2 + share * p_metal * value**2).sqrt(), p_metal)


def uncertainty(predictions: Mapping[str, Prediction], names: Sequence[str]) -> Tensor:
    """Return (n,) sum of the standard deviations of some properties, each in units of its median."""
    terms = [predictions[name].std.double() / predictions[name].std.double().median().clamp_min(1e-9) for name in names]
    return torch.stack(terms).sum(dim=0)


def drawn_order(score: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return an (n,) ranking whose first k are k draws without replacement in proportion to exp(score / temperature).

    Gumbel noise is added to the score (Kool et al. 2019, arXiv:1903.06059). At 0 the ranking is the score.
    """
    if temperature == 0:
        return score
    uniform = torch.rand(len(score), generator=generator, dtype=torch.float64)
    return score - temperature * (-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()


class Picker:
    """Takes candidates best first, as far as the limits allow, each once.

    Args:
        names: What each candidate shares with others: for each limit all the names that count, such as its formula or
            its elements. Open to changes.
        limits: Most candidates that share each of these.
        taken: What was taken before of the first, such as the formulas of earlier rounds.
        excluded: Candidates that are not to be taken.
    """

    def __init__(
        self,
        names: Sequence[Sequence[Sequence[str]]],
        limits: Sequence[float],
        *,
        taken: Iterable[str] = (),
        excluded: Iterable[int] = (),
    ) -> None:
        self.names = list(names)
        self.limits = tuple(limits)
        self._counts = [Counter(taken), *(Counter[str]() for _ in self.limits[1:])]
        self._rows = set(excluded)

    def widened(self, factor: int) -> "Picker":
        """Return another picker in the same state, whose limits are `factor` times as wide."""
        other = copy.deepcopy(self)
        other.limits = tuple(factor * limit for limit in self.limits)
        return other

    def exclude(self, rows: Iterable[int]) -> None:
        """Take none of these rows."""
        self._rows.update(rows)

    def lift_limits(self, first: int = 0) -> None:
        """Take from now on with the `first` of the limits only, each candidate still once."""
        self.limits = self.limits[:first]

    def take(self, score: Tensor, n: int) -> list[int]:
        """Return up to `n` rows, the highest of (m,) `score` first."""
        found: list[int] = []
        for row in score.argsort(descending=True, stable=True).tolist():
            if len(found) == n:
                break
            uses = list(zip(self._counts, self.names[row], self.limits, strict=False))
            full = any(counter[name] >= limit for counter, names, limit in uses for name in names)
            if full or row in self._rows:
                continue
            for counter, names, _ in uses:
                counter.update(names)
            self._rows.add(row)
            found.append(row)
        return found


def _where(condition: Tensor, first: Prediction, second: Prediction) -> Prediction:
    p_metal = None
    if first.p_metal is not None and second.p_metal is not None:
        p_metal = torch.where(condition, first.p_metal, second.p_metal)
    return Prediction(
        torch.where(condition, first.mean, second.mean), torch.where(condition, first.std, second.std), p_metal
    )
