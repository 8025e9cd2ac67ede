"""Oracles: what tells how good a crystal is, by an interatomic potential, a model, a user's own code, or people.

An `Oracle` labels one structure at a time and travels to worker processes with its settings (`discover.engine`). Every
attempt is a `Label`, a failed one with its reason. `relax` and `hull` are the energies underneath.
"""

from discover.oracle.base import Label, LabelStatus, Oracle

__all__ = ["Label", "LabelStatus", "Oracle"]
