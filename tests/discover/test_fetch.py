import gzip
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pytest
from pymatgen.core import Composition, Lattice, Structure

from discover import fetch as fetch_module
from discover.errors import ConfigError, FetchError
from discover.fetch import FetchConfig, Source, fetch, main, materials_project_rows
from discover.oracle.hull import Hull

pytestmark = pytest.mark.network

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
MP20_CSV = 'material_id,pretty_formula,cif\nmp-1,NaN,"data_NaN\nloop_"\nmp-2,NaCl,x\n'
KEY = "a-key"
N_SUMMARIES = 7


def matbench_file() -> bytes:
    data = [[SALT.as_dict(), -2.1], [(SALT * (2, 1, 1)).as_dict(), -2.0]]
    return gzip.compress(json.dumps({"index": [0, 1], "columns": ["structure", "e_form"], "data": data}).encode())


def summary(index: int) -> dict[str, Any]:
    return {
        "material_id": f"mp-{index}",
        "formula_pretty": "NaCl",
        "symmetry": {"number": 225},
        "formation_energy_per_atom": -2.1,
        "band_gap": None,
        "energy_above_hull": 0.0,
        "structure": SALT.as_dict(),
    }


class Handler(BaseHTTPRequestHandler):
    broken = 0
    stalled = 0

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == "/summary/":
            self.answer_summary(parse_qs(parts.query))
        elif parts.path == "/thermo/":
            self.answer_energies(parse_qs(parts.query))
        elif parts.path == "/broken/":
            self.answer_broken()
        elif parts.path == "/never/":
            self.answer(b'{"data": [', claimed=10_000)
        elif parts.path == "/stalled/":
            Handler.stalled += 1
            self.answer(b'{"data": [', claimed=10_000)
            time.sleep(2)
        elif parts.path == "/train.csv":
            self.answer(MP20_CSV.encode())
        elif parts.path == "/matbench.json.gz":
            self.answer(matbench_file())
        elif parts.path == "/short.csv":
            self.answer(MP20_CSV.encode(), claimed=10_000)
        else:
            self.send_error(503)

    def answer_summary(self, query: dict[str, list[str]]) -> None:
        if self.headers["X-API-KEY"] != KEY:
            self.send_error(403)
            return
        assert query["nsites_max"] == ["20"]
        skip, limit = int(query["_skip"][0]), int(query["_limit"][0])
        page = [summary(i) for i in range(N_SUMMARIES)][skip : skip + limit]
        self.answer(json.dumps({"data": page}).encode())

    def answer_broken(self) -> None:
        """Break off, and answer whole the next time."""
        Handler.broken += 1
        body = json.dumps({"data": [summary(0)]}).encode()
        self.answer(body, claimed=len(body) + (1000 if Handler.broken % 2 else 0))

    def answer_energies(self, query: dict[str, list[str]]) -> None:
        assert query["thermo_types"] == ["GGA_GGA+U"]
        skip, limit = int(query["_skip"][0]), int(query["_limit"][0])
        energies = [-2.1, None, *[-0.1 * i for i in range(N_SUMMARIES)]][skip : skip + limit]
        page = [{"formula_pretty": "NaCl", "formation_energy_per_atom": energy} for energy in energies]
        self.answer(json.dumps({"data": page}).encode())

    def answer(self, body: bytes, claimed: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(claimed or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that http.server uses
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def serve(monkeypatch: pytest.MonkeyPatch, name: str, **source: Any) -> None:
    monkeypatch.setitem(fetch_module.SOURCES, name, (Source(**source),))


def test_a_csv_data_set_is_stored_as_it_is(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "mp20", url=f"{server}/train.csv", file="train.csv", n_rows=2)
    (path,) = fetch(FetchConfig(name="mp20", output=str(tmp_path)))
    assert path == tmp_path / "mp20" / "train.csv"
    assert path.read_text(encoding="utf-8") == MP20_CSV


def test_a_file_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "mp20", url="http://127.0.0.1:1/none", file="train.csv")
    (tmp_path / "mp20").mkdir()
    (tmp_path / "mp20" / "train.csv").write_text("mine")
    (path,) = fetch(FetchConfig(name="mp20", output=str(tmp_path)))
    assert path.read_text() == "mine"


def test_a_matbench_file_becomes_a_csv(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(
        monkeypatch,
        "matbench_mp_e_form",
        url=f"{server}/matbench.json.gz",
        file="matbench_mp_e_form.csv",
        n_rows=2,
        label="formation_energy_per_atom",
    )
    (path,) = fetch(FetchConfig(name="matbench_mp_e_form", output=str(tmp_path)))
    table = pd.read_csv(path)
    assert table["material_id"].tolist() == ["mb-mp-e-form-000001", "mb-mp-e-form-000002"]
    assert table["formation_energy_per_atom"].tolist() == [-2.1, -2.0]
    assert len(Structure.from_str(table["cif"][1], fmt="cif")) == 2 * len(SALT)


def test_a_published_hash_is_checked(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = hashlib.sha256(MP20_CSV.encode()).hexdigest()
    serve(monkeypatch, "mp20", url=f"{server}/train.csv", file="train.csv", sha256=good)
    assert fetch(FetchConfig(output=str(tmp_path / "good")))
    serve(monkeypatch, "mp20", url=f"{server}/train.csv", file="train.csv", sha256="0" * 64)
    with pytest.raises(FetchError, match="not the published file"):
        fetch(FetchConfig(output=str(tmp_path / "bad")))
    assert not list((tmp_path / "bad").rglob("*.csv*"))


@pytest.mark.parametrize(
    ("file", "expected", "message"),
    [("train.csv", 99, "2 rows, 99 expected"), ("nothing.csv", None, "HTTP 503"), ("short.csv", None, "broke off")],
)
def test_what_is_not_as_expected_is_refused(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, expected: int | None, message: str
) -> None:
    serve(monkeypatch, "mp20", url=f"{server}/{file}", file="train.csv", n_rows=expected)
    with pytest.raises(FetchError, match=message):
        fetch(FetchConfig(output=str(tmp_path)))
    assert not list(tmp_path.rglob("*.csv*"))


def test_without_a_connection_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "mp20", url="http://127.0.0.1:9/train.csv", file="train.csv")
    with pytest.raises(FetchError, match=r"cannot reach .*put it at .*train.csv"):
        fetch(FetchConfig(output=str(tmp_path)))


def test_the_materials_project_is_read_page_by_page(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_PAGE", 3)
    rows = list(materials_project_rows(KEY, 20, f"{server}/summary/"))
    assert [row["material_id"] for row in rows] == [f"mp-{i}" for i in range(N_SUMMARIES)]
    assert rows[0]["spacegroup.number"] == 225
    assert Structure.from_str(rows[0]["cif"], fmt="cif").composition.reduced_formula == "NaCl"


def test_the_materials_project_comes_with_a_hull_of_all_phases(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MP_API_KEY", KEY)
    for name, place in (("materials_project_rows", "summary"), ("materials_project_energies", "thermo")):
        read = getattr(fetch_module, name)
        monkeypatch.setattr(fetch_module, name, partial(read, url=f"{server}/{place}/"))
    paths = fetch(FetchConfig(name="materials_project", output=str(tmp_path)))
    assert [path.name for path in paths] == ["materials_project.csv", "entries.csv.gz"]
    assert Hull.load(tmp_path / "materials_project").energy(Composition("NaCl")) == pytest.approx(-2.1)


@pytest.mark.parametrize(("key", "message"), [("", "MP_API_KEY"), ("wrong", "refuses the key")])
def test_the_materials_project_needs_a_key(server: str, key: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        list(materials_project_rows(key, 20, f"{server}/summary/"))


def test_a_page_that_breaks_off_is_asked_for_again(server: str) -> None:
    assert len(list(materials_project_rows(KEY, 20, f"{server}/broken/"))) == 1
    with pytest.raises(FetchError, match="broke off 3 times"):
        list(materials_project_rows(KEY, 20, f"{server}/never/"))


def test_a_page_that_stalls_is_asked_for_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "_TIMEOUT", 0.3)
    with pytest.raises(FetchError, match="broke off 3 times"):
        list(materials_project_rows(KEY, 20, f"{server}/stalled/"))
    assert Handler.stalled == 3


def test_a_size_is_not_ignored_where_a_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "materials_project").mkdir()
    for name in ("materials_project.csv", "entries.csv.gz"):
        (tmp_path / "materials_project" / name).write_text("")
    with pytest.raises(FetchError, match="delete it to use max_atoms"):
        fetch(FetchConfig(name="materials_project", output=str(tmp_path), max_atoms=50))


def test_the_command_takes_the_name_alone(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(monkeypatch, "mp20", url=f"{server}/train.csv", file="train.csv")
    main(["mp20", f"output={tmp_path}"])
    assert "train.csv" in capsys.readouterr().out
    main([])
    assert "matbench_mp_gap" in capsys.readouterr().out  # the help lists what there is


def test_settings_that_do_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_atoms"):
        FetchConfig(name="mp20", max_atoms=20)
