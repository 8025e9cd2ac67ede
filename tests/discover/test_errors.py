import errno
from collections.abc import Sequence

import pytest

from discover.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, ConfigError, main_guard
from envs.errors import RestrictionError


def exit_code(error: BaseException | None) -> int:
    def command(words: Sequence[str]) -> None:
        assert list(words) == ["a=1"]
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as caught:
        main_guard(command, ["a=1"])
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize("error", [ConfigError("give alpha >= 0"), RestrictionError("widen it")])
def test_our_errors_are_one_message_and_exit_code_two(error: ValueError, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(error) == EXIT_USER_ERROR
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "No permission"),
        (errno.EACCES, "output=DIR"),
        (errno.ENOENT, "No such file"),
    ],
)
def test_failures_of_the_disk_name_the_remedy(number: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(OSError(number, "reason", "/some/file")) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert words in message
    assert "/some/file" in message


def test_ctrl_c_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(KeyboardInterrupt("Continue with resume=runs/x.")) == EXIT_INTERRUPTED
    assert "resume=runs/x" in capsys.readouterr().err


def test_success_exits_with_zero() -> None:
    assert exit_code(None) == 0


def test_bugs_keep_their_traceback() -> None:
    def command(words: Sequence[str]) -> None:
        del words
        int("no number")

    with pytest.raises(ValueError, match="invalid literal"):
        main_guard(command, [])
