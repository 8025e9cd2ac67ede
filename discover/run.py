"""``python -m discover.run reward=bandgap target=1.34``: from a target property to ranked, checked crystals.

Train the sampler on the reward, sample, build the best as structures, check them with an interatomic potential; with
``rounds=3``, learn from the checks and propose again. Everything a run writes is in one folder; killed at any point,
``resume=DIR`` continues it, and ``resume=DIR rounds=5 oracle.budget=100`` adds rounds to one that has finished.

Under ``torchrun`` all processes train the sampler; the first one does everything else, while the others wait.
"""

import contextlib
import io
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from discover import report
from discover.build import Parts, build_parts, prior_samples, seeded, start_trainer, with_properties
from discover.campaign import Campaign, check_campaign
from discover.candidates import candidate_table, crystal_keys, write_candidates
from discover.config import RunConfig, absolute, refuse_beside_resume
from discover.errors import ConfigError, RunPaused, main_guard
from discover.extend import extended
from discover.options import help_text, parse_args
from discover.run_folder import RunFolder, create_run_folder, locked, new_folder, open_run_folder
from discover.structure.base import cif_text
from discover.train_sampler import StepReport, Trainer, draw_crystals
from envs.crystal import CrystalBatch
from policies.parallel import Processes, join_processes

USAGE = "python -m discover.run reward=bandgap target=1.34 ['restrict.elements=[Fe,O]'] [output=DIR]"
CHECKPOINT_KIND = "sampler"
_CHECKPOINT_SECONDS = 30.0
_STRUCTURES_AT_ONCE = 64
_PATIENCE = timedelta(days=365)  # of processes that only train, while the first one waits for an oracle
_MOST_DRAWS = 20  # draws per wanted candidate before a small space is taken to be exhausted


def discover_crystals(config: RunConfig, parts: Parts, folder: RunFolder) -> None:
    """Learn, train, sample, build, check, every round again: the whole method, one step a line."""
    campaign = None if config.oracle.name == "none" else Campaign.open(config, folder)
    for number in range(1, config.rounds + 1):
        if campaign is None or not campaign.has(number):
            parts = parts if campaign is None else campaign.teach(parts, number)
            trainer = train_sampler(config, parts, folder, number)
            crystals, log_prob, n_drawn = sample_distinct(config, parts, number)
            crystals, names, log_reward = write_tables(config, parts, folder, crystals, log_prob, number)
            if number == config.rounds:
                build_structures(config, parts, folder, crystals, names)
            log_round(folder, number, crystals, log_reward, n_drawn, trainer)
            if campaign is not None:
                campaign.choose(number, parts, crystals, names, log_reward)
        elif number == config.rounds:
            end_help(parts.processes)  # nothing is left to train
        if campaign is not None:
            check_round(config, parts, campaign, number)
    if campaign is not None:
        campaign.finish(parts)
    report.write_report(folder)


def train_sampler(config: RunConfig, parts: Parts, folder: RunFolder, number: int = 1) -> Trainer:
    """Train or finish training, leaving a checkpoint at most every half minute, and return with averaged weights.

    A later round starts from the averaged policy of the round before, which its checkpoint holds until there is one of
    this round. Other processes learn here that they are needed, and for what; after the last round, that they are not.
    """
    parts.processes.from_first((number, parts.properties))
    saved = folder.load_checkpoint(CHECKPOINT_KIND) if folder.has_checkpoint else None
    goes_on = saved is not None and saved[1].get("round", 1) == number
    if saved is not None and not goes_on:
        Trainer.load_averaged(parts.policy, saved[0])
    trainer = start_trainer(config, parts, number=number)
    if saved is not None and goes_on:
        trainer.restore(*saved)
    train_to_the_end(trainer, folder, number)
    if number == config.rounds:
        end_help(parts.processes)
    return trainer


def check_round(config: RunConfig, parts: Parts, campaign: Campaign, number: int) -> None:
    """Have the oracle check what a round chose; where the run pauses for it, the other processes end too.

    Raises:
        RunPaused: If the oracle is external and has not answered all.
    """
    try:
        campaign.check(number)
    except RunPaused:
        if number < config.rounds:  # after the last training they have ended already
            end_help(parts.processes)
        raise


def help_to_train(processes: Processes) -> None:
    """Take part in the training of every round, as the first process says, until it says that there is no more."""
    config = processes.from_first()
    with contextlib.redirect_stderr(io.StringIO()):  # the first process says the same
        parts = replace(build_parts(config), processes=processes)
        while (call := processes.from_first()) is not None:
            number, properties = call
            parts = with_properties(config, parts, properties)
            start_trainer(config, parts, number=number).run(on_step=lambda _: None)


def end_help(processes: Processes) -> None:
    """Say in the first process that there is no more to train, which ends the others."""
    processes.from_first(None)


def train_to_the_end(trainer: Trainer, folder: RunFolder, number: int = 1) -> None:
    """Train, with progress and checkpoints, and leave the averaged weights in the trainer's policy."""
    saver = _Progress(trainer, folder, number)
    try:
        trainer.run(on_step=saver)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Continue with: python -m discover.run resume={folder.path}") from None
    finally:
        saver.close()
    trainer.use_average()


class _Progress:
    """Shows, logs and saves the training after every step; the checkpoint is at most half a minute old."""

    def __init__(self, trainer: Trainer, folder: RunFolder, number: int) -> None:
        self.trainer, self.folder, self.number = trainer, folder, number
        self.saved = time.monotonic()
        n_steps = trainer.config.n_steps
        self.every = max(1, n_steps // 200)
        self.bar = tqdm(
            total=n_steps,
            initial=trainer.step,
            desc="training",
            unit="step",
            disable=None,
            file=sys.stderr,
        )

    def __call__(self, step: StepReport) -> None:
        self.bar.update(1)
        if step.step % self.every == 0:
            self.bar.set_postfix(log_reward=f"{step.mean_log_reward:.2f}", loss=f"{step.loss:.2f}")
            self.folder.log(
                report.TRAIN_EVENT,
                round=self.number,
                step=step.step,
                loss=step.loss,
                log_reward=step.mean_log_reward,
                log_Z=step.log_Z,
                queries=step.n_queries,
                seconds=round(self.trainer.seconds, 2),
            )
        if time.monotonic() - self.saved > _CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        tensors, state = self.trainer.state()
        self.folder.save_checkpoint(CHECKPOINT_KIND, tensors, {**state, "round": self.number})
        self.saved = time.monotonic()

    def close(self) -> None:
        self.bar.close()
        if not self.trainer.in_step:  # what an interrupted step leaves is no state to continue from
            self.save()


@dataclass
class _Drawn:
    crystals: list[CrystalBatch]
    log_prob: list[Tensor]


def sample_distinct(config: RunConfig, parts: Parts, number: int = 1) -> tuple[CrystalBatch, Tensor, int]:
    """Return ``n_candidates`` crystals that differ in more than the lattice, their log P_F, and the draws it took.

    Small spaces are exhausted: after ``_MOST_DRAWS`` draws per wanted candidate, what was found is returned.
    """
    generator = seeded(config.seed, "candidates" if number == 1 else f"candidates {number}")
    wanted = config.n_candidates
    drawn, seen, n_drawn = _Drawn([], []), set[tuple[int, ...]](), 0
    with tqdm(total=wanted, desc="sampling", unit="crystal", disable=None, file=sys.stderr) as bar:
        while len(seen) < wanted and n_drawn < _MOST_DRAWS * wanted:
            for crystals, log_prob in draw_crystals(parts.env, parts.policy, min(2048, 2 * wanted), generator):
                fresh = []
                for row, key in enumerate(crystal_keys(crystals)):
                    if key not in seen and len(seen) < wanted:
                        seen.add(key)
                        fresh.append(row)
                n_drawn += len(crystals)
                drawn.crystals.append(crystals.select(fresh))
                drawn.log_prob.append(log_prob[fresh])
                bar.update(len(fresh))
    return CrystalBatch.cat(drawn.crystals), torch.cat(drawn.log_prob), n_drawn


def write_tables(
    config: RunConfig, parts: Parts, folder: RunFolder, crystals: CrystalBatch, log_prob: Tensor, number: int = 1
) -> tuple[CrystalBatch, list[str], Tensor]:
    """Write candidates, and what as many draws of the prior give; return crystals and names, best first."""
    predictions = parts.properties.predict(crystals)
    log_reward = parts.reward.from_predictions(crystals, predictions)
    prefix = "c" if config.rounds == 1 else f"r{number:02d}-c"
    table, ranked = candidate_table(crystals, predictions, log_reward, log_prob, prefix=prefix)
    write_candidates(folder, table)
    if config.novelty_gate and not table["novel"].any():
        print(
            f"all {len(table)} candidates have compositions of the training data, which the reward leaves out; "
            "novelty_gate=off counts them",
            file=sys.stderr,
        )
    reference = prior_samples(config, parts, len(ranked))
    if reference is not None:
        predictions = parts.properties.predict(reference)
        score = parts.reward.from_predictions(reference, predictions)
        report.write_reference(folder, candidate_table(reference, predictions, score, torch.zeros_like(score))[0])
    return ranked, table["candidate_id"].tolist(), torch.from_numpy(table["log_reward"].to_numpy(copy=True))


def build_structures(
    config: RunConfig, parts: Parts, folder: RunFolder, ranked: CrystalBatch, names: Sequence[str]
) -> tuple[int, int]:
    """Write CIF files until ``n_structures`` of the best candidates are built; return how many were built and tried."""
    n_built, n_tried = 0, 0
    wanted = min(config.n_structures, len(ranked))
    with tqdm(total=wanted, desc="structures", unit="CIF", disable=None, file=sys.stderr) as bar:
        while n_built < wanted and n_tried < len(names):
            rows = range(n_tried, min(n_tried + min(wanted - n_built, _STRUCTURES_AT_ONCE), len(names)))
            crystals = ranked.select(list(rows))
            found = parts.generator.generate(crystals, seeded(config.seed, f"structures {n_tried}"))
            for row, structure, formula in zip(rows, found, crystals.formulas(), strict=True):
                if structure is None:
                    folder.log("structure_failed", candidate_id=names[row], formula=formula)
                    continue
                folder.write_structure(names[row], cif_text(structure))
                n_built += 1
                bar.update(1)
            n_tried += len(rows)
    return n_built, n_tried


def log_round(
    folder: RunFolder, number: int, crystals: CrystalBatch, log_reward: Tensor, n_drawn: int, trainer: Trainer
) -> None:
    """Note what a round amounts to."""
    folder.log(
        report.RESULT_EVENT,
        round=number,
        candidates=len(crystals),
        draws=n_drawn,
        best_log_reward=float(log_reward.max()),
        proxy_queries=trainer.n_queries,
        training_seconds=round(trainer.seconds, 1),
    )


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(RunConfig, USAGE))
        return
    config = parse_args(RunConfig, words)
    processes = join_processes(patience=_PATIENCE)
    if config.dry_run:
        check_campaign(config)
        print_plan(config, processes)
        return
    if processes.rank:
        help_to_train(processes)
        return
    if config.resume is not None:
        # As a group, oracle may hold the budget alone; the configuration has looked for anything else in it.
        refuse_beside_resume(config.resume, [name for word in words if (name := word.partition("=")[0]) != "oracle"])
        folder = open_run_folder(config.resume)
        with locked(folder.path):
            folder.mend()
            # Of the settings alone, rounds=1 could not be told from none given.
            rounds = config.rounds if any(word.partition("=")[0] == "rounds" for word in words) else None
            config = extended(folder, folder.config(RunConfig), rounds=rounds, budget=config.oracle.budget)
            run_in(folder, config, build_parts(config), processes)
        return
    if config.extends is not None:
        raise ConfigError("extends is written by resume=DIR rounds=N oracle.budget=N; drop it")
    config = absolute(config)
    check_campaign(config)
    parts = build_parts(config)  # first, so that a run that cannot be built leaves no folder
    path = Path(config.output) if config.output is not None else new_folder(config.reward)
    with locked(path):
        folder = create_run_folder(config, name=config.reward, output=str(path), argv=list(words))
        run_in(folder, config, parts, processes)


def run_in(folder: RunFolder, config: RunConfig, parts: Parts, processes: Processes) -> None:
    """Do what the first process does, in a folder that it has locked, and say where the results are."""
    folder.structures  # noqa: B018 - fails now, not after training, where the folder cannot be written
    processes.from_first(config)
    discover_crystals(config, replace(parts, processes=processes), folder)
    n_files = sum(1 for _ in folder.structures.glob("*.cif"))
    print(f"{folder / report.SUMMARY} is the report; {n_files} CIF files are in {folder.structures}")


def print_plan(config: RunConfig, processes: Processes) -> None:
    """Say what would run, after a few steps on the clock."""
    parts = replace(build_parts(config), processes=processes)
    trainer = start_trainer(config, parts)
    trainer.train_step()
    before = trainer.seconds
    for _ in range(3):
        trainer.train_step()
    if processes.rank:
        return
    per_step = (trainer.seconds - before) / 3
    steps = config.train.n_steps
    minutes = steps * per_step / 60
    if config.train.minutes is not None:
        minutes = min(minutes, config.train.minutes)
    print(f"space groups        {int(parts.env.group_mask.sum())}")
    print(f"elements            {len(parts.env.space.allowed or parts.env.space.elements)}")
    print(f"training            {steps} steps of {config.train.batch_size}, about {minutes:.1f} minutes here")
    print(f"proxy queries       about {steps * config.train.batch_size // 2} to {steps * config.train.batch_size}")
    print(f"candidates          {config.n_candidates}, structures {config.n_structures}")
    if config.rounds > 1:
        print(f"rounds              {config.rounds}, the later ones of {config.learn.sampler_steps} steps")
    if config.oracle.name != "none":
        print(f"structures checked  {config.budget} with {config.oracle.name}")


if __name__ == "__main__":
    main_guard(main)
