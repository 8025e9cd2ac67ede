"""What a run keeps between its rounds: which candidates were chosen, what the oracle said, what was learnt from it.

A choice is stored at once and whole, every label the moment it is finished, and nothing stored is ever changed. All
that later rounds depend on is computed from the store, in the order of candidates and not of time, so that a run that
was killed goes on as if it had not been. Results of DFT that a user adds (`discover.add_results`) count for what is
taught, chosen and written after that, and so does what other runs of the store have chosen.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from discover.build import PROXIES, Parts, build_oracle, build_properties, build_second_oracle, seeded, with_proxies
from discover.campaign_records import (
    DFT,
    IMPLIED_HULL,
    LOOKS,
    above_hull,
    given_lesson,
    joined,
    lesson_of,
    lesson_of_looks,
    with_dft,
)
from discover.choose import Chooser
from discover.config import RunConfig
from discover.data import prepare
from discover.engine import EngineError, Task, check_parsl
from discover.errors import ConfigError, RunFolderError, RunPaused
from discover.finalists import Finalist, check_finalists, checks_table, html_page, markdown_table
from discover.labelling import labels_of
from discover.learn import DataRehearsal, Rehearsal, learn, scaled, std_factors
from discover.nearest import Reference
from discover.oracle.base import Label, LabelStatus, sound
from discover.oracle.external import RESULTS, read_results, write_requests
from discover.oracle.hull import IMPLAUSIBLE, Hull
from discover.plots import png
from discover.progress import FINALISTS, LABELS, ROUNDS, HitRule, label_table, round_table
from discover.reward import build_reward
from discover.run_folder import CONFIG, VERSIONS, RunFolder
from discover.store import Candidate, Labelled, Store
from discover.store_database import file_of
from discover.structure.base import NO_COORDINATES, cif_text
from discover.train_proxy import ProxyTraining, TrainingData, digest_of, split
from discover.train_sampler import draw_crystals
from discover.xrd import plot_pattern, powder_pattern
from envs.crystal import CrystalBatch
from policies.pretrained import load_prior
from proxies import PropertyEnsemble, load_ensemble, load_pretrained

logger = logging.getLogger(__name__)

STORE = "store.sqlite"
LEARNT = "rounds"  # folder of what each round has learnt
_SAME_REWARD = 3  # decimals of a log reward
_STORE_EVENT = "store"  # in the log: where the run keeps its labels
_FINALISTS = 12  # of which every check is shown
EXTERNAL = "external"
_REHEARSED = 4096  # crystals of the prior


class Campaign:
    """The checked part of a run.

    Args:
        config: The run.
        folder: Where it writes.
        store: Where choices and labels are kept.
        run: The run's name in the store.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, store: Store, run: str) -> None:
        self.config, self.folder, self.store, self.run = config, folder, store, run
        self.oracle_name = config.oracle.name
        self.oracle = None if config.oracle.name == "external" else build_oracle(config.oracle)
        self.hull = None if config.oracle.hull is None else Hull.load(config.oracle.hull)
        self._start = proxies_that_learn(config.proxies)

    @classmethod
    def open(cls, config: RunConfig, folder: RunFolder) -> "Campaign":
        """Return the campaign of a run folder, new or to be continued.

        Raises:
            StoreError: If the store cannot be opened.
            RunFolderError: If the run's labels are elsewhere, or its proxies or hull have changed since it began.
        """
        has_begun = _has_begun(folder)
        store, run = _store_of(config, folder, has_begun=has_begun)
        campaign = cls(config, folder, store, run)
        proxies = None if campaign._start is None else digest_of(campaign._start)
        hull = None if campaign.hull is None else campaign.hull.digest
        facts = {
            "reward": config.reward,
            "target": config.target,
            "seed": config.seed,
            "proxies": proxies,
            "hull": hull,
        }
        store.start_run(campaign.run, facts)
        if not has_begun:
            folder.log(_STORE_EVENT, store=str(_place_of(config, folder)))
        if store.run_config(campaign.run).get("proxies", proxies) != proxies:
            raise RunFolderError(
                f"{folder.path} began with other proxies than {config.proxies or 'those that ship with this version'}; "
                "go on with the version that began it"
            )
        check_same_hull(store, run, campaign.hull, config)
        return campaign

    def labelled(self, *, before_round: int | None = None) -> list[Labelled]:
        """Return what is known of the candidates, of all rounds or those before one; see `known_labels`."""
        return known_labels(self.store, self.run, self.oracle_name, before_round=before_round)

    # --- learning --------------------------------------------------------------------------------

    def teach(self, parts: Parts, number: int) -> Parts:
        """Return the parts of a round: proxies, and with them the reward, know what earlier rounds have found."""
        ensemble = self.taught(number)
        if ensemble is None:
            return parts
        return with_proxies(self.config, parts, ensemble)

    def taught(self, number: int, *, anew: bool = False) -> PropertyEnsemble | None:
        """Return the proxies of round `number`; None: as at the start.

        Args:
            number: The round, from 1.
            anew: Teach them again if the folder has them already.
        """
        labels = self.labelled(before_round=number)
        if self._start is None or (not labels and self.config.learn.labels is None):
            return None
        saved = learnt_folder(self.folder, number) / PROXIES
        if (saved / "ensemble.json").exists() and not anew:
            return PropertyEnsemble.load(saved)
        lesson = lesson_of(labels)
        if self.config.learn.labels is not None:
            lesson = joined(lesson, given_lesson(self.config.learn.labels))
        looks = lesson_of_looks(self._looks(number), labels) if self.config.learns_from_looks else None
        ensemble = learn(self._start, lesson, self._rehearsal(self._start), looks=looks, seed=self.config.seed)
        before = self.taught(number - 1) if number > 1 else None
        newest = lesson_of([item for item in labels if item.candidate.round == number - 1], relaxed=False)
        ensemble = scaled(ensemble, std_factors(before or self._start, newest))
        ensemble.save(saved)
        return PropertyEnsemble.load(saved)  # in half precision, so that a resumed run has the same

    def _looks(self, number: int) -> list[Mapping[str, Any]]:
        """Return what was looked at before a round; nothing in rounds of versions that did not keep it."""
        earlier = [self.store.round_info(self.run, n) for n in self.store.rounds(self.run) if n < number]
        return [look for info in earlier for look in info.get(LOOKS, [])]

    def _rehearsal(self, start: PropertyEnsemble) -> Rehearsal | DataRehearsal:
        if self.config.learn.data is not None:
            return DataRehearsal(_learning_data(self.config.learn.data))
        prior = load_prior("any")
        generator = seeded(self.config.seed, "rehearsal")
        crystals = CrystalBatch.cat([c for c, _ in draw_crystals(prior.env, prior.policy, _REHEARSED, generator)])
        return Rehearsal(crystals, start, generator)

    # --- choosing --------------------------------------------------------------------------------

    def has(self, number: int) -> bool:
        """Return whether a round has chosen its candidates."""
        return number in self.store.rounds(self.run)

    def choose(
        self, number: int, parts: Parts, crystals: CrystalBatch, names: Sequence[str], log_reward: Tensor
    ) -> None:
        """Choose, build and store the candidates of a round, and write the CIF files of those that were built.

        Args:
            number: The round, from 1.
            parts: Reward, proxies and structure generator of the round.
            crystals: Distinct crystals of the sampler.
            names: Their ids.
            log_reward: (n,) of each.
        """
        chooser = Chooser(
            config=self.config,
            number=number,
            parts=parts,
            hull=self.hull,
            start=self._start,
            earlier=self.store.candidates(self.run),
            labelled=self.labelled(before_round=number),
            elsewhere=self.store.formulas_elsewhere(self.run),
        )
        with _said_how_to_go_on(self.folder):
            choice = chooser.choose(crystals, names, log_reward)
        self.store.add_rows(self.run, choice.proposed)
        for candidate in choice.chosen:
            if candidate.structure is not None:
                self.folder.write_structure(candidate.candidate_id, cif_text(candidate.structure))
        self.store.add_round(self.run, number, choice.chosen, choice.info)

    # --- checking --------------------------------------------------------------------------------

    def check(self, number: int) -> None:
        """Label what a round chose and has no label yet, and write the relaxed structures.

        Raises:
            RunPaused: If the oracle is external and has not answered all.
        """
        waiting = self.store.unlabelled(self.run, number, self.oracle_name)
        for candidate in waiting:
            if candidate.structure is None:
                self._record(candidate, Label(status=LabelStatus.FAILED, reason=NO_COORDINATES))
        asked = {c.candidate_id: c for c in waiting if c.structure is not None}
        tasks = [Task(name, c.structure) for name, c in asked.items() if c.structure is not None]
        if not tasks:
            return
        if self.oracle is None:
            self._check_outside(number, asked)
            return
        total = len(self.store.candidates(self.run, number))
        structures = {task.name: task.structure for task in tasks}
        with _said_how_to_go_on(self.folder):
            for name, label in labels_of(
                self.config, self.oracle, structures, description=f"checking with {self.oracle_name}", total=total
            ):
                self._record(asked[name], label)
        torch.set_num_threads(self.config.threads)  # an oracle in this process may have changed it

    def _check_outside(self, number: int, waiting: Mapping[str, Candidate]) -> None:
        """Ask, once, for what a round chose, and record the answers that are there."""
        folder = self.folder / EXTERNAL / f"{number:02d}"
        chosen = self.store.candidates(self.run, number)
        tasks = [Task(item.candidate_id, item.structure) for item in chosen if item.structure is not None]
        if not (folder / RESULTS).exists():
            write_requests(folder, tasks)
        answers = read_results(folder, tasks)
        for name in waiting.keys() & answers.keys():
            self._record(waiting[name], answers[name])
        if missing := len(waiting.keys() - answers.keys()):
            raise RunPaused(
                f"{missing} of {len(tasks)} structures of round {number} wait for results: fill in {folder / RESULTS}, "
                f"then continue with: python -m discover.run resume={self.folder.path}"
            )

    def _record(self, candidate: Candidate, label: Label) -> None:
        label = sound(label)
        self._store(candidate, label, self.oracle_name, {} if self.oracle is None else self.oracle.describe())
        self._write_relaxed(candidate.candidate_id, label)

    def _store(self, candidate: Candidate, label: Label, oracle: str, settings: Mapping[str, Any]) -> None:
        self.store.add_label(
            self.run,
            candidate.candidate_id,
            oracle,
            label,
            e_above_hull=above_hull(self.hull, self._start, candidate, label),
            hull=IMPLIED_HULL if self.hull is None else str(self.config.oracle.hull),
            settings=settings,
        )

    def _write_relaxed(self, name: str, label: Label) -> None:
        if label.structure is not None:
            self.folder.write_relaxed(name, cif_text(label.structure))

    # --- the end ---------------------------------------------------------------------------------

    def finish(self, parts: Parts) -> None:
        """Write the tables of labels and rounds, and, after more than one round, the proxies that know all labels.

        What an earlier finish wrote is replaced: results or rounds may have been added since.
        """
        labelled = self.labelled()
        table = label_table(labelled, HitRule.of(self.config), parts.reward)
        self.folder.write(LABELS, table.to_csv(index=False, float_format="%.6g"))
        rounds = round_table(table)
        infos = [self.store.round_info(self.run, number) for number in rounds.get("round", [])]
        for column, name in (("structures_looked_at", "looked_at"), ("choosing_seconds", "seconds")):
            rounds[column] = [info.get(name) for info in infos]
        self.folder.write(ROUNDS, rounds.to_csv(index=False, float_format="%.6g"))
        self._write_finalists(labelled, table)
        for item in self.store.labels(self.run, self.oracle_name):  # a kill may have come between a label and its file
            if not (self.folder.relaxed / f"{item.candidate.candidate_id}.cif").exists():
                self._write_relaxed(item.candidate.candidate_id, item.label)
        several = self.config.rounds > 1
        if (ensemble := self.taught(self.config.rounds + several, anew=several)) is not None:
            ensemble.save(self.folder / PROXIES)
        self.store.close()

    def _second_energies(self, best: Sequence[Labelled]) -> dict[str, float]:
        """Return the formation energy of the best by a second potential, by name; empty without one.

        Raises:
            EngineError: If it cannot start.
        """
        oracle = build_second_oracle(self.config.oracle)
        if oracle is None:
            return {}
        known = {item.candidate.candidate_id for item in self.store.labels(self.run, oracle.name)}
        waiting = {item.candidate.candidate_id: item for item in best if item.candidate.candidate_id not in known}
        structures = {
            name: structure
            for name, item in waiting.items()
            if (structure := item.label.structure or item.candidate.structure) is not None
        }
        with _said_how_to_go_on(self.folder):
            for name, answer in labels_of(self.config, oracle, structures, description=f"checking with {oracle.name}"):
                self._store(waiting[name].candidate, sound(answer), oracle.name, oracle.describe())
        labels = self.store.labels(self.run, oracle.name)
        return {item.candidate.candidate_id: item.label.formation_energy_per_atom for item in labels}

    def _write_finalists(self, labelled: Sequence[Labelled], table: pd.DataFrame) -> None:
        """Write what a chemist checks of the best."""
        best = best_first(labelled, table)[:_FINALISTS]
        second = self._second_energies(best)
        finalists = [
            Finalist(
                name=item.candidate.candidate_id,
                built=item.candidate.structure,
                relaxed=structure,
                is_relaxed=item.label.structure is not None,
                formation_energy=item.label.formation_energy_per_atom,
                second_energy=second.get(item.candidate.candidate_id, math.nan),
            )
            for item in best
            if (structure := item.label.structure or item.candidate.structure) is not None
        ]
        reference = None if self.config.reference is None else Reference.load(self.config.reference)
        checks = check_finalists(finalists, hull=self.hull, reference=reference)
        pictures = {item.name: picture for item in finalists if (picture := _picture(item)) is not None}
        self.folder.write(f"{FINALISTS}.csv", checks_table(checks).to_csv(index=False, float_format="%.6g"))
        self.folder.write(f"{FINALISTS}.md", markdown_table(checks) + "\n")
        page = html_page(checks, title=f"Finalists of {self.folder.path.name}", pictures=pictures)
        self.folder.write(f"{FINALISTS}.html", page)


def _picture(finalist: Finalist) -> bytes | None:
    """Return the powder pattern as PNG; None for atoms on one spot or elements without scattering factors."""
    try:
        pattern = powder_pattern(finalist.relaxed)
    except ValueError as error:
        logger.warning("%s has no powder pattern: %s", finalist.name, error)
        return None
    return png(plot_pattern(pattern, finalist.name))


@contextlib.contextmanager
def _said_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """Add to an engine's error how to continue."""
    try:
        yield
    except EngineError as error:
        again = f"python -m discover.run resume={folder.path}"
        raise EngineError(f"{error} Labels so far are kept; continue with: {again}") from error


def open_store(folder: RunFolder) -> tuple[Store, str, RunConfig]:
    """Return the store of a run, the run's name in it, and its settings.

    Raises:
        RunFolderError: If the run has checked nothing, or its labels are elsewhere.
        StoreError: If the store cannot be opened.
    """
    config = folder.config(RunConfig)
    # Earlier versions said nothing of the store in the log.
    if not (_has_begun(folder) or config.store is not None or (folder / STORE).exists()):
        raise RunFolderError(f"{folder.path} has no {STORE}: the run has checked no structure yet")
    return *_store_of(config, folder, has_begun=True), config


def check_same_hull(store: Store, run: str, hull: Hull | None, config: RunConfig) -> None:
    """Fail where energies above hull of a run would be against two hulls.

    Raises:
        RunFolderError: If the file has changed since the run began.
    """
    now = None if hull is None else hull.digest
    if store.run_config(run).get("hull", now) != now:
        raise RunFolderError(
            f"{config.oracle.hull} has changed since the run began, and energies above two hulls do not compare; put "
            "the file back as it was, or start a new run"
        )


def known_labels(store: Store, run: str, oracle: str, *, before_round: int | None = None) -> list[Labelled]:
    """Return the labels of a run's own oracle, with the numbers of DFT where results were added."""
    own, added = (store.labels(run, name, before_round=before_round) for name in (oracle, DFT))
    return with_dft(own, added)


def best_labelled(store: Store, run: str, config: RunConfig) -> list[Labelled]:
    """Return the labels that have a structure, hits first, then by what was measured; see `known_labels`."""
    labelled = known_labels(store, run, config.oracle.name)
    reward = build_reward(config, build_properties(config.proxies))
    return best_first(labelled, label_table(labelled, HitRule.of(config), reward))


def best_first(labelled: Sequence[Labelled], table: pd.DataFrame) -> list[Labelled]:
    """Return the labels that have a structure in the order of merit of their table.

    Hits come first, those so far below the hull that it must lack phases as the last of them; then by the reward of
    what was measured, and where that is the same, as it is for all that lie in a window, by the energy above hull.
    """
    if table.empty:
        return []
    merit = pd.DataFrame(
        {
            "hit": ~table["hit"],
            "implausible": table["e_above_hull"] < IMPLAUSIBLE,
            "reward": -table["checked_log_reward"].round(_SAME_REWARD),
            "e_above_hull": table["e_above_hull"],
        }
    )
    order = merit.sort_values(list(merit.columns)).index
    best = [labelled[row] for row in order if table.loc[row, "status"] != LabelStatus.FAILED]
    return [item for item in best if item.label.structure is not None or item.candidate.structure is not None]


def learnt_folder(folder: RunFolder, number: int) -> Path:
    """Return where a run keeps what it has learnt before round `number`."""
    return folder / LEARNT / f"{number:02d}"


def _store_of(config: RunConfig, folder: RunFolder, *, has_begun: bool) -> tuple[Store, str]:
    """Return the store of a run and the run's name in it; one that has begun must be there already.

    Raises:
        RunFolderError: If it is not.
        StoreError: If the store cannot be opened.
    """
    place, run = _place_of(config, folder), _run_name(folder)
    elsewhere = RunFolderError(
        f"the labels of {folder.path} are in another store than {place}; put theirs back there, or write into "
        f"{folder / CONFIG} where it is"
    )
    file = file_of(place)
    if has_begun and file is not None and not file.exists():
        raise elsewhere
    store = Store.open(place)
    if has_begun and run not in store.runs():
        store.close()
        raise elsewhere
    return store, run


def _place_of(config: RunConfig, folder: RunFolder) -> str | Path:
    return config.store if config.store is not None else folder / STORE


def _has_begun(folder: RunFolder) -> bool:
    """Return whether a run has been in its store."""
    return bool(folder.read_log(_STORE_EVENT)) or any((folder / name).exists() for name in (LEARNT, LABELS))


def _run_name(folder: RunFolder) -> str:
    """Return a name that no other run of a shared store has, and that moving the folder does not change."""
    facts = folder.read_json(VERSIONS)
    return f"{facts['started']} {facts['id']}"


def check_campaign(config: RunConfig) -> None:
    """Fail on what a run could not be checked with, before anything is trained or written.

    Raises:
        ConfigError: If a file is missing, or the proxies cannot learn from labels.
        DataError: If reference, data or labels cannot be used.
        EngineError: If there is no Parsl, or no such config file.
        HullError, MatglModelError, CallableOracleError: If hull, model or function cannot be used.
    """
    if config.oracle.name == "none":
        return
    _check_files(config)
    if config.oracle.hull is not None:
        Hull.load(config.oracle.hull)
    if config.oracle.name in ("callable", "matgl"):
        build_oracle(config.oracle).start()
    if (second := build_second_oracle(config.oracle)) is not None:
        second.start()
    torch.set_num_threads(config.threads)
    if (config.rounds > 1 or config.learn.labels is not None) and proxies_that_learn(config.proxies) is None:
        raise ConfigError(f"the proxies in {config.proxies} cannot learn from labels; use networks, or rounds=1")


def _check_files(config: RunConfig) -> None:
    files = {"reference": config.reference, "learn.data": config.learn.data, "learn.labels": config.learn.labels}
    for name, path in files.items():
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{name}={path}: no such file or folder")
    if config.reference is not None:
        Reference.load(config.reference)
    if config.learn.data is not None:
        _learning_data(config.learn.data)
    if config.learn.labels is not None:
        given_lesson(config.learn.labels)
    if config.engine.config is not None:
        check_parsl(Path(config.engine.config))


def _learning_data(path: str) -> TrainingData:
    return split(prepare(path), ProxyTraining())


def proxies_that_learn(folder: str | None) -> PropertyEnsemble | None:
    """Return the proxies that a run starts with, None where they are of a kind that cannot learn."""
    ensemble = load_pretrained() if folder is None else load_ensemble(Path(folder))
    return ensemble if isinstance(ensemble, PropertyEnsemble) else None
