import re
import shlex
from pathlib import Path

import pytest
import torch

from discover.config import GenerateConfig, PredictConfig, RunConfig, SampleConfig
from discover.options import parse_args
from tests.discover.crystals import crystal_batch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {"run": RunConfig, "sample": SampleConfig, "predict": PredictConfig, "generate": GenerateConfig}
COMMANDS = re.findall(r"^\$ python -m discover\.(\w+) (.*)$", README, flags=re.MULTILINE)


def test_the_reward_of_the_readme_works() -> None:
    (code,) = re.findall(r"```python\n(def my_function.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - the README's own code
    function = names["my_function"]
    assert callable(function)
    crystals = crystal_batch(["NaCl", "TiO2"])
    torch.testing.assert_close(function(crystals), -0.1 * crystals.volume_per_atom)


@pytest.mark.parametrize(("command", "rest"), COMMANDS)
def test_the_commands_of_the_readme_are_understood(command: str, rest: str) -> None:
    words = shlex.split(rest, comments=True)
    if "--help" not in words:
        parse_args(CONFIGS[command], words)


def test_the_readme_shows_commands_at_all() -> None:
    assert len(COMMANDS) >= 6


def test_every_file_the_readme_names_is_there() -> None:
    named = re.findall(r"`((?:discover|envs|proxies|policies|tests)/[\w/.]+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_pinned_versions_cover_every_dependency() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.findall(r'^  "([A-Za-z][\w-]+)>=', project, flags=re.MULTILINE)
    assert len(wanted) > 20
    assert [name for name in wanted if name.lower() not in pinned] == []
