"""Crystals as walks: space group, composition, Wyckoff letters, lattice, in one fixed order.

Every complete crystal has exactly one walk (the state graph is a tree), every legal action can be
completed and every valid crystal is reachable. A batch of walks is one ``States``; all functions work
on the rows that stand at one stage and are pure table look-ups, without a Python loop over walks.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from envs import bitset, lattice
from envs.capacity import build_capacity_table
from envs.chemistry import charge_rule, load_elements
from envs.composition import CompositionLimits, CompositionTable, build_composition_table
from envs.conventions import LATTICE_SYSTEMS, MAX_LETTERS, N_SPACE_GROUPS, POINT_SYMMETRIES
from envs.crystal import CrystalBatch
from envs.errors import RepresentationError, RestrictionError
from envs.lattice import N_COORDINATES
from envs.reference_volume import log_reference_volume
from envs.restrictions import Space
from envs.symmetry import SYMMETRY
from envs.wyckoff import LetterTable, build_letter_table, residuals_good

#: How far fixed coordinates of a crystal may be from those of its lattice system: degrees, and logs of ratios.
_CELL_TOLERANCE = torch.tensor([0.1, 0.1, 0.1, torch.inf, 1e-3, 1e-3], dtype=torch.float64)


class Stage(IntEnum):
    """What a state chooses next."""

    LATTICE_SYSTEM = 0
    POINT_SYMMETRY = 1
    SPACE_GROUP = 2
    COMPOSITION = 3
    WYCKOFF = 4
    LATTICE = 5
    TERMINAL = 6


SYMMETRY_STAGES = (Stage.LATTICE_SYSTEM, Stage.POINT_SYMMETRY, Stage.SPACE_GROUP)


@dataclass
class States:
    """A batch of walks in progress; -1 where something is not chosen yet. ``step`` methods change it in place."""

    stage: Tensor  # (n,) int64
    system: Tensor  # (n,) int64 lattice system 0-7
    point: Tensor  # (n,) int64 point symmetry 0-4
    group: Tensor  # (n,) int64 space group - 1
    last: Tensor  # (n,) int64 position of the element chosen last
    n_chosen: Tensor  # (n,) int64 elements so far
    n_atoms: Tensor  # (n,) int64 atoms so far, in the environment's cell
    capacity: Tensor  # (n,) int64 state of the Wyckoff capacity
    charges: Tensor  # (n, 2, words) int64 latent charge sets
    used: Tensor  # (n,) int64 bits of the fixed letters in use
    next_letter: Tensor  # (n,) int64 smallest letter that the current element may still take
    n_left: Tensor  # (n,) int64 atoms of the current element without a letter
    good: Tensor  # (n,) int64 bits of the residual capacities from which the crystal can be completed
    counts: Tensor  # (n, n_elements) int64 atoms per element, in building order
    features: Tensor  # (n, n_features) float32 atoms per element, per seen letter, these weighted by element; then 0
    orbit_element: Tensor  # (n, max_orbits) int64 position of the element
    orbit_letter: Tensor  # (n, max_orbits) int64
    orbit_count: Tensor  # (n, max_orbits) int64 atoms in the environment's cell, 0 = padding
    n_orbits: Tensor  # (n,) int64
    shifts: Tensor  # (n,) int64 bits of the ``SYMMETRY.shift_letters`` that give the letters so far their least images
    lattice_step: Tensor  # (n,) int64
    values: Tensor  # (n, 6) float64 lattice coordinates, fixed ones at their value
    log_reference: Tensor  # (n,) float64 log of the sum of elemental volumes, conventional cell

    @property
    def n(self) -> int:
        """Return the number of walks."""
        return int(self.stage.shape[0])

    def busiest_stage(self) -> Stage | None:
        """Return the stage at which most unfinished walks stand, None when all are finished."""
        waiting = torch.bincount(self.stage, minlength=len(Stage))[: Stage.TERMINAL]
        stage = int(waiting.argmax())
        return Stage(stage) if int(waiting[stage]) else None


@dataclass(frozen=True)
class Observation:
    """What a policy sees of states, before any masking."""

    stage: Tensor  # (n,) int64
    coordinate: Tensor  # (n,) int64 lattice coordinate to choose, -1 outside the lattice stage
    system: Tensor  # (n,) int64, -1 = not chosen
    point: Tensor  # (n,) int64, -1 = not chosen
    group: Tensor  # (n,) int64, -1 = not chosen
    element: Tensor  # (n,) int64 position of the element chosen last, -1 = none
    shifts: Tensor  # (n,) int64 as in ``States``: letters are seen as their least images under these
    dense: Tensor  # (n, n_features) float32

    def __len__(self) -> int:
        """Return the number of states."""
        return int(self.system.shape[0])

    @property
    def origin(self) -> Tensor:
        """(n,) int64 first of the ``shifts`` while letters are chosen, else 0.

        Only then does it matter from which origin a crystal is written: an element's letters come in their own order.
        """
        first = ((self.shifts[:, None] >> torch.arange(SYMMETRY.shift_letters.shape[1])) & 1).argmax(dim=1)
        return torch.where(self.stage == Stage.WYCKOFF, first, 0)


class CrystalEnv:
    """The walks of one ``Space``; building the tables takes about a second.

    Raises:
        RestrictionError: If nothing can be built.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        known = load_elements()
        if list(space.elements) != [symbol for symbol in known if symbol in space.elements]:
            raise RestrictionError(
                "Space.elements must be distinct and in order of increasing electronegativity, "
                f"got {list(space.elements)}"
            )
        self.elements = [known[symbol] for symbol in space.elements]
        capacity = build_capacity_table(space.max_count, conventional=space.conventional)
        self.table: CompositionTable = build_composition_table(
            self.elements,
            _limits(space),
            charge_rule(
                self.elements, space.max_count, space.n_atoms[1], space.chemistry, mixed_valence=space.mixed_valence
            ),
            capacity,
        )
        self.letters: LetterTable = build_letter_table(capacity)
        self.max_orbits = space.n_atoms[1] if space.wyckoff else space.n_elements[1]
        group_mask = torch.zeros(N_SPACE_GROUPS, dtype=torch.bool)
        group_mask[torch.tensor(space.space_groups, dtype=torch.int64) - 1] = True
        fits_angles = space.box.system_mask()[SYMMETRY.lattice_system]
        can_hold = self.table.start_mask()
        self.group_mask = group_mask & fits_angles & can_hold
        if not self.group_mask.any():
            raise RestrictionError(_nothing_left(space, group_mask, fits_angles, can_hold))
        pair = torch.zeros(len(LATTICE_SYSTEMS), len(POINT_SYMMETRIES), dtype=torch.bool)
        pair[SYMMETRY.lattice_system[self.group_mask], SYMMETRY.point_symmetry[self.group_mask]] = True
        self.pair_mask = pair
        self.ranges = space.box.ranges()

    @property
    def space_groups(self) -> frozenset[int]:
        """International numbers of the groups that can be chosen."""
        return frozenset((self.group_mask.nonzero().flatten() + 1).tolist())

    @property
    def n_elements(self) -> int:
        """Return the number of elements, which is also the index of the action that ends the composition."""
        return self.table.n_elements

    @property
    def max_count(self) -> int:
        """Return the largest count of one element."""
        return self.table.max_count

    @property
    def n_features(self) -> int:
        """Return the width of ``Observation.dense``."""
        return self.n_elements + 2 * MAX_LETTERS + 5 + 2 * N_COORDINATES

    def initial(self, n: int) -> States:
        """Return ``n`` empty walks."""
        minus, zero = torch.full((n,), -1), torch.zeros(n, dtype=torch.int64)
        words = self.table.after.shape[-1]
        charges = torch.zeros(n, 2, words, dtype=torch.int64)
        charges[:, 0] = bitset.singleton(0, words)
        orbits = torch.zeros(n, self.max_orbits, dtype=torch.int64)
        return States(
            stage=zero.clone(),
            system=minus.clone(),
            point=minus.clone(),
            group=minus.clone(),
            last=minus.clone(),
            n_chosen=zero.clone(),
            n_atoms=zero.clone(),
            capacity=zero.clone(),
            charges=charges,
            used=zero.clone(),
            next_letter=zero.clone(),
            n_left=zero.clone(),
            good=zero.clone(),
            counts=torch.zeros(n, self.n_elements, dtype=torch.int64),
            features=torch.zeros(n, self.n_features),
            orbit_element=orbits.clone(),
            orbit_letter=orbits - 1,
            orbit_count=orbits.clone(),
            n_orbits=zero.clone(),
            shifts=torch.full((n,), (1 << SYMMETRY.shift_letters.shape[1]) - 1),
            lattice_step=zero.clone(),
            values=torch.zeros(n, N_COORDINATES, dtype=torch.float64),
            log_reference=torch.zeros(n, dtype=torch.float64),
        )

    # --- what a policy sees -------------------------------------------------------------------

    def observe(self, states: States, rows: Tensor, stage: Stage) -> Observation:
        """Return what can be known of ``rows`` (all at ``stage``)."""
        dense = states.features.index_select(0, rows)
        scalars = dense[:, self.n_elements + 2 * MAX_LETTERS :]
        scalars[:, 0] = states.n_chosen[rows] / self.space.feature_scale[1]
        scalars[:, 1] = states.n_atoms[rows] / self.space.feature_scale[0]
        scalars[:, 2] = states.n_left[rows] / self.space.feature_scale[0]
        scalars[:, 3] = states.next_letter[rows] / MAX_LETTERS
        scalars[:, 4] = float(self.space.chemistry == "ionic")
        coordinate = torch.full_like(rows, -1)
        if stage == Stage.LATTICE:
            coordinate = self._coordinate(states, rows)
            system = states.system[rows]
            width = (self.ranges[system, :, 1] - self.ranges[system, :, 0]).clamp(min=1e-9)
            known = self._chosen_coordinates(system, states.lattice_step[rows])
            scaled = (states.values[rows] - self.ranges[system, :, 0]) / width
            scalars[:, -2 * N_COORDINATES : -N_COORDINATES] = torch.where(known, scaled, 0.0)
            scalars[:, -N_COORDINATES:] = known
        return Observation(
            stage=torch.full_like(rows, int(stage)),
            coordinate=coordinate,
            system=states.system[rows],
            point=states.point[rows],
            group=states.group[rows],
            element=states.last[rows],
            shifts=states.shifts[rows],
            dense=dense,
        )

    # --- what is legal --------------------------------------------------------------------------

    def symmetry_mask(self, states: States, rows: Tensor, stage: Stage) -> Tensor:
        """Return (n, 8), (n, 5) or (n, 230) bool for the three choices that lead to a space group."""
        if stage == Stage.LATTICE_SYSTEM:
            return self.pair_mask.any(dim=1).expand(len(rows), -1)
        if stage == Stage.POINT_SYMMETRY:
            return self.pair_mask[states.system[rows]]
        same_system = SYMMETRY.lattice_system == states.system[rows][:, None]
        same_point = SYMMETRY.point_symmetry == states.point[rows][:, None]
        return same_system & same_point & self.group_mask

    def element_mask(self, states: States, rows: Tensor) -> Tensor:
        """Return (n, n_elements + 1) bool; the last action ends the composition."""
        return self.table.next_element_mask(states.last[rows], self._context(states, rows), states.charges[rows])

    def count_mask(self, states: States, rows: Tensor, element: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many atoms of ``element`` are legal, and the charges that each count leads to.

        Where the element is the end of the composition only the count 0 is legal.

        Returns:
            (n, max_count + 1) bool, and (n, max_count + 1, 2, words) int64 to hand to ``step_composition``.
        """
        goes_on = (element != self.n_elements).nonzero().flatten()
        chosen, rows = element[goes_on], rows[goes_on]
        if bool((states.last[rows] < 0).all()):
            moved = self.table.first_charges.index_select(0, chosen)
        else:
            moved = self.table.charges_after(states.last[rows], states.charges[rows], chosen)
        legal = self.table.count_mask(chosen, states.n_chosen[rows], states.n_atoms[rows], states.capacity[rows], moved)
        if len(chosen) == len(element):
            return legal, moved
        mask = torch.zeros(len(element), self.max_count + 1, dtype=torch.bool)
        mask[:, 0] = element == self.n_elements
        mask[goes_on] = legal
        charges = moved.new_zeros(len(element), *moved.shape[1:])
        charges[goes_on] = moved
        return mask, charges

    def letter_mask(self, states: States, rows: Tensor) -> Tensor:
        """Return (n, 27) bool."""
        return self.letters.letter_mask(
            states.group[rows], states.used[rows], states.next_letter[rows], states.n_left[rows], states.good[rows]
        )

    def lattice_interval(self, states: States, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinate that each row chooses (n,) and its legal interval (n, 2) in unit coordinates.

        Hard bounds on lengths can put the volume outside [0, 1].
        """
        coordinate = self._coordinate(states, rows)
        system = states.system[rows]
        interval = lattice.intervals(
            coordinate,
            system,
            states.values[rows],
            states.log_reference[rows],
            self._conventional_atoms(states, rows),
            self.space.box,
        )
        low, width = self._range(system, coordinate)
        return coordinate, (interval - low[:, None]) / width[:, None]

    # --- steps, in place --------------------------------------------------------------------------

    def step_symmetry(self, states: States, rows: Tensor, stage: Stage, action: Tensor) -> None:
        """Choose lattice system, point symmetry or space group."""
        (states.system, states.point, states.group)[stage][rows] = action
        states.stage[rows] = stage + 1
        if stage == Stage.SPACE_GROUP:
            states.capacity[rows] = self.table.capacity.start[action]

    def step_composition(self, states: States, rows: Tensor, element: Tensor, count: Tensor, charges: Tensor) -> None:
        """Add ``count`` atoms of ``element``, or end the composition; ``charges`` comes from ``count_mask``."""
        stops = element == self.n_elements
        self._begin_lattice(states, rows[stops])
        goes_on = (~stops).nonzero().flatten()
        rows, element, count = rows[goes_on], element[goes_on], count[goes_on]
        states.charges[rows] = charges[goes_on, count]
        states.last[rows] = element
        states.n_chosen[rows] += 1
        states.n_atoms[rows] += count
        states.counts[rows, element] = count
        states.features[rows, element] = count / self.space.feature_scale[0]
        if self.space.wyckoff:
            states.n_left[rows] = count
            states.good[rows] = self._good_residuals(states, rows)
            states.stage[rows] = int(Stage.WYCKOFF)
        else:
            states.capacity[rows] = self.table.capacity.next_state[states.capacity[rows], count]
            self._append_orbit(states, rows, element, torch.full_like(element, -1), count)

    def step_wyckoff(self, states: States, rows: Tensor, letter: Tensor) -> None:
        """Place one orbit of the current element on ``letter``."""
        group = states.group[rows]
        multiplicity = self.letters.multiplicity[group, letter]
        bit = self.letters.fixed_bit[group, letter]
        states.used[rows] |= bit
        states.next_letter[rows] = letter + bit.ne(0)
        states.n_left[rows] -= multiplicity
        seen = SYMMETRY.least_letters(group, states.shifts[rows]).gather(1, letter[:, None])[:, 0]
        states.shifts[rows] &= _bits(SYMMETRY.shift_letters[group, :, letter] == seen[:, None])
        share = multiplicity / self.space.feature_scale[0]
        states.features[rows, self.n_elements + seen] += share
        # Which element sits on a letter is seen through its place in the order; without it, states would look alike.
        place = (states.last[rows] + 1) / self.n_elements
        states.features[rows, self.n_elements + MAX_LETTERS + seen] += share * place
        self._append_orbit(states, rows, states.last[rows], letter, multiplicity)
        done = rows[states.n_left[rows] == 0]
        residual = self.letters.residual(states.group[done], states.used[done])
        states.capacity[done] = self.table.capacity.residual_state[states.group[done], residual]
        states.next_letter[done] = 0
        states.stage[done] = int(Stage.COMPOSITION)

    def step_lattice(self, states: States, rows: Tensor, unit: Tensor) -> None:
        """Set the next free lattice coordinate to ``unit`` (n,) float64."""
        coordinate, system = self._coordinate(states, rows), states.system[rows]
        low, width = self._range(system, coordinate)
        states.values[rows, coordinate] = low + unit.double() * width
        states.lattice_step[rows] += 1
        done = lattice.STEPS[system, states.lattice_step[rows]] < 0
        states.stage[rows[done]] = int(Stage.TERMINAL)

    # --- to and from crystals ------------------------------------------------------------------------

    def crystals(self, states: States) -> CrystalBatch:
        """Return the crystals of finished walks."""
        columns = max(int(states.n_orbits.max()), 1) if states.n else 1
        filled = torch.arange(columns) < states.n_orbits[:, None]
        atomic_numbers = self.table.atomic_numbers[states.orbit_element[:, :columns]]
        counts = states.orbit_count[:, :columns]
        if self.space.conventional:
            counts = counts // SYMMETRY.centring[states.group][:, None]
        return CrystalBatch(
            space_group=states.group + 1,
            elements=torch.where(filled, atomic_numbers, 0),
            letters=torch.where(filled, states.orbit_letter[:, :columns], -1),
            counts=torch.where(filled, counts, 0),
            lattice_parameters=lattice.lattice_parameters(states.values, states.log_reference),
        )

    def plan(self, crystals: CrystalBatch) -> "Plan":
        """Return the actions that build ``crystals``; whether each is legal shows when they are walked.

        Raises:
            RepresentationError: If letters are missing although the environment chooses them.
        """
        if self.space.wyckoff and bool(((crystals.letters < 0) & (crystals.counts > 0)).any()):
            raise RepresentationError("crystals without Wyckoff letters cannot be walked with wyckoff=on")
        if not self.space.wyckoff:
            crystals = crystals.without_letters()
        position = torch.full((119,), self.n_elements)
        position[self.table.atomic_numbers] = torch.arange(self.n_elements)
        filled = crystals.counts > 0
        element = torch.where(filled, position[crystals.elements], self.n_elements + 1)
        order = (element * (MAX_LETTERS + 2) + crystals.letters + 1).argsort(dim=1, stable=True)
        element, letter = element.gather(1, order), crystals.letters.gather(1, order)
        counts = crystals.counts.gather(1, order)
        group = crystals.space_group - 1
        if self.space.conventional:
            counts = counts * SYMMETRY.centring[group][:, None]
        totals = torch.zeros(len(group), self.n_elements + 2, dtype=torch.int64).scatter_add_(1, element, counts)
        system = SYMMETRY.lattice_system[group]
        cells = totals[:, : self.n_elements]
        if not self.space.conventional:
            cells = cells * SYMMETRY.centring[group][:, None]
        reference = log_reference_volume(cells.clamp(min=0), self.table.atomic_numbers)
        values = lattice.coordinates(crystals.lattice_parameters, reference)
        low, width = self.ranges[system].unbind(-1)[0], self.ranges[system].diff(dim=-1)[..., 0].clamp(min=1e-9)
        off = (values - low).abs() > _CELL_TOLERANCE
        misfit = (off & ~lattice.IS_FREE[system]).any(dim=1)  # a cell that its lattice system does not have
        foreign = totals[:, self.n_elements] > 0
        unfit = (counts > 0).sum(dim=1) > self.max_orbits
        if self.space.wyckoff:
            multiplicity = self.letters.multiplicity[group].gather(1, letter.clamp(min=0))
            unfit |= ((counts > 0) & (counts != multiplicity)).any(dim=1)
        return Plan(
            system=system,
            point=SYMMETRY.point_symmetry[group],
            group=group,
            totals=totals[:, : self.n_elements],
            letter=letter,
            unit=(values - low) / width,
            impossible=foreign | unfit | misfit | (totals[:, : self.n_elements].sum(dim=1) > self.space.n_atoms[1]),
        )

    # --- internals ----------------------------------------------------------------------------------

    def _context(self, states: States, rows: Tensor) -> Tensor:
        return self.table.context(states.n_chosen[rows], states.n_atoms[rows], states.capacity[rows])

    def _good_residuals(self, states: States, rows: Tensor) -> Tensor:
        """Return (n,) bits of the residual capacities after which ``rows`` can be completed."""
        capacity = self.table.capacity.residual_state.index_select(0, states.group[rows])
        context = self.table.context(states.n_chosen[rows][:, None], states.n_atoms[rows][:, None], capacity)
        last = states.last[rows][:, None].expand_as(context)
        return residuals_good(self.table.alive(last, context, states.charges[rows][:, None]), capacity)

    def _append_orbit(self, states: States, rows: Tensor, element: Tensor, letter: Tensor, count: Tensor) -> None:
        column = states.n_orbits[rows]
        states.orbit_element[rows, column] = element
        states.orbit_letter[rows, column] = letter
        states.orbit_count[rows, column] = count
        states.n_orbits[rows] += 1

    def _begin_lattice(self, states: States, rows: Tensor) -> None:
        system = states.system[rows]
        states.values[rows] = torch.where(lattice.IS_FREE[system], 0.0, self.ranges[system][..., 0])
        conventional = states.counts.index_select(0, rows)
        if not self.space.conventional:
            conventional = conventional * SYMMETRY.centring[states.group[rows]][:, None]
        states.log_reference[rows] = log_reference_volume(conventional, self.table.atomic_numbers)
        states.stage[rows] = int(Stage.LATTICE)

    def _conventional_atoms(self, states: States, rows: Tensor) -> Tensor:
        factor = 1 if self.space.conventional else SYMMETRY.centring[states.group[rows]]
        return states.n_atoms[rows] * factor

    def _coordinate(self, states: States, rows: Tensor) -> Tensor:
        return lattice.STEPS[states.system[rows], states.lattice_step[rows]]

    def _chosen_coordinates(self, system: Tensor, step: Tensor) -> Tensor:
        """Return (n, 6) bool, True for free coordinates that earlier steps have set."""
        coordinate = torch.arange(N_COORDINATES)
        upcoming = lattice.STEPS[system, step].clamp(min=0)
        return lattice.IS_FREE[system] & (coordinate < upcoming[:, None])

    def _range(self, system: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor]:
        bounds = self.ranges[system, coordinate]
        return bounds[:, 0], bounds[:, 1] - bounds[:, 0]


@dataclass(frozen=True)
class Plan:
    """The actions that build given crystals."""

    system: Tensor  # (n,) int64
    point: Tensor  # (n,) int64
    group: Tensor  # (n,) int64
    totals: Tensor  # (n, n_elements) int64 atoms of each element in the environment's cell
    letter: Tensor  # (n, max_orbits) int64 letters of the orbits, sorted by element and letter
    unit: Tensor  # (n, 6) float64 lattice coordinates
    impossible: Tensor  # (n,) bool, crystals outside the environment for reasons no mask shows

    def next_element(self, rows: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next element (n,), the number of elements where none is left, and its count (n,)."""
        totals = self.totals[rows]
        position = torch.arange(totals.shape[1])
        remaining = (totals > 0) & (position > last[:, None])
        element = torch.where(remaining.any(dim=1), remaining.int().argmax(dim=1), totals.shape[1])
        count = totals.gather(1, element.clamp(max=totals.shape[1] - 1)[:, None])[:, 0]
        return element, torch.where(element < totals.shape[1], count, 0)


def _limits(space: Space) -> CompositionLimits:
    n = len(space.elements)
    allowed = torch.zeros(n, space.max_count + 1, dtype=torch.bool)
    per_element = min(space.max_atoms_per_element or space.max_count, space.max_count, space.n_atoms[1])
    names = space.allowed if space.allowed is not None else space.elements
    for symbol in names:
        allowed[space.elements.index(symbol), 1 : per_element + 1] = True
    for symbol, counts in space.counts:
        only = torch.zeros(space.max_count + 1, dtype=torch.bool)
        only[[count for count in counts if count <= space.max_count]] = True
        allowed[space.elements.index(symbol)] &= only
    required = torch.zeros(n, dtype=torch.bool)
    required[[space.elements.index(symbol) for symbol in space.required]] = True
    n_elements = (max(space.n_elements[0], 2 if space.chemistry == "ionic" else 1), space.n_elements[1])
    return CompositionLimits(n_elements=n_elements, n_atoms=space.n_atoms, allowed_counts=allowed, required=required)


def _bits(flags: Tensor) -> Tensor:
    """Return (n,) int64 with bit j set where ``flags`` (n, k) bool has column j."""
    return (flags.long() << torch.arange(flags.shape[1])).sum(dim=1)


def _nothing_left(space: Space, group_mask: Tensor, fits_angles: Tensor, can_hold: Tensor) -> str:
    """Return which restrictions leave nothing, by asking what each leaves alone."""
    if not (group_mask & fits_angles).any():
        return f"restrict.angle={list(space.box.angle)} fits none of the {int(group_mask.sum())} allowed space groups"
    if not can_hold.any():
        names = ", ".join(space.allowed or space.elements)
        relaxed = replace(space, chemistry="any")
        if space.chemistry == "ionic" and CrystalEnv(relaxed).group_mask.any():
            return (
                f"no charge-neutral, Pauling-ordered composition of {names} with {space.n_elements[0]}-"
                f"{space.n_elements[1]} elements and {space.n_atoms[0]}-{space.n_atoms[1]} atoms exists; "
                "add an anion or a cation, or set chemistry=any or mixed_valence=on"
            )
        return f"no composition of {names} fits the restrictions on elements, counts and atoms in any space group"
    return (
        f"none of the {int(group_mask.sum())} allowed space groups can hold a composition that the restrictions on "
        f"elements and atoms allow (groups that can: {[g + 1 for g in can_hold.nonzero().flatten().tolist()][:10]} ...)"
    )
