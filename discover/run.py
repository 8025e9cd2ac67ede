"""``python -m discover.run reward=bandgap target=1.34``: from a target property to ranked crystals.

Train the sampler on the reward, sample, predict, build the best as structures, report. Everything a
run writes is in one folder; killed at any point, ``resume=DIR`` continues it.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from discover import report
from discover.build import Parts, build_parts, prior_samples, seeded, start_trainer
from discover.candidates import candidate_table, crystal_keys, write_candidates
from discover.config import RunConfig
from discover.errors import main_guard
from discover.options import help_text, parse_args
from discover.run_folder import RunFolder, create_run_folder, open_run_folder
from discover.structure.base import cif_text
from discover.train_sampler import StepReport, Trainer, draw_crystals
from envs.crystal import CrystalBatch

USAGE = "python -m discover.run reward=bandgap target=1.34 ['restrict.elements=[Fe,O]'] [output=DIR]"
CHECKPOINT_KIND = "sampler"
_CHECKPOINT_SECONDS = 30.0
_STRUCTURES_AT_ONCE = 64
_MOST_DRAWS = 20  # draws per wanted candidate before a small space is taken to be exhausted


def discover_crystals(config: RunConfig, parts: Parts, folder: RunFolder) -> None:
    """Train, sample, build, report: the whole method, one step a line."""
    trainer = train_sampler(config, parts, folder)
    crystals, log_prob, n_drawn = sample_distinct(config, parts)
    crystals, names, log_reward = write_tables(config, parts, folder, crystals, log_prob)
    n_built, n_tried = build_structures(config, parts, folder, crystals, names)
    folder.log(
        report.RESULT_EVENT,
        candidates=len(crystals),
        draws=n_drawn,
        structures=n_built,
        structures_tried=n_tried,
        best_log_reward=float(log_reward.max()),
        proxy_queries=trainer.n_queries,
        training_seconds=round(trainer.seconds, 1),
    )
    report.write_report(folder)


def train_sampler(config: RunConfig, parts: Parts, folder: RunFolder) -> Trainer:
    """Train or finish training, leaving a checkpoint at most every half minute, and return with averaged weights."""
    trainer = start_trainer(config, parts)
    if folder.has_checkpoint:
        trainer.restore(*folder.load_checkpoint(CHECKPOINT_KIND))
    train_to_the_end(trainer, config, folder)
    return trainer


def train_to_the_end(trainer: Trainer, config: RunConfig, folder: RunFolder) -> None:
    """Train, with progress and checkpoints, and leave the averaged weights in the trainer's policy."""
    saver = _Progress(trainer, folder, config)
    try:
        trainer.run(on_step=saver)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Continue with: python -m discover.run resume={folder.path}") from None
    finally:
        saver.close()
    trainer.use_average()


class _Progress:
    """Shows, logs and saves the training after every step; the checkpoint is at most half a minute old."""

    def __init__(self, trainer: Trainer, folder: RunFolder, config: RunConfig) -> None:
        self.trainer, self.folder = trainer, folder
        self.saved = time.monotonic()
        self.every = max(1, config.train.n_steps // 200)
        self.bar = tqdm(
            total=config.train.n_steps,
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
        self.folder.save_checkpoint(CHECKPOINT_KIND, *self.trainer.state())
        self.saved = time.monotonic()

    def close(self) -> None:
        self.bar.close()
        if not self.trainer.in_step:  # what an interrupted step leaves is no state to continue from
            self.save()


@dataclass
class _Drawn:
    crystals: list[CrystalBatch]
    log_prob: list[Tensor]


def sample_distinct(config: RunConfig, parts: Parts) -> tuple[CrystalBatch, Tensor, int]:
    """Return ``n_candidates`` crystals that differ in more than the lattice, their log P_F, and the draws it took.

    Small spaces are exhausted: after ``_MOST_DRAWS`` draws per wanted candidate, what was found is returned.
    """
    generator = seeded(config.seed, "candidates")
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
    config: RunConfig, parts: Parts, folder: RunFolder, crystals: CrystalBatch, log_prob: Tensor
) -> tuple[CrystalBatch, list[str], Tensor]:
    """Write candidates, and as many of the untrained prior to compare with; return crystals and names, best first."""
    predictions = parts.properties.predict(crystals)
    log_reward = parts.reward.from_predictions(crystals, predictions)
    table, ranked = candidate_table(crystals, predictions, log_reward, log_prob)
    write_candidates(folder, table)
    reference = prior_samples(config, parts, len(ranked))
    if reference is not None:
        predictions = parts.properties.predict(reference)
        score = parts.reward.from_predictions(reference, predictions)
        report.write_reference(
            folder, candidate_table(reference, predictions, score, torch.zeros_like(score), distinct=False)[0]
        )
    return ranked, table["candidate_id"].tolist(), log_reward


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


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(RunConfig, USAGE))
        return
    config = parse_args(RunConfig, words)
    if config.dry_run:
        print_plan(config)
        return
    if config.resume is not None:
        folder = open_run_folder(config.resume, to_continue=True)
        config = folder.config(RunConfig)
        parts = build_parts(config)
    else:
        parts = build_parts(config)  # first, so that a run that cannot be built leaves no folder
        folder = create_run_folder(config, name=config.reward, output=config.output, argv=list(words))
    folder.structures  # noqa: B018 - fails now, not after training, where the folder cannot be written
    discover_crystals(config, parts, folder)
    n_files = sum(1 for _ in folder.structures.glob("*.cif"))
    print(f"{folder / report.SUMMARY} is the report; {n_files} CIF files are in {folder.structures}")


def print_plan(config: RunConfig) -> None:
    """Say what would run, after a few steps on the clock."""
    parts = build_parts(config)
    trainer = start_trainer(config, parts)
    trainer.train_step()
    before = trainer.seconds
    for _ in range(3):
        trainer.train_step()
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


if __name__ == "__main__":
    main_guard(main)
