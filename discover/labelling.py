"""Labels of structures through a run's engine, or here, under limits and with progress."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pymatgen.core import Structure
from tqdm import tqdm

from discover.config import RunConfig
from discover.engine import Engine, Limits, Task, open_engine
from discover.oracle.base import Label, Oracle
from discover.oracle.chgnet import ChgnetOracle

LOOKING = "looking at structures"
_GRACE = 60.0  # seconds in which an oracle that watches its time may still hand over what it has
_RETRIES = 3  # of a structure whose worker was lost


def limits_of(config: RunConfig, oracle: Oracle) -> Limits:
    """Return what one structure may cost."""
    return Limits(
        seconds=config.oracle.time_limit + (_GRACE if hasattr(oracle, "time_limit") else 0.0),
        memory_gb=config.oracle.memory_limit,
        retries=_RETRIES,
    )


def labels_of(
    config: RunConfig,
    oracle: Oracle,
    structures: Mapping[str, Structure],
    *,
    description: str,
    total: int | None = None,
) -> Iterator[tuple[str, Label]]:
    """Yield the name and label of each structure as it is finished, in any order.

    Args:
        config: Says which engine, and its limits.
        oracle: What labels.
        structures: By name.
        description: What the progress bar says.
        total: Structures of which these are what is left; None: these are all.

    Raises:
        EngineError: If the oracle cannot start, or no worker can be had. Labels yielded before are good.
    """
    if not structures:
        return
    settings = config.engine
    config_file = None if settings.config is None else Path(settings.config)
    with open_engine(settings.name, n_workers=settings.workers, config_file=config_file) as engine:
        yield from _labels(engine, oracle, structures, limits_of(config, oracle), description, total)


def look_oracle(time_limit: float = 300.0) -> ChgnetOracle:
    """Return what tells energy and band gap of a structure as it is."""
    return ChgnetOracle(max_steps=0, rattle=0.0, time_limit=time_limit)


def single_points(structures: Sequence[Structure], *, n_workers: int) -> list[Label]:
    """Return CHGNet's energy and band gap of each structure as it is, computed by processes of this machine.

    Raises:
        EngineError: If CHGNet cannot start.
    """
    if not structures:
        return []
    named = {str(place): structure for place, structure in enumerate(structures)}
    with open_engine("local", n_workers=n_workers, config_file=None) as engine:
        labels = dict(_labels(engine, look_oracle(), named, Limits(retries=_RETRIES), LOOKING, None))
    return [labels[name] for name in named]


def _labels(
    engine: Engine,
    oracle: Oracle,
    structures: Mapping[str, Structure],
    limits: Limits,
    description: str,
    total: int | None,
) -> Iterator[tuple[str, Label]]:
    tasks = [Task(name, structure) for name, structure in structures.items()]
    whole = len(tasks) if total is None else total
    with tqdm(
        total=whole, initial=whole - len(tasks), desc=description, unit="structure", disable=None, file=sys.stderr
    ) as bar:
        for name, label in engine.label(oracle, tasks, limits):
            yield name, label
            bar.update(1)
