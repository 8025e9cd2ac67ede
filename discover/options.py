"""Command lines of `key=value` words, read into nested frozen dataclasses.

A dataclass is the whole description of a command: names, types, defaults, help. Values are YAML 1.2, in which `No`,
`on` and `Y` are plain text, so nobelium and yttrium stay elements; whether a text means yes or no is decided by the
type of the field that receives it. Every mistake is a `ConfigError` that names the key, what was expected, what came.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from discover.errors import ConfigError

ConfigT = TypeVar("ConfigT")

_TRUE = frozenset({"true", "on", "yes"})
_FALSE = frozenset({"false", "off", "no"})


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema: `no`, `on`, `y`, `1_000` and `1:30` are text."""


_Yaml12Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.nan$",
        "-+.0123456789",
    ),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def option(default: Any, text: str, *, convert: Callable[[str, Any], Any] | None = None, in_help: bool = True) -> Any:
    """Return a dataclass field with default and help text.

    Args:
        default: Its value where none is given.
        text: What it means.
        convert: Maps (key, value) to the value of an odd type.
        in_help: Whether users are told of it; not of what only the program itself writes.
    """
    return dataclasses.field(default=default, metadata={"help": text, "convert": convert, "in_help": in_help})


def group(cls: type, text: str) -> Any:
    """Return a dataclass field that holds a nested group of options, such as `restrict`."""
    return dataclasses.field(default_factory=cls, metadata={"help": text})


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML 1.2 text.

    Raises:
        ConfigError: If it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Yaml12Loader)  # noqa: S506 - a SafeLoader with fewer implicit types
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"cannot read {text!r} as a value: {problem}; quote the word as in 'target=[1.0,1.6]'"
        ) from error


def parse_args(cls: type[ConfigT], words: Sequence[str]) -> ConfigT:
    """Return the configuration that a command line of `key=value` words describes.

    Args:
        cls: The command's dataclass; nested groups are reached with dots, as in ``restrict.elements=[Fe,O]``.
        words: The words; a later one wins over an earlier one with the same key.

    Raises:
        ConfigError: For a word without "=", an unknown key, or a value that the dataclass refuses.
        SystemExit: After printing the help, where that is what the words ask for.
    """
    if any(word in ("-h", "--help") for word in words):
        print(help_text(cls, (cls.__doc__ or "").splitlines()[0]))
        raise SystemExit(0)
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"expected key=value, got {word!r}; --help lists the keys")
        _check_key(cls, key)
        *path, name = key.split(".")
        node = tree
        for part in path:
            child = node.setdefault(part, {})
            if isinstance(child, _Text):  # the whole group was given before, as in 'restrict={elements: [Fe, O]}'
                if not isinstance(child.value, Mapping):
                    raise ConfigError(f"{part} is a group of settings, as in {key}=...; got {part}={child.raw}")
                child = node[part] = dict(child.value)
            node = child
        node[name] = _Text(text, parse_yaml(text))
    return build(cls, tree)


@dataclasses.dataclass(frozen=True)
class _Text:
    """A value as it was typed and as YAML reads it, so that text fields get what was typed."""

    raw: str
    value: Any


def build(cls: type[ConfigT], tree: Mapping[str, Any], prefix: str = "") -> ConfigT:
    """Return `cls` filled from a nested mapping, every value converted to its field's type.

    Raises:
        ConfigError: For an unknown key or a value of the wrong kind, and whatever ``__post_init__`` raises.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, given in tree.items():
        key = prefix + name
        if name not in fields:
            shown = [prefix + other for other, field in fields.items() if field.metadata.get("in_help", True)]
            raise ConfigError(_unknown_key(key, shown))
        hint = hints[name]
        value, raw = (given.value, given.raw) if isinstance(given, _Text) else (given, None)
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{key} is a group of settings, as in {key}.{dataclasses.fields(hint)[0].name}=...; got {value!r}"
                )
            values[name] = build(hint, value, key + ".")  # type: ignore[arg-type]
        elif convert := fields[name].metadata.get("convert"):
            values[name] = convert(key, value)
        else:
            values[name] = _convert(key, hint, value, raw)
    return cls(**values)


def load_yaml(cls: type[ConfigT], path: Path) -> ConfigT:
    """Return the configuration stored in a YAML file by `dump_yaml`, also by earlier versions.

    Raises:
        ConfigError: If the file does not hold such a configuration.
    """
    tree = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} does not hold a configuration; expected lines of key: value")
    upgraded: Callable[[Mapping[str, Any]], Mapping[str, Any]] = getattr(cls, "upgraded", lambda stored: stored)
    return build(cls, upgraded(tree))


def dump_yaml(config: Any) -> str:
    """Return a dataclass as YAML that `load_yaml` reads back to an equal one."""
    return str(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True))


def help_text(cls: type, usage: str) -> str:
    """Return the help of a command: its usage and one line per key with type, default and meaning."""
    lines = [usage, "", "Settings, as key=value (lists as 'key=[a,b]', off/on for switches):"]
    lines += [f"  {key} = {default}\n      {text}" for key, default, text in _help_rows(cls, "")]
    return "\n".join(lines)


def _help_rows(cls: type, prefix: str) -> list[tuple[str, str, str]]:
    hints = typing.get_type_hints(cls)
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            rows += _help_rows(hints[field.name], f"{prefix}{field.name}.")
        elif field.metadata.get("in_help", True):
            default = yaml.safe_dump(_plain(field.default), default_flow_style=True).removesuffix("...\n").strip()
            text = field.metadata.get("help", "")
            if typing.get_origin(hints[field.name]) is Literal:
                text = f"{' | '.join(typing.get_args(hints[field.name]))}: {text}"
            rows.append((prefix + field.name, default, text))
    return rows


def _plain(value: Any) -> Any:
    """Return `value` with tuples as lists, ready for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def all_keys(cls: type, prefix: str = "") -> tuple[list[str], list[str]]:
    """Return every dotted key of a dataclass: settings, and groups of settings."""
    hints = typing.get_type_hints(cls)
    settings: list[str] = []
    groups: list[str] = []
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            inner_settings, inner_groups = all_keys(hints[field.name], f"{key}.")
            settings += inner_settings
            groups += [key, *inner_groups]
        else:
            settings.append(key)
    return settings, groups


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return " Did you mean X?" for the nearest known word, else the list of known words."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."


def _unknown_key(key: str, known: Sequence[str]) -> str:
    same_name = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, known, n=1)
    return f"unknown setting {key}." + (f" Did you mean {near[0]}?" if near else " --help lists the settings.")


def _check_key(cls: type, key: str) -> None:
    settings, groups = all_keys(cls)
    if key not in settings and key not in groups:
        raise ConfigError(_unknown_key(key, [shown for shown, _, _ in _help_rows(cls, "")]))


def _convert(key: str, hint: Any, value: Any, raw: str | None) -> Any:
    """Return `value` as the type `hint`; `raw` is the text as typed, if it was typed."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(key, inner[0], value, raw)
    if origin is Literal:
        return _convert_choice(key, typing.get_args(hint), value, raw)
    if origin is tuple:
        return _convert_tuple(key, typing.get_args(hint), value)
    if hint is bool:
        return _convert_bool(key, value)
    if hint is str:
        if isinstance(value, list | dict):
            raise ConfigError(f"{key} takes a text, got {value!r}")
        return str(value) if raw is None or isinstance(value, str) else raw
    return _convert_number(key, hint, value)


def _convert_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ConfigError(f"{key} takes on or off, got {value!r}")


def _convert_number(key: str, hint: type, value: Any) -> int | float:
    whole = hint is int
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (whole and value != int(value)):
        raise ConfigError(f"{key} takes {'a whole number' if whole else 'a number'}, got {value!r}")
    return hint(value)


def _convert_choice(key: str, choices: tuple[str, ...], value: Any, raw: str | None) -> str:
    text = raw if raw is not None else str(value)
    if text not in choices:
        raise ConfigError(f"{key} takes one of {', '.join(choices)}; got {text!r}.{did_you_mean(text, choices)}")
    return text


def _convert_tuple(key: str, hints: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Return a list (`tuple[T, ...]`, also from "a,b") or a range (`tuple[T, T]`, also from a single number)."""
    if hints[-1] is Ellipsis:
        if isinstance(value, str):
            value = [parse_yaml(part.strip()) for part in value.split(",")]
        items = value if isinstance(value, list | tuple) else [value]
        for item in items:
            if hints[0] is str and not isinstance(item, str):
                raise ConfigError(f"{key} takes a list of names such as '{key}=[Fe,O]', got {value!r}")
        return tuple(_convert(key, hints[0], item, None) for item in items)
    items = [value, value] if isinstance(value, int | float) else value
    if not isinstance(items, list | tuple) or len(items) != len(hints):
        raise ConfigError(f"{key} takes a range such as '{key}=[2,5]', got {value!r}")
    return tuple(_convert(key, hint, item, None) for hint, item in zip(hints, items, strict=True))
