"""What a store holds, and how it is written into rows: NaN as NULL, structures and mappings as JSON text."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymatgen.core import Lattice, Structure
from sqlalchemy import Row

from discover.oracle.base import Label, LabelStatus
from discover.store_schema import StoreError

LABEL_NUMBERS = (
    "energy_per_atom",
    "formation_energy_per_atom",
    "initial_formation_energy_per_atom",
    "band_gap",
    "seconds",
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One crystal that a round chose.

    Args:
        candidate_id: Unique in its run, such as "r01-0007".
        round: The round that chose it.
        source: Where it came from, such as "sampler" or "substitution".
        crystal: What JSON can hold of it: space_group, elements [Z..], letters [..], counts [..], lattice
            [a, b, c, alpha, beta, gamma] in Å and degrees.
        key: Canonical text of the crystal without its lattice: equal for crystals that count as the same.
        formula: Reduced.
        chemical_system: Such as "O-Ti".
        space_group: International number, 1 to 230.
        n_atoms: In the primitive cell.
        prototype: Name of its kind of structure.
        log_reward: Natural log of the reward when it was chosen.
        acquisition: The score it was chosen by.
        predictions: Mean and standard deviation of each property when it was chosen, in the property's unit.
        structure: As built; None where no coordinates were found.
    """

    candidate_id: str
    round: int
    source: str
    crystal: Mapping[str, Any]
    key: str
    formula: str
    chemical_system: str
    space_group: int
    n_atoms: int
    prototype: str
    log_reward: float
    acquisition: float
    predictions: Mapping[str, tuple[float, float]]
    structure: Structure | None


@dataclass(frozen=True)
class Labelled:
    """A candidate with one label.

    Args:
        candidate: What was labelled.
        label: What was found.
        e_above_hull: eV/atom, NaN if unknown.
        hull: Name of the hull that it refers to.
        oracle: Name of what made the label; of `discover.campaign_records.with_dft` both names where it took from both.
    """

    candidate: Candidate
    label: Label
    e_above_hull: float
    hull: str
    oracle: str = ""


@dataclass(frozen=True)
class Seen:
    """A crystal that was proposed, whether or not it was chosen; `log_reward` is NaN if it has none."""

    key: str
    round: int
    formula: str
    space_group: int
    log_reward: float


def candidate_row(candidate: Candidate) -> dict[str, Any]:
    """Return the columns of a candidate, but its run and its place in the round; `StoreError` for what they refuse."""
    name = candidate.candidate_id
    return {
        "candidate_id": name,
        "round": int(candidate.round),
        "source": str(candidate.source),
        "crystal": to_json(candidate.crystal, f"crystal of {name}"),
        "key": candidate.key,
        "formula": candidate.formula,
        "chemical_system": candidate.chemical_system,
        "space_group": int(candidate.space_group),
        "n_atoms": int(candidate.n_atoms),
        "prototype": candidate.prototype,
        "log_reward": null_if_nan(candidate.log_reward, f"log_reward of {name}"),
        "acquisition": null_if_nan(candidate.acquisition, f"acquisition of {name}"),
        "predictions": to_json(candidate.predictions, f"predictions of {name}"),
        "structure": structure_text(candidate.structure, name),
    }


def read_candidate(row: Row[Any]) -> Candidate:
    """Return the candidate of a row of `candidates`."""
    predictions = from_json(row.predictions)
    return Candidate(
        candidate_id=row.candidate_id,
        round=row.round,
        source=row.source,
        crystal=from_json(row.crystal),
        key=row.key,
        formula=row.formula,
        chemical_system=row.chemical_system,
        space_group=row.space_group,
        n_atoms=row.n_atoms,
        prototype=row.prototype,
        log_reward=nan_if_null(row.log_reward),
        acquisition=nan_if_null(row.acquisition),
        predictions={name: (nan_if_null(mean), nan_if_null(std)) for name, (mean, std) in predictions.items()},
        structure=read_structure(row.structure),
    )


def label_row(label: Label) -> dict[str, Any]:
    """Return the columns of a label, but whose it is and how far from the hull; `StoreError` for what they refuse."""
    properties = {str(name): null_if_nan(value, f"property {name}") for name, value in label.properties.items()}
    return {
        "status": str(label.status),
        "reason": _plain_text(label.reason),
        "structure": structure_text(label.structure, "the label"),
        **{name: null_if_nan(getattr(label, name), name) for name in LABEL_NUMBERS},
        "properties": to_json(properties, "properties"),
        "space_group_before": _whole(label.space_group_before),
        "space_group_after": _whole(label.space_group_after),
        "n_steps": int(label.n_steps),
    }


def read_label(row: Row[Any]) -> Label:
    """Return the label of a row of `labels`, whose structure is in the column `relaxed`."""
    return Label(
        status=LabelStatus(row.status),
        reason=row.reason,
        structure=read_structure(row.relaxed),
        **{name: nan_if_null(getattr(row, name)) for name in LABEL_NUMBERS},
        properties={name: nan_if_null(value) for name, value in from_json(row.properties).items()},
        space_group_before=row.space_group_before,
        space_group_after=row.space_group_after,
        n_steps=row.n_steps,
    )


def seen_row(candidate: Candidate) -> dict[str, Any]:
    """Return what `seen` keeps of a candidate, but its run; `StoreError` if its log reward is infinite."""
    return {
        "key": candidate.key,
        "round": int(candidate.round),
        "formula": candidate.formula,
        "space_group": int(candidate.space_group),
        "log_reward": null_if_nan(candidate.log_reward, f"log_reward of {candidate.candidate_id}"),
    }


def read_seen(row: Row[Any]) -> Seen:
    """Return the record of a row of `seen`."""
    return Seen(row.key, row.round, row.formula, row.space_group, nan_if_null(row.log_reward))


def null_if_nan(value: float, name: str) -> float | None:
    """Return a float for a column: None for NaN."""
    number = float(value)
    if math.isinf(number):
        raise StoreError(f"{name} is {number}; the store takes finite numbers, and NaN for what is unknown")
    return None if math.isnan(number) else number


def nan_if_null(value: float | None) -> float:
    """Return NaN for NULL."""
    return math.nan if value is None else value


def _whole(value: int | None) -> int | None:
    return None if value is None else int(value)


def _plain_text(value: str) -> str:
    """Return text that every database takes: PostgreSQL refuses the null character, and both refuse half characters."""
    return value.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")


def to_json(value: Any, name: str, *, sort_keys: bool = False) -> str:
    """Return JSON text in ASCII, NaN as null, NumPy values as numbers and lists.

    Raises:
        StoreError: For an infinite number, or what JSON cannot hold; `name` says where.
    """
    # Kept within ASCII, so that no character of it can offend a database.
    return json.dumps(_plain(value, name), separators=(",", ":"), allow_nan=False, sort_keys=sort_keys)


def from_json(text: str | None) -> Any:
    """Return the value of a JSON text, an empty mapping where there is none."""
    return json.loads(text or "{}")


def _plain(value: Any, name: str) -> Any:
    """Return what JSON can hold: NumPy values and tensors as numbers and lists, NaN as None, paths as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return null_if_nan(value, name)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), name)
    raise StoreError(f"{name} holds a {type(value).__name__}; the store takes what JSON can hold")


def structure_text(structure: Structure | None, name: str) -> str | None:
    """Return a structure as JSON: rows of the lattice in Å, atomic numbers, fractional coordinates, every digit.

    Raises:
        StoreError: If a site is shared by elements or partly empty, or a number is not finite.
    """
    if structure is None:
        return None
    if not structure.is_ordered:
        raise StoreError(f"the structure of {name} is disordered; every site must hold one element with occupancy 1")
    content = {
        "lattice": structure.lattice.matrix,
        "atomic_numbers": [site.specie.Z for site in structure],
        "frac_coords": structure.frac_coords,
    }
    if any(math.isnan(number) for key in ("lattice", "frac_coords") for number in content[key].flatten().tolist()):
        raise StoreError(f"the structure of {name} holds NaN; give no structure where there is none")
    return to_json(content, f"structure of {name}")


def read_structure(text: str | None) -> Structure | None:
    """Return the structure of a text of `structure_text`."""
    if text is None:
        return None
    content = json.loads(text)
    return Structure(Lattice(content["lattice"]), content["atomic_numbers"], content["frac_coords"])
