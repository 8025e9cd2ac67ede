import json

import pytest

from benchmarks.store import StoreConfig, candidates, main
from discover.errors import ConfigError


def test_every_candidate_is_found_and_every_label_stored(capsys, tmp_path) -> None:
    main(["n=300", "labels=5", f"folder={tmp_path}"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["n_new"] == 300
    assert figures["labels_per_s"] > 0
    assert figures["file_mb"] > 0
    assert list(tmp_path.iterdir()) == []


def test_candidates_are_the_same_for_one_seed() -> None:
    assert list(candidates(5, 1)) == list(candidates(5, 1)) != list(candidates(5, 2))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        StoreConfig(n=0)
