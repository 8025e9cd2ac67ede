"""Weights and what describes them as two files of a folder, each complete or not there at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class StorageError(ValueError):
    """Files that are missing, truncated or foreign."""


@dataclass(frozen=True)
class WeightFiles:
    """The two files of one kind of model.

    Args:
        weights: Name of the safetensors file.
        description: Name of the JSON file.
        form: What the description says it is; anything else is refused.
    """

    weights: str
    description: str
    form: str

    def write(self, folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Write both files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        weights, text = folder / f"{self.weights}.partial", folder / f"{self.description}.partial"
        save_file(dict(tensors), weights)
        text.write_text(json.dumps({"format": self.form, **description}, indent=1) + "\n")
        weights.chmod(0o644)  # safetensors writes private files
        weights.replace(folder / self.weights)
        text.replace(folder / self.description)

    def read(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and description.

        Raises:
            StorageError: Saying what is wrong.
        """
        try:
            description = json.loads((folder / self.description).read_text())
            tensors = load_file(folder / self.weights)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
            raise StorageError(f"{folder} holds nothing readable ({error})") from error
        if not isinstance(description, dict) or description.get("format") != self.form:
            raise StorageError(f"{folder / self.description} is not of the format {self.form!r}")
        return tensors, description
