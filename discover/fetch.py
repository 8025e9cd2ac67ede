"""Download public data sets and write them in the CSV form that the other commands read.

`python -m discover.fetch mp20` writes ``data/mp20/{train,val,test}.csv``, and so on; see `SOURCES` for what there is.
`python -m discover.fetch materials_project` writes a hull file too: ``oracle.hull=data/materials_project``.
The form: one row a material with ``material_id, pretty_formula, cif`` and what the source knows of
``spacegroup.number, formation_energy_per_atom, band_gap, e_above_hull``. Files are checked (SHA-256 where one is
published, rows and columns elsewhere) and appear complete or not at all. Materials Project data are CC BY 4.0: cite
Jain et al. 2013 (10.1063/1.4812323).
"""

import csv
import gzip
import hashlib
import http.client
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from tqdm import tqdm

from discover.errors import ConfigError, FetchError, main_guard
from discover.options import help_text, option, parse_args
from discover.oracle.hull import ENTRIES
from discover.run_folder import write_atomic

_TIMEOUT = 60.0  # seconds without an answer
_BLOCK = 1 << 20
_PAGE = 1000  # rows a request of the Materials Project
_TRIES = 3  # of a page whose connection breaks off
_HEADERS = {"User-Agent": "crystal-discover"}  # some servers refuse Python's own name
_KEY_VARIABLE = "MP_API_KEY"


@dataclass(frozen=True)
class Source:
    """One file of a public data set.

    Attributes:
        url: Where it is.
        file: Name it gets in the folder of its data set.
        sha256: Published hash of the download, if there is one.
        n_rows: Number of materials, if it is known.
        label: Column of the CSV that a MatBench target becomes; None for a file that is a CSV in our form already.
    """

    url: str
    file: str
    sha256: str | None = None
    n_rows: int | None = None
    label: str | None = None


_MP20 = "https://raw.githubusercontent.com/txie-93/cdvae/main/data/mp_20"
_MATBENCH = "https://ml.materialsproject.org/projects"

#: MP-20 as split by Xie et al. 2022 (arXiv:2110.06197); MatBench v0.1, Dunn et al. 2020 (10.1038/s41524-020-00406-3),
#: whose rows must keep their order.
SOURCES: dict[str, tuple[Source, ...]] = {
    "mp20": (
        Source(f"{_MP20}/train.csv", "train.csv", n_rows=27_136),
        Source(f"{_MP20}/val.csv", "val.csv", n_rows=9_047),
        Source(f"{_MP20}/test.csv", "test.csv", n_rows=9_046),
    ),
    "matbench_mp_e_form": (
        Source(
            f"{_MATBENCH}/matbench_mp_e_form.json.gz",
            "matbench_mp_e_form.csv",
            "dedcb1d4ba2e3e50dbdd45ba5bc647a00e9c2bcf8f8bf556dc8e92caa39eb21f",
            132_752,
            "formation_energy_per_atom",
        ),
    ),
    "matbench_mp_gap": (
        Source(
            f"{_MATBENCH}/matbench_mp_gap.json.gz",
            "matbench_mp_gap.csv",
            "58b65746bd88329986ed66031a2ac1369c7c522f7bc9f9081528e07097c2c057",
            106_113,
            "band_gap",
        ),
    ),
}
MATERIALS_PROJECT = "https://api.materialsproject.org/materials/summary/"
MATERIALS_PROJECT_ENERGIES = "https://api.materialsproject.org/materials/thermo/"
_ENERGY = "formation_energy_per_atom"
_SUMMARY_FIELDS = "material_id,formula_pretty,symmetry,formation_energy_per_atom,band_gap,energy_above_hull,structure"
_COLUMNS = (
    "material_id",
    "pretty_formula",
    "spacegroup.number",
    "formation_energy_per_atom",
    "band_gap",
    "e_above_hull",
    "cif",
)
_NEEDED = ("material_id", "cif")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """Everything `python -m discover.fetch` can be told."""

    name: Literal["mp20", "matbench_mp_e_form", "matbench_mp_gap", "materials_project"] = option(
        "mp20", "data set; materials_project needs a key in the environment variable MP_API_KEY"
    )
    output: str = option("data", "folder in which the data set gets a folder of its own")
    max_atoms: int | None = option(
        None, "for materials_project: most atoms in the primitive cell of its structures, not of its hull; null: 20"
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        if self.max_atoms is not None and self.name != "materials_project":
            raise ConfigError(f"max_atoms applies to materials_project, {self.name} comes as it is; drop it")
        if self.max_atoms is not None and self.max_atoms < 1:
            raise ConfigError(f"max_atoms must be at least 1, got {self.max_atoms}")


def fetch(config: FetchConfig) -> list[Path]:
    """Download a data set and return the paths of its CSV files; a file that is there already is kept.

    Raises:
        FetchError: If the source cannot be reached, answers with an error, or sends something else than expected.
        RunFolderError: If the files cannot be written.
    """
    folder = Path(config.output) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    if config.name == "materials_project":
        path, hull = folder / "materials_project.csv", folder / ENTRIES
        key = os.environ.get(_KEY_VARIABLE, "")
        if path.exists() and hull.exists() and config.max_atoms is not None:
            raise FetchError(f"{path} is there already, of whatever size it was fetched; delete it to use max_atoms")
        if not path.exists():
            write_atomic(path, _csv_text(materials_project_rows(key, config.max_atoms or 20), _COLUMNS))
        if not hull.exists():
            text = _csv_text(materials_project_energies(key), ("formula", _ENERGY))
            write_atomic(hull, gzip.compress(text.encode(), mtime=0))
        return [path, hull]
    paths = []
    for source in SOURCES[config.name]:
        path = folder / source.file
        if not path.exists():
            write_atomic(path, _as_csv(download(source, path), source))
        paths.append(path)
    return paths


def download(source: Source, path: Path) -> bytes:
    """Return the checked content of a source; `path` is named in the remedy.

    Raises:
        FetchError: If it cannot be had or is not the published file.
    """
    with _open(source.url, path) as response:
        total = int(response.headers.get("Content-Length") or 0)
        blocks = []
        try:
            with tqdm(total=total or None, desc=source.file, unit="B", unit_scale=True) as bar:
                while block := response.read(_BLOCK):
                    blocks.append(block)
                    bar.update(len(block))
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise FetchError(f"{source.url} broke off ({error!r}); try again") from error
    content = b"".join(blocks)
    if total and len(content) != total:
        raise FetchError(f"{source.url} broke off after {len(content)} of {total} bytes; try again")
    if source.sha256 is not None and hashlib.sha256(content).hexdigest() != source.sha256:
        raise FetchError(f"{source.url} is not the published file (SHA-256 differs); try again later or report it")
    return content


def materials_project_rows(key: str, max_atoms: int, url: str = MATERIALS_PROJECT) -> Iterator[dict[str, Any]]:
    """Yield the rows of all materials with at most `max_atoms` atoms in the primitive cell.

    Args:
        key: The user's API key.
        max_atoms: Limit on the size of the cell.
        url: The summary endpoint.

    Raises:
        FetchError: If there is no key, it is refused, or the service cannot be reached.
    """
    query = {"_fields": _SUMMARY_FIELDS, "nsites_max": max_atoms, "deprecated": "false"}
    return map(_summary_row, _entries(key, url, query, "materials"))


def materials_project_energies(key: str, url: str = MATERIALS_PROJECT_ENERGIES) -> Iterator[dict[str, Any]]:
    """Yield formula and formation energy in eV/atom of all phases, whatever their size: what a hull is made of.

    The energies are those of GGA and GGA+U with the MP2020 corrections, not of the scheme that mixes in r2SCAN.

    Args:
        key: The user's API key.
        url: The thermodynamics endpoint.

    Raises:
        FetchError: If there is no key, it is refused, or the service cannot be reached.
    """
    query = {"_fields": f"formula_pretty,{_ENERGY}", "thermo_types": "GGA_GGA+U"}
    for entry in _entries(key, url, query, "phases"):
        if entry.get(_ENERGY) is not None:
            yield {"formula": entry["formula_pretty"], _ENERGY: entry[_ENERGY]}


def _entries(key: str, url: str, query: Mapping[str, Any], unit: str) -> Iterator[Mapping[str, Any]]:
    """Yield all entries that an endpoint of the Materials Project has for a query, page by page."""
    if not key:
        raise FetchError(
            f"the Materials Project needs a key: get one (free) at materialsproject.org/api and set {_KEY_VARIABLE}"
        )
    with tqdm(desc=unit, unit=f" {unit}") as bar:
        skip = 0
        while True:
            asked = urllib.parse.urlencode({**query, "_limit": _PAGE, "_skip": skip})
            page = _page(f"{url}?{asked}", key)
            yield from page
            bar.update(len(page))
            skip += len(page)
            if len(page) < _PAGE:
                return


def _page(url: str, key: str) -> Any:
    """Return one page of entries; a connection that breaks off is tried again a few times."""
    for left in reversed(range(_TRIES)):
        try:
            with _open(url, Path("data"), {"X-API-KEY": key}) as response:
                return json.load(response).get("data", [])
        except (http.client.HTTPException, ConnectionError, TimeoutError, json.JSONDecodeError) as error:
            if not left:
                where = url.partition("?")[0]
                raise FetchError(f"{where} broke off {_TRIES} times ({error!r}); try again later") from error
    raise AssertionError  # the last try returns or raises


def _summary_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "material_id": entry["material_id"],
        "pretty_formula": entry["formula_pretty"],
        "spacegroup.number": (entry.get("symmetry") or {}).get("number"),
        "formation_energy_per_atom": entry.get("formation_energy_per_atom"),
        "band_gap": entry.get("band_gap"),
        "e_above_hull": entry.get("energy_above_hull"),
        "cif": str(CifWriter(Structure.from_dict(entry["structure"]))),
    }


def _open(url: str, path: Path, headers: Mapping[str, str] | None = None) -> Any:
    """Return the open response of a URL."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise FetchError(f"{url} is no web address")
    request = urllib.request.Request(url, headers={**_HEADERS, **(headers or {})})  # noqa: S310 - scheme checked above
    where = url.partition("?")[0]
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310 - scheme checked above
    except urllib.error.HTTPError as error:
        if headers and error.code in (401, 403):
            raise FetchError(f"{where} refuses the key (HTTP {error.code}); check {_KEY_VARIABLE}") from error
        raise FetchError(f"{where} answers with HTTP {error.code} {error.reason}; try again later") from error
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise FetchError(
            f"cannot reach {where}: {reason}. Without a connection, download it elsewhere and put it at {path}"
        ) from error


def _as_csv(content: bytes, source: Source) -> str:
    """Return the downloaded file as a CSV in our form, checked."""
    if source.label is not None:
        rows = _matbench_rows(content, source, source.label)
        return _csv_text(rows, ("material_id", "pretty_formula", source.label, "cif"))
    text = content.decode("utf-8")
    table = csv.DictReader(io.StringIO(text))
    missing = [name for name in _NEEDED if name not in (table.fieldnames or ())]
    n_rows = sum(1 for _ in table)
    if missing or (source.n_rows is not None and n_rows != source.n_rows):
        raise FetchError(
            f"{source.url} is not what it was: {n_rows} rows, {source.n_rows} expected"
            + (f", no column {', '.join(missing)}" if missing else "")
        )
    return text


def _matbench_rows(content: bytes, source: Source, label: str) -> Iterator[dict[str, Any]]:
    """Yield a row per structure of a MatBench file, in its order."""
    try:
        table = json.loads(gzip.decompress(content))
        data = table["data"]
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise FetchError(f"{source.url} is no MatBench file: {error}") from error
    if source.n_rows is not None and len(data) != source.n_rows:
        raise FetchError(f"{source.url} is not what it was: {len(data)} rows, {source.n_rows} expected")
    stem = Path(source.file).stem.replace("matbench", "mb").replace("_", "-")
    for index, (structure, value) in enumerate(tqdm(data, desc="writing CIFs", unit="structure"), start=1):
        crystal = Structure.from_dict(structure)
        yield {
            "material_id": f"{stem}-{index:06d}",
            "pretty_formula": crystal.composition.reduced_formula,
            label: value,
            "cif": str(CifWriter(crystal)),
        }


def _csv_text(rows: Iterator[dict[str, Any]], columns: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def main(words: Sequence[str]) -> None:
    """Download the data set named on the command line."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(help_text(FetchConfig, "python -m discover.fetch NAME: download a public data set as CSV"))
        return
    named = [f"name={words[0]}", *words[1:]] if "=" not in words[0] else words
    for path in fetch(parse_args(FetchConfig, named)):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main_guard(main)
