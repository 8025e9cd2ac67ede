"""Assemble what a command needs from its configuration."""

import hashlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from discover.config import OracleConfig, Pick, RunConfig
from discover.oracle.base import Oracle
from discover.oracle.callable import CallableOracle
from discover.oracle.chgnet import ChgnetOracle
from discover.oracle.matgl_model import MatglOracle
from discover.oracle.relax import single_point_energies
from discover.properties import Properties
from discover.reward import Reward, build_reward
from discover.structure.base import StructureGenerator
from discover.structure.flow_matching import CAREFUL_DRAWS, CAREFUL_STEPS, SCATTERED, FlowMatching, LatticeMode
from discover.structure.flow_matching import SHIPPED as SHIPPED_FLOW
from discover.structure.random_baseline import RandomCoordinates
from discover.target import SamplingTarget
from discover.train_sampler import Trainer, draw_crystals
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.restrictions import SPACES, Restrictions, Space, restrict
from policies.parallel import ALONE, Processes
from policies.policy import CrystalPolicy, PolicyConfig
from policies.pretrained import SHIPPED, UNREPRESENTABLE, Prior, load_policy
from proxies import DensityProxy, PropertyEnsemble, load_ensemble, load_pretrained

PROXIES = "proxies"  # folder of the proxies that a run of several rounds leaves
_MUCH = 0.2  # share of crystals that the prior cannot represent beyond which the user is told
_DRAWS = 4  # of coordinates for each structure of a command
_POOL = 8192  # most samples of the prior that training mixes in as data


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    env: CrystalEnv
    policy: CrystalPolicy  # to be trained
    target: SamplingTarget
    properties: Properties
    reward: Reward
    prior: Prior | None  # None where the space is not the prior's
    generator: StructureGenerator
    with_free_cell: StructureGenerator | None = None  # finds cells too; None where they are restricted
    processes: Processes = ALONE  # that train the policy together


def run_space(config: RunConfig) -> Space:
    """Return the space that a run's policy is built for, before restrictions."""
    space = SPACES[config.env]()
    wyckoff = space.wyckoff if config.wyckoff is None else config.wyckoff
    return replace(space, wyckoff=wyckoff, chemistry=config.chemistry, mixed_valence=config.mixed_valence)


def build_properties(folder: str | None) -> Properties:
    """Return the proxies in ``folder``, None for those that ship, and the exact density."""
    return Properties(load_pretrained() if folder is None else load_ensemble(Path(folder)), [DensityProxy()])


def with_proxies(config: RunConfig, parts: Parts, ensemble: PropertyEnsemble) -> Parts:
    """Return the parts of a run with other proxies, and the reward that follows from them."""
    return with_properties(config, parts, Properties(ensemble, [DensityProxy()]))


def with_properties(config: RunConfig, parts: Parts, properties: Properties) -> Parts:
    """Return the parts of a run with other predictions, and the reward that follows from them."""
    reward = build_reward(config, properties)
    return replace(parts, properties=properties, reward=reward, target=replace(parts.target, reward=reward))


def build_parts(config: RunConfig, *, restrictions: Restrictions | None = None) -> Parts:
    """Build the parts of a run; takes a few seconds.

    Args:
        config: The run.
        restrictions: On top of the run's own, for sampling under new ones.

    Raises:
        RestrictionError: If the restrictions leave nothing.
        RewardError: If the reward cannot be built.
    """
    torch.set_num_threads(config.threads)
    space = restrict(run_space(config), config.restrict.to_restrictions())
    if restrictions is not None:
        space = restrict(space, restrictions)
    env = CrystalEnv(space)
    prior = build_prior(config) if config.has_prior else None
    properties = build_properties(config.proxies)
    reward = build_reward(config, properties)
    target = SamplingTarget(
        reward=reward,
        prior=prior,
        alpha=config.alpha_value,
        lengths_angles=config.measure == "lengths_angles",
        box=space.box,
    )
    policy = start_policy(config, env, prior)
    generator = build_generator(config.structure, config.flow, n_draws=_DRAWS)
    bound = config.restrict.to_restrictions().binds_cells or (restrictions is not None and restrictions.binds_cells)
    free = None
    if config.has_prior and isinstance(generator, FlowMatching) and not bound:
        free = replace(generator, lattice="free")
    return Parts(env, policy, target, properties, reward, prior, generator, free)


def build_generator(
    structure: str | None, flow: str | None, *, lattice: LatticeMode = "fixed", n_draws: int = 1, n_steps: int = 20
) -> StructureGenerator:
    """Return the structure generator that a command names; a flow of one's own is in the folder `flow`.

    A run's flow keeps the sampled lattices, which obey every restriction.
    """
    if structure == "random":
        return RandomCoordinates()
    stem = SHIPPED_FLOW if flow is None else Path(flow) / "flow"
    return FlowMatching.load(stem, lattice=lattice, n_draws=n_draws, n_steps=n_steps)


def careful_generator(
    structure: str = "flow",
    flow: str | None = None,
    *,
    lattice: LatticeMode = "free",
    n_draws: int = CAREFUL_DRAWS,
    pick: Pick = "agreement",
    n_workers: int = 0,
) -> StructureGenerator:
    """Return the generator for what is made without a search: the best of several draws of many steps.

    Args:
        structure: "flow" or "random".
        flow: Folder of a flow of one's own; None: the one that ships.
        lattice: What the flow does with lattices.
        n_draws: Draws per crystal.
        pick: The draw that is kept: the one that others agree with, or that of lowest CHGNet energy as built.
        n_workers: Processes that compute energies; 0 computes them in this one.
    """
    generator = build_generator(structure, flow, lattice=lattice, n_draws=n_draws, n_steps=CAREFUL_STEPS)
    if pick == "chgnet" and n_draws > 1 and isinstance(generator, FlowMatching):
        energies = partial(single_point_energies, n_workers=n_workers)
        return replace(generator, energies=energies, lattice_temperature=SCATTERED)
    return generator


def build_oracle(config: OracleConfig) -> Oracle:
    """Return the oracle that a configuration names.

    Raises:
        RelaxError: If a setting of the relaxation makes no sense.
        MatglModelError, CallableOracleError: If there is no such model or function.
    """
    if config.name == "matgl":
        return MatglOracle(
            model=str(config.model),
            predicts=config.predicts or "formation_energy_per_atom",
            scale=config.scale or "mp2020",
            fmax=config.fmax,
            max_steps=config.max_steps,
            time_limit=config.time_limit,
        )
    if config.name == "callable":
        return CallableOracle(function=str(config.model), quantity=config.quantity or "formation_energy_per_atom")
    return ChgnetOracle(
        fmax=config.fmax, max_steps=config.max_steps, rattle=config.rattle, time_limit=config.time_limit
    )


def build_second_oracle(config: OracleConfig) -> Oracle | None:
    """Return the potential that gives finalists a second energy, None where none is asked for.

    Raises:
        RelaxError: If a setting of the relaxation makes no sense.
    """
    if config.second is None:
        return None
    return MatglOracle(model=config.second, fmax=config.fmax, max_steps=config.max_steps, time_limit=config.time_limit)


def build_prior(config: RunConfig) -> Prior:
    """Return the run's prior, by default the one that ships."""
    policy = load_policy(SHIPPED if config.prior is None else Path(config.prior) / "prior")
    return Prior(policy, config.chemistry, mixed_valence=config.mixed_valence)


def start_policy(config: RunConfig, env: CrystalEnv, prior: Prior | None) -> CrystalPolicy:
    """Return the policy that training starts from: the prior's where the sizes agree, else a fresh one."""
    sizes = PolicyConfig.for_env(env, width=config.train.width, depth=config.train.depth)
    torch.manual_seed(config.seed)
    if (
        prior is not None
        and replace(prior.policy.config, dropout=0.0, assignments=(), feature_atoms=sizes.feature_atoms) == sizes
    ):
        policy = CrystalPolicy(replace(prior.policy.config, dropout=0.0))
        policy.load_state_dict(prior.policy.state_dict())
        return policy
    if prior is not None:
        print("training starts from random weights: the prior has a trunk of another size", file=sys.stderr)
    return CrystalPolicy(sizes)


def start_trainer(config: RunConfig, parts: Parts, *, number: int = 1) -> Trainer:
    """Return the trainer of a run's round, with samples of the prior as its data.

    Later rounds go on with the policy of the one before, in fewer steps.
    """
    train = config.train if number == 1 else replace(config.train, n_steps=config.learn.sampler_steps, minutes=None)
    seed = config.seed if number == 1 else seeded(config.seed, f"round {number}").initial_seed()
    if rank := parts.processes.rank:
        seed = seeded(seed, f"process {rank}").initial_seed()
    n_data = round(train.data_fraction * train.batch_size * train.n_steps)
    trainer = Trainer(
        parts.env,
        parts.policy,
        parts.target,
        train,
        data=prior_samples(config, parts, min(_POOL, n_data)) if n_data else None,
        loss=config.loss,
        seed=seed,
        warm_up=number == 1,
        processes=parts.processes,
    )
    if trainer.data_terms is not None and config.alpha_value > 0:
        outside = float((trainer.data_terms.log_prior <= UNREPRESENTABLE).double().mean())
        if outside > _MUCH:
            print(
                f"{100 * outside:.0f} % of the crystals under these restrictions lie outside the prior's cells, "
                f"where alpha={config.alpha_value:g} forbids them; alpha=0 leaves the prior out",
                file=sys.stderr,
            )
    return trainer


def prior_samples(config: RunConfig, parts: Parts, n: int) -> CrystalBatch | None:
    """Return ``n`` crystals of the untrained prior under the run's restrictions, None where there is no prior."""
    if parts.prior is None:
        return None
    generator = seeded(config.seed, "prior samples")
    return CrystalBatch.cat([batch for batch, _ in draw_crystals(parts.env, parts.prior.policy, n, generator)])


def seeded(seed: int, purpose: str) -> torch.Generator:
    """Return a generator of its own for each purpose, so that no draw depends on how many came before elsewhere."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
