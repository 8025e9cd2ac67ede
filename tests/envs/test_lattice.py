"""Lattice coordinates, their Jacobian, and the exactness of their intervals."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from envs import lattice
from envs.conventions import LATTICE_SYSTEMS
from envs.crystal import cell_volume
from envs.errors import RestrictionError
from envs.lattice import BETA, FIXED_ANGLES, IS_FREE, N_COORDINATES, N_FREE, STEPS, VOLUME, Box
from envs.restrictions import crystal_gfn_space, mp20_space
from tests.strategies import seeds

N = 400
SYSTEMS = range(len(LATTICE_SYSTEMS))
PHYSICAL, CRYSTAL_GFN = mp20_space().box, crystal_gfn_space().box
EDGE = 1e-6  # relative: coordinates and cells are each other's rounding


def cells(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return numbers of atoms (n,) and log reference volumes (n,) of random cells."""
    n_atoms = torch.randint(1, 81, (n,), generator=generator)
    per_atom = 4.0 + 36.0 * torch.rand(n, generator=generator, dtype=torch.float64)
    return n_atoms, (n_atoms * per_atom).log()


def sample(system: Tensor, log_reference: Tensor, n_atoms: Tensor, box: Box, generator: torch.Generator) -> Tensor:
    """Return coordinates (n, 6), each uniform in its interval."""
    values = torch.where(IS_FREE[system], 0.0, box.ranges()[system][..., 0])
    for step in range(N_COORDINATES):
        coordinate = STEPS[system, step]
        rows = (coordinate >= 0).nonzero().flatten()
        if len(rows):
            chosen = coordinate[rows]
            bounds = lattice.intervals(chosen, system[rows], values[rows], log_reference[rows], n_atoms[rows], box)
            assert bool((bounds[:, 0] < bounds[:, 1]).all())
            unit = torch.rand(len(rows), generator=generator, dtype=torch.float64)
            values[rows, chosen] = bounds[:, 0] + unit * (bounds[:, 1] - bounds[:, 0])
    return values


def of_every_system(box: Box, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return lattice systems, log reference volumes, numbers of atoms and coordinates of random cells."""
    generator = torch.Generator().manual_seed(seed)
    legal = box.system_mask().nonzero().flatten()
    system = legal[torch.randint(len(legal), (N,), generator=generator)]
    n_atoms, log_reference = cells(N, generator)
    return system, log_reference, n_atoms, sample(system, log_reference, n_atoms, box, generator)


@pytest.mark.parametrize("box", [PHYSICAL, CRYSTAL_GFN])
def test_coordinates_and_parameters_are_inverse(box: Box) -> None:
    _, log_reference, _, values = of_every_system(box, seed=0)
    parameters = lattice.lattice_parameters(values, log_reference)
    assert_close(lattice.coordinates(parameters, log_reference), values, rtol=1e-9, atol=1e-9)
    assert_close(cell_volume(parameters).log(), log_reference + values[:, VOLUME], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("box", [PHYSICAL, CRYSTAL_GFN])
def test_cells_obey_their_lattice_system(box: Box) -> None:
    system, log_reference, _, values = of_every_system(box, seed=1)
    a, b, c, alpha, beta, gamma = lattice.lattice_parameters(values, log_reference).unbind(dim=1)
    name = [LATTICE_SYSTEMS[i] for i in system.tolist()]
    angles = torch.stack([alpha, beta, gamma], dim=1)
    for row, system_name in enumerate(name):
        if system_name in ("tetragonal", "trigonal", "rhombohedral", "hexagonal", "cubic"):
            assert_close(a[row], b[row])
        if system_name == "cubic":
            assert_close(a[row], c[row])
        if system_name not in ("triclinic", "monoclinic"):
            expected = 120.0 if system_name in ("trigonal", "rhombohedral", "hexagonal") else 90.0
            assert angles[row].tolist() == [90.0, 90.0, expected]
        if system_name == "monoclinic":
            assert angles[row, [0, 2]].tolist() == [90.0, 90.0]
    assert set(name) == set(LATTICE_SYSTEMS)


def test_the_number_of_free_coordinates_is_that_of_the_system() -> None:
    assert dict(zip(LATTICE_SYSTEMS, N_FREE.tolist(), strict=True)) == {
        "triclinic": 6,
        "monoclinic": 4,
        "orthorhombic": 3,
        "tetragonal": 2,
        "trigonal": 2,
        "rhombohedral": 2,
        "hexagonal": 2,
        "cubic": 1,
    }


#: The parameters that each system leaves free, as columns of (a, b, c, alpha, beta, gamma).
FREE_PARAMETERS = {
    "triclinic": [0, 1, 2, 3, 4, 5],
    "monoclinic": [0, 1, 2, 4],
    "orthorhombic": [0, 1, 2],
    "cubic": [0],
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("box", [PHYSICAL, CRYSTAL_GFN])
def test_the_jacobian_is_that_of_autograd(system: int, box: Box) -> None:
    generator = torch.Generator().manual_seed(system)
    systems = torch.full((5,), system)
    n_atoms, log_reference = cells(5, generator)
    values = sample(systems, log_reference, n_atoms, box, generator)
    coordinates = [c for c in STEPS[system].tolist() if c >= 0]
    low, width = box.ranges()[system, coordinates, 0], box.ranges()[system, coordinates].diff(dim=-1)[:, 0]
    kept = FREE_PARAMETERS.get(LATTICE_SYSTEMS[system], [0, 2])
    for row in range(5):

        def parameters(unit: Tensor, row: int = row) -> Tensor:
            full = values[row].clone()
            full[coordinates] = low + unit * width
            return lattice.lattice_parameters(full[None], log_reference[row : row + 1])[0, kept]

        unit = (values[row, coordinates] - low) / width
        jacobian = torch.autograd.functional.jacobian(parameters, unit)
        expected = torch.linalg.slogdet(jacobian)[1]
        given_by_formula = lattice.log_jacobian(parameters_of(values[row], log_reference[row]), systems[:1], box)
        assert_close(given_by_formula[0], expected, rtol=1e-9, atol=1e-9)


def parameters_of(values: Tensor, log_reference: Tensor) -> Tensor:
    return lattice.lattice_parameters(values[None], log_reference[None])


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """Draw hard bounds on lengths, angles and volume, of which each may be absent."""
    box = draw(st.sampled_from([PHYSICAL, CRYSTAL_GFN]))
    if draw(st.booleans()):
        low = draw(st.floats(1.0, 60.0))
        box = replace(box, length=(low, low * draw(st.floats(1.05, 10.0))))
    if draw(st.booleans()):
        low = draw(st.floats(40.0, 118.0))
        box = replace(box, angle=(low, draw(st.floats(low + 0.1, 150.0))))
    if draw(st.booleans()):
        low = draw(st.floats(0.5, 100.0))
        box = replace(box, volume_per_atom=(low, low * draw(st.floats(1.05, 10.0))))
    return box


def obey(parameters: Tensor, n_atoms: Tensor, box: Box) -> Tensor:
    """Return (n,) bool by the definition of each bound."""
    low, high = box.length
    fits = ((parameters[:, :3] > low * (1 - EDGE)) & (parameters[:, :3] < high * (1 + EDGE))).all(dim=1)
    low, high = box.angle
    fits &= ((parameters[:, 3:] > low - EDGE) & (parameters[:, 3:] < high + EDGE)).all(dim=1)
    if box.volume_per_atom is not None:
        volume = cell_volume(parameters) / n_atoms
        fits &= (volume > box.volume_per_atom[0] * (1 - EDGE)) & (volume < box.volume_per_atom[1] * (1 + EDGE))
    return fits


@given(box=boxes(), seed=seeds)
def test_every_cell_inside_the_intervals_obeys_or_the_bounds_are_refused(box: Box, seed: int) -> None:
    try:
        box.check((1, 80), torch.tensor(SYSTEMS))
    except RestrictionError:
        return
    _, log_reference, n_atoms, values = of_every_system(box, seed)
    parameters = lattice.lattice_parameters(values, log_reference)
    assert bool(obey(parameters, n_atoms, box).all())


@given(box=boxes(), seed=seeds, system=st.sampled_from(SYSTEMS))
def test_every_cell_that_obeys_lies_inside_the_intervals(box: Box, seed: int, system: int) -> None:
    box = replace(box, volume_factor=(1e-9, 1e9))  # the soft box is not a bound
    if not bool(box.system_mask()[system]):
        return
    generator = torch.Generator().manual_seed(seed)
    n = 20_000
    n_atoms, log_reference = cells(n, generator)
    unit = torch.rand(n, N_COORDINATES, generator=generator, dtype=torch.float64)
    systems = torch.full((n,), system)
    ranges = box.ranges()[system]
    values = torch.where(IS_FREE[system], ranges[:, 0] + unit * ranges.diff(dim=-1)[:, 0], ranges[:, 0])
    # Lengths around the wanted ones, so that some of the independent cells obey.
    aim = (3 * torch.tensor(box.length).log()).double()
    values[:, VOLUME] = aim[0] + unit[:, VOLUME] * (aim[1] - aim[0]) - log_reference
    alpha, beta, gamma = values[:, 0], values[:, 1], values[:, 2]
    margin = lattice.ANGLE_MARGIN if LATTICE_SYSTEMS[system] == "triclinic" else 0.0
    closes = (gamma > (alpha - beta).abs() + margin) & (
        gamma < torch.minimum(alpha + beta, 360 - alpha - beta) - margin
    )
    values, systems = values[closes], systems[closes]
    n_atoms, log_reference = n_atoms[closes], log_reference[closes]
    good = obey(lattice.lattice_parameters(values, log_reference), n_atoms, box)
    values, systems, n_atoms, log_reference = values[good], systems[good], n_atoms[good], log_reference[good]
    for coordinate in STEPS[system].tolist():
        if coordinate >= 0:
            chosen = torch.full((len(values),), coordinate)
            bounds = lattice.intervals(chosen, systems, values, log_reference, n_atoms, box)
            tolerance = 1e-5 * (1 + values[:, coordinate].abs())
            assert bool((values[:, coordinate] >= bounds[:, 0] - tolerance).all())
            assert bool((values[:, coordinate] <= bounds[:, 1] + tolerance).all())


def volume_interval(box: Box, volume_of_elements: float) -> list[float]:
    """Return the interval of volume / sum of elemental volumes of a cubic cell with 10 atoms."""
    system = torch.tensor([LATTICE_SYSTEMS.index("cubic")])
    values = box.ranges()[system][..., 0]
    reference = torch.tensor([volume_of_elements], dtype=torch.float64).log()
    bounds = lattice.intervals(torch.tensor([VOLUME]), system, values, reference, torch.tensor([10]), box)
    return [math.exp(bound) for bound in bounds[0].tolist()]


def test_the_box_of_physical_volumes_yields_to_hard_bounds_only() -> None:
    assert volume_interval(PHYSICAL, 200.0) == pytest.approx([0.6, 1.9])
    # Edges of 8 to 20 Å hold 512 to 8,000 Å³ and the elements take 200: the box reaches up to 380, so it yields.
    yields = volume_interval(replace(PHYSICAL, length=(8.0, 20.0)), 200.0)
    assert yields == pytest.approx([2.56, 2.56 * math.exp(lattice.YIELD_WIDTH)])
    # Edges of 6 to 20 Å hold 216 to 8,000 Å³: the common part stays.
    assert volume_interval(replace(PHYSICAL, length=(6.0, 20.0)), 200.0) == pytest.approx([1.08, 1.9])
    # 5 to 10 Å³ per atom is 50 to 100 Å³, below the box.
    yields = volume_interval(replace(PHYSICAL, volume_per_atom=(5.0, 10.0)), 200.0)
    assert yields == pytest.approx([0.5 * math.exp(-lattice.YIELD_WIDTH), 0.5])
    assert volume_interval(replace(PHYSICAL, volume_per_atom=(20.0, 20.0)), 200.0) == pytest.approx([1.0, 1.0])


def test_a_lower_bound_of_zero_is_none() -> None:
    nothing = replace(PHYSICAL, length=(0.0, 20.0), volume_factor=(0.0, 1.9), volume_per_atom=(0.0, 1000.0))
    low, high = volume_interval(nothing, 200.0)
    assert 0.0 < low < 1e-3
    assert high == pytest.approx(1.9)


def test_systems_whose_fixed_angles_break_the_bounds_are_masked() -> None:
    def legal(low: float, high: float) -> set[str]:
        return {
            LATTICE_SYSTEMS[i] for i in replace(PHYSICAL, angle=(low, high)).system_mask().nonzero().flatten().tolist()
        }

    hexagonal = {"trigonal", "rhombohedral", "hexagonal"}
    assert legal(0, 180) == set(LATTICE_SYSTEMS)
    assert legal(90, 119) == set(LATTICE_SYSTEMS) - hexagonal
    assert legal(91, 180) == {"triclinic"}
    assert legal(60, 89) == {"triclinic"}
    assert legal(118.5, 121) == set()  # three such angles close no cell


def test_a_flat_triclinic_cell_is_the_smallest_shape_that_a_grid_finds() -> None:
    for box in (
        PHYSICAL,
        CRYSTAL_GFN,
        replace(CRYSTAL_GFN, angle=(75.0, 135.0)),
        replace(PHYSICAL, angle=(80.0, 100.0)),
    ):
        low, high = max(box.angle[0], box.triclinic_angle[0]), min(box.angle[1], box.triclinic_angle[1])
        axis = torch.linspace(low, high, 41, dtype=torch.float64)
        angles = torch.cartesian_prod(axis, axis, axis)
        alpha, beta, gamma = angles.unbind(dim=1)
        room = torch.minimum(gamma - (alpha - beta).abs(), torch.minimum(alpha + beta, 360 - alpha - beta) - gamma)
        on_grid = float(lattice.log_shape_factor(angles[room >= lattice.ANGLE_MARGIN - 1e-9]).min().exp())
        smallest = box._smallest_shape_factor(LATTICE_SYSTEMS.index("triclinic"))
        assert smallest <= on_grid + 1e-12
        assert smallest == pytest.approx(on_grid, rel=0.25)  # the grid misses corners by up to one spacing


def test_monoclinic_shapes_are_flattest_at_an_end_of_the_angle() -> None:
    monoclinic = LATTICE_SYSTEMS.index("monoclinic")
    assert PHYSICAL._smallest_shape_factor(monoclinic) == pytest.approx(math.sin(math.radians(135.0)))
    assert bool(IS_FREE[monoclinic, BETA])
    assert bool((FIXED_ANGLES[monoclinic] == 90.0).all())
