"""Masked categorical choices and bounded continuous coordinates."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close

from policies.distributions import MaskedCategorical, TruncatedLogisticMixture
from policies.errors import DeadEndError, IntervalError
from tests.strategies import generators, masks, mixture_parameters, seeds

N_ACTIONS = 6
SOME_LEGAL = torch.tensor([[True, False, True, True, False, True], [False, False, False, True, True, True]])


def _logits(shape: tuple[int, ...], *, seed: int = 0, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=generator, dtype=torch.float64)


def _mixture(
    *, n: int = 3, seed: int = 0, low: float | Tensor = 0.0, high: float | Tensor = 1.0
) -> TruncatedLogisticMixture:
    """Return smooth mixtures of four components, whose quadrature is accurate."""
    generator = torch.Generator().manual_seed(seed)
    logits, loc, scale = torch.rand((3, n, 4), generator=generator, dtype=torch.float64)
    return TruncatedLogisticMixture(4 * logits, 2 * loc - 0.5, 0.03 + 0.3 * scale, low, high)


def _integral_of_density(mixture: TruncatedLogisticMixture, low: Tensor, high: Tensor) -> Tensor:
    """Return (n,) the integral of p from ``low`` to ``high`` by Gauss-Legendre on 40 panels of 24 nodes."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(24))
    panels = (torch.arange(40, dtype=torch.float64)[:, None] + 0.5 * (nodes + 1)).flatten() / 40
    x = low + (high - low) * panels[:, None]
    return (mixture.log_prob(x).exp() * weights.repeat(40)[:, None]).sum(dim=0) * (high - low) / 80


# --- masked categorical


@given(mask=masks(4, N_ACTIONS), seed=seeds)
def test_masked_actions_have_probability_zero_and_the_others_agree_with_torch(mask: Tensor, seed: int) -> None:
    logits = _logits((4, N_ACTIONS), seed=seed, spread=10.0)
    probs = MaskedCategorical(logits, mask).probs
    assert (probs[~mask] == 0).all()
    for row in range(4):
        reference = Categorical(logits=logits[row][mask[row]])
        assert_close(probs[row][mask[row]], reference.probs)
        assert_close(MaskedCategorical(logits, mask).entropy()[row], reference.entropy())


@given(mask=masks(3, N_ACTIONS), generator=generators())
def test_only_legal_actions_are_drawn_even_if_they_are_hopeless(mask: Tensor, generator: torch.Generator) -> None:
    logits = torch.where(mask, -1e4, 1e4)
    distribution = MaskedCategorical(logits, mask)
    for _ in range(20):
        action = distribution.sample_with(generator)
        assert mask.gather(-1, action[:, None]).all()
        assert distribution.log_prob(action).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_probabilities(dtype: torch.dtype) -> None:
    generator, n = torch.Generator().manual_seed(1), 200_000
    logits = _logits((1, N_ACTIONS)).to(dtype)
    distribution = MaskedCategorical(logits, SOME_LEGAL[:1]).expand((n,))
    counts = torch.bincount(distribution.sample_with(generator), minlength=N_ACTIONS).numpy()
    legal = SOME_LEGAL[0].numpy()
    expected = n * distribution.probs[0].double().numpy()[legal]
    assert counts[~legal].sum() == 0
    assert stats.chisquare(counts[legal], expected * counts.sum() / expected.sum()).pvalue > 1e-4


def test_a_generator_in_the_same_state_draws_the_same_actions() -> None:
    distribution = MaskedCategorical(_logits((500, 40)), torch.ones(500, 40, dtype=torch.bool))
    first, second = (distribution.sample_with(torch.Generator().manual_seed(3)) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


def test_a_masked_action_has_log_probability_minus_infinity() -> None:
    distribution = MaskedCategorical(_logits((2, N_ACTIONS)), SOME_LEGAL)
    assert (distribution.log_prob(torch.tensor([1, 0])) == -torch.inf).all()


def test_gradients_of_log_prob_and_entropy_are_finite_and_right() -> None:
    logits = _logits((2, N_ACTIONS)).requires_grad_()
    actions = torch.tensor([0, 4])
    assert torch.autograd.gradcheck(lambda x: MaskedCategorical(x, SOME_LEGAL).log_prob(actions), (logits,))
    assert torch.autograd.gradcheck(lambda x: MaskedCategorical(x, SOME_LEGAL).entropy(), (logits,))
    inside = SOME_LEGAL & torch.tensor([True, True, True, False, False, True])
    assert torch.autograd.gradcheck(lambda x: MaskedCategorical(x, SOME_LEGAL).restrict(inside)[1], (logits,))


def test_a_state_without_a_legal_action_is_a_dead_end() -> None:
    mask = SOME_LEGAL.clone()
    mask[1] = False
    with pytest.raises(DeadEndError, match=r"in 1 states, first rows \[1\]"):
        MaskedCategorical(_logits((2, N_ACTIONS)), mask)
    with pytest.raises(DeadEndError, match=r"first rows \[0\]"):
        MaskedCategorical(_logits((2, N_ACTIONS)), SOME_LEGAL).restrict(torch.arange(N_ACTIONS).expand(2, -1) == 4)


@given(mask=masks(3, N_ACTIONS), allowed=masks(3, N_ACTIONS), seed=seeds)
def test_restricting_is_exact_conditioning(mask: Tensor, allowed: Tensor, seed: int) -> None:
    both = mask & allowed
    if not both.any(dim=-1).all():
        with pytest.raises(DeadEndError):
            MaskedCategorical(_logits((3, N_ACTIONS)), mask).restrict(allowed)
        return
    distribution = MaskedCategorical(_logits((3, N_ACTIONS), seed=seed, spread=20.0), mask)
    conditional, log_mass = distribution.restrict(allowed)
    assert_close(log_mass.exp(), (distribution.probs * allowed).sum(dim=-1))
    assert (log_mass <= 0).all()
    assert (conditional.probs[~both] == 0).all()
    joint = conditional.logits + log_mass[:, None]
    assert_close(joint[both], distribution.logits[both])


def test_the_mass_of_a_condition_that_almost_never_holds_keeps_its_digits() -> None:
    logits, mask = torch.tensor([[0.0, -500.0, -501.0]]), torch.ones(1, 3, dtype=torch.bool)
    _, log_mass = MaskedCategorical(logits, mask).restrict(torch.tensor([[False, True, True]]))
    assert_close(log_mass, torch.tensor([-500.0 + math.log1p(math.exp(-1.0))]))


def test_mixing_with_the_uniform_distribution_is_exact_at_both_ends_and_between() -> None:
    distribution = MaskedCategorical(_logits((2, N_ACTIONS)), SOME_LEGAL)
    uniform = SOME_LEGAL / SOME_LEGAL.sum(dim=-1, keepdim=True)
    epsilon = torch.tensor([0.25, 1.0], dtype=torch.float64)
    expected = (1 - epsilon)[:, None] * distribution.probs + epsilon[:, None] * uniform
    assert_close(distribution.mixed_with_uniform(epsilon).probs, expected)
    assert_close(distribution.mixed_with_uniform(0.0).probs, distribution.probs)
    assert_close(distribution.mixed_with_uniform(0.25).logits.exp()[0], expected[0])


def test_tempering_scales_the_logits() -> None:
    logits = _logits((2, N_ACTIONS))
    temperature = torch.tensor([0.5, 3.0], dtype=torch.float64)
    tempered = MaskedCategorical(logits, SOME_LEGAL).tempered(temperature)
    assert_close(tempered.probs, MaskedCategorical(logits / temperature[:, None], SOME_LEGAL).probs)


def test_a_masked_categorical_is_a_torch_distribution() -> None:
    distribution = MaskedCategorical(_logits((2, N_ACTIONS)), SOME_LEGAL)
    assert isinstance(distribution, torch.distributions.Distribution)
    draws = distribution.sample((50,))
    assert draws.shape == (50, 2)
    assert SOME_LEGAL.expand(50, 2, N_ACTIONS).gather(-1, draws[..., None]).all()
    assert_close(distribution.log_prob(draws)[7], distribution.log_prob(draws[7]))


# --- truncated logistic mixture


@pytest.mark.parametrize("seed", range(3))
def test_the_density_integrates_to_one_on_any_interval(seed: int) -> None:
    low, high = torch.tensor([0.0, -2.0, 0.3], dtype=torch.float64), torch.tensor([1.0, 1.5, 0.4], dtype=torch.float64)
    mixture = _mixture(seed=seed, low=low, high=high)
    assert_close(_integral_of_density(mixture, low, high), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_restricted_masses_and_the_cdf_equal_quadrature(seed: int) -> None:
    mixture = _mixture(seed=seed)
    low, high = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64), torch.tensor([0.2, 1.0, 0.7], dtype=torch.float64)
    conditional, log_mass = mixture.restrict(low, high)
    mass = _integral_of_density(mixture, low, high)
    assert_close(log_mass.exp(), mass, rtol=0, atol=1e-9)
    assert_close(mixture.cdf(high) - mixture.cdf(low), mass, rtol=0, atol=1e-9)
    middle = 0.4 * low + 0.6 * high
    assert_close(conditional.cdf(middle), _integral_of_density(mixture, low, middle) / mass, rtol=0, atol=1e-9)


@given(parameters=mixture_parameters(3), data=st.data())
def test_log_prob_agrees_with_fifty_digit_arithmetic(
    parameters: tuple[Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    logits, loc, scale = parameters
    x = data.draw(st.floats(0.0, 1.0))
    value = TruncatedLogisticMixture(logits, loc, scale).log_prob(torch.tensor([x], dtype=torch.float64))
    with mpmath.workdps(50):
        weights = [mpmath.exp(float(logit)) for logit in logits[0]]
        density = mpmath.mpf(0)
        for weight, mu, width in zip(weights, loc[0].tolist(), scale[0].tolist(), strict=True):
            z, a, b = ((mpmath.mpf(end) - mu) / width for end in (x, 0.0, 1.0))
            # F'(x) / (F(1) - F(0)) without the sigmoids, which have no digits left far from the location
            shape = mpmath.exp(z) * (1 + mpmath.exp(a)) * (1 + mpmath.exp(b)) / (1 + mpmath.exp(z)) ** 2
            density += weight / sum(weights) * shape / (mpmath.exp(b) - mpmath.exp(a)) / width
        expected = float(mpmath.log(mpmath.mpf("0.999") * density + mpmath.mpf("0.001")))
    assert value.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(
    parameters=mixture_parameters(3), ends=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), u=st.floats(0.0, 1.0)
)
def test_restricting_divides_the_density_by_the_mass(
    parameters: tuple[Tensor, Tensor, Tensor], ends: tuple[float, float], u: float
) -> None:
    low, high = min(ends), max(ends) + 1e-9
    mixture = TruncatedLogisticMixture(*parameters, high=1.0 + 1e-9)
    conditional, log_mass = mixture.restrict(low, high)
    x = torch.tensor([low + u * (high - low)], dtype=torch.float64).clamp(low, high)
    assert log_mass.item() <= 0
    # a location 1e7 widths away leaves 1e-16 · 1e7 in the exponents
    assert_close(conditional.log_prob(x) + log_mass, mixture.log_prob(x), rtol=1e-6, atol=1e-6)


@given(parameters=mixture_parameters(3), generator=generators(), single=st.booleans())
def test_extreme_parameters_give_finite_numbers_and_gradients(
    parameters: tuple[Tensor, Tensor, Tensor], generator: torch.Generator, *, single: bool
) -> None:
    dtype = torch.float32 if single else torch.float64
    logits, loc, scale = (part.to(dtype).expand(20, -1).clone().requires_grad_() for part in parameters)
    mixture = TruncatedLogisticMixture(logits, loc, scale)
    conditional, log_mass = mixture.restrict(0.2, 0.3)
    x = conditional.sample_with(generator)
    assert ((x > 0.2) & (x < 0.3)).all()
    (mixture.log_prob(x).sum() + conditional.log_prob(x).sum() + log_mass.sum() + mixture.cdf(x).sum()).backward()
    for part in (mixture.log_prob(x), conditional.log_prob(x), log_mass, logits.grad, loc.grad, scale.grad):
        assert part.isfinite().all()


def test_single_precision_agrees_with_double_precision_on_the_unit_interval() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, loc, scale, x = torch.rand((4, 5000, 6), generator=generator, dtype=torch.float64)
    parameters = (8 * logits, 2 * loc - 0.5, 10 ** (-3 * scale))
    double = TruncatedLogisticMixture(*parameters).log_prob(x[:, 0])
    single = TruncatedLogisticMixture(*(part.float() for part in parameters)).log_prob(x[:, 0].float())
    # |z| reaches 1500 at scale 1e-3, so the exponents carry 1500 · 6e-8, and the rounded x another 3e-8 / 1e-3
    assert_close(single.double(), double, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_draws_pass_a_kolmogorov_smirnov_test(seed: int) -> None:
    n = 20_000
    mixture = _mixture(n=1, seed=seed).expand((n,))
    conditional, _ = mixture.restrict(0.15, 0.6)
    for distribution in (mixture, conditional):
        draws = distribution.sample_with(torch.Generator().manual_seed(seed))
        assert stats.kstest(distribution.cdf(draws).numpy(), "uniform").pvalue > 1e-4


def test_draws_from_a_far_tail_follow_the_conditional_density() -> None:
    part = torch.full((20_000, 1), 0.0, dtype=torch.float64)
    # the location is 40 widths outside, where F itself rounds to 1: the density falls as exp(-x / 0.05)
    mixture = TruncatedLogisticMixture(part, part - 2.0, part + 0.05, floor=1e-9)
    draws = mixture.sample_with(torch.Generator().manual_seed(0))
    exponential = stats.truncexpon(b=20.0, scale=0.05)
    assert stats.kstest(draws.numpy(), exponential.cdf).pvalue > 1e-4


def test_gradients_of_the_mixture_are_right() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, loc, scale = torch.rand((3, 4, 3), generator=generator, dtype=torch.float64)
    parameters = [part.requires_grad_() for part in (logits, loc, scale + 0.1)]
    x = torch.tensor([0.1, 0.5, 0.7, 0.99], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *p: TruncatedLogisticMixture(*p).log_prob(x), parameters)
    assert torch.autograd.gradcheck(lambda *p: TruncatedLogisticMixture(*p).cdf(x), parameters)
    assert torch.autograd.gradcheck(lambda *p: TruncatedLogisticMixture(*p).restrict(0.2, 0.9)[1], parameters)
    assert torch.autograd.gradcheck(
        lambda *p: TruncatedLogisticMixture(*p).restrict(0.05, 0.995)[0].log_prob(x), parameters
    )


def test_the_density_is_zero_outside_and_the_cdf_ends_at_zero_and_one() -> None:
    mixture = _mixture(low=-0.5, high=0.75)
    assert (mixture.log_prob(torch.tensor([-0.51, 0.76, 3.0], dtype=torch.float64)) == -torch.inf).all()
    assert (mixture.cdf(mixture.low) == 0).all()
    assert (mixture.cdf(mixture.high) == 1).all()


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5), (1.0, 2.0), (0.3, math.nextafter(0.3, 1.0))])
def test_a_condition_without_an_interior_is_refused(low: float, high: float) -> None:
    with pytest.raises(IntervalError, match="3 intervals hold no number between low and high, first row 0"):
        _mixture().restrict(low, high)


def test_the_uniform_floor_supports_every_point() -> None:
    logits = torch.zeros(1, 1)
    mixture = TruncatedLogisticMixture(logits, logits + 0.5, logits + 1e-4, floor=0.01)
    assert_close(mixture.log_prob(torch.tensor([0.9])).exp(), torch.tensor([0.01]))
    with pytest.raises(ValueError, match="floor must lie strictly between 0 and 1, got 0"):
        TruncatedLogisticMixture(logits, logits, logits + 1.0, floor=0.0)


def test_mixing_a_mixture_with_the_uniform_density() -> None:
    mixture, x = _mixture(low=0.0, high=2.0), torch.tensor([0.1, 0.5, 1.9], dtype=torch.float64)
    epsilon = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    expected = (1 - epsilon) * mixture.log_prob(x).exp() + epsilon / 2
    assert_close(mixture.mixed_with_uniform(epsilon).log_prob(x).exp(), expected)


def test_a_tempered_mixture_is_normalised_and_flatter() -> None:
    mixture = _mixture()
    tempered = mixture.tempered(3.0)
    ends = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert_close(_integral_of_density(tempered, *ends), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    assert (tempered.log_prob(x).amax(dim=0) < mixture.log_prob(x).amax(dim=0)).all()


def test_a_mixture_is_a_torch_distribution() -> None:
    mixture = _mixture()
    draws = mixture.sample((50,))
    assert draws.shape == (50, 3)
    assert mixture.support.check(draws).all()
    assert_close(mixture.log_prob(draws)[7], mixture.log_prob(draws[7]))
