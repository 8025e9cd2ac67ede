"""Which elements and counts can still follow, exactly: the look-ahead tables of the composition stage.

Elements are added in increasing electronegativity. Oxidation states stay latent: a state carries the
set of charges that its elements can sum to, once for "all cations so far" and once for "an anion was
met". Whether such a state can be completed is tabulated backwards over (position in the order,
elements used, atoms used, Wyckoff capacity) as the *set of charges from which it can*; a state is
alive if and only if the two sets meet. Sets are bit rows (``envs.bitset``), so a mask over all
elements is one gather and one "and" per state.

Cations must be strictly less electronegative than anions: at a tie, an element may not be an anion
if the element chosen before it, with the same electronegativity, is a cation.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from envs import bitset
from envs.capacity import DEAD, CapacityTable
from envs.chemistry import ChargeRule, Element

CATIONS, ANIONS = 0, 1


@dataclass(frozen=True)
class CompositionLimits:
    """What a finished composition must obey."""

    n_elements: tuple[int, int]  # smallest and largest number of elements
    n_atoms: tuple[int, int]  # smallest and largest number of atoms in the chosen cell
    allowed_counts: Tensor  # (n_elements, max_count + 1) bool, column 0 is ignored
    required: Tensor  # (n_elements,) bool


@dataclass(frozen=True)
class CompositionTable:
    """Look-ahead tables; index ``last`` is the position of the element chosen last, -1 = none yet."""

    atomic_numbers: Tensor  # (n_elements,) int64 in building order
    tie_group: Tensor  # (n_elements,) int64, equal where electronegativities are equal
    limits: CompositionLimits
    rule: ChargeRule
    capacity: CapacityTable
    after: Tensor  # (n_elements + 1, n_contexts, 2, words) charges that can be completed after ``last``
    take: Tensor  # (n_contexts, n_elements, 2, words) charges from which the element can be taken next
    next_required: Tensor  # (n_elements + 1,) int64 first required position after ``last``, n_elements if none
    n_budgets: int  # atoms used are tracked where the total can bind, else this is 1

    @property
    def n_elements(self) -> int:
        """Return the number of elements in the order."""
        return int(self.atomic_numbers.shape[0])

    @property
    def max_count(self) -> int:
        """Return the largest number of atoms of one element."""
        return int(self.limits.allowed_counts.shape[1]) - 1

    def context(self, n_chosen: Tensor, n_atoms: Tensor, capacity_state: Tensor) -> Tensor:
        """Return the row of (elements used, atoms used, capacity) in the tables; out-of-range rows are clamped."""
        budget = n_atoms.clamp(max=self.n_budgets - 1)
        n_chosen = n_chosen.clamp(max=self.limits.n_elements[1])
        return (n_chosen * self.n_budgets + budget) * self.capacity.n_states + capacity_state.clamp(min=0)

    @cached_property
    def first_charges(self) -> Tensor:
        """(n_elements, max_count + 1, 2, words): ``charges_after`` for each element as the first one."""
        charges = torch.zeros(self.n_elements, 2, self.after.shape[-1], dtype=torch.int64)
        charges[:, CATIONS] = bitset.singleton(0, self.after.shape[-1])
        return self.charges_after(torch.full((self.n_elements,), -1), charges, torch.arange(self.n_elements))

    def start_mask(self) -> Tensor:
        """Return (230,) bool, True where a composition can be completed from nothing."""
        zero = torch.zeros_like(self.capacity.start)
        alive = self.after[0, self.context(zero, zero, self.capacity.start), CATIONS]
        return (alive & bitset.singleton(0, alive.shape[-1])).ne(0).any(dim=-1)

    def alive(self, last: Tensor, context: Tensor, charges: Tensor) -> Tensor:
        """Return whether each state can be completed; ``charges`` is (..., 2, words), the result (...)."""
        # index_select copies whole rows, which indexing by two tensors does not.
        row = ((last + 1) * self.after.shape[1] + context).flatten()
        completable = self.after.flatten(0, 1).index_select(0, row).view(*context.shape, *self.after.shape[2:])
        return completable.bitwise_and_(charges).ne(0).flatten(-2).any(dim=-1)

    def next_element_mask(self, last: Tensor, context: Tensor, charges: Tensor) -> Tensor:
        """Return (n, n_elements + 1) bool: elements that may come next, then stop.

        Args:
            last: (n,) int64 position of the element chosen last, -1 = none.
            context: (n,) int64 from ``context``.
            charges: (n, 2, words) int64 latent charge sets.
        """
        table = self.take.index_select(0, context)
        cations, anions = charges[:, None, CATIONS], charges[:, None, ANIONS]
        position = torch.arange(self.n_elements, device=last.device)
        tied = self.tie_group == self._group(last)[:, None]
        as_anion = anions | torch.where(tied.unsqueeze(-1), 0, cations)
        from_cations = table[:, :, CATIONS].bitwise_and_(cations)
        legal = from_cations.bitwise_or_(table[:, :, ANIONS].bitwise_and_(as_anion)).ne(0).any(dim=-1)
        within = (position > last[:, None]) & (position <= self.next_required[last + 1][:, None])
        return torch.cat([legal & within, self.may_stop(last, context, charges)[:, None]], dim=1)

    def may_stop(self, last: Tensor, context: Tensor, charges: Tensor) -> Tensor:
        """Return (n,) bool, True where the composition is complete as it stands."""
        phase = ANIONS if self.rule.neutral else CATIONS
        neutral = (charges[:, phase, 0] & 1).bool()
        n_chosen = context // (self.n_budgets * self.capacity.n_states)
        enough = (n_chosen >= self.limits.n_elements[0]) & (n_chosen > 0)
        if self.n_budgets > 1:
            n_atoms = context // self.capacity.n_states % self.n_budgets
            enough &= n_atoms >= self.limits.n_atoms[0]
        return neutral & enough & (self.next_required[last + 1] == self.n_elements)

    def charges_after(self, last: Tensor, charges: Tensor, element: Tensor) -> Tensor:
        """Return (n, max_count + 1, 2, words): the latent charges after each count of ``element``.

        Rows of counts that the rule cannot charge are empty sets, as is column 0.
        """
        tied = self.tie_group[element] == self._group(last)
        anions = charges[:, ANIONS] | torch.where(tied[:, None], 0, charges[:, CATIONS])
        words = charges.shape[-1]
        out = charges.new_empty(len(last), self.max_count + 1, 2, words)
        for phase, source, options, move in (
            (CATIONS, charges[:, CATIONS], self.rule.positive, bitset.add),
            (ANIONS, anions, self.rule.negative, bitset.subtract),
        ):
            # Elements differ in how many states they have; in falling order, those that have one more come first.
            n_options = (options >= 0).sum(dim=-1).amax(dim=-1)
            order = n_options[element].argsort(descending=True)
            n_rows = torch.bincount(n_options[element], minlength=options.shape[-1] + 1).flip(0).cumsum(0).flip(0)
            amounts = torch.where(options < 0, words * bitset.WORD, options)  # beyond the range, where nothing is left
            moved = charges.new_zeros(len(last), self.max_count + 1, words)
            for option, n in enumerate(n_rows[1:].tolist()):
                rows = order[:n]
                moved[:n] |= move(source[rows, None], amounts[element[rows], :, option])
            out[order, :, phase] = moved
        out[:, 0] = 0
        return out

    def count_mask(
        self,
        element: Tensor,
        n_chosen: Tensor,
        n_atoms: Tensor,
        capacity_state: Tensor,
        charges_after: Tensor,
    ) -> Tensor:
        """Return (n, max_count + 1) bool: how many atoms of ``element`` leave a completable state."""
        after_capacity = self.capacity.next_state[capacity_state]
        count = torch.arange(self.max_count + 1, device=element.device)
        total = n_atoms[:, None] + count
        context = self.context((n_chosen + 1)[:, None], total, after_capacity)
        legal = self.alive(element[:, None].expand_as(context), context, charges_after)
        within = (total <= self.limits.n_atoms[1]) & (after_capacity != DEAD)
        return legal & within & self.limits.allowed_counts[element] & (count > 0)

    def _group(self, last: Tensor) -> Tensor:
        """Return (n,) tie group of the element chosen last, -1 where there is none."""
        return torch.where(last >= 0, self.tie_group[last.clamp(min=0)], -1)


def build_composition_table(
    elements: list[Element],
    limits: CompositionLimits,
    rule: ChargeRule,
    capacity: CapacityTable,
) -> CompositionTable:
    """Run the dynamic programme backwards over the building order.

    Args:
        elements: Allowed elements in building order.
        limits: What a composition must obey.
        rule: Charges of every (element, count).
        capacity: Automaton of the Wyckoff positions.
    """
    n_elements, max_chosen = len(elements), limits.n_elements[1]
    max_count = limits.allowed_counts.shape[1] - 1
    binds = limits.n_atoms[1] < max_chosen * max_count or limits.n_atoms[0] > limits.n_elements[0]
    n_budgets = limits.n_atoms[1] + 1 if binds else 1
    words = bitset.n_words(rule.capacity)
    shape = (max_chosen + 1, n_budgets, capacity.n_states, 2, words)
    after = torch.zeros(n_elements + 1, *shape, dtype=torch.int64)
    take = torch.zeros(n_elements, *shape, dtype=torch.int64)
    group = _tie_groups(elements)
    next_required = _next_required(limits.required)
    complete = _complete(limits, rule, shape)
    # Union of ``take`` from each position up to the next required one: cation moves and anion moves apart.
    from_here = torch.zeros(n_elements + 1, *shape, dtype=torch.int64)
    for last in range(n_elements - 1, -2, -1):
        target = after[last + 1]
        if next_required[last + 1] == n_elements:
            target |= complete
        target |= from_here[last + 1]
        beyond = int((group <= group[last]).sum()) if last >= 0 else 0
        if not bool(limits.required[last + 1 : beyond].any()):
            # The first anion comes after the cations and beyond the elements tied with the last one.
            target[..., CATIONS, :] |= from_here[beyond][..., ANIONS, :]
        if last >= 0:
            _take_element(take[last], target, last, limits, rule, capacity, n_budgets)
            from_here[last] = take[last] if limits.required[last] else take[last] | from_here[last + 1]
    contexts = shape[0] * shape[1] * shape[2]
    return CompositionTable(
        atomic_numbers=torch.tensor([element.atomic_number for element in elements]),
        tie_group=group,
        limits=limits,
        rule=rule,
        capacity=capacity,
        after=after.reshape(n_elements + 1, contexts, 2, words),
        take=take.reshape(n_elements, contexts, 2, words).transpose(0, 1).contiguous(),
        next_required=next_required,
        n_budgets=n_budgets,
    )


def _tie_groups(elements: list[Element]) -> Tensor:
    values = sorted({element.electronegativity for element in elements})
    return torch.tensor([values.index(element.electronegativity) for element in elements])


def _next_required(required: Tensor) -> Tensor:
    n = len(required)
    out = torch.full((n + 1,), n)
    for last in range(n - 2, -2, -1):
        out[last + 1] = last + 1 if required[last + 1] else out[last + 2]
    return out


def _complete(limits: CompositionLimits, rule: ChargeRule, shape: tuple[int, ...]) -> Tensor:
    """Return the table of states that may stop as they are."""
    out = torch.zeros(shape, dtype=torch.int64)
    k_low, k_high = max(limits.n_elements[0], 1), limits.n_elements[1]
    b_low = limits.n_atoms[0] if shape[1] > 1 else 0
    out[k_low : k_high + 1, b_low:, :, ANIONS if rule.neutral else CATIONS, 0] = 1
    return out


def _take_element(
    out: Tensor,
    target: Tensor,
    element: int,
    limits: CompositionLimits,
    rule: ChargeRule,
    capacity: CapacityTable,
    n_budgets: int,
) -> None:
    """Fill ``out``: charges from which some count of ``element`` leads into ``target``."""
    for count in limits.allowed_counts[element].nonzero().flatten().tolist():
        if count == 0 or (n_budgets > 1 and count >= n_budgets):
            continue
        landing = capacity.next_state[:, count]
        shift = count if n_budgets > 1 else 0
        source = target[1:, shift:, landing.clamp(min=0)]
        source = torch.where((landing != DEAD)[:, None, None], source, 0)
        into = out[:-1, : source.shape[1]]
        for amount in rule.positive[element, count].tolist():
            if amount >= 0:
                into[..., CATIONS, :] |= bitset.subtract(source[..., CATIONS, :], torch.tensor(amount))
        for amount in rule.negative[element, count].tolist():
            if amount >= 0:
                into[..., ANIONS, :] |= bitset.add(source[..., ANIONS, :], torch.tensor(amount))
