"""Every option of the distillers against the way of the published code: full SUBS tables of both networks over all of V."""

import math

import pytest
import torch
from toy_distillers import MASK, K, blocks, log_probabilities, make_trainer, mask, noise, prompted

from modeling_mcd.forward_process_mdlm import other_tokens
from trainers.batches import maskable_tokens


def subs_tables(model, z, gamma, inputs, temperature=1.0):
    """[B, L, V] log-probabilities with -1e6 for log 0, and a point mass where z shows the token."""
    log_p = log_probabilities(model, z, gamma, inputs, temperature).clamp(min=-1e6)
    point = torch.full_like(log_p, -1e6).scatter(-1, z[..., None], 0.0)
    return torch.where((z == MASK)[..., None], log_p, point)


def divergence_of_tables(kind, log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_each_token = {
        "student_first": p * (log_p - log_q),
        "teacher_first": q * (log_q - log_p),
        "jensen_shannon": (p * (log_p - log_m) + q * (log_q - log_m)) / 2,
        "total_variation": (p - q).abs() / 2,
        "mse": (log_p - log_q) ** 2 / K,
    }
    return of_each_token[kind].sum(-1)


@pytest.mark.parametrize("inputs", [{"input_ids": blocks()}, prompted()], ids=["blocks", "prompted and padded"])
@pytest.mark.parametrize("kind", ["student_first", "teacher_first", "jensen_shannon"])
def test_every_option_of_mcd_equals_its_formula_on_whole_tables(kind, inputs, networks, tmp_path):
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    times, u = noise(5, 1)
    t = 1 - 0.75 * times
    gamma_t, gamma_s = 1 - 0.999 * t, 1 - 0.999 * (t - 0.25)
    z_t, z_s = mask(x_0, u, gamma_t, maskable), mask(x_0, u, gamma_s, maskable)
    m_t, m_s = (z_t == MASK) & maskable, (z_s == MASK) & maskable
    trainer = make_trainer("mcd", networks, tmp_path)
    p, q = subs_tables(trainer.model, z_t, gamma_t, inputs), subs_tables(trainer.teacher, z_s, gamma_s, inputs, 0.93)
    everywhere = divergence_of_tables(kind, p, q)
    revealed = {
        "cross_entropy": -p.gather(-1, x_0[..., None])[..., 0],
        "divergence": everywhere,
        "none": torch.zeros_like(everywhere),
    }
    for reveal, values in revealed.items():
        for reduction, tokens in (("all_tokens", maskable), ("masked_tokens", m_t)):
            options = {"divergence": kind, "reveal": reveal, "reduction": reduction}
            trainer = make_trainer("mcd", networks, tmp_path, **options)
            trainer.state.global_step = 5
            expected = (everywhere[m_s].sum() + values[m_t & ~m_s].sum()) / tokens.sum()
            assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("inputs", [{"input_ids": blocks()}, prompted()], ids=["blocks", "prompted and padded"])
@pytest.mark.parametrize(("steps", "grid"), [(1, "paper"), (3, "paper"), (2, "released"), (3, "released")])
def test_every_option_of_sdtt_equals_its_formula_on_whole_tables(steps, grid, inputs, networks, tmp_path):
    x_0, maskable, delta = inputs["input_ids"], maskable_tokens(inputs), 0.125
    times, u, second = noise(5)
    t = 1e-5 + (1 - 1e-5) * times
    gamma = lambda time: 1 - 0.999 * time.clamp(min=1e-5)  # noqa: E731
    z_t = mask(x_0, u, gamma(t), maskable)
    trainer = make_trainer("sdtt", networks, tmp_path)
    p = subs_tables(trainer.model, z_t, gamma(t), inputs)
    z, targets, stays = z_t.clone(), torch.zeros_like(p), 1 - gamma(t)
    for i in range(steps):
        a = 1 - i / max(steps - 1, 1)
        start = t - i * delta if grid == "paper" else a * t + (1 - t) * (t - steps * delta)
        q = subs_tables(trainer.teacher, z, gamma(start), inputs)
        masked = (z == MASK) & maskable
        targets[masked] = q[masked]
        stays = stays * (1 - gamma(start.clamp(min=1e-5) - delta)) / (1 - gamma(start))
        for place in (masked & (u <= 1 - stays[:, None])).nonzero().tolist():
            cumulative = q[tuple(place)].exp().cumsum(0)
            z[tuple(place)] = int((cumulative <= second[tuple(place)] * cumulative[-1]).sum())
    for kind in ("student_first", "teacher_first", "total_variation", "mse"):
        options = {"divergence": kind, "teacher_steps": steps, "time_grid": grid, "delta": delta / 2}
        trainer = make_trainer("sdtt", networks, tmp_path, **options)
        trainer.state.global_step = 5
        expected = divergence_of_tables(kind, p, targets)[(z_t == MASK) & maskable].mean().item()
        assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-8)


def test_dcd_teacher_first_is_its_formula_on_whole_tables(networks, tmp_path):
    trainer, inputs = make_trainer("dcd", networks, tmp_path, divergence="teacher_first"), prompted()
    loss = trainer.compute_loss(trainer.model, inputs).item()
    canvases, maskable = [], maskable_tokens(inputs)
    t, u, second = noise(0)
    for time in (t, (t - 0.125).clamp(min=0)):
        alpha = 1 - 0.999 * time
        other = other_tokens(inputs["input_ids"], second, K)
        noised = (u > (alpha + (1 - alpha) / K)[:, None]) & maskable
        canvases.append((torch.where(noised, other, inputs["input_ids"]), alpha, inputs))
    p, q = (log_probabilities(net, *at) for net, at in zip((trainer.model, trainer.teacher), canvases, strict=True))
    expected = divergence_of_tables("teacher_first", p, q)[maskable].mean().item()
    assert loss == pytest.approx(expected, rel=1e-8)


def test_the_teacher_first_hybrid_is_teacher_first_kl(networks, tmp_path):
    """The identity: KL(teacher || student) on whole SUBS tables over m_t, against the hybrid over m_s and what s reveals."""
    trainer, x_0 = make_trainer("mcd", networks, tmp_path, divergence="teacher_first"), blocks()
    times, u = noise(0, 1)
    t = 1 - 0.875 * times
    gammas = 1 - 0.999 * t, 1 - 0.999 * (t - 0.125)
    z_t, z_s = (mask(x_0, u, gamma, torch.ones_like(x_0, dtype=torch.bool)) for gamma in gammas)
    p, q = subs_tables(trainer.model, z_t, gammas[0], {}), subs_tables(trainer.teacher, z_s, gammas[1], {}, 0.96)
    over_everything_masked = divergence_of_tables("teacher_first", p, q)[z_t == MASK].sum() / x_0.numel()
    hybrid = trainer.compute_loss(trainer.model, {"input_ids": x_0})
    assert hybrid.item() == pytest.approx(over_everything_masked.item(), rel=1e-6)
