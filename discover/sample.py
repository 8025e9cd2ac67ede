"""``python -m discover.sample run=DIR restrict...``: draw from a trained run, under new restrictions if asked.

A restriction masks the same policy, so every sample obeys; but choices made before a mask bites (the
space group before the elements) keep the odds of the whole space. The importance weight R(x) / p(x) is
exact, so the effective sample size says how far the sample is from the reward's distribution, and
``correct`` mends it: by resampling (sir) or by training on under the restriction (finetune).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from discover.build import PROXIES, Parts, build_parts, seeded, with_proxies
from discover.candidates import candidate_table, crystal_keys, first_of_each, write_candidates
from discover.config import RunConfig, SampleConfig, TrainingConfig
from discover.errors import RunFolderError, main_guard
from discover.options import help_text, parse_args
from discover.run import CHECKPOINT_KIND, build_structures
from discover.run_folder import RunFolder, create_run_folder, open_run_folder
from discover.target import SamplingTarget
from discover.train_sampler import Trainer, draw_crystals
from envs.crystal import CrystalBatch
from proxies import PropertyEnsemble

USAGE = "python -m discover.sample run=DIR ['restrict.elements=[Fe,O]'] [correct=sir] [n=1000]"
_SIR_DRAWS = 20  # draws per sample that is returned
_FINETUNE = TrainingConfig(n_steps=200, batch_size=512, lr=5e-4, epsilon=0.02, replay_fraction=0.25, data_fraction=0.0)


@dataclass(frozen=True)
class WeightedSample:
    """Crystals with what is needed to weigh them."""

    crystals: CrystalBatch
    log_prob: Tensor  # (n,) log P_F under the restriction
    log_weight: Tensor  # (n,) log R(x) / p(x), unnormalised

    @property
    def effective_share(self) -> float:
        """Return the effective sample size over the sample size, (Σ w)² / (n Σ w²)."""
        doubled = 2 * torch.logsumexp(self.log_weight, 0) - torch.logsumexp(2 * self.log_weight, 0)
        return float(doubled.exp()) / len(self.log_weight)

    def select(self, rows: Tensor) -> "WeightedSample":
        """Return some rows."""
        return WeightedSample(self.crystals.select(rows), self.log_prob[rows], self.log_weight[rows])


def draw_weighted(parts: Parts, n: int, generator: torch.Generator, *, show: bool = True) -> WeightedSample:
    """Draw ``n`` crystals and weigh each by reward over probability."""
    crystals, log_prob, log_weight = [], [], []
    with tqdm(total=n, desc="sampling", unit="crystal", disable=None if show else True, file=sys.stderr) as bar:
        for batch, log_p in draw_crystals(parts.env, parts.policy, n, generator):
            crystals.append(batch)
            log_prob.append(log_p)
            log_weight.append(log_weights(parts.target, batch, log_p))
            bar.update(len(batch))
    return WeightedSample(CrystalBatch.cat(crystals), torch.cat(log_prob), torch.cat(log_weight))


def log_weights(target: SamplingTarget, crystals: CrystalBatch, log_prob: Tensor) -> Tensor:
    """Return (n,) log R(x) / p(x); a crystal is reached through each of its equivalent assignments."""
    terms = target.terms(crystals)
    return target.log_target(terms) - terms.log_images - log_prob


def resample(sample: WeightedSample, n: int, generator: torch.Generator) -> WeightedSample:
    """Return ``n`` rows drawn in proportion to the weights, by systematic resampling.

    As the number of draws grows, the rows follow the reward exactly; rows of large weight repeat.
    """
    shares = torch.softmax(sample.log_weight, 0).cumsum(0)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(n, dtype=torch.float64) + offset) / n * shares[-1]
    rows = torch.searchsorted(shares, points).clamp(max=len(shares) - 1)
    return sample.select(rows)


def load_run(run: str, config: SampleConfig) -> tuple[RunFolder, RunConfig, Parts]:
    """Return the folder, the configuration and the parts of a trained run, its policy under the new restrictions.

    Raises:
        RunFolderError: If the run has no trained sampler yet.
    """
    folder = open_run_folder(run)
    run_config = folder.config(RunConfig)
    if not folder.has_checkpoint:
        raise RunFolderError(f"{run} has no checkpoint yet; finish it with python -m discover.run resume={run}")
    restrictions = None if config.restrict.is_empty else config.restrict.to_restrictions()
    parts = build_parts(run_config, restrictions=restrictions)
    if (folder / PROXIES / "ensemble.json").exists():  # a run of several rounds has taught them
        parts = with_proxies(run_config, parts, PropertyEnsemble.load(folder / PROXIES))
    tensors, state = folder.load_checkpoint(CHECKPOINT_KIND)
    trainer = Trainer(parts.env, parts.policy, parts.target, run_config.train, loss=run_config.loss)
    trainer.restore(tensors, state)
    trainer.use_average()
    return folder, run_config, parts


def corrected_sample(
    config: SampleConfig, run_config: RunConfig, parts: Parts
) -> tuple[WeightedSample, dict[str, float]]:
    """Return ``n`` crystals with the correction asked for, and its figures."""
    generator = seeded(config.seed, "sample")
    if config.correct == "finetune":
        trainer = Trainer(
            parts.env, parts.policy, parts.target, _FINETUNE, loss=run_config.loss, seed=config.seed, warm_up=False
        )
        with tqdm(total=_FINETUNE.n_steps, desc="fine-tuning", disable=None, file=sys.stderr) as bar:
            trainer.run(on_step=lambda _: bar.update(1))
        trainer.use_average()
    draws = config.n * (_SIR_DRAWS if config.correct == "sir" else 1)
    sample = draw_weighted(parts, draws, generator)
    figures = {"draws": draws, "effective_sample_share": sample.effective_share}
    if config.correct == "sir":
        sample = resample(sample, config.n, generator)
    return sample, figures


def next_folder(samples: Path) -> Path:
    """Return the folder after the last of those that have numbers."""
    numbers = [int(place.name) for place in samples.glob("*") if place.name.isdigit()]
    return samples / f"{max(numbers, default=0) + 1:03d}"


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(SampleConfig, USAGE))
        return
    config = parse_args(SampleConfig, words)
    source, run_config, parts = load_run(config.run, config)
    output = config.output or str(next_folder(source.path / "samples"))
    folder = create_run_folder(config, name="sample", output=output, argv=list(words))
    sample, figures = corrected_sample(config, run_config, parts)
    predictions = parts.properties.predict(sample.crystals)
    log_reward = parts.reward.from_predictions(sample.crystals, predictions)
    table, ranked = candidate_table(sample.crystals, predictions, log_reward, sample.log_prob, distinct=False)
    write_candidates(folder, table)
    distinct = first_of_each(crystal_keys(ranked))
    names = table["candidate_id"].iloc[distinct.tolist()].tolist()
    settings = replace(run_config, n_structures=config.n_structures, seed=config.seed)
    n_built, n_tried = build_structures(settings, parts, folder, ranked.select(distinct), names)
    figures |= {
        "n": len(table),
        "distinct": len(distinct),
        "structures": n_built,
        "structures_tried": n_tried,
        "median_formation_energy_per_atom": float(table["formation_energy_per_atom"].median()),
        "median_log_reward": float(table["log_reward"].median()),
    }
    folder.log("result", **figures)
    n_effective = figures["effective_sample_share"] * figures["draws"]
    print(f"{len(table)} crystals ({len(distinct)} distinct) in {folder.path}")
    print(
        f"effective sample size {n_effective:.0f} of {figures['draws']} draws "
        f"({100 * figures['effective_sample_share']:.1f} %): what they are worth as independent draws from the reward"
    )
    if config.correct == "none" and figures["effective_sample_share"] < 0.1:
        print("below 10 %: correct=sir or correct=finetune brings the sample back to the reward")
    print(json.dumps(figures))


if __name__ == "__main__":
    main_guard(main)
