"""Energies of CHGNet that physics rules out, so that a loop that learns does not chase them.

A loop that looks for low energies finds the structures on which a potential is wrong. Each rule has a reason and was
held against known materials: none of 1,500 Materials Project compounds within 0.08 eV/atom of the hull breaks one.
What is only far below the hull breaks none: often the hull file lacks the competing phases (the PF5 in NiP2F11).
"""

import math

import numpy as np
from ase.data import covalent_radii
from pymatgen.core import Composition, Structure

#: CHGNet's mean absolute error is 0.29 eV/atom on known compounds of plutonium, which it was trained on, and at most
#: 0.07 eV/atom on those of any other element (12 rows of each, as given).
UNSUITABLE_ELEMENTS = frozenset({"Pu"})

#: eV/atom. Of 102,000 entries of the Materials Project the lowest are La2Th8O19 (-4.60), ThF4 and LaF3 (-4.50); none
#: is known to experiment that is lower.
LOWEST_FORMATION_ENERGY = -4.8

#: Shortest distance over the sum of covalent radii (Cordero et al. 2008, doi:10.1039/b801115j). The lowest of known
#: compounds is 0.68 (the uranyl bond); closer than 0.5 CHGNet has seen nothing and gives any number.
CLOSEST_CONTACT = 0.5

#: Nearest neighbour over the sum of covalent radii. The farthest of known compounds is 1.48 (TlAsF6). An atom beyond
#: is an isolated one, and CHGNet's energy of it is no energy of a solid. Noble gases are farther in their own crystals.
FARTHEST_NEIGHBOUR = 1.75

#: Å, below which two halogens are a molecule (F2: 1.42, Cl2: 1.99). No known compound contains one: among 400 rows each
#: the closest F-F is 1.73 (F3- in RbF3), the closest Cl-Cl above 2.9. The MP2020 correction of an anion (F 0.46,
#: Cl 0.61 eV), which CHGNet's energies contain, is then given to an atom that is none. I-I bonds are in 5 % of iodides.
HALOGEN_MOLECULES = {"F": 1.65, "Cl": 2.4}

_NOBLE_GASES = frozenset({2, 10, 18, 36, 54, 86})
_REACH = 6.0  # Å; CHGNet sees no farther


def unsuitable_elements(composition: Composition) -> str:
    """Return why CHGNet has no energy for these elements, "" if it has."""
    found = sorted({element.symbol for element in composition.elements} & UNSUITABLE_ELEMENTS)
    return f"CHGNet is off by 0.3 eV/atom for compounds of {', '.join(found)}" if found else ""


def why_implausible(structure: Structure, formation_energy: float) -> str:
    """Return why CHGNet's energy of a relaxed structure is not to be believed, "" if nothing speaks against it.

    Args:
        structure: Ordered.
        formation_energy: eV/atom on the MP2020 scale, NaN if unknown.
    """
    if math.isfinite(formation_energy) and formation_energy < LOWEST_FORMATION_ENERGY:
        return (
            f"formation energy {formation_energy:.2f} eV/atom; no known compound is below {LOWEST_FORMATION_ENERGY:g}"
        )
    return _odd_contacts(structure)


def _odd_contacts(structure: Structure) -> str:
    """Return what is wrong with the distances, "" if nothing is."""
    numbers = np.array([site.specie.Z for site in structure])
    centres, neighbours, _, distances = structure.get_neighbor_list(_REACH)
    ratios = distances / (covalent_radii[numbers[centres]] + covalent_radii[numbers[neighbours]])
    nearest = np.full(len(numbers), np.inf)
    np.minimum.at(nearest, centres, ratios)
    symbols = [site.specie.symbol for site in structure]
    closest = int(nearest.argmin())
    if nearest[closest] < CLOSEST_CONTACT:
        return f"{symbols[closest]} is {nearest[closest]:.2f} times the sum of radii from its neighbour"
    solid = ~np.isin(numbers, list(_NOBLE_GASES))
    if (solid & (nearest > FARTHEST_NEIGHBOUR)).any():
        alone = int(np.flatnonzero(solid & (nearest > FARTHEST_NEIGHBOUR))[0])
        return f"{symbols[alone]} has no neighbour within {FARTHEST_NEIGHBOUR:g} times the sum of radii"
    if len(set(symbols)) > 1:
        for centre, neighbour, distance in zip(centres, neighbours, distances, strict=True):
            if symbols[centre] == symbols[neighbour] and distance < HALOGEN_MOLECULES.get(symbols[centre], 0.0):
                halogen = symbols[centre]
                return f"{halogen}-{halogen} bond: {halogen}2, which MP2020 corrects as if it were an anion"
    return ""
