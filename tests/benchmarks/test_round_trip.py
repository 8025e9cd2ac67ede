import pandas as pd
import pytest
from pymatgen.io.cif import CifWriter

from benchmarks.round_trip import RoundTripConfig, round_trip, take_trip
from discover.errors import ConfigError
from tests.discover.textbook import corundum, diamond, perovskite, rock_salt, rutile, spinel, wurtzite

BUILDERS = (rock_salt, rutile, perovskite, diamond, wurtzite, corundum, spinel)


def test_textbook_structures_come_back(tmp_path) -> None:
    path = tmp_path / "textbook.csv"
    rows = [(build.__name__, str(CifWriter(build().get_primitive_structure()))) for build in BUILDERS]
    pd.DataFrame([*rows, ("broken", "no CIF")], columns=["material_id", "cif"]).to_csv(path, index=False)
    figures = round_trip(RoundTripConfig(data=str(path), n=8, n_workers=0))
    assert figures["match_rate"] == figures["same_space_group_rate"] == pytest.approx(7 / 8)
    assert figures["mismatches"] == {"not representable": {"n": 1, "first": "broken"}}


def test_a_structure_that_moved_is_a_mismatch_with_its_cause() -> None:
    moved = rutile()
    moved.translate_sites([2], [0.1, 0.1, 0.0])
    trip = take_trip((moved, rutile()))
    assert not trip.matches
    assert trip.mismatch == "moved too far by symmetrisation"
    assert trip.space_group != 136


def test_a_larger_true_cell_is_named_as_the_cause() -> None:
    truth = rock_salt().get_primitive_structure() * (2, 1, 1)
    truth.translate_sites([0], [0.1, 0.0, 0.0])
    assert "2 times the atoms" in take_trip((rock_salt().get_primitive_structure(), truth)).mismatch


def test_data_must_be_named() -> None:
    with pytest.raises(ConfigError, match="data=FILE"):
        RoundTripConfig()
