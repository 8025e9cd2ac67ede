"""Which of several structures of a crystal is kept."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pymatgen.core import Structure

from discover import structure_search
from discover.build import build_generator
from discover.candidates import key_texts
from discover.oracle.base import Label, LabelStatus
from discover.predict import Prediction, predict
from discover.structure.base import StructureGenerator
from discover.structure_search import FREE_CELL, PREDICTED, SAMPLED, Found, lowest_in_energy
from envs.crystal import CrystalBatch
from tests.discover.crystals import crystal_batch

EVERY_GROUP = frozenset(range(1, 231))
OWN, FREE = build_generator("flow", None), build_generator("flow", None, lattice="free")


class Energies:
    """A potential that anybody can compute: the wider the cell, the lower."""

    def __init__(self, refused: frozenset[str] = frozenset()) -> None:
        self.seen: list[Structure] = []
        self.refused = refused

    def __call__(self, structures: Sequence[Structure]) -> list[Label]:
        self.seen += structures
        return [
            Label(status=LabelStatus.FAILED, reason="refused")
            if structure.composition.reduced_formula in self.refused
            else Label(status=LabelStatus.SINGLE_POINT, formation_energy_per_atom=-structure.volume / len(structure))
            for structure in structures
        ]


def search(
    crystals: CrystalBatch,
    look: Energies,
    n_predicted: int = 3,
    free: StructureGenerator | None = FREE,
    space_groups: frozenset[int] = EVERY_GROUP,
    taken: list[str] | None = None,
) -> list[Found | None]:
    return lowest_in_energy(
        crystals,
        generator=OWN,
        with_free_cell=free,
        n_predicted=n_predicted,
        space_groups=space_groups,
        look=look,
        rng=torch.Generator().manual_seed(0),
        taken=taken,
    )


def test_the_lowest_of_all_structures_of_a_composition_is_kept() -> None:
    look = Energies()
    crystals = crystal_batch(["TiO2", "NaCl"])
    found = search(crystals, look)
    assert len(look.seen) >= 2 * 2 + 2  # both generators build both, and something is predicted of each
    for item, formula in zip(found, ("TiO2", "NaCl"), strict=True):
        assert item is not None
        assert item.source in (SAMPLED, FREE_CELL, PREDICTED)
        same = [s for s in look.seen if s.composition.reduced_formula == formula]
        assert item.look.formation_energy_per_atom == min(-s.volume / len(s) for s in same)
        assert item.structure in same
        assert item.crystal.formulas() == [formula]
        assert abs(float(item.crystal.lattice_parameters[0, 0]) - item.structure.lattice.a) < 1e-6


def test_only_its_own_structures_are_built_where_nothing_is_to_be_predicted() -> None:
    look = Energies()
    found = search(crystal_batch(["TiO2"]), look, free=None)
    assert len(look.seen) == 1
    assert found[0] is not None
    assert found[0].source == SAMPLED
    torch.testing.assert_close(found[0].crystal.lattice_parameters, crystal_batch(["TiO2"]).lattice_parameters)


def test_every_draw_with_a_free_cell_is_looked_at() -> None:
    look, crystals = Energies(), crystal_batch(["TiO2", "NaCl"])
    found = search(crystals, look, 0, build_generator("flow", None, lattice="free", n_draws=5))
    for item, formula in zip(found, ("TiO2", "NaCl"), strict=True):
        own = [structure for structure in look.seen if structure.composition.reduced_formula == formula]
        assert 4 <= len(own) <= 1 + 5  # a draw may fail
        assert len({round(structure.volume, 6) for structure in own}) == len(own)  # cells are drawn too
        assert item is not None
        assert item.structure.volume == max(structure.volume for structure in own)


def test_predicted_structures_obey_the_space_groups_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def spied(*args: Any, **settings: Any) -> list[list[Prediction]]:
        found = predict(*args, **settings)
        groups.extend(int(item.crystal.space_group[0]) for row in found for item in row)
        return found

    monkeypatch.setattr(structure_search, "predict", spied)
    search(crystal_batch(["TiO2"]), Energies(), 8, space_groups=frozenset({136}))
    assert groups == [136] * 8  # the best eight of that group, not what the group leaves of the best eight
    groups.clear()
    search(crystal_batch(["TiO2"]), Energies(), 8)
    assert len(set(groups)) > 1


def test_no_crystal_is_proposed_twice_unless_repeats_are_allowed() -> None:
    crystals = crystal_batch(["NaCl", "NaCl shifted"])  # the same arrangement
    repeated = search(crystals, Energies(), 0)
    assert all(item is not None for item in repeated)
    once = search(crystals, Energies(), 0, taken=[])
    assert sum(item is not None for item in once) == 1
    assert search(crystals, Energies(), 0, taken=key_texts(crystals)) == [None, None]


def test_what_has_no_energy_is_not_kept() -> None:
    found = search(crystal_batch(["TiO2", "NaCl"]), Energies(frozenset({"TiO2"})))
    assert found[0] is None
    assert found[1] is not None
    kept = lowest_in_energy(
        crystal_batch(["TiO2"]),
        generator=OWN,
        with_free_cell=None,
        n_predicted=0,
        space_groups=EVERY_GROUP,
        look=Energies(frozenset({"TiO2"})),
        rng=torch.Generator().manual_seed(0),
        keep_unknown=True,
    )
    assert kept[0] is not None

    def silent(structures: Sequence[Structure]) -> list[Label]:
        return [Label(status=LabelStatus.SINGLE_POINT, band_gap=1.0) for _ in structures]

    assert search(crystal_batch(["NaCl"]), silent) == [None]  # type: ignore[arg-type]
