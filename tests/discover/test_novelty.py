from pathlib import Path

import numpy as np
import pytest

from discover.errors import DataError
from discover.novelty import build_fingerprint, hash_formulas, is_known, load_fingerprint, main


@pytest.fixture
def fingerprint(tmp_path: Path) -> Path:
    path = tmp_path / "known.npz"
    path.write_bytes(build_fingerprint(["NaCl", "Fe4O6", "NaN", "TiO2", "Fe2O3"]))
    return path


def test_known_compositions_are_found_whatever_their_notation(fingerprint: Path) -> None:
    assert is_known(["NaCl", "Fe2O3", "NaN"], fingerprint).all()


def test_absent_compositions_are_not_found(fingerprint: Path) -> None:
    assert not is_known(["KCl", "Fe3O4", "ZzTop", ""], fingerprint).any()


def test_formulas_are_counted_once(fingerprint: Path) -> None:
    assert len(load_fingerprint(fingerprint)) == 4


def test_the_shipped_fingerprint_knows_common_compounds_and_no_invented_ones() -> None:
    assert is_known(["NaCl", "GaAs", "Al2O3", "SrTiO3"]).all()
    invented = [f"Na{i}Cl{j}Xe{k}" for i in range(30, 40) for j in range(40, 50) for k in range(50, 60)]
    assert not is_known(invented).any()
    assert len(load_fingerprint()) > 40_000


def test_hashes_spread_over_the_whole_range() -> None:
    hashes = hash_formulas(f"A{i}" for i in range(20_000))
    share = np.histogram(hashes, bins=10, range=(0, 2**40))[0] / len(hashes)
    assert np.abs(share - 0.1).max() < 0.01  # five standard deviations of a share
    assert len(np.unique(hashes)) == len(hashes)


def test_the_command_builds_it_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data.csv", tmp_path / "out.npz"
    data.write_text("material_id,pretty_formula,cif\n1,NaN,x\n2,KCl,y\n", encoding="utf-8")
    main([f"data={data}", f"output={output}"])
    assert "2 formulas" in capsys.readouterr().out
    assert is_known(["NaN", "KCl"], output).all()


def test_nothing_is_no_fingerprint_and_what_ships_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("material_id,pretty_formula,cif\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no formula"):
        main(["data=data.csv"])
    (tmp_path / "data.csv").write_text("material_id,pretty_formula,cif\n1,NaCl,x\n", encoding="utf-8")
    main(["data=data.csv"])
    assert is_known(["NaCl"], tmp_path / "known_compositions.npz").all()


def test_a_table_without_formulas_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("material_id,cif\n1,x\n", encoding="utf-8")
    with pytest.raises(DataError, match="pretty_formula"):
        main([f"data={data}", f"output={tmp_path / 'out.npz'}"])
