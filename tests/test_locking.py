"""Locking: each token's uniform is uniform, and together they keep what is revealed at once apart.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5.
"""

import collections
import itertools
import json
import math
import operator

import pytest
import torch
from laws import FALSE_ALARM, p_value, uniforms
from scipy import stats
from toy import MASK, counts_of, finish, index_of, sample, table_of_logits, toy_canvas

from modeling_mcd import MDLMForMaskedDiffusion, MDLMGenerationConfig
from modeling_mcd.canvas_mdlm import Canvas, Denoiser
from modeling_mcd.forward_process_mdlm import UniformProcess, posterior_weights
from modeling_mcd.locking_mdlm import LOCKINGS, PHI, locked_uniforms
from modeling_mcd.noise_mdlm import RowNoise, row_keys
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from modeling_mcd.reveal_grid_mdlm import TAIL, ancestral_reveal_steps, reveal_grid, shares_of
from modeling_mcd.sampling_mdlm import (
    SAMPLERS,
    ancestral,
    first_hitting,
    options_of,
    psi,
    random,
    remdm,
    uniform_ancestral,
)


SCHEDULES = [LogLinearSchedule(), CosineSchedule()]
TABLE = table_of_logits()
TOKENS = TABLE.double()[:, :, :3].softmax(-1)  # of the denoiser, [canvas, position, token]


def locked(locking, rows=1, length=16, steps=None, seed=0) -> torch.Tensor:
    return locked_uniforms(
        locking, uniforms(rows, length, seed=seed), torch.ones(rows, length, dtype=torch.bool), steps
    )


# --- The uniforms


@pytest.mark.parametrize("locking, steps", [("spread", None), ("spread", 4), ("interleaved", 3), ("interleaved", 8)])
def test_each_uniform_is_uniform(locking, steps):
    u = locked(locking, rows=5000, length=21, steps=steps)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    for place in range(21):
        assert stats.kstest(u[:, place].numpy(), "uniform").pvalue > FALSE_ALARM, place


def test_pairs_of_spread_tokens_have_their_exact_law():
    """P(both masked at gamma = 1 - m) = max(m - d', 2m - 1, 0), d' = the distance of |i - j| phi from an integer."""
    u, rows = locked("spread", rows=20_000, length=9), 20_000
    for distance, m in itertools.product(range(1, 9), (0.1, 0.3, 0.5, 0.8)):
        d = distance * PHI % 1
        law = max(m - min(d, 1 - d), 2 * m - 1, 0)
        both = ((u[:, 0] > 1 - m) & (u[:, distance] > 1 - m)).sum().item()
        if law < 1e-12:
            assert both == 0
        else:
            assert stats.binomtest(both, rows, law).pvalue > FALSE_ALARM, (distance, m)
        if abs(law - m * m) > 0.03:
            assert stats.binomtest(both, rows, m * m).pvalue < 1e-9, "the law of independent tokens"


GAPS = {2: {1, 2, 3}, 3: {2, 3, 5}, 4: {2, 3, 5}, 5: {3, 5, 8}, 6: {3, 5, 8}, 8: {5, 8, 13}, 16: {8, 13, 21}}
GAPS |= {32: {21, 34, 55}, 64: {34, 55, 89}}


@pytest.mark.parametrize("steps", GAPS)
def test_the_gaps_of_a_spread_step_are_three_fibonacci_numbers(steps):
    """Of all steps of 40 rows, in uniforms that know no number of steps: as in training, or where N is no power of two."""
    step = (locked("spread", rows=40, length=1500) * steps).long()
    gaps = {gap for row in step for k in range(steps) for gap in (row == k).nonzero()[:, 0].diff().tolist()}
    assert gaps == GAPS[steps]


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_a_power_of_two_spreads_its_steps_exactly_apart(steps):
    step = (locked("spread", rows=200, length=200, steps=steps) * steps).long()
    assert torch.equal(step[:, steps:], step[:, :-steps])
    assert all(row[:steps].sort().values.tolist() == list(range(steps)) for row in step)
    assert len(step[:, 0].unique()) > 0.9 * steps, "from a random place on"


def test_interleaved_reveals_every_nth_token_from_left_to_right():
    step = (locked("interleaved", rows=200, length=20, steps=5) * 5).long()
    assert torch.equal(step[:, 5:], step[:, :-5]), "each step reveals every fifth token"
    assert torch.equal(step[:, 1:], (step[:, :-1] + 1) % 5), "the next step takes their right-hand neighbours"
    assert step[:, 0].unique().tolist() == list(range(5))


@pytest.mark.parametrize(
    "locking, steps, most", [("spread", None, 4.2), ("spread", 8, 4.2), ("independent", None, 15)]
)
def test_counts_stay_near_their_mean_in_every_window(locking, steps, most):
    """|masked tokens - k m| over all windows of k <= 1,000 ranks, for 200 random (m, rho)."""
    u, m = locked(locking, rows=200, length=1000, steps=steps), uniforms(200, 1, seed=1)
    excess = torch.nn.functional.pad(((u > 1 - m).double() - m).cumsum(dim=1), (1, 0))
    worst = (excess.amax(dim=1) - excess.amin(dim=1)).max()
    assert worst < most if locking == "spread" else worst > most


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 12, 50])
def test_spread_visible_sets_of_n_and_2n_steps_agree(schedule, steps):
    coarse, fine = (
        ancestral_reveal_steps(locked("spread", 20, 500, steps=n), n, schedule) for n in (steps, 2 * steps)
    )
    assert torch.equal(fine // 2, coarse) and (steps == 1 or len(coarse.unique()) > 1)


# --- Rows, and what is refused


@pytest.mark.parametrize("locking", LOCKINGS)
def test_a_locked_row_depends_on_itself_alone(locking):
    """Not on the batch, nor on padding or a prompt on its left; an infill is counted in fillable tokens."""
    fillable, u = uniforms(5, 30, seed=1) < 0.6, uniforms(5, 30, seed=2)
    for steps in (3, 4):
        together = locked_uniforms(locking, u, fillable, steps)
        assert torch.equal(together[~fillable], u[~fillable])
        for row in range(5):
            only = fillable[row]
            alone = u[row, only][None]
            alone = locked_uniforms(locking, alone, torch.ones_like(alone, dtype=torch.bool), steps)
            assert torch.equal(together[row, only], alone[0])


def test_independent_gives_the_uniforms_themselves_and_an_empty_row_is_left():
    u, nothing = uniforms(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    assert locked_uniforms("independent", u, ~nothing) is u
    for locking in LOCKINGS:
        assert torch.equal(locked_uniforms(locking, u, nothing, steps=2), u)


def test_unknown_lockings_and_missing_steps_are_refused():
    with pytest.raises(ValueError, match=r"locking must be one of \['independent', .*, not 'golden'"):
        locked("golden")
    with pytest.raises(ValueError, match="'interleaved' needs a number of steps"):
        locked("interleaved")


# --- The exact laws of the samplers, by enumeration over all plans


def plans(locking: str, steps: int, masks: int) -> dict[tuple[int, ...], float]:
    """The step that reveals each of the masks, and how probable that plan is."""
    if locking == "spread" and steps & (steps - 1):
        cuts = sorted({(k / steps - i * PHI) % 1 for k in range(steps) for i in range(masks)} | {0.0, 1.0})
        found = {}
        for low, high in itertools.pairwise(cuts):
            plan = tuple(int(((low + high) / 2 + i * PHI) % 1 * steps) for i in range(masks))
            found[plan] = found.get(plan, 0) + high - low
        return found
    bits = steps.bit_length() - 1
    order = {"interleaved": list(range(steps)), "spread": [int(f"{k:0{bits}b}"[::-1], 2) for k in range(steps)]}
    return {tuple(order[locking][(start + i) % steps] for i in range(masks)): 1 / steps for start in range(steps)}


def law_of(plans_of_canvas: dict, start, tokens=TOKENS) -> torch.Tensor:
    """Law of the 64 canvases when the masks of `start` are revealed by a random plan, before a table as `TOKENS`."""
    holes = [i for i, token in enumerate(start) if token == MASK]
    law = torch.zeros(64, dtype=torch.float64)
    for plan, chance in plans_of_canvas.items():
        for values in itertools.product(range(3), repeat=len(holes)):
            canvas, p = list(start), chance
            for step in sorted(set(plan)):
                here, now = index_of(torch.tensor(canvas)), [j for j, k in enumerate(plan) if k == step]
                p *= math.prod(tokens[here, holes[j], values[j]].item() for j in now)
                for j in now:
                    canvas[holes[j]] = values[j]
            law[index_of(torch.tensor(canvas))] += p
    return law


def independent_plans(steps: int, masks: int) -> dict:
    return dict.fromkeys(itertools.product(range(steps), repeat=masks), steps**-masks)


@pytest.mark.parametrize(
    "locking, steps, start",
    [
        ("spread", 2, [3, 3, 3]),
        ("spread", 3, [3, 3, 3]),
        ("spread", 4, [3, 1, 3]),
        ("spread", 5, [2, 3, 3]),
        ("interleaved", 2, [3, 3, 3]),
        ("interleaved", 3, [3, 3, 3]),
    ],
)
def test_a_locked_sampler_has_its_own_exact_law(locking, steps, start):
    counts = counts_of(sample(ancestral, TABLE, start, draws=40_000, steps=steps, locking=locking))
    masks = start.count(MASK)
    assert p_value(counts, law_of(plans(locking, steps, masks), start)) > FALSE_ALARM
    assert p_value(counts, law_of(independent_plans(steps, masks), start)) < 1e-9, "the law of independent tokens"


def test_generate_has_the_law_of_the_locked_sampler(build):
    """The same through a network, its options and its canvas of three tokens."""
    model = build(vocab_size=4, mask_token_id=MASK, bos_token_id=None, eos_token_id=None, max_position_embeddings=3)
    canvases = torch.tensor(list(itertools.product(range(4), repeat=3)))
    for parameter in model.model.layers.parameters():
        parameter.data *= 3
    with torch.no_grad():
        tokens = model(canvases).logits.double()[:, :, :3].softmax(-1)
    sequences = model.generate(locking="spread", num_return_sequences=6000, length=3, steps=2, seed=0)
    counts = index_of(sequences).bincount(minlength=64)
    assert p_value(counts, law_of(plans("spread", 2, 3), [3, 3, 3], tokens)) > FALSE_ALARM
    assert p_value(counts, law_of(independent_plans(2, 3), [3, 3, 3], tokens)) < 1e-9, "the law of independent tokens"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("last_step", [None, "greedy"])
def test_an_interleaved_group_is_a_step_under_every_schedule(schedule, last_step, monkeypatch):
    monkeypatch.setattr("modeling_mcd.reveal_grid_mdlm.TAIL", 0.3)
    told = []

    def trunk(tokens, rows, time):
        told.append((schedule.gamma(time), (tokens != MASK).double().mean(dim=1)))
        return torch.zeros(len(tokens), 15, 4)

    canvas = toy_canvas(torch.zeros(1, 1, 4), [3] * 15, 50, schedule=schedule, trunk=trunk)
    finish(canvas, ancestral(canvas, steps=5, locking="interleaved", last_step=last_step))
    group = (locked_uniforms("interleaved", canvas.u, canvas.fillable, 5) * 5).long()
    assert torch.equal(canvas.reveal_steps, group) and len(told) == 5, "and nothing is left for a last step"
    start = schedule.gamma(torch.ones((), dtype=torch.float64))
    for gamma, visible in told:
        torch.testing.assert_close(gamma, start + (1 - start) * visible)


def test_random_order_and_first_hitting_follow_the_locked_uniforms():
    def steps_of(sampler, masks=29, **options):
        canvas = toy_canvas(torch.zeros(1, 1, 4), [3] * masks, 40, trunk=lambda z, *_: torch.zeros(*z.shape, 4))
        finish(canvas, sampler(canvas, locking="spread", **options))
        return canvas

    for steps in (3, 4):
        canvas = steps_of(random, steps=steps)
        u = locked_uniforms("spread", canvas.u, canvas.fillable, steps)
        bounds = [0, *((2 * 29 * k + steps) // (2 * steps) for k in range(1, steps + 1))]
        for k, (low, high) in enumerate(itertools.pairwise(bounds)):
            assert torch.equal((canvas.reveal_steps == k).sum(dim=1), torch.full((40,), high - low))
        by_u = canvas.reveal_steps.gather(1, u.argsort(dim=1))
        assert (by_u.diff(dim=1) >= 0).all(), "the smallest u first"
    canvas = steps_of(first_hitting)
    u = locked_uniforms("spread", canvas.u, canvas.fillable)
    assert torch.equal(canvas.reveal_steps, u.argsort(dim=1).argsort(dim=1))
    fine = steps_of(ancestral, steps=300).reveal_steps
    assert torch.equal(canvas.reveal_steps, fine.argsort(dim=1).argsort(dim=1)), "the limit of many steps"


# --- Correcting samplers: each token's own path has ReMDM's law


def plain_canvas(draws: int, masks: int = 12, schedule=None) -> Canvas:
    trunk = lambda tokens, *_: torch.zeros(*tokens.shape, 4)  # noqa: E731
    return toy_canvas(torch.zeros(1, 1, 4), [3] * masks, draws, schedule=schedule, trunk=trunk)


@pytest.mark.parametrize("steps", [3, 8])
def test_without_remasking_a_locked_corrector_reveals_what_ancestral_does(steps):
    schedule = CosineSchedule(0.2)
    plan = plain_canvas(300, schedule=schedule)
    finish(plan, ancestral(plan, steps=steps, locking="spread"))
    for sampler, options in ((remdm, {"eta": 0.0}), (psi, {"kappa": 1.0})):
        canvas = plain_canvas(300, schedule=schedule)
        finish(canvas, sampler(canvas, steps=steps, locking="spread", **options))
        assert torch.equal(canvas.reveal_steps, plan.reveal_steps), sampler


@pytest.mark.parametrize(
    "sampler, options, sigma",
    [
        (remdm, {"eta": 0.4}, lambda t, s: min(0.4, (1 - s) / t)),
        (remdm, {"remasking": "rescale", "eta": 0.7}, lambda t, s: 0.7 * min(1, (1 - s) / t)),
        (psi, {"kappa": 0.5}, lambda t, s: 0.5 * (1 - s)),
    ],
)
def test_the_path_of_a_token_has_the_law_of_the_locked_corrector(sampler, options, sigma):
    """Masked or visible after each of four steps: 16 paths, of the first and of the ninth token."""
    schedule, steps = LogLinearSchedule(0.2), 4
    gammas = schedule.gamma(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    law = {(): 1.0}
    for t, s in itertools.pairwise(gammas):
        remask, after = sigma(t, s), {}
        for path, p in law.items():
            seen = bool(path) and path[-1]
            chance = 1 - remask if seen else (s - (1 - remask) * t) / (1 - t)
            after[*path, 1], after[*path, 0] = p * chance, p * (1 - chance)
        law = after
    canvas, paths = plain_canvas(20_000, masks=9, schedule=schedule), []
    for _ in canvas.denoise(sampler(canvas, steps=steps, locking="spread", **options)):
        paths.append(~canvas.masked)
    exact = torch.zeros(2**steps, dtype=torch.float64)
    for path, p in law.items():
        exact[int("".join(map(str, path)), 2)] += p
    exact[exact < 1e-12] = 0
    for token in (0, 8):
        code = sum(visible[:, token].long() << steps - 1 - k for k, visible in enumerate(paths))
        assert p_value(code.bincount(minlength=2**steps), exact / exact.sum()) > FALSE_ALARM
    neighbours = (paths[0][:, 0] & paths[0][:, 1]).double().mean()
    assert neighbours < 0.5 * paths[0].double().mean() ** 2, "neighbours are seldom revealed at once"


START = [3, 1, 3]  # few masks: the enumeration grows fast


def corrector_law(chances: list[float], sigmas: list[float]) -> torch.Tensor:
    """Law of the 64 canvases under a locked corrector from `START`, by enumeration over all that its rhos can do.

    Its first clock has the rho of the canvas, a remasked token the clock of the step that masked it again. What happens
    changes only where one of these uniforms crosses a threshold.
    """
    holes = [i for i, token in enumerate(START) if token == MASK]
    masks = len(holes)

    def reveals(after: int) -> list[float]:
        """Below the k-th of these, a clock that is uniform after step `after` has been up by the k-th step from there."""
        left = itertools.accumulate((1 - chance for chance in chances[after + 1 :]), operator.mul)
        return [1 - share for share in left]

    def cells(thresholds) -> list[tuple[float, float]]:
        cuts = sorted({(value - i * PHI) % 1 for value in (0.0, *thresholds) for i in range(masks)} | {0.0, 1.0})
        return [((low + high) / 2, high - low) for low, high in itertools.pairwise(cuts)]

    found = collections.Counter()
    of_steps = [cells([sigma, *(sigma * value for value in reveals(k))]) for k, sigma in enumerate(sigmas)]
    for (first, chance), *later in itertools.product(cells(reveals(-1)), *of_steps[1:]):
        clock, visible, path = [(first + i * PHI) % 1 for i in range(masks)], [False] * masks, []
        for k, (rho, width) in enumerate([(0.0, 1.0), *later]):
            fresh, chance = [(rho + i * PHI) % 1 for i in range(masks)], chance * width
            shown = [i for i in range(masks) if not visible[i] and clock[i] < chances[k]]
            hidden = [i for i in range(masks) if visible[i] and fresh[i] < sigmas[k]]
            clock = [
                fresh[i] / sigmas[k] if i in hidden else (clock[i] - chances[k]) / (1 - chances[k] + 1e-300)
                for i in range(masks)
            ]
            visible = [i in shown or visible[i] and i not in hidden for i in range(masks)]
            path.append((tuple(shown), tuple(hidden)))
        found[tuple(path)] += chance
    law = torch.zeros(64, dtype=torch.float64)
    for path, chance in found.items():
        canvases = {tuple(START): chance}
        for shown, hidden in path:
            after = collections.Counter()
            for canvas, p in canvases.items():
                here = index_of(torch.tensor(canvas))
                for values in itertools.product(range(3), repeat=len(shown)):
                    target, weight = list(canvas), p
                    for i, value in zip(shown, values, strict=True):
                        target[holes[i]], weight = value, weight * TOKENS[here, holes[i], value].item()
                    for i in hidden:
                        target[holes[i]] = MASK
                    after[tuple(target)] += weight
            canvases = after
        for canvas, p in canvases.items():
            law[index_of(torch.tensor(canvas))] += p
    return law


@pytest.mark.parametrize(
    "sampler, options, sigma",
    [
        (remdm, {"eta": 0.6}, lambda t, s: min(0.6, (1 - s) / t) if t else 0.6),
        (psi, {"kappa": 0.3}, lambda t, s: 0.7 * (1 - s)),
    ],
)
def test_a_locked_corrector_has_its_own_joint_law(sampler, options, sigma):
    steps, schedule = 5, LogLinearSchedule(0.1)
    gammas = schedule.gamma(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    sigmas = [sigma(t, s) for t, s in itertools.pairwise(gammas)]
    chances = [(s - (1 - x) * t) / (1 - t) for (t, s), x in zip(itertools.pairwise(gammas), sigmas, strict=True)]
    law = corrector_law(chances, sigmas)
    canvas = sample(sampler, TABLE, START, draws=20_000, steps=steps, schedule=schedule, locking="spread", **options)
    assert p_value(counts_of(canvas), law) > FALSE_ALARM
    alone = sample(sampler, TABLE, START, draws=20_000, steps=steps, schedule=schedule, **options)
    assert p_value(counts_of(alone), law) < 1e-9, "the law of independent tokens"


# --- Uniform noise


def test_a_locked_uniform_sampler_keeps_the_law_of_each_token():
    """A network that ignores its canvas: each token alone has the law of independent uniforms, pairs do not."""
    schedule, K, L, draws, steps = LogLinearSchedule(0.1), 3, 5, 20_000, 3
    logits = torch.randn(L, K, generator=torch.Generator().manual_seed(0))
    denoiser = Denoiser(
        trunk=lambda tokens, rows, time, wanted: logits.expand(len(tokens), L, K),
        head=lambda hidden, *unused: hidden,
        process=UniformProcess(schedule, K),
    )
    same = {}
    for locking in ("independent", "spread"):
        noise = RowNoise(row_keys(draws, torch.Generator().manual_seed(1)), torch.arange(L).expand(draws, L))
        start = torch.zeros(draws, L, dtype=torch.long)
        canvas = Canvas(start.clone(), torch.ones_like(start, dtype=torch.bool), noise, denoiser)
        states = []
        for _ in canvas.denoise(uniform_ancestral(canvas, steps=steps, last_step="none", locking=locking)):
            states.append(canvas.tokens.clone())
        changed = (states[0] != start).double()
        same[locking] = (changed[:, 0] * changed[:, 1]).mean().item()
        grid = schedule.gamma(torch.linspace(1, TAIL, steps + 1, dtype=torch.float64)).tolist()
        for place in (0, 4):
            x_hat, law = logits[place].double().softmax(-1), torch.eye(K, dtype=torch.float64)[0]
            for alpha_t, alpha_s in itertools.pairwise(grid):
                stay, predict = posterior_weights(x_hat, alpha_t, alpha_s, K)
                step = stay.diag() + predict[:, None] * x_hat + ((1 - stay - predict) / K)[:, None]
                law = law @ step
            assert p_value(states[-1][:, place].bincount(minlength=K), law) > FALSE_ALARM, (locking, place)
    assert same["spread"] < same["independent"] - 0.02, "neighbours change at once less often"


# --- Reveal counts


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("locking", ["independent", "spread"])
def test_reveal_counts_are_the_shares_of_the_steps(schedule, locking):
    shares, told = [0.1, 0.5, 0.6, 1.0], []

    def trunk(tokens, rows, time):
        told.append(schedule.gamma(time).unique())
        return torch.zeros(*tokens.shape, 4)

    for sampler in (ancestral, random):
        canvas = toy_canvas(torch.zeros(1, 1, 4), [3] * 50, 400, schedule=schedule, trunk=trunk)
        finish(canvas, sampler(canvas, steps=4, locking=locking, reveal_counts={"4": shares, "2": [0.3, 1.0]}))
        counts = canvas.reveal_steps.flatten().bincount(minlength=4)
        if sampler is random:
            assert counts.tolist() == [400 * n for n in (5, 20, 5, 20)]
        else:
            law = torch.tensor([0.1, 0.4, 0.1, 0.4], dtype=torch.float64)
            torch.testing.assert_close(counts.double() / 20_000, law, atol=0.02, rtol=0)
        start = schedule.gamma(torch.ones((), dtype=torch.float64))
        expected = start + (1 - start) * torch.tensor([0, 0.1, 0.5, 0.6], dtype=torch.float64)
        torch.testing.assert_close(torch.cat(told), expected)
        told.clear()


def test_equal_reveal_counts_are_the_linear_grid_and_other_steps_keep_theirs():
    schedule, shares = LogLinearSchedule(), [0.25, 0.5, 0.75, 1.0]
    for ours, linear in zip(reveal_grid(4, schedule, None, shares), reveal_grid(4, schedule, None, None), strict=True):
        torch.testing.assert_close(ours, linear)
    assert shares_of(4, "spread", {"4": shares}) == shares_of(4, "independent", {4: shares}) == shares
    assert shares_of(8, "spread", {"4": shares}) is shares_of(4, "spread", {}) is shares_of(4, "spread", None) is None


# --- Options


def test_locking_and_reveal_counts_are_saved_with_the_model(model, tmp_path):
    options = {"locking": "spread", "reveal_counts": {"3": [0.2, 0.5, 1.0], "2": [0.4, 1]}}
    model.generation_config = MDLMGenerationConfig(steps=3, **options)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: saved[name] for name in options} == options
    loaded = MDLMForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.generation_config.reveal_counts == options["reveal_counts"]
    arguments = {"seed": 0, "return_dict_in_generate": True, "output_reveal_steps": True, "num_return_sequences": 3}
    ours = loaded.generate(**arguments)
    explicit = model.generate(generation_config=MDLMGenerationConfig(), steps=3, **options, **arguments)
    assert torch.equal(ours.sequences, explicit.sequences) and torch.equal(ours.reveal_steps, explicit.reveal_steps)
    other = loaded.generate(locking="independent", reveal_counts={}, **arguments)
    plain = loaded.generate(generation_config=MDLMGenerationConfig(steps=3), **arguments)
    assert torch.equal(other.reveal_steps, plain.reveal_steps), "a call may go back to the default"
    assert not torch.equal(other.reveal_steps, ours.reveal_steps)
    for locking, counts in (("spread", options["reveal_counts"]), ("interleaved", {})):
        loaded.generation_config = MDLMGenerationConfig(steps=3, locking=locking, reveal_counts=counts)
        assert loaded.generate(sampler="confidence", **arguments).nfe.tolist() == [3, 3, 3], "saved, but not asked for"


def test_samplers_without_a_use_for_locking_refuse_it_by_name(model, build):
    takes = {name for name, sampler in SAMPLERS["absorbing"].items() if "locking" in options_of(sampler)}
    assert takes == {"ancestral", "random", "first_hitting", "remdm", "psi"}
    for sampler in set(SAMPLERS["absorbing"]) - takes:
        with pytest.raises(ValueError, match=rf"locking \('spread'\) is not used by the sampler '{sampler}'"):
            model.generate(sampler=sampler, locking="spread")
    for sampler in takes - {"ancestral"}:
        with pytest.raises(ValueError, match=f"'interleaved' goes with .*'ancestral'.* not with '{sampler}'"):
            model.generate(sampler=sampler, locking="interleaved")
    with pytest.raises(ValueError, match="'interleaved' goes with .* of uniform diffusion"):
        build(diffusion_kind="uniform").generate(locking="interleaved")
    with pytest.raises(ValueError, match=r"last_step \('greedy'\) would find nothing left"):
        model.generate(steps=2, reveal_counts={"2": [0.1, 1.0]}, last_step="greedy")


def test_blocks_are_locked_one_by_one(model):
    """With padding and a prompt: the tokens of a step are exactly N apart within each block."""
    ids, mask = torch.tensor([[9, 9, 1, 2, 3], [9, 1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    arguments = {"locking": "spread", "steps": 4, "seed": [5, 6], "return_dict_in_generate": True}
    arguments |= {"length": 37, "block_length": 16, "output_reveal_steps": True}
    steps = model.generate(ids, attention_mask=mask, **arguments).reveal_steps[:, 5:] % 5
    for block in steps.split(16, dim=1):
        assert torch.equal(block[:, 4:], block[:, :-4])
    assert not torch.equal(steps[:, :16], steps[:, 16:]), "each block has a place of its own to start from"


@pytest.mark.parametrize("locking", ["spread", "interleaved"])
def test_a_locked_run_needs_a_forward_a_step_and_a_head_row_a_token(model, locking):
    head_rows, forwards = [], []
    model.lm_head.register_forward_hook(lambda module, inputs, output: head_rows.append(inputs[0].shape[0]))
    model.model.register_forward_hook(lambda module, inputs, output: forwards.append(1))
    output = model.generate(steps=8, locking=locking, seed=0, return_dict_in_generate=True, num_return_sequences=2)
    assert sum(head_rows) == 2 * 32 and len(forwards) == 8 and output.nfe.tolist() == [8, 8]
