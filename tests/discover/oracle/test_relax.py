import math

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from discover.oracle.relax import (
    ChgnetCalculator,
    RelaxError,
    RelaxSettings,
    RelaxStatus,
    primitive_cell,
    relax,
    relax_one,
    single_points,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CHGNet's and ASE's, of their own imports


def rock_salt(a: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_rock_salt_relaxes_to_the_known_cell_and_formation_energy() -> None:
    # PBE of the Materials Project: a = 5.69 Å, -2.12 eV/atom with MP2020 corrections (mp-22862)
    result = relax_one(rock_salt(5.2), RelaxSettings())
    assert result.status is RelaxStatus.CONVERGED
    assert result.converged
    assert len(result.structure) == 2
    assert result.structure.volume ** (1 / 3) * 4 ** (1 / 3) == pytest.approx(5.69, abs=0.06)
    assert result.formation_energy == pytest.approx(-2.12, abs=0.05)
    assert result.energy_drop > 0.1
    assert result.initial_formation_energy - result.formation_energy == pytest.approx(result.energy_drop)
    assert 0 < result.n_steps < 50
    assert result.seconds > 0


def energy(structure: Structure) -> float:
    (result,) = single_points([structure], n_workers=0, progress=False)
    return result.energy * len(structure)


def test_forces_and_stress_are_the_slopes_of_the_energy() -> None:
    structure = primitive_cell(rock_salt(5.4)).perturb(0.1, seed=0)
    atoms = AseAtomsAdaptor.get_atoms(structure, msonable=False)
    atoms.calc = ChgnetCalculator()
    moved, strained = [], []
    for step in (0.01, -0.01):
        moved.append(energy(structure.copy().translate_sites([1], [0, 0, step], frac_coords=False)))
        lattice = structure.lattice.matrix @ (np.eye(3) + step * np.diag([1.0, 0.0, 0.0]))
        strained.append(energy(Structure(lattice, structure.species, structure.frac_coords)))
    force, stress = -(moved[0] - moved[1]) / 0.02, (strained[0] - strained[1]) / 0.02 / structure.volume
    assert atoms.get_forces()[1, 2] == pytest.approx(force, abs=5e-3)
    assert atoms.get_stress()[0] == pytest.approx(stress, abs=5e-4)


def test_the_same_structure_gives_the_same_numbers() -> None:
    settings = RelaxSettings(max_steps=3)
    first, second = (relax_one(rock_salt(5.2), settings) for _ in range(2))
    assert first.status is RelaxStatus.STEP_LIMIT
    assert first.n_steps == 3
    assert first.energy == second.energy


def test_a_single_point_leaves_the_structure_alone() -> None:
    (result,) = single_points([rock_salt(5.6)], n_workers=0, progress=False)
    assert result.status is RelaxStatus.SINGLE_POINT
    assert result.energy == result.initial_energy
    assert result.structure.volume / 2 == pytest.approx(5.6**3 / 8)
    relaxed = relax_one(rock_salt(5.6), RelaxSettings(max_steps=1))
    assert result.energy == pytest.approx(relaxed.initial_energy, abs=1e-5)


def test_what_has_no_energy_is_a_failure_with_its_reason() -> None:
    lone = Structure(Lattice.cubic(7.5), ["He"], [[0, 0, 0]])
    dense = Structure(Lattice.cubic(0.8), ["Na"], [[0, 0, 0]])
    disordered = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    results = relax([None, lone, dense, disordered], n_workers=0, progress=False)
    assert [item.status for item in results] == [RelaxStatus.FAILED] * 4
    assert all(math.isnan(item.energy) and item.structure is None for item in results)
    assert "no structure" in results[0].reason
    assert "isolated" in results[1].reason
    assert "outside 1 to 500" in results[2].reason
    assert "disordered" in results[3].reason


def test_time_is_limited() -> None:
    result = relax_one(rock_salt(5.2), RelaxSettings(time_limit=1e-9))
    assert result.status is RelaxStatus.TIME_LIMIT
    assert result.n_steps <= 1
    assert "stopped after" in result.reason
    assert math.isfinite(result.energy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fmax": 0}, "fmax"),
        ({"max_steps": -1}, "max_steps"),
        ({"time_limit": 0}, "time_limit"),
        ({"optimiser": "x"}, "optimiser"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(RelaxError, match=message):
        RelaxSettings(**settings)
