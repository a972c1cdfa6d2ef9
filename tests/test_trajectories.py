"""The noise of a step: locked paths, the right marginals, strata, and independence of how a batch is cut."""

import dataclasses

import pytest
import torch
from scipy import stats
from toy_distillers import K, blocks, make_trainer, prompted

from modeling_mcd.forward_process_mdlm import mask_tokens, masked_at
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from trainers.batches import maskable_tokens
from trainers.diffusion_trainer import DiffusionTrainingArguments
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.output_folder import recipe_text, run_settings
from trainers.trajectories import spread_rows, step_noise


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


# --- Spread paths


PHI = (5**0.5 - 1) / 2


def test_spread_masks_have_the_law_of_a_token_and_of_pairs(networks, tmp_path):
    """Through the trainer's own noise and canvases: P(masked) = m; P(both) = max(m - d, 2m - 1, 0), d the distance of
    their ranks times phi, to the nearest integer. Prompt and padding have no rank. Binomial; false-alarm rate 1e-5."""
    trainer, rows = make_trainer("mcd", networks, tmp_path, locking="spread"), 4
    maskable = torch.ones(rows, 16, dtype=torch.bool)
    maskable[:, [0, 1, 6, 15]] = False
    ranked, x_0, masks = maskable[0].nonzero()[:, 0], torch.zeros(rows, 16, dtype=torch.long), []
    gammas = [torch.full((rows,), gamma, dtype=torch.float64) for gamma in (0.4, 0.7)]
    for step in range(700):
        trainer.state.global_step = step
        _, u = trainer.noise_of_batch(maskable)
        (_, m_t), (_, m_s) = trainer.process.coupled_pair(x_0, *gammas, u, maskable)
        assert (m_s <= m_t).all() and not (m_t & ~maskable).any()
        masks.append(torch.stack([m_t, m_s])[:, :, ranked])
    for m, masked in zip((0.6, 0.3), torch.cat(masks, dim=1), strict=True):
        for i in range(len(ranked)):
            assert stats.binomtest(int(masked[:, i].sum()), len(masked), m).pvalue > 1e-7
        for distance in (1, 2, 3, 5, 8):
            d = distance * PHI % 1
            d = min(d, 1 - d)
            both = masked[:, 0] & masked[:, distance]
            law = max(m - d, 2 * m - 1, 0)
            assert stats.binomtest(int(both.sum()), len(both), law).pvalue > 1e-7


@pytest.mark.parametrize(("fraction", "rows", "spread"), [(1.0, 16, 16), (0.5, 16, 8), (0.3, 16, 5), (0.1, 128, 13)])
def test_the_share_of_spread_rows_is_exact_and_known_by_place(fraction, rows, spread):
    chosen = spread_rows(range(rows), rows, fraction)
    assert chosen.sum() == spread
    parts = [spread_rows(range(i, i + 2), rows, fraction) for i in range(0, rows, 2)]
    assert torch.equal(torch.cat(parts), chosen)
    assert max(abs(int(part.sum()) - spread * 4 / rows) for part in chosen.split(4)) < 1  # evenly apart


@pytest.mark.parametrize("ranks", [1, 2])
def test_spread_noise_is_the_same_however_the_batch_is_cut(ranks, networks, tmp_path, monkeypatch):
    changes = {"locking": "spread", "spread_fraction": 0.5}
    maskable = maskable_tokens(prompted())
    whole = make_trainer("sdtt", networks, tmp_path, **changes).noise_of_batch(maskable, draws=2)
    plain = make_trainer("sdtt", networks, tmp_path).noise_of_batch(maskable, draws=2)
    same = (whole[1] == plain[1]).all(dim=1)
    assert same.tolist() == [True, False, True, False] and torch.equal(whole[1][~maskable], plain[1][~maskable])
    assert torch.equal(whole[0], plain[0]) and torch.equal(whole[2], plain[2])
    cut = {"per_device_train_batch_size": 2 // ranks, "gradient_accumulation_steps": 2}
    trainers = [make_trainer("sdtt", networks, tmp_path, **changes, **cut) for _ in range(ranks)]
    monkeypatch.setattr(DiffusionTrainingArguments, "world_size", ranks)
    places = iter(maskable.split(2 // ranks))
    parts = []
    for _ in range(2):
        for rank, trainer in enumerate(trainers):
            monkeypatch.setattr(DiffusionTrainingArguments, "process_index", rank)
            parts.append(trainer.noise_of_batch(next(places), draws=2))
    for part, values in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), values)


def test_micro_batches_of_spread_rows_have_the_loss_of_the_whole(networks, tmp_path):
    inputs, changes = {"input_ids": blocks()}, {"locking": "spread", "spread_fraction": 0.5}
    trainer = make_trainer("mcd", networks, tmp_path, **changes)
    whole = trainer.compute_loss(trainer.model, inputs).item()
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer("mcd", networks, tmp_path, **changes)
    parts = [trainer.compute_loss(trainer.model, {"input_ids": part}).item() for part in blocks().split(2)]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-12)


def test_uniform_noise_picks_its_tokens_apart_from_the_spread_u(networks, tmp_path):
    """Else the tokens of a canvas would tell where its noise is."""
    settings = {"per_device_train_batch_size": 4, "ema_decay": None, "save_strategy": "no", "seed": 11}
    arguments = MDLMTrainingArguments(output_dir=str(tmp_path), locking="spread", **settings)
    trainer, x_0, seen = MDLMTrainer(networks["uniform"][1], arguments), blocks(), []
    trainer.model.train()
    hook = trainer.model.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named["input_ids"]), with_kwargs=True
    )
    trainer.compute_loss(trainer.model, {"input_ids": x_0})
    hook.remove()
    times, u, pick = step_noise(11, 0, range(4), 4, x_0.shape[1], draws=3)[:3]
    gamma = 1 - 0.999 * (1e-3 + (1 - 1e-3) * times)
    spread = (u[:, :1] + torch.arange(x_0.shape[1]) * PHI) % 1
    assert torch.equal(seen[0], torch.where(spread > gamma[:, None], (pick * K).long(), x_0))


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_the_validation_loss_is_that_of_independent_noise(kind, networks, tmp_path):
    losses = []
    for locking in ("independent", "spread"):
        settings = {"per_device_eval_batch_size": 4, "report_to": "none", "disable_tqdm": True, "locking": locking}
        trainer = MDLMTrainer(networks[kind][1], MDLMTrainingArguments(output_dir=str(tmp_path), **settings))
        losses.append(trainer.evaluate([{"input_ids": row.tolist()} for row in blocks()])["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"locking": "interleaved"}, "not 'interleaved', which needs a number of steps and is for sampling only"),
        ({"locking": "golden"}, r"locking must be one of \('independent', 'spread'\), not 'golden'"),
        ({"spread_fraction": 0.5}, r"spread_fraction \(0.5\) is for locking 'spread', not for 'independent'"),
        ({"locking": "spread", "spread_fraction": 0.0}, r"spread_fraction must lie in \(0, 1\], not 0.0"),
        ({"locking": "spread", "spread_fraction": 0.05}, r"of a global batch of 8 rows is none of them"),
    ],
)
def test_lockings_that_training_cannot_have_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiffusionTrainingArguments(output_dir=str(tmp_path), **changes)


def test_the_locking_is_part_of_a_run_and_of_its_card(tmp_path):
    arguments = DiffusionTrainingArguments(output_dir=str(tmp_path), locking="spread")
    settings = run_settings(arguments)
    assert (settings["locking"], settings["spread_fraction"]) == ("spread", 1.0)
    assert "locking: spread\n" in recipe_text(arguments)
    assert dataclasses.replace(arguments).spread_fraction == 1.0
