"""Candidates and labels as other parts take them: crystals of stored records, lessons for proxies, measured rewards."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discover.candidates import key_texts
from discover.data import batch_orbits, orbits_of_structure, prepare
from discover.errors import DataError
from discover.learn import LABEL_ORDER, Lesson
from discover.oracle.base import P_METAL, Label, LabelStatus
from discover.oracle.hull import IMPLAUSIBLE, Hull
from discover.screen import PRIOR_LABELS, after_relaxation
from discover.store import Candidate, Labelled
from envs.crystal import CrystalBatch
from proxies import DensityProxy, PropertyEnsemble
from proxies.base import Prediction

IMPLIED_HULL = "implied by the proxies"
METAL = 0.05  # eV; a smaller gap of a structure counts as none
LOOKS = "looks"  # under which a round keeps what single points said
DFT = "dft"  # name that results of `discover.add_results` are stored under


def with_dft(labelled: Sequence[Labelled], added: Sequence[Labelled]) -> list[Labelled]:
    """Return labels with what DFT says of the same candidates in place of their own numbers.

    Both are on one scale: formation energies MP2020, gaps PBE. With a formation energy of DFT the whole row is that of
    DFT, with the label's gap where there are no bands. Without one, as on another scale, the row stays the label's and
    takes gap and properties from DFT; of a label that failed nothing is kept. A calculation that failed, or gives none
    of these, changes nothing.

    Args:
        labelled: Labels of a run's own oracle.
        added: Labels of DFT, in any order.
    """
    found = {item.candidate.candidate_id: item for item in added if item.label.status is not LabelStatus.FAILED}
    return [
        item if (better := found.get(item.candidate.candidate_id)) is None else _improved(item, better)
        for item in labelled
    ]


def _improved(own: Labelled, better: Labelled) -> Labelled:
    gap_kept, energy_kept = (math.isnan(x) for x in (better.label.band_gap, better.label.formation_energy_per_atom))
    if gap_kept and energy_kept and not better.label.properties:
        return own
    gap = own.label.band_gap if gap_kept else better.label.band_gap
    mine = {name: value for name, value in own.label.properties.items() if name != P_METAL or gap_kept}
    properties = {**mine, **better.label.properties}
    if energy_kept and own.label.status is not LabelStatus.FAILED:
        # Reason, steps and structure belong to the energy.
        label = replace(own.label, band_gap=gap, properties=properties)
        return replace(own, label=label, oracle=f"{better.oracle}+{own.oracle}")
    seconds = own.label.seconds  # what the run spent
    label = replace(better.label, band_gap=gap, properties=properties, seconds=seconds)
    above, hull = better.e_above_hull, better.hull
    if math.isnan(above):  # both energies lie above the same hull, whatever it is
        above = own.e_above_hull + (label.formation_energy_per_atom - own.label.formation_energy_per_atom)
        hull = own.hull
    mixed = gap_kept and not math.isnan(gap)
    return Labelled(own.candidate, label, above, hull, f"{better.oracle}+{own.oracle}" if mixed else better.oracle)


def lesson_of(labelled: Sequence[Labelled], *, relaxed: bool = True) -> Lesson:
    """Return what proxies learn from labels: each crystal as it was proposed, and as it came out of the relaxation.

    The first teaches what becomes of a proposal, the second what the relaxed crystal is. Failures have no numbers, and
    are left out. An energy further below the hull than is plausible says that the hull lacks phases, which a campaign
    that learnt it would run after; of such a label the energy above hull is not taught.
    """
    known = [item for item in labelled if _numbers(item) is not None]
    crystals = [crystals_of([item.candidate.crystal]) for item in known]
    labels = [_numbers(item) for item in known]
    for item in known if relaxed else ():
        if item.label.structure is None:
            continue
        try:
            orbits = orbits_of_structure(item.label.structure)
        except DataError:
            continue  # spglib finds no consistent symmetry: the proposal still counts
        crystals.append(batch_orbits([orbits])[0])
        labels.append(_numbers(item))
    if not crystals:
        return Lesson(crystals_of([]), torch.zeros(0, 3, dtype=torch.float64))
    return Lesson(CrystalBatch.cat(crystals), torch.tensor(labels, dtype=torch.float64))


def look_record(name: str, crystals: CrystalBatch, row: int, energy: float, above: float) -> dict[str, Any]:
    """Return what a single point said of one crystal as built, for JSON.

    Args:
        name: Id of the candidate.
        crystals: Crystals as built.
        row: Which one.
        energy: Formation energy in eV/atom.
        above: Energy above hull in eV/atom.
    """
    return {"candidate_id": name, "crystal": record_of(crystals, row), "energy": energy, "above_hull": above}


def lesson_of_looks(looks: Sequence[Mapping[str, Any]], labelled: Sequence[Labelled]) -> Lesson:
    """Return what proxies learn of crystals that were looked at and not checked: the energies they would relax to.

    These are means for the energy above hull as built (`discover.screen`), shifted by what the labels so far differ
    from their own looks. Of a crystal that was looked at in several rounds the lowest counts. Gaps are NaN.

    Args:
        looks: What `look_record` wrote, above the hull of a file.
        labelled: The labels so far.
    """
    known = [item for item in looks if item["above_hull"] is not None]  # None: of an element that the hull lacks
    energy, built = (np.array([item[name] for item in known], dtype=float) for name in ("energy", "above_hull"))
    above = after_relaxation(built)
    energy = energy - built + above
    found = {item.candidate.candidate_id: item.label.formation_energy_per_atom for item in labelled}
    errors = np.array([found.get(item["candidate_id"], math.nan) for item in known]) - energy
    errors = errors[np.isfinite(errors)]
    shift = errors.sum() / (PRIOR_LABELS + len(errors))
    crystals, checked = crystals_of(item["crystal"] for item in known), {item.candidate.key for item in labelled}
    keys = key_texts(crystals)
    lowest = {keys[row]: row for row in np.argsort(-energy, kind="stable").tolist()}
    rows = sorted(row for key, row in lowest.items() if key not in checked)
    plausible = np.where(above + shift < IMPLAUSIBLE, np.nan, above + shift)
    labels = np.column_stack([energy + shift, plausible, np.full(len(known), np.nan)])
    return Lesson(crystals.select(rows), torch.from_numpy(labels[rows]))


def given_lesson(path: str) -> Lesson:
    """Return the labels of a user's file.

    Raises:
        DataError: If it cannot be read.
    """
    data = prepare(path)
    return Lesson(data.crystals, torch.stack([data.labels[name] for name in LABEL_ORDER], dim=1))


def joined(first: Lesson, second: Lesson) -> Lesson:
    """Return two lessons as one."""
    return Lesson(CrystalBatch.cat([first.crystals, second.crystals]), torch.cat([first.labels, second.labels]))


def _numbers(item: Labelled) -> tuple[float, float, float] | None:
    gap = item.label.band_gap
    taught = item.hull != IMPLIED_HULL and item.e_above_hull >= IMPLAUSIBLE  # proxies do not teach themselves
    values = (
        item.label.formation_energy_per_atom,
        item.e_above_hull if taught else math.nan,
        0.0 if gap < METAL else gap,
    )
    return None if all(math.isnan(value) for value in values) else values


def implied_hull(ensemble: PropertyEnsemble, crystals: CrystalBatch) -> Tensor:
    """Return (n,) the formation energy in eV/atom at which proxies place the hull below each crystal."""
    predicted = ensemble.predict_all(crystals)
    hull: Tensor = predicted["formation_energy_per_atom"].mean - predicted["e_above_hull"].mean
    return hull.double()


def above_hull(hull: Hull | None, start: PropertyEnsemble | None, candidate: Candidate, label: Label) -> float:
    """Return the energy above hull of a label in eV/atom, NaN where unknown.

    Args:
        hull: The hull of a file; None: the one that the proxies imply, formation energy minus energy above hull.
        start: The proxies that the run started with, None where they are of a kind that cannot learn.
        candidate: What was labelled.
        label: What was found.
    """
    energy = label.formation_energy_per_atom
    if hull is not None:
        structure = label.structure or candidate.structure
        return math.nan if structure is None else float(hull.e_above_hull([structure.composition], [energy])[0])
    return math.nan if start is None else energy - float(implied_hull(start, crystals_of([candidate.crystal]))[0])


def record_of(crystals: CrystalBatch, row: int) -> dict[str, Any]:
    """Return one crystal as JSON holds it."""
    used = crystals.counts[row] > 0
    return {
        "space_group": int(crystals.space_group[row]),
        "elements": crystals.elements[row][used].tolist(),
        "letters": crystals.letters[row][used].tolist(),
        "counts": crystals.counts[row][used].tolist(),
        "lattice": crystals.lattice_parameters[row].tolist(),
    }


def crystals_of(records: Iterable[Mapping[str, Any]]) -> CrystalBatch:
    """Return crystals that `record_of` wrote."""
    rows = list(records)
    width = max((len(row["elements"]) for row in rows), default=1)

    def padded(name: str, value: int) -> Tensor:
        values = [[*row[name], *[value] * (width - len(row[name]))] for row in rows]
        return torch.tensor(values, dtype=torch.int64).reshape(len(rows), width)

    return CrystalBatch(
        torch.tensor([row["space_group"] for row in rows], dtype=torch.int64),
        padded("elements", 0),
        padded("letters", -1),
        padded("counts", 0),
        torch.tensor([row["lattice"] for row in rows], dtype=torch.float64).reshape(len(rows), 6),
    )


def measured(labelled: Sequence[Labelled], crystals: CrystalBatch) -> dict[str, Prediction]:
    """Return each property as it was measured, as sure predictions (n,); what was not measured is as it was predicted.

    Args:
        labelled: The labels.
        crystals: As they were proposed, in the same order.
    """
    labels = [item.label for item in labelled]
    proposed = DensityProxy().predict(crystals).mean.tolist()
    relaxed = [math.nan if label.structure is None else float(label.structure.density) for label in labels]
    numbers = {
        "formation_energy_per_atom": [label.formation_energy_per_atom for label in labels],
        "e_above_hull": [item.e_above_hull for item in labelled],
        "band_gap": [label.band_gap for label in labels],
        "density": [new if not math.isnan(new) else old for new, old in zip(relaxed, proposed, strict=True)],
    }
    known: dict[str, Prediction] = {}
    for name, values in numbers.items():
        guesses = [item.candidate.predictions.get(name, (math.nan, math.nan)) for item in labelled]
        mean, std = torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.float64)
        missing = mean.isnan()
        mean[missing] = torch.tensor([guess[0] for guess in guesses], dtype=torch.float64)[missing]
        std[missing] = torch.tensor([guess[1] for guess in guesses], dtype=torch.float64)[missing]
        known[name] = Prediction(mean, std, (mean < METAL).double() if name == "band_gap" else None)
    return known
