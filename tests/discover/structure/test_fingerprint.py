"""Fingerprints count neighbours, do not see the setting or the volume, and tell prototypes apart."""

import torch

from discover.structure.fingerprint import N_BINS, fingerprints, match_probability, pairwise_distances
from envs.crystal import CrystalBatch
from envs.equivalence import image
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import transform_parameters
from tests.discover.structure.examples import BADDELEYITE, QUARTZ, ROCK_SALT, RUTILE, textbook

TWO_KINDS = (RUTILE, QUARTZ, ROCK_SALT, BADDELEYITE)


def kinds(crystals: CrystalBatch) -> torch.Tensor:
    """The element of the first orbit is kind 0, the other kind 1."""
    return (crystals.elements != crystals.elements[:, :1]).long()


def test_neighbours_of_rock_salt_are_counted() -> None:
    crystals, parameters = textbook((ROCK_SALT,))
    (found,) = fingerprints(crystals, parameters, kinds(crystals), 2)
    # Lengths in units of (volume per atom)^(1/3) = a / 2: 6 unlike neighbours at 1, 12 like ones at 1.41, 8 unlike ones
    # at 1.73; each kind has half of the atoms. Smearing (0.2) leaves 0.2 % of a shell beyond three of its widths.
    at_1_2 = 7  # radii start at 0.5 in steps of 0.1
    assert found.shape == (2, 2, N_BINS)
    torch.testing.assert_close(found[0, 1, at_1_2], torch.tensor(0.5 * 6 * 0.841 + 0.5 * 8 * 0.004), atol=0.01, rtol=0)
    torch.testing.assert_close(found[0, 0, at_1_2], torch.tensor(0.5 * 12 * 0.142), atol=0.01, rtol=0)
    torch.testing.assert_close(found[0], found.flip(0, 1)[0])


def test_equivalent_settings_have_the_same_fingerprint() -> None:
    crystals, parameters = textbook(TWO_KINDS)
    expected = fingerprints(crystals, parameters, kinds(crystals), 2)
    n_alternatives = SYMMETRY.n_alternatives[crystals.space_group - 1]
    assert int(n_alternatives.min()) > 1
    for alternative in (n_alternatives - 1, n_alternatives // 2):
        moved = transform_parameters(crystals.space_group, crystals.letters, parameters, alternative)
        other = image(crystals, alternative)
        torch.testing.assert_close(fingerprints(other, moved, kinds(other), 2), expected)


def test_volume_does_not_matter_and_kinds_do() -> None:
    crystals, parameters = textbook(TWO_KINDS)
    cells = crystals.lattice_parameters.clone()
    cells[:, :3] *= 1.3
    larger = CrystalBatch(crystals.space_group, crystals.elements, crystals.letters, crystals.counts, cells)
    slots = kinds(crystals)
    expected = fingerprints(crystals, parameters, slots, 2)
    torch.testing.assert_close(fingerprints(larger, parameters, slots, 2), expected)
    torch.testing.assert_close(fingerprints(crystals, parameters, 1 - slots, 2), expected.flip(1, 2))


def test_a_small_change_is_nearer_than_another_prototype() -> None:
    crystals, parameters = textbook((RUTILE, RUTILE, QUARTZ))
    parameters[1, 1, 0] += 0.01
    found = fingerprints(crystals, parameters, kinds(crystals), 2)
    distances = pairwise_distances(found, found)
    assert distances.diagonal().eq(0).all()
    assert 0 < distances[0, 1] < 0.3 < distances[0, 2]
    probability = match_probability(distances[0], torch.tensor([True, True, False]))
    assert probability[1] > 0.95
    assert probability[2] < 0.5


def test_no_crystal_gives_no_fingerprint() -> None:
    crystals, parameters = textbook((RUTILE,))
    none = crystals.select([])
    assert fingerprints(none, parameters[:0], kinds(crystals)[:0], 2).shape == (0, 2, 2, N_BINS)
