"""Every distiller's loss against its paper's formula written out token by token in float64, and its coupling."""

import math

import pytest
import torch
from scipy import stats
from tiny_run import BLOCK
from toy_distillers import MASK, METHODS, ROWS, K, blocks, log_probabilities, make_trainer, mask, noise, prompted

from modeling_mcd.forward_process_mdlm import UniformProcess, other_tokens
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.locking_mdlm import locked_uniforms
from modeling_mcd.noise_schedule_mdlm import LogLinearSchedule
from trainers.batches import maskable_tokens
from trainers.divergences import divergence_from_token
from trainers.dscd_trainer import short_answers
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.sdtt_trainer import SDTTTrainer, SDTTTrainingArguments, reveal_thresholds, step_starts
from trainers.trajectories import most_masked


def kl(log_p, log_q):
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p.tolist(), log_q.tolist(), strict=True) if a > -math.inf)


def jsd(p, q):
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) if a else 0) / 2 + (b * math.log(b / m) if b else 0) / 2
    return total


def sites(z, maskable):
    return [(b, i) for b in range(ROWS) for i in range(BLOCK) if maskable[b, i] and z[b, i] == MASK]


# --- Losses by hand


def mcd_by_hand(trainer, inputs, step):
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    delta, tau = 0.125 * 2 ** (step // 4), [0.96, 0.93][step // 4]
    times, u = noise(step, 1)
    t = 1 - (1 - delta) * times
    gamma_t, gamma_s = 1 - 0.999 * t, 1 - 0.999 * (t - delta)
    z_t, z_s = mask(x_0, u, gamma_t, maskable), mask(x_0, u, gamma_s, maskable)
    p = log_probabilities(trainer.model, z_t, gamma_t, inputs)
    q = log_probabilities(trainer.teacher, z_s, gamma_s, inputs, tau)
    total, counted = 0.0, sites(z_t, maskable)
    for b, i in counted:
        first, second = (p, q) if trainer.args.divergence == "student_first" else (q, p)
        total += kl(first[b, i], second[b, i]) if z_s[b, i] == MASK else -p[b, i, x_0[b, i]].item()
    return total / (len(counted) if trainer.args.reduction == "masked_tokens" else maskable.sum().item())


def sdtt_by_hand(trainer, inputs, step):
    """The teacher's canvas, token by token: what is revealed, what is drawn, and the distribution that becomes the target."""
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    delta = 0.125 * 2 ** (step // 4)
    times, u, second = noise(step)
    t = 1e-5 + (1 - 1e-5) * times
    gamma = lambda time: 1 - 0.999 * time.clamp(min=1e-5)  # noqa: E731
    z_t = mask(x_0, u, gamma(t), maskable)
    z, targets = z_t.clone(), {}
    for i in range(trainer.args.teacher_steps):
        now, after = gamma(t - i * delta), gamma(t - (i + 1) * delta)
        q = log_probabilities(trainer.teacher, z, now, inputs)
        for place in sites(z, maskable):
            targets[place] = q[place]
            if u[place] <= after[place[0]]:
                cumulative = q[place].exp().cumsum(0)
                z[place] = int((cumulative <= second[place] * cumulative[-1]).sum())
    p = log_probabilities(trainer.model, z_t, gamma(t), inputs)
    return sum(kl(p[b, i], target) for (b, i), target in targets.items()) / len(targets)


def dcd_by_hand(trainer, inputs, step):
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    t, u, second = noise(step)
    alpha_t = 1 - 0.999 * t
    alpha_s = 1 - 0.999 * (t - 0.125 * 2 ** (step // 4)).clamp(min=0)

    def canvas(alpha):
        z = x_0.clone()
        for b, i in maskable.nonzero().tolist():
            if u[b, i] > alpha[b] + (1 - alpha[b]) / K:
                others = [token for token in range(K) if token != x_0[b, i]]
                z[b, i] = others[int(second[b, i] * (K - 1))]
        return z

    p = log_probabilities(trainer.model, canvas(alpha_t), alpha_t, inputs)
    q = log_probabilities(trainer.teacher, canvas(alpha_s), alpha_s, inputs)
    return sum(kl(p[b, i], q[b, i]) for b, i in maskable.nonzero().tolist()) / maskable.sum().item()


def dscd_by_hand(trainer, inputs, step):
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    times, u, second = noise(step)
    z, z_teacher, gamma, gamma_teacher = x_0.clone(), x_0.clone(), [], []
    for b in range(ROWS):
        r = 0.4 + 0.5 * times[b].item()
        r_teacher = min(max(r * (0.3 + 0.4 * second[b, 0].item()), 0.1), 0.6, r)
        places = sorted((i for i in range(BLOCK) if maskable[b, i]), key=lambda i, b=b: -u[b, i].item())
        if "labels" in inputs and len(places) < 20:
            r, r_teacher = min(r, 0.5), min(r_teacher, 0.5, r)
        z[b, places[: round(r * len(places))]] = MASK
        z_teacher[b, places[: round(r_teacher * len(places))]] = MASK
        gamma.append(1 - r), gamma_teacher.append(1 - r_teacher)
    gamma, gamma_teacher = torch.tensor(gamma).double(), torch.tensor(gamma_teacher).double()
    p, p_2 = (log_probabilities(trainer.model, z, gamma, inputs, temperature) for temperature in (1.0, 2.0))
    q_2 = log_probabilities(trainer.teacher, z_teacher, gamma_teacher, inputs, 2.0)
    agree = reconstruct = 0.0
    for b, i in sites(z, maskable):
        point = -p_2[b, i, x_0[b, i]].item()
        agree += kl(q_2[b, i], p_2[b, i]) if z_teacher[b, i] == MASK else point
        reconstruct -= p[b, i, x_0[b, i]].item()
    falling = max(0.0, step / 8 - 0.1) / 0.9
    weight = 0.5 + 0.4 * (1 + math.cos(math.pi * falling)) / 2
    return (weight * 4 * agree + (1 - weight) * reconstruct) / len(sites(z, maskable))


def mpdc_by_hand(trainer, inputs, step):
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    delta = 0.25 + (1 / 64 - 0.25) * step / 7
    times, u, second = noise(step)
    anchored = second[:, 0] < 0.35
    t = torch.where(anchored, 1 - 0.999 * times, 1 - (1 - delta) * times)
    s = torch.where(anchored, 0.0, t - delta)
    gamma_t, gamma_s = 1 - 0.999 * t, 1 - 0.999 * s
    z_t, z_s = mask(x_0, u, gamma_t, maskable), mask(x_0, u, gamma_s, maskable)
    p, q = (log_probabilities(trainer.model, z, g, inputs) for z, g in ((z_t, gamma_t), (z_s, gamma_s)))
    assert anchored.any() and not anchored.all()
    total = 0.0
    for b, i in sites(z_t, maskable):
        if anchored[b]:
            total -= p[b, i, x_0[b, i]].item() / t[b].item()
        elif z_s[b, i] == MASK:
            total += jsd(p[b, i].exp(), q[b, i].exp())
        else:
            total += jsd(p[b, i].exp(), torch.nn.functional.one_hot(x_0[b, i], K))
    return total / maskable.sum().item()


def forward_algorithm(start, transition, evidence):
    state, total = None, 0.0
    for said in evidence:
        state = (start if state is None else state @ transition) * said
        total, state = total + state.sum().log().item(), state / state.sum()
    return total


def coupling_by_hand(trainer, inputs, step):
    """Row by row and position by position: what is revealed, what is summed out, and what is seen."""
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    present = inputs.get("attention_mask", torch.ones_like(x_0)).bool()
    times, u, _ = noise(step)
    total = 0.0
    for b in range(ROWS):
        n = (1, 2, 4)[int(3 * times[b])]
        k = int(3 * times[b] % 1 * n)
        plan = (locked_uniforms("spread", u[b : b + 1], maskable[b : b + 1], n)[0] * n).long()
        masked, revealed = maskable[b] & (plan >= k), maskable[b] & (plan == k)
        gamma = torch.tensor([1 - 0.999 * (1 - k / n)], dtype=torch.float64)
        row = {name: value[b : b + 1] for name, value in inputs.items()}
        log_p = log_probabilities(trainer.model, x_0[b : b + 1].masked_fill(masked, MASK), gamma, row)[0]
        weights = trainer.model.coupling.start, trainer.model.coupling.transition, trainer.model.coupling.emission
        level, powers = int(4 * gamma), trainer.model.coupling.powers
        if powers is None:
            start, transition, emission = (weight[level].detach() for weight in weights)
        else:
            start, transition, emission = (weights[i][0].detach() * powers[level, i].item() for i in range(3))
        told = emission.softmax(dim=0)  # of the state [S], by each token
        known, joint = [], []
        for i in present[b].nonzero()[:, 0].tolist():
            seen, summed_out = told[:, x_0[b, i]], told @ log_p[i].exp()
            known.append(summed_out if masked[i] else seen)
            joint.append(summed_out if masked[i] and not revealed[i] else seen)
        if revealed.any():
            nats = -log_p[revealed].gather(1, x_0[b, revealed][:, None]).sum().item()
            sums = [forward_algorithm(start.exp(), transition.exp(), evidence) for evidence in (known, joint)]
            total += n * (nats + sums[0] - sums[1])
    return total / maskable.sum().item()


BY_HAND = {"mcd": mcd_by_hand, "sdtt": sdtt_by_hand, "dcd": dcd_by_hand, "dscd": dscd_by_hand, "mpdc": mpdc_by_hand}
BY_HAND["coupling"] = coupling_by_hand


@pytest.mark.parametrize("data", ["blocks", "prompted and padded"])
@pytest.mark.parametrize("step", [0, 6])
@pytest.mark.parametrize(("method", "changes"), [*((name, {}) for name in METHODS), ("coupling", {"shared": False})])
def test_loss_equals_the_formula_by_hand(method, changes, step, data, networks, tmp_path):
    trainer = make_trainer(method, networks, tmp_path, **changes)
    trainer.state.global_step = step
    inputs = {"input_ids": blocks()} if data == "blocks" else prompted()
    loss = trainer.compute_loss(trainer.model, inputs)
    assert loss.item() == pytest.approx(BY_HAND[method](trainer, inputs, step), rel=1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "coupling"])  # whose plans are the sampler's
def test_loss_equals_the_formula_by_hand_on_spread_paths(method, networks, tmp_path, monkeypatch):
    """Every second row's u is frac(rho + i phi), i counting the tokens after the prompt; all else is the paper's."""
    trainer = make_trainer(method, networks, tmp_path, locking="spread", spread_fraction=0.5)
    inputs = prompted()
    maskable, plain = maskable_tokens(inputs), noise

    def spread_noise(step, draws=2):
        times, u, *more = plain(step, draws)
        for b in (1, 3):
            places = maskable[b].nonzero()[:, 0].tolist()
            rho = u[b, places[0]].item()
            for i, place in enumerate(places):
                u[b, place] = (rho + i * (5**0.5 - 1) / 2) % 1
        return times, u, *more

    loss = trainer.compute_loss(trainer.model, inputs).item()
    unspread = BY_HAND[method](trainer, inputs, 0)
    monkeypatch.setitem(globals(), "noise", spread_noise)
    assert loss == pytest.approx(BY_HAND[method](trainer, inputs, 0), rel=1e-9)
    assert loss != pytest.approx(unspread, rel=1e-6)


@pytest.mark.parametrize("reduction", ["all_tokens", "masked_tokens"])
@pytest.mark.parametrize("direction", ["student_first", "teacher_first"])
def test_mcd_of_every_direction_and_reduction(direction, reduction, networks, tmp_path):
    trainer = make_trainer("mcd", networks, tmp_path, divergence=direction, reduction=reduction)
    trainer.state.global_step = 6
    loss = trainer.compute_loss(trainer.model, prompted())
    assert loss.item() == pytest.approx(mcd_by_hand(trainer, prompted(), 6), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_prompt_and_padding_carry_no_gradient_and_padding_is_not_seen(method, networks, tmp_path):
    trainer, inputs = make_trainer(method, networks, tmp_path), prompted()
    loss = trainer.compute_loss(trainer.model, inputs)
    trained = trainer.model.coupling.emission if method == "coupling" else trainer.model.lm_head.bias
    gradient = torch.autograd.grad(loss, trained)[0]
    assert gradient.abs().sum() > 0
    changed = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 3)}
    trainer.reset_noise()
    assert trainer.compute_loss(trainer.model, changed).item() == loss.item()
    everything_given = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    trainer.reset_noise()
    nothing = trainer.compute_loss(trainer.model, everything_given)
    nothing.backward()
    assert nothing.item() == 0
    assert all((p.grad == 0).all() for p in trainer.model.parameters() if p.grad is not None)
    trainer.model.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_gets_no_gradient_and_every_student_parameter_one(method, networks, tmp_path):
    trainer = make_trainer(method, networks, tmp_path)
    trainer.compute_loss(trainer.model, {"input_ids": blocks()}).backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in trainer.model.parameters())
    if trainer.has_teacher:
        assert all(parameter.grad is None for parameter in trainer.teacher.parameters())
    trainer.model.zero_grad()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dcd"])
def test_given_masks_are_never_noised_nor_scored(networks, tmp_path, method):
    """A text that holds the mask's id: one such token would cost 1e6, the log-probability that SUBS gives it."""
    trainer, x_0, seen = make_trainer(method, networks, tmp_path), blocks(), []
    x_0[:, ::5] = MASK
    compute_rows = trainer.compute_rows

    def watched(network, positions, *rest):
        seen.append(positions)
        return compute_rows(network, positions, *rest)

    trainer.compute_rows = watched
    assert trainer.compute_loss(trainer.model, {"input_ids": x_0}) < 50
    assert any(positions.any() for positions in seen) and not any(positions[:, ::5].any() for positions in seen)


def test_given_masks_cost_the_nelbo_nothing(networks, tmp_path):
    arguments = MDLMTrainingArguments(output_dir=str(tmp_path), ema_decay=None, save_strategy="no")
    trainer, x_0 = MDLMTrainer(networks["absorbing"][1], arguments), blocks()
    x_0[:, ::5] = MASK
    assert 1 < trainer.compute_loss(trainer.model, {"input_ids": x_0}) < 50


# --- SDTT


def test_sdtt_teacher_reveals_and_draws_by_its_laws(networks, tmp_path):
    """With zero weights in the head every target is softmax(bias). What is drawn is tested by chi-squared, how often by
    a binomial test.
    """
    trainer = make_trainer("sdtt", networks, tmp_path, delta=0.2, num_rounds=1)
    teacher = trainer.teacher
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
        teacher.lm_head.bias.copy_(torch.linspace(0, 3, K))
    seen, canvases = [], []
    trainer.compute_rows = lambda network, positions, z, gamma, inputs: (
        canvases.append(z),
        type(trainer).compute_rows(trainer, network, positions, z, gamma, inputs),
    )[1]
    for step in range(60):
        _, u, second = noise(step)
        t = torch.full((ROWS,), 0.8, dtype=torch.float64)
        gamma_t = trainer.schedule.gamma(t)
        m_t = u > gamma_t[:, None]
        z_t = torch.where(m_t, MASK, blocks())
        trainer.teacher_targets(z_t, m_t, t, gamma_t, 0.2, u, second, {})
        drawn = m_t & (canvases[-1] != MASK)
        seen.append((int(m_t.sum()), canvases[-1][drawn]))
    total, tokens = sum(count for count, _ in seen), torch.cat([drawn for _, drawn in seen])
    assert stats.binomtest(len(tokens), total, 0.2 / 0.8).pvalue > 1e-5
    law = torch.linspace(0, 3, K, dtype=torch.float64)[:-1].softmax(0)
    counts = torch.bincount(tokens, minlength=K)[:-1].numpy()
    assert stats.chisquare(counts, (law * len(tokens)).numpy()).pvalue > 1e-5


def test_sdtt_grids():
    """On the paper's grid, which has no gaps, the thresholds are gamma itself. The released grid has the published values."""
    t, schedule = torch.tensor([0.5, 0.9, 1e-4], dtype=torch.float64), LogLinearSchedule()
    starts = step_starts(t, 0.001, 3, "paper")
    thresholds = reveal_thresholds(starts, 0.001, 1e-5, schedule, schedule.gamma(t))
    for i, threshold in enumerate(thresholds):
        expected = schedule.gamma((t - (i + 1) * 0.001).clamp(min=1e-5))
        torch.testing.assert_close(threshold, expected, rtol=1e-12, atol=0)
    released = torch.stack(step_starts(t[:2], 1 / 1024, 2, "released"))
    torch.testing.assert_close(released, torch.tensor([[0.749, 0.99], [0.249, 0.09]]).double(), atol=6e-4, rtol=0)
    first, second = reveal_thresholds(list(released), 1 / 1024, 1e-5, schedule, schedule.gamma(t[:2]))
    revealed = (first - schedule.gamma(t[:2])) / (1 - schedule.gamma(t[:2]))
    torch.testing.assert_close(revealed, 1 / 1024 / released[0], rtol=1e-9, atol=0)
    assert (second > first).all()


def test_sdtt_with_one_teacher_step_is_plain_distillation(networks, tmp_path):
    """With k = 1 nothing is drawn and both networks see the same canvas: for equal networks the loss is zero."""
    teacher, _ = networks["absorbing"]
    arguments = SDTTTrainingArguments(output_dir=str(tmp_path), teacher_steps=1, ema_decay=None, save_strategy="no")
    trainer = SDTTTrainer(type(teacher)(teacher.config).double(), arguments, teacher=teacher)
    trainer.model.load_state_dict(teacher.state_dict())
    trainer.model.train()
    assert abs(trainer.compute_loss(trainer.model, {"input_ids": blocks()}).item()) < 1e-12


def test_mpdc_is_its_own_target_without_dropout(networks, tmp_path):
    trainer, x_0 = make_trainer("mpdc", networks, tmp_path), blocks()
    with torch.no_grad():
        for layer in trainer.model.model.layers:
            layer.dropout.p = 0.5
        canvas = torch.ones_like(x_0, dtype=torch.bool), x_0, torch.ones(ROWS), {}
        first, second = (trainer.compute_own_rows(trainer.model, *canvas).hidden for _ in range(2))
        student = trainer.compute_rows(trainer.model, *canvas).hidden
        for layer in trainer.model.model.layers:
            layer.dropout.p = 0.0
    assert torch.equal(first, second) and not torch.equal(first, student) and trainer.model.training


@pytest.mark.parametrize("kind", ["absorbing", "uniform"])
def test_the_nelbo_knows_prompts_and_padding_too(kind, networks, tmp_path):
    """A row in a padded batch costs what it costs alone, and a prompt costs nothing."""
    arguments = MDLMTrainingArguments(output_dir=str(tmp_path), ema_decay=None, save_strategy="no")
    trainer = MDLMTrainer(networks[kind][0], arguments)
    times, u = noise(0, 1)

    def loss_of(inputs, rows=slice(None)):
        length = inputs["input_ids"].shape[1]
        trainer.noise_of_batch = lambda maskable, draws: (times[rows], u[rows, :length])
        return trainer.compute_loss(trainer.model, inputs).item()

    together, total = prompted(), 0.0
    maskable = maskable_tokens(together)
    for row in range(ROWS):
        here = slice(row, row + 1), slice(int(together["attention_mask"][row].sum()))
        alone = {name: together[name][here] for name in ("input_ids", "labels")}
        total += loss_of(alone, here[0]) * maskable[here].sum().item()
    assert loss_of(together) == pytest.approx(total / maskable.sum().item(), rel=1e-9)
    assert loss_of(together | {"labels": torch.full_like(maskable, -100, dtype=torch.long)}) == 0


# --- Couplings


@pytest.mark.parametrize("method", [*METHODS, "mdlm"])
def test_the_loss_by_sequence_is_the_mean_of_the_rows_losses(method, networks, tmp_path):
    """A row's loss is that of the batch in which every other row is all prompt: its noise is keyed by its place."""
    losses = {}
    for norm in ("tokens", "sequence"):
        if method == "mdlm":
            arguments = MDLMTrainingArguments(output_dir=str(tmp_path), ema_decay=None, loss_norm=norm, seed=3)
            trainer = MDLMTrainer(networks["absorbing"][1], arguments)
            trainer.model.train()
        else:
            trainer = make_trainer(method, networks, tmp_path, loss_norm=norm)
        inputs, only = prompted(), torch.eye(ROWS, dtype=torch.bool)
        batches = [inputs | {"labels": inputs["labels"].masked_fill(~row[:, None], -100)} for row in only]
        losses[norm] = []
        for batch in [inputs, *batches]:
            trainer.reset_noise()
            losses[norm].append(trainer.compute_loss(trainer.model, batch).item())
    assert losses["sequence"][0] == pytest.approx(sum(losses["tokens"][1:]) / ROWS, rel=1e-9)
    assert losses["sequence"][0] != pytest.approx(losses["tokens"][0], rel=1e-6)
    assert losses["sequence"][1:] == pytest.approx(losses["tokens"][1:], rel=1e-9)


def test_dscd_masks_of_short_answers_are_those_of_the_released_code():
    """`(student's masks, teacher's)` of an answer of n tokens at r_s = 0.9, r_t = 0.6, by its rules one by one."""
    length = torch.tensor([0, 1, 2, 8, 10, 11, 19, 20, 40])
    ratio, teacher_ratio, least = short_answers(torch.full((9,), 0.9), torch.full((9,), 0.6), length)
    counts = (ratio * length).round().clamp(min=least).long().tolist()
    teacher_counts = (teacher_ratio * length).round().long().tolist()
    assert counts == [0, 1, 2, 2, 2, round(5.5), round(9.5), 18, 36]
    assert teacher_counts == [0, 1, 1, 1, 1, round(5.5), round(9.5), 12, 24]
    few, _, least = short_answers(torch.full((9,), 0.05), torch.full((9,), 0.05), length)
    assert (few * length).round().clamp(min=least).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 4]


def test_dscd_masks_are_nested_and_of_the_right_size():
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(200, 40, dtype=torch.float64, generator=generator)
    maskable = torch.rand(200, 40, generator=generator) < 0.7
    counts = (maskable.sum(1) * 0.6).round()
    student, teacher = most_masked(u, maskable, counts), most_masked(u, maskable, (counts / 2).round())
    assert torch.equal(student.sum(1), counts.long()) and torch.equal(teacher.sum(1), (counts / 2).round().long())
    assert (teacher <= student).all() and (student <= maskable).all()
    # Each place is as likely as every other: chi-squared over the 40 places, all of them maskable.
    chosen = most_masked(u, torch.ones_like(maskable), torch.full((200,), 10)).sum(0)
    assert stats.chisquare(chosen.numpy()).pvalue > 1e-5


def test_dcd_pairs_are_locked_and_each_canvas_has_its_marginal():
    """A place that shows x_0 at t shows it at s < t. A place that is noised at both shows the same other token. Each
    canvas has the law alpha [x_0] + (1 - alpha) / K.
    """
    size = 5
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, size, (400, 100), generator=generator)
    u, second = torch.rand(2, 400, 100, dtype=torch.float64, generator=generator)
    other = other_tokens(x_0, second, size)
    assert (other != x_0).all()
    canvases, everywhere = {}, torch.ones_like(x_0, dtype=torch.bool)
    alphas = [torch.full((400,), alpha, dtype=torch.float64) for alpha in (0.2, 0.6)]
    pair = UniformProcess(LogLinearSchedule(), size).coupled_pair(x_0, *alphas, u, everywhere, second)
    for alpha, (z, _) in zip((0.2, 0.6), pair, strict=True):
        counts = torch.bincount(((z - x_0) % size).flatten(), minlength=size).numpy()
        expected = [x_0.numel() * (alpha * (j == 0) + (1 - alpha) / size) for j in range(size)]
        assert stats.chisquare(counts, expected).pvalue > 1e-5
        canvases[alpha] = z
    t_clean, s_clean = canvases[0.2] == x_0, canvases[0.6] == x_0
    assert (t_clean <= s_clean).all()
    assert torch.equal(canvases[0.2][~s_clean], canvases[0.6][~s_clean])


def test_dcd_signal_follows_duos_log_snr_or_the_models_schedule(networks, tmp_path):
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    trainer = make_trainer("dcd", networks, tmp_path)
    torch.testing.assert_close(trainer.alpha(t), 1 - 0.999 * t)
    trainer = make_trainer("dcd", networks, tmp_path, log_snr=[4.0, 1.0])
    trainer.model.config.vocab_size = 50_258
    assert [round(alpha, 4) for alpha in trainer.alpha(t)[::2].tolist()] == [0.9987, 0.0062]
    trainer.model.config.vocab_size = K


# --- The teacher that sees the token


def point_mass_rows(generator):
    hidden = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    weight, bias = torch.randn(9, 5, dtype=torch.float64, generator=generator), torch.zeros(9).double()
    return HeadRows(hidden, weight, bias, 8), torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("kind", ["student_first", "teacher_first", "jensen_shannon", "total_variation"])
def test_divergence_from_a_token_is_the_divergence_from_subs_point_mass(kind):
    student, tokens = point_mass_rows(torch.Generator().manual_seed(5))
    values = divergence_from_token(kind, student, tokens)
    for row, token, value in zip(student.log_probabilities().exp().tolist(), tokens.tolist(), values, strict=True):
        row = [p if p > 1e-300 else 0.0 for p in row]
        expected = {
            "teacher_first": -math.log(row[token]),
            "student_first": sum(p * (math.log(p) - (0 if j == token else -1e6)) for j, p in enumerate(row) if p > 0),
            "jensen_shannon": jsd(torch.tensor(row, dtype=torch.float64), torch.eye(9).double()[token]),
            "total_variation": 1 - row[token],
        }[kind]
        assert value.item() == pytest.approx(expected, rel=1e-10)


def test_student_first_kl_explodes_where_the_hybrid_does_not(networks, tmp_path):
    """This is the row that the paper marks FAILED: each revealed token costs about 1e6."""
    explodes, hybrid, silent = (
        make_trainer("mcd", networks, tmp_path, reveal=reveal).compute_loss(
            networks["absorbing"][1], {"input_ids": blocks()}
        )
        for reveal in ("divergence", "cross_entropy", "none")
    )
    assert explodes > 1e4 and silent < hybrid < 10
    student, tokens = point_mass_rows(torch.Generator().manual_seed(5))
    assert (divergence_from_token("student_first", student, tokens) > 1e5).all()


# --- What consistency can change: an exact posterior as teacher


def posterior_tables(generator):
    """A joint law of 3 tokens over 2 values, and the exact posterior of each token for each canvas (2 is [MASK])."""
    joint = torch.rand(2, 2, 2, dtype=torch.float64, generator=generator) ** 3
    joint /= joint.sum()
    sequences = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    weights = joint.flatten()

    def posterior(z):
        fits = ((z == 2) | (sequences == z)).all(1).double() * weights
        return torch.stack([(fits[:, None] * (sequences == v)).sum(0) / fits.sum() for v in (0, 1)], -1)

    return sequences, weights, posterior


def test_teacher_first_consistency_keeps_an_exact_posterior():
    """E[f*(z_s) | z_t] = f*(z_t): enumerated over every canvas and every way to reveal; so the minimiser of teacher-first
    KL is the posterior itself, while that of student-first KL is the normalised geometric mean, which is sharper."""
    sequences, weights, posterior = posterior_tables(torch.Generator().manual_seed(0))
    keep, sharper = 0.4, []  # probability that a masked token stays masked
    for canvas in [torch.tensor(z) for z in ([2, 2, 2], [0, 2, 2], [2, 1, 2], [2, 2, 0])]:
        hidden = (canvas == 2).nonzero()[:, 0].tolist()
        fits = ((canvas == 2) | (sequences == canvas)).all(1).double() * weights
        arithmetic, logs, mass = torch.zeros(3, 2).double(), torch.zeros(3, 2).double(), torch.zeros(3, 1).double()
        for sequence, weight in zip(sequences, fits / fits.sum(), strict=True):
            for choice in range(2 ** len(hidden)):
                stays = [i for j, i in enumerate(hidden) if choice >> j & 1]
                z_s = sequence.clone()
                z_s[stays] = 2
                probability = weight * keep ** len(stays) * (1 - keep) ** (len(hidden) - len(stays))
                f = posterior(z_s)
                arithmetic += probability * f
                logs[stays] += probability * f[stays].log()
                mass[stays] += probability
        exact = posterior(canvas)
        torch.testing.assert_close(arithmetic, exact, rtol=1e-12, atol=1e-12)
        geometric = (logs[hidden] / mass[hidden]).softmax(-1)
        entropy = [-(p * p.log()).sum(-1) for p in (geometric, exact[hidden])]
        sharper.append((entropy[0] < entropy[1]).all())
    assert all(sharper)
