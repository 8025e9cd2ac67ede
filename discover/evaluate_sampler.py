"""Figures of a trained sampler beside those of the same space before training, at equal sample counts."""

import math
from typing import Any

import numpy as np
import torch

from discover.build import Parts, seeded
from discover.candidates import Column, candidate_table
from discover.config import EvaluateConfig, RunConfig, SampleConfig
from discover.report import wanted_property
from discover.sample import WeightedSample, draw_weighted, load_run
from discover.validity import check_crystals, element_symbols
from envs import lattice
from envs.crystal import CrystalBatch
from envs.lattice import VOLUME
from envs.reference_volume import log_reference_volume
from envs.symmetry import SYMMETRY
from policies.policy import CrystalPolicy, PolicyConfig

_EDGE = 0.02  # share of the volume box that counts as its edge
Figures = dict[str, Any]


def evaluate_sampler(config: EvaluateConfig) -> Figures:
    """Sample a trained run and its untrained start, check every crystal independently, and return the figures.

    The untrained start is the shipped prior under the run's masks, or a fresh policy where the prior does not apply.
    """
    if config.run is None:
        raise ValueError("task=sampler needs a run")  # checked by EvaluateConfig already
    _, run_config, parts = load_run(config.run, SampleConfig(run=config.run, n=config.n, seed=config.seed))
    trained = draw_weighted(parts, config.n, seeded(config.seed, "evaluate trained"))
    untrained_parts = _untrained(run_config, parts)
    untrained = draw_weighted(untrained_parts, config.n, seeded(config.seed, "evaluate untrained"))
    return {
        "reward": run_config.reward,
        "env": run_config.env,
        "n": config.n,
        "trained": sample_figures(run_config, parts, trained),
        "untrained": sample_figures(run_config, untrained_parts, untrained),
    }


def sample_figures(config: RunConfig, parts: Parts, sample: WeightedSample) -> Figures:
    """Return validity, target, diversity and plausibility of a sample.

    Every share is over all crystals drawn, but that of SMACT over those that it decided on.
    """
    crystals = sample.crystals
    predictions = parts.properties.predict(crystals)
    log_reward = parts.reward.from_predictions(crystals, predictions)
    table, ranked = candidate_table(crystals, predictions, log_reward, sample.log_prob, distinct=False)
    ionic = config.chemistry == "ionic"
    validity = check_crystals(ranked, ionic=ionic, mixed_valence=config.mixed_valence)
    decided = validity.smact_decided
    volume = table[Column.VOLUME_PER_ATOM]
    energy = table[Column.FORMATION_ENERGY]
    wanted = wanted_property(config)
    score = table[Column.OXIDATION_SCORE].fillna(-30.0)
    return {
        "valid_smact": float(validity.smact[decided].mean()) if ionic and decided.any() else None,
        "undecided_by_smact": float(1.0 - decided.mean()),
        "valid_wyckoff": float(validity.wyckoff.mean()),
        "valid_lattice": float(validity.lattice.mean()),
        "valid": float(validity.all.mean()),
        "volume_5_to_60": float(volume.between(5.0, 60.0).mean()),
        "volume_box_edge": volume_edge_share(parts, ranked),
        "on_target": None if wanted.target is None else wanted.on_target(table),
        "median_log_reward": float(table[Column.LOG_REWARD].median()),
        "median_formation_energy_per_atom": float(energy.median()),
        "formation_energy_5th_to_95th": [float(energy.quantile(0.05)), float(energy.quantile(0.95))],
        "share_formation_energy_below_minus_2": float((energy < -2.0).mean()),
        "mean_p_metastable": float(table[Column.P_METASTABLE].mean()),
        "mean_oxidation_score": float(score.mean()),
        "share_oxidation_score_above_minus_5": float((score > -5.0).mean()),
        "formulas": int(table[Column.FORMULA].nunique()),
        "chemical_systems": len(set(ranked.chemical_systems())),
        "space_groups": int(table[Column.SPACE_GROUP].nunique()),
        "space_groups_allowed": int(parts.env.group_mask.sum()),
        "elements": len(element_symbols(ranked)),
        "effective_sample_share": sample.effective_share,
        "log_Z": _log_mean_exp(sample.log_weight),
    }


def volume_edge_share(parts: Parts, crystals: CrystalBatch) -> float:
    """Return the share of crystals whose v lies within 2 % of an end of the box of physical volumes."""
    group = crystals.space_group - 1
    counts = crystals.composition * SYMMETRY.centring[group][:, None]
    reference = log_reference_volume(counts, torch.arange(counts.shape[1]))
    v = lattice.coordinates(crystals.lattice_parameters, reference)[:, VOLUME].numpy()
    low, high = (math.log(factor) for factor in parts.env.space.box.volume_factor)
    share = (v - low) / (high - low)
    return float(((share < _EDGE) | (share > 1.0 - _EDGE)).mean())


def _untrained(config: RunConfig, parts: Parts) -> Parts:
    if parts.prior is not None:
        policy = parts.prior.policy
    else:
        torch.manual_seed(config.seed)
        policy = CrystalPolicy(PolicyConfig.for_env(parts.env, width=config.train.width, depth=config.train.depth))
    return Parts(parts.env, policy, parts.target, parts.properties, parts.reward, parts.prior, parts.generator)


def _log_mean_exp(log_weight: torch.Tensor) -> float:
    return float(torch.logsumexp(log_weight, 0)) - float(np.log(len(log_weight)))
