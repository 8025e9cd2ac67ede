"""Structures for a composition: known prototypes are found, failures are listed, bad questions are answered."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from discover import predict as command
from discover.build import careful_generator
from discover.candidates import Column
from discover.compositions import CompositionError, read_query
from discover.data import prepare
from discover.errors import main_guard
from discover.oracle.relax import Relaxation, RelaxSettings, RelaxStatus
from discover.predict import (
    Prediction,
    PredictionColumn,
    Sources,
    build,
    predict,
    predict_queries,
    rank_by_energy,
    with_repeats,
)
from discover.proposals import Proposals
from discover.structure.flow_matching import FlowMatching
from discover.structure.random_baseline import RandomCoordinates
from discover.structure_files import write_structures
from discover.templates import templates_of_data
from envs.crystal import CrystalBatch
from tests.discover.crystals import crystal_batch
from tests.discover.textbook import corundum, perovskite, rock_salt, rutile, wurtzite


def tin_dioxide() -> Structure:
    """The rutile of another element, which stands in for what is asked."""
    lattice = Lattice.tetragonal(4.737, 3.186)
    return Structure.from_spacegroup("P4_2/mnm", lattice, ["Sn", "O"], [[0, 0, 0], [0.306, 0.306, 0]])


def fluorite() -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.46), ["Ca", "F"], [[0, 0, 0], [0.25, 0.25, 0.25]])


def barium_titanate() -> Structure:
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.01), ["Ba", "Ti", "O"], coords)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own prototypes."""
    folder = tmp_path_factory.mktemp("prototypes")
    known = (tin_dioxide, fluorite, rock_salt, wurtzite, perovskite, corundum)
    write_structures(folder, {build().composition.reduced_formula: build() for build in known}, "cif")
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path) -> Sources:
    return Sources(None, templates_of_data(prepare(folder, use_cache=False)), None)


def test_a_known_prototype_gives_the_structure(sources: Sources) -> None:
    titania, magnesia = predict([{"Ti": 2, "O": 4}, {"Mg": 1, "O": 1}], 5, sources=sources)
    assert [prediction.source for prediction in titania] == ["template"]
    assert StructureMatcher().fit(titania[0].structure, rutile())
    assert titania[0].crystal.space_group.tolist() == [136]
    assert titania[0].structure.lattice.parameters == pytest.approx(titania[0].crystal.lattice_parameters[0].tolist())
    assert magnesia[0].crystal.space_group.tolist() == [225]
    assert {site.specie.symbol for site in magnesia[0].structure} == {"Mg", "O"}


def test_each_composition_is_answered_as_if_it_were_alone(sources: Sources) -> None:
    compositions = [{"Ti": 2, "O": 4}, {"Ga": 4, "O": 6}, {"Na": 1, "Br": 1}, {"Ba": 1, "Ti": 1, "O": 3}]
    together = predict(compositions, 3, sources=sources)
    for composition, found in zip(compositions, together, strict=True):
        (alone,) = predict([composition], 3, sources=sources)
        assert [prediction.structure for prediction in found] == [prediction.structure for prediction in alone]
        assert [prediction.probability for prediction in found] == [prediction.probability for prediction in alone]


def test_a_composition_without_a_prototype_has_no_prediction_and_the_others_do(sources: Sources) -> None:
    nothing, found = predict([{"Ti": 7, "O": 11}, {"Ti": 2, "O": 4}], 3, sources=sources)
    assert nothing == []
    assert len(found) == 1


def test_sizes_of_the_cell_are_tried_and_weighed(sources: Sources) -> None:
    query = read_query("ZrO2")
    (found,) = predict_queries([query], 10, sources=sources)
    sizes = [int(prediction.crystal.n_atoms) // 3 for prediction in found]
    assert sorted(sizes) == [1, 2]  # fluorite and rutile
    probabilities = [prediction.probability for prediction in found]
    assert probabilities == sorted(probabilities, reverse=True)
    for size, probability in zip(sizes, probabilities, strict=True):
        (alone,) = predict([query.cell(size)], 1, sources=sources)
        assert probability == pytest.approx(query.shares[size] * alone[0].probability)


def test_a_space_group_leaves_out_the_others(sources: Sources) -> None:
    (found,) = predict_queries([read_query("ZrO2", space_group=225)], 10, sources=sources, space_groups=[225])
    assert [int(prediction.crystal.space_group) for prediction in found] == [225]


def test_the_prior_that_ships_proposes_rutile_and_is_asked_for_coordinates() -> None:
    sources = Sources.load("generator")
    titania, salt = predict([{"Ti": 2, "O": 4}, {"Na": 1, "Cl": 1}], 5, sources=sources, generator=RandomCoordinates())
    assert titania[0].crystal.wyckoff_strings() in (["Ti:2a O:4f"], ["Ti:2b O:4f"])
    assert {prediction.source for prediction in titania} == {"prior"}
    assert sum(prediction.probability for prediction in titania) <= 1.0
    assert StructureMatcher().fit(salt[0].structure, rock_salt())
    (cubic,) = predict([{"Ti": 1, "O": 2}], 5, sources=sources, generator=RandomCoordinates(), space_groups=[225])
    assert {int(prediction.crystal.space_group) for prediction in cubic} == {225}


@pytest.mark.slow
def test_a_cell_larger_than_the_models_saw_works_with_a_warning(tmp_path: Path, capsys) -> None:
    words = ["composition=Si8O16", "source=generator", "structure=random", "n=2", f"output={tmp_path / 'run'}"]
    command.main(words)
    captured = capsys.readouterr()
    assert "warning: a composition has 24 atoms per primitive cell" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["n"] == 2


@pytest.mark.parametrize("source", ["both", "templates"])
def test_the_ranking_pools_sources_without_repeats(folder: Path, source: str) -> None:
    known = [{"Ti": 2, "O": 4}, {"Na": 1, "Br": 1}]
    pooled = predict(known, 6, sources=Sources.load(source, folder), generator=RandomCoordinates())
    for found, group in zip(pooled, (136, 225), strict=True):
        assert int(found[0].crystal.space_group) == group
        gains = [prediction.probability for prediction in found]
        assert gains == sorted(gains, reverse=True)
        assert 0 < sum(gains) <= 1 + 1e-9
    assert {prediction.source for prediction in pooled[0]} == (
        {"prior", "template"} if source == "both" else {"template"}
    )


def test_what_ships_knows_common_prototypes() -> None:
    (found,) = predict([{"Ba": 1, "Ti": 1, "O": 3}], 5, sources=Sources.load("templates"))
    assert any(StructureMatcher(primitive_cell=True).fit(item.structure, barium_titanate()) for item in found)


def proposals_without_coordinates(names: list[str]) -> Proposals:
    crystals = crystal_batch(names)
    n = len(crystals)
    return Proposals(
        crystals,
        torch.full((*crystals.letters.shape, 3), math.nan).double(),
        torch.arange(n),
        torch.zeros(n).double(),
        torch.zeros(n, dtype=torch.int64),
    )


class NothingForTitanium(RandomCoordinates):
    def generate(self, crystals: CrystalBatch, generator: torch.Generator) -> list[Structure | None]:
        found = super().generate(crystals, generator)
        return [None if s is None or "Ti" in s.composition else s for s in found]


def test_coordinates_are_sought_where_a_source_gives_none() -> None:
    proposals = proposals_without_coordinates(["NaCl", "TiO2", "GaAs"])
    proposals.parameters[0] = 0.0  # rock salt has no free parameter, so these are coordinates
    structures = build(
        proposals, torch.ones(3).bool(), torch.zeros(3), NothingForTitanium(), torch.Generator().manual_seed(0)
    )
    assert StructureMatcher().fit(structures[0], rock_salt())
    assert structures[1] is None
    assert structures[2].composition.reduced_formula == "GaAs"


def test_likely_proposals_get_more_draws_of_more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], int, int, float]] = []

    def record(self: FlowMatching, crystals: CrystalBatch, _: torch.Generator) -> list[Structure | None]:
        asked.append((crystals.space_group.tolist(), self.n_draws, self.n_steps, self.lattice_temperature))
        return [None] * len(crystals)

    monkeypatch.setattr(FlowMatching, "generate", record)
    proposals = proposals_without_coordinates(["NaCl", "TiO2", "GaAs"])
    flow, groups = careful_generator(), proposals.crystals.space_group.tolist()
    build(proposals, torch.tensor([True, False, True]), torch.tensor([0, 0, 1]), flow, torch.Generator().manual_seed(0))
    assert asked == [(groups[:1], 8, 40, 0.0), (groups[1:2], 1, 20, 0.0), (groups[2:], 8, 40, 1.0)]


@pytest.mark.parametrize("sparing", [True, False])
def test_only_likely_first_draws_are_careful_unless_all_are_to_be(sparing, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def record(self: FlowMatching, crystals: CrystalBatch, _: torch.Generator) -> list[Structure | None]:
        asked.append((self.n_draws, len(crystals)))
        return [None] * len(crystals)

    monkeypatch.setattr(FlowMatching, "generate", record)
    sources = Sources.load("generator")
    predict([{"Li": 3, "P": 1, "S": 4}], 20, sources=sources, generator=careful_generator(), sparing=sparing)
    careful = sum(n for draws, n in asked if draws == 8)
    assert sum(n for _, n in asked) == 20
    assert 1 <= careful <= 9 if sparing else careful == 20


def a_prediction(name: str, structure: Structure | None) -> Prediction:
    return Prediction(structure, crystal_batch([name]), "prior", 0.0, 0.5)


def a_relaxation(energy: float, structure: Structure | None, reason: str = "") -> Relaxation:
    status = RelaxStatus.FAILED if structure is None else RelaxStatus.CONVERGED
    return Relaxation(status, reason, structure, energy, energy, energy, energy, 3, 0.1)


def test_energies_put_the_lowest_first_and_what_has_none_last(monkeypatch) -> None:
    predictions = [a_prediction("TiO2", None), *(a_prediction("TiO2", rutile()) for _ in range(3))]
    outcomes = [
        a_relaxation(math.nan, None, "nothing to relax"),
        a_relaxation(-1.0, rutile()),
        a_relaxation(math.nan, None, "an isolated atom"),
        a_relaxation(-2.0, tin_dioxide()),
    ]
    monkeypatch.setattr(command, "relax", lambda *_, **__: outcomes)
    ranked = rank_by_energy(predictions, RelaxSettings())
    assert [prediction.energy for prediction in ranked[:2]] == [-2.0, -1.0]
    assert ranked[0].structure == tin_dioxide()
    assert ranked[0].crystal.formulas() == ["SnO2"]
    assert {prediction.failure for prediction in ranked[2:]} == {"", "an isolated atom"}


@pytest.mark.slow
def test_chgnet_prefers_the_structure_that_nature_does(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["composition=MgO", "n_formula_units=1", "source=templates", f"templates={folder}", "rank=chgnet"]
    command.main([*words, "relax_steps=3", "n_workers=0", f"output={tmp_path / 'run'}"])
    table = pd.read_csv(tmp_path / "run" / command.CSV, keep_default_na=False)
    assert table[Column.SPACE_GROUP].tolist() == [225]
    assert float(table[PredictionColumn.ENERGY].iloc[0]) == pytest.approx(-6.32, abs=0.1)  # MP2020: -5.98 - 0.34
    assert "eV/atom" in capsys.readouterr().out


def test_the_command_writes_structures_by_rank_and_a_table(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["composition=ZrO2", "source=templates", f"templates={folder}"]
    command.main([*words, f"output={tmp_path / 'run'}"])
    table = pd.read_csv(tmp_path / "run" / command.CSV, keep_default_na=False)
    assert table[PredictionColumn.RANK].tolist() == [1, 2]
    assert sorted(table[Column.SPACE_GROUP]) == [136, 225]
    files = sorted(file.stem for file in (tmp_path / "run" / "structures").iterdir())
    assert files == table[PredictionColumn.FILE].tolist()
    assert files[0].startswith("001-ZrO2-")
    for _, row in table.iterrows():
        structure = Structure.from_file(tmp_path / "run" / "structures" / f"{row[PredictionColumn.FILE]}.cif")
        assert structure.composition.reduced_formula == "ZrO2"
        assert structure.density == pytest.approx(row[Column.DENSITY], rel=1e-3)
    out = capsys.readouterr().out
    assert "positions" in out
    assert json.loads(out.splitlines()[-1]) == {"n": 2, "structures": 2}


def test_a_composition_without_any_prototype_says_what_to_do(folder: Path) -> None:
    with pytest.raises(CompositionError, match=r"no known prototype is like Ti7O11 .*source=generator"):
        command.main(["composition=Ti7O11", "source=templates", f"templates={folder}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prediction needs a composition"),
        (["composition=tio2"], "did you mean TiO2"),
        (["composition=TiO2)"], "cannot read"),
        (["composition=Li0.5CoO2"], "no whole numbers"),
        (["composition=Xx2O3"], "Xx is no element"),
        (["composition=Ti3O2", "chemistry=ionic"], "not charge-balanced"),
        (["composition=Ti4O8", "n_formula_units=2"], "already says 4 formula units"),
        (["composition=TiO2", "n_formula_units=1", "space_group=136"], "Possible are 1-"),
        (["composition=TiO2", "space_group=231"], "1 to 230"),
        (["composition=TiO2", "n=0"], "n must be at least 1"),
        (["composition=TiO2", "n_formula_units=0"], "n_formula_units must be at least 1"),
        (["composition=TiO2", "n_formula_units=300"], "hold up to 512"),
        (["composition=TiO2", "source=generator", "templates=x.csv"], "does nothing with source=generator"),
        (["composition=TiO2", "source=templates", "templates=absent.csv"], "no data file at absent.csv"),
        (["composition=TiO2", "relax_steps=5"], "rank=chgnet"),
        (["composition=TiO2", "draws=0"], "draws must be at least 1"),
        (["composition=TiO2", "draws=1", "structure=random"], "draws is of structure=flow"),
        (["composition=TiO2", "draws=1", "source=templates"], "draws is of structure=flow"),
        (["composition=TiO2", "pick=agreement", "source=templates"], "pick is of structure=flow"),
        (["composition=TiO2", "structure=random", "source=templates"], "those of source=templates are known"),
        (["composition=TiO2", "n_workers=1"], "n_workers relax for rank=chgnet"),
        (["composition=TiO2", "rank=dft"], "rank takes one of model, chgnet"),
    ],
)
def test_bad_questions_get_one_message_and_exit_code_2(
    words, message: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main_guard(command.main, words)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "runs").exists()


def test_draws_reach_the_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def record(self: FlowMatching, crystals: CrystalBatch, _: torch.Generator) -> list[Structure | None]:
        asked.add((self.n_draws, self.n_steps, self.energies is not None))
        return [None] * len(crystals)

    monkeypatch.setattr(FlowMatching, "generate", record)
    for pick in ("chgnet", "agreement"):
        asked.clear()
        words = ["composition=TiO2", "n=5", "source=generator", "draws=3", f"pick={pick}"]
        command.main([*words, f"output={tmp_path / pick}"])
        assert asked == {(3, 40, pick == "chgnet"), (1, 20, False)}


def test_likely_letters_are_tried_again_before_unlikely_ones_are_tried_once() -> None:
    crystals = crystal_batch(["TiO2", "Al2O3", "NaCl", "TiO2"])
    weight = torch.tensor([0.9, 0.03, 0.9, 0.03], dtype=torch.float64)
    open_rows = torch.full((*crystals.letters.shape, 3), torch.nan, dtype=torch.float64)
    proposals = Proposals(crystals, open_rows, torch.tensor([0, 0, 1, 1]), weight.log(), torch.zeros(4).long())
    found, chance, draw = with_repeats(proposals, weight)
    best = [chance.masked_fill(found.query != index, 0.0).argsort(descending=True)[:3] for index in (0, 1)]
    # Rutile's second draw beats corundum's first; rock salt has nothing free, so its second is worth little.
    assert found.crystals.select(torch.cat(best)).formulas() == ["TiO2", "TiO2", "TiO2", "NaCl", "TiO2", "TiO2"]
    assert draw[torch.cat(best)].tolist() == [0, 1, 2, 0, 0, 1]


def test_known_coordinates_are_not_drawn_again() -> None:
    proposals = proposals_without_coordinates(["NaCl", "TiO2"])
    proposals.parameters[0] = 0.0
    found, chance, draw = with_repeats(proposals, torch.tensor([0.5, 0.5]).double())
    assert found.crystals.formulas().count("NaCl") == 1
    assert chance[draw == 0].max() == 0.5
