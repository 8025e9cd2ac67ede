"""Textbook structures, as pymatgen builds them from space group and coordinates."""

from pymatgen.core import Lattice, Structure


def rock_salt() -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile() -> Structure:
    lattice = Lattice.tetragonal(4.594, 2.959)
    return Structure.from_spacegroup("P4_2/mnm", lattice, ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]])


def perovskite() -> Structure:
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(3.905), ["Sr", "Ti", "O"], coords)


def diamond() -> Structure:
    return Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.431), ["Si"], [[0, 0, 0]])


def wurtzite() -> Structure:
    coords = [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
    return Structure.from_spacegroup("P6_3mc", Lattice.hexagonal(3.25, 5.207), ["Zn", "O"], coords)


def corundum() -> Structure:
    coords = [[0, 0, 0.3522], [0.3063, 0, 0.25]]
    return Structure.from_spacegroup("R-3c", Lattice.hexagonal(4.76, 12.99), ["Al", "O"], coords)


def spinel() -> Structure:
    coords = [[0.125, 0.125, 0.125], [0.5, 0.5, 0.5], [0.2624, 0.2624, 0.2624]]
    return Structure.from_spacegroup("Fd-3m:2", Lattice.cubic(8.08), ["Mg", "Al", "O"], coords)
