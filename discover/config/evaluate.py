"""What ``python -m discover.evaluate`` can be told."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from discover.config.checks import default_of, require
from discover.config.structures import PICK_HELP, GenerateConfig, Pick
from discover.options import option

_EVALUATE_TAKES: dict[str, tuple[str, ...]] = {
    "sampler": ("run", "n"),
    "proxy": ("data", "train_data", "weights"),
    "prior": ("data", "train_data", "weights"),
    "gap": ("data", "weights", "output", "n_workers"),
    "csp": (
        *("data", "n", "k", "given", "source", "draws", "pick", "templates"),
        *("output", "n_workers"),
    ),
    "dng": (
        *("reference", "n", "train_data", "hull", "n_relax", "source", "letters", "draws", "pick", "predicted"),
        *("run", "structures", "output", "n_workers"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything `python -m discover.evaluate` can be told."""

    task: Literal["sampler", "proxy", "prior", "gap", "csp", "dng"] = option(
        "sampler",
        "what to evaluate: a trained sampler, the proxies, the likelihood of the prior, the band gap model of "
        "structures (gap), structure prediction (csp), or de novo generation (dng)",
    )
    run: str | None = option(None, "for task=sampler and task=dng: folder of the run")
    data: str | None = option(
        None, "for task=proxy, prior, gap and csp: CSV file with structures, and labels for the first three"
    )
    train_data: str | None = option(
        None,
        "CSV file that the weights were trained on: adds figures on chemical systems new to the proxies, "
        "the independent-marginals baseline to the prior, and novelty and the floor of each distance to dng",
    )
    weights: str | None = option(
        None, "for task=proxy, prior and gap: folder of trained weights; null: those that ship with the package"
    )
    n: int = option(
        10000, "for task=sampler and dng: crystals to sample; for task=csp: random rows of the data, at most all"
    )
    k: int = option(1, "for task=csp: predictions per material; figures at 1, 5, 20 and 100 up to k come from one run")
    given: Literal["composition", "wyckoff"] = option(
        "composition", "for task=csp: what is known of a material; wyckoff adds its space group and letters"
    )
    source: Literal["both", "generator", "templates", "ranked", "random", "prior", "substitution"] | None = option(
        None,
        "for task=csp: proposals as discover.predict makes them (both, the default), from the composition prior and "
        "the flow alone (generator), from plain retrieval alone (templates) or in its learned order (ranked), or "
        "the prior's letters with random coordinates (random); for task=dng: the prior (the default), the prior with "
        "random coordinates (random), or element substitution in training structures (substitution)",
    )
    letters: Literal["composition", "likeliest", "prior"] | None = option(
        None, "for task=dng and source=prior: what writes space group and letters, see discover.generate"
    )
    draws: int = option(8, "for task=csp and dng with a flow: draws of coordinates, see discover.generate")
    pick: Pick | None = option(None, f"for task=csp and dng with a flow: {PICK_HELP}")
    predicted: int = option(
        0, "for task=dng with source=prior or run: structures added to each crystal's own, see discover.generate"
    )
    templates: str | None = option(
        None, "for task=csp: CSV file whose rows are retrieved; null: the aggregate that ships with the package"
    )
    reference: str | None = option(
        None, "for task=dng: CSV file, folder of CIF files or extxyz file to compare with, such as a validation split"
    )
    structures: str | None = option(
        None, "for task=dng: structures of any generator, in order: a folder of CIF files, an extxyz or a CSV file"
    )
    hull: str | None = option(
        None,
        "for task=dng: CSV file of formulas and formation energies, or folder with entries.csv.gz: adds "
        "stability and S.U.N.",
    )
    n_relax: int = option(500, "for task=dng with a hull: how many of the first structures to relax with CHGNet")
    output: str | None = option(
        None,
        "for task=csp and dng: folder for figures.json and a table with one row a material or relaxed structure; for "
        "task=gap: folder that keeps what CHGNet sees, so that the next model takes seconds",
    )
    n_workers: int = option(
        2, "for task=gap, csp and dng: processes that run CHGNet (csp: in this one), compare, fingerprint and relax"
    )
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        strangers = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("task", "seed", *_EVALUATE_TAKES[self.task])
            and getattr(self, field.name) != field.default
        ]
        require(not strangers, f"task={self.task} does not take {', '.join(strangers)}; drop them")
        if self.task == "sampler":
            require(self.run is not None, "task=sampler needs run=DIR, the folder that discover.run wrote")
        elif self.task == "dng":
            self._check_dng()
        else:
            require(self.data is not None, f"task={self.task} needs data=FILE.csv with structures and labels")
        if self.task == "csp":
            self._check_csp()
        require(self.n >= 1, f"n must be at least 1, got {self.n}")
        require(self.n_workers >= 0, f"n_workers must be at least 0, got {self.n_workers}")
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")

    def _check_csp(self) -> None:
        """Check what only structure prediction takes."""
        if self.source is None:
            object.__setattr__(self, "source", "both")
        require(
            self.source in ("both", "generator", "templates", "ranked", "random"),
            f"task=csp takes source=both, generator, templates, ranked or random, got {self.source}",
        )
        require(self.k >= 1, f"k must be at least 1, got {self.k}")
        require(
            self.given == "composition" or self.source == "generator",
            f"given=wyckoff leaves only coordinates and lattice to find: use source=generator, not {self.source}",
        )
        self._check_draws(("both", "generator"))
        require(
            self.templates is None or self.source in ("both", "templates", "ranked"),
            f"templates=FILE belongs to source=both, templates and ranked, not to source={self.source}; drop it",
        )

    def _check_draws(self, sources: tuple[str, ...]) -> None:
        """Check what tells draws of the flow apart, which only some sources have, and fill in what commands do."""
        require(self.draws >= 1, f"draws must be at least 1, got {self.draws}")
        for name in ("draws", "pick"):
            require(
                self.source in sources or getattr(self, name) == default_of(self, name),
                f"{name} applies to source={' and source='.join(sources)}; drop it",
            )
        if self.pick is None and self.source in sources:
            object.__setattr__(self, "pick", default_of(GenerateConfig, "pick"))

    def _check_dng(self) -> None:
        """Check what only de novo generation takes."""
        require(
            not (self.reference is None and self.hull is None),
            "task=dng needs reference=FILE.csv to compare with, such as a validation split; or hull=FOLDER, for "
            "stability alone; or both",
        )
        given = [name for name in ("run", "structures", "source") if getattr(self, name) is not None]
        require(len(given) <= 1, f"{' and '.join(given)} each say where the structures come from; keep one of them")
        if not given:
            object.__setattr__(self, "source", "prior")
        require(
            self.source in (None, "prior", "random", "substitution"),
            f"task=dng takes source=prior, random or substitution, got {self.source}",
        )
        require(
            self.source != "substitution" or not (self.train_data is None or self.hull is None),
            "source=substitution needs train_data=FILE for its parents and hull=FOLDER for the known formulas",
        )
        require(
            self.letters is None or self.source == "prior",
            "letters applies to source=prior; drop it",
        )
        self._check_draws(("prior",))
        require(self.predicted >= 0, f"predicted must be at least 0, got {self.predicted}")
        require(
            not self.predicted or self.run is not None or (self.source == "prior" and self.letters != "prior"),
            "predicted applies to run=DIR and to source=prior without letters=prior; drop it",
        )
        require(self.n_relax >= 1, f"n_relax must be at least 1, got {self.n_relax}")
        require(self.hull is not None or self.n_relax == 500, "n_relax needs hull=FOLDER; give it or drop n_relax")
