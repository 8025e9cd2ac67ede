import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution

from discover.config import RunConfig
from discover.data import PreparedData, save_prepared
from discover.errors import ConfigError, RewardError, RunFolderError
from discover.options import parse_args
from discover.properties import Properties
from discover.run_folder import CONFIG
from discover.study import FILE
from discover.tune import (
    BEST,
    SAMPLER_SPACE,
    TRIALS,
    HitRule,
    _fingerprint,
    default_of,
    main,
    n_steps,
    sampler_space,
    split_words,
    with_settings,
)
from envs.crystal import CrystalBatch
from tests.discover.crystals import KnownProxy, crystal_batch

TINY = ("target=1.34", "queries=48", "samples=24", "train.batch_size=16", "train.width=8", "train.depth=1")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(figures, dict)
    return figures


def known_properties(**means: float) -> Properties:
    """Return proxies that give every crystal the same properties: stable, with a gap of 1.34 eV."""
    values = {"density": 5.0, "formation_energy_per_atom": -1.0, "band_gap": 1.34, "e_above_hull": 0.0} | means
    return Properties(None, [KnownProxy(name, mean, 0.05, 0.0) for name, mean in values.items()])


def hits(names: list[str], *words: str, **means: float) -> list[bool]:
    config = parse_args(RunConfig, words)
    crystals = crystal_batch(names)
    return HitRule(config, known_properties(**means), crystals).hits(crystals).tolist()


# --- a study of the sampler ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_of_the_sampler_is_written_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path / 'study'}"
    tiny = (*TINY, "restrict.elements=[Na,Ti,O,Cl]")
    main([output, *tiny, "n_trials=2"])
    figures = last_line(capsys)
    assert (figures["n_trials"], figures["n_complete"]) == (2, 2)
    first = pd.read_csv(tmp_path / "study" / TRIALS)
    assert first["objective"].between(0, 1).all()
    assert first["train.lr"][0] == 0.002
    assert (first["queries"].between(48, 48 + 16)).all()  # equal to within a batch

    main([output, *tiny, "n_trials=3"])
    assert last_line(capsys)["n_trials"] == 3
    second = pd.read_csv(tmp_path / "study" / TRIALS)
    pd.testing.assert_frame_equal(second.head(2), first)
    assert second["train.lr"].nunique() == 3

    best = yaml.safe_load((tmp_path / "study" / BEST).read_text())
    command = shlex.split(best["command"])
    assert command[:3] == ["python", "-m", "discover.run"]
    config = parse_args(RunConfig, command[3:])  # what is to be pasted is understood
    assert config.train.lr == best["settings"]["train.lr"]
    assert config.train.n_steps == second.loc[best["trial"], "steps"]
    assert config.train.width == 8
    with pytest.raises(RunFolderError, match=r"target=1\.34, not target=2"):
        main([output, *tiny, "target=2", "n_trials=3"])


def test_trials_that_fail_are_listed_with_their_reason(tmp_path: Path) -> None:
    nothing_new = ("wyckoff=off", "train.data_fraction=0", "train.replay_fraction=0.99")  # 16 of 16 from replay
    with pytest.raises(ConfigError, match=r"none of 2 trials was completed; the first one: .*leave no new crystals"):
        main([f"output={tmp_path / 'study'}", *TINY, *nothing_new, "n_trials=2"])
    table = pd.read_csv(tmp_path / "study" / TRIALS)
    assert table["state"].tolist() == ["failed", "failed"]
    assert table["reason"].str.contains("leave no new crystals").all()
    assert not (tmp_path / "study" / BEST).exists()


def test_a_foreign_file_in_place_of_the_study_stops_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not a data base " * 100)
    with pytest.raises(RunFolderError, match="not the file of a tuning study"):
        main([f"output={tmp_path}", *TINY])
    assert not (tmp_path / CONFIG).exists()


def test_the_folder_of_a_run_is_not_taken_for_a_study(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("reward: bandgap\n")
    with pytest.raises(RunFolderError, match="reward"):
        main([f"output={tmp_path}", *TINY])


def test_a_reward_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no_such_module"):
        main([f"output={tmp_path / 'study'}", "reward=no_such_module:score", "queries=32"])
    assert not (tmp_path / "study").exists()


# --- what is searched ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        ("target=1.34", set()),
        ("reward=formation_energy", {"tolerance"}),
        ("reward=stability", {"tolerance"}),
        ("reward=novelty", {"beta", "tolerance"}),
        ("reward=formation_energy*density", {"beta", "tolerance"}),
        ("reward=bandgap*formation_energy target=1.34", {"beta"}),
        ("reward=density target=5", {"beta"}),
        ("reward=formation_energy env=crystal_gfn", {"alpha", "train.data_fraction", "tolerance"}),
    ],
)
def test_only_what_applies_is_searched(words: str, left_out: set[str]) -> None:
    assert sampler_space(parse_args(RunConfig, words.split()), {}).keys() == SAMPLER_SPACE.keys() - left_out


@pytest.mark.parametrize("words", ["target=1.34", "target=[1,2]", "reward=density", "reward=formation_energy"])
def test_the_defaults_lie_in_the_space(words: str) -> None:
    config = parse_args(RunConfig, words.split())
    for key, distribution in sampler_space(config, {}).items():
        value = default_of(config, key)
        if isinstance(distribution, CategoricalDistribution):
            assert value in distribution.choices
        else:
            assert isinstance(distribution, FloatDistribution)
            assert distribution.low <= value <= distribution.high


def test_a_setting_that_is_given_is_not_searched() -> None:
    space = sampler_space(parse_args(RunConfig, ["target=1", "alpha=0"]), {"target": "1", "alpha": "0"})
    assert "alpha" not in space
    assert "train.lr" in space


def test_settings_in_groups_are_changed_together() -> None:
    config = parse_args(RunConfig, ["target=1", "train.replay_fraction=0.7"])
    changed = with_settings(config, {"alpha": 0.1, "train.replay_fraction": 0.0, "train.data_fraction": 0.9})
    assert (changed.alpha, changed.train.replay_fraction, changed.train.data_fraction) == (0.1, 0.0, 0.9)
    assert changed.target == 1


def test_replay_and_data_cost_no_queries() -> None:
    config = parse_args(RunConfig, ["target=1", "train.batch_size=100"])
    assert n_steps(config.train, 1000, None) == 14  # 75 new crystals a step
    assert n_steps(config.train, 1000, crystal_batch(["NaCl"])) == 20  # 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target=1", "output=DIR"),
        ("output=x target=1 n_trials=0", "n_trials must be > 0"),
        ("output=x target=1 seed=-1", "seed"),
        ("output=x target=1 data=x.csv", "data does nothing with what=sampler"),
        ("output=x what=proxy", "needs data"),
        ("output=x what=proxy data=x.csv queries=5", "queries does nothing with what=proxy"),
        ("output=x target=1 train.n_steps=5", "queries says"),
        ("output=x target=1 train={lr: 1}", "one by one"),
        ("output=x target=1 trai.lr=5", "Did you mean train.lr"),
        ("output=x target=1 loud", "key=value"),
        ("output=x reward=bandgab target=1", "Did you mean bandgap"),
        ("output=x what=proxy data=nowhere.csv", "nowhere.csv"),
        ("output=x " + " ".join(f"{key}={0.3 if key != 'train.batch_size' else 8}" for key in SAMPLER_SPACE), "target"),
    ],
)
def test_a_mistake_is_one_clear_message(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(words.replace("{lr: 1}", "{lr:1}").split(" "))
    assert not list(tmp_path.iterdir())


def test_help_states_both_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert "distinct hits" in text
    assert "MAE of a constant" in text
    assert "n_trials" in text


def test_words_are_sorted_into_study_and_training() -> None:
    config, fixed = split_words(["output=x", "target=1.34", "n_trials=3", "train.lr=0.01"])
    assert config.n_trials == 3
    assert fixed == ["target=1.34", "train.lr=0.01"]


# --- what counts as a hit ------------------------------------------------------------------------


def test_a_hit_is_on_target_stable_and_of_usual_oxidation_states() -> None:
    assert hits(["NaCl", "GaAs"], "target=1.34") == [True, True]
    assert hits(["NaCl"], "target=1.5") == [True]  # within 0.25 eV
    assert hits(["NaCl"], "target=1.6") == [False]
    assert hits(["NaCl"], "target=[1.3,1.4]") == [True]
    assert hits(["NaCl"], "target=[1.4,1.6]") == [False]
    assert hits(["NaCl"], "target=1.34", e_above_hull=0.11) == [False]
    assert hits(["Fe", "NaCl"], "target=1.34") == [False, True]
    assert hits(["Fe"], "target=1.34", "chemistry=any") == [True]


def test_a_target_on_the_experimental_scale_is_compared_there() -> None:
    assert hits(["NaCl"], "target=2.3", "gap_scale=experiment") == [True]  # 1.32 * 1.34 + 0.55 = 2.32 eV
    assert hits(["NaCl"], "target=1.34", "gap_scale=experiment") == [False]


def test_how_sharp_the_reward_is_does_not_move_what_is_a_hit() -> None:
    assert hits(["NaCl"], "target=1.5", "tolerance=0.02") == [True]


def test_a_formula_counts_once() -> None:
    crystals = crystal_batch(["NaCl", "NaCl shifted", "NaCl", "GaAs"])
    rule = HitRule(parse_args(RunConfig, ["target=1.34"]), known_properties(), crystals)
    assert rule.n_distinct_hits(crystals) == 2


def test_without_a_target_a_hit_beats_nine_tenths_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "by_volume.py").write_text("def score(crystals):\n    return crystals.volume.log()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ["NaCl"] * 20
    reference = crystal_batch(names)
    lengths = torch.linspace(5.0, 6.0, 20, dtype=torch.float64)
    lattice = reference.lattice_parameters.clone()
    lattice[:, :3] = lengths[:, None]
    reference = CrystalBatch(reference.space_group, reference.elements, reference.letters, reference.counts, lattice)
    rule = HitRule(parse_args(RunConfig, ["reward=by_volume:score"]), known_properties(), reference)
    assert rule.hits(reference).tolist() == [False] * 18 + [True] * 2


# --- a study of the proxies ----------------------------------------------------------------------


def rock_salts() -> PreparedData:
    """Return 400 made-up rock salts whose labels depend on the elements."""
    cations, anions = torch.arange(11, 31), torch.arange(33, 53)
    pairs = torch.cartesian_prod(cations, anions)
    crystals = crystal_batch(["NaCl"] * len(pairs))
    crystals = CrystalBatch(crystals.space_group, pairs, crystals.letters, crystals.counts, crystals.lattice_parameters)
    n = len(pairs)
    energy = -0.1 * (pairs[:, 1] - pairs[:, 0]).double()
    texts = np.full(n, "", dtype=np.str_)
    return PreparedData(
        crystals=crystals,
        positions=torch.zeros(n, 2, 3, dtype=torch.float64),
        labels={
            "formation_energy_per_atom": energy,
            "band_gap": torch.full((n,), torch.nan, dtype=torch.float64),  # a file need not have every label
            "e_above_hull": energy - energy.min(),
        },
        ids=np.array([f"r{i}" for i in range(n)]),
        formulas=np.array(crystals.formulas(), dtype=np.str_),
        label_source=texts,
        geometry=texts,
        failures=(),
    )


def test_a_study_of_the_proxies_compares_held_out_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.npz"
    save_prepared(rock_salts(), data)
    words = ["what=proxy", f"output={tmp_path / 'study'}", f"data={data}", "epochs=1", "rows=64", "held_out=0.2"]
    main([*words, "network.width=8", "batch_size=32", "n_trials=2"])
    figures = last_line(capsys)
    assert figures["n_complete"] == 2
    table = pd.read_csv(tmp_path / "study" / TRIALS)
    assert (table["objective"] > 0).all()
    assert {"formation_energy_per_atom_mae", "e_above_hull_mae"} <= set(table.columns)
    assert "band_gap_mae" not in table.columns
    assert "network.width" not in table.columns  # given, so not searched
    best = yaml.safe_load((tmp_path / "study" / BEST).read_text())
    assert best["value"] == pytest.approx(table["objective"].min())
    assert "network.dropout" in best["not_in_command"]
    assert not (tmp_path / "study" / "trial").exists()


def test_the_data_of_a_study_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.cif").write_text("x")
    (tmp_path / "labels.csv").write_text("material_id,band_gap\na,1\n")
    before = _fingerprint(str(tmp_path))
    assert _fingerprint(str(tmp_path)) == before
    (tmp_path / "labels.csv").write_text("material_id,band_gap\na,2\n")
    assert _fingerprint(str(tmp_path)) != before
