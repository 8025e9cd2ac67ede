"""Noise is paired with the nearest description of the same crystal."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from scipy.optimize import linear_sum_assignment

from discover.structure.orbits import to_structures
from discover.structure.torus import _exchange, nearest_equivalent, wrap
from envs.wyckoff_operations import free_mask
from tests.discover.structure.examples import textbook


@given(st.floats(-20.0, 20.0))
def test_wrapped_differences_are_the_shortest_ones(difference: float) -> None:
    wrapped = float(wrap(torch.tensor(difference, dtype=torch.float64)))
    assert -0.5 <= wrapped < 0.5
    assert abs((difference - wrapped) - round(difference - wrapped)) < 1e-9


def test_the_partner_is_the_same_crystal_and_no_farther() -> None:
    crystals, parameters = textbook()
    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.5)
    free = free_mask(crystals.space_group, crystals.letters)
    generator = torch.Generator().manual_seed(3)
    gains = []
    for _ in range(8):
        start = torch.rand(parameters.shape, generator=generator, dtype=torch.float64) * free
        partner = nearest_equivalent(crystals.space_group, crystals.elements, crystals.letters, parameters, start)
        assert (partner[~free] == 0).all()
        pairs = zip(to_structures(crystals, parameters), to_structures(crystals, partner), strict=True)
        assert all(matcher.fit(*pair) for pair in pairs)
        gains.append(wrap(parameters - start).square().sum() - wrap(partner - start).square().sum())
    assert min(gains) >= -1e-9
    assert sum(gains) > 1.0


def test_a_start_at_an_equivalent_description_is_reached_exactly() -> None:
    crystals, parameters = textbook()
    # -x for rutile's oxygen, and the two oxygens of baddeleyite in each other's columns.
    start = parameters.clone()
    start[0, 1, 0] = 1.0 - start[0, 1, 0]
    start[4, 1], start[4, 2] = parameters[4, 2], parameters[4, 1]
    partner = nearest_equivalent(crystals.space_group, crystals.elements, crystals.letters, parameters, start)
    assert wrap(partner - start)[[0, 4]].abs().max() < 1e-9


def test_the_origin_is_free_along_polar_axes_only() -> None:
    crystals, parameters = textbook()
    start = parameters.clone()
    start[5, :2, 2] = (start[5, :2, 2] + 0.21) % 1.0  # wurtzite: along c
    partner = nearest_equivalent(crystals.space_group, crystals.elements, crystals.letters, parameters, start)
    assert wrap(partner - start)[5].abs().max() < 1e-6


def test_exchanges_find_nearly_the_best_assignment() -> None:
    cost = torch.rand(200, 5, 5, generator=torch.Generator().manual_seed(0))
    found = cost.gather(2, _exchange(cost)[:, :, None])[..., 0].sum(dim=1).numpy()
    best = np.array([table[linear_sum_assignment(table)].sum() for table in cost.numpy()])
    assert (found >= best - 1e-6).all()
    assert found.mean() < 1.1 * best.mean()
    assert (found < best + 1e-6).mean() > 0.6
