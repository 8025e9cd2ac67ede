"""Crystals of the prior without a reward: consecutive, restricted, repeatable, failures kept."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from pymatgen.core import Structure

from discover import generate as command
from discover.candidates import Column
from discover.data import prepare
from discover.errors import ConfigError
from discover.generate import ENERGY, FAILURE, KEPT, Generated, generate
from discover.structure.base import NO_COORDINATES, StructureGenerator
from discover.structure.flow_matching import FlowMatching
from discover.structure.random_baseline import RandomCoordinates
from envs.crystal import CrystalBatch
from envs.errors import RestrictionError
from envs.restrictions import Restrictions
from policies.composition_prior import load_composition_prior

FEW = Restrictions(elements=["Na", "Mg", "O", "Cl"], crystal_systems=["cubic"], n_elements=[2, 2])


class EveryOther(StructureGenerator):
    """A generator that expands cells and finds no coordinates for every second crystal."""

    def generate(self, crystals: CrystalBatch, generator: torch.Generator) -> list[Structure | None]:
        found = RandomCoordinates(min_ratio=0.0).generate(crystals, generator)
        return [None if row % 2 or s is None else s.scale_lattice(s.volume * 1.331) for row, s in enumerate(found)]


def draw(n: int, *, seed: int = 0) -> Generated:
    return generate(n, restrictions=FEW, generator=RandomCoordinates(), seed=seed)


def test_the_same_seed_gives_the_same_structures_and_another_seed_others() -> None:
    first, again, other = (draw(20, seed=seed) for seed in (1, 1, 2))
    assert first.structures == again.structures
    assert torch.equal(first.log_prob, again.log_prob)
    assert first.crystals.wyckoff_strings() != other.crystals.wyckoff_strings()


def test_structures_have_the_composition_and_cell_of_their_crystal() -> None:
    drawn = draw(20)
    rows = [row for row in range(20) if row not in drawn.failures]
    assert len(rows) > 10
    formulas, lattices = drawn.crystals.formulas(), drawn.crystals.lattice_parameters
    for row in rows:
        structure = drawn.structures[row]
        assert structure.composition.reduced_formula == formulas[row]
        assert structure.lattice.parameters == pytest.approx(lattices[row].tolist())
        assert {site.specie.symbol for site in structure} <= {"Na", "Mg", "O", "Cl"}
    assert bool((drawn.crystals.space_group >= 195).all())


def test_letters_written_for_the_composition_obey_the_restrictions_and_keep_the_composition() -> None:
    plain = generate(20, letters="prior", restrictions=FEW)
    drawn = generate(20, restrictions=FEW)
    assert drawn.log_prob is None
    assert drawn.crystals.formulas() == plain.crystals.formulas()
    assert bool((drawn.crystals.space_group >= 195).all())
    assert len(drawn.failures) < 5
    for structure, formula in zip(drawn.structures, plain.crystals.formulas(), strict=True):
        assert structure is None or structure.composition.reduced_formula == formula


def test_likeliest_letters_are_at_least_as_probable_as_drawn_ones() -> None:
    drawn, likeliest = (
        generate(20, letters=letters, restrictions=FEW).crystals for letters in ("composition", "likeliest")
    )
    assert likeliest.formulas() == drawn.formulas()
    assert bool((likeliest.space_group >= 195).all())
    prior = load_composition_prior()
    gain = prior.log_prob(likeliest) - prior.log_prob(drawn)
    assert float(gain.max()) > 0.1  # most draws of so few elements are the likeliest letters
    assert float(gain.min()) > -0.1


def test_lattices_that_are_restricted_are_those_of_the_prior() -> None:
    narrow = Restrictions(elements=["Na", "Cl"], crystal_systems=["cubic"], length=(4.0, 6.0))
    drawn = generate(10, restrictions=narrow)
    assert drawn.log_prob is not None
    assert bool(
        ((drawn.crystals.lattice_parameters[:, :3] >= 4) & (drawn.crystals.lattice_parameters[:, :3] <= 6)).all()
    )
    with pytest.raises(ConfigError, match="letters=composition leaves the lattice to the flow"):
        generate(1, letters="composition", restrictions=narrow)


def test_failures_keep_their_rows_and_refined_cells_are_reported() -> None:
    plain = generate(6, restrictions=FEW, generator=RandomCoordinates(min_ratio=0.0))
    drawn = generate(6, restrictions=FEW, generator=EveryOther())
    assert drawn.failures == [1, 3, 5]
    ratio = drawn.crystals.volume / plain.crystals.volume
    torch.testing.assert_close(ratio, torch.tensor([1.331, 1.0] * 3).double())


def test_a_longer_draw_starts_with_the_shorter_one(monkeypatch) -> None:
    monkeypatch.setattr(command, "_BATCH", 8)
    short, long = draw(8), draw(20)
    assert long.structures[:8] == short.structures


@pytest.mark.parametrize("file_format", ["cif", "extxyz", "poscar"])
def test_the_command_writes_a_table_and_structures(file_format: str, tmp_path: Path, capsys) -> None:
    words = ["n=12", "restrict.elements=[Na,Mg,O,Cl]", "restrict.n_elements=2", f"format={file_format}"]
    command.main([*words, f"output={tmp_path / 'run'}", "structure=random"])
    table = pd.read_csv(tmp_path / "run" / "candidates.csv", keep_default_na=False)
    assert len(table) == 12
    assert table[Column.CANDIDATE_ID].tolist()[:2] == ["g0001", "g0002"]
    assert set(table[FAILURE]) <= {"", NO_COORDINATES}
    built = table.loc[table[FAILURE] == "", Column.CANDIDATE_ID].tolist()
    folder = tmp_path / "run" / "structures"
    if file_format == "extxyz":
        assert prepare(folder / "structures.extxyz", use_cache=False).ids.tolist() == built
    else:
        assert sorted(file.stem for file in folder.iterdir()) == built
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["n"], result["structures"]) == (12, len(built))


def test_the_table_says_which_structure_was_kept_and_its_energy(tmp_path: Path) -> None:
    words = ["n=3", "restrict.elements=[Na,Cl]", "restrict.n_elements=2", "predicted=2", "draws=1", "n_workers=0"]
    command.main([*words, f"output={tmp_path / 'run'}"])
    table = pd.read_csv(tmp_path / "run" / "candidates.csv", keep_default_na=False)
    assert set(table[KEPT]) <= {"own", "predicted"}
    energies = table[ENERGY].astype(float)
    assert energies.between(-3.0, 3.0).all()
    assert len(set(energies)) > 1


@pytest.mark.parametrize(("letters", "lattice"), [("prior", "fixed"), ("likeliest", "free")])
def test_draws_reach_the_flow(letters, lattice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def record(self: FlowMatching, crystals: CrystalBatch, _: torch.Generator) -> list[Structure | None]:
        asked.append((self.n_draws, self.n_steps, self.lattice, self.energies is not None))
        return [None] * len(crystals)

    monkeypatch.setattr(FlowMatching, "generate", record)
    for pick in ("chgnet", "agreement"):
        command.main(["n=3", "draws=3", f"letters={letters}", f"pick={pick}", f"output={tmp_path / pick}"])
    assert asked == [(3, 40, lattice, True), (3, 40, lattice, False)]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["n=0"], ConfigError, "n must be at least 1"),
        (["chemistry=covalent"], ConfigError, "chemistry takes one of any, ionic"),
        (["restrict.elements=[Xx]"], RestrictionError, "Xx"),
        (["restrict.required=[O]", "restrict.exclude=[O]"], RestrictionError, "contradicts"),
        (["restrict.elements=[O]", "chemistry=ionic"], RestrictionError, r"no charge-neutral.* composition of O"),
        (["letters=composition", "structure=random"], ConfigError, "structure=random needs that of the prior"),
        (["letters=likeliest", "restrict.length=[3,9]"], ConfigError, "restrict.length needs that of the prior"),
        (["draws=0"], ConfigError, "draws must be at least 1"),
        (["draws=2", "structure=random"], ConfigError, "draws is of structure=flow"),
        (["pick=agreement", "structure=random"], ConfigError, "pick is of structure=flow"),
        (["pick=agreement", "n_workers=1"], ConfigError, "n_workers computes energies"),
        (["format=pdb"], ConfigError, "format takes one of"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_at_once(words, error, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        command.main([*words, f"output={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
