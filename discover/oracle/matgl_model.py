"""matgl models as oracles: any of its potentials, or a model of one property, by folder or by name.

**Nothing is believed unseen.** Weights that were trained with an older matgl load into 4.x without a complaint and give
wrong energies for compounds (M3GNet-MP-2021.2.8-PES: NaCl at -1.30 instead of -3.37 eV/atom). So a model is asked for
textbook crystals when it loads, and refused if it does not know them. For a model of something else, or of other
elements, give crystals with `known` values.

**Nothing is unpickled freely.** matgl reads weights with torch's restricted unpickler, but the file also names classes,
which matgl imports and calls with arguments from the file. Here only classes of matgl itself are let through. Even so,
use models from where you would install a program from.
"""

import importlib
import json
import math
import pickle
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pymatgen.core import Lattice, Structure

from discover.oracle.base import NUMBERS, Label, LabelStatus
from discover.oracle.relax import (
    SYMPREC,
    SYMPREC_RELAXED,
    RelaxError,
    RelaxSettings,
    RelaxStatus,
    relax_one,
    space_group,
)

HUB_OWNER = "materialyze"  # matgl's own models on the Hugging Face hub
FILES = ("model.json", "model.pt", "state.pt")
TOLERANCE = {"energy_per_atom": 0.12, "formation_energy_per_atom": 0.3, "band_gap": 1.0}  # eV
_NOT_A_MODEL = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


class MatglModelError(ValueError):
    """A matgl model that cannot be loaded, is not to be trusted, or does not know what every model should."""


@dataclass(frozen=True)
class KnownValue:
    """A crystal whose value is known, in the unit of what the model predicts (a potential: eV/atom)."""

    structure: Structure
    value: float
    tolerance: float


_FACES = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))


def _cubic(a: float, first: str, second: str, shift: float) -> Structure:
    """Return two face-centred lattices, the second `shift` of the diagonal away: rock salt (1/2) or diamond (1/4)."""
    coords = [*_FACES, *(tuple(x + shift for x in site) for site in _FACES)]
    return Structure(Lattice.cubic(a), [first] * 4 + [second] * 4, coords)


def _known(name: str, nacl: float, mgo: float, silicon: float) -> tuple[KnownValue, ...]:
    salts = (_cubic(5.69, "Na", "Cl", 0.5), nacl), (_cubic(4.25, "Mg", "O", 0.5), mgo)
    crystals = *salts, (_cubic(5.47, "Si", "Si", 0.25), silicon)
    return tuple(KnownValue(structure, value, TOLERANCE[name]) for structure, value in crystals)


#: PBE of the Materials Project (mp-22862, mp-1265, mp-149).
KNOWN: Mapping[str, tuple[KnownValue, ...]] = {
    "mp2020": _known("energy_per_atom", -3.67, -6.31, -5.42),
    "uncorrected": _known("energy_per_atom", -3.37, -5.97, -5.42),
    "formation_energy_per_atom": _known("formation_energy_per_atom", -2.08, -3.04, 0.0),
    "band_gap": _known("band_gap", 5.0, 4.5, 0.6),
}


@dataclass(frozen=True)
class MatglOracle:
    """Relaxes with a matgl potential, or predicts one property of the structure as it is.

    Args:
        model: Folder with model.json, model.pt and state.pt, or the name of a model on the Hugging Face hub, which is
            downloaded: "owner/name", or just the name of one of matgl's own.
        predicts: What a property model predicts: "formation_energy_per_atom", "band_gap" or the name of another
            number. A potential predicts energies whatever is said here.
        scale: Of a potential's energies. "mp2020": with the MP2020 corrections, so that they give formation energies;
            "uncorrected": plain PBE (NaCl at -3.37 eV/atom), "own": any other. Only the first gives formation energies.
        known: Crystals with values that the model is tested with; empty: NaCl, MgO and Si.
        fmax: Converged when no force and no stress times volume per atom is above; eV/Å.
        max_steps: Steps of a relaxation; 0 gives the energy of the structure as it is.
        time_limit: Wall seconds per structure.

    Raises:
        MatglModelError: If nothing is known to test the model with.
        RelaxError: If a setting is out of range.
    """

    model: str
    predicts: str = "formation_energy_per_atom"
    scale: Literal["mp2020", "uncorrected", "own"] = "mp2020"
    known: tuple[KnownValue, ...] = ()
    fmax: float = 0.1
    max_steps: int = 200
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        """Check the settings."""
        RelaxSettings(fmax=self.fmax, max_steps=self.max_steps, time_limit=self.time_limit)
        if not self.known and (self.scale == "own" or self.predicts not in KNOWN):
            what = "energies on a scale of their own" if self.scale == "own" else self.predicts
            raise MatglModelError(f"nothing is known to test a model of {what} with; give `known` crystals")

    @property
    def name(self) -> str:
        """Name that labels are stored under."""
        return f"matgl:{Path(self.model).name}"

    def describe(self) -> Mapping[str, Any]:
        """Return settings and versions for JSON."""
        return {
            "model": self.model,
            "predicts": self.predicts,
            "scale": self.scale,
            "known": [[item.structure.formula, item.value, item.tolerance] for item in self.known],
            "fmax": self.fmax,
            "max_steps": self.max_steps,
            "time_limit": self.time_limit,
            "matgl": version("matgl"),
        }

    def start(self) -> None:
        """Load the model and test what it knows.

        Raises:
            MatglModelError: If it cannot be loaded, names foreign code, or does not know the test crystals.
        """
        torch.set_num_threads(1)
        _tested_model(self.model, self.predicts, self.scale, self.known)

    def label(self, structure: Structure) -> Label:
        """Return the label: relaxed by a potential, or a property model's number of the structure as it is."""
        start = time.process_time()
        model = _tested_model(self.model, self.predicts, self.scale, self.known)
        before = space_group(structure, SYMPREC)
        if not is_potential(model):
            value = _predict(model, structure)
            given: dict[str, Any] = (
                {self.predicts: value} if self.predicts in NUMBERS else {"properties": {self.predicts: value}}
            )
            return Label(
                status=LabelStatus.SINGLE_POINT,
                space_group_before=before,
                seconds=time.process_time() - start,
                **given,
            )
        settings = RelaxSettings(
            fmax=self.fmax, max_steps=self.max_steps, time_limit=self.time_limit, keep_symmetry=before > 1
        )
        relaxed = relax_one(structure, settings, calculator=_calculator(model))
        if relaxed.status is RelaxStatus.FAILED or relaxed.structure is None:
            raise RelaxError(relaxed.reason)
        corrected = self.scale == "mp2020"
        return Label(
            status=LabelStatus(relaxed.status.value),
            reason=relaxed.reason,
            structure=relaxed.structure,
            energy_per_atom=relaxed.energy,
            formation_energy_per_atom=relaxed.formation_energy if corrected else math.nan,
            initial_formation_energy_per_atom=relaxed.initial_formation_energy if corrected else math.nan,
            space_group_before=before,
            space_group_after=space_group(relaxed.structure, SYMPREC_RELAXED),
            n_steps=relaxed.n_steps,
            seconds=time.process_time() - start,
        )


_tested: dict[tuple[str, str, str, str], Any] = {}  # models of this process


def _tested_model(name: str, predicts: str, scale: str, known: tuple[KnownValue, ...]) -> Any:
    """Return a model that passed its test, loaded once per process."""
    key = name, predicts, scale, repr([(item.structure.as_dict(), item.value, item.tolerance) for item in known])
    if key not in _tested:
        model = load(name)
        check(model, name, known or KNOWN[scale if is_potential(model) else predicts])
        _tested[key] = model
    return _tested[key]


def load(name: str) -> Any:
    """Return a model from a folder or the hub, without a test of what it knows.

    Raises:
        MatglModelError: If there is none, it is damaged, or it names classes that are not matgl's.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    try:
        _check_classes(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions: what the model knows is tested
            return _matgl().load_model(folder).eval()
    except MatglModelError:
        raise
    except _NOT_A_MODEL as error:
        raise MatglModelError(f"{folder} holds no model that matgl {version('matgl')} can load: {error}") from error


def check(model: Any, name: str, known: tuple[KnownValue, ...]) -> None:
    """Refuse a model that does not know what is known.

    Raises:
        MatglModelError: Naming the crystal, what the model says, and what is right.
    """
    for item in known:
        formula = item.structure.composition.reduced_formula
        try:
            found = _predict(model, item.structure)
        except Exception as error:
            raise MatglModelError(
                f"the matgl model {name} cannot be tested with {formula} ({type(error).__name__}: {error}); if it was "
                "not made for these elements, give `known` crystals of its own"
            ) from error
        if not abs(found - item.value) <= item.tolerance:
            raise MatglModelError(
                f"the matgl model {name} gives {found:.3f} for {formula}, expected {item.value:g} ± {item.tolerance:g}."
                " Weights of an older matgl load into this one and are wrong, without a warning: use weights made with "
                f"matgl {version('matgl')}, or state another scale, or `known` crystals if it was made for other things"
            )


def is_potential(model: Any) -> bool:
    """Return whether a model gives energies with forces."""
    return isinstance(model, importlib.import_module("matgl.apps.pes").Potential)


def _predict(model: Any, structure: Structure) -> float:
    """Return a potential's energy in eV/atom, or a model's property."""
    if is_potential(model):
        relaxed = relax_one(structure, RelaxSettings(max_steps=0), calculator=_calculator(model))
        if relaxed.status is RelaxStatus.FAILED:
            raise RelaxError(relaxed.reason)
        return relaxed.energy
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        value = model.predict_structure(structure)
    if value.numel() != 1:
        raise MatglModelError(f"the model gives {value.numel()} numbers per structure, expected one")
    return float(value)


def _calculator(model: Any) -> Any:
    return importlib.import_module("matgl.ext.ase").PESCalculator(model, stress_unit="eV/A3", use_voigt=True)


@cache
def _matgl() -> Any:
    return importlib.import_module("matgl")  # takes five seconds and thousands of modules


def _downloaded(name: str) -> Path:
    """Return the folder of a model from the hub."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - comes with matgl, and only names need it

    repository = name if "/" in name else f"{HUB_OWNER}/{name}"
    try:
        files = [Path(hf_hub_download(repo_id=repository, filename=file)) for file in FILES]
    except Exception as error:  # the hub's client raises many kinds, requests' among them
        first_line = (str(error).splitlines() or [""])[0]
        raise MatglModelError(
            f"there is no folder {name}, and {repository} cannot be downloaded: {type(error).__name__}: {first_line}"
        ) from error
    return files[0].parent


def _check_classes(folder: Path) -> None:
    """Refuse files that name anything but matgl's own models, because matgl would import and call it.

    Raises:
        MatglModelError: Naming the class.
    """
    if missing := [file for file in FILES if not (folder / file).is_file()]:
        raise MatglModelError(f"{folder} has no {', '.join(missing)}; a matgl model is saved with model.save(folder)")
    arguments = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    own = importlib.import_module("matgl.utils.io").IOMixIn
    for module, name in [(description["@module"], description["@class"]), *_classes(arguments)]:
        trusted = str(module).startswith(("matgl.models", "matgl.apps"))
        found = getattr(importlib.import_module(str(module)), str(name), None) if trusted else None
        if not (isinstance(found, type) and issubclass(found, own)):
            raise MatglModelError(f"{folder} names {module}.{name}, which is no model of matgl; it is not loaded")


def _classes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield module and name of every class in nested arguments."""
    if isinstance(value, dict):
        if "@class" in value or "@module" in value:
            yield value.get("@module"), value.get("@class")
        for item in value.values():
            yield from _classes(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item)
