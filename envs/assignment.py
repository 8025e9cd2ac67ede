"""Wyckoff letters for given compositions: exact masks, one order of writing, equivalents written once.

A composition with a space group is realised by giving every element its orbits. Orbits are written element by element,
in increasing electronegativity, with letters that never decrease within an element. The tables of ``envs.capacity``
and ``envs.wyckoff`` say which letters leave the rest of the composition placeable, so that no walk ends in a dead end.
Crystals that differ by a shift of the origin or an exchange of axes are written in one way, the smallest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from pymatgen.core import Element
from torch import Tensor

from envs.capacity import DEAD, CapacityTable, build_capacity_table
from envs.chemistry import load_elements
from envs.conventions import MAX_LETTERS
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from envs.errors import RepresentationError
from envs.symmetry import SYMMETRY
from envs.wyckoff import LetterTable, build_letter_table, residuals_good

_CHUNK = 4096  # rows handled at once, bounds the memory of (rows, alternatives, orbits)
_LAST = 1 << 20  # sorts padding behind every orbit
_MAX_COUNT = 512  # atoms of one element for which tables are built


def _building_rank() -> Tensor:
    """Return (119,) int64 place of each atomic number when elements are written; unknown ones come last."""
    known = [element.atomic_number for element in load_elements().values()]
    rest = [number for number in range(1, MAX_ATOMIC_NUMBER + 1) if number not in set(known)]
    rank = torch.full((MAX_ATOMIC_NUMBER + 1,), _LAST)
    rank[torch.tensor(known + rest)] = torch.arange(MAX_ATOMIC_NUMBER)
    return rank


BUILDING_RANK = _building_rank()


@dataclass(frozen=True)
class Compositions:
    """The contents of primitive cells, elements in building order, padded on the right."""

    elements: Tensor  # (n, k) int64 atomic numbers, 0 = padding
    counts: Tensor  # (n, k) int64 atoms per primitive cell, 0 = padding

    def __len__(self) -> int:
        """Return the number of compositions."""
        return int(self.elements.shape[0])

    def select(self, rows: Tensor) -> "Compositions":
        """Return the compositions at ``rows``, in that order."""
        return Compositions(self.elements[rows], self.counts[rows])

    def trimmed(self) -> "Compositions":
        """Return the same compositions without columns that are padding in all of them."""
        width = max(int((self.counts > 0).sum(dim=1).max()), 1) if len(self) else 1
        return Compositions(self.elements[:, :width], self.counts[:, :width])

    @classmethod
    def of_amounts(cls, amounts: Sequence[Mapping[str, int]]) -> "Compositions":
        """Return compositions from {symbol: atoms per primitive cell}.

        Raises:
            RepresentationError: If one is empty, or has an unknown symbol or a count that is no positive integer.
        """
        rows = [_parse(i, row) for i, row in enumerate(amounts)]
        width = max((len(row) for row in rows), default=1)
        padded = [row + [(0, 0)] * (width - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.int64).reshape(len(rows), width, 2)
        return cls._ordered(table[..., 0], table[..., 1])

    @classmethod
    def of_crystals(cls, crystals: CrystalBatch) -> "Compositions":
        """Return the compositions of ``crystals``."""
        merged = crystals.without_letters()
        return cls._ordered(merged.elements, merged.counts)

    def amounts(self) -> list[dict[str, int]]:
        """Return {symbol: atoms per primitive cell} of each composition."""
        rows = zip(self.elements.tolist(), self.counts.tolist(), strict=True)
        return [
            {Element.from_Z(element).symbol: count for element, count in zip(*row, strict=True) if count > 0}
            for row in rows
        ]

    @classmethod
    def _ordered(cls, elements: Tensor, counts: Tensor) -> "Compositions":
        order = BUILDING_RANK[elements].argsort(dim=1, stable=True)
        return cls(elements.gather(1, order), counts.gather(1, order))


def _parse(row: int, amounts: Mapping[str, int]) -> list[tuple[int, int]]:
    if not amounts:
        raise RepresentationError(f"composition {row} is empty; give element symbols with atoms per primitive cell")
    parsed = []
    for symbol, count in amounts.items():
        if not Element.is_valid_symbol(symbol):
            raise RepresentationError(f"composition {row}: {symbol!r} is not an element symbol")
        if int(count) != count or not 1 <= count <= _MAX_COUNT:
            raise RepresentationError(
                f"composition {row}: {symbol} needs a whole number of atoms from 1 to {_MAX_COUNT} per primitive cell, "
                f"got {count}"
            )
        parsed.append((int(Element(symbol).Z), int(count)))
    return parsed


@dataclass(frozen=True)
class Packing:
    """Which space groups and letters can hold a composition, for up to ``max_count`` atoms of one element."""

    capacity: CapacityTable
    letters: LetterTable

    @classmethod
    def for_counts(cls, counts: Tensor) -> "Packing":
        """Return the tables that hold element counts (any shape); they are built once per power of two."""
        largest = int(counts.max()) if counts.numel() else 1
        return _build_packing(max(32, 1 << (largest - 1).bit_length()))

    def group_mask(self, counts: Tensor) -> Tensor:
        """Return (n, 230) bool: space groups whose positions hold the element counts (n, k), 0 = padding."""
        state = self.capacity.start.expand(len(counts), -1)
        return self._after(state, counts) != DEAD

    def good_residuals(self, group: Tensor, counts: Tensor) -> Tensor:
        """Return (n,) int64 bits of the residual capacities of ``group`` (n,) index that hold ``counts`` (n, k)."""
        residuals = self.capacity.residual_state[group]
        return residuals_good(self._after(residuals, counts) != DEAD, residuals)

    def _after(self, state: Tensor, counts: Tensor) -> Tensor:
        """Return the states (n, m) that ``state`` (n, m) becomes when all counts are placed, DEAD where they cannot."""
        for column in counts.unbind(dim=1):
            moved = self.capacity.next_state[state.clamp(min=0), column[:, None].expand_as(state)]
            state = torch.where((state != DEAD) & (column > 0)[:, None], moved, state)
        return state


@cache
def _build_packing(max_count: int) -> Packing:
    capacity = build_capacity_table(max_count, conventional=False)
    return Packing(capacity, build_letter_table(capacity))


def possible_space_groups(counts: Sequence[int]) -> Tensor:
    """Return (230,) bool: the groups that hold these numbers of atoms of each element in the primitive cell."""
    table = torch.tensor([list(counts)], dtype=torch.int64)
    return Packing.for_counts(table).group_mask(table)[0]


@dataclass
class Walk:
    """Where the writing of each assignment stands: (n,) tensors that ``step`` replaces."""

    packing: Packing
    compositions: Compositions
    group: Tensor  # (n,) space group - 1
    slot: Tensor  # (n,) column of the element that is being placed; k after the last
    n_left: Tensor  # (n,) atoms of it still to place, 0 once all is placed
    used: Tensor  # (n,) bits of the fixed letters in use
    first_letter: Tensor  # (n,) smallest letter that keeps the order
    good: Tensor  # (n,) bits of the residuals from which the later elements can be placed

    @classmethod
    def start(cls, packing: Packing, compositions: Compositions, group: Tensor) -> "Walk":
        """Return the walks that have chosen a space group (index ``group`` (n,)) and no letter."""
        zero = torch.zeros_like(group)
        good = packing.good_residuals(group, compositions.counts[:, 1:])
        return cls(packing, compositions, group, zero, compositions.counts[:, 0], zero, zero, good)

    @classmethod
    def cat(cls, walks: Sequence["Walk"]) -> "Walk":
        """Return walks of the same packing and width of compositions as one batch."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(walk, name) for walk in walks])

        elements = torch.cat([walk.compositions.elements for walk in walks])
        counts = torch.cat([walk.compositions.counts for walk in walks])
        names = ("group", "slot", "n_left", "used", "first_letter", "good")
        return cls(walks[0].packing, Compositions(elements, counts), *(joined(name) for name in names))

    @property
    def done(self) -> Tensor:
        """(n,) bool, True where every atom is placed."""
        return self.n_left == 0

    def select(self, rows: Tensor) -> "Walk":
        """Return the walks at ``rows``."""
        parts = (self.group, self.slot, self.n_left, self.used, self.first_letter, self.good)
        return Walk(self.packing, self.compositions.select(rows), *(part[rows] for part in parts))

    def letter_mask(self) -> Tensor:
        """Return (n, 27) bool: letters of the next orbit; all False where done."""
        table = self.packing.letters
        mask = table.letter_mask(self.group, self.used, self.first_letter, self.n_left, self.good)
        return mask & ~self.done[:, None]

    def step(self, letter: Tensor) -> None:
        """Put the next orbit of every walk on ``letter`` (n,); walks that are done stay as they are."""
        table, moves = self.packing.letters, ~self.done
        letter = letter.clamp(min=0)
        bit = table.fixed_bit[self.group, letter]
        self.n_left = torch.where(moves, self.n_left - table.multiplicity[self.group, letter], 0)
        self.used = torch.where(moves, self.used | bit, self.used)
        self.first_letter = torch.where(moves, letter + bit.ne(0), self.first_letter)
        rows = (moves & (self.n_left == 0)).nonzero().flatten()
        if len(rows):
            self._next_element(rows)

    def _next_element(self, rows: Tensor) -> None:
        counts = self.compositions.counts[rows]
        slot = self.slot[rows] + 1
        padded = torch.nn.functional.pad(counts, (0, 1))
        behind = torch.arange(padded.shape[1]) > slot[:, None]
        good = self.packing.good_residuals(self.group[rows], padded * behind)
        self.n_left = self.n_left.index_put((rows,), padded.gather(1, slot[:, None])[:, 0])
        self.slot = self.slot.index_put((rows,), slot)
        self.first_letter = self.first_letter.index_put((rows,), torch.zeros_like(slot))
        self.good = self.good.index_put((rows,), good)


@dataclass(frozen=True)
class Assignments:
    """Space groups and letters in the order of writing."""

    compositions: Compositions  # (n, k)
    group: Tensor  # (n,) int64 space group - 1
    slot: Tensor  # (n, w) int64 column of the orbit's element in ``compositions``, -1 = padding
    letter: Tensor  # (n, w) int64, -1 = padding

    def __len__(self) -> int:
        """Return the number of assignments."""
        return len(self.group)

    def select(self, rows: Tensor) -> "Assignments":
        """Return the assignments at ``rows``, without columns that are padding in all of them."""
        width = max(int((self.slot[rows] >= 0).sum(dim=1).max()), 1) if len(rows) else 1
        slot, letter = self.slot[rows, :width], self.letter[rows, :width]
        return Assignments(self.compositions.select(rows).trimmed(), self.group[rows], slot, letter)

    def crystals(self, lattice_parameters: Tensor) -> CrystalBatch:
        """Return the crystals with ``lattice_parameters`` (n, 6) in Å and degrees."""
        held = self.slot >= 0
        elements = self.compositions.elements.gather(1, self.slot.clamp(min=0)).masked_fill(~held, 0)
        counts = SYMMETRY.primitive_multiplicity[self.group[:, None], self.letter.clamp(min=0)].masked_fill(~held, 0)
        return CrystalBatch(self.group + 1, elements, self.letter, counts, lattice_parameters)


def canonical(crystals: CrystalBatch) -> tuple[Assignments, Tensor]:
    """Return each crystal as the smallest of its images, and the alternative (n,) int64 that makes it.

    Of images with the same letters the one with the shortest first axes is taken, so that cells are comparable.

    Raises:
        RepresentationError: If a crystal has no letters.
    """
    _check_letters(crystals)
    compositions = Compositions.of_crystals(crystals)
    parts = [_canonical_codes(crystals.select(rows)) for rows in torch.arange(len(crystals)).split(_CHUNK)]
    codes, alternative = (torch.cat(column) for column in zip(*parts, strict=True))  # one part at least
    return _from_codes(compositions, crystals.space_group - 1, codes), alternative


def images(crystals: CrystalBatch) -> tuple[Assignments, Tensor]:
    """Return every distinct assignment that is equivalent to a crystal, and the row (m,) of that crystal.

    Raises:
        RepresentationError: If a crystal has no letters.
    """
    _check_letters(crystals)
    compositions = Compositions.of_crystals(crystals)
    all_codes, all_rows = [], []
    for chunk in torch.arange(len(crystals)).split(_CHUNK):
        codes, exists = _image_codes(crystals.select(chunk))
        rows = chunk[:, None].expand_as(exists)[exists]
        unique = torch.cat([rows[:, None], codes[exists]], dim=1).unique(dim=0)
        all_rows.append(unique[:, 0])
        all_codes.append(unique[:, 1:])
    rows = torch.cat(all_rows)
    return _from_codes(compositions.select(rows), crystals.space_group[rows] - 1, torch.cat(all_codes)), rows


def _check_letters(crystals: CrystalBatch) -> None:
    without = ((crystals.letters < 0) & (crystals.counts > 0)).any(dim=1)
    if bool(without.any()):
        raise RepresentationError(f"crystals without letters have no images, first row {int(without.nonzero()[0])}")


def _image_codes(crystals: CrystalBatch) -> tuple[Tensor, Tensor]:
    """Return (n, alternatives, w) int64 sorted codes of the orbits in every image, and (n, alternatives) which exist.

    A code is (place of the element) x 27 + letter; padding is ``_LAST``.
    """
    group = crystals.space_group - 1
    width = int(SYMMETRY.n_alternatives[group].max()) if len(group) else 1
    maps = SYMMETRY.alternative_letters[group, :width]
    letters = maps.gather(2, crystals.letters.clamp(min=0)[:, None].expand(-1, width, -1))
    codes = BUILDING_RANK[crystals.elements][:, None] * MAX_LETTERS + letters
    codes = codes.masked_fill((crystals.counts == 0)[:, None], _LAST).sort(dim=2).values
    return codes, torch.arange(width) < SYMMETRY.n_alternatives[group][:, None]


def _canonical_codes(crystals: CrystalBatch) -> tuple[Tensor, Tensor]:
    """Return (n, w) codes of the smallest image and (n,) the alternative that makes it."""
    codes, alive = _image_codes(crystals)
    for column in codes.unbind(dim=2):
        smallest = column.masked_fill(~alive, _LAST).amin(dim=1, keepdim=True)
        alive = alive & (column == smallest)
    axes = SYMMETRY.alternative_axes[crystals.space_group - 1, : alive.shape[1]]
    lengths = crystals.lattice_parameters[:, None, :3].expand(-1, alive.shape[1], -1).gather(2, axes)
    for column in lengths.unbind(dim=2):
        shortest = column.masked_fill(~alive, torch.inf).amin(dim=1, keepdim=True)
        alive = alive & (column <= shortest * (1 + 1e-9))
    choice = alive.to(torch.int8).argmax(dim=1)
    return codes[torch.arange(len(codes)), choice], choice


def _from_codes(compositions: Compositions, group: Tensor, codes: Tensor) -> Assignments:
    padding = codes >= _LAST
    rank = BUILDING_RANK[compositions.elements]
    slot = (codes[:, :, None] // MAX_LETTERS == rank[:, None]).to(torch.int8).argmax(dim=2)
    return Assignments(
        compositions, group, slot.masked_fill(padding, -1), (codes % MAX_LETTERS).masked_fill(padding, -1)
    )
