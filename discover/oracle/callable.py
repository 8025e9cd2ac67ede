"""A user's own function as the oracle: `module:function`, from a structure to numbers.

The function takes a `pymatgen.core.Structure` and returns one of

- a number: the value of `quantity`;
- a mapping of the fields of a `Label` that hold results (`FIELDS`), and of `properties`, a mapping of further numbers;
- a `Label`.

It may take hours, start programs and raise: whatever it does wrong becomes a failed label with the reason. The module
is the user's own code and is executed.
"""

import importlib
import math
import numbers
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from pymatgen.core import Structure

from discover.oracle.base import NUMBERS, Label, LabelStatus

#: What a returned mapping may hold: everything of a `Label` but the time, which is measured.
FIELDS = tuple(item.name for item in fields(Label) if item.name != "seconds")
_IMPORT_PATH = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


class CallableOracleError(ValueError):
    """A function that cannot be imported, or returned something that is no label."""


@dataclass(frozen=True)
class CallableOracle:
    """Labels structures with a function.

    Args:
        function: Its import path, `module:function`.
        quantity: What a plain number is: one of `NUMBERS`, or the name of another property.
        folder: Where the module is looked for first; by default the current folder of the process that makes this.

    Raises:
        CallableOracleError: If the path does not read `module:function`.
    """

    function: str
    quantity: str = "formation_energy_per_atom"
    folder: str = field(default_factory=os.getcwd)

    def __post_init__(self) -> None:
        """Check the path."""
        if not _IMPORT_PATH.match(self.function):
            raise CallableOracleError(f"oracle function must read module:function, got {self.function!r}")
        if not self.quantity.isidentifier() or (self.quantity in FIELDS and self.quantity not in NUMBERS):
            raise CallableOracleError(
                f"quantity must be one of {', '.join(NUMBERS)} or the name of another property, got {self.quantity!r}"
            )

    @property
    def name(self) -> str:
        """Name that labels are stored under."""
        return self.function

    def describe(self) -> Mapping[str, Any]:
        """Return the settings for JSON."""
        return asdict(self)

    def start(self) -> None:
        """Import the function.

        Raises:
            CallableOracleError: If that fails.
        """
        _load(self.function, self.folder)

    def label(self, structure: Structure) -> Label:
        """Return what the function returns, as a label.

        Raises:
            CallableOracleError: If that is none. What the function raises passes through.
        """
        return as_label(_load(self.function, self.folder)(structure.copy()), self.quantity)


def as_label(value: Any, quantity: str) -> Label:
    """Return a user's number, mapping or label as a label.

    Raises:
        CallableOracleError: If it is of another type, has an unknown key or holds no finite number.
    """
    if isinstance(value, Label):
        return value
    if not isinstance(value, Mapping):
        value = {quantity: value} if quantity in NUMBERS else {"properties": {quantity: value}}
    if unknown := sorted(str(key) for key in value if key not in FIELDS):
        raise CallableOracleError(
            f"unknown {', '.join(unknown)}; a label has {', '.join(FIELDS)}; other numbers belong under properties"
        )
    properties = value.get("properties", {})
    if not isinstance(properties, Mapping):
        raise CallableOracleError(f"properties must be a mapping of numbers, got {type(properties).__name__}")
    _check_types(value)
    return Label(
        **{
            **value,
            **{name: _number(name, value[name]) for name in NUMBERS if name in value},
            "properties": {str(name): _number(str(name), number) for name, number in properties.items()},
            "status": _status(value.get("status", LabelStatus.GIVEN)),
        }
    )


def _check_types(value: Mapping[str, Any]) -> None:
    kinds: dict[str, Any] = {"structure": Structure, "reason": str, "n_steps": int}
    kinds |= {"space_group_before": int, "space_group_after": int}
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind | None):
            raise CallableOracleError(f"{name} must be of type {kind.__name__}, got {value[name]!r}")


def _status(value: Any) -> LabelStatus:
    try:
        return LabelStatus(value)
    except ValueError:
        raise CallableOracleError(f"status must be one of {', '.join(LabelStatus)}, got {value!r}") from None


def _number(name: str, value: Any) -> float:
    """Return a finite number; numpy's and torch's scalars count."""
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise CallableOracleError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise CallableOracleError(f"{name} is {value}; leave out what is unknown, and raise if the calculation failed")
    return float(value)


@cache
def _load(path: str, folder: str) -> Callable[[Structure], Any]:
    module_name, function_name = path.split(":")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise CallableOracleError(f"cannot import {path} (also looked in {folder}): {error}") from error
    if not callable(function):
        raise CallableOracleError(f"{path} is {type(function).__name__}, expected a function")
    return function
