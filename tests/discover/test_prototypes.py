from dataclasses import replace

import torch

from discover.prototypes import prototype_keys
from envs.equivalence import image
from tests.discover.crystals import CRYSTALS, crystal_batch


def test_textbook_prototypes_differ_and_relabelled_rock_salt_does_not() -> None:
    names = list(CRYSTALS)
    keys = dict(zip(names, prototype_keys(crystal_batch(names)).tolist(), strict=True))
    assert keys.pop("NaCl shifted") == keys["NaCl"]
    assert len(set(keys.values())) == len(keys)


def test_elements_orbit_order_and_cell_do_not_matter() -> None:
    perovskite = crystal_batch(["SrTiO3"])
    elements = perovskite.elements.clone()
    elements[elements == 38], elements[elements == 8] = 56, 16
    other = replace(perovskite, elements=elements.flip(1), letters=perovskite.letters.flip(1))
    other = replace(other, counts=perovskite.counts.flip(1), lattice_parameters=perovskite.lattice_parameters * 1.1)
    assert prototype_keys(other).equal(prototype_keys(perovskite))


def test_which_orbits_share_an_element_matters() -> None:
    zirconia = crystal_batch(["ZrO2"])
    assert zirconia.elements.unique().numel() == 2
    three_elements = replace(zirconia, elements=torch.tensor([[40, 8, 16]]))
    two_of_the_cation = replace(zirconia, elements=torch.tensor([[40, 40, 8]]))
    assert not prototype_keys(three_elements).equal(prototype_keys(zirconia))
    assert prototype_keys(two_of_the_cation).equal(prototype_keys(zirconia))  # all on 4e


def test_every_image_has_the_same_key() -> None:
    for name in ("GaAs", "SrTiO3", "ZrO2", "Al2O3"):
        crystal = crystal_batch([name])
        images = [image(crystal, torch.tensor([alternative])) for alternative in range(2)]
        assert prototype_keys(images[0]).equal(prototype_keys(images[1]))


def test_no_crystals_have_no_keys() -> None:
    assert prototype_keys(crystal_batch(["Fe"]).select([])).shape == (0,)
