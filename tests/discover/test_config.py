from pathlib import Path

import pytest

from discover import run
from discover.config import (
    EvaluateConfig,
    RestrictConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
    absolute,
    parse_reward,
)
from discover.errors import ConfigError, RunFolderError
from discover.options import dump_yaml, help_text, load_yaml, parse_args
from envs.errors import RestrictionError


def run_config(*words: str) -> RunConfig:
    return parse_args(RunConfig, words)


def test_the_main_job_takes_one_reward_and_one_target() -> None:
    config = run_config("reward=bandgap", "target=1.34")
    assert config.targets() == {"bandgap": 1.34}
    assert config.stability_gate is True
    assert config.alpha == 1.0
    assert config.tolerance_of(1.34) == pytest.approx(0.25)


def test_help_is_given_wherever_words_are_read(capsys) -> None:
    for word in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            parse_args(RunConfig, ["reward=bandgap", word])
        assert ended.value.code == 0
        assert "oracle.budget = " in capsys.readouterr().out


def test_what_only_the_program_writes_is_not_suggested() -> None:
    with pytest.raises(ConfigError) as raised:
        run_config("target=1", "extend=3")
    assert "extends" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward=bandgapp", "target=1"], "Did you mean bandgap?"),
        (["reward=bandgap"], "needs a target"),
        (["target=-1.3"], "must be >= 0 eV"),
        (["target=[1.6,1.0]"], "lo < hi"),
        (["target=abc"], "takes a number or a window"),
        (["target=[1,2"], "quote the word"),
        (["target=1", "alpha=-0.1"], "alpha must be >= 0"),
        (["target=1", "tolerance=0"], "tolerance must be > 0"),
        (["tarket=1"], "Did you mean target?"),
        (["target=1", "n_steps=3"], "Did you mean train.n_steps?"),
        (["target=1", "zzz=3"], "--help lists the settings"),
        (["target=1", "seed"], "expected key=value"),
        (["target=1", "seed=1.5"], "whole number"),
        (["target=1", "seed=-1"], "seed must be in 0"),
        (["target=1", "env=mp21"], "Did you mean mp20?"),
        (["target=1", "wyckoff=maybe"], "takes on or off"),
        (["target=1", "train=3"], "group of settings"),
        (["target=1", "engine=parsl", "engine.config=a.py"], "engine is a group of settings"),
        (["target=1", "train.lr=0"], "train.lr must be > 0"),
        (["target=1", "train.replay_fraction=0.7", "train.data_fraction=0.7"], "must not exceed 1"),
        (["target=1", "restrict.n_atoms=many"], "takes a range"),
        (["target=1", "restrict.elements=[1,2]"], "list of names"),
        (["target=1", "chemistry=any", "mixed_valence=on"], "mixed_valence=on does nothing"),
        (["reward=formation_energy", "target=1"], "takes no target"),
        (["reward=density", "gap_scale=experiment"], "gap_scale=experiment applies to"),
        (["reward=oxidation_score", "beta=2"], "beta applies to"),
        (["reward=density", "hull_limit=0.02"], "hull_limit applies to reward=stability"),
        (["reward=density", "target=5", "beta=2"], "beta applies to"),
        (["reward=density", "kappa=2"], "kappa applies to"),
        (["reward=density", "tolerance=1"], "tolerance applies to a target"),
        (["reward=density*density"], "twice"),
        (["reward=density^0"], "must be > 0"),
        (["reward=density+stability"], "cannot read reward"),
        (["reward=stability", "stability_gate=on"], "same factor"),
        (["reward=stability", "acquire.per_element=0"], "acquire.per_element must be at least 1"),
        (["reward=bandgap", "target={density: 5}"], "no factor"),
    ],
)
def test_a_mistake_is_one_message_with_its_remedy(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(RunConfig, words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "word",
    [
        "restrict.elements=[Xx]",
        "restrict.space_groups=[0]",
        "restrict.space_groups=[231]",
        "restrict.elements=[]",
        "restrict.n_atoms=[8,4]",
        "restrict={elements: [Fe, O], required: [Li]}",
        "restrict={crystal_systems: [cubic], space_groups: [1, 2]}",
        "restrict={exclude: [Fe], required: [Fe]}",
    ],
)
def test_restrictions_are_checked_when_the_configuration_is_made(word: str) -> None:
    with pytest.raises(RestrictionError, match="restrict"):
        run_config("target=1", word)


def test_elements_that_yaml_takes_for_booleans_stay_elements() -> None:
    config = parse_args(SampleConfig, ["run=x", "restrict.elements=[N, Y, O]", "restrict.exclude=[No, I]"])
    assert config.restrict.elements == ("N", "Y", "O")
    assert config.restrict.exclude == ("No", "I")


def test_switches_take_on_and_off() -> None:
    config = run_config("target=1", "wyckoff=off", "mixed_valence=on", "stability_gate=no")
    assert (config.wyckoff, config.mixed_valence, config.stability_gate) == (False, True, False)


def test_ranges_take_one_number_and_lists_take_commas() -> None:
    config = run_config("target=1", "restrict.n_elements=3", "restrict.elements=Li,Mn,O", "restrict.space_groups=225")
    assert config.restrict.n_elements == (3, 3)
    assert config.restrict.elements == ("Li", "Mn", "O")
    assert config.restrict.space_groups == (225,)


def test_a_group_can_be_given_whole_and_amended() -> None:
    config = run_config("target=1", "restrict={elements: [Fe, O]}", "restrict.n_atoms=[2,8]", "train.n_steps=1e3")
    assert config.restrict.elements == ("Fe", "O")
    assert config.restrict.n_atoms == (2, 8)
    assert config.train.n_steps == 1000


def test_text_settings_keep_what_was_typed() -> None:
    assert run_config("target=1", "output=2024").output == "2024"
    assert run_config("target=1", "output=1e3").output == "1e3"


def test_a_product_has_weights_and_the_single_target_is_the_gap() -> None:
    config = run_config("reward=bandgap * density^0.5*my.module:score^2", "target=[1.0,1.6]")
    assert [(term.name, term.weight) for term in config.terms] == [
        ("bandgap", 1.0),
        ("density", 0.5),
        ("my.module:score", 2.0),
    ]
    assert config.targets() == {"bandgap": (1.0, 1.6)}


def test_two_targets_are_given_by_name() -> None:
    config = run_config("reward=bandgap*density", "target={bandgap: 1.3, density: [4, 6]}")
    assert config.targets() == {"bandgap": 1.3, "density": (4.0, 6.0)}


def test_the_resolved_configuration_survives_the_disk(tmp_path: Path) -> None:
    config = run_config(
        "reward=bandgap*stability",
        "target=[1.0,1.6]",
        "restrict.exclude=[Y,N]",
        "restrict.length=[3,9]",
        "wyckoff=off",
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_yaml(RunConfig, path) == config


def test_nobelium_survives_the_disk(tmp_path: Path) -> None:
    config = SampleConfig(run="x", restrict=RestrictConfig(exclude=("No", "Y", "N")))
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_yaml(SampleConfig, path) == config


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("just words", encoding="utf-8")
    with pytest.raises(ConfigError, match="does not hold a configuration"):
        load_yaml(RunConfig, path)


def test_help_names_every_setting_that_may_be_given() -> None:
    text = help_text(RunConfig, "usage")
    assert "restrict.elements = null" in text
    assert "train.n_steps = 400" in text
    assert "extends" not in text


def test_reward_weights_may_be_written_with_exponents() -> None:
    assert parse_reward("density^5e-1")[0].weight == pytest.approx(0.5)


def test_resume_needs_nothing_else_and_takes_nothing_else() -> None:
    assert run_config("resume=runs/x").resume == "runs/x"
    with pytest.raises(ConfigError, match="drop target, train"):
        run_config("resume=runs/x", "target=1.3", "train.n_steps=5")


def test_what_a_run_would_not_take_beside_resume_is_refused_as_the_default_too() -> None:
    with pytest.raises(ConfigError, match=r"may be raised; drop acquire\.new, reward"):
        run.main(["resume=runs/x", "acquire.new=on", "reward=bandgap", "rounds=5"])
    with pytest.raises(RunFolderError, match="runs/x is no folder"):  # so the budget was taken
        run.main(["resume=runs/x", "oracle={budget: 9}", "rounds=5"])


def test_a_store_is_where_it_was_wherever_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("labels.db", "sqlite:///labels.db", f"sqlite:///{tmp_path}/labels.db"):
        assert absolute(run_config("reward=density", f"store={given}")).store == str(tmp_path / "labels.db")
    server = "postgresql://host/db"
    assert absolute(run_config("reward=density", f"store={server}")).store == server


def test_rounds_and_budget_may_stand_beside_resume() -> None:
    asked = run_config("resume=runs/x", "rounds=5", "oracle.budget=100")
    assert (asked.rounds, asked.oracle.budget) == (5, 100)
    with pytest.raises(ConfigError, match="drop oracle"):
        run_config("resume=runs/x", "oracle.budget=100", "oracle.hull=x.csv")


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        (["rounds=4", "oracle.budget=10"], {1: 2, 2: 3, 3: 2, 4: 3}),
        (["rounds=5", "oracle.budget=17", "extends=[3,10]"], {4: 3, 5: 4}),
        (["rounds=4", "extends=[1,20]"], {2: 20, 3: 20, 4: 20}),
    ],
)
def test_a_budget_is_shared_by_the_rounds_that_are_to_come(words: list[str], shares: dict[int, int]) -> None:
    config = run_config("reward=density", *words)
    assert {number: config.round_budget(number) for number in shares} == shares


def test_python_callers_get_the_same_checks() -> None:
    assert RewardConfig(reward="density").alpha == 1.0
    with pytest.raises(ConfigError, match="needs a target"):
        RewardConfig(reward="bandgap")


@pytest.mark.parametrize(
    ("cls", "words", "message"),
    [
        (SampleConfig, [], "run=DIR"),
        (SampleConfig, ["run=x", "n=0"], "n must be at least 1"),
        (TrainConfig, ["what=prior"], "data=FILE.csv"),
        (TrainConfig, ["data=x.csv"], "output=DIR"),
        (TrainConfig, ["data=x.csv", "output=y", "lr=-1"], "lr must be > 0"),
        (TrainConfig, ["data=x.csv", "output=y", "what=gap", "start=z"], "start applies to what=flow, prior and proxy"),
        (TrainConfig, ["data=x.csv", "output=y", "what=prior", "labels=z"], "labels applies to what=proxy"),
        (EvaluateConfig, ["task=proxy"], "data=FILE.csv"),
        (EvaluateConfig, ["task=sampler", "run=x", "data=y"], "drop them"),
    ],
)
def test_other_commands_name_what_they_miss(cls: type, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_args(cls, words)
