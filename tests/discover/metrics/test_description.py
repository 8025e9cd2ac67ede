from typing import Any

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from discover.metrics import description
from discover.metrics.description import describe, describe_file
from discover.worker_pool import TaskFailure

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_a_failure_is_a_row_of_nan() -> None:
    found = describe([ROCK_SALT, None], n_workers=0)
    assert found.complete.tolist() == [True, False]
    assert found.density[0] == pytest.approx(2.163, abs=0.01)
    assert found.n_elements[0] == 2
    assert found.space_group[0] == 225


def test_descriptions_of_a_file_are_kept_and_belong_to_its_content(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "data.csv"
    file.write_text("one")
    first = describe_file(file, [ROCK_SALT], n_workers=0)
    again = describe_file(file, [], n_workers=0)  # nothing is left to compute
    np.testing.assert_array_equal(again.structure, first.structure)
    file.write_text("two")
    assert len(describe_file(file, [], n_workers=0)) == 0
    assert len(describe_file(file, [None], selection="others", n_workers=0)) == 1


@pytest.mark.parametrize("may_pass", [True, False])
def test_what_was_killed_is_tried_again_and_what_cannot_be_read_is_not(tmp_path, monkeypatch, may_pass: bool) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.csv").write_text("one")
    structures = [ROCK_SALT, None, ROCK_SALT]
    real, tried = description.map_in_workers, []

    def fail_last(function: Any, tasks: list[Structure], **options: Any) -> list[Any]:
        tried.append(len(tasks))
        return [*real(function, tasks[:-1], **options), TaskFailure("x", may_pass=may_pass)]

    monkeypatch.setattr(description, "map_in_workers", fail_last)
    for _ in range(2):
        found = describe_file(tmp_path / "data.csv", structures, n_workers=0)
        assert found.complete.tolist() == [True, False, False]
    assert tried == ([2, 1] if may_pass else [2])
    monkeypatch.setattr(description, "map_in_workers", real)
    for _ in range(2):
        found = describe_file(tmp_path / "data.csv", structures, n_workers=0)
        assert found.complete.tolist() == [True, False, may_pass]
