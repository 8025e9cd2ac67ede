"""Figures of de novo generation: validity, coverage, distances, novelty; stability and S.U.N. after relaxation.

Structures are taken one after another as they come, none selected, and one that fails stays in every denominator.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure

from discover.build import careful_generator, seeded
from discover.config import EvaluateConfig, SampleConfig
from discover.data import Orbits, PreparedData, batch_orbits, orbits_of_structure, prepare
from discover.errors import ConfigError, DataError
from discover.generate import generate, lattice_mode, searched
from discover.metrics import coverage, distributions, stability
from discover.metrics.description import Descriptions, describe, describe_file
from discover.metrics.novelty_uniqueness import novel_structures, unique_structures
from discover.metrics.stability import HULL_SHIFTS, Outcomes, Rate, rate
from discover.metrics.validity import compositional_validity, structural_validity
from discover.oracle.hull import Hull
from discover.oracle.relax import Relaxation, RelaxStatus, relax, values
from discover.prototypes import prototype_keys
from discover.run_folder import write_atomic
from discover.sample import load_run
from discover.structure.orbits import parameters_of_data, to_structures
from discover.structure_files import extxyz_text, read_cif, read_table
from discover.substitution import substitute
from discover.train_sampler import draw_crystals
from discover.worker_pool import map_in_workers

_MIN_FOR_POOL = 5000  # starting workers takes longer than the symmetry of fewer structures
STABLE_TRAINING = 0.08  # eV/atom above hull, the criterion of MP-20
PROTOCOL = {
    "structural_validity": "CDVAE: no two atoms within 0.5 Å, cell of at least 0.1 Å^3",
    "compositional_validity": "CDVAE: SMACT with Pauling's order, alloys and elements pass",
    "coverage": "CDVAE: CrystalNN 0.4, Magpie 10 in standard deviations of the reference, all generated crystals",
    "distances": "CDVAE: Wasserstein-1 over valid crystals (all; 1,000 of them as published); floor: training rows "
    "below 0.08 eV/atom, as many as were generated",
    "space_groups": "Jensen-Shannon distance, base e, SpacegroupAnalyzer symprec 0.1, valid crystals",
    "unique_novel": "StructureMatcher at its defaults among structures of one formula; novel against the training data",
    "stability": "CHGNet 0.3.0 relaxation of cell and atoms (fmax 0.1 eV/Å, 200 steps), MP2020 formation energy "
    "against the hull file; stable <= 0, metastable <= 0.1 eV/atom; the first structures in order, failures unstable",
    "sun": "stable, unique among the relaxed, novel: formula absent from the hull file (main), or structure absent "
    "from the training data (for comparison)",
}
Figures = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Structures to be judged, in the order in which they were made."""

    source: str
    structures: list[Structure | None]
    seconds: float  # CPU time to make them; NaN for structures from a file


class Training:
    """What a training set knows: its structures by formula, its prototypes, and its stable rows."""

    def __init__(self, path: Path, data: PreparedData) -> None:
        self.path = path
        self.data = data
        self._parameters = parameters_of_data(data)
        self._rows = dict(pd.Series(np.arange(len(data))).groupby(data.formulas).indices)
        self._prototypes = set(prototype_keys(data.crystals).tolist())

    def structures(self, rows: torch.Tensor) -> list[Structure]:
        """Return the structures of some rows, primitive cells."""
        return to_structures(self.data.crystals.select(rows), self._parameters[rows], primitive=True)

    def of_formula(self, formula: str) -> list[Structure]:
        """Return the structures of a reduced formula."""
        rows = self._rows.get(formula)
        return [] if rows is None else self.structures(torch.from_numpy(rows.copy()))

    def stable_rows(self) -> torch.Tensor:
        """Return the rows below 0.08 eV/atom above hull, or all where the data do not say.

        Raises:
            DataError: If the data say, and none is.
        """
        energy = self.data.labels["e_above_hull"]
        if energy.isnan().all():
            return torch.arange(len(self.data))
        rows = (energy < STABLE_TRAINING).nonzero().flatten()
        if not len(rows):
            raise DataError(f"{self.path} has no row with e_above_hull < {STABLE_TRAINING} eV/atom")
        return rows

    def known_prototypes(self, structures: Sequence[Structure | None], *, n_workers: int) -> NDArray[np.bool_]:
        """Return which structures have a prototype of the training data, (n,) bool; a failure has none."""
        present = {row: structure for row, structure in enumerate(structures) if structure is not None}
        found = map_in_workers(
            orbits_of_structure,
            list(present.values()),
            n_workers=n_workers if len(present) >= _MIN_FOR_POOL else 0,
            description="prototypes",
            unit="structure",
        )
        orbits = {row: item for row, item in zip(present, found, strict=True) if isinstance(item, Orbits)}
        known = np.zeros(len(structures), dtype=np.bool_)
        keys = prototype_keys(batch_orbits(orbits.values())[0]).tolist()
        known[list(orbits)] = [key in self._prototypes for key in keys]
        return known


def evaluate_dng(config: EvaluateConfig) -> Figures:
    """Return the figures of one sample.

    Raises:
        ConfigError, DataError, HullError: If a file is missing or unusable.
    """
    hull = None if config.hull is None else Hull.load(config.hull)  # a wrong path is said before anything slow
    training = None
    if config.train_data is not None:
        training = Training(Path(config.train_data), prepare(config.train_data, n_workers=config.n_workers))
    reference = None if config.reference is None else _read_structures(Path(config.reference))
    sample = draw_sample(config, training, hull)
    figures: Figures = {"source": sample.source, "n": len(sample.structures), "seed": config.seed}
    figures["generation_seconds_per_structure"] = sample.seconds / len(sample.structures)
    figures["validity"] = _validity(sample.structures)
    if config.reference is not None and reference is not None:
        figures |= _against_reference(config, sample, Path(config.reference), reference, training)
    figures |= _repetition(config, sample.structures, training)
    if hull is not None:
        taken = Sample(sample.source, sample.structures[: config.n_relax], sample.seconds)
        figures["stability"] = _stability(config, taken, sample, hull, training)
    figures["protocol"] = PROTOCOL
    figures = without_nan(figures)
    if config.output is not None:
        write_atomic(_folder(config.output) / "figures.json", json.dumps(figures, indent=2) + "\n")
    return figures


def draw_sample(config: EvaluateConfig, training: Training | None, hull: Hull | None) -> Sample:
    """Return the structures that a configuration asks for, made one after another.

    Raises:
        ConfigError: If the source lacks what it draws from.
    """
    if config.structures is not None:
        structures = _read_structures(Path(config.structures))[: config.n]
        return Sample(f"structures={config.structures}", structures, float("nan"))
    start = _cpu_seconds()
    if config.run is not None:
        structures = _from_run(config)
        name = f"run={config.run}"
    elif config.source == "substitution":
        if training is None or hull is None:
            raise ConfigError("source=substitution needs train_data=FILE (parents) and hull=FOLDER (known formulas)")
        rows = training.stable_rows()
        parents = training.structures(rows)
        start = _cpu_seconds()  # reading the parents is no part of the cost of a structure
        draws = seeded(config.seed, "substitution")
        structures = [*substitute(parents, config.n, known=hull.formulas, generator=draws)]
        name = config.source
    else:
        random = config.source == "random"
        letters = "prior" if random else config.letters or "composition"
        generator = careful_generator(
            "random" if random else "flow",
            lattice=lattice_mode(letters),
            n_draws=config.draws,
            pick=config.pick or "agreement",
            n_workers=config.n_workers,
        )
        structures = generate(
            config.n,
            letters=letters,
            generator=generator,
            predicted=config.predicted,
            n_workers=config.n_workers,
            seed=config.seed,
        ).structures
        drawn = f"letters={letters}, best of {config.draws} draws, pick={config.pick}"
        name = "prior, random coordinates" if random else f"prior, {drawn}"
    if config.predicted:
        name += f", the lowest in energy of these and {config.predicted} predicted"
    return Sample(name, structures, _cpu_seconds() - start)


def stability_figures(
    outcomes: Outcomes, seconds: Mapping[str, float], hull_shifts: Sequence[float] = HULL_SHIFTS
) -> Figures:
    """Return every rate at every shift of the hull, and what an S.U.N. structure cost at the hull itself.

    Args:
        outcomes: Energies above hull, uniqueness and novelty of all structures that were taken.
        seconds: CPU time of each stage.
        hull_shifts: What is added to the hull, eV/atom.
    """
    rates: dict[str, Callable[..., Rate]] = {
        "stable": stability.stable_rate,
        "metastable": stability.metastable_rate,
        "sun": stability.sun_rate,
        "metastable_sun": stability.metastable_sun_rate,
    }
    table: Figures = {
        f"hull_shift_{shift:+g}": {
            name: _shown(function(outcomes, hull_shift=shift)) for name, function in rates.items()
        }
        for shift in hull_shifts
    }
    hits = stability.sun_rate(outcomes)
    table["cpu_seconds_per_sun"] = {
        name: stability.cost_per_structure(amount, hits) for name, amount in seconds.items()
    }
    return table


def without_nan(figures: Any) -> Any:
    """Return nested figures with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(figures, Mapping):
        return {name: without_nan(value) for name, value in figures.items()}
    if isinstance(figures, list):
        return [without_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def _against_reference(
    config: EvaluateConfig,
    sample: Sample,
    path: Path,
    reference: list[Structure | None],
    training: Training | None,
) -> Figures:
    """Return coverage and distances, with those of training rows beside them."""
    target = describe_file(path, reference, n_workers=config.n_workers)
    target = target.select(target.complete)
    if not len(target):
        raise DataError(f"{path} has no structure that can be described, so there is nothing to compare with")
    found = describe(sample.structures, n_workers=config.n_workers, name="generated structures")
    figures: Figures = {"n_reference": len(target)}
    figures["generated_against_reference"] = _distances(config, sample.structures, found, target)
    if training is not None:
        stable = training.stable_rows()
        order = torch.randperm(len(stable), generator=seeded(config.seed, "floor"))
        rows = stable[order[: len(sample.structures)]]
        floor: list[Structure | None] = [*training.structures(rows)]
        key = f"floor {len(rows)} {config.seed}"
        described = describe_file(training.path, floor, n_workers=config.n_workers, selection=key)
        figures["floor_validity"] = _validity(floor)
        figures["floor_training_against_reference"] = _distances(config, floor, described, target)
    return figures


def _validity(structures: Sequence[Structure | None]) -> Figures:
    structural = structural_validity(structures)
    compositions = [None if structure is None else structure.composition for structure in structures]
    neutral = {name: compositional_validity(compositions, protocol=name) for name in ("cdvae", "smact4")}
    return {
        "without_structure": sum(structure is None for structure in structures),
        "structural": _shown(rate(structural)),
        "compositional_cdvae": _shown(rate(neutral["cdvae"])),
        "compositional_smact4": _shown(rate(neutral["smact4"])),
        "both_cdvae": _shown(rate(structural & neutral["cdvae"])),
    }


def _distances(
    config: EvaluateConfig, structures: Sequence[Structure | None], found: Descriptions, target: Descriptions
) -> Figures:
    """Return coverage of all structures, and distances of the valid ones."""
    nearest = coverage.nearest_distances(found.structure, found.composition, target.structure, target.composition)
    compositions = [None if structure is None else structure.composition for structure in structures]
    valid = structural_validity(structures) & compositional_validity(compositions) & found.complete
    rows = np.flatnonzero(valid)
    order = torch.randperm(len(rows), generator=seeded(config.seed, "published sample")).numpy()
    published = rows[order[: distributions.PUBLISHED_SAMPLE]]
    figures: Figures = {
        "coverage_recall": coverage.coverage_recall(nearest),
        "coverage_precision": coverage.coverage_precision(nearest),
        "n_valid": len(rows),
    }
    for name, chosen in (("all_valid", rows), ("published_sample", published)):
        some = found.select(chosen)
        figures[name] = (
            {
                "n": len(chosen),
                "density_distance": distributions.density_distance(some.density, target.density),
                "n_elements_distance": distributions.element_number_distance(some.n_elements, target.n_elements),
                "space_group_distance": distributions.space_group_distance(some.space_group, target.space_group),
            }
            if len(chosen)
            else {"n": 0}
        )
    return figures


def _repetition(config: EvaluateConfig, structures: Sequence[Structure | None], training: Training | None) -> Figures:
    """Return uniqueness and, with training data, novelty and the share of known prototypes."""
    figures: Figures = {"unique": _shown(rate(unique_structures(structures, n_workers=config.n_workers)))}
    if training is not None:
        novel = novel_structures(structures, training.of_formula, n_workers=config.n_workers)
        figures["novel_against_training"] = _shown(rate(novel))
        known = training.known_prototypes(structures, n_workers=config.n_workers)
        figures["prototype_in_training"] = _shown(rate(known))
    return figures


def _stability(config: EvaluateConfig, taken: Sample, sample: Sample, hull: Hull, training: Training | None) -> Figures:
    """Return stability and S.U.N. of the structures that were taken, after relaxation."""
    relaxed = relax(taken.structures, n_workers=config.n_workers)
    structures = [item.structure for item in relaxed]
    energies = e_above_hull(hull, relaxed)
    unique = unique_structures(structures, n_workers=config.n_workers)
    new_formula = np.array(
        [s is not None and s.composition.reduced_formula not in hull.formulas for s in structures], dtype=np.bool_
    )
    generation = sample.seconds * len(taken.structures) / len(sample.structures)
    seconds = {
        "generation": generation,
        "generation_and_relaxation": generation + float(values(relaxed, "seconds").sum()),
    }
    figures: Figures = {
        "n": len(relaxed),
        "relaxation": relaxation_figures(relaxed),
        "unknown_element": int(sum(bool(s is not None and hull.lacks(s.composition)) for s in structures)),
        "novel_by_formula": stability_figures(Outcomes(energies, unique, new_formula), seconds),
    }
    novel = {"novel_formula": new_formula}
    if training is not None:
        novel["novel_structure"] = novel_structures(structures, training.of_formula, n_workers=config.n_workers)
        outcomes = Outcomes(energies, unique, novel["novel_structure"])
        figures["novel_by_structure"] = stability_figures(outcomes, seconds)
        known = training.known_prototypes(structures, n_workers=config.n_workers)
        figures["prototype_in_training_after_relaxation"] = _shown(rate(known))
        stable = stability.within(energies, stability.STABLE) & unique & new_formula
        figures["prototype_in_training_of_sun"] = _shown(rate(known[stable]))
    if config.output is not None:
        _write_relaxed(_folder(config.output), relaxed, {"e_above_hull": energies, "unique": unique, **novel})
    return figures


def e_above_hull(hull: Hull, relaxed: Sequence[Relaxation]) -> NDArray[np.float64]:
    """Return the energy above hull of each relaxed structure in eV/atom, (n,), NaN where unknown."""
    energies = np.full(len(relaxed), np.nan)
    rows = [row for row, item in enumerate(relaxed) if item.structure is not None]
    compositions = [item.structure.composition for item in relaxed if item.structure is not None]
    energies[rows] = hull.e_above_hull(compositions, values(relaxed, "formation_energy")[rows])
    return energies


def relaxation_figures(relaxed: Sequence[Relaxation]) -> Figures:
    """Return how relaxations ended, and medians over those with an energy."""
    done = [item for item in relaxed if item.status is not RelaxStatus.FAILED]
    reasons = Counter(item.reason for item in relaxed if item.status is RelaxStatus.FAILED)
    figures: Figures = {f"n_{status.value}": sum(item.status is status for item in relaxed) for status in RelaxStatus}
    figures["most_common_failure"] = reasons.most_common(1)[0][0] if reasons else None
    for name in ("n_steps", "energy_drop", "seconds"):
        figures[f"median_{name}"] = float(np.median(values(done, name))) if done else None
    figures["mean_seconds"] = float(values(relaxed, "seconds").mean()) if relaxed else None
    return figures


def _write_relaxed(folder: Path, relaxed: Sequence[Relaxation], columns: Mapping[str, NDArray[Any]]) -> None:
    """Write one row a structure, and the relaxed structures."""
    names = [f"{row:05d}" for row in range(len(relaxed))]
    fields = ("status", "reason", "n_steps", "seconds", "initial_formation_energy", "formation_energy")
    table = pd.DataFrame(
        {"id": names, **{name: [getattr(item, name) for item in relaxed] for name in fields}, **columns}
    )
    formulas = ["" if item.structure is None else item.structure.composition.reduced_formula for item in relaxed]
    table.insert(1, "formula", formulas)
    write_atomic(folder / "relaxed.csv", table.to_csv(index=False, float_format="%.6g"))
    built = {name: item.structure for name, item in zip(names, relaxed, strict=True) if item.structure is not None}
    write_atomic(folder / "relaxed.extxyz", extxyz_text(built))


def _from_run(config: EvaluateConfig) -> list[Structure | None]:
    """Return consecutive draws of a trained run with their structures."""
    asked = SampleConfig(run=config.run or "", n=config.n, seed=config.seed)
    _, _, parts = load_run(asked.run, asked)
    draws = draw_crystals(parts.env, parts.policy, config.n, seeded(config.seed, "evaluate structures"))
    structures: list[Structure | None] = []
    free = parts.with_free_cell
    if config.predicted and free is None:
        raise ConfigError(f"{config.run} restricts cells, or its coordinates are random: drop predicted")
    for index, (crystals, _) in enumerate(draws):
        rng = seeded(config.seed, f"structures {index}")
        if config.predicted and free is not None:
            found = searched(
                crystals, parts.env, parts.generator, free, config.predicted, rng, n_workers=config.n_workers
            )
            structures += found.structures
        else:
            structures += parts.generator.generate(crystals, rng)
    return structures


def _read_structures(path: Path) -> list[Structure | None]:
    """Return the structures of a CSV, a folder of CIF files or an extxyz file; one that cannot be read is None.

    One with overlapping atoms is not valid, but it has a composition, as in the published protocol.

    Raises:
        DataError: If the file has no structures.
    """
    structures: list[Structure | None] = []
    table = read_table(path)
    if "cif" not in table.columns or not len(table):
        raise DataError(f"{path} has no rows with a column cif, which holds the structures")
    for text in table["cif"].astype(str):
        try:
            matrix, coords, numbers = read_cif(text, overlaps=True)
        except DataError:
            structures.append(None)
        else:
            structures.append(Structure(matrix, numbers.tolist(), coords))
    return structures


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the workers that have ended."""
    return sum(os.times()[:4])


def _folder(path: str) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shown(value: Rate) -> Figures:
    return {"rate": value.rate, "interval_95": [value.low, value.high], "hits": value.hits, "n": value.n}
