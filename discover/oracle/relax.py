"""Energies and relaxation with CHGNet, on the scale of the Materials Project's corrected formation energies.

CHGNet (Deng et al. 2023, Nat. Mach. Intell. 5, 1031, doi:10.1038/s42256-023-00716-3; weights v0.3.0, in its wheel) was
trained on energies with the MP2020 corrections, so that its energy per atom minus that of the elements
(`discover.oracle.hull.elemental_energies`) is a formation energy that compares with the Materials Project's.

Every structure gets a `Relaxation`, a failed one with its reason. Structures are relaxed in their primitive cell, cell
and atoms together. Results depend on nothing but the structure and the settings: one thread per process, float32.
"""

import contextlib
import io
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import spglib
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.optimize import Optimizer
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray
from pymatgen.core import Lattice, Structure

from discover.oracle.hull import formation_energy_per_atom
from discover.worker_pool import TaskFailure, map_in_workers

OPTIMISERS: dict[str, type[Optimizer]] = {"bfgs": BFGS, "lbfgs": LBFGS, "fire": FIRE}
VOLUME_RANGE = (1.0, 500.0)  # Å^3 per atom; outside it a cell has collapsed or flown apart
SYMPREC = 0.01  # Å; of a structure as proposed
SYMPREC_RELAXED = 0.1  # Å; of a relaxed one, which is as exact as fmax
_PRIMITIVE_SYMPREC = 1e-3  # Å; translations are found, nothing is symmetrised
_GRACE = 60.0  # s beyond the time limit after which a step that hangs is killed with its process


class RelaxError(ValueError):
    """A structure that cannot be given an energy, or settings that make no relaxation."""


class RelaxStatus(StrEnum):
    """How a relaxation ended; all but `FAILED` have a structure and an energy."""

    CONVERGED = "converged"
    STEP_LIMIT = "step_limit"  # the energy is that of the last step, an upper bound
    TIME_LIMIT = "time_limit"  # likewise
    SINGLE_POINT = "single_point"  # no relaxation was asked for
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class RelaxSettings:
    """How structures are relaxed.

    Args:
        fmax: Converged when no force, and no stress times volume per atom as the filter scales it, is above; eV/Å.
        max_steps: Steps of the optimiser; 0 leaves the structure as it is (single point).
        time_limit: Wall seconds per structure.
        optimiser: A key of `OPTIMISERS`.
        keep_symmetry: Hold the space group that spglib finds with symprec 0.01 Å. CHGNet is equivariant, but rounding
            in float32 grows where symmetry is a saddle point, and what it grows to is chance.
    """

    fmax: float = 0.1
    max_steps: int = 200
    time_limit: float = 300.0
    optimiser: Literal["bfgs", "lbfgs", "fire"] = "bfgs"
    keep_symmetry: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            RelaxError: Naming the setting.
        """
        if not self.fmax > 0:
            raise RelaxError(f"fmax must be > 0 eV/Å, got {self.fmax}")
        if self.max_steps < 0:
            raise RelaxError(f"max_steps must be at least 0, got {self.max_steps}")
        if not self.time_limit > 0:
            raise RelaxError(f"time_limit must be > 0 s, got {self.time_limit}")
        if self.optimiser not in OPTIMISERS:
            raise RelaxError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {self.optimiser!r}")


@dataclass(frozen=True)
class Relaxation:
    """What became of one structure; energies in eV/atom, NaN where there are none."""

    status: RelaxStatus
    reason: str  # "" unless failed or out of time
    structure: Structure | None  # relaxed, primitive cell
    initial_energy: float  # of the structure as given
    energy: float
    initial_formation_energy: float  # NaN also for an element without a reference energy
    formation_energy: float
    n_steps: int
    seconds: float  # CPU time of the one thread that did it, so that a busy machine does not change it

    @property
    def converged(self) -> bool:
        """Whether forces and stress fell below the threshold."""
        return self.status is RelaxStatus.CONVERGED

    @property
    def energy_drop(self) -> float:
        """Energy that relaxation gained, in eV/atom."""
        return self.initial_energy - self.energy


def relax(
    structures: Sequence[Structure | None],
    settings: RelaxSettings | None = None,
    *,
    n_workers: int = 2,
    progress: bool = True,
) -> list[Relaxation]:
    """Relax every structure, in order; None stays in the list as a failure.

    Args:
        structures: Structures in any cell.
        settings: None takes the defaults.
        n_workers: Processes with one thread each; 0 works in this process, which saves the five seconds of a start.
        progress: Show a bar.
    """
    settings = settings or RelaxSettings()
    results = map_in_workers(
        partial(relax_one, settings=settings),
        structures,
        n_workers=n_workers,
        time_limit=settings.time_limit + _GRACE,
        initializer=_start_worker,
        description="relaxing" if settings.max_steps else "energies",
        unit="structure",
        progress=progress,
    )
    return [_failure(item.reason) if isinstance(item, TaskFailure) else item for item in results]


def single_points(
    structures: Sequence[Structure | None], *, n_workers: int = 2, progress: bool = True
) -> list[Relaxation]:
    """Return the energy of every structure as given, in order; None stays in the list as a failure."""
    return relax(structures, RelaxSettings(max_steps=0), n_workers=n_workers, progress=progress)


def single_point_energies(structures: Sequence[Structure | None], *, n_workers: int = 0) -> NDArray[np.float64]:
    """Return the energy of every structure as given, (n,) eV/atom, NaN where CHGNet gives none.

    Raises:
        WorkersError: If no worker could start.
    """
    n_threads = torch.get_num_threads()
    try:
        return values(single_points(structures, n_workers=n_workers, progress=n_workers > 0), "energy")
    finally:
        torch.set_num_threads(n_threads)  # energies in this process take one, the caller may have more


def relax_one(
    structure: Structure | None, settings: RelaxSettings, *, calculator: Calculator | None = None
) -> Relaxation:
    """Relax one structure in this process, with CHGNet or another calculator on the MP2020 scale."""
    start = time.process_time()
    if structure is None:
        return _failure("no structure was generated")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CHGNet and ASE comment on isolated atoms and odd cells; we raise
            result = _relax(primitive_cell(structure), settings, calculator)
    except Exception as error:  # noqa: BLE001 - spglib, CHGNet and ASE raise many kinds
        first_line = (str(error).splitlines() or [""])[0]
        return _failure(first_line or type(error).__name__, seconds=time.process_time() - start)
    relaxed, energies, status, n_steps = result
    formation = [formation_energy_per_atom(relaxed.composition, energy) for energy in energies]
    return Relaxation(
        status=status,
        reason=f"stopped after {settings.time_limit:g} s" if status is RelaxStatus.TIME_LIMIT else "",
        structure=relaxed,
        initial_energy=energies[0],
        energy=energies[1],
        initial_formation_energy=formation[0],
        formation_energy=formation[1],
        n_steps=n_steps,
        seconds=time.process_time() - start,
    )


def primitive_cell(structure: Structure) -> Structure:
    """Return the smallest cell of an ordered structure, with its coordinates as they are.

    Raises:
        RelaxError: If a site is disordered or a number is not finite.
    """
    if not structure.is_ordered:
        raise RelaxError("disordered structure: every site must hold one element with occupancy 1")
    matrix, coords = structure.lattice.matrix, structure.frac_coords
    if not (np.isfinite(matrix).all() and np.isfinite(coords).all()):
        raise RelaxError("the structure holds numbers that are not finite")
    numbers = [site.specie.Z for site in structure]
    cell: Any = (matrix, coords, numbers)
    with contextlib.suppress(spglib.SpglibError):  # atoms on top of each other: what is wrong shows in the energy
        cell = spglib.standardize_cell(cell, to_primitive=True, no_idealize=True, symprec=_PRIMITIVE_SYMPREC) or cell
    matrix, coords, numbers = cell
    return Structure(Lattice(matrix), numbers, coords)


def space_group(structure: Structure, symprec: float) -> int:
    """Return the international number that spglib finds, 1 if it finds none (atoms on top of each other)."""
    cell: Any = (structure.lattice.matrix, structure.frac_coords, [site.specie.Z for site in structure])
    try:
        dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError:
        return 1
    return 1 if dataset is None else int(dataset.number)


class ChgnetCalculator(Calculator):
    """CHGNet for ASE: energy, forces and stress from one backward pass.

    CHGNet's own calculator takes one for forces and one for stress, and keeps both for a third; this gives the same
    numbers (to float32 rounding) in less than half the time.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "forces", "stress"]  # type: ignore[misc]

    def __init__(self) -> None:
        Calculator.__init__(self)

    def calculate(
        self, atoms: Atoms | None = None, properties: list[str] | None = None, system_changes: list[str] = all_changes
    ) -> None:
        """Fill `results`: energy in eV, forces (n_atoms, 3) in eV/Å, stress (6,) in eV/Å^3."""
        Calculator.calculate(self, atoms, properties, system_changes)
        model = chgnet_model()
        structure = _structure(self.atoms)
        graph = model.graph_converter(structure)
        graph.lattice.requires_grad_(True)
        graph.atom_frac_coord.requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CHGNet makes a number of the volume, whose gradient nothing needs
            energy = model([graph], task="e")["e"][0] * len(structure)
        by_coords, by_lattice = torch.autograd.grad(energy, (graph.atom_frac_coord, graph.lattice))
        lattice = graph.lattice.detach()
        # cart = frac L, so dE/dcart = dE/dfrac L^-T; a strain takes L to L (1 + strain), so dE/dstrain = L^T dE/dL
        forces = -torch.linalg.solve(lattice, by_coords.T).T
        stress = lattice.T @ by_lattice / torch.linalg.det(lattice).abs()
        self.results = {
            "energy": float(energy.detach()),
            "forces": forces.double().numpy(),
            "stress": full_3x3_to_voigt_6_stress(stress.double().numpy()),
        }


@cache
def chgnet_model() -> Any:
    """Return CHGNet v0.3.0 on the CPU, loaded once per process."""
    from chgnet.model import CHGNet  # noqa: PLC0415 - takes five seconds to import, and only energies need it

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = CHGNet.load(use_device="cpu", verbose=False)
    model.graph_converter.set_isolated_atom_response("error")  # an atom without neighbours has no CHGNet energy
    return model.requires_grad_(False).eval()


def _relax(
    structure: Structure, settings: RelaxSettings, calculator: Calculator | None
) -> tuple[Structure, tuple[float, float], RelaxStatus, int]:
    """Return the relaxed structure, energies per atom before and after, how it ended, and the number of steps."""
    _check_volume(structure.volume / len(structure))
    if settings.max_steps == 0 and calculator is None:
        energy = _single_point(structure)
        return structure, (energy, energy), RelaxStatus.SINGLE_POINT, 0
    atoms = Atoms(
        numbers=[site.specie.Z for site in structure],
        scaled_positions=structure.frac_coords,
        cell=structure.lattice.matrix,
        pbc=True,
        calculator=calculator or ChgnetCalculator(),
    )
    if settings.keep_symmetry:
        atoms.set_constraint(FixSymmetry(atoms, symprec=SYMPREC))
    initial = _finite(atoms.get_potential_energy()) / len(atoms)
    if settings.max_steps == 0:
        return structure, (initial, initial), RelaxStatus.SINGLE_POINT, 0
    deadline = time.monotonic() + settings.time_limit
    status, n_steps = RelaxStatus.STEP_LIMIT, 0
    movable: Any = FrechetCellFilter(atoms)
    optimiser = OPTIMISERS[settings.optimiser](movable, logfile=None)
    for converged in optimiser.irun(fmax=settings.fmax, steps=settings.max_steps):
        _check_volume(atoms.get_volume() / len(atoms))
        _finite(atoms.get_potential_energy())
        n_steps = optimiser.nsteps
        if converged:
            status = RelaxStatus.CONVERGED
            break
        if time.monotonic() > deadline:
            status = RelaxStatus.TIME_LIMIT
            break
    return _structure(atoms), (initial, atoms.get_potential_energy() / len(atoms)), status, n_steps


def _single_point(structure: Structure) -> float:
    """Return the energy in eV/atom."""
    model = chgnet_model()
    with torch.no_grad():
        return _finite(float(model([model.graph_converter(structure)], task="e")["e"][0]))


def _structure(atoms: Any) -> Structure:
    return Structure(Lattice(np.asarray(atoms.cell)), atoms.get_atomic_numbers(), atoms.get_scaled_positions())


def _finite(energy: float) -> float:
    if not math.isfinite(energy):
        raise RelaxError("the potential gave no finite energy")
    return energy


def _check_volume(volume_per_atom: float) -> None:
    low, high = VOLUME_RANGE
    if not low <= volume_per_atom <= high:
        raise RelaxError(f"{volume_per_atom:.3g} Å^3 per atom, outside {low:g} to {high:g}")


def _failure(reason: str, *, seconds: float = 0.0) -> Relaxation:
    nan = math.nan
    return Relaxation(RelaxStatus.FAILED, reason, None, nan, nan, nan, nan, 0, seconds)


def _start_worker() -> None:
    torch.set_num_threads(1)
    chgnet_model()


def values(relaxations: Sequence[Relaxation], name: str) -> NDArray[np.float64]:
    """Return one number of every relaxation, such as "formation_energy", (n,)."""
    return np.array([getattr(item, name) for item in relaxations], dtype=np.float64)
