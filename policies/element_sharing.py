"""Let a policy in training share what it learns between elements of like properties.

Every weight that belongs to one element becomes the sum of its own and of a learned linear map of the element's
properties. The sum is a weight like any other, so that the trained policy is an ordinary one.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch import Tensor

    from policies.policy import CrystalPolicy

_OWN, _MAP = ".parametrizations.weight.original", ".parametrizations.weight.0.map"  # torch's names of the two parts


class _Shared(nn.Module):
    """Adds a linear map of the properties to the elements' rows (or, ``by_column``, columns), from ``first`` on."""

    properties: Tensor

    def __init__(self, properties: Tensor, weight: Tensor, *, first: int, by_column: bool) -> None:
        super().__init__()
        self.by_column = by_column
        n_rows, width = weight.t().shape if by_column else weight.shape
        padded = torch.zeros(n_rows, properties.shape[1])  # what is no element (the end, letters) shares nothing
        padded[first : first + len(properties)] = properties
        self.register_buffer("properties", padded, persistent=False)
        self.map = nn.Parameter(torch.zeros(properties.shape[1], width))

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.properties @ self.map
        return weight + (shared.t() if self.by_column else shared)


def share_by_properties(policy: CrystalPolicy, properties: Tensor) -> None:
    """Make ``policy`` share weights between elements, in place.

    Args:
        policy: To be trained.
        properties: (n_elements, d) of the elements in the environment's order, standardised.
    """
    scaled = properties / properties.shape[1] ** 0.5
    for module in (policy.dense, policy.element, policy.element_head, policy.count_element):
        first = int(module is policy.element)  # row 0 of that table stands for "no element yet"
        shared = _Shared(scaled, module.weight.detach(), first=first, by_column=module is policy.dense)
        parametrize.register_parametrization(module, "weight", shared)


def ordinary_weights(policy: CrystalPolicy) -> dict[str, Tensor]:
    """Return copies of the weights of a policy with the same function that shares nothing."""
    names = [name.replace(_OWN, ".weight") for name in policy.state_dict() if not name.endswith(_MAP)]
    return {name: attrgetter(name)(policy).detach().clone() for name in names}
