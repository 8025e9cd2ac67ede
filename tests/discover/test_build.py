"""What commands are given to build structures with."""

from dataclasses import replace

import pytest
import torch

from discover.build import careful_generator
from discover.oracle.relax import single_point_energies
from discover.structure.flow_matching import FlowMatching
from discover.structure.orbits import to_structures
from discover.structure.random_baseline import RandomCoordinates
from tests.discover.structure.examples import ALL, RUTILE, textbook


def test_chgnet_keeps_the_draw_of_lowest_energy() -> None:
    crystals, _ = textbook((RUTILE, ALL[3]))
    generator = careful_generator(n_draws=3, pick="chgnet")
    assert isinstance(generator, FlowMatching)
    drawn = crystals.select([0, 0, 0, 1, 1, 1])
    draws = generator.draw(drawn, torch.Generator().manual_seed(0))
    every = single_point_energies(to_structures(replace(drawn, lattice_parameters=draws.cell), draws.parameters))
    kept = single_point_energies(generator.generate(crystals, torch.Generator().manual_seed(0)))
    assert kept.tolist() == pytest.approx(every.reshape(2, 3).min(axis=1).tolist(), abs=1e-6)
    assert every.reshape(2, 3).std(axis=1).max() > 1e-3


def test_random_coordinates_have_no_draws_to_pick_from() -> None:
    assert isinstance(careful_generator("random", pick="chgnet"), RandomCoordinates)
