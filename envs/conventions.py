"""Names and numbers that every table of the space groups shares."""

from pathlib import Path

TABLES = Path(__file__).parent / "tables"
N_SPACE_GROUPS = 230
LETTERS = "abcdefghijklmnopqrstuvwxyzA"
MAX_LETTERS = len(LETTERS)
GRID = 24  # every translation of every operation is a whole number of 24ths of a cell edge
LATTICE_SYSTEMS = (
    "triclinic",
    "monoclinic",
    "orthorhombic",
    "tetragonal",
    "trigonal",
    "rhombohedral",
    "hexagonal",
    "cubic",
)
#: The five categories of Crystal-GFN (arXiv:2310.04925, section on the space-group subspace).
POINT_SYMMETRIES = ("centrosymmetric", "non-centrosymmetric", "enantiomorphic", "polar", "enantiomorphic-polar")
_CLASSES = (
    ("-1", "2/m", "mmm", "4/m", "4/mmm", "-3", "-3m", "6/m", "6/mmm", "m-3", "m-3m"),
    ("-4", "-42m", "-6", "-62m", "-43m"),
    ("222", "422", "32", "622", "23", "432"),
    ("m", "mm2", "4mm", "3m", "6mm"),
    ("1", "2", "4", "3", "6"),
)
#: The crystal systems a user names; trigonal covers both of its lattice systems.
CRYSTAL_SYSTEMS: dict[str, tuple[int, ...]] = {
    "triclinic": (0,),
    "monoclinic": (1,),
    "orthorhombic": (2,),
    "tetragonal": (3,),
    "trigonal": (4, 5),
    "rhombohedral": (5,),
    "hexagonal": (6,),
    "cubic": (7,),
}


def point_symmetry_of_class(point_group: str) -> int:
    """Return the point symmetry (0-4, order of ``POINT_SYMMETRIES``) of a crystal class such as ``"-3m"``."""
    aliases = {"-6m2": "-62m", "-4m2": "-42m", "312": "32", "321": "32", "m3": "m-3", "m3m": "m-3m"}
    name = aliases.get(point_group, point_group)
    for index, classes in enumerate(_CLASSES):
        if name in classes:
            return index
    raise ValueError(f"unknown crystal class {point_group!r}")
