from pathlib import Path

import pandas as pd
import pytest

from discover.engine import Task
from discover.oracle.base import LabelStatus
from discover.oracle.external import ExternalResultsError, read_results, write_requests
from tests.discover.oracle.salts import rock_salt

TASKS = [Task(f"r01-{i}", rock_salt(5.0 + i / 10, cation, "Cl")) for i, cation in enumerate(["Na", "K", "Li", "Rb"])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_requests(tmp_path / "round", TASKS)
    return tmp_path / "round"


def fill(folder: Path, **columns: list[str]) -> Path:
    table = pd.read_csv(folder / "results.csv", dtype=str, keep_default_na=False)
    for name, values in columns.items():
        table[name] = values + [""] * (len(table) - len(values))
    table.to_csv(folder / "results.csv", index=False)
    return folder


def test_structures_and_a_form_go_out(folder: Path) -> None:
    form = pd.read_csv(folder / "results.csv", dtype=str, keep_default_na=False)
    assert list(form["candidate_id"]) == [task.name for task in TASKS]
    assert list(form["formula"]) == ["NaCl", "KCl", "LiCl", "RbCl"]
    assert len(list((folder / "cif").iterdir())) == len(list((folder / "poscar").iterdir())) == 4
    assert read_results(folder, TASKS) == {}


def test_results_come_back_as_labels_and_what_is_empty_stays_open(folder: Path) -> None:
    fill(folder, formation_energy_per_atom=["-2.1", "", "nan"], band_gap=["5.0", "", ""])
    fill(folder, failed_because=["", "did not converge"], **{"property.bulk_modulus": ["24", "", "3"]})
    (folder / "relaxed").mkdir()
    rock_salt(5.69, "Na", "Cl").to(str(folder / "relaxed" / "r01-0.cif"))
    found = read_results(folder, TASKS)
    assert set(found) == {"r01-0", "r01-1", "r01-2"}
    first = found["r01-0"]
    assert (first.status, first.formation_energy_per_atom, first.band_gap) == (LabelStatus.GIVEN, -2.1, 5.0)
    assert first.properties == {"bulk_modulus": 24.0}
    assert first.structure is not None
    assert first.structure.lattice.volume == pytest.approx(5.69**3, rel=1e-3)
    assert (found["r01-1"].status, found["r01-1"].reason) == (LabelStatus.FAILED, "did not converge")
    assert found["r01-2"].status is LabelStatus.FAILED
    assert "finite number" in found["r01-2"].reason


def test_one_odd_number_fails_its_row_and_many_are_the_wrong_unit(folder: Path) -> None:
    fill(folder, formation_energy_per_atom=["-2.1", "-2.0", "-2050"])
    found = read_results(folder, TASKS)
    assert found["r01-2"].status is LabelStatus.FAILED
    assert "outside -5.5 to 5" in found["r01-2"].reason
    assert found["r01-0"].status is LabelStatus.GIVEN
    fill(folder, formation_energy_per_atom=["-2100", "-2000", "-2050"])
    with pytest.raises(ExternalResultsError, match="not meV and not eV per cell"):
        read_results(folder, TASKS)


def test_a_relaxed_structure_of_something_else_is_refused(folder: Path) -> None:
    fill(folder, band_gap=["5.0", "4.0"])
    (folder / "relaxed").mkdir()
    rock_salt(5.69, "Na", "Br").to(str(folder / "relaxed" / "r01-0.cif"))
    (folder / "relaxed" / "r01-1.vasp").write_text("nothing")
    found = read_results(folder / "results.csv", TASKS)
    assert "holds NaBr, not NaCl" in found["r01-0"].reason
    assert "cannot be read" in found["r01-1"].reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("candidate_id,band_gap\nr01-9,1\n", "line 2: nothing named 'r01-9' was asked for"),
        ("candidate_id,band_gap\nr01-0,1\nr01-0,2\n", "line 3: 'r01-0' comes twice"),
        ("id,band_gap\nr01-0,1\n", "no column 'candidate_id'"),
        ("candidate_id,gap\nr01-0,1\n", "unknown column 'gap'"),
        ("candidate_id,formula\nr01-0,NaCl\n", "no column of results"),
        ("candidate_id,formula,band_gap\nr01-0,KCl,1\n", "'r01-0' is NaCl, but the row says KCl"),
        ('candidate_id,band_gap\nr01-0,"1\n', "no CSV"),
        ("", "no CSV"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_as_a_whole(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(text)
    with pytest.raises(ExternalResultsError, match=message):
        read_results(file, TASKS)


def test_requests_never_overwrite_what_somebody_filled_in(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExternalResultsError, match="may hold results"):
        write_requests(folder, TASKS)
    with pytest.raises(ExternalResultsError, match="same name"):
        write_requests(tmp_path / "a", [TASKS[0], TASKS[0]])
    with pytest.raises(ExternalResultsError, match="name of a file"):
        write_requests(tmp_path / "b", [Task("../x", TASKS[0].structure)])
    with pytest.raises(ExternalResultsError, match="no results at"):
        read_results(tmp_path / "absent", TASKS)
