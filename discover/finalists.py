"""What a chemist checks of the structures that a run ends with.

Distances against radii, oxidation states, bond valences, symmetry and volume before and after relaxation, stability and
what the structure would decay into, and the nearest known material. Nothing here decides: it is laid out so that a
person can. `Checks.remarks` says in words what is unusual, by the limits that stand below.

Bond valences use the parameters of O'Keeffe & Brese 1991 (J. Am. Chem. Soc. 113, 3226, doi:10.1021/ja00009a002), as
pymatgen ships them. They are made from two numbers per element, so that sums of sound structures can be off by 20 %:
the deviation that counts is the one against the sums that the same parameters give for the ions in the ICSD.
"""

import base64
import html
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pandas as pd
import spglib
import torch
from ase.data import covalent_radii
from numpy.typing import NDArray
from pymatgen.core import Composition, Element, Species, Structure
from pymatgen.core.bond_valence import BV_PARAMS, ICSD_BV_DATA, BVAnalyzer, calculate_bv_sum
from tqdm import tqdm

from discover.nearest import Likeness, Nearest, Reference, find_nearest
from discover.oracle.hull import Hull
from discover.oxidation import assign, assignment_strings

SYMPREC_BUILT, SYMPREC_RELAXED = 0.01, 0.1  # Å; as for labels: built structures are exact, relaxed ones are not
NEIGHBOUR_RADIUS = 4.0  # Å; a bond of this length has a valence below 0.02
_MOST_PERMUTATIONS = 10_000  # of oxidation states over sites: bounds the time for a large cell
_REACH = (5.0, 10.0, 20.0)  # Å within which neighbours are looked for, in turn

# What is unusual enough for a remark.
SHORT = 0.75  # of the sum of radii; real contacts lie above 0.85, those inside molecular ions near 0.8
UNUSUAL_OXIDATION = -5.0  # oxidation score, see discover.oxidation
UNUSUAL_BOND_VALENCE = 4.0  # standard deviations of the ion's sum in the ICSD
LARGE_VOLUME_CHANGE = 0.10
METASTABLE = 0.1  # eV/atom above the hull


class SymmetryChange(StrEnum):
    """What relaxation did to the symmetry."""

    KEPT = "kept"
    LOST = "lost"
    GAINED = "gained"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A structure to check.

    Args:
        name: Its id.
        built: As it was proposed, None if that was not kept.
        relaxed: As it was labelled.
        is_relaxed: Whether the oracle relaxed it; else `relaxed` is as it was proposed.
        formation_energy: eV/atom on the scale of the hull, NaN if there is none.
        second_energy: The same by another potential.
    """

    name: str
    built: Structure | None
    relaxed: Structure
    is_relaxed: bool = True
    formation_energy: float = math.nan
    second_energy: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Contact:
    """The pair of atoms that is closest for its size."""

    ratio: float  # distance over the sum of radii, NaN for an atom without neighbours
    distance: float  # Å
    pair: str  # "Ti-O"
    radii: Literal["ionic", "covalent"]


@dataclass(frozen=True, kw_only=True)
class BondValence:
    """Bond-valence sums against oxidation states; NaN and a reason where the parameters do not allow them.

    Args:
        sums: Mean sum in valence units of the sites of each ion, such as {"Ti4+": 3.80, "O2-": -1.90}.
        global_instability: Root mean square over sites of sum minus oxidation state, in valence units (Salinas-Sanchez
            et al. 1992, doi:10.1016/0022-4596(92)90094-C).
        deviation: Largest distance of a sum from the ion's mean in the ICSD, over the standard deviation there.
        reason: Why there are none.
    """

    sums: Mapping[str, float] = field(default_factory=dict)
    global_instability: float = math.nan
    deviation: float = math.nan
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What was found about one structure.

    Args:
        name: Its id.
        formula: Reduced.
        n_atoms: In the relaxed cell.
        is_relaxed: Whether the oracle relaxed it; else everything is said of the structure as it was proposed.
        contact: The shortest distance for the size of its atoms, after relaxation.
        oxidation_states: Most frequent neutral assignment, such as "Ti4+ O2-"; of mixed valence one by bond valences,
            such as "Fe2+ Fe3+ O2-"; "" if there is none.
        oxidation_score: Sum of log frequencies (`discover.oxidation`), -inf without an assignment of one state each.
        bond_valence: Sums of the relaxed structure.
        space_group_built: By spglib at 0.01 Å, None if unknown.
        space_group: After relaxation, at 0.1 Å.
        symmetry: What became of it.
        volume_change: Volume per atom after relaxation over that before, minus 1; NaN without the built structure.
        formation_energy: eV/atom.
        e_above_hull: eV/atom, negative for a new stable phase; NaN if unknown.
        decomposition: Share of atoms of each phase that it would decay into, the largest first.
        stability_reason: Why the stability is unknown.
        second_above_hull: eV/atom by another potential, NaN if none was asked.
        nearest: The nearest known material, None without a reference.
    """

    name: str
    formula: str
    n_atoms: int
    is_relaxed: bool
    contact: Contact
    oxidation_states: str
    oxidation_score: float
    bond_valence: BondValence
    space_group_built: int | None
    space_group: int | None
    symmetry: SymmetryChange
    volume_change: float
    formation_energy: float
    e_above_hull: float
    decomposition: Mapping[str, float]
    stability_reason: str
    second_above_hull: float
    nearest: Nearest | None

    @property
    def reaction(self) -> str:
        """Return the decay of one formula unit, such as "CaTiO3 → CaO + TiO2", "" if unknown."""
        if not self.decomposition:
            return ""
        n_atoms = Composition(self.formula).num_atoms
        terms = []
        for phase, share in self.decomposition.items():
            amount = share * n_atoms / Composition(phase).num_atoms
            terms.append(phase if abs(amount - 1) < 5e-4 else f"{amount:.3g} {phase}")
        return f"{self.formula} → {' + '.join(terms)}"

    def remarks(self) -> list[str]:
        """Return in words what is unusual about the structure, the gravest first; nothing if nothing is."""
        return list(_remarks(self))


def check_finalists(
    finalists: Sequence[Finalist],
    *,
    hull: Hull | None = None,
    reference: Reference | None = None,
    n_workers: int = 1,
) -> list[Checks]:
    """Return the checks of each structure, in order.

    Args:
        finalists: The structures; they must be ordered.
        hull: Known phases; without them stability is unknown.
        reference: Known materials; without them nothing is compared.
        n_workers: Processes that compare with the reference, see `discover.nearest.find_nearest`.
    """
    nearest: Sequence[Nearest | None] = [None] * len(finalists)
    if reference is not None:
        nearest = find_nearest([finalist.relaxed for finalist in finalists], reference, n_workers=n_workers)
    return [
        check_finalist(finalist, hull=hull, nearest=known)
        for finalist, known in zip(
            tqdm(finalists, desc="checking finalists", disable=None, delay=2), nearest, strict=True
        )
    ]


def check_finalist(finalist: Finalist, *, hull: Hull | None = None, nearest: Nearest | None = None) -> Checks:
    """Return the checks of one structure; see `check_finalists`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of elements without electronegativity and of spin states
        return _check(finalist, hull, nearest)


def _check(finalist: Finalist, hull: Hull | None, nearest: Nearest | None) -> Checks:
    relaxed = finalist.relaxed
    built = finalist.built if finalist.is_relaxed else None
    composition = relaxed.composition
    score, text, states = oxidation_states(relaxed)
    before = (None, 0.0) if built is None else symmetry(built, SYMPREC_BUILT)
    after = symmetry(relaxed, SYMPREC_RELAXED)
    e_above_hull, decomposition, reason = _stability(composition, finalist.formation_energy, hull)
    change = math.nan if built is None else relaxed.volume / len(relaxed) / (built.volume / len(built)) - 1
    return Checks(
        name=finalist.name,
        formula=composition.reduced_formula,
        n_atoms=len(relaxed),
        is_relaxed=finalist.is_relaxed,
        contact=shortest_contact(relaxed, states),
        oxidation_states=text,
        oxidation_score=score,
        bond_valence=bond_valence(relaxed, states),
        space_group_built=before[0],
        space_group=after[0],
        symmetry=_symmetry_change(before, after),
        volume_change=change,
        formation_energy=finalist.formation_energy,
        e_above_hull=e_above_hull,
        decomposition=decomposition,
        stability_reason=reason,
        second_above_hull=_stability(composition, finalist.second_energy, hull)[0],
        nearest=nearest,
    )


# --- single checks -------------------------------------------------------------------------------


def oxidation_states(structure: Structure) -> tuple[float, str, NDArray[np.float64] | None]:
    """Return the oxidation score, the states as text, and (n_atoms,) the state of each site, None if there are none.

    One state per element, the most frequent neutral assignment (`discover.oxidation`). Where none exists, as in Fe3O4,
    pymatgen assigns states to sites by their bond valences; the score stays -inf.
    """
    numbers = np.array([site.specie.Z for site in structure], dtype=np.int64)
    assignments = assign(torch.bincount(torch.from_numpy(numbers), minlength=119)[None])
    score = float(assignments.score[0])
    if math.isfinite(score):
        return score, assignment_strings(assignments)[0], assignments.states[0].numpy()[numbers].astype(np.float64)
    try:
        valences = BVAnalyzer(max_permutations=_MOST_PERMUTATIONS).get_valences(structure)
    except (ValueError, KeyError, ArithmeticError):  # it found no neutral combination, or lacks an element
        return score, "", None
    states = np.array(valences, dtype=np.float64)
    ions = sorted({_ion(structure, i, states) for i in range(len(structure))}, key=lambda ion: (ion.X, ion.oxi_state))
    return score, " ".join(_ion_text(ion) for ion in ions), states


def shortest_contact(structure: Structure, states: NDArray[np.float64] | None) -> Contact:
    """Return the pair of atoms with the least distance over the sum of their radii.

    Radii are Shannon's crystal radii for six neighbours (1976, doi:10.1107/S0567739476001551), with the coordination
    averaged where six is not tabulated, if every ion has one; else the covalent radii of Cordero et al. 2008
    (doi:10.1039/b801115j). A sound ionic crystal is near 1, a molecular ion such as carbonate near 0.8.

    Args:
        structure: The structure.
        states: (n_atoms,) oxidation states, or None.
    """
    ionic = None if states is None else _ionic_radii(structure, states)
    radii = np.array([covalent_radii[site.specie.Z] for site in structure]) if ionic is None else ionic
    kind: Literal["ionic", "covalent"] = "covalent" if ionic is None else "ionic"
    for reach in _REACH:
        centres, others, _, distances = structure.get_neighbor_list(reach, exclude_self=True)
        if len(distances):
            ratios = distances / (radii[centres] + radii[others])
            i = int(ratios.argmin())
            ends = sorted(
                (structure[int(j)].specie for j in (centres[i], others[i])), key=lambda end: (end.X, end.symbol)
            )
            pair = "-".join(end.symbol for end in ends)
            return Contact(ratio=float(ratios[i]), distance=float(distances[i]), pair=pair, radii=kind)
    return Contact(ratio=math.nan, distance=math.nan, pair="", radii=kind)


def bond_valence(structure: Structure, states: NDArray[np.float64] | None) -> BondValence:
    """Return bond-valence sums of a structure against its oxidation states.

    Distances are taken as they are: relaxation with PBE or a potential trained on it makes cells about 1 % too large,
    which lowers sums by some 5 %.

    Args:
        structure: The structure.
        states: (n_atoms,) oxidation states, or None.
    """
    if states is None:
        return BondValence(reason="no oxidation states")
    elements = {site.specie.symbol for site in structure}
    missing = sorted(symbol for symbol in elements if Element(symbol) not in BV_PARAMS)
    if missing:
        return BondValence(reason=f"no bond-valence parameters of {', '.join(missing)}")
    neighbours = structure.get_all_neighbors(NEIGHBOUR_RADIUS)
    sums = np.array(
        [calculate_bv_sum(site, near) for site, near in zip(structure, neighbours, strict=True)], dtype=float
    )
    ions = [_ion(structure, i, states) for i in range(len(structure))]
    known = [ICSD_BV_DATA.get(ion) for ion in ions]
    distances = [
        abs(total - data["mean"]) / data["std"]
        for total, data in zip(sums, known, strict=True)
        if data is not None and data["std"] > 0
    ]
    means = {_ion_text(ion): float(sums[[other == ion for other in ions]].mean()) for ion in ions}
    return BondValence(
        sums=means,
        global_instability=float(np.sqrt(np.mean((sums - states) ** 2))),
        deviation=float(max(distances)) if len(distances) == len(ions) else math.nan,
        reason="" if len(distances) == len(ions) else "an ion that is too rare in the ICSD",
    )


def symmetry(structure: Structure, symprec: float) -> tuple[int | None, float]:
    """Return the space group and the number of symmetry operations per atom of the cell; (None, 0) if spglib fails.

    Operations per atom count lost translations as well, so they tell a subgroup of the same type from the group.
    """
    numbers = [site.specie.Z for site in structure]
    cell = (structure.lattice.matrix.tolist(), structure.frac_coords.tolist(), numbers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # spglib 2.8 announces another way to report errors
            dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
    except spglib.SpglibError:
        dataset = None
    if dataset is None:
        return None, 0.0
    return int(dataset.number), len(dataset.rotations) / len(structure)


def _symmetry_change(before: tuple[int | None, float], after: tuple[int | None, float]) -> SymmetryChange:
    if before[0] is None or after[0] is None:
        return SymmetryChange.UNKNOWN
    if math.isclose(before[1], after[1]):
        return SymmetryChange.KEPT if before[0] == after[0] else SymmetryChange.LOST
    return SymmetryChange.LOST if after[1] < before[1] else SymmetryChange.GAINED


def _stability(
    composition: Composition, formation_energy: float, hull: Hull | None
) -> tuple[float, dict[str, float], str]:
    """Return energy above hull, decomposition, and why they are unknown."""
    if hull is None:
        return math.nan, {}, "no hull file"
    missing = hull.lacks(composition)
    if missing:
        return math.nan, {}, f"the hull file has no entry with {', '.join(missing)}"
    e_above_hull = float(hull.e_above_hull([composition], [formation_energy])[0])
    return e_above_hull, hull.decomposition(composition), "" if math.isfinite(e_above_hull) else "no formation energy"


def _ion(structure: Structure, site: int, states: NDArray[np.float64]) -> Species:
    return Species(structure[site].specie.symbol, int(states[site]))


def _ion_text(ion: Species) -> str:
    """Return an ion as `discover.oxidation` writes it, such as "Na1+"."""
    state = int(ion.oxi_state or 0)
    return f"{ion.symbol}{abs(state)}{'+' if state > 0 else '-'}"


def _ionic_radii(structure: Structure, states: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return (n_atoms,) crystal radii in Å, or None if an ion has none or a negative one, such as H+."""
    ions = [_ion(structure, i, states) for i in range(len(structure))]
    radii = {ion: float(ion.ionic_radius or math.nan) for ion in set(ions)}
    found = np.array([radii[ion] for ion in ions])
    return found if (found > 0).all() else None  # NaN is not above zero


def _remarks(checks: Checks) -> Iterator[str]:
    contact, bonds = checks.contact, checks.bond_valence
    if not checks.is_relaxed:
        yield "not relaxed, since the oracle gave numbers alone: distances are those of the proposal"
    if contact.ratio < SHORT:
        yield (
            f"{contact.pair} at {contact.distance:.2f} Å, {contact.ratio:.2f} of the {contact.radii} radii: "
            "a bond within a molecular ion, or atoms that are too close"
        )
    if not checks.oxidation_states:
        yield "no oxidation states fit: a metal, or an unlikely composition"
    elif checks.oxidation_score < UNUSUAL_OXIDATION and math.isfinite(checks.oxidation_score):
        yield f"oxidation states that are rarely reported (score {checks.oxidation_score:.1f})"
    if bonds.deviation > UNUSUAL_BOND_VALENCE:
        yield f"a bond-valence sum {bonds.deviation:.1f} standard deviations from what the ion has in the ICSD"
    if checks.symmetry is SymmetryChange.LOST:
        yield f"relaxation lowered the symmetry from {checks.space_group_built} to {checks.space_group}"
    if abs(checks.volume_change) > LARGE_VOLUME_CHANGE:
        yield f"relaxation changed the volume by {100 * checks.volume_change:+.0f} %"
    if checks.e_above_hull > METASTABLE:
        yield f"{checks.e_above_hull:.2f} eV/atom above the hull"
    if checks.nearest is not None and checks.nearest.likeness is Likeness.SAME_MATERIAL:
        yield f"known: {checks.nearest.name}"


# --- for people ----------------------------------------------------------------------------------

_HEADER = {
    "name": "id",
    "formula": "formula",
    "e_above_hull": "above hull (eV/atom)",
    "reaction": "decays into",
    "contact": "shortest distance / radii",
    "oxidation_states": "oxidation states",
    "oxidation_score": "score",
    "global_instability": "bond valences: instability index (v.u.)",
    "bond_valence_deviation": "bond valences: largest deviation (σ)",
    "symmetry": "symmetry",
    "volume_change": "volume change",
    "nearest": "nearest known",
}


def checks_table(checks: Sequence[Checks]) -> pd.DataFrame:
    """Return one row per structure with a column per check, numbers as numbers, for CSV and Parquet."""
    return pd.DataFrame([_row(one) for one in checks])


def _row(checks: Checks) -> dict[str, Any]:
    nearest = checks.nearest
    return {
        "name": checks.name,
        "formula": checks.formula,
        "n_atoms": checks.n_atoms,
        "is_relaxed": checks.is_relaxed,
        "shortest_over_radii": checks.contact.ratio,
        "shortest_distance": checks.contact.distance,
        "shortest_pair": checks.contact.pair,
        "radii": checks.contact.radii,
        "oxidation_states": checks.oxidation_states,
        "oxidation_score": checks.oxidation_score,
        "bond_valence_sums": " ".join(f"{ion}:{value:.2f}" for ion, value in checks.bond_valence.sums.items()),
        "global_instability": checks.bond_valence.global_instability,
        "bond_valence_deviation": checks.bond_valence.deviation,
        "bond_valence_reason": checks.bond_valence.reason,
        "space_group_built": checks.space_group_built,
        "space_group": checks.space_group,
        "symmetry": str(checks.symmetry),
        "volume_change": checks.volume_change,
        "formation_energy": checks.formation_energy,
        "e_above_hull": checks.e_above_hull,
        "stability_reason": checks.stability_reason,
        "second_e_above_hull": checks.second_above_hull,
        "decomposition": checks.reaction,
        "nearest_known": "" if nearest is None else nearest.name,
        "nearest_formula": "" if nearest is None else nearest.formula,
        "nearest_likeness": "" if nearest is None else str(nearest.likeness),
        "nearest_rms": math.nan if nearest is None else nearest.rms,
        "nearest_same_prototype": None if nearest is None else nearest.same_prototype,
        "nearest_reason": "" if nearest is None else nearest.reason,
        "remarks": "; ".join(checks.remarks()),
    }


def markdown_table(checks: Sequence[Checks]) -> str:
    """Return the checks as a Markdown table, a row per structure, for the summary of a run."""
    lines = ["| " + " | ".join(_HEADER.values()) + " |", "|---" * len(_HEADER) + "|"]
    for one in checks:
        words = dict(_words(one))
        lines.append("| " + " | ".join(words[key] for key in _HEADER) + " |")
    return "\n".join(lines)


def html_cards(checks: Sequence[Checks], *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return the checks as an HTML fragment with a card per structure; style and pictures are in it.

    Args:
        checks: What was found.
        pictures: PNG of a structure by its name, such as its powder pattern (`discover.xrd`).
    """
    pictures = pictures or {}
    return "\n".join(
        [_STYLE, '<div class="finalists">', *(_card(one, pictures.get(one.name)) for one in checks), "</div>"]
    )


def html_page(checks: Sequence[Checks], *, title: str, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return `html_cards` as a page of its own."""
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>'
    return f"{head}<body><h1>{html.escape(title)}</h1>\n{html_cards(checks, pictures=pictures)}\n</body></html>\n"


_STYLE = """<style>
.finalists { display: flex; flex-wrap: wrap; gap: 14px; font: 14px/1.35 system-ui, sans-serif; color: #222; }
.finalists .card { border: 1px solid #ccc; border-radius: 6px; padding: 10px 14px; width: 430px; background: #fff;
  break-inside: avoid; }
.finalists h3 { margin: 0 0 6px; font-size: 18px; color: #1f5fa8; }
.finalists h3 small { float: right; color: #666; font-weight: normal; font-size: 13px; }
.finalists table { border-collapse: collapse; width: 100%; }
.finalists th { text-align: left; font-weight: normal; color: #666; padding: 1px 10px 1px 0; vertical-align: top;
  width: 38%; }
.finalists td { padding: 1px 0; vertical-align: top; }
.finalists ul { margin: 8px 0 0; padding-left: 18px; color: #a8481a; }
.finalists img { width: 100%; margin-top: 8px; }
</style>"""


def _card(checks: Checks, picture: bytes | None) -> str:
    name = html.escape(checks.name)
    words = dict(_words(checks))
    rows = [
        f"<tr><th>{html.escape(label)}</th><td>{html.escape(words[key])}</td></tr>"
        for key, label in _HEADER.items()
        if key not in ("name", "formula")
    ]
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in checks.remarks())
    image = ""
    if picture is not None:
        image = f'<img alt="powder pattern of {name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    formula = "".join(
        f"<sub>{part}</sub>" if part.isdigit() else html.escape(part) for part in _formula_parts(checks.formula)
    )
    return "\n".join(
        [
            f'<div class="card"><h3>{formula} <small>{name}</small></h3>',
            f"<table>{''.join(rows)}</table>",
            f"<ul>{remarks}</ul>" if remarks else "",
            f"{image}</div>",
        ]
    )


def _formula_parts(formula: str) -> list[str]:
    """Return a formula split into numbers and the rest."""
    parts: list[str] = []
    for character in formula:
        if parts and parts[-1][-1].isdigit() == character.isdigit():
            parts[-1] += character
        else:
            parts.append(character)
    return parts


def _words(checks: Checks) -> Iterator[tuple[str, str]]:
    """Yield (column, text) of each check, as people read it."""
    contact, bonds, nearest = checks.contact, checks.bond_valence, checks.nearest
    yield "name", checks.name
    yield "formula", checks.formula
    above, second = _number(checks.e_above_hull, ".3f"), _number(checks.second_above_hull, ".3f")
    second = f" ({second} by the second potential)" if second else ""
    yield "e_above_hull", (above or f"unknown: {checks.stability_reason}") + second
    products = checks.reaction.partition(" → ")[2]
    yield "reaction", f"the known phase of {products}" if products == checks.formula else products
    text = _number(contact.ratio, ".2f")
    yield "contact", f"{text} ({contact.pair} {contact.distance:.2f} Å, {contact.radii})" if text else "no neighbours"
    yield "oxidation_states", checks.oxidation_states or "none fit"
    yield "oxidation_score", _number(checks.oxidation_score, ".1f") or "none"
    yield "global_instability", _number(bonds.global_instability, ".2f") or bonds.reason
    yield "bond_valence_deviation", _number(bonds.deviation, ".1f") or bonds.reason
    before = "?" if checks.space_group_built is None else str(checks.space_group_built)
    yield "symmetry", f"{before} → {checks.space_group or '?'}, {checks.symmetry}"
    yield "volume_change", f"{100 * checks.volume_change:+.1f} %" if math.isfinite(checks.volume_change) else "unknown"
    yield "nearest", "no reference" if nearest is None else _nearest_words(nearest)


def _nearest_words(nearest: Nearest) -> str:
    left_out = f" ({nearest.reason})" if nearest.reason else ""
    if nearest.likeness is Likeness.NONE:
        return f"{nearest.likeness}{left_out}"
    ids = f"{nearest.formula} ({nearest.material_id})" if nearest.material_id else nearest.formula
    rms = f", rms {nearest.rms:.3f}" if math.isfinite(nearest.rms) else ""
    prototype = {True: ", same prototype", False: ", another prototype", None: ""}[nearest.same_prototype]
    return f"{ids}: {nearest.likeness}{rms}{prototype}{left_out}"


def _number(value: float, form: str) -> str:
    return format(value, "z" + form) if math.isfinite(value) else ""
