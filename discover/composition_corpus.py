"""Crystals as the decisions that the composition-conditioned prior learns: masks, letters, lattice, stability."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from pymatgen.core import Element
from torch import Tensor

from discover.data import PreparedData
from discover.errors import ConfigError
from envs import lattice
from envs.assignment import Assignments, Packing, Walk, canonical
from envs.chemistry import load_elements
from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from envs.equivalence import image
from envs.reference_volume import log_reference_volume
from envs.symmetry import SYMMETRY
from policies.composition_network import STABLE, UNKNOWN, UNSTABLE
from proxies.elements import element_properties

STABLE_BELOW = 0.08  # eV/atom above the hull, the criterion of MP-20
_INNER_FOLDS = 20  # one formula in twenty is held out
_OXIDATION_STATES = range(-5, 9)
_MOST_ATOMS = 64  # of one element in a crystal to learn from


@dataclass(frozen=True)
class Corpus:
    """Crystals as teacher-forced decisions, one row each."""

    assignments: Assignments
    stability: Tensor  # (n,) int64
    group_mask: Tensor  # (n, 230) bool
    letter_mask: Tensor  # (n, w, 27) bool
    n_left: Tensor  # (n, w) int64 atoms of the element to place before each orbit
    lattice: Tensor  # (n, 6) float64 lattice coordinates of envs.lattice

    def __len__(self) -> int:
        """Return the number of crystals."""
        return len(self.stability)

    @property
    def n_orbits(self) -> Tensor:
        """(n,) int64 orbits of each crystal."""
        return (self.assignments.slot >= 0).sum(dim=1)

    def select(self, rows: Tensor) -> "Corpus":
        """Return the crystals at ``rows``, trimmed to the longest of them."""
        assignments = self.assignments.select(rows)
        width = assignments.slot.shape[1]
        return Corpus(
            assignments,
            self.stability[rows],
            self.group_mask[rows],
            self.letter_mask[rows, :width],
            self.n_left[rows, :width],
            self.lattice[rows],
        )


def element_table() -> Tensor:
    """Return (119, f) float32 properties, groups, rows and oxidation states of the elements; row 0 is padding."""
    groups, rows = torch.zeros(MAX_ATOMIC_NUMBER + 1, 18), torch.zeros(MAX_ATOMIC_NUMBER + 1, 7)
    states = torch.zeros(MAX_ATOMIC_NUMBER + 1, len(_OXIDATION_STATES))
    for number in range(1, MAX_ATOMIC_NUMBER + 1):
        element = Element.from_Z(number)
        groups[number, element.group - 1] = 1.0
        rows[number, element.row - 1] = 1.0
    for known in load_elements().values():
        kept = [state for state in known.oxidation_states if state in _OXIDATION_STATES]
        states[known.atomic_number, torch.tensor(kept, dtype=torch.int64) - _OXIDATION_STATES.start] = 1.0
    return torch.cat([torch.from_numpy(element_properties()), groups, rows, states], dim=1)


def corpus_of(crystals: CrystalBatch, stability: Tensor) -> Corpus:
    """Return ``crystals`` as decisions, each written as its smallest image.

    Left out are those with more than 64 atoms of one element, and those that no walk can write.
    """
    small = (crystals.composition.amax(dim=1) <= _MOST_ATOMS).nonzero().flatten()
    crystals, stability = crystals.select(small), stability[small]
    assignments, alternative = canonical(crystals)
    packing = Packing.for_counts(assignments.compositions.counts)
    walk = Walk.start(packing, assignments.compositions, assignments.group)
    legal = torch.ones(len(crystals), dtype=torch.bool)
    masks, left = [], []
    for slot, letter in zip(assignments.slot.unbind(dim=1), assignments.letter.unbind(dim=1), strict=True):
        mask = walk.letter_mask()
        allowed = mask.gather(1, letter.clamp(min=0)[:, None])[:, 0] & (walk.slot == slot)
        legal &= allowed | (letter < 0)
        masks.append(mask)
        left.append(walk.n_left)
        walk.step(letter)
    corpus = Corpus(
        assignments,
        stability,
        packing.group_mask(assignments.compositions.counts),
        torch.stack(masks, dim=1),
        torch.stack(left, dim=1),
        lattice_targets(image(crystals, alternative)),
    )
    return corpus.select((legal & walk.done).nonzero().flatten())


def lattice_targets(crystals: CrystalBatch) -> Tensor:
    """Return (n, 6) float64 lattice coordinates of ``envs.lattice``, volumes relative to the sum of the elements'."""
    numbers = torch.arange(MAX_ATOMIC_NUMBER + 1)
    reference = log_reference_volume(crystals.composition * crystals.centring[:, None], numbers)
    return lattice.coordinates(crystals.lattice_parameters, reference)


def stability_of(data: PreparedData) -> Tensor:
    """Return (n,) int64 flag of each row's label."""
    above = torch.as_tensor(np.asarray(data.labels["e_above_hull"]))
    known = torch.where(above < STABLE_BELOW, STABLE, UNSTABLE)
    return torch.where(above.isnan(), UNKNOWN, known)


def fold(formula: str) -> int:
    """Return the fold, 0 to 19, of a reduced formula; fold 0 chooses the epoch."""
    return int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) % _INNER_FOLDS


def lattice_scale(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Return (8, 6) means and spreads of the lattice coordinates of each lattice system, spread 0 where fixed."""
    system = SYMMETRY.lattice_system[corpus.assignments.group]
    mean, spread = torch.zeros(8, 6, dtype=torch.float64), torch.ones(8, 6, dtype=torch.float64)
    for index in range(8):
        rows = corpus.lattice[system == index]
        if len(rows) > 1:
            mean[index] = rows.mean(dim=0)
            spread[index] = rows.std(dim=0).clamp(min=1e-3)
    free = lattice.IS_FREE
    fixed = torch.cat([lattice.FIXED_ANGLES, torch.zeros(8, 3, dtype=torch.float64)], dim=1)
    return torch.where(free, mean, fixed).float(), torch.where(free, spread, 0.0).float()


def split(data: PreparedData) -> tuple[Corpus, Corpus, CrystalBatch]:
    """Return what is trained on, and the stable crystals of the held-out formulas, as decisions and as crystals.

    Raises:
        ConfigError: If one of them is empty.
    """
    stability = stability_of(data)
    is_inner = torch.tensor([fold(str(formula)) == 0 for formula in data.formulas])
    outer, inner = (~is_inner).nonzero().flatten(), (is_inner & (stability == STABLE)).nonzero().flatten()
    if not int((stability[outer] == STABLE).sum()) or not len(inner):
        raise ConfigError(
            f"{len(data)} rows leave {len(outer)} to train on, {int((stability[outer] == STABLE).sum())} of them below "
            f"{STABLE_BELOW} eV/atom above the hull, and {len(inner)} stable ones of other formulas to measure with; "
            "both are needed, so give more data"
        )
    train = corpus_of(data.crystals.select(outer), stability[outer])
    held_out = data.crystals.select(inner)
    return train, corpus_of(held_out, stability[inner]), held_out
