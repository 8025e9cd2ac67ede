"""``python -m discover.export run=DIR to=vasp``: what a run found, for other programs.

`vasp` and `espresso` write inputs that relax the best structures again; `parquet`, `extxyz` and `ase` write everything
that the run's store holds; `poscar` the best relaxed structures.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from discover.campaign import best_labelled, open_store
from discover.config import ExportConfig
from discover.dft_inputs import BY_ELEMENT, Pseudopotentials, write_espresso_inputs, write_vasp_inputs
from discover.errors import main_guard
from discover.options import help_text, parse_args
from discover.run_folder import open_run_folder
from discover.store_export import export
from discover.structure_files import write_structures

USAGE = "python -m discover.export run=DIR to=vasp|espresso|poscar|parquet|extxyz|ase [n=12] [output=PATH]"
_SUFFIX = {"parquet": ".parquet", "extxyz": ".extxyz", "ase": ".db"}


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(ExportConfig, USAGE))
        return
    config = parse_args(ExportConfig, words)
    folder = open_run_folder(config.run)
    suffix = _SUFFIX.get(config.to, "")
    output = Path(config.output) if config.output is not None else folder.path / f"export-{config.to}{suffix}"
    store, run, run_config = open_store(folder)
    with store:
        if config.to in _SUFFIX:
            export(store, run, output)
            print(output)
            return
        best = best_labelled(store, run, run_config)
    found = {item.candidate.candidate_id: item.label.structure or item.candidate.structure for item in best}
    structures = dict([(name, structure) for name, structure in found.items() if structure is not None][: config.n])
    failures: dict[str, str] = {}
    if config.to == "vasp":
        failures = write_vasp_inputs(output, structures)
    elif config.to == "espresso":
        potentials = BY_ELEMENT if config.potentials is None else Pseudopotentials.load(Path(config.potentials))
        write_espresso_inputs(output, structures, pseudopotentials=potentials)
    else:
        write_structures(output, structures, "poscar")
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(structures) - len(failures)} of {len(structures)} structures in {output}")


if __name__ == "__main__":
    main_guard(main)
