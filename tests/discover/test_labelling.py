"""Limits of a label, and looks."""

import pytest

from discover.config import OracleConfig, RunConfig
from discover.labelling import limits_of, look_oracle, single_points
from discover.oracle.base import LabelStatus, Oracle
from discover.oracle.callable import CallableOracle
from discover.oracle.matgl_model import MatglOracle
from tests.discover.textbook import rock_salt


@pytest.mark.parametrize(
    ("oracle", "seconds"),
    [
        (look_oracle(), 360.0),
        (MatglOracle("some/model"), 360.0),
        (CallableOracle("module:function"), 300.0),
    ],
)
def test_what_watches_its_time_may_hand_over_what_it_has(oracle: Oracle, seconds: float) -> None:
    limits = limits_of(RunConfig(reward="stability", oracle=OracleConfig(time_limit=300.0)), oracle)
    assert limits.seconds == seconds


def test_a_look_has_energy_and_gap_of_the_structure_as_it_is() -> None:
    (label,) = single_points([rock_salt()], n_workers=0)
    assert label.status is LabelStatus.SINGLE_POINT
    assert label.formation_energy_per_atom == pytest.approx(-2.1, abs=0.2)
    assert label.band_gap > 3
    assert label.properties["p_metal"] < 0.5
    assert single_points([], n_workers=0) == []
