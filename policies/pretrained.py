"""Save and load policies as safetensors beside the JSON that rebuilds them, and the prior that ships."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from envs.crystal_env import CrystalEnv
from envs.equivalence import log_n_images
from envs.restrictions import Space, mp20_space
from policies.errors import CheckpointError
from policies.policy import CrystalPolicy, PolicyConfig
from policies.rollout import walk
from policies.storage import save_weights

if TYPE_CHECKING:
    from torch import Tensor

    from envs.crystal import CrystalBatch

SHIPPED = Path(__file__).parent / "weights" / "prior"
#: log p that stands in for zero where the prior cannot represent a crystal, and for anything below: all but one in ten
#: thousand validation crystals that it can lie above, and what an untrained policy draws may not.
UNREPRESENTABLE = -80.0
_ROWS = 4096


def save_policy(stem: Path, policy: CrystalPolicy, about: dict[str, object] | None = None) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json`` (configuration and whatever ``about`` says)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    save_weights(Path(f"{stem}.safetensors"), policy.state_dict())
    content = {"kind": "policy", "config": asdict(policy.config), **(about or {})}
    text = re.sub(r"\[\s+([^][]*?)\s+\]", _on_one_line, json.dumps(content, indent=2))
    stem.with_suffix(".json").write_text(text + "\n")


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"


def load_policy(stem: Path) -> CrystalPolicy:
    """Return the policy that ``save_policy`` wrote.

    Raises:
        CheckpointError: If the files are missing, truncated or of something else.
    """
    try:
        content = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(f"{stem}.safetensors")
        policy = CrystalPolicy(PolicyConfig(**content["config"]))
        policy.load_state_dict(tensors)
    except (
        OSError,
        SafetensorError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        RuntimeError,
    ) as error:
        raise CheckpointError(f"{stem}.json and .safetensors are not a policy of this version: {error}") from error
    return policy


def prior_space(chemistry: str, *, mixed_valence: bool = False) -> Space:
    """Return the space of the prior: the default one, with or without a charge rule.

    One network serves both. Without a charge rule every real crystal counts; under it the network has
    learned from the ionic ones alone, which is better than masking what it knows of intermetallics.
    """
    return replace(mp20_space(), chemistry=chemistry, mixed_valence=mixed_valence)


class Prior:
    """A policy trained by maximum likelihood on real crystals, with its exact log-probability.

    Args:
        policy: Trained in ``prior_space``.
        chemistry: ``"ionic"`` or ``"any"``, which of the two densities is meant.
        mixed_valence: Whether the charge rule lets one element take two states.
    """

    def __init__(self, policy: CrystalPolicy, chemistry: str, *, mixed_valence: bool = False) -> None:
        self.policy = policy.eval().requires_grad_(requires_grad=False)
        self.space = prior_space(chemistry, mixed_valence=mixed_valence)
        self.env = CrystalEnv(self.space)

    def log_prob(self, crystals: CrystalBatch) -> Tensor:
        """Return (n,) log p of crystals, all equivalent letter assignments together.

        The density refers to the lattice's unit coordinates. The policy was trained on random equivalents, so each
        has about the same share; one is evaluated and their number multiplied. Crystals outside the prior's space get
        ``UNREPRESENTABLE``.
        """
        parts = []
        for rows in torch.arange(len(crystals)).split(_ROWS):
            batch = crystals.select(rows)
            walks = walk(self.env, batch)
            inside = walks.legal
            parts.append(torch.full((len(rows),), UNREPRESENTABLE, dtype=torch.float64))
            if not bool(inside.any()):
                continue
            if not bool(inside.all()):  # a choice that the space lacks has no probability to look up
                batch = batch.select(inside)
                walks = walk(self.env, batch)
            with torch.no_grad():
                log_p = self.policy.log_prob(walks.records, walks.n) + log_n_images(batch, self.space.box)
            parts[-1][inside] = log_p.clamp(min=UNREPRESENTABLE)
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def load_prior(chemistry: str, *, mixed_valence: bool = False) -> Prior:
    """Return the prior that ships with the package, over ``"ionic"`` or over ``"any"`` crystals."""
    return Prior(load_policy(SHIPPED), chemistry, mixed_valence=mixed_valence)
