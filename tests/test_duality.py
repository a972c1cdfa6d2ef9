"""The Gaussian side of the duality: F_Y against high-precision values, and each statement of the papers as a test.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5.
"""

import math

import pytest
import torch
from scipy import stats

from modeling_mcd.forward_process_mdlm import masked_at
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from trainers.duality import (
    is_largest,
    latent,
    locking_cdf,
    locking_quantile,
    locking_scalar,
    log_locking_cdf,
    runner_up,
    uniform_alpha,
    uniform_ratio,
)


FALSE_ALARM = 1e-5
K = 7
SCHEDULES = [LogLinearSchedule(), CosineSchedule()]
TIMES = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)

# F_Y(y) by mpmath 1.3: quad of npdf(e) * ncdf(y + e) ** (K - 1) over quarter-unit pieces, 30 digits.
HIGH_PRECISION = {
    (2, -6.0): 1.10452484992927e-5,
    (2, 3.0): 0.983052573237655,
    (48, -6.0): 6.99995620723727e-15,
    (48, -2.0): 4.69702948532279e-5,
    (48, 3.0): 0.760250589090749,
    (48, 5.0): 0.993240135961592,
    (50258, -6.0): 7.60291903213601e-24,
    (50258, -2.0): 6.50965598763629e-10,
    (50258, 3.0): 0.117506558411474,
    (50258, 5.0): 0.770861878874808,
    (50258, 8.0): 0.999828182750048,
    (200000, -6.0): 2.81826315444998e-25,
    (200000, -2.0): 8.81454853212088e-11,
    (200000, 3.0): 0.0686646033114913,
    (200000, 5.0): 0.674907963730078,
    (200000, 8.0): 0.999546571140106,
}


@pytest.fixture(scope="module")
def draws():
    """Tokens [12000], their Gaussian noise [12000, K], and the scalars u = F_Y(Y)."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, K, (12_000,), generator=generator)
    eps = torch.randn(12_000, K, dtype=torch.float64, generator=generator)
    return x_0, eps, locking_scalar(x_0, eps)


# --- F_Y


@pytest.mark.parametrize("point", HIGH_PRECISION)
def test_cdf_and_quantile_equal_high_precision_values(point):
    (size, y), expected = point, HIGH_PRECISION[point]
    assert locking_cdf(torch.tensor(y), size).item() == pytest.approx(expected, rel=1e-10)
    assert locking_quantile(torch.tensor(expected, dtype=torch.float64), size).item() == pytest.approx(y, rel=1e-9)


def test_closed_forms():
    """K = 2: Y is a difference of two normals. K = 3, y = 0 and every other K: by symmetry each token wins as often."""
    y = torch.linspace(-40, 12, 200, dtype=torch.float64)
    torch.testing.assert_close(log_locking_cdf(y, 2), torch.special.log_ndtr(y / math.sqrt(2)), rtol=1e-11, atol=1e-14)
    for size in (2, 3, 48, 50_258, 200_000):
        assert locking_cdf(torch.zeros(1), size).item() == pytest.approx(1 / size, rel=1e-11)


@pytest.mark.parametrize("size", [2, 5, 48, 50_258, 200_000])
def test_quantile_inverts_the_cdf(size):
    probability = torch.cat([torch.logspace(-300, -1, 40, dtype=torch.float64), torch.linspace(0.1, 1 - 1e-6, 40)])
    ratio = locking_quantile(probability, size)
    assert (ratio.diff() > 0).all()
    torch.testing.assert_close(locking_cdf(ratio, size), probability, rtol=1e-9, atol=0)


def test_a_visible_probability_below_one_in_k_needs_a_negative_ratio():
    for size in (2, 48, 50_258):
        around = torch.tensor([0.5 / size, 0.999 / size, 1.001 / size, 0.999], dtype=torch.float64)
        assert (locking_quantile(around, size) > 0).tolist() == [False, False, True, True]
    assert locking_quantile(torch.ones(1), 48).item() == math.inf
    # MDLM's schedule ends at gamma = 1e-3: with 48 tokens its last part lies below 1/K, with 50,258 none of it does.
    end = LogLinearSchedule().gamma(torch.ones(1, dtype=torch.float64))
    assert locking_quantile(end, 48).item() < 0 < locking_quantile(end, 50_258).item()


def test_wrong_values_are_named():
    with pytest.raises(ValueError, match="vocab_size must be at least 2, not 1"):
        locking_cdf(torch.zeros(1), 1)
    for wrong in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"probabilities must lie in \(0, 1\], not"):
            locking_quantile(torch.tensor([wrong]), 5)


# --- Latent Shadows: the masked projection


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_lemma_3_1_projected_frequencies_equal_gamma(draws, schedule):
    x_0, eps, _ = draws
    for gamma in schedule.gamma(TIMES):
        visible = is_largest(latent(x_0, eps, locking_quantile(gamma, K)), x_0)
        assert stats.binomtest(int(visible.sum()), len(x_0), gamma.item()).pvalue > FALSE_ALARM / len(TIMES) / 2


def test_prop_3_2_the_path_is_a_function_of_the_token_and_its_noise(draws):
    """The latent at one time, and x_0, fix it at every other time: no noise enters on the way."""
    x_0, eps, _ = (part[:500] for part in draws)
    ratios = locking_quantile(LogLinearSchedule().gamma(TIMES), K)
    for ratio in ratios:
        angle = ratio.atan()
        clean = torch.nn.functional.one_hot(x_0, K)
        recovered = (latent(x_0, eps, ratio) - angle.sin() * clean) / angle.cos()
        for other in ratios:
            torch.testing.assert_close(latent(x_0, recovered, other), latent(x_0, eps, other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_thm_3_3_the_gaussian_path_and_the_scalar_path_are_one(draws, schedule):
    """Token by token, at every time, against the very function that the trainers mask with."""
    x_0, eps, u = draws
    for gamma in schedule.gamma(TIMES):
        hidden = ~is_largest(latent(x_0, eps, locking_quantile(gamma, K)), x_0)
        assert torch.equal(hidden, masked_at(gamma[None], u[None])[0])


def test_u_is_uniform(draws):
    assert stats.kstest(draws[2].numpy(), "uniform").pvalue > FALSE_ALARM


def test_u_is_uniform_for_a_vocabulary_of_fifty_thousand():
    generator = torch.Generator().manual_seed(3)
    u = [
        locking_scalar(torch.full((25,), 17), torch.randn(25, 50_258, dtype=torch.float64, generator=generator))
        for _ in range(24)
    ]
    assert stats.kstest(torch.cat(u).numpy(), "uniform").pvalue > FALSE_ALARM


# --- Duo: the argmax projection


def test_duos_operator_at_the_published_ends_of_its_curriculum():
    """alpha at log-SNR 4, 3.55, 1.85 and 1 for the GPT-2 vocabulary: values of the tables in Duo's code."""
    alpha = uniform_alpha(torch.tensor([4, 3.55, 1.85, 1.0]).double().div(2).exp(), 50_258)
    assert [round(value, 4) for value in alpha.tolist()] == [0.9987, 0.9455, 0.0493, 0.0062]
    torch.testing.assert_close(uniform_alpha(uniform_ratio(alpha, 50_258), 50_258), alpha, rtol=1e-9, atol=0)


def test_argmax_of_the_latent_is_uniform_state_diffusion(draws):
    """Chi-squared of the token that is shown against alpha [x_0] + (1 - alpha) / K."""
    x_0, eps, _ = draws
    for alpha in (0.1, 0.5, 0.9):
        shown = latent(x_0, eps, uniform_ratio(torch.tensor(alpha).double(), K)).argmax(-1)
        counts = torch.bincount((shown - x_0) % K, minlength=K).numpy()
        expected = [len(x_0) * (alpha * (j == 0) + (1 - alpha) / K) for j in range(K)]
        assert stats.chisquare(counts, expected).pvalue > FALSE_ALARM / 3


def test_the_argmax_path_is_x_0_and_then_one_other_token(draws):
    """Token by token: u and the runner-up, which is uniform over the others and independent of u, are the whole path."""
    x_0, eps, u = draws
    other = runner_up(x_0, eps)
    for alpha in torch.linspace(0.01, 0.99, 9, dtype=torch.float64):
        shown = latent(x_0, eps, uniform_ratio(alpha, K)).argmax(-1)
        assert torch.equal(shown, torch.where(u <= alpha + (1 - alpha) / K, x_0, other))
    table = torch.stack([torch.bincount((other - x_0)[part] % K, minlength=K)[1:] for part in (u < 0.3, u > 0.3)])
    assert stats.chisquare(table.sum(0).numpy()).pvalue > FALSE_ALARM
    assert stats.chi2_contingency(table.numpy()).pvalue > FALSE_ALARM
