"""The record of finished crystals that environments, proxies, policies and `discover` exchange.

A crystal is what can be chosen before any coordinate is: space group, elements on Wyckoff letters, lattice.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from pymatgen.core import Composition, Element
from torch import Tensor

MAX_ATOMIC_NUMBER = 118
LETTERS = "abcdefghijklmnopqrstuvwxyzA"  # group 47 needs 27; "A" is the 27th, as in PyXtal

_BASE_CENTRED = (5, 8, 9, 12, 15, 20, 21, 35, 36, 37, 38, 39, 40, 41, *range(63, 69))
_BODY_CENTRED = (
    *(23, 24, 44, 45, 46, 71, 72, 73, 74, 79, 80, 82, 87, 88, 97, 98, 107, 108, 109, 110, 119, 120, 121, 122),
    *(139, 140, 141, 142, 197, 199, 204, 206, 211, 214, 217, 220, 229, 230),
)
_FACE_CENTRED = (22, 42, 43, 69, 70, 196, 202, 203, 209, 210, 216, 219, 225, 226, 227, 228)
_RHOMBOHEDRAL = (146, 148, 155, 160, 161, 166, 167)


def _centring_table() -> Tensor:
    """Return (231,) lattice points per conventional cell; R groups in hexagonal axes; row 0 is unused."""
    table = torch.ones(231, dtype=torch.int64)
    table[list(_BASE_CENTRED + _BODY_CENTRED)] = 2
    table[list(_RHOMBOHEDRAL)] = 3
    table[list(_FACE_CENTRED)] = 4
    return table


_CENTRING = _centring_table()


class CrystalError(ValueError):
    """A batch of crystals whose tensors do not fit together."""


class LatticeError(ValueError):
    """Cell lengths and angles that do not close a cell."""


def cell_volume(lattice_parameters: Tensor) -> Tensor:
    """Return the volume of each cell.

    Args:
        lattice_parameters: (n, 6) a, b, c in Å and alpha, beta, gamma in degrees.

    Returns:
        (n,) volume in Å³.

    Raises:
        LatticeError: If three angles do not close a cell; the message gives the first rows.
    """
    cosines = torch.cos(lattice_parameters[:, 3:] * (math.pi / 180.0))
    squared = 1.0 + 2.0 * cosines.prod(dim=-1) - (cosines**2).sum(dim=-1)
    lengths = lattice_parameters[:, :3]
    broken = ~((squared > 0) & (lengths > 0).all(dim=-1))
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        raise LatticeError(
            f"{len(rows)} cells do not close (lengths must be > 0 Å and the angles compatible), first rows {rows[:5]}: "
            f"{lattice_parameters[rows[0]].tolist()}"
        )
    return lengths.prod(dim=-1) * squared.sqrt()


@dataclass(frozen=True)
class CrystalBatch:
    """Crystals without coordinates, one row each, padded to the widest.

    With letters, one column is one orbit. Without letters (`letters` all -1), one column is one element with all its
    atoms. Columns of a row that hold no atoms have element 0, letter -1 and count 0.
    """

    space_group: Tensor  # (n,) int64, 1-230
    elements: Tensor  # (n, max_orbits) int64 atomic number, 0 = padding
    letters: Tensor  # (n, max_orbits) int64 index of the Wyckoff letter (0 = "a"), -1 = not chosen, or padding
    counts: Tensor  # (n, max_orbits) int64 atoms of this orbit per primitive cell, 0 = padding
    lattice_parameters: Tensor  # (n, 6) float64 a, b, c in Å, alpha, beta, gamma in degrees, conventional cell

    def __post_init__(self) -> None:
        """Check that shapes agree.

        Raises:
            CrystalError: If they do not; the message names the tensor.
        """
        shape = self.elements.shape
        n = self.space_group.shape[0]
        expected = {
            "space_group": (self.space_group, (n,)),
            "elements": (self.elements, (n, *shape[1:2])),
            "letters": (self.letters, tuple(shape)),
            "counts": (self.counts, tuple(shape)),
            "lattice_parameters": (self.lattice_parameters, (n, 6)),
        }
        for name, (tensor, wanted) in expected.items():
            if tuple(tensor.shape) != wanted:
                raise CrystalError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")

    def __len__(self) -> int:
        """Return the number of crystals."""
        return int(self.space_group.shape[0])

    @property
    def n(self) -> int:
        """Number of crystals."""
        return len(self)

    @property
    def n_atoms(self) -> Tensor:
        """(n,) int64 atoms per primitive cell."""
        return self.counts.sum(dim=-1)

    @property
    def centring(self) -> Tensor:
        """(n,) int64 primitive cells per conventional cell: 1, 2, 3 (R groups) or 4."""
        return _CENTRING.to(self.space_group.device)[self.space_group]

    @property
    def volume(self) -> Tensor:
        """(n,) float64 volume of the conventional cell in Å³."""
        return cell_volume(self.lattice_parameters)

    @property
    def volume_per_atom(self) -> Tensor:
        """(n,) float64 volume per atom in Å³."""
        return self.volume / (self.n_atoms * self.centring)

    @property
    def composition(self) -> Tensor:
        """(n, 119) int64 atoms of each atomic number per primitive cell; column 0 is always 0."""
        table = torch.zeros(len(self), MAX_ATOMIC_NUMBER + 1, dtype=torch.int64, device=self.elements.device)
        return table.scatter_add_(1, self.elements, self.counts)

    def select(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """Return the crystals at `rows` (indices, a bool mask or a slice), in that order."""
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(rows)
        if isinstance(index, Tensor) and index.dtype is not torch.bool:
            index = index.long()  # of an empty sequence torch does not know what it holds
        return type(self)(
            self.space_group[index],
            self.elements[index],
            self.letters[index],
            self.counts[index],
            self.lattice_parameters[index],
        )

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """Return all crystals of several batches as one, padded to the widest.

        Raises:
            CrystalError: If there is no batch.
        """
        if not batches:
            raise CrystalError("cat needs at least one batch, got none")
        width = max(batch.elements.shape[1] for batch in batches)
        return cls(
            torch.cat([batch.space_group for batch in batches]),
            torch.cat([_pad(batch.elements, width, 0) for batch in batches]),
            torch.cat([_pad(batch.letters, width, -1) for batch in batches]),
            torch.cat([_pad(batch.counts, width, 0) for batch in batches]),
            torch.cat([batch.lattice_parameters for batch in batches]),
        )

    def without_letters(self) -> Self:
        """Return the same crystals with the orbits of each element merged and no letters.

        Elements keep the order in which they first appear.
        """
        width = self.elements.shape[1]
        same = self.elements[:, :, None] == self.elements[:, None, :]
        first = same.to(torch.int8).argmax(dim=-1)  # first column that holds the same element
        counts = torch.zeros_like(self.counts).scatter_add_(1, first, self.counts)
        keep_order = (counts == 0).to(torch.int8).argsort(dim=-1, stable=True)
        counts = counts.gather(1, keep_order)
        elements = self.elements.gather(1, keep_order).masked_fill(counts == 0, 0)
        used = max(int((counts > 0).sum(dim=-1).max()) if len(self) else width, 1)
        counts, elements = counts[:, :used], elements[:, :used]
        return type(self)(
            self.space_group, elements, torch.full_like(elements, -1), counts, self.lattice_parameters.clone()
        )

    def formulas(self) -> list[str]:
        """Return the reduced formula of each crystal as pymatgen writes it, such as "TiO2"."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns that helium and neon have no electronegativity
            return [Composition(amounts).reduced_formula for amounts in self._amounts()]

    def chemical_systems(self) -> list[str]:
        """Return the elements of each crystal in alphabetical order, such as "O-Ti"."""
        return ["-".join(sorted(amounts)) for amounts in self._amounts()]

    def wyckoff_strings(self) -> list[str]:
        """Return the occupied positions of each crystal, such as "Na:4a Cl:4b".

        The number is the multiplicity in the conventional cell. A crystal without letters gives "".
        """
        rows = zip(
            self.elements.tolist(), self.letters.tolist(), self.counts.tolist(), self.centring.tolist(), strict=True
        )
        strings = []
        for elements, letters, counts, centring in rows:
            orbits = [
                f"{Element.from_Z(element).symbol}:{count * centring}{LETTERS[letter]}"
                for element, letter, count in zip(elements, letters, counts, strict=True)
                if count > 0 and letter >= 0
            ]
            strings.append(" ".join(orbits))
        return strings

    def to(self, device: torch.device | str) -> Self:
        """Return the crystals on `device`."""
        return type(self)(
            self.space_group.to(device),
            self.elements.to(device),
            self.letters.to(device),
            self.counts.to(device),
            self.lattice_parameters.to(device),
        )

    def _amounts(self) -> list[dict[str, int]]:
        """Return one {symbol: atoms per primitive cell} per crystal."""
        amounts: list[dict[str, int]] = []
        for elements, counts in zip(self.elements.tolist(), self.counts.tolist(), strict=True):
            row: dict[str, int] = {}
            for element, count in zip(elements, counts, strict=True):
                if count > 0:
                    symbol = Element.from_Z(element).symbol
                    row[symbol] = row.get(symbol, 0) + count
            amounts.append(row)
        return amounts


def _pad(columns: Tensor, width: int, value: int) -> Tensor:
    """Return (n, width) `columns` with `value` appended on the right."""
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]), value=value)
