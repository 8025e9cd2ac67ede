import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pymatgen.core import Lattice, Structure

from discover.guarded_worker import label_here
from discover.oracle import matgl_model
from discover.oracle.base import LabelStatus
from discover.oracle.matgl_model import KnownValue, MatglModelError, MatglOracle

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # matgl and what it imports warn

ELEMENTS = ("O", "Na", "Mg", "Si", "Cl")


def rock_salt(a: float = 5.5) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, saved as matgl saves them."""
    from matgl.apps.pes import Potential  # noqa: PLC0415 - seconds
    from matgl.models import M3GNet, MEGNet  # noqa: PLC0415

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("matgl")
    small: dict[str, Any] = {"units": 8, "nblocks": 1, "max_n": 2, "max_l": 2}
    network = M3GNet(element_types=ELEMENTS, dim_node_embedding=8, dim_edge_embedding=8, **small)
    Potential(network, element_refs=[-1.0] * len(ELEMENTS)).save(folder / "potential")
    MEGNet(element_types=ELEMENTS, is_classification=False, cutoff=4.0).save(folder / "property")
    return folder


def known(folder: Path, structure: Structure) -> tuple[KnownValue, ...]:
    value = matgl_model._predict(matgl_model.load(str(folder)), structure)
    return (KnownValue(structure, value, 1e-3),)


def test_a_potential_relaxes_once_it_knows_what_it_should(folder: Path) -> None:
    path = folder / "potential"
    oracle = MatglOracle(str(path), scale="own", known=known(path, rock_salt()), max_steps=3)
    oracle = pickle.loads(pickle.dumps(oracle))  # noqa: S301 - it travels to workers
    oracle.start()
    label = label_here(oracle, rock_salt())
    assert label.status in (LabelStatus.STEP_LIMIT, LabelStatus.CONVERGED)
    assert math.isfinite(label.energy_per_atom)
    assert math.isnan(label.formation_energy_per_atom)  # on a scale of its own
    assert label.space_group_before == 225
    assert label.structure is not None
    assert len(label.structure) == 2
    assert oracle.name == "matgl:potential"
    assert json.loads(json.dumps(oracle.describe()))["matgl"]


def test_a_property_model_predicts_the_structure_as_it_is(folder: Path) -> None:
    path = folder / "property"
    for predicts, found in [("band_gap", "band_gap"), ("bulk_modulus", None)]:
        oracle = MatglOracle(str(path), predicts=predicts, known=known(path, rock_salt()))
        label = oracle.label(rock_salt())
        assert label.status is LabelStatus.SINGLE_POINT
        value = getattr(label, found) if found else label.properties[predicts]
        assert value == pytest.approx(known(path, rock_salt())[0].value)


def test_a_model_that_does_not_know_salt_is_refused(folder: Path) -> None:
    with pytest.raises(MatglModelError, match=r"gives .* for NaCl, expected -3.67"):
        MatglOracle(str(folder / "potential")).start()
    with pytest.raises(MatglModelError, match=r"for NaCl, expected 5 "):
        MatglOracle(str(folder / "property"), predicts="band_gap").start()
    iron = KnownValue(Structure(Lattice.cubic(2.8), ["Fe"], [[0, 0, 0]]), -8.0, 0.1)
    with pytest.raises(MatglModelError, match="cannot be tested with Fe"):
        MatglOracle(str(folder / "potential"), known=(iron,)).start()
    with pytest.raises(MatglModelError, match="nothing is known"):
        MatglOracle(str(folder / "property"), predicts="bulk_modulus")


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in matgl_model.FILES:
        (target / file).write_bytes((source / file).read_bytes())
    return target


def test_files_that_name_other_code_are_refused(folder: Path, tmp_path: Path) -> None:
    note = tmp_path / "note"
    first = copied(folder / "potential", tmp_path / "first")
    description = json.loads((first / "model.json").read_text())
    (first / "model.json").write_text(json.dumps({**description, "@module": "os", "@class": "system"}))
    second = copied(folder / "potential", tmp_path / "second")
    arguments = torch.load(second / "model.pt", weights_only=True)
    command = {"@module": "subprocess", "@class": "Popen", "init_args": {"args": ["touch", str(note)]}}
    torch.save({**arguments, "model": command}, second / "model.pt")
    third = copied(folder / "potential", tmp_path / "third")
    torch.save(_Malicious(str(note)), third / "model.pt")
    for path, message in [(first, r"os\.system"), (second, r"subprocess\.Popen"), (third, "no model")]:
        with pytest.raises(MatglModelError, match=message):
            matgl_model.load(str(path))
    assert not note.exists()


class _Malicious:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_what_is_no_model_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MatglModelError, match=r"has no model\.json"):
        matgl_model.load(str(tmp_path))
    damaged = copied(folder / "potential", tmp_path / "damaged")
    (damaged / "state.pt").write_bytes(b"nothing")
    with pytest.raises(MatglModelError, match="no model that matgl"):
        matgl_model.load(str(damaged))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _no_network)
    with pytest.raises(MatglModelError, match="materialyze/M3GNet cannot be downloaded: OSError: no network"):
        matgl_model.load("M3GNet")


def _no_network(**_: Any) -> str:
    raise OSError("no network")
