"""What the commands that work on a finished run can be told."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from pymatgen.core import Element

from discover.config.checks import default_of, require
from discover.config.run import RestrictConfig
from discover.options import group, option


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything `python -m discover.sample` can be told."""

    run: str = option("", "folder of a finished or interrupted run")
    n: int = option(1000, "crystals to return")
    correct: Literal["none", "sir", "finetune"] = option(
        "none",
        "make a restricted sample follow the reward again: resample (sir) or train on under the restriction (finetune)",
    )
    restrict: RestrictConfig = group(RestrictConfig, "restrictions on top of those of the run")
    n_structures: int = option(0, "of the best, how many to build as CIF files")
    seed: int = option(0, "random seed")
    output: str | None = option(None, "folder to write to; null: <run>/samples/001, 002, ...")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(bool(self.run), "sampling needs a trained run: run=DIR, the folder that discover.run wrote")
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(self.n_structures >= 0, f"n_structures must be >= 0, got {self.n_structures}")
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Everything `python -m discover.report` can be told."""

    run: str = option("", "folder of the run whose report is rebuilt")

    def __post_init__(self) -> None:
        """Check that a run is named.

        Raises:
            ConfigError: If none is.
        """
        require(bool(self.run), "the report needs run=DIR, the folder that discover.run wrote")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything `python -m discover.export` can be told."""

    run: str = option("", "folder of a run that checked structures")
    to: Literal["vasp", "espresso", "poscar", "parquet", "extxyz", "ase"] = option(
        "vasp", "inputs of VASP or Quantum ESPRESSO, or POSCAR files, of the best; or all that the run's store holds"
    )
    n: int = option(12, "how many of the best, for vasp, espresso and poscar")
    potentials: str | None = option(None, "for to=espresso: JSON file of the SSSP library; null: names such as Fe.upf")
    output: str | None = option(None, "folder or file to write; null: export-<to> in the run's folder")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(bool(self.run), "an export needs run=DIR, the folder that discover.run wrote")
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(
            self.to in ("vasp", "espresso", "poscar") or self.n == default_of(self, "n"),
            f"n is how many of the best; to={self.to} writes all that the store holds; drop n",
        )
        require(self.potentials is None or self.to == "espresso", "potentials applies to to=espresso; drop it")


def _element_energies(key: str, value: Any) -> Mapping[str, float] | None:
    """Return energies of elements as a user gives them, in eV/atom.

    Raises:
        ConfigError: If they are something else.
    """
    if value is None:
        return None
    good = isinstance(value, Mapping) and all(
        isinstance(name, str) and Element.is_valid_symbol(name) and type(number) in (int, float) and isfinite(number)
        for name, number in value.items()
    )
    require(good, f"{key} takes energies in eV/atom such as '{key}={{Na: -1292.4, Cl: -460.1}}', got {value!r}")
    return {name: float(number) for name, number in value.items()}


@dataclass(frozen=True, kw_only=True)
class AddResultsConfig:
    """Everything `python -m discover.add_results` can be told."""

    run: str = option("", "folder of the run that proposed the structures")
    data: str = option("", "folder with one folder of results per structure, named by its id")
    references: Mapping[str, float] | None = option(
        None,
        "for Quantum ESPRESSO: eV/atom of the elements with the same pseudopotentials and cutoffs, as in "
        "'references={Na: -1292.4, Cl: -460.1}'; null: no formation energies",
        convert=_element_energies,
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(bool(self.run), "results belong to a run: run=DIR, the folder that discover.run wrote")
        require(bool(self.data), "data=FOLDER has one folder of results per structure, named by its id")
