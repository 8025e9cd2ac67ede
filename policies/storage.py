"""Weights as files that are complete or not there at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that others may read."""
    partial = path.with_name(f"{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.chmod(0o644)  # safetensors writes private files
    partial.replace(path)
