"""Build the aggregate of prototypes that ships: statistics of Wyckoff sequences, no rows of the data.

``python -m discover.train_templates data=PATH``: crystals that place the same numbers of atoms on the same letters of a
space group, whatever their elements, share a Wyckoff sequence. Its crystals are brought to one setting and clustered by
their surroundings; every cluster of at least three materials becomes one template with its mean parameters and cell.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Element
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor
from tqdm import tqdm

from discover.data import prepare
from discover.errors import DataError, main_guard
from discover.options import option, parse_args
from discover.structure.fingerprint import pairwise_distances
from discover.structure.torus import nearest_equivalent, wrap
from discover.templates import Templates, assignments, save_templates, templates_of_data
from envs.conventions import MAX_LETTERS
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import free_mask, transform_parameters

FEWEST_MATERIALS = 3  # behind a template, so that none gives away a row
#: Mean fingerprint distances at which clusters stop growing, of what tighter ones leave over; StructureMatcher calls
#: 99 % of pairs equal at the first two.
SAME_PROTOTYPE = (0.3, 0.8, 2.0)
_ROWS = 64  # crystals whose images are looked at together
_HASH = torch.randint(-(2**62), 2**62, (64 * MAX_LETTERS,), generator=torch.Generator().manual_seed(11))


@dataclass(frozen=True, kw_only=True)
class TemplateTraining:
    """Everything `python -m discover.train_templates` can be told."""

    data: str = option("", "CSV, folder of CIF files or extxyz file with the crystals")
    output: str = option("templates.npz", "file to write; what ships is discover/pretrained/templates.npz")
    n_workers: int = option(2, "processes that analyse structures")


@dataclass(frozen=True)
class _Settings:
    """Ways to write one crystal as its Wyckoff sequence; those of one row are equivalent."""

    row: Tensor  # (m,) int64, sorted
    order: Tensor  # (m, k) int64 old kind that becomes each new kind, the same for all ways of a row
    alternative: Tensor  # (m,) int64


def aggregate(templates: Templates, *, progress: bool = True) -> Templates:
    """Return one template for each cluster of a Wyckoff sequence that holds at least three materials.

    Args:
        templates: Rows of a data set.
        progress: Show a bar.

    Raises:
        DataError: If no sequence has enough materials.
    """
    found: list[Templates] = []
    groups = sorted(templates.groups.items(), key=lambda item: -len(item[1]))
    for counts, rows in tqdm(
        groups, desc="anonymous compositions", disable=None if progress else True, file=sys.stderr
    ):
        code, settings = _sequences(templates, rows, counts)
        known = templates.fingerprints(counts)
        for members in _equal(code, FEWEST_MATERIALS):
            order = settings.order[torch.searchsorted(settings.row, members)]
            alike = known[members[:, None, None], order[:, :, None], order[:, None, :]]
            distances = pairwise_distances(alike, alike).double()
            for cluster in _clusters(distances.numpy()):
                middle = int(distances[cluster][:, cluster].sum(dim=1).argmin())
                found.append(_merge(templates, rows, settings, members[cluster], middle))
    if not found:
        raise DataError(f"no Wyckoff sequence is shared by {FEWEST_MATERIALS} of the {len(templates)} materials")
    return _stack(found)


def _sequences(templates: Templates, rows: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, _Settings]:
    """Return a number for the Wyckoff sequence of each row, and the ways to write the row in its one setting.

    Letters change with the setting, kinds of equal count are interchangeable; of all combinations the one with the
    smallest hash is the sequence's own. Where several orders of kinds give it, electropositive elements come first.
    """
    orders = assignments(counts)
    n_orders, k = orders.shape
    negativity = torch.tensor([0.0, *(_electronegativity(z) for z in range(1, 119))], dtype=torch.float64)
    parts, all_codes = [], []
    for chunk in torch.arange(len(rows)).split(_ROWS):
        here = rows[chunk]
        group = templates.space_group[here] - 1
        width = int(SYMMETRY.n_alternatives[group].max())
        exists = torch.arange(width) < SYMMETRY.n_alternatives[group][:, None]
        letters, kinds = templates.letters[here], templates.kinds[here]
        mapped = SYMMETRY.alternative_letters[group, :width].gather(
            2, letters.clamp(min=0)[:, None].expand(-1, width, -1)
        )
        # Kinds of one count in order of electronegativity, then every exchange of them; argsort inverts an order.
        value = negativity[templates.kind_elements[here, :k, 0]] + 100.0 * torch.tensor(counts)
        positive_first = value.argsort(dim=1, stable=True)
        order = positive_first[:, orders]  # (rows, n_orders, k): old kind on each new kind
        new_kind = order.argsort(dim=2).gather(2, kinds.clamp(min=0)[:, None].expand(-1, n_orders, -1))
        code = _HASH[new_kind[:, :, None] * MAX_LETTERS + mapped[:, None]]
        code = torch.where(kinds[:, None, None] >= 0, code, 0).sum(dim=-1)  # (rows, n_orders, width)
        code = code.masked_fill(~exists[:, None], 2**63 - 1)
        smallest = code.amin(dim=(1, 2))
        is_best = code == smallest[:, None, None]
        first_order = is_best.any(dim=2).to(torch.int8).argmax(dim=1)
        row, alternative = is_best[torch.arange(len(here)), first_order].nonzero().unbind(dim=1)
        parts.append(_Settings(chunk[row], order[row, first_order[row]], alternative))
        all_codes.append(smallest ^ (group * 0x9E3779B97F4A7C1))
    settings = _Settings(
        torch.cat([part.row for part in parts]),
        torch.cat([part.order for part in parts]),
        torch.cat([part.alternative for part in parts]),
    )
    return torch.cat(all_codes), settings


def _equal(code: Tensor, fewest: int) -> list[Tensor]:
    """Return the indices of each value that occurs at least `fewest` times."""
    order = code.argsort(stable=True)
    _, sizes = code[order].unique_consecutive(return_counts=True)
    return [part.sort().values for part in order.split(sizes.tolist()) if len(part) >= fewest]


def _clusters(distances: NDArray[np.float64]) -> list[Tensor]:
    """Return the members of each cluster of at least three, by average linkage; what fits nowhere is left out."""
    found = []
    left = np.arange(len(distances))
    for limit in SAME_PROTOTYPE:
        if len(left) < FEWEST_MATERIALS:
            break
        tree = linkage(squareform(distances[np.ix_(left, left)], checks=False), "average")
        labels = fcluster(tree, limit, "distance")
        large = np.bincount(labels)[labels] >= FEWEST_MATERIALS
        found += [torch.from_numpy(left[labels == label]) for label in np.unique(labels[large])]
        left = left[~large]
    return found


def _merge(templates: Templates, rows: Tensor, settings: _Settings, members: Tensor, middle: int) -> Templates:
    """Return the mean of some crystals of one sequence; that of index `middle` says near which parameters."""
    ways = torch.isin(settings.row, members).nonzero().flatten()
    owner = torch.searchsorted(members, settings.row[ways])
    row, order, alternative = rows[members[owner]], settings.order[ways], settings.alternative[ways]
    group = templates.space_group[row]
    letters = SYMMETRY.alternative_letters[group - 1, alternative].gather(1, templates.letters[row].clamp(min=0))
    kinds = order.argsort(dim=1).gather(1, templates.kinds[row].clamp(min=0))
    used = templates.kinds[row] >= 0
    sorting = torch.where(used, kinds * MAX_LETTERS + letters, 2**20).argsort(dim=1, stable=True)
    n_used = int(used[0].sum())
    sorting = sorting[:, :n_used]
    moved = transform_parameters(group, templates.letters[row], templates.parameters[row], alternative)
    moved = moved.gather(1, sorting[:, :, None].expand(-1, -1, 3))
    letters, kinds = letters.gather(1, sorting), kinds.gather(1, sorting)
    moved = moved * free_mask(group, letters)
    log_cells = templates.cells[row].clone()
    axes = SYMMETRY.alternative_axes[group - 1, alternative]
    log_cells[:, :3] = log_cells[:, :3].gather(1, axes).log()
    first = int((owner == middle).nonzero()[0])
    near = nearest_equivalent(group, kinds + 1, letters, moved, moved[first].expand_as(moved))
    away = wrap(near - moved[first])
    # Of the ways to write a crystal, the one nearest to the middle in parameters and cell.
    cost = away.square().sum(dim=(1, 2)) + (log_cells[:, :3] - log_cells[first, :3]).square().sum(dim=1)
    best = torch.tensor([int(part[cost[part].argmin()]) for part in _equal(owner, 1)])
    spread, mean = torch.std_mean(log_cells[best], dim=0)
    cells = mean.clone()
    cells[:3] = cells[:3].exp()
    elements, shares = _seen(templates.kind_elements[row[best], :, 0].gather(1, order[best]))
    return Templates(
        space_group=group[:1],
        letters=letters[:1],
        kinds=kinds[:1],
        parameters=((moved[first] + away[best].mean(dim=0)) % 1.0 * free_mask(group[:1], letters[:1])),
        cells=cells[None],
        cell_spread=spread[None],
        kind_counts=templates.kind_counts[row[:1], : order.shape[1]],
        kind_elements=elements[None],
        kind_shares=shares[None],
        n_materials=torch.tensor([len(members)]),
        e_above_hull=torch.full((1,), torch.nan, dtype=torch.float64),
        formulas=np.array([""]),
    )


def _seen(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct elements (k, max_seen) of each column of (n, k), 0 = padding, and their shares."""
    columns = [column.unique(return_counts=True) for column in elements.unbind(dim=1)]
    width = max(len(values) for values, _ in columns)
    pad = torch.nn.functional.pad
    values = torch.stack([pad(values, (0, width - len(values))) for values, _ in columns])
    shares = torch.stack([pad(n.double() / len(elements), (0, width - len(n))) for _, n in columns])
    return values, shares


def _stack(parts: Sequence[Templates]) -> Templates:
    """Return templates of any number of orbits and kinds as one set, padded to the largest."""
    width = max(part.letters.shape[1] for part in parts)
    n_kinds = max(part.kind_counts.shape[1] for part in parts)
    n_seen = max(part.kind_elements.shape[2] for part in parts)

    def padded(name: str, sizes: tuple[int, ...], value: int = 0) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([_pad(tensor, sizes, value) for tensor in tensors])

    return Templates(
        space_group=padded("space_group", ()),
        letters=padded("letters", (width,), -1),
        kinds=padded("kinds", (width,), -1),
        parameters=padded("parameters", (width, 3)),
        cells=padded("cells", (6,)),
        cell_spread=padded("cell_spread", (6,)),
        kind_counts=padded("kind_counts", (n_kinds,)),
        kind_elements=padded("kind_elements", (n_kinds, n_seen)),
        kind_shares=padded("kind_shares", (n_kinds, n_seen)),
        n_materials=padded("n_materials", ()),
        e_above_hull=padded("e_above_hull", ()),
        formulas=np.concatenate([part.formulas for part in parts]),
    )


def _pad(tensor: Tensor, sizes: tuple[int, ...], value: int) -> Tensor:
    """Return (n, ...) with `value` appended until the sizes after the first are `sizes`."""
    missing = [wanted - size for wanted, size in zip(sizes, tensor.shape[1:], strict=True)]
    widths = [width for size in reversed(missing) for width in (0, size)]
    return torch.nn.functional.pad(tensor, widths, value=value)


def _electronegativity(atomic_number: int) -> float:
    """Return Pauling's value, 1.5 where there is none."""
    value = Element.from_Z(atomic_number).data.get("X")
    return float(value) if isinstance(value, float) else 1.5


def main(words: Sequence[str]) -> None:
    """Build the aggregate of a data set."""
    config = parse_args(TemplateTraining, words)
    rows = templates_of_data(prepare(config.data, n_workers=config.n_workers))
    found = aggregate(rows)
    size = save_templates(found, Path(config.output))
    n_used = int(found.n_materials.sum())
    print(f"{config.output}: {len(found)} templates from {n_used} of {len(rows)} crystals, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main_guard(main)
