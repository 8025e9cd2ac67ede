"""Inputs of the networks: they see size and symmetry, and not the way a crystal is written down."""

import torch
from torch.testing import assert_close

from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY
from proxies.augment import AugmentConfig, draw_strain, drop_letters, random_alternative
from proxies.elements import LAST_KNOWN, PROPERTIES, element_properties
from proxies.features import N_SLOTS, composition_statistics, featurise, n_crystal_features, position_table
from tests.proxies.textbook import random_crystals, textbook

PROPERTY_TABLE = torch.from_numpy(element_properties())
LOG_VOLUMES = torch.full((119,), 2.7)


def test_element_properties_are_standardised_and_complete() -> None:
    table = element_properties()
    assert table.shape == (119, len(PROPERTIES))
    known = table[1 : LAST_KNOWN + 1]
    assert abs(known.mean(axis=0)).max() < 0.2  # missing values are filled with 0 after standardising
    order = PROPERTIES.index("electronegativity")
    assert table[9, order] == known[:, order].max()  # fluorine
    assert (table[0] == 0).all()


def test_statistics_of_a_composition() -> None:
    values = torch.tensor([[[1.0], [4.0], [0.0]]])
    fractions = torch.tensor([[0.25, 0.75, 0.0]])
    assert composition_statistics(values, fractions)[0].tolist() == [3.25, 1.125, 4.0, 1.0]


def test_fractions_sum_to_one_and_the_crystal_vector_has_its_length() -> None:
    features = featurise(random_crystals(20), PROPERTY_TABLE, LOG_VOLUMES)
    assert_close(features.fractions.sum(1), torch.ones(20))
    assert features.crystal.shape == (20, n_crystal_features(len(PROPERTIES)))
    assert features.crystal.dtype == torch.float32


def test_position_table_tells_positions_of_a_group_apart() -> None:
    table = position_table().reshape(231, N_SLOTS, -1)
    rock_salt = table[225]
    assert not torch.equal(rock_salt[1], rock_salt[3])  # 4a (m-3m) and 8c (-43m)
    assert torch.equal(rock_salt[1], rock_salt[2])  # 4a and 4b differ only by the origin


def test_a_random_alternative_keeps_composition_multiplicity_and_volume() -> None:
    crystals = random_crystals(300)
    generator = torch.Generator().manual_seed(0)
    other = random_alternative(crystals, generator)
    assert torch.equal(other.counts, crystals.counts)
    assert (other.letters != crystals.letters).any()
    assert_close(other.volume, crystals.volume)
    first = featurise(crystals, PROPERTY_TABLE, LOG_VOLUMES)
    facts = position_table()
    second = featurise(other, PROPERTY_TABLE, LOG_VOLUMES)
    occupied = crystals.counts > 0
    start = len(SYMMETRY.site_symmetry_names)  # site symmetries themselves turn with the axes
    dof_and_multiplicity = slice(start, start + 7)
    assert torch.equal(
        facts[first.positions][occupied][:, dof_and_multiplicity],
        facts[second.positions][occupied][:, dof_and_multiplicity],
    )


def test_rock_salt_may_swap_its_sites() -> None:
    crystals = CrystalBatch.cat([textbook("NaCl")] * 64)
    letters = random_alternative(crystals, torch.Generator().manual_seed(0)).letters
    assert {tuple(row) for row in letters.tolist()} == {(0, 1), (1, 0)}


def test_dropped_letters_merge_orbits_of_the_chosen_rows_only() -> None:
    crystals = textbook("TiO2", "Al2O3")
    dropped = drop_letters(crystals, torch.tensor([True, False]))
    assert dropped.letters.tolist()[0] == [-1, -1]
    assert dropped.letters[1].tolist() == crystals.letters[1].tolist()
    assert torch.equal(dropped.composition, crystals.composition)


def test_strain_is_drawn_in_the_stated_shares_and_spares_cells_that_are_not_relaxed() -> None:
    config = AugmentConfig()
    n = 40_000
    relaxed, stretchable = torch.arange(n) % 2 == 0, torch.ones(n, dtype=torch.bool)
    volume, shape = draw_strain(relaxed, stretchable, config, torch.Generator().manual_seed(0))
    assert (volume[~relaxed] == 0).all()
    assert (shape[~relaxed] == 0).all()
    share = (volume[relaxed] != 0).double().mean().item()
    expected = config.small_volume + config.medium_volume + config.far_volume
    assert abs(share - expected) < 0.015  # 20,000 rows: four standard errors
    assert abs((shape[relaxed] != 0).double().mean().item() - config.far_shape) < 0.005
    assert volume.abs().max() > 2.0
