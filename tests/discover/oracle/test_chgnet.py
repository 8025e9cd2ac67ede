import math
import pickle

import pytest
from pymatgen.core import Composition, Lattice, Structure

from discover.guarded_worker import label_here
from discover.oracle.base import Label, LabelStatus
from discover.oracle.chgnet import ChgnetOracle, rattled, seed_of
from discover.oracle.plausibility import unsuitable_elements, why_implausible
from discover.oracle.relax import RelaxError, RelaxSettings, relax_one, space_group
from tests.discover.oracle.salts import rock_salt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CHGNet's and ASE's, of their own imports


def uranium_carbonitride() -> Structure:
    """Anti-perovskite U3CN as the prior draws it: a saddle point that is stationary by symmetry."""
    sites = [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 0]]
    return Structure(Lattice.cubic(4.6), ["U", "U", "U", "C", "N"], sites)


@pytest.fixture(scope="module")
def oracle() -> ChgnetOracle:
    oracle = ChgnetOracle()
    oracle.start()
    return oracle


def test_a_stable_crystal_keeps_its_symmetry_and_has_its_known_energy(oracle: ChgnetOracle) -> None:
    # PBE of the Materials Project with MP2020 corrections: -2.12 eV/atom (mp-22862)
    label = oracle.label(Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.3), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]))
    assert label.status is LabelStatus.CONVERGED
    assert label.formation_energy_per_atom == pytest.approx(-2.12, abs=0.05)
    assert label.initial_formation_energy_per_atom > label.formation_energy_per_atom + 0.01
    assert (label.space_group_before, label.space_group_after) == (225, 225)
    assert label.n_steps > 0
    assert label.seconds > 0
    assert label.band_gap == pytest.approx(5.0, abs=1.0)  # eV, PBE


def test_the_band_gap_can_be_left_out() -> None:
    assert math.isnan(ChgnetOracle(max_steps=0, band_gap=False).label(rock_salt()).band_gap)


def test_release_from_symmetry_finds_what_symmetry_hides(oracle: ChgnetOracle) -> None:
    crystal = uranium_carbonitride()
    kept = ChgnetOracle(rattle=0.0).label(crystal)
    released = oracle.label(crystal)
    assert kept.space_group_after == kept.space_group_before == 221
    assert released.space_group_after != 221
    assert released.energy_per_atom < kept.energy_per_atom - 0.1
    assert released.initial_formation_energy_per_atom == kept.initial_formation_energy_per_atom
    assert kept.n_steps < released.n_steps <= oracle.max_steps


def test_the_same_structure_gets_the_same_label(oracle: ChgnetOracle) -> None:
    short = ChgnetOracle(max_steps=12)
    first, second = (short.label(pickle.loads(pickle.dumps(uranium_carbonitride()))) for _ in range(2))  # noqa: S301
    assert first.energy_per_atom == second.energy_per_atom
    assert first.structure == second.structure
    assert oracle == pickle.loads(pickle.dumps(oracle))  # noqa: S301 - it travels to workers


def test_the_seed_depends_on_the_structure_alone() -> None:
    crystal = uranium_carbonitride()
    other = crystal.copy()
    other.translate_sites([0], [0.01, 0, 0])
    shaken = Structure(crystal.lattice, crystal.species, crystal.frac_coords + 1e-9)
    assert seed_of(crystal) == seed_of(shaken) == seed_of(crystal.copy())
    assert seed_of(crystal) != seed_of(other)
    moves = rattled(crystal * 4, 0.02, seed=1).cart_coords - (crystal * 4).cart_coords
    assert moves.std() == pytest.approx(0.02, rel=0.1)  # 320 atoms: 3 % standard error


def test_symmetry_is_held_where_rounding_would_lose_it() -> None:
    settings = RelaxSettings(max_steps=5, keep_symmetry=True)
    relaxed = relax_one(uranium_carbonitride(), settings)
    assert relaxed.structure is not None
    assert space_group(relaxed.structure, 1e-4) == 221


def test_settings_and_versions_are_told() -> None:
    assert ChgnetOracle(rattle=0.05).describe()["rattle"] == 0.05
    with pytest.raises(RelaxError, match="rattle"):
        ChgnetOracle(rattle=-1)
    with pytest.raises(RelaxError, match="max_steps"):
        ChgnetOracle(max_steps=-1)


def failed(label: Label) -> str:
    assert label.status is LabelStatus.FAILED
    assert math.isnan(label.energy_per_atom)
    assert math.isnan(label.formation_energy_per_atom)
    return label.reason


def test_what_chgnet_cannot_know_is_a_failure_with_its_reason(oracle: ChgnetOracle) -> None:
    assert "compounds of Pu" in failed(label_here(oracle, rock_salt(5.0, "Pu", "N")))
    lone = Structure(Lattice.cubic(7.5), ["He"], [[0, 0, 0]])
    assert "isolated" in failed(label_here(oracle, lone))
    fluorine = Structure(Lattice.cubic(4.0), ["Cs", "F", "F"], [[0, 0, 0], [0.5, 0.5, 0.32], [0.5, 0.5, 0.68]])
    assert "F-F bond" in failed(ChgnetOracle(max_steps=0).label(fluorine))


def test_implausible_energies_and_distances_are_named() -> None:
    salt = rock_salt(5.64, "Na", "Cl")
    assert why_implausible(salt, -2.1) == ""
    assert why_implausible(salt, math.nan) == ""
    assert "no known compound is below" in why_implausible(salt, -5.0)
    assert "times the sum of radii from its neighbour" in why_implausible(rock_salt(2.5, "Na", "Cl"), -1.0)
    assert "has no neighbour within" in why_implausible(rock_salt(9.8, "Na", "Cl"), -1.0)
    krypton = Structure.from_spacegroup("Fm-3m", Lattice.cubic(6.4), ["Kr"], [[0, 0, 0]])
    assert why_implausible(krypton, 0.0) == ""
    chlorine = Structure(Lattice.cubic(6.0), ["Cl", "Cl"], [[0.5, 0.5, 0.33], [0.5, 0.5, 0.67]])
    assert why_implausible(chlorine, 0.0) == ""  # an element
    assert unsuitable_elements(Composition("UO2")) == ""
