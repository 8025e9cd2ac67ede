"""Which crystals an environment builds: presets, and what a user restricts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch

from envs.chemistry import load_elements
from envs.conventions import CRYSTAL_SYSTEMS, N_SPACE_GROUPS
from envs.errors import RestrictionError
from envs.lattice import Box
from envs.symmetry import SYMMETRY

#: What no laboratory wants by accident: technetium, promethium, polonium to protactinium, neptunium onward.
UNWANTED = ("Tc", "Pm", "Po", "At", "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm")

_CRYSTAL_GFN_ELEMENTS = [
    "H",
    "Li",
    "B",
    "C",
    "N",
    "O",
    "F",
    "Na",
    "Mg",
    "Al",
    "Si",
    "P",
    "S",
    "Cl",
    "K",
    "V",
    "Mn",
    "Fe",
    "Co",
    "Ni",
    "Cu",
    "Se",
]
_CRYSTAL_GFN_GROUPS = (
    *range(1, 17),
    *(18, 19, 20, 21, 25, 26, 29, 30, 31, 33, 36, 38, 40, 41, 43, 44, 46, 47, 51, 52, 53),
    *(*range(55, 68), 69, 70, 71, 72, 74, 82, *range(84, 89), 92, 99, 102, 107, 113, 114, 121, 122, 123),
    *(126, 129, 131, *range(136, 142), 146, 147, 148, 150, 155, 156, *range(160, 165), 166, 167, 176, 181),
    *(185, 186, 187, 189, 192, 194, 198, 199, 205, 206, 216, 217, 220, 221, 224, 225, 227, 229, 230),
)


@dataclass(frozen=True)
class Space:
    """A space of crystals. ``elements`` and ``max_count`` fix the actions; all else only masks them."""

    elements: tuple[str, ...]
    max_count: int  # atoms of one element, dimension of the count action
    n_atoms: tuple[int, int]
    n_elements: tuple[int, int]
    conventional: bool  # counts refer to the conventional cell, else to the primitive one
    wyckoff: bool
    box: Box
    chemistry: str = "ionic"
    mixed_valence: bool = False
    space_groups: tuple[int, ...] = tuple(range(1, N_SPACE_GROUPS + 1))
    allowed: tuple[str, ...] | None = None  # elements that may occur, None = all of ``elements``
    required: tuple[str, ...] = ()
    max_atoms_per_element: int | None = None
    counts: tuple[tuple[str, tuple[int, ...]], ...] = field(default=())  # the counts an element may take
    feature_scale: tuple[int, int] = (20, 6)  # atoms and elements relative to which features are; never narrowed


@dataclass(frozen=True, kw_only=True)
class Restrictions:
    """What a user asks for; every field narrows a ``Space``. None leaves the space as it is."""

    elements: Sequence[str] | None = None
    exclude: Sequence[str] | None = None  # None = ``UNWANTED``
    required: Sequence[str] | None = None
    n_elements: Sequence[int] | None = None
    n_atoms: Sequence[int] | None = None
    max_atoms_per_element: int | None = None
    counts: dict[str, Sequence[int]] | None = None
    crystal_systems: Sequence[str] | None = None
    space_groups: Sequence[int] | None = None
    length: Sequence[float] | None = None
    angle: Sequence[float] | None = None
    volume_per_atom: Sequence[float] | None = None

    @property
    def binds_cells(self) -> bool:
        """Whether lengths, angles or volumes are restricted."""
        return any(item is not None for item in (self.length, self.angle, self.volume_per_atom))


def mp20_space() -> Space:
    """Return the default space: primitive cells of up to 20 atoms, all 230 space groups, 92 elements."""
    return Space(
        elements=tuple(load_elements()),
        max_count=20,
        n_atoms=(1, 20),
        n_elements=(1, 6),
        conventional=False,
        wyckoff=True,
        box=Box(),
    )


def crystal_gfn_space() -> Space:
    """Return the search space of Crystal-GFN (arXiv:2310.04925, its configuration files).

    Conventional cells, 22 elements, 113 space groups, 1-5 elements of up to 16 atoms each and 80 in
    total, lengths 0.9-100 Å, angles 50-150 degrees, no Wyckoff letters.
    """
    return Space(
        elements=tuple(symbol for symbol in load_elements() if symbol in _CRYSTAL_GFN_ELEMENTS),
        max_count=16,
        n_atoms=(1, 80),
        n_elements=(1, 5),
        conventional=True,
        wyckoff=False,
        box=Box(monoclinic_angle=(50.0, 150.0), triclinic_angle=(50.0, 150.0), length=(0.9, 100.0)),
        space_groups=_CRYSTAL_GFN_GROUPS,
        feature_scale=(80, 5),
    )


SPACES = {"mp20": mp20_space, "crystal_gfn": crystal_gfn_space}


def restrict(space: Space, restrictions: Restrictions) -> Space:
    """Return ``space``, which may be restricted already, narrowed by ``restrictions``.

    Raises:
        RestrictionError: If a value is unknown or out of range, or two restrictions contradict each other; the
            message names them. A combination that leaves no crystal is found when the tables are built.
    """
    narrowed = _restrict_elements(space, restrictions)
    narrowed = replace(
        narrowed,
        n_elements=_range("n_elements", restrictions.n_elements, space.n_elements),
        n_atoms=_range("n_atoms", restrictions.n_atoms, space.n_atoms),
        space_groups=_restrict_groups(space, restrictions),
        box=_restrict_box(space.box, restrictions),
    )
    n_required = len(narrowed.required)
    if n_required > narrowed.n_elements[1]:
        raise RestrictionError(
            f"restrict.required names {n_required} elements but restrict.n_elements allows "
            f"at most {narrowed.n_elements[1]}"
        )
    if narrowed.allowed is not None and len(narrowed.allowed) < narrowed.n_elements[0]:
        raise RestrictionError(
            f"restrict.n_elements asks for at least {narrowed.n_elements[0]} elements but only "
            f"{len(narrowed.allowed)} may occur: {', '.join(narrowed.allowed)}"
        )
    groups = torch.tensor(narrowed.space_groups) - 1
    centring = torch.ones_like(groups) if narrowed.conventional else SYMMETRY.centring[groups]
    smallest, largest = narrowed.n_atoms[0] * int(centring.min()), narrowed.n_atoms[1] * int(centring.max())
    narrowed.box.check((smallest, largest), SYMMETRY.lattice_system[groups])
    return narrowed


def _restrict_elements(space: Space, restrictions: Restrictions) -> Space:
    wanted = _symbols("elements", restrictions.elements, space)
    required = _symbols("required", restrictions.required, space) or ()
    counts = restrictions.counts or {}
    _symbols("counts", list(counts), space)
    named = {*(wanted or ()), *required, *counts}
    excluded = _symbols("exclude", restrictions.exclude, space, known_only=True)
    if excluded is None:  # the default list gives way to elements that the user names
        excluded = tuple(symbol for symbol in UNWANTED if symbol not in named) if space.allowed is None else ()
    clash = sorted(named & set(excluded))
    if clash:
        raise RestrictionError(f"restrict.exclude contradicts the elements asked for: {', '.join(clash)} in both")
    outside = sorted(set(required) - set(wanted)) if wanted is not None else []
    if outside:
        raise RestrictionError(f"restrict.required names {', '.join(outside)}, which restrict.elements leaves out")
    before = space.elements if space.allowed is None else space.allowed
    if gone := sorted(named - set(before)):
        raise RestrictionError(f"{', '.join(gone)} were left out before, and what is left out stays so; name others")
    allowed = tuple(s for s in before if s not in excluded and (wanted is None or s in wanted))
    if not allowed:
        raise RestrictionError(f"restrict.elements and restrict.exclude leave no element of {', '.join(before)}")
    required = tuple(dict.fromkeys([*space.required, *required]))
    if missing := [symbol for symbol in required if symbol not in allowed]:
        raise RestrictionError(f"{', '.join(missing)} must be in every crystal and may be in none; name fewer elements")
    per_element = restrictions.max_atoms_per_element
    if per_element is not None and per_element < 1:
        raise RestrictionError(f"restrict.max_atoms_per_element must be at least 1, got {per_element}")
    limits = [limit for limit in (space.max_atoms_per_element, per_element) if limit is not None]
    return replace(
        space,
        allowed=allowed,
        required=required,
        max_atoms_per_element=min(limits, default=None),
        counts=_restrict_counts(space, counts),
    )


def _restrict_counts(space: Space, counts: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    possible = dict(space.counts)
    for symbol, values in counts.items():
        if not values or not all(1 <= count <= space.max_count for count in values):
            raise RestrictionError(
                f"restrict.counts of {symbol} must be numbers of atoms from 1 to {space.max_count}, got {list(values)}"
            )
        possible[symbol] = tuple(value for value in values if value in possible.get(symbol, values))
        if not possible[symbol]:
            raise RestrictionError(f"restrict.counts of {symbol} leaves no number of atoms")
    return tuple(possible.items())


def _restrict_groups(space: Space, restrictions: Restrictions) -> tuple[int, ...]:
    groups = set(space.space_groups)
    if restrictions.space_groups is not None:
        wrong = [g for g in restrictions.space_groups if not 1 <= g <= N_SPACE_GROUPS]
        if wrong:
            raise RestrictionError(f"restrict.space_groups must be international numbers 1-230, got {wrong}")
        missing = sorted(set(restrictions.space_groups) - groups)
        if missing:
            raise RestrictionError(
                f"restrict.space_groups {missing} are not in this environment's {len(groups)} groups"
            )
        groups &= set(restrictions.space_groups)
    if restrictions.crystal_systems is not None:
        unknown = [name for name in restrictions.crystal_systems if name not in CRYSTAL_SYSTEMS]
        if unknown:
            raise RestrictionError(
                f"restrict.crystal_systems: unknown {', '.join(map(str, unknown))}"
                f"{_hint(str(unknown[0]), CRYSTAL_SYSTEMS)}; choose from {', '.join(CRYSTAL_SYSTEMS)}"
            )
        systems = {index for name in restrictions.crystal_systems for index in CRYSTAL_SYSTEMS[name]}
        groups = {g for g in groups if int(SYMMETRY.lattice_system[g - 1]) in systems}
    if not groups:
        raise RestrictionError("restrict.space_groups and restrict.crystal_systems leave no space group")
    return tuple(sorted(groups))


def _restrict_box(box: Box, restrictions: Restrictions) -> Box:
    changes: dict[str, tuple[float, float]] = {}
    for name in ("length", "angle", "volume_per_atom"):
        value = getattr(restrictions, name)
        if value is None:
            continue
        low, high = _pair(name, value)
        current = getattr(box, name)
        if current is not None:
            low, high = max(low, current[0]), min(high, current[1])
        if low > high:
            raise RestrictionError(f"restrict.{name}={list(value)} lies outside the environment's {list(current)}")
        changes[name] = (float(low), float(high))
    return replace(box, **changes)


def _range(name: str, value: Sequence[int] | None, default: tuple[int, int]) -> tuple[int, int]:
    if value is None:
        return default
    low, high = _pair(name, value)
    if high < default[0] or low > default[1]:
        raise RestrictionError(f"restrict.{name}={list(value)} lies outside the environment's {list(default)}")
    return int(max(low, default[0])), int(min(high, default[1]))


def _pair(name: str, value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2 or not value[0] <= value[1] or value[0] < 0:
        raise RestrictionError(f"restrict.{name} must be [low, high] with 0 <= low <= high, got {list(value)}")
    return value[0], value[1]


def _symbols(
    name: str, value: Sequence[str] | None, space: Space, *, known_only: bool = False
) -> tuple[str, ...] | None:
    if value is None:
        return None
    known = load_elements()
    choices = {*known, *UNWANTED} if known_only else space.elements
    unknown = [s for s in value if s not in choices]
    if unknown:
        where = (
            "" if unknown[0] in known else " (elements without an electronegativity or oxidation state cannot be used)"
        )
        raise RestrictionError(
            f"restrict.{name}: {', '.join(map(str, unknown))} not among this environment's "
            f"{len(space.elements)} elements{where}{_hint(str(unknown[0]), space.elements)}"
        )
    if not value and name == "elements":
        raise RestrictionError("restrict.elements is empty; name at least one element")
    return tuple(dict.fromkeys(value))


def _hint(name: str, known: Sequence[str] | dict[str, tuple[int, ...]]) -> str:
    written = {choice.lower(): choice for choice in known}
    close = get_close_matches(name.lower(), list(written), n=1)
    return f", did you mean {written[close[0]]}?" if close else ""
