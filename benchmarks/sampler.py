"""``python -m benchmarks.sampler``: how fast crystals are drawn and learned from, beside the bare network's speed.

Rates are trajectories per second of wall time on the threads that torch has. The cap is what the network alone would
allow: a multilayer perceptron of the policy's size, at as many evaluations per trajectory as the policy needed.
"""

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from discover.build import run_space
from discover.config import RunConfig, TrainingConfig
from discover.errors import ConfigError, main_guard
from discover.options import help_text, option, parse_args
from discover.properties import Properties
from discover.reward import Reward, build_reward
from discover.target import SamplingTarget
from discover.train_sampler import Trainer
from envs.crystal_env import CrystalEnv
from envs.restrictions import restrict
from policies.policy import CrystalPolicy, PolicyChooser, PolicyConfig
from policies.pretrained import SHIPPED, load_policy
from policies.rollout import rollout
from proxies import DensityProxy

USAGE = "python -m benchmarks.sampler [env=crystal_gfn] [batch=4096] [seconds=2.5]"
ENVS = ("crystal_gfn", "mp20")
GROWTH = (64, 256, 1024, 4096, 16384)
_CAP_ROWS = (1024, 4096, 16384)  # the cap is the best of these
_WIDEST_HEAD = 108  # outputs of the lattice head


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What to time."""

    env: Literal["both", "crystal_gfn", "mp20"] = option("both", "which space of crystals")
    batch: int = option(4096, "trajectories per step of the headline figures")
    seconds: float = option(2.5, "wall time of each figure")
    growth: bool = option(True, "also time batches of 64 to 16,384")
    threads: int | None = option(None, "threads of torch; null: as many as torch takes")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting.
        """
        for name in ("batch", "seconds", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be > 0, got {value}")


@dataclass(frozen=True)
class Setup:
    """One environment with the density reward, no prior, no replay, no data: on-policy training alone."""

    config: RunConfig
    env: CrystalEnv
    target: SamplingTarget

    @classmethod
    def build(cls, name: str) -> "Setup":
        """Return the setup of an environment; letters as in its preset, ionic chemistry, default exclusions."""
        config = RunConfig(env=name, reward="density", alpha=0.0)  # type: ignore[arg-type]  # a name of ENVS
        space = restrict(run_space(config), config.restrict.to_restrictions())
        reward = build_reward(config, Properties(None, [DensityProxy()]))
        target = SamplingTarget(reward=reward, prior=None, alpha=0.0, lengths_angles=False, box=space.box)
        return cls(config, CrystalEnv(space), target)

    def policy(self) -> CrystalPolicy:
        """Return a fresh policy with a trunk of 3 x 256, the paper's size; with charges where the prior has them."""
        torch.manual_seed(0)
        sizes = PolicyConfig.for_env(self.env, width=256, depth=3)
        assignments = load_policy(SHIPPED).config.assignments if self.config.has_prior else ()
        return CrystalPolicy(replace(sizes, assignments=assignments))

    def trainer(self, batch: int) -> Trainer:
        """Return a trainer of a fresh policy."""
        train = TrainingConfig(batch_size=batch, n_steps=1_000_000, data_fraction=0.0, replay_fraction=0.0)
        return Trainer(self.env, self.policy(), self.target, train, loss="tb")

    def sampler(self, batch: int) -> Callable[[], object]:
        """Return a function that draws ``batch`` finished crystals."""
        chooser = PolicyChooser(self.policy(), torch.Generator().manual_seed(0))

        def sample() -> object:
            with torch.inference_mode():
                return self.env.crystals(rollout(self.env, batch, chooser, record=False).states)

        return sample


def rate(work: Callable[[], object], n: int, seconds: float) -> float:
    """Return how many of ``n`` per call ``work`` does a second, after one call to warm up."""
    work()
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or calls == 0:
        work()
        calls += 1
    return n * calls / elapsed


def bare_network(n_features: int) -> nn.Sequential:
    """Return three layers of 256 between the environment's features and the widest head."""
    sizes = (n_features, 256, 256, 256, _WIDEST_HEAD)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def caps(n_features: int, seconds: float) -> tuple[float, float]:
    """Return states per second of the bare network: forward + backward + Adam, and forward alone."""
    network = bare_network(n_features)
    optimiser = torch.optim.Adam(network.parameters())
    best_train, best_forward = 0.0, 0.0
    for rows in _CAP_ROWS:
        x = torch.randn(rows, n_features)

        def forward(x: torch.Tensor = x) -> object:
            with torch.inference_mode():
                return network(x)

        def train(x: torch.Tensor = x) -> None:
            optimiser.zero_grad()
            network(x).square().mean().backward()
            optimiser.step()

        share = seconds / len(_CAP_ROWS)
        best_train = max(best_train, rate(train, rows, share))
        best_forward = max(best_forward, rate(forward, rows, share))
    return best_train, best_forward


def peak_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


#: What each part of a step is called in the breakdown; time goes to the innermost part that runs.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "network": ((CrystalPolicy, "encode"),),
    "heads": tuple((CrystalPolicy, name) for name in ("symmetry", "next_element", "count", "letter", "lattice")),
    "drawing": tuple((PolicyChooser, name) for name in ("discrete", "count", "unit", "log_prob")),
    "masks": tuple(
        (CrystalEnv, name)
        for name in ("symmetry_mask", "element_mask", "count_mask", "letter_mask", "lattice_interval")
    ),
    "steps": tuple(
        (CrystalEnv, name) for name in ("step_symmetry", "step_composition", "step_wyckoff", "step_lattice", "initial")
    ),
    "features": ((CrystalEnv, "observe"),),
    "crystals": ((CrystalEnv, "crystals"),),
    "reward": ((Reward, "log_reward"),),
    "equivalence": ((SamplingTarget, "terms"),),
    "backward": ((torch.Tensor, "backward"),),
    "optimiser": ((Trainer, "_descend"),),
}


def breakdown(work: Callable[[], object], seconds: float) -> dict[str, float]:
    """Return the share of time that each of ``PARTS`` takes; "other" is the roll-out's own book-keeping."""
    spent: Counter[str] = Counter()
    inner: list[float] = []

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - started
                spent[part] += elapsed - inner.pop()
                if inner:
                    inner[-1] += elapsed

        return call

    originals = [(owner, name, getattr(owner, name)) for group in PARTS.values() for owner, name in group]
    for part, group in PARTS.items():
        for owner, name in group:
            setattr(owner, name, timed(part, getattr(owner, name)))
    try:
        whole = timed("other", work)
        whole()
        spent.clear()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            whole()
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
    total = sum(spent.values())
    return {part: spent[part] / total for part in [*PARTS, "other"] if spent[part] > 0}


def measure(name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Return every figure of one environment."""
    setup = Setup.build(name)
    walks = rollout(setup.env, config.batch, PolicyChooser(setup.policy(), torch.Generator().manual_seed(0)))
    states, evaluations = walks.n_decisions / walks.n, walks.n_observations / walks.n
    del walks
    figures: dict[str, Any] = {
        "train_per_s": rate(setup.trainer(config.batch).train_step, config.batch, config.seconds),
        "sample_per_s": rate(setup.sampler(config.batch), config.batch, config.seconds),
        "peak_mb": peak_mb(),
        "batch": config.batch,
        "threads": torch.get_num_threads(),
        "states_per_trajectory": states,
        "network_states_per_trajectory": evaluations,
    }
    train_cap, forward_cap = caps(setup.env.n_features, config.seconds)
    figures |= {
        "cap_states_per_s_train": train_cap,
        "cap_states_per_s_forward": forward_cap,
        "share_of_cap_train": figures["train_per_s"] * evaluations / train_cap,
        "share_of_cap_sample": figures["sample_per_s"] * evaluations / forward_cap,
        "train_breakdown": breakdown(setup.trainer(config.batch).train_step, config.seconds),
        "sample_breakdown": breakdown(setup.sampler(config.batch), config.seconds),
    }
    if config.growth:
        figures["growth"] = [
            {
                "batch": batch,
                "train_per_s": rate(setup.trainer(batch).train_step, batch, config.seconds),
                "sample_per_s": rate(setup.sampler(batch), batch, config.seconds),
                "peak_mb": peak_mb(),
            }
            for batch in GROWTH
        ]
    return figures


def show(name: str, figures: dict[str, Any]) -> None:
    """Print the figures of one environment."""
    print(f"\n{name}: batch {figures['batch']}, {figures['threads']} threads, peak {figures['peak_mb']:.0f} MB")
    print(
        f"  states per trajectory {figures['states_per_trajectory']:.2f}, "
        f"of which the network sees {figures['network_states_per_trajectory']:.2f} (equal ones once a batch)"
    )
    print(f"  {'':10s}{'per second':>12s}{'bare network':>14s}{'share':>7s}")
    for label, key, cap in (
        ("training", "train", "cap_states_per_s_train"),
        ("sampling", "sample", "cap_states_per_s_forward"),
    ):
        limit = figures[cap] / figures["network_states_per_trajectory"]
        print(f"  {label:10s}{figures[f'{key}_per_s']:12,.0f}{limit:14,.0f}{figures[f'share_of_cap_{key}']:7.0%}")
    for label, key in (("training", "train_breakdown"), ("sampling", "sample_breakdown")):
        parts = sorted(figures[key].items(), key=lambda item: -item[1])
        print(f"  {label} time: " + ", ".join(f"{part} {share:.0%}" for part, share in parts))
    if "growth" in figures:
        print(f"  {'batch':>8s}{'training/s':>12s}{'sampling/s':>12s}{'peak MB':>9s}")
        for row in figures["growth"]:
            print(f"  {row['batch']:8d}{row['train_per_s']:12,.0f}{row['sample_per_s']:12,.0f}{row['peak_mb']:9.0f}")


def measure_apart(name: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Return ``measure`` of a process of its own, so that its peak memory is this environment's."""
    settings = {**asdict(config), "env": name}
    words = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.sampler", *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - our own module
    return json.loads(output.splitlines()[-1])[name]  # type: ignore[no-any-return]


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(BenchmarkConfig, USAGE))
        return
    config = parse_args(BenchmarkConfig, words)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    results = {}
    for name in ENVS if config.env == "both" else (config.env,):
        results[name] = measure_apart(name, config) if config.env == "both" else measure(name, config)
        show(name, results[name])
    print(json.dumps(results))


if __name__ == "__main__":
    main_guard(main)
