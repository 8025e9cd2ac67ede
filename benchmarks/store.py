"""How fast the store takes and finds candidates and labels, and how much room they need.

    python -m benchmarks.store n=1000000 [labels=500] [url=postgresql+psycopg://...]

Made-up candidates go through `Store.add_rows`, then come the questions that a report asks; labels, each flushed to the
disk before the next, go through `Store.add_label`. Making the candidates is timed apart and taken off.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pymatgen.core import Element, Lattice, Structure

from discover.errors import ConfigError, main_guard
from discover.options import option, parse_args
from discover.oracle.base import Label, LabelStatus
from discover.store import Candidate, Store

RUN = "benchmark"
ORACLE = "chgnet"
SYMBOLS = [Element.from_Z(number).symbol for number in range(1, 95)]


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Everything this benchmark can be told."""

    n: int = option(1_000_000, "candidates that are seen")
    labels: int = option(500, "labels, each on the disk before the next")
    folder: str = option("", "where the SQLite file goes for the time of the benchmark; the system's temporary folder")
    url: str = option("", "an empty PostgreSQL database instead, postgresql+psycopg://user:password@host/database")
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        if self.n < 1 or self.labels < 1:
            raise ConfigError(f"n and labels must be at least 1, got {self.n} and {self.labels}")


def candidates(n: int, seed: int) -> Iterator[Candidate]:
    """Yield made-up ternary candidates; formulas repeat, as those of a sampler do, keys hardly ever."""
    generator = random.Random(seed)
    for number in range(n):
        elements = sorted(int(generator.paretovariate(1.0) * 7) % 94 for _ in range(3))
        counts = generator.choices((1, 2, 3, 4, 6, 8), k=3)
        group = generator.randint(1, 230)
        letters = generator.choices("abcdefgh", k=3)
        orbits = ",".join(f"{e + 1}{letter}{c}" for e, letter, c in zip(elements, letters, counts, strict=True))
        symbols = [SYMBOLS[element] for element in elements]
        yield Candidate(
            candidate_id=f"r01-{number:07d}",
            round=1,
            source="sampler",
            crystal={"space_group": group, "elements": elements, "letters": letters, "counts": counts},
            key=f"{group}:{orbits}:{number % 97}",
            formula="".join(f"{s}{c if c > 1 else ''}" for s, c in zip(symbols, counts, strict=True)),
            chemical_system="-".join(sorted(symbols)),
            space_group=group,
            n_atoms=sum(counts),
            prototype="",
            log_reward=-generator.expovariate(1.0),
            acquisition=0.0,
            predictions={"band_gap": (1.5, 0.3), "e_above_hull": (0.05, 0.04)},
            structure=None,
        )


def timed(question: Callable[[], Any]) -> tuple[Any, float]:
    """Return an answer and the seconds it took."""
    start = time.perf_counter()
    answer = question()
    return answer, time.perf_counter() - start


def measure(config: StoreConfig, url: str) -> dict[str, Any]:
    """Return rates and times on a store that is empty at the start."""
    figures: dict[str, Any] = {"n": config.n, "labels": config.labels}
    with Store.open(url) as store:
        store.start_run(RUN, {})
        making = insert(config, lambda rows: sum(1 for _ in rows))
        adding = insert(config, lambda rows: store.add_rows(RUN, rows))
        again = insert(config, lambda rows: store.add_rows(RUN, rows))
        figures["n_new"] = adding[0]
        figures["rows_per_s"] = config.n / (adding[1] - making[1])
        figures["rows_per_cpu_s"] = config.n / (adding[2] - making[2])  # of this process: what an idle machine nears
        figures["known_rows_per_s"] = config.n / (again[1] - making[1])
        figures |= ask(store, config)
        figures |= label(store, config)
    return figures


def insert(config: StoreConfig, consume: Callable[[Iterator[Candidate]], int]) -> tuple[int, float, float]:
    """Return what a consumer of all candidates says, and its seconds on the clock and on the processor."""
    cpu = time.process_time()
    n, seconds = timed(lambda: consume(candidates(config.n, config.seed)))
    return n, seconds, time.process_time() - cpu


def ask(store: Store, config: StoreConfig) -> dict[str, float]:
    """Return the seconds of the questions that a report asks."""
    counts, grouping = timed(lambda: store.seen_formulas(RUN))
    formula = next(iter(counts))
    n_of_one, counting = timed(lambda: store.n_seen(RUN, formula))
    best, ranking = timed(lambda: store.best_seen(RUN, 100))
    keys = [candidate.key for candidate in candidates(min(config.n, 1000), config.seed)]
    found, finding = timed(lambda: [store.find_seen(RUN, key) for key in keys])
    if n_of_one != counts[formula] or len(best) != min(config.n, 100) or not all(found):
        raise ConfigError("the store held other runs of this benchmark; give an empty one")
    return {
        "n_formulas": len(counts),
        "count_all_s": timed(lambda: store.n_seen(RUN))[1],
        "count_each_formula_s": grouping,
        "count_one_formula_ms": 1000 * counting,
        "best_100_ms": 1000 * ranking,
        "by_key_ms": 1000 * finding / len(keys),
    }


def label(store: Store, config: StoreConfig) -> dict[str, float]:
    """Return the rates of adding a round with structures, of labelling it, and of reading it."""
    cell = Structure(Lattice.orthorhombic(4.1, 5.2, 6.3), ["Na"] * 10, [[i / 10, i / 7, i / 9] for i in range(10)])
    chosen = [
        Candidate(**{**vars(candidate), "structure": cell}) for candidate in candidates(config.labels, config.seed)
    ]
    _, adding = timed(lambda: store.add_round(RUN, 1, chosen, {}))
    given = Label(status=LabelStatus.CONVERGED, structure=cell, energy_per_atom=-3.4, n_steps=40, seconds=4.2)

    def add(candidate: Candidate) -> bool:
        return store.add_label(
            RUN, candidate.candidate_id, ORACLE, given, e_above_hull=0.03, hull="MP 2020", settings={"fmax": 0.1}
        )

    n_added, labelling = timed(lambda: sum(add(candidate) for candidate in chosen))
    labelled, reading = timed(lambda: store.labels(RUN, ORACLE))
    if n_added != config.labels or len(labelled) != config.labels:
        raise ConfigError("the store held other runs of this benchmark; give an empty one")
    return {
        "round_candidates_per_s": config.labels / adding,
        "labels_per_s": config.labels / labelling,
        "labels_read_per_s": config.labels / reading,
    }


def main(words: Sequence[str]) -> None:
    """Measure and print."""
    config = parse_args(StoreConfig, words)
    with TemporaryDirectory(dir=config.folder or None) as folder:
        file = Path(folder) / "store.db"
        figures = measure(config, config.url or str(file))
        if not config.url:
            size = file.stat().st_size
            figures |= {"file_mb": size / 1e6, "bytes_per_row": size / config.n}
    for name, value in figures.items():
        print(f"{name:24s} {value:14,.3f}" if isinstance(value, float) else f"{name:24s} {value:14,d}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main_guard(main)
