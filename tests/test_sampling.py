"""The samplers: exact laws by enumeration, orders against their definitions, rows that do not feel each other, no waiting.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5.
"""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch
from laws import FALSE_ALARM, p_value, uniforms
from safetensors.torch import load_file
from sampler_cases import CASES, sampler_of
from scipy import stats
from toy import CANVASES, MASK, EarlyEnd, counts_of, finish, index_of, sample, table_of_logits, toy_canvas
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from modeling_mcd import canvas_mdlm, head_mdlm
from modeling_mcd.draws_mdlm import (
    draw_tokens,
    draw_truncated,
    log_confidence,
    negative_entropy,
    probability_margin,
    probability_of,
)
from modeling_mcd.forward_process_mdlm import pick_uniformly
from modeling_mcd.noise_mdlm import RowNoise, philox, row_keys
from modeling_mcd.noise_mdlm import uniforms as keyed_uniforms
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from modeling_mcd.reveal_grid_mdlm import TAIL, ancestral_reveal_steps
from modeling_mcd.sampling_mdlm import (
    SAMPLERS,
    adaptive,
    ancestral,
    confidence,
    entropy_bound,
    first_hitting,
    legacy_ancestral,
    loop_profile,
    psi,
    random,
    remdm,
    uniform_ancestral,
)


GOLDEN_SAMPLES = Path(__file__).parent / "data" / "golden_samples.safetensors"
TABLE = table_of_logits()
TOKENS = TABLE.double()[:, :, :3].softmax(-1)  # of the denoiser, [canvas, position, token]
# --- Noise


def test_philox_gives_the_published_words():
    """The known answers of Random123 for philox4x32 with 10 rounds."""
    for counter, key, answer in (
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        words = [tuple(torch.tensor(int(word, 16)) for word in part.split()) for part in (counter, key)]
        assert [f"{word.item():08x}" for word in philox(*words)] == answer.split()


def test_keyed_uniforms_are_uniform_and_independent():
    keys, positions = row_keys(50, torch.Generator().manual_seed(0)), torch.arange(1000).expand(50, 1000)
    first, second = keyed_uniforms(keys, positions, 0)
    again = keyed_uniforms(keys, positions, 1)[0]
    for u in (first, second, again):
        assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > FALSE_ALARM
        assert len(u.unique()) == u.numel() and 0 <= u.min() and u.max() < 1
    neighbours = (first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first, second), (first, again)
    for u, v in neighbours:
        cells = ((u * 10).long() * 10 + (v * 10).long()).flatten().bincount(minlength=100)
        assert p_value(cells, torch.full((100,), 0.01, dtype=torch.float64)) > FALSE_ALARM
    part = keyed_uniforms(keys[7:9], positions[7:9, 300:310], 0)[0]
    assert torch.equal(part, first[7:9, 300:310])


def test_keys_do_not_depend_on_how_many_are_taken_at_once():
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(row_keys(64, one), torch.cat([row_keys(n, other) for n in (1, 20, 43)]))


# --- Exact laws


def law_of_chain(start, gammas, sigmas, tokens=TOKENS) -> torch.Tensor:
    """Law of the 64 canvases at the end of ReMDM's chain, by enumeration; with all sigmas 0 that of `ancestral`.

    A state is a canvas and the probability of each token when it was revealed. `sigmas[k](state)` are the remasking
    probabilities of the positions; every position moves independently.
    """
    law = {tuple((token, 0.0) for token in start): 1.0}
    given = [token != MASK for token in start]
    for (gamma_t, gamma_s), sigma_of in zip(itertools.pairwise(gammas), sigmas, strict=True):
        after = {}
        for state, probability in law.items():
            here = index_of(torch.tensor([token for token, _ in state])).item()
            moves = []
            for i, (sigma, (token, chance)) in enumerate(zip(sigma_of(state), state, strict=True)):
                if given[i]:
                    moves.append([((token, chance), 1.0)])
                elif token != MASK:
                    moves.append([((token, chance), 1 - sigma), ((MASK, 0.0), sigma)])
                else:
                    reveal = (gamma_s - (1 - sigma) * gamma_t) / (1 - gamma_t)
                    chances = tokens[here, i].tolist()
                    moves.append([((MASK, 0.0), 1 - reveal), *(((v, p), reveal * p) for v, p in enumerate(chances))])
            for move in itertools.product(*moves):
                weight = probability * math.prod(p for _, p in move)
                if weight:
                    target = tuple(state for state, _ in move)
                    after[target] = after.get(target, 0.0) + weight
        law = after
    result = torch.zeros(64, dtype=torch.float64)
    for state, probability in law.items():
        result[index_of(torch.tensor([token for token, _ in state]))] += probability
    return result


def law_of_subsets(start, sizes) -> torch.Tensor:
    """Law at the end when step k reveals a uniformly random set of `sizes[k]` masked positions."""
    law = {tuple(start): 1.0}
    for size in sizes:
        after = {}
        for canvas, probability in law.items():
            here = index_of(torch.tensor(canvas)).item()
            masked = [i for i, token in enumerate(canvas) if token == MASK]
            sets = list(itertools.combinations(masked, size))
            for chosen in sets:
                for values in itertools.product(range(3), repeat=size):
                    target = list(canvas)
                    weight = probability / len(sets)
                    for i, value in zip(chosen, values, strict=True):
                        target[i] = value
                        weight *= TOKENS[here, i, value].item()
                    after[tuple(target)] = after.get(tuple(target), 0.0) + weight
        law = after
    result = torch.zeros(64, dtype=torch.float64)
    for canvas, probability in law.items():
        result[index_of(torch.tensor(canvas))] = probability
    return result


def gammas_of(steps, schedule=None, end=0.0):
    schedule = schedule or LogLinearSchedule()
    return schedule.gamma(torch.linspace(1, end, steps + 1, dtype=torch.float64)).tolist()


def constant(sigmas):
    return [lambda state, sigma=sigma: [sigma] * 3 for sigma in sigmas]


@pytest.mark.parametrize("start, sizes", [([3, 3, 3], [1, 1, 1]), ([1, 3, 3], [1, 1])])
def test_first_hitting_has_the_exact_law(start, sizes):
    canvas = sample(first_hitting, TABLE, start)
    assert p_value(counts_of(canvas), law_of_subsets(start, sizes)) > FALSE_ALARM
    assert (canvas.nfe == len(sizes)).all()


@pytest.mark.parametrize(
    "start, steps, sizes",
    [([3, 3, 3], 2, [2, 1]), ([3, 3, 3], 1, [3]), ([3, 2, 3], 2, [1, 1]), ([3, 3, 3], 5, [1, 1, 1])],
)
def test_random_order_has_the_exact_law(start, steps, sizes):
    canvas = sample(random, TABLE, start, steps=steps)
    assert p_value(counts_of(canvas), law_of_subsets(start, sizes)) > FALSE_ALARM
    assert (canvas.nfe == len(sizes)).all()


def test_random_order_is_another_law_than_ancestral():
    counts = counts_of(sample(random, TABLE, steps=2))
    assert p_value(counts, law_of_chain([3, 3, 3], gammas_of(2), constant([0, 0]))) < 1e-9


@pytest.mark.parametrize("schedule", [LogLinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("last_step", ["ancestral", "greedy", "none"])
def test_ancestral_with_a_last_step_has_the_exact_law(schedule, last_step):
    """Under a schedule that leaves the last step something to do."""
    canvas = sample(ancestral, TABLE, schedule=EarlyEnd(schedule), steps=2, last_step=last_step)
    gammas = gammas_of(2, schedule, end=0.3)
    law = law_of_chain([3, 3, 3], gammas, constant([0, 0]))
    greedy = torch.nn.functional.one_hot(TOKENS.argmax(-1), 3).double()
    last = {"ancestral": TOKENS, "greedy": greedy, "none": None}[last_step]
    if last is not None:
        ends = [law_of_chain(c.tolist(), [gammas[-1], 1.0], constant([0]), last) for c in CANVASES]
        law = sum(p * end for p, end in zip(law, ends, strict=True))
    counts = counts_of(canvas)
    assert p_value(counts, law) > FALSE_ALARM
    assert ((canvas.tokens == MASK).any() == (last_step == "none")).item()
    assert canvas.nfe.max() == (2 if last_step == "none" else 3)
    assert torch.equal(canvas.reveal_steps >= 0, canvas.tokens != MASK)
    assert canvas.reveal_steps.max() == canvas.nfe.max() - 1


def remasking(kind, steps, eta, schedule):
    """gamma and sigma of ReMDM, written from the paper."""
    gammas = gammas_of(steps, schedule)
    most = [min(1.0, (1 - s) / t) for t, s in itertools.pairwise(gammas)]
    if kind == "cap":
        return gammas, constant([min(eta, m) for m in most])
    if kind == "rescale":
        return gammas, constant([eta * m for m in most])

    def shares(state, most):
        weights = [0.0 if token == MASK else math.exp(-chance) for token, chance in state]
        return [most * w / (sum(weights) or 1) for w in weights]

    return gammas, [functools.partial(shares, most=m) for m in most]


@pytest.mark.parametrize("kind, steps, eta", [("cap", 3, 0.3), ("rescale", 3, 0.6), ("confidence", 3, None)])
@pytest.mark.parametrize("schedule", [LogLinearSchedule(0.2), CosineSchedule(0.2)])
def test_remdm_has_the_exact_law(kind, steps, eta, schedule):
    options = {"steps": steps, "remasking": kind} | ({} if eta is None else {"eta": eta})
    counts = counts_of(sample(remdm, TABLE, schedule=schedule, **options))
    gammas, sigmas = remasking(kind, steps, eta, schedule)
    assert p_value(counts, law_of_chain([3, 3, 3], gammas, sigmas)) > FALSE_ALARM
    assert p_value(counts, law_of_chain([3, 3, 3], gammas, constant([0] * steps))) < 1e-9, "no power"


def test_remdm_of_a_prompt_has_the_exact_law_and_keeps_the_prompt():
    counts = counts_of(sample(remdm, TABLE, [3, 2, 3], schedule=LogLinearSchedule(0.2), steps=3, eta=0.5))
    assert p_value(counts, law_of_chain([3, 2, 3], *remasking("cap", 3, 0.5, LogLinearSchedule(0.2)))) > FALSE_ALARM


def test_remdm_loop_has_the_exact_law():
    """t = 1, .75, .5, .25, 0 with t_on = 0.8 and t_off = 0.2: up to alpha_on, two steps of rest, and on to 1."""
    options = {"steps": 4, "remasking": "loop", "eta": 0.4, "t_on": 0.8, "t_off": 0.2, "alpha_on": 0.7}
    counts = counts_of(sample(remdm, TABLE, **options))
    assert p_value(counts, law_of_chain([3, 3, 3], [0, 0.7, 0.7, 0.7, 1], constant([0, 0.4, 0.4, 0]))) > FALSE_ALARM
    times = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64)
    profile = loop_profile(times, 0.8, 0.2, 0.7)
    torch.testing.assert_close(profile, torch.tensor([0, 0.35, 0.7, 0.7, 0.7, 0.85, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
@pytest.mark.parametrize("remasking", ["cap", "loop"])
def test_remdm_tells_the_network_the_noise_level_of_its_canvas(build, remasking, schedule):
    """exp(-timesteps) against the visible fraction of 400 canvases, whose standard deviation is at most 0.0045."""
    model, told = build(time_conditioning=True, noise_schedule=schedule), []

    def look(module, inputs, kwargs):
        told.append(((kwargs["input_ids"] != 47).double().mean(), kwargs["timesteps"].neg().exp().unique()))

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(num_return_sequences=400, steps=12, sampler="remdm", remasking=remasking, eta=0.1, seed=0)
    whole = [(visible, gamma) for visible, gamma in told[:10]]  # later, rows without a mask take no part
    assert len(told) == 12 and max(gamma for _, gamma in told) > 0.8
    assert all(abs(visible - gamma) < 0.02 for visible, gamma in whole), whole


@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
def test_psi_has_the_exact_law(kappa):
    """Written as Duo does: kappa posterior + (1 - kappa) fresh noise of level s on a draw of the clean tokens."""
    gammas = gammas_of(3, LogLinearSchedule(0.2))
    law = torch.zeros(64, dtype=torch.float64)
    law[63] = 1
    for gamma_t, gamma_s in itertools.pairwise(gammas):
        after = torch.zeros_like(law)
        for here, canvas in enumerate(CANVASES.tolist()):
            rows = []
            for i, token in enumerate(canvas):
                clean = torch.cat([TOKENS[here, i], torch.zeros(1)]) if token == MASK else torch.eye(4)[token].double()
                mask = torch.eye(4, dtype=torch.float64)[MASK]
                reveal = (gamma_s - gamma_t) / (1 - gamma_t) if token == MASK else 1.0
                posterior = reveal * clean + (1 - reveal) * mask
                rows.append(kappa * posterior + (1 - kappa) * (gamma_s * clean + (1 - gamma_s) * mask))
            after += law[here] * torch.einsum("a,b,c->abc", *rows).flatten()
        law = after
    counts = counts_of(sample(psi, TABLE, schedule=LogLinearSchedule(0.2), steps=3, kappa=kappa))
    assert p_value(counts, law) > FALSE_ALARM


def test_the_original_draw_has_the_exact_law_over_few_steps():
    counts = counts_of(sample(legacy_ancestral, TABLE, draws=20_000, steps=3))
    assert p_value(counts, law_of_chain([3, 3, 3], gammas_of(3), constant([0, 0, 0]))) > FALSE_ALARM


def test_no_float32_noise_reveals_a_token_below_the_truncation():
    """A token has p = 1e-3, the step is one of a million, and the mask's noise is 0.5. Float64 noise close enough to 1
    would reveal it.
    """
    logits, noise = torch.tensor([[1e-3, 1 - 1e-3, 0.0]]).log(), torch.full((1, 3), 0.5)
    noise[0, 0] = 1 - 2**-24
    assert noise[0, 0] == torch.tensor(1.0).nextafter(torch.tensor(0.0)), "the largest float32 below 1"
    assert draw_truncated(logits, noise, 2, 1e-6).item() == 2
    assert draw_truncated(logits, noise, 2, 1e-3).item() == 0
    weights, exact = (
        torch.tensor([1e-9, 1.0], dtype=torch.float64),
        torch.tensor([1 - 2**-40, 0.5], dtype=torch.float64),
    )
    assert (weights / -exact.log()).argmax().item() == 0


@pytest.mark.slow
def test_the_truncated_draw_of_the_original_code_has_another_law():
    """Half of the probability lies on 8,190 rare tokens, over 4,096 steps: each is revealed with 1.5e-8 / t in a step.

    The truncated noise gives none of them unless the mask's own is large, and they come too seldom.
    """
    size, steps, draws = 8192, 4096, 160
    law = torch.full((size,), 0.5 / (size - 2), dtype=torch.float64)
    law[0], law[MASK] = 0.5, 0.0
    table = law.log().float()

    def p_value_of(sampler) -> float:
        canvas = toy_canvas(
            *(table, [MASK], draws),
            trunk=lambda tokens, rows, time: tokens[..., None],
            head=lambda hidden, *unused: table.expand(len(hidden), size),
            seed=0,
        )
        finish(canvas, sampler(canvas, steps=steps))
        return stats.binomtest((canvas.tokens == 0).sum().item(), draws, law[0].item()).pvalue

    assert p_value_of(ancestral) > FALSE_ALARM
    assert p_value_of(legacy_ancestral) < FALSE_ALARM


# --- The limit of many steps, the clock, the counts


def test_first_hitting_is_the_limit_of_ancestral_with_the_same_seed():
    hit = sample(first_hitting, TABLE, draws=12)
    fine = sample(ancestral, TABLE, draws=12, steps=20_000)
    assert torch.equal(hit.tokens, fine.tokens) and torch.equal(hit.nfe, fine.nfe)
    assert torch.equal(hit.reveal_steps, fine.reveal_steps.argsort(dim=1).argsort(dim=1))


@pytest.mark.parametrize("schedule", [LogLinearSchedule(), CosineSchedule()])
def test_each_row_of_first_hitting_has_its_own_clock(schedule):
    """The k-th hit of three: 1 - gamma is (1 - gamma_1) times the (4 - k)-th order statistic of three uniforms."""
    times = []

    def trunk(tokens, rows, time):
        times.append(time)
        return TABLE[index_of(tokens)]

    canvas = toy_canvas(TABLE, [3, 3, 3], 20_000, schedule=schedule, trunk=trunk)
    finish(canvas, first_hitting(canvas))
    assert all((earlier > later).all() for earlier, later in itertools.pairwise(times))
    for k, time in enumerate(times):
        u = (1 - schedule.gamma(time)) / (1 - schedule.gamma(torch.ones((), dtype=torch.float64)))
        assert stats.kstest(u.numpy(), stats.beta(3 - k, k + 1).cdf).pvalue > FALSE_ALARM


def test_random_order_reveals_fixed_counts_and_ancestral_does_not():
    def counts(sampler) -> list[list[int]]:
        table = torch.zeros(1, 50, 4)
        canvas = toy_canvas(table, [3] * 50, 40, trunk=lambda tokens, rows, time: table.expand(len(tokens), 50, 4))
        finish(canvas, sampler(canvas, steps=8))
        return [row.bincount(minlength=8).tolist() for row in canvas.reveal_steps]

    fixed = [6, 7, 6, 6, 6, 7, 6, 6]
    assert sum(fixed) == 50 and all(row == fixed for row in counts(random))
    assert len({tuple(row) for row in counts(ancestral)}) > 30


def test_the_last_step_takes_what_is_left_at_the_tail():
    u = torch.tensor([0.0, 0.51, 1 - 2 * TAIL, 1 - TAIL / 2], dtype=torch.float64)
    assert ancestral_reveal_steps(u, 2, LogLinearSchedule(), "greedy").tolist() == [0, 1, 1, 2]
    assert ancestral_reveal_steps(u, 2, LogLinearSchedule()).tolist() == [0, 1, 1, 1]


# --- Rows do not feel each other


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_bitwise_the_same_alone_and_in_a_batch(case):
    """Each row of this denoiser is computed alone, which no matrix product promises; `generate` has a test of its own."""
    starts = [[3, 3, 3], [1, 3, 3], [3, 0, 3], [3, 3, 2]] * 4
    keys = row_keys(len(starts), torch.Generator().manual_seed(5))

    def samples(rows):
        canvas = toy_canvas(TABLE, starts[0], len(rows), keys=keys[rows])
        canvas.tokens.copy_(torch.tensor([starts[row] for row in rows]))
        canvas.fillable = canvas.tokens == MASK
        canvas.masked = canvas.fillable.clone()
        finish(canvas, sampler_of(case)(canvas, **CASES[case]))
        return canvas.tokens, canvas.nfe, canvas.reveal_steps

    together = samples(list(range(16)))
    assert (together[1] > 0).all() and len(together[0].unique(dim=0)) > 5
    for row in range(16):
        alone = samples([row])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


# --- Orders


def scores_by_hand(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    p = logits.double()[..., :3].softmax(-1)
    ordered = p.sort(dim=-1, descending=True).values
    return {
        "confidence": ordered[..., 0].log(),
        "margin": ordered[..., 0] - ordered[..., 1],
        "entropy": (p * p.log()).sum(-1),
    }


def test_scores_are_those_of_the_definitions():
    logits = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    by_hand = scores_by_hand(logits)
    for name, measure in (
        ("confidence", log_confidence),
        ("margin", probability_margin),
        ("entropy", negative_entropy),
    ):
        torch.testing.assert_close(measure(logits, MASK).double(), by_hand[name], atol=1e-6, rtol=1e-5)
    tokens = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(1))
    p = (logits.double()[:, :3] / 0.7).softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(probability_of(logits, tokens, MASK, 0.7), p)


def paths(sampler, draws=300, **options):
    """For each row and forward: the canvas that the network saw, and the set that was revealed."""
    seen = []

    class Recorder(canvas_mdlm.Canvas):
        def ask(self, where, time):
            self.before = self.tokens.clone()
            return super().ask(where, time)

        def write(self, where, tokens):
            super().write(where, tokens)
            for row in where.any(dim=1).nonzero()[:, 0].tolist():
                seen.append((index_of(self.before[row]).item(), where[row].nonzero()[:, 0].tolist()))

    canvas = toy_canvas(TABLE, [3, 3, 3], draws)
    canvas.__class__ = Recorder
    finish(canvas, sampler(canvas, **options))
    assert (canvas.tokens != MASK).all()
    return seen


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("steps, sizes", [(3, {1}), (2, {1, 2}), (1, {3})])
def test_the_surest_go_first(name, steps, sizes):
    scores = scores_by_hand(TABLE)[name]
    seen = paths(SAMPLERS["absorbing"][name], steps=steps)
    assert {len(chosen) for _, chosen in seen} == sizes
    for canvas, chosen in seen:
        masked = [i for i in range(3) if CANVASES[canvas, i] == MASK]
        surest = sorted(masked, key=lambda i: -scores[canvas, i])[: len(chosen)]
        assert sorted(surest) == chosen


def test_order_temperature_weighs_the_order_by_exp_of_the_score():
    for temperature in (0.3, 2.0):
        canvas = sample(confidence, TABLE, draws=50_000, steps=3, order_temperature=temperature)
        first = (canvas.reveal_steps == 0).sum(dim=0)
        law = (scores_by_hand(TABLE)["confidence"][63] / temperature).softmax(-1)
        assert p_value(first, law) > FALSE_ALARM


@pytest.mark.parametrize("least, most", [(1, None), (2, None), (1, 1), (1, 2)])
def test_adaptive_commits_what_is_above_the_threshold(least, most):
    sure = scores_by_hand(TABLE)["confidence"].exp()
    sizes = set()
    for canvas, chosen in paths(adaptive, threshold=0.85, min_tokens=least, max_tokens=most):
        masked = [i for i in range(3) if CANVASES[canvas, i] == MASK]
        above = sum(sure[canvas, i].item() >= 0.85 for i in masked)
        count = min(max(above, least), most or 3, len(masked))
        assert chosen == sorted(sorted(masked, key=lambda i: -sure[canvas, i])[:count])
        sizes.add(len(chosen))
    assert len(sizes) > 1 or most == 1


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 10.0])
def test_entropy_bound_takes_the_largest_set_within_the_bound(bound):
    entropies = -scores_by_hand(TABLE)["entropy"]
    for canvas, chosen in paths(entropy_bound, entropy_bound=bound):
        order = sorted((entropies[canvas, i].item(), i) for i in range(3) if CANVASES[canvas, i] == MASK)
        fitting = [n for n in range(1, len(order) + 1) if sum(h for h, _ in order[: n - 1]) <= bound]
        assert chosen == sorted(i for _, i in order[: max(fitting)])
    forwards = sample(entropy_bound, TABLE, draws=10, entropy_bound=bound).nfe
    assert bound not in (0.0, 10.0) or (forwards == (3 if bound == 0 else 1)).all()


# --- Draws


@pytest.mark.parametrize(
    "options, law",
    [
        ({"top_k": 2}, [0.0, 0.375, 0.625, 0.0, 0.0]),
        ({"top_p": 0.75}, [0.0, 0.375, 0.625, 0.0, 0.0]),
        ({"top_p": 0.85}, [0.15 / 0.95, 0.3 / 0.95, 0.5 / 0.95, 0.0, 0.0]),
        ({"top_p": 1e-9}, [0.0, 0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.8}, [0.0, 0.375, 0.625, 0.0, 0.0]),
        ({"dtype": torch.float32}, [0.15, 0.3, 0.5, 0.05, 0.0]),
        ({"temperature": 0.5, "top_p": 0.9}, [0.0, 0.09 / 0.34, 0.25 / 0.34, 0.0, 0.0]),
    ],
)
def test_filtered_draws_have_their_law(options, law):
    logits = torch.tensor([0.15, 0.3, 0.5, 0.05, 1.0]).log()
    counts = draw_tokens(logits.repeat(200_000, 1), uniforms(200_000), 4, **options).bincount(minlength=5)
    if max(law) == 1:
        assert counts[2] == 200_000
    else:
        assert p_value(counts, torch.tensor(law, dtype=torch.float64)) > FALSE_ALARM


def test_logits_that_give_no_token_are_told_from_those_that_do():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0, 1.0, 2, 9], [0, nan, 2, 9], [0, inf, 2, 9], [-inf, -inf, -inf, 9], [-inf, 0, -inf, 9]])
    for temperature in (1.0, 0.0):
        assert draw_tokens(logits, torch.full((5,), 0.99), 3, temperature).tolist() == [2, -1, -1, -1, 1]


@pytest.mark.parametrize("case", CASES)
def test_a_nan_logit_is_named_by_row_and_step(case):
    """The table holds NaN wherever the second position is visible. Row 2 starts there, the others get there later."""
    table = TABLE.clone()
    table[CANVASES[:, 1] != MASK] = torch.nan
    canvas = toy_canvas(table, [3, 3, 3], 3)
    canvas.tokens[2, 1], canvas.fillable[2, 1], canvas.masked[2, 1] = 0, False, False
    with pytest.raises(ValueError, match=r"NaN or infinite logits for row \d in step \d"):
        finish(canvas, sampler_of(case)(canvas, **CASES[case]))


# --- No waiting for the device, no tensor of the size of all logits


EXACT = ["ancestral", "ancestral, greedy", "ancestral, spread", "first_hitting", "random", "remdm", "remdm, loop"]
EXACT += ["remdm, spread", "psi"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", EXACT)
def test_an_exact_sampler_never_waits_for_the_device(build, case, attention):
    """On the meta device there is nothing to wait for: whatever asks a tensor for its values raises."""
    run_on_meta(build, case, attention)


@pytest.mark.parametrize("case", ["confidence", "adaptive", "remdm, confidence"])
def test_the_meta_device_sees_who_waits(build, case):
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_on_meta(build, case)


def run_on_meta(build, case, attention="sdpa"):
    """The trunk and the head of `generate`, with padding and guidance."""
    model = build().to("meta")
    model.set_attn_implementation(attention)
    # There is no autocast on the meta device, which the noise embedding turns off.
    model.model.noise_embedding.forward = lambda sigma: torch.empty(len(sigma), 16, device="meta")
    fillable = torch.arange(16).expand(3, 16) >= 4
    seen = torch.arange(16) < torch.tensor([16, 12, 9])[:, None]
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor([1], device="meta")])
    canvas = canvas_mdlm.Canvas(
        torch.empty(3, 16, dtype=torch.long, device="meta"),
        fillable & seen,
        RowNoise(row_keys(3, torch.Generator().manual_seed(0)), torch.arange(16).expand(3, 16)),
        model.denoiser(seen=seen, prompt=seen & ~fillable, guidance_scale=2.0, processors=processors),
    )
    with torch.no_grad():
        for _ in sampler_of(case)(canvas, **CASES[case]):
            canvas.step += 1
    assert not canvas.masked.any() and (canvas.nfe > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_made_in_chunks_that_change_nothing(model, case, monkeypatch):
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    options = {"sampler": case.split(",")[0], "num_return_sequences": 4, "seed": 0} | CASES[case]
    options |= {"steps": 1} if "ancestral" in case or case == "random" else {}
    whole = model.generate(**options)
    assert case not in ("ancestral", "random") or max(sizes) == 4 * 32 * 48
    monkeypatch.setitem(head_mdlm.CHUNK, "cpu", 500)
    sizes.clear()
    assert torch.equal(model.generate(**options), whole)
    assert max(sizes) <= 500


# --- A canvas without `generate`


@pytest.mark.parametrize("kind, sampler", [("absorbing", ancestral), ("uniform", uniform_ancestral)])
def test_a_canvas_of_its_own_gives_the_samples_of_generate(build, kind, sampler):
    """A model, a canvas and its noise are enough: no options, no configuration."""
    model = build(diffusion_kind=kind)
    noise = RowNoise(row_keys(3, torch.Generator().manual_seed(7)), torch.arange(20).expand(3, 20))
    tokens = torch.full((3, 20), 47) if kind == "absorbing" else pick_uniformly(noise.uniforms(0)[0], 48)
    canvas = canvas_mdlm.Canvas(tokens, torch.ones(3, 20, dtype=torch.bool), noise, model.denoiser())
    with torch.no_grad():
        finish(canvas, sampler(canvas, steps=4))
    assert torch.equal(canvas.tokens, model.generate(num_return_sequences=3, length=20, steps=4, seed=7))


class AntitheticNoise(RowNoise):
    """Another locked noise: the second half of a row is the first, reflected. Each uniform alone is uniform."""

    def uniforms(self, draw):
        u, v = super().uniforms(draw)
        if draw == 0:
            u[:, 10:] = 1 - u[:, :10]
        return u, v


def test_other_locked_noise_goes_in_by_the_canvas(model):
    noise = AntitheticNoise(row_keys(3, torch.Generator().manual_seed(7)), torch.arange(20).expand(3, 20))
    canvas = canvas_mdlm.Canvas(torch.full((3, 20), 47), torch.ones(3, 20, dtype=torch.bool), noise, model.denoiser())
    with torch.no_grad():
        finish(canvas, ancestral(canvas, steps=2))
    assert (canvas.reveal_steps[:, 10:] == 1 - canvas.reveal_steps[:, :10]).all() and (canvas.tokens != 47).all()


# --- Golden samples: computed by commit 3807833, on one thread of a CPU


GOLDEN = {
    f"{case}; {name}": {"sampler": case.split(",")[0]} | CASES[case] | options
    for case in CASES
    if "spread" not in case and "dream" not in case
    for name, options in {"plain": {}, "blocks": {"block_length": 6, "length": 40}}.items()
}
GOLDEN |= {
    "legacy": {"steps": 5, "precision": "legacy_float32"},
    "legacy; blocks": {"steps": 3, "precision": "legacy_float32", "block_length": 10, "last_step": "greedy"},
    "guidance": {"steps": 5, "guidance_scale": 2.0},
    "filters": {"steps": 5, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "suppress_tokens": [1, 2, 3]}
    | {"precision": "float32"},
    "stop": {"steps": 3, "block_length": 6, "stop_at_eos": True, "eos_token_id": [5, 15, 25, 35], "pad_token_id": 0},
}
GOLDEN |= {f"uniform; {last}": {"steps": 4, "last_step": last} for last in ("ancestral", "greedy", "none")}
GOLDEN["uniform; blocks"] = {"steps": 3, "block_length": 10, "length": 40, "top_k": 20}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_samples_stay_the_same(build, name):
    """Three prompts of different lengths: tokens and reveal steps of each sampler."""
    model = build(diffusion_kind="uniform" if name.startswith("uniform") else "absorbing")
    ids, mask = torch.full((3, 12), 9), torch.zeros(3, 12, dtype=torch.long)
    for row, n in enumerate((12, 5, 9)):
        ids[row, 12 - n :] = torch.randint(0, 46, (n,), generator=torch.Generator().manual_seed(n))
        mask[row, 12 - n :] = 1
    arguments = {"length": 28, "return_dict_in_generate": True, "output_reveal_steps": True} | GOLDEN[name]
    output = model.generate(ids, attention_mask=mask, seed=[11, 12, 13], **arguments)
    golden = load_file(GOLDEN_SAMPLES)[name]
    assert torch.equal(torch.stack([output.sequences, output.reveal_steps]), golden.long())
