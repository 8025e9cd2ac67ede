"""From a crystal without coordinates to a full structure: one interface, generators behind it."""

from discover.structure.base import StructureError, StructureGenerator, cif_text
from discover.structure.random_baseline import RandomCoordinates

__all__ = ["RandomCoordinates", "StructureError", "StructureGenerator", "cif_text"]
