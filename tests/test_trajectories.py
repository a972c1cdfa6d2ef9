"""The noise of a step: locked paths, the right marginals, strata, and independence of how a batch is cut."""

import torch
from scipy import stats

from modeling_mcd.forward_process_mdlm import mask_tokens, masked_at
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from trainers.trajectories import step_noise


def test_rows_do_not_depend_on_how_the_global_batch_is_cut():
    times, u = step_noise(seed=3, step=7, rows=range(0, 8), global_rows=8, length=5)
    parts = [step_noise(seed=3, step=7, rows=range(i, i + 2), global_rows=8, length=5) for i in range(0, 8, 2)]
    assert torch.equal(torch.cat([t for t, _ in parts]), times)
    assert torch.equal(torch.cat([v for _, v in parts]), u)
    assert len(torch.unique(u)) == u.numel()


def test_every_time_stratum_is_hit_once():
    times, _ = step_noise(seed=0, step=11, rows=range(64), global_rows=64, length=1)
    assert sorted((times * 64).long().tolist()) == list(range(64))


def test_seed_and_step_change_all_noise():
    base = step_noise(1, 1, range(4), 4, 16)[1]
    for seed, step in ((2, 1), (1, 2)):
        assert not (step_noise(seed, step, range(4), 4, 16)[1] == base).any()


def test_u_is_uniform():
    """Kolmogorov-Smirnov over 256,000 scalars; false-alarm rate 1e-5."""
    u = torch.cat([step_noise(5, step, range(8), 8, 512)[1].flatten() for step in range(64)])
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-5


def test_times_of_a_row_are_uniform_over_steps():
    """A row is not tied to one stratum; Kolmogorov-Smirnov over 4,000 steps; false-alarm rate 1e-5."""
    times = torch.cat([step_noise(5, step, range(3, 4), 8, 1)[0] for step in range(4000)])
    assert stats.kstest(times.numpy(), "uniform").pvalue > 1e-5


def test_masked_fraction_is_one_minus_gamma_and_pairs_are_nested():
    """Binomial at each of 18 (schedule, t); false-alarm rate below 1e-5 together."""
    for schedule in (LogLinearSchedule(), CosineSchedule()):
        _, u = step_noise(9, 0, range(32), 32, 2000)
        earlier = None
        for t in torch.linspace(0.1, 0.9, 9, dtype=torch.float64):
            gamma = schedule.gamma(t.expand(32))
            masked = masked_at(gamma, u)
            test = stats.binomtest(int(masked.sum()), masked.numel(), 1 - gamma[0].item())
            assert test.pvalue > 5e-7
            assert earlier is None or (masked >= earlier).all(), "what is masked at s stays masked at t > s"
            earlier = masked


def test_mask_tokens_changes_the_masked_alone():
    x_0 = torch.arange(12).view(3, 4)
    masked = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    z = mask_tokens(x_0, masked, 99)
    assert (z[masked] == 99).all() and torch.equal(z[~masked], x_0[~masked])
