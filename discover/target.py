"""What the sampler is asked to draw in proportion to: reward, prior and reference measure in one log-density."""

from dataclasses import dataclass

import torch
from torch import Tensor

from discover.reward import Reward
from envs import lattice
from envs.crystal import CrystalBatch
from envs.equivalence import log_n_images
from envs.lattice import Box
from envs.symmetry import SYMMETRY
from policies.pretrained import Prior


@dataclass(frozen=True)
class Terms:
    """The parts of log R of each crystal, each (n,) float64."""

    log_reward: Tensor
    log_prior: Tensor  # 0 where the prior has no part in the target
    log_measure: Tensor  # 0 for the uniform measure
    log_images: Tensor  # log of the number of equivalent letter assignments

    def select(self, rows: Tensor) -> "Terms":
        """Return some rows."""
        return Terms(self.log_reward[rows], self.log_prior[rows], self.log_measure[rows], self.log_images[rows])


@dataclass(frozen=True)
class SamplingTarget:
    """log R(x) = Σ w log r(x) + α log p_prior(x) + log-measure, of one of the equivalent assignments of x to letters.

    They share one R as far as proxies and prior, which learned from random ones, give each the same: over equivalents
    of 600 draws of the shipped prior its log p spreads by 0.14 in the median, by more than 0.5 for 24 %.

    Attributes:
        reward: The weighted product of factors.
        prior: Needed where ``alpha`` > 0.
        alpha: Exponent of the prior; 0 is the published Crystal-GFN setting.
        lengths_angles: Measure volumes by lengths and angles, as published, not by the lattice coordinates.
        box: Box of the environment.
    """

    reward: Reward
    prior: Prior | None
    alpha: float
    lengths_angles: bool
    box: Box

    def terms(self, crystals: CrystalBatch) -> Terms:
        """Return the parts of log R of each crystal."""
        nothing = torch.zeros(len(crystals), dtype=torch.float64)
        log_prior, log_measure = nothing, nothing
        if self.prior is not None and self.alpha > 0:
            log_prior = self.prior.log_prob(crystals)
        if self.lengths_angles:
            system = SYMMETRY.lattice_system[crystals.space_group - 1]
            log_measure = lattice.log_jacobian(crystals.lattice_parameters, system, self.box)
        return Terms(self.reward.log_reward(crystals), log_prior, log_measure, log_n_images(crystals, self.box))

    def log_target(self, terms: Terms, sharpness: float = 1.0) -> Tensor:
        """Return (n,) log R; ``sharpness`` in (0, 1] is the exponent of the reward while training warms up."""
        return sharpness * terms.log_reward + self.alpha * terms.log_prior + terms.log_measure
