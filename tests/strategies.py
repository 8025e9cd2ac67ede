"""Strategies of the property tests, shared by all packages."""

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)


def generators() -> st.SearchStrategy[torch.Generator]:
    """Draw a generator by its seed, so that a failing example prints it."""
    return seeds.map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def masks(draw: st.DrawFn, n: int, n_actions: int) -> torch.Tensor:
    """Draw a mask (n, n_actions) with at least one legal action in each row."""
    rows = draw(st.lists(st.integers(1, 2**n_actions - 1), min_size=n, max_size=n))  # the bits of a row, never none
    return (torch.tensor(rows)[:, None] >> torch.arange(n_actions)) & 1 == 1


@st.composite
def mixture_parameters(draw: st.DrawFn, n_components: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw logits, locations and scales, each (1, n_components) float64, of narrow, wide and far-away components."""

    def numbers(low: float, high: float) -> torch.Tensor:
        values = st.lists(st.floats(low, high), min_size=n_components, max_size=n_components)
        return torch.tensor([draw(values)], dtype=torch.float64)

    return numbers(-30.0, 30.0), numbers(-20.0, 20.0), 10.0 ** numbers(-6.0, 3.0)
