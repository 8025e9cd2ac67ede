"""What ``python -m discover.predict`` and ``discover.generate`` can be told."""

from dataclasses import dataclass
from typing import Literal

from discover.config.checks import default_of, require
from discover.config.run import RestrictConfig
from discover.options import group, option
from envs.restrictions import SPACES, restrict

Pick = Literal["agreement", "chgnet"]
PICK_HELP = (
    "which of the draws is best: that of lowest CHGNet energy as built, 15 ms each (chgnet), or the one that others "
    "agree with, without any potential (agreement)"
)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Everything `python -m discover.predict` can be told."""

    composition: str = option(
        "", "formula: TiO2 leaves the size of the cell open, Ti4O8 is the primitive cell's content"
    )
    n_formula_units: int | None = option(
        None, "formula units in the primitive cell; null: 1 to as many as 20 atoms make, by how usual each is"
    )
    space_group: int | None = option(None, "only this international number, 1 to 230")
    chemistry: Literal["any", "ionic"] = option(
        "any", "take every composition, or refuse what cannot be charge-neutral"
    )
    n: int = option(20, "structures to predict")
    source: Literal["both", "generator", "templates"] = option(
        "both",
        "where proposals come from: the composition-conditioned prior, known prototypes, or both ranked together",
    )
    templates: str | None = option(
        None,
        "data set (CSV, folder of CIF files, extxyz) whose rows are the prototypes; null: the aggregate that ships",
    )
    rank: Literal["model", "chgnet"] = option(
        "model", "by the learned ranking, or by CHGNet's energy per atom after a short relaxation"
    )
    relax_steps: int | None = option(
        None, "for rank=chgnet: most steps of the relaxation, 0 for the energies as built; null: 50"
    )
    structure: Literal["flow", "random"] = option(
        "flow", "how coordinates are found: flow (learned) or random (the baseline)"
    )
    draws: int = option(8, "coordinates that the flow draws for likely letters, the best is kept; 1 is faster")
    pick: Pick = option("chgnet", PICK_HELP)
    flow: str | None = option(None, "folder of a flow from discover.train what=flow; null: as shipped")
    format: Literal["cif", "extxyz", "poscar"] = option(
        "cif", "one CIF or POSCAR file each, or one extxyz file with all"
    )
    proxies: str | None = option(None, "folder of proxies from discover.train what=proxy or trees; null: as shipped")
    seed: int = option(0, "random seed; same seed, same machine, same result")
    output: str | None = option(None, "folder to write to; null: runs/<time>-predict-<formula>")
    threads: int = option(1, "threads of torch")
    n_workers: int = option(2, "for rank=chgnet: processes that relax")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(bool(self.composition), "prediction needs a composition, such as composition=TiO2")
        for name in ("n", "threads", "draws", "n_formula_units"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.space_group is None or 1 <= self.space_group <= 230,
            f"space_group is an international number, 1 to 230; got {self.space_group}",
        )
        require(
            self.templates is None or self.source != "generator",
            "templates=FILE does nothing with source=generator; drop one of them",
        )
        require(
            self.relax_steps is None or self.rank == "chgnet", "relax_steps applies to rank=chgnet; drop it or rank so"
        )
        require(self.relax_steps is None or self.relax_steps >= 0, f"relax_steps must be >= 0, got {self.relax_steps}")
        require(self.n_workers >= 0, f"n_workers must be >= 0, got {self.n_workers}")
        require(
            self.rank == "chgnet" or self.n_workers == default_of(self, "n_workers"),
            "n_workers relax for rank=chgnet; drop it or rank so",
        )
        require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        require(
            self.source != "templates" or (self.structure == "flow" and self.flow is None),
            "structure and flow find coordinates, and those of source=templates are known; drop them",
        )
        require(
            (self.structure == "flow" and self.source != "templates") or self.draws == default_of(self, "draws"),
            "draws is of structure=flow and of sources that need coordinates; drop it",
        )
        require(
            (self.structure == "flow" and self.source != "templates") or self.pick == default_of(self, "pick"),
            "pick is of structure=flow and of sources that need coordinates; drop it",
        )
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything `python -m discover.generate` can be told."""

    n: int = option(1000, "crystals to draw; all of them count, those without a structure too")
    chemistry: Literal["any", "ionic"] = option("any", "no charge rule, or charge-neutral and Pauling-ordered")
    mixed_valence: bool = option(False, "let one element take two oxidation states (Fe3O4), for chemistry=ionic")
    restrict: RestrictConfig = group(RestrictConfig, "what the crystals may contain")
    letters: Literal["composition", "likeliest", "prior"] | None = option(
        None,
        "what writes space group and letters: the composition prior, with lattices from the flow, drawn (composition) "
        "or its most probable ones (likeliest), or the prior that draws the compositions, with its own lattices "
        "(prior); null: composition, or prior where lengths, angles or volumes are restricted or structure=random",
    )
    structure: Literal["flow", "random"] = option(
        "flow", "how coordinates are found: flow (learned) or random (the baseline)"
    )
    predicted: int = option(
        0,
        "structures that discover.predict adds to each crystal's own, unless letters=prior; the one of lowest CHGNet "
        "energy is kept",
    )
    draws: int = option(
        8, "coordinates that the flow draws for each crystal, the best is kept; 1 takes a quarter of the time"
    )
    pick: Pick = option("chgnet", PICK_HELP)
    n_workers: int = option(2, "processes that compute energies, for pick=chgnet and predicted")
    flow: str | None = option(None, "folder of a flow from discover.train what=flow; null: as shipped")
    format: Literal["cif", "extxyz", "poscar"] = option(
        "cif", "one CIF or POSCAR file each, or one extxyz file with all"
    )
    proxies: str | None = option(None, "folder of proxies from discover.train what=proxy or trees; null: as shipped")
    prior: str | None = option(None, "folder of a prior from discover.train what=prior; null: as shipped")
    seed: int = option(0, "random seed; same seed, same machine, same result")
    output: str | None = option(None, "folder to write to; null: runs/<time>-generate")
    threads: int = option(1, "threads of torch")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
            RestrictionError: Naming the restriction, or the two that clash.
        """
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")
        require(self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        require(
            not (self.mixed_valence and self.chemistry == "any"),
            "mixed_valence=on does nothing with chemistry=any, which has no charge rule; drop one of them",
        )
        restrict(SPACES["mp20"](), self.restrict.to_restrictions())  # RestrictionError before anything is built
        lattice = [name for name in ("length", "angle", "volume_per_atom") if getattr(self.restrict, name) is not None]
        require(self.predicted >= 0, f"predicted must be at least 0, got {self.predicted}")
        require(self.draws >= 1, f"draws must be at least 1, got {self.draws}")
        require(
            self.structure == "flow" or self.draws == default_of(self, "draws"), "draws is of structure=flow; drop it"
        )
        require(self.n_workers >= 0, f"n_workers must be at least 0, got {self.n_workers}")
        require(self.structure == "flow" or self.pick == default_of(self, "pick"), "pick is of structure=flow; drop it")
        require(
            self.predicted > 0
            or (self.structure == "flow" and self.pick == "chgnet" and self.draws > 1)
            or self.n_workers == 2,
            "n_workers computes energies, for pick=chgnet with several draws or predicted=4 or so; drop it",
        )
        bound = [f"restrict.{name}" for name in lattice] + (["structure=random"] if self.structure == "random" else [])
        if self.letters is None:
            object.__setattr__(self, "letters", "prior" if bound else "composition")
        require(
            self.letters == "prior" or not bound,
            f"letters={self.letters} leaves the lattice to the flow, but {' and '.join(bound)} needs that of the "
            "prior; use letters=prior",
        )
        require(
            not self.predicted or self.letters != "prior",
            "predicted structures have letters and cells of their own, which letters=prior, restricted cells and "
            "structure=random rule out; drop predicted",
        )
