"""Coordinates by flow matching: integrate a learned velocity of free Wyckoff parameters and of the lattice.

Rectified flow (Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747) on the flat torus, as
CrystalFlow does for whole cells (Luo et al. 2025, Nature Communications 16, 9267): u_0 is uniform, u_t = u_0 + t
wrap(u_1 - u_0), and the network gives du/dt. Letters fix the symmetry, so every structure has its space group exactly.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from ase.data import covalent_radii
from numpy.typing import ArrayLike
from pymatgen.core import Structure
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from discover.structure.base import StructureError
from discover.structure.geometry import contacts
from discover.structure.network import FlowConfig, OrbitFormer
from discover.structure.orbit_batch import Frame, LatticeScale, OrbitBatch, make_frame
from discover.structure.orbits import orbit_batch, to_structures
from discover.structure.torus import nearest_equivalent, wrap
from envs.crystal import CrystalBatch
from envs.lattice import IS_FREE, lattice_matrix
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import is_rigid
from policies.errors import CheckpointError
from policies.storage import save_weights

SHIPPED = Path(__file__).parent / "pretrained" / "flow"
LatticeMode = Literal["fixed", "refine", "free"]
Energies = Callable[[Sequence[Structure]], ArrayLike]  # (n,) eV/atom of structures as they are, NaN where there is none
Solver = Literal["euler", "heun"]
#: Where the lattice's clock starts: a given cell is at its end, a nearly right one close to it, none at noise.
LATTICE_START: dict[str, float] = {"fixed": 1.0, "refine": 0.8, "free": 0.0}
#: Draws, the best of which is kept, and steps of each, where quality counts more than time: of structures for given
#: letters two points more match than with one draw of 20 steps; generated ones lie 0.1 eV/atom lower (median).
CAREFUL_DRAWS, CAREFUL_STEPS = 8, 40
SCATTERED = 0.5  # lattice temperature of draws that energies tell apart; without them the mean lattice is better
_RADII = torch.from_numpy(covalent_radii[:119]).float()
_REPAIR_RATIO, _REPAIR_STEPS = 0.75, 20
_AGREEMENT = 0.05
_RATIO_WEIGHT = 3.0  # chosen on one formula in forty of the training data
_BEFORE_ALL = 1e3  # a draw with an energy, which is above -1000 eV/atom, goes before one without
_CHUNK = {"cpu": 64, "cuda": 2048}  # crystals at once: on a CPU the tensors of more leave the cache, four times slower


class Draws(NamedTuple):
    """Coordinates of crystals."""

    parameters: Tensor  # (n, max_orbits, 3) float64 free Wyckoff parameters
    cell: Tensor  # (n, 6) float64 a, b, c in Å, angles in degrees
    score: Tensor  # (n,) float64, higher is better; -inf where the integration failed


@dataclass(frozen=True)
class FlowMatching:
    """The learned structure generator.

    Args:
        network: Velocity network.
        scale: Normalisation of the lattice that it was trained with.
        lattice: Keep the crystals' lattices (`fixed`), correct them (`refine`), or find new ones (`free`).
        n_steps: Steps of the integration.
        n_draws: Draws per crystal; the one with the best score is kept.
        lattice_temperature: Factor on the noise that a lattice starts from, unless it is `fixed`: 1 samples, 0 starts
            at the mean and gives nearly the most probable lattice.
        anneal: s' of the factor 1 + s' t on the velocity of the parameters (CrystalFlow, equation 25).
        solver: Euler, or Heun's method of second order, which calls the network twice a step.
        repair: Push atoms apart that are closer than 0.75 of the sum of their covalent radii.
        min_ratio: A structure whose shortest distance is below this multiple of the sum of radii is a failure; of
            3,000 materials of the training data the least is 0.47, and one in a thousand lies below 0.61.
        energies: Tells draws of a crystal apart; None: how many others agree and how airy they are.
    """

    network: OrbitFormer
    scale: LatticeScale
    lattice: LatticeMode = "fixed"
    n_steps: int = 20
    n_draws: int = 1
    lattice_temperature: float = 0.0
    anneal: float = 5.0
    solver: Solver = "euler"
    repair: bool = True
    min_ratio: float = 0.45
    energies: Energies | None = None

    @classmethod
    def load(cls, stem: Path = SHIPPED, **settings: Any) -> "FlowMatching":
        """Return a generator with trained weights, by default those that ship.

        Raises:
            CheckpointError: If the files are missing, truncated or of something else.
        """
        return cls(*load_flow(stem), **settings)

    def generate(self, crystals: CrystalBatch, generator: torch.Generator) -> list[Structure | None]:
        """Return a structure of each crystal in its conventional cell, or None where no draw is acceptable.

        Raises:
            StructureError: If letters and counts of a crystal contradict each other.
        """
        draws = self.best_draws(crystals, generator)
        structures = to_structures(replace(crystals, lattice_parameters=draws.cell), draws.parameters)
        return [
            structure if ok else None
            for structure, ok in zip(structures, (draws.score > -torch.inf).tolist(), strict=True)
        ]

    def best_draws(self, crystals: CrystalBatch, generator: torch.Generator) -> Draws:
        """Return the best of ``n_draws`` draws of each crystal; one in which nothing is drawn needs only one.

        The score of a draw is how many others agree with it (see ``agreement``) plus three times its shortest distance
        over the sum of covalent radii, at most 1: frequent answers win over rare ones, airy over crowded ones. Where
        there are ``energies``, the draw of lowest energy has the best score.
        """
        _check(crystals)
        n = len(crystals)
        # Without free parameters only lattices can differ, which nothing but energies tells apart.
        same = is_rigid(crystals.space_group, crystals.letters) & (self.energies is None or self.lattice == "fixed")
        repeats = torch.where(same, 1, self.n_draws)
        owner = torch.repeat_interleave(torch.arange(n), repeats)
        drawn = crystals.select(owner)
        draws = self.draw(drawn, generator)
        score = _RATIO_WEIGHT * draws.score
        several = (~same[owner]).nonzero().flatten()
        if self.n_draws > 1 and len(several):
            agreeing = agreement(drawn.select(several), draws.parameters[several], self.n_draws)
            score = score.index_add(0, several, agreeing)
            if self.energies is not None:
                score = _with_energies(self.energies, drawn, draws, score, several)
        best = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owner, score, "amax")
        is_best = score == best[owner]
        chosen = torch.full((n,), len(owner)).scatter_reduce(0, owner[is_best], is_best.nonzero().flatten(), "amin")
        return Draws(draws.parameters[chosen], draws.cell[chosen], score[chosen])

    @torch.no_grad()
    def draw(self, crystals: CrystalBatch, generator: torch.Generator) -> Draws:
        """Return one draw for each row of `crystals`.

        Each row has its own random numbers, so that its structure does not depend on its neighbours in the batch.
        """
        n, width = crystals.letters.shape
        batch = orbit_batch(crystals, torch.zeros(n, width, 3))
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        noise, lattice_noise = torch.empty(n, width, 3), torch.empty(n, 6)
        own = torch.Generator()
        for row, seed in enumerate(seeds):
            own.manual_seed(seed)
            noise[row] = torch.rand(width, 3, generator=own)
            lattice_noise[row] = torch.randn(6, generator=own)
        return self.integrate(batch, noise, self.lattice_temperature * lattice_noise)

    @torch.no_grad()
    def integrate(self, batch: OrbitBatch, noise: Tensor, lattice_noise: Tensor, *, start: float = 0.0) -> Draws:
        """Return where the flow takes the noise.

        Args:
            batch: Crystals; their parameters count if `start` > 0, their cells unless the lattice is `free`.
            noise: (n, w, 3) uniform in [0, 1).
            lattice_noise: (n, 6) standard normal.
            start: Clock of the parameters at the start; above 0 those of the batch are noised and corrected.
        """
        n, width = batch.letters.shape
        parameters, cell = torch.zeros(n, width, 3, dtype=torch.float64), batch.cell.double()
        score = torch.full((n,), -torch.inf, dtype=torch.float64)
        # Crystals of similar size go together, so that little is padding.
        size = _CHUNK.get(self.network.descriptors.device.type, 512)
        for rows in (batch.letters >= 0).sum(dim=1).argsort(stable=True).split(size):
            part = batch.select(rows)
            used = part.letters.shape[1]
            found, found_cell, found_score = self._integrate(part, noise[rows, :used], lattice_noise[rows], start)
            parameters[rows, :used], cell[rows], score[rows] = found.double(), found_cell.double(), found_score.double()
        return Draws(parameters, cell, score)

    def _integrate(
        self, batch: OrbitBatch, noise: Tensor, lattice_noise: Tensor, start: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = self.network.descriptors.device
        frame = make_frame(batch.space_group, batch.elements, batch.letters).to(device)
        system, reference = frame.lattice_system, batch.log_reference.to(device)
        begin = LATTICE_START[self.lattice]
        u = noise.to(device) * frame.is_free
        if start > 0.0:
            given = batch.parameters.to(device)
            u = (given + (1.0 - start) * ((u - given + 0.5) % 1.0 - 0.5)) % 1.0 * frame.is_free
        z = lattice_noise.to(device) * IS_FREE.to(device)[system]
        if begin > 0.0:
            given_lattice = self.scale.normalise(batch.cell, batch.log_reference, batch.lattice_system)
            z = torch.lerp(z, given_lattice.to(device), begin)
        cell = batch.cell.to(device) if begin == 1.0 else self.scale.cell(z, reference, system)
        n_steps = self.n_steps if bool(frame.is_free.any()) or begin < 1.0 else 0
        finite = torch.ones(len(batch), dtype=torch.bool, device=device)

        def velocity(time: float, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
            clocks = torch.tensor([start + (1.0 - start) * time, begin + (1.0 - begin) * time], device=device)
            now = cell if begin == 1.0 else self.scale.cell(z, reference, system)
            du, dz = self.network(frame, u, z, now, clocks.expand(len(batch), 2))
            return du * (1.0 - start) * (1.0 + self.anneal * clocks[0]), dz * (1.0 - begin) * IS_FREE.to(device)[system]

        for step in range(n_steps):
            time, size = step / n_steps, 1.0 / n_steps
            du, dz = velocity(time, u, z)
            if self.solver == "heun":
                du_end, dz_end = velocity(time + size, (u + size * du) % 1.0, z + size * dz)
                du, dz = 0.5 * (du + du_end), 0.5 * (dz + dz_end)
            u, z = (u + size * du) % 1.0, z + size * dz
            # One crystal that diverges is one failure: the others of the batch go on.
            finite &= u.isfinite().all(dim=2).all(dim=1) & z.isfinite().all(dim=1)
            u, z = torch.where(finite[:, None, None], u, 0.0), torch.where(finite[:, None], z, 0.0)
        if n_steps and begin < 1.0:
            cell = self.scale.cell(z, reference, system)
        matrix, radii = lattice_matrix(cell), _RADII.to(device)
        if self.repair:
            u = _repair(frame, u, matrix, radii)
        ratio, _ = contacts(frame, u, matrix, radii, 1.0)
        score = torch.where(finite & (ratio >= self.min_ratio), ratio.clamp(max=1.0), -torch.inf)
        return u.cpu(), cell.cpu(), score.cpu()


def agreement(crystals: CrystalBatch, parameters: Tensor, n_draws: int) -> Tensor:
    """Return how many of the other draws of the same crystal agree with each draw, (n,) float64.

    Two draws agree to the degree exp(-(d / 0.05)²), where d² is the mean over atoms of the squared difference of their
    free parameters, after one of them is described as closely to the other as equivalent descriptions allow.

    Args:
        crystals: The crystal of each draw; the draws of a crystal follow one another.
        parameters: (n, w, 3) free Wyckoff parameters.
        n_draws: Draws per crystal.
    """
    group, letters = crystals.space_group, crystals.letters
    share = crystals.counts / crystals.n_atoms[:, None]
    by_crystal = parameters.unflatten(0, (-1, n_draws))
    total = torch.zeros(len(crystals), dtype=torch.float64)
    for step in range(1, n_draws):
        other = by_crystal.roll(step, dims=1).flatten(0, 1)
        aligned = nearest_equivalent(group, crystals.elements, letters, other, parameters)
        squared = (wrap(aligned - parameters).square().sum(dim=2) * share).sum(dim=1)
        total += torch.exp(-squared / _AGREEMENT**2)
    return total


def _with_energies(energies: Energies, crystals: CrystalBatch, draws: Draws, score: Tensor, rows: Tensor) -> Tensor:
    """Return (n,) scores in which those of `rows` that are structures and have an energy follow from it."""
    rows = rows[score[rows] > -torch.inf]
    built = replace(crystals.select(rows), lattice_parameters=draws.cell[rows])
    energy = torch.as_tensor(energies(to_structures(built, draws.parameters[rows], primitive=True)), dtype=score.dtype)
    return score.index_copy(0, rows, torch.where(energy.isfinite(), _BEFORE_ALL - energy, score[rows]))


def save_flow(stem: Path, network: OrbitFormer, scale: LatticeScale, about: dict[str, Any]) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json`` (sizes and whatever `about` says)."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": value.contiguous() for name, value in network.state_dict().items()}
    tensors |= {"scale.mean": scale.mean, "scale.std": scale.std}
    save_weights(Path(f"{stem}.safetensors"), tensors)
    content = {"kind": "flow", "config": asdict(network.config), **about}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")


def load_flow(stem: Path = SHIPPED) -> tuple[OrbitFormer, LatticeScale]:
    """Return the network, ready to be evaluated, and the lattice statistics that ``save_flow`` wrote.

    Raises:
        CheckpointError: If the files are missing, truncated or of something else.
    """
    try:
        content = json.loads(stem.with_suffix(".json").read_text())
        tensors = load_file(f"{stem}.safetensors")
        network = OrbitFormer(FlowConfig(**content["config"]))
        network.load_state_dict(
            {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
        )
        scale = LatticeScale(tensors["scale.mean"], tensors["scale.std"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{stem}.safetensors and .json do not hold a flow network ({error}); "
            "train one with python -m discover.train what=flow"
        ) from error
    return network.eval(), scale


def _repair(frame: Frame, parameters: Tensor, matrix: Tensor, radii: Tensor) -> Tensor:
    """Return parameters with overlapping atoms pushed apart, inside their Wyckoff positions."""
    for _ in range(_REPAIR_STEPS):
        ratio, step = contacts(frame, parameters, matrix, radii, _REPAIR_RATIO)
        crowded = ratio < _REPAIR_RATIO
        if not bool(crowded.any()):
            break
        parameters = torch.where(crowded[:, None, None], (parameters + step.clamp(-0.1, 0.1)) % 1.0, parameters)
    return parameters


def _check(crystals: CrystalBatch) -> None:
    """Refuse crystals without letters, and letters that do not hold the counts."""
    placed = crystals.counts > 0
    size = SYMMETRY.primitive_multiplicity[crystals.space_group[:, None] - 1, crystals.letters.clamp(min=0)]
    wrong = (placed & ((crystals.letters < 0) | (size != crystals.counts))).any(dim=1).nonzero().flatten().tolist()
    if wrong:
        raise StructureError(
            f"{len(wrong)} crystals have no letters, or letters that do not hold their atoms, first rows {wrong[:5]}: "
            "the flow places atoms on Wyckoff letters; use structure=random for crystals without them"
        )
