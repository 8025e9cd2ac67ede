"""What ``python -m discover.train`` can be told."""

from dataclasses import dataclass
from typing import Literal

from discover.config.checks import require
from discover.options import option


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `python -m discover.train` can be told."""

    what: Literal["prior", "composition_prior", "proxy", "trees", "flow", "gap"] = option(
        "prior",
        "what to train: the prior policy, the prior of letters given a composition, the property proxies, "
        "scikit-learn trees in their place, the flow that finds coordinates, or the band gap of relaxed structures",
    )
    data: str = option("", "CSV file in the field's form (material_id, cif, labels), folder of CIF files, extxyz")
    output: str = option("", "folder for the weights and the configuration")
    epochs: int | None = option(None, "passes over the data; null: the trainer's default")
    batch_size: int | None = option(None, "crystals per step; null: the trainer's default")
    lr: float | None = option(None, "learning rate; null: the trainer's default")
    minutes: float | None = option(
        None, "priors and flow: train for this many minutes; the learning rate falls to its end within them"
    )
    n_networks: int | None = option(
        None, "for what=composition_prior: members of the ensemble, which share the minutes; null: 3"
    )
    device: str | None = option(None, "for what=flow: cpu or cuda; null: cuda where there is one")
    start: str | None = option(
        None,
        "for what=flow, prior and proxy: folder of one to start from, to refine it or to fit it to other data (a prior "
        "then learns to reckon with charges too); null: none",
    )
    labels: str | None = option(
        None,
        "for what=proxy: data set of proposed crystals to learn from as well, labelled with what they relax to, such "
        "as benchmarks.prior_labels writes; null: none",
    )
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(bool(self.data), "training needs a data set: data=FILE.csv, see python -m discover.fetch")
        require(
            self.what == "flow" or self.device is None,
            f"device applies to what=flow; what={self.what} trains on the CPU. Drop it",
        )
        require(
            self.what in ("flow", "prior", "proxy") or self.start is None,
            f"start applies to what=flow, prior and proxy; what={self.what} starts from nothing. Drop it",
        )
        require(
            self.what == "proxy" or self.labels is None,
            f"labels applies to what=proxy; what={self.what} learns from data alone. Drop it",
        )
        require(
            self.what == "composition_prior" or self.n_networks is None,
            f"n_networks applies to what=composition_prior; what={self.what} has its own. Drop it",
        )
        require(bool(self.output), "training needs a folder to write to: output=DIR")
        for name in ("epochs", "batch_size", "lr", "minutes", "n_networks"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, got {value}")
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")
