"""Formula units per cell: counted right, shared out as a distribution."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from pymatgen.io.cif import CifWriter

from discover.errors import DataError
from discover.formula_units import SHIPPED, count_formula_units, kind_of, main, probabilities
from tests.discover.textbook import rock_salt


def composition(*rows: dict[int, int]) -> torch.Tensor:
    table = torch.zeros(len(rows), 119, dtype=torch.int64)
    for i, row in enumerate(rows):
        for number, count in row.items():
            table[i, number] = count
    return table


def test_a_cell_is_counted_under_its_kind_of_formula() -> None:
    assert kind_of([4, 8]) == ("1-2", 4)
    assert kind_of([8, 4]) == ("1-2", 4)
    assert kind_of([6]) == ("1", 6)
    by_kind, by_atoms = count_formula_units(composition({22: 2, 8: 4}, {12: 1, 17: 2}, {14: 2, 8: 4}, {26: 2}))
    assert by_kind == {"1-2": {"1": 1, "2": 2}}  # one elemental crystal is too few for a row of its own
    assert by_atoms == {"1": {"2": 1}, "3": {"1": 1, "2": 2}}


@pytest.mark.parametrize("counts", [[1], [1, 2], [1, 1, 3], [9, 13], [30, 1]])
def test_shares_are_a_distribution_over_the_cells_that_fit(counts) -> None:
    shares = probabilities(counts)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) > 0
    assert list(shares) == list(range(1, max(1, 20 // sum(counts)) + 1))


def test_shares_follow_the_counts_of_the_kind() -> None:
    counts = json.loads(SHIPPED.read_text())["by_kind"]["1-1-3"]  # perovskites and their kin
    total = sum(counts.values())
    for units, share in probabilities([1, 1, 3]).items():
        assert share == pytest.approx(counts.get(str(units), 0) / total, abs=0.01)


def test_data_without_stable_materials_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cif = str(CifWriter(rock_salt()))
    pd.DataFrame({"material_id": ["a"], "cif": [cif]}).to_csv("data.csv", index=False)
    with pytest.raises(DataError, match="nothing to count"):
        main(["data=data.csv"])
    pd.DataFrame({"material_id": ["a"], "cif": [cif], "e_above_hull": [0.0]}).to_csv("data.csv", index=False)
    main(["data=data.csv"])
    assert json.loads((tmp_path / SHIPPED.name).read_text())["by_atoms"] == {"2": {"1": 1}}
