"""The default oracle: relaxation with CHGNet, first within the proposed symmetry, then released from it.

A relaxation that starts on symmetric positions cannot leave them, however far downhill the way would lead. So the
relaxed structure is shaken a little and relaxed again without symmetry. Of 39 crystals drawn from the prior 13 then
fell by more than 1 meV/atom, 8 of them by 0.1 to 0.8 eV/atom; the second stage nearly doubled the time (2.5 instead of
1.3 CPU seconds a structure).
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pymatgen.core import Structure

from discover.oracle.band_gap import GapModel
from discover.oracle.base import P_METAL, Label, LabelStatus
from discover.oracle.plausibility import unsuitable_elements, why_implausible
from discover.oracle.relax import (
    SYMPREC,
    SYMPREC_RELAXED,
    Relaxation,
    RelaxError,
    RelaxSettings,
    chgnet_model,
    relax_one,
    space_group,
)

SYMMETRY_LOST = 1e-3  # eV/atom that the release from symmetry has to gain, to count and to be kept
_SEED_DECIMALS = 5  # of Å and fractional coordinates: rounding on another machine gives the same seed


@dataclass(frozen=True)
class ChgnetOracle:
    """Relaxes with CHGNet v0.3.0; energies are on the MP2020 scale.

    Args:
        fmax: Converged when no force and no stress times volume per atom is above; eV/Å.
        max_steps: Steps of both stages together; 0 gives the energy of the structure as it is.
        rattle: Standard deviation in Å of the displacement between the stages; 0 leaves out the second.
        time_limit: Wall seconds of both stages together.
        band_gap: Predict the band gap of the relaxed structure (`discover.oracle.band_gap`).

    Raises:
        RelaxError: If a setting is out of range.
    """

    fmax: float = 0.1
    max_steps: int = 200
    rattle: float = 0.02
    time_limit: float = 300.0
    band_gap: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        RelaxSettings(fmax=self.fmax, max_steps=self.max_steps, time_limit=self.time_limit)
        if not 0 <= self.rattle <= 0.5:
            raise RelaxError(f"rattle must be between 0 and 0.5 Å, got {self.rattle}")

    @property
    def name(self) -> str:
        """Name that labels are stored under."""
        return "chgnet"

    def describe(self) -> Mapping[str, Any]:
        """Return settings and versions for JSON."""
        return {**asdict(self), "model": "CHGNet 0.3.0", "chgnet": version("chgnet"), "scale": "MP2020"}

    def start(self) -> None:
        """Load CHGNet."""
        torch.set_num_threads(1)  # workers share the machine, and numbers do not depend on threads
        chgnet_model()
        if self.band_gap:
            _gap_model()

    def label(self, structure: Structure) -> Label:
        """Return the label of the lower of both stages, a failed one if physics rules it out."""
        start, deadline = time.process_time(), time.monotonic() + self.time_limit
        before = space_group(structure, SYMPREC)
        if doubt := unsuitable_elements(structure.composition):
            return Label(status=LabelStatus.FAILED, reason=doubt, space_group_before=before)
        settings = RelaxSettings(
            fmax=self.fmax, max_steps=self.max_steps, time_limit=self.time_limit, keep_symmetry=before > 1
        )
        first = best = relax_one(structure, settings)
        n_steps = first.n_steps
        released = self._release(first, seed_of(structure), deadline) if before > 1 and self.rattle > 0 else None
        if released is not None:
            n_steps += released.n_steps
            if first.energy - released.energy > SYMMETRY_LOST:
                best = released
        label = _label(first, best, before=before, n_steps=n_steps)
        if self.band_gap and label.structure is not None and label.status is not LabelStatus.FAILED:
            gap, p_metal = (float(values[0]) for values in _gap_model().predict_with_metal([label.structure]))
            label = replace(label, band_gap=gap, properties={} if math.isnan(p_metal) else {P_METAL: p_metal})
        return replace(label, seconds=time.process_time() - start)

    def _release(self, first: Relaxation, seed: int, deadline: float) -> Relaxation | None:
        """Return the second stage, None if the first one failed or left no steps or time."""
        steps_left, time_left = self.max_steps - first.n_steps, deadline - time.monotonic()
        if first.structure is None or steps_left <= 0 or time_left <= 0:
            return None
        if why_implausible(first.structure, first.formation_energy):
            return None
        settings = RelaxSettings(fmax=self.fmax, max_steps=steps_left, time_limit=time_left)
        return relax_one(rattled(first.structure, self.rattle, seed=seed), settings)


def rattled(structure: Structure, size: float, *, seed: int) -> Structure:
    """Return the structure with normal displacements of `size` Å in each direction."""
    moves = np.random.default_rng(seed).normal(0.0, size, (len(structure), 3))
    return Structure(structure.lattice, structure.species, structure.cart_coords + moves, coords_are_cartesian=True)


def seed_of(structure: Structure) -> int:
    """Return a number that depends on nothing but the structure, so that its label does not change."""
    digest = hashlib.sha256()
    for array in (structure.lattice.matrix, structure.frac_coords):
        digest.update((np.round(array, _SEED_DECIMALS) + 0.0).tobytes())  # + 0.0: there is a -0.0, too
    digest.update(bytes(site.specie.Z for site in structure))
    return int.from_bytes(digest.digest()[:8], "little")


@cache
def _gap_model() -> GapModel:
    return GapModel.load()


def _label(first: Relaxation, best: Relaxation, *, before: int, n_steps: int) -> Label:
    """Return the label of the better stage, a failed one without numbers if there is none or physics rules it out."""
    relaxed = best.structure
    after = None if relaxed is None else space_group(relaxed, SYMPREC_RELAXED)
    doubt = best.reason if relaxed is None else why_implausible(relaxed, best.formation_energy)
    if doubt or relaxed is None:
        return Label(
            status=LabelStatus.FAILED,
            reason=doubt,
            structure=relaxed,
            space_group_before=before,
            space_group_after=after,
            n_steps=n_steps,
        )
    return Label(
        status=LabelStatus(best.status.value),
        reason=best.reason,
        structure=relaxed,
        energy_per_atom=best.energy,
        formation_energy_per_atom=best.formation_energy,
        initial_formation_energy_per_atom=first.initial_formation_energy,
        space_group_before=before,
        space_group_after=after,
        n_steps=n_steps,
    )
