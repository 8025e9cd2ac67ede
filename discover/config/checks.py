"""What the configurations of all commands share: how they refuse."""

import dataclasses
import urllib.parse
from collections.abc import Iterable
from typing import Any

from discover.errors import ConfigError


def holds_password(url: str) -> bool:
    """Return whether a URL holds a password, behind the user or in its query."""
    user = url.split("://", 1)[1].rpartition("@")[0]
    return ":" in user or "password" in urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)


def default_of(config: Any, name: str) -> Any:
    """Return what a setting, or a group of settings, is when nobody gives it."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def settings(config: Any) -> dict[str, Any]:
    """Return a configuration as a nested dict of plain values."""
    return dataclasses.asdict(config)


def as_list(names: Iterable[str]) -> str:
    """Return names as a user types a list."""
    return "[" + ",".join(names) + "]"


def require(condition: bool, message: str) -> None:
    """Refuse what does not hold.

    Raises:
        ConfigError: With the message.
    """
    if not condition:
        raise ConfigError(message)
