"""``python -m discover.add_results run=DIR data=FOLDER``: results of VASP or Quantum ESPRESSO become labels of a run.

The folder has one folder per structure, named by its id, as `discover.export` wrote them. Labels go into the run's
store under the oracle "dft", beside those that are there; a structure that has one keeps it, so energies of elements
for Quantum ESPRESSO (`references`) belong to the first time. What has failed, is still running or ran out of steps is
named and not stored, so that it can be read again. What succeeded stands in for the numbers of the run's own oracle in
rounds that have not been taught yet and, from the next ``python -m discover.run resume=DIR``, in the tables, the
finalists and the proxies that the run leaves; with ``rounds=5 oracle.budget=100`` behind it, a run that has finished
goes on and learns from them.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from discover.campaign import check_same_hull, open_store, proxies_that_learn
from discover.campaign_records import DFT, IMPLIED_HULL, above_hull
from discover.config import AddResultsConfig
from discover.dft_results import read_results
from discover.errors import main_guard
from discover.options import help_text, parse_args
from discover.oracle.base import LabelStatus
from discover.oracle.hull import Hull
from discover.run_folder import open_run_folder

USAGE = "python -m discover.add_results run=DIR data=FOLDER"


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(AddResultsConfig, USAGE))
        return
    config = parse_args(AddResultsConfig, words)
    store, run, run_config = open_store(open_run_folder(config.run))
    file = run_config.oracle.hull
    hull = None if file is None else Hull.load(file)
    start = proxies_that_learn(run_config.proxies) if hull is None else None
    with store:
        check_same_hull(store, run, hull, run_config)
        candidates = {item.candidate_id: item for item in store.candidates(run)}
        proposed = {name: item.structure for name, item in candidates.items() if item.structure is not None}
        results = read_results(Path(config.data), proposed, references=config.references)
        found: Counter[str] = Counter()
        for name, label in results.items():
            if label.reason:
                print(f"{name}: {label.reason}")
            # What is stored stays: what may still be running, or can go on from where it stopped, has to wait.
            if label.status in (LabelStatus.FAILED, LabelStatus.STEP_LIMIT):
                found["without a result"] += 1
                continue
            added = store.add_label(
                run,
                name,
                DFT,
                label,
                e_above_hull=above_hull(hull, start, candidates[name], label),
                hull=IMPLIED_HULL if hull is None else str(file),
                settings={"from": config.data, "references": config.references},
            )
            found[str(label.status) if added else "known already"] += 1
    print(json.dumps({"structures": len(proposed), **found}))


if __name__ == "__main__":
    main_guard(main)
