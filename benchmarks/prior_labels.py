"""What a relaxation does to crystals that nobody chose, and what the proxies learn from that.

    python -m benchmarks.prior_labels n=1000 hull=HULL output=FOLDER

Crystals of the untrained ionic prior are built with care and relaxed with CHGNet; each ends as a line of
labels-SEED.jsonl, and what is there is not done again. labels-SEED.csv.gz has the crystals as built and as relaxed,
both with the labels of the relaxed ones, for `python -m discover.train what=proxy data=FILE labels=labels-SEED.csv.gz`;
energies that physics rules out (`discover.oracle.plausibility`) are left out, and energies above hull that say what the
hull file lacks. Printed: energies above hull before and
after (those of n=1110, of single draws, are the first tables of `discover.screen`, the scatter of the extremes cut), by
how much gaps open, and the errors of the proxies that ship on every fifth formula, before and after they have learnt
from the others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure
from torch import Tensor

from discover.build import careful_generator, seeded
from discover.campaign_records import crystals_of, record_of
from discover.errors import main_guard
from discover.generate import generate
from discover.learn import Lesson, Rehearsal, learn
from discover.options import option, parse_args
from discover.oracle.band_gap import GapModel
from discover.oracle.hull import IMPLAUSIBLE, Hull
from discover.oracle.plausibility import unsuitable_elements, why_implausible
from discover.oracle.relax import relax
from discover.train_sampler import draw_crystals
from envs.crystal import CrystalBatch
from policies.pretrained import load_prior
from proxies import PropertyEnsemble, load_pretrained

_CHUNK, _REHEARSED = 100, 4096
_EDGES = (0.03, 0.1, 0.2, 0.32, 0.46, 0.68, 1.0, 2.0)  # eV/atom above hull as built
_MOST_ABOVE = 1.2  # eV/atom above hull beyond which gaps open no further
_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class PriorLabelsConfig:
    """Everything this benchmark can be told."""

    n: int = option(1000, "crystals of the prior")
    hull: str = option("", "CSV file of formulas and formation energies, or folder with it")
    output: str = option("", "folder for labels-SEED.jsonl")
    n_workers: int = option(2, "processes that relax")
    seed: int = option(79, "random seed of the crystals; the proxies that ship have learnt from those of 77 and 78")


def main(words: Sequence[str]) -> None:
    """Label what is missing, then print the tables and what the proxies learn."""
    config = parse_args(PriorLabelsConfig, words)
    torch.set_num_threads(1)
    path = Path(config.output) / f"labels-{config.seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _label(config, path)
    lines = [row for row in _read(path) if row["row"] < config.n]
    rows = [row for row in lines if row["formation_energy"] is not None and not _doubt(row)]
    hull, built = Hull.load(config.hull), [Structure.from_dict(row["built"]) for row in rows]
    relaxed = [Structure.from_dict(row["relaxed"]) for row in rows]
    compositions = [structure.composition for structure in built]
    before = hull.e_above_hull(compositions, [row["initial_formation_energy"] for row in rows])
    energies = np.array([row["formation_energy"] for row in rows])
    after = hull.e_above_hull(compositions, energies)
    gaps = _gaps(built, relaxed)
    above = np.where(after < IMPLAUSIBLE, np.nan, after)
    found = {"formation_energy_per_atom": energies, "e_above_hull": above, "band_gap": gaps[:, 1]}
    names = [f"{config.seed}-{row['row']}" for row in rows]
    table = pd.concat([_as_data(names, built, "built", found), _as_data(names, relaxed, "relaxed", found)])
    table.to_csv(path.with_suffix(".csv.gz"), index=False, float_format="%.6g")
    print(_table(before, after).to_string(index=False, float_format="%.3f"))
    lesson = Lesson(
        crystals_of([row["crystal"] for row in rows]),
        torch.tensor(np.column_stack([energies, above, gaps[:, 1]]), dtype=torch.float64),
    )
    print(json.dumps({"n": config.n, "relaxed": len(rows), **_opening(before, gaps), **_learning(lesson)}))


def _label(config: PriorLabelsConfig, path: Path) -> None:
    """Append a line for each crystal that has none."""
    done = {row["row"] for row in _read(path)}
    missing = [row for row in range(config.n) if row not in done]
    if not missing:
        return
    flow = careful_generator(lattice="fixed", pick="chgnet", n_workers=config.n_workers)
    drawn = generate(config.n, letters="prior", prior=load_prior("ionic"), generator=flow, seed=config.seed)
    for start in range(0, len(missing), _CHUNK):
        rows = missing[start : start + _CHUNK]
        structures = [drawn.structures[row] for row in rows]
        found = relax(structures, n_workers=config.n_workers)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")  # ends a line that a kill cut short
            for row, structure, item in zip(rows, structures, found, strict=True):
                line = {
                    "row": row,
                    "crystal": record_of(drawn.crystals, row),
                    "status": item.status.value,
                    "reason": item.reason,
                    "initial_formation_energy": _number(item.initial_formation_energy),
                    "formation_energy": _number(item.formation_energy),
                    "seconds": item.seconds,
                    "built": None if structure is None else structure.as_dict(),
                    "relaxed": None if item.structure is None else item.structure.as_dict(),
                }
                file.write(json.dumps(line) + "\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, less one that a kill cut short."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # empty or cut short
            continue
    return rows


def _doubt(row: Mapping[str, Any]) -> str:
    """Return why the energy of a labelled crystal is not to be believed, "" if nothing speaks against it."""
    relaxed = Structure.from_dict(row["relaxed"])
    return unsuitable_elements(relaxed.composition) or why_implausible(relaxed, row["formation_energy"])


def _as_data(
    names: Sequence[str], structures: Sequence[Structure], kind: str, labels: Mapping[str, NDArray[np.float64]]
) -> pd.DataFrame:
    """Return structures with labels in the form of `discover.data`."""
    cifs = [structure.to(fmt="cif") for structure in structures]
    return pd.DataFrame({"material_id": [f"{name}-{kind}" for name in names], "cif": cifs, **labels})


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _gaps(built: Sequence[Structure], relaxed: Sequence[Structure]) -> NDArray[np.float64]:
    """Return (n, 2) gaps in eV of structures as built and relaxed."""
    model = GapModel.load()
    return np.column_stack([model.predict_with_metal(structures)[0] for structures in (built, relaxed)])


def _table(before: NDArray[np.float64], after: NDArray[np.float64]) -> pd.DataFrame:
    """Return energies above hull before and after by what they were before, in eV/atom."""
    known = np.isfinite(before) & np.isfinite(after)
    table = pd.DataFrame({"built": before[known], "relaxed": after[known]})
    bins = table.groupby(np.digitize(table["built"], _EDGES))
    return pd.DataFrame(
        {
            "n": bins.size(),
            "median_built": bins["built"].median(),
            "mean_relaxed": bins["relaxed"].mean(),
            "std_relaxed": bins["relaxed"].std(),
            "median_relaxed": bins["relaxed"].median(),
        }
    )


def _opening(before: NDArray[np.float64], gaps: NDArray[np.float64]) -> dict[str, float]:
    """Return by how much the gaps of non-metals open, through zero for what is built on the hull."""
    known = np.isfinite(before) & (gaps > 0).all(axis=1)
    above, gain = before[known].clip(0.0, _MOST_ABOVE), (gaps[:, 1] - gaps[:, 0])[known]
    slope = float((above * gain).sum() / (above**2).sum())
    low = above < np.median(above)
    rest = gain - slope * above
    return {"gap_opens": slope, "gap_std_low": float(rest[low].std()), "gap_std_high": float(rest[~low].std())}


def _learning(lesson: Lesson) -> dict[str, dict[str, float]]:
    """Return errors on every fifth formula before and after learning from the rest."""
    place = torch.from_numpy(pd.factorize(pd.Series(lesson.crystals.formulas()))[0])
    held, ensemble, prior = place % _FOLDS == 0, load_pretrained(), load_prior("any")
    rest = Lesson(lesson.crystals.select(~held), lesson.labels[~held])
    draws = seeded(0, "rehearsal")
    crystals = CrystalBatch.cat([batch for batch, _ in draw_crystals(prior.env, prior.policy, _REHEARSED, draws)])
    taught = learn(ensemble, rest, Rehearsal(crystals, ensemble, draws))
    asked, truth = lesson.crystals.select(held), lesson.labels[held]
    return {"before": _errors(ensemble, asked, truth), "after": _errors(taught, asked, truth)}


def _errors(ensemble: PropertyEnsemble, crystals: CrystalBatch, truth: Tensor) -> dict[str, float]:
    """Return mean and median absolute errors of energies in eV/atom."""
    predicted, figures = ensemble.predict_all(crystals), {"n": float(len(truth))}
    for column, name in enumerate(("formation_energy_per_atom", "e_above_hull")):
        error = (predicted[name].mean.double() - truth[:, column]).abs()
        error = error[~error.isnan()]
        figures |= {f"{name}_mae": float(error.mean()), f"{name}_median": float(error.median())}
    return figures


if __name__ == "__main__":
    main_guard(main)
