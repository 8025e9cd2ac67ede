import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pymatgen.core import Structure

from discover.guarded_worker import label_here
from discover.oracle.base import Label, LabelStatus
from discover.oracle.callable import CallableOracle, CallableOracleError, as_label
from tests.discover.oracle.salts import rock_salt

SALT = rock_salt(5.64, "Na", "Cl")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "users_own_code.py").write_text(
        "def volume(structure):\n    structure.remove_sites([0])\n    return structure.volume\n"
        "def broken(structure):\n    raise OSError('no licence')\n"
        "number = 3\n"
    )
    return str(tmp_path)


def test_a_function_of_ones_own_labels_structures(folder: str) -> None:
    oracle = CallableOracle("users_own_code:volume", quantity="volume", folder=folder)
    oracle = pickle.loads(pickle.dumps(oracle))  # noqa: S301 - it travels to workers
    oracle.start()
    label = label_here(oracle, SALT)
    assert label.status is LabelStatus.GIVEN
    assert label.properties == {"volume": pytest.approx(SALT.volume)}
    assert len(SALT) == len(rock_salt(5.64, "Na", "Cl"))  # the function had a copy
    broken = label_here(CallableOracle("users_own_code:broken", folder=folder), SALT)
    assert (broken.status, broken.reason) == (LabelStatus.FAILED, "OSError: no licence")
    assert json.loads(json.dumps(oracle.describe()))["function"] == "users_own_code:volume"


@pytest.mark.parametrize("value", [-2.0, np.float32(-2.0), np.array(-2.0), torch.tensor(-2.0), -2])
def test_a_number_is_the_quantity(value: Any) -> None:
    assert as_label(value, "band_gap").band_gap == -2.0


def test_a_mapping_and_a_label_are_taken_as_they_are() -> None:
    label = as_label({"band_gap": 1.3, "status": "converged", "structure": SALT, "properties": {"a": 1}}, "x")
    assert (label.band_gap, label.status, label.structure) == (1.3, LabelStatus.CONVERGED, SALT)
    assert label.properties == {"a": 1.0}
    assert as_label(label, "x") is label
    assert isinstance(as_label({"status": "failed", "reason": "no cores"}, "x"), Label)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "band_gap is nan"),
        (math.inf, "band_gap is inf"),
        ("1.3", "must be a number, got str"),
        (None, "must be a number, got NoneType"),
        (True, "must be a number, got bool"),
        ({"gap": 1.3}, "unknown gap; a label has"),
        ({"seconds": 1.3}, "unknown seconds"),
        ({"band_gap": 1.0, "status": "good"}, "status must be one of"),
        ({"properties": 3}, "mapping of numbers"),
        ({"properties": {"a": math.nan}}, "a is nan"),
        ({"band_gap": 1.0, "structure": "NaCl"}, "structure must be of type Structure"),
        ({"band_gap": 1.0, "n_steps": "3"}, "n_steps must be of type int"),
    ],
)
def test_what_is_no_label_is_named(value: Any, message: str) -> None:
    with pytest.raises(CallableOracleError, match=message):
        as_label(value, "band_gap")


def test_a_function_that_is_not_there_is_an_error_before_anything_runs(folder: str) -> None:
    for path in ("users_own_code:absent", "absent_module:f", "users_own_code:number"):
        with pytest.raises(CallableOracleError, match=path):
            CallableOracle(path, folder=folder).start()
    with pytest.raises(CallableOracleError, match="module:function"):
        CallableOracle("users_own_code")
    with pytest.raises(CallableOracleError, match="quantity"):
        CallableOracle("a:b", quantity="status")


def test_structures_are_pymatgens() -> None:
    assert isinstance(SALT, Structure)
