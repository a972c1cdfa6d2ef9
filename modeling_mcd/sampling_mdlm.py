"""The samplers of diffusion language models, one short function each: which positions are revealed when, and which tokens are drawn.

A sampler takes a `Canvas` and its own options, by keyword; `generate` refuses options that are not in its signature. It does
one step, yields, and goes on when it is asked for the next (`Canvas.denoise` is the loop). A row costs as many forwards as
there are steps that reveal something in it: a row that reveals nothing takes no part in a forward.

The locked noise of a token is two uniforms: `canvas.u` decides when it is revealed, `canvas.v` which token it becomes.
Samplers that choose positions without the network use the first; all but the correcting ones draw the token with the second.
So one seed gives related texts at every number of steps and under every order. `locking` says how the first uniforms of a
row hang together (`locking_mdlm.py`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch

from .canvas_mdlm import Answer, Canvas
from .draws_mdlm import (
    draw_and_score,
    draw_posterior,
    draw_truncated,
    log_confidence,
    negative_entropy,
    probability_margin,
    probability_of,
)
from .locking_mdlm import locked_uniforms
from .reveal_grid_mdlm import TAIL, ancestral_reveal_steps, reveal_grid, shares_of, step_times, steps_of


ORDERS = ("entropy", "confidence", "margin")  # of `dream`
DREAM_END = 1e-3  # the time at which its steps end
REMASKING = ("cap", "rescale", "confidence", "loop")
LOOP_FROM, LOOP_TO = 0.55, 0.05  # the times between which ReMDM-loop remasks unless told otherwise


def finish(canvas: Canvas, last_step: str | None) -> Iterator[None]:
    """The last step, for what is still masked at `TAIL`: a draw, the likeliest tokens, or nothing at all."""
    if last_step in ("ancestral", "greedy"):
        canvas.reveal(canvas.masked, TAIL, greedy=last_step == "greedy")
        yield


# --- Exact: the reveals do not depend on the network, so the head and the draw run once for each token


def ancestral(
    canvas: Canvas,
    *,
    steps: int,
    last_step: str | None = None,
    locking: str = "independent",
    reveal_counts: Mapping | None = None,
) -> Iterator[None]:
    """Ancestral sampling, reveal-first (arXiv 2406.07524; 2602.00792, Thm 3.3): exactly the law of the full-canvas sampler.

    That law belongs to independent `locking`; under another one each token's own path has it, and who is revealed together
    does not (docs/locking.md). At most `steps` forwards a row.
    """
    shares = shares_of(steps, locking, reveal_counts)
    u = locked_uniforms(locking, canvas.u, canvas.fillable, steps)
    plan = ancestral_reveal_steps(u, steps, canvas.schedule, last_step, shares)
    for step, time in enumerate(reveal_grid(steps, canvas.schedule, last_step, shares)[0][:-1].tolist()):
        canvas.reveal(canvas.masked & (plan == step), time)
        yield
    yield from finish(canvas, last_step)


def first_hitting(canvas: Canvas, *, locking: str = "independent") -> Iterator[None]:
    """First-hitting sampling (arXiv 2409.02908, Alg. 1): one token at a time, each row on its own clock.

    The limit of `ancestral` for infinitely many steps; costs one forward for each mask of a row. The first of n masked
    tokens is hit at 1 - gamma = (1 - gamma_t) max(u_1 .. u_n), so the sorted locked uniforms are the clock.
    """
    start = canvas.schedule.gamma(torch.ones((), dtype=torch.float64))
    u = locked_uniforms(locking, canvas.u, canvas.fillable)
    times = canvas.schedule.inverse(start + (1 - start) * u)
    order = rank(u, canvas.masked)
    for turn in range(canvas.masked.sum(dim=1).max()):
        hit = canvas.masked & (order == turn)
        canvas.reveal(hit, times.masked_fill(~hit, 0).sum(dim=1))
        yield


def random(
    canvas: Canvas, *, steps: int, locking: str = "independent", reveal_counts: Mapping | None = None
) -> Iterator[None]:
    """A uniformly random order with fixed counts: after k of N steps, round(n k / N) of n masks are revealed.

    Not the law of `ancestral`, whose binomial counts cost quality at few steps. The order is that of the locked uniforms;
    `reveal_counts` may give other fractions than k / N. min(steps, n) forwards a row.
    """
    shares = shares_of(steps, locking, reveal_counts)
    order = rank(locked_uniforms(locking, canvas.u, canvas.fillable, steps), canvas.masked)
    goals, times = goals_of(canvas.masked, steps), [1 - step / steps for step in range(steps)]
    if shares is not None:
        n = canvas.masked.sum(dim=1, keepdim=True)
        goals = (n * torch.tensor([0, *shares], dtype=torch.float64) + 0.5).long()
        times = reveal_grid(steps, canvas.schedule, None, shares)[0].tolist()
    for step in range(steps):
        canvas.reveal(canvas.masked & (order < goals[:, step + 1, None]), times[step])
        yield


def rank(values: torch.Tensor, among: torch.BoolTensor) -> torch.LongTensor:
    """Rank of each value [B, L] in its row, 0 for the smallest; those not `among` come last. Ties keep their order."""
    return values.masked_fill(~among, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)


def goals_of(masked: torch.BoolTensor, steps: int) -> torch.LongTensor:
    """How many tokens of each row are revealed after 0 .. steps steps, [B, steps + 1]: round(n k / steps)."""
    n = masked.sum(dim=1, keepdim=True)
    return (2 * n * torch.arange(steps + 1) + steps) // (2 * steps)


# --- The original code, for comparisons with published tables


def legacy_ancestral(canvas: Canvas, *, steps: int, last_step: str | None = None) -> Iterator[None]:
    """`ancestral` as the original code of MDLM and SDTT draws it, with its truncated noise (see `draw_truncated`).

    There [MASK] competes with the tokens, so the truncation also changes which positions are revealed: every masked position needs
    the head in every step, and fresh noise of the size of the vocabulary.
    """
    # Seeded with the first step's number too: each block has its own noise.
    generators = [torch.Generator().manual_seed(key + canvas.step) for key in canvas.noise.keys.tolist()]
    times = step_times(steps, last_step)
    for t, gamma_t, gamma_s in steps_of(times, canvas.schedule.gamma(times)):
        if canvas.masked.any():
            where = canvas.masked
            draw = functools.partial(
                draw_with_generators,
                generators=generators,
                mask_token_id=canvas.mask_token_id,
                reveal=(gamma_s - gamma_t) / (1 - gamma_t),
                temperature=canvas.denoiser.draw["temperature"],
            )
            tokens = canvas.ask(where, t).map(draw, where.nonzero()[:, 0])
            canvas.write(where, tokens)
            canvas.remask(torch.zeros_like(where).masked_scatter(where, (tokens == canvas.mask_token_id).cpu()))
        yield
    yield from finish(canvas, last_step)


def draw_with_generators(
    logits: torch.Tensor, rows: torch.Tensor, generators: list[torch.Generator], **options
) -> torch.LongTensor:
    """`draw_truncated` of logits [n, V] with the noise of the generator of the row [n], ascending, that each belongs to."""
    numbers, counts = (values.tolist() for values in rows.unique_consecutive(return_counts=True))
    noise = torch.cat(
        [
            torch.rand(count, logits.shape[-1], generator=generators[row])
            for row, count in zip(numbers, counts, strict=True)
        ]
    )
    return draw_truncated(logits, noise.to(logits.device), **options)


# --- Score-based: the order comes from the network, which is asked for every masked position


def confidence(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """The positions with the likeliest best token first (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992).

    The score is the log-probability of the likeliest token; counts are those of `random`. With `order_temperature` T the
    order is drawn without replacement, a position with weight exp(score / T), by Gumbel noise times T on the scores
    (MaskGIT, Dream). min(steps, n) forwards a row.
    """
    return by_score(canvas, log_confidence, steps, order_temperature)


def entropy(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """As `confidence`, the lowest entropy first (Dream, arXiv 2508.15487)."""
    return by_score(canvas, negative_entropy, steps, order_temperature)


def margin(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """As `confidence`, the largest gap between the two likeliest tokens first (arXiv 2502.06768; Dream)."""
    return by_score(canvas, probability_margin, steps, order_temperature)


def by_score(canvas: Canvas, measure: Callable, steps: int, order_temperature: float) -> Iterator[None]:
    """Reveals the positions with the largest scores, as many in each step as `random` does."""
    goals = goals_of(canvas.masked, steps)
    for step in range(steps):
        counts = goals[:, step + 1] - goals[:, step]
        where = canvas.masked & (counts > 0)[:, None]
        if where.any():
            answer = canvas.ask(where, 1 - step / steps)
            scores = answer.score(measure)
            if order_temperature:
                gumbel = -(-canvas.fresh_noise()[0].clamp(min=2**-53).log()).log()
                scores = scores + order_temperature * gumbel
            answer.reveal(where & (rank(-scores, where) < counts[:, None]))
        yield


def dream(canvas: Canvas, *, steps: int, order: str = "entropy", order_temperature: float = 0.0) -> Iterator[None]:
    """Dream's decoding (arXiv 2508.15487, `diffusion_generate`): draws a token for every mask and keeps the surest.

    Unlike in `confidence`, `entropy` and `margin`, the score is that of the distribution after temperature, top_k and top_p,
    and "confidence" (`maskgit_plus` there; "margin" is `topk_margin`) is the probability of the token that was drawn. Of n
    masks floor(n (1 - s/t)) are revealed between t and s, on a grid from 1 to 1e-3, and all that is left in the last step.
    With `order_temperature` T the kept positions are drawn with weight exp(score / T). At most `steps` forwards a row.
    """
    draw = functools.partial(draw_and_score, mask_token_id=canvas.mask_token_id, order=order, **canvas.denoiser.draw)
    times = torch.linspace(1, DREAM_END, steps + 1, dtype=torch.float64).tolist()
    for step, (t, s) in enumerate(pairwise(times)):
        left = canvas.masked.sum(dim=1)
        counts = left if step + 1 == steps else (left * (1 - s / t)).long()
        where = canvas.masked & (counts > 0)[:, None]
        if where.any():
            noise, uniforms = canvas.fresh_noise()
            answer = canvas.ask(where, t)
            tokens, certain = answer.map(draw, uniforms[where]).unbind(dim=1)
            scores = torch.full(where.shape, -torch.inf, dtype=torch.float64)
            scores = scores.masked_scatter(where, certain.cpu().round(decimals=4))
            if order_temperature:
                scores = scores - order_temperature * (-noise.clamp(min=2**-53).log()).log()
            chosen = where & (rank(-scores, where) < counts[:, None])
            answer.write(chosen, tokens[canvas.send(chosen[where])].long())
        yield


def adaptive(
    canvas: Canvas,
    *,
    threshold: float = 0.9,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    max_steps: int | None = None,
) -> Iterator[None]:
    """Every position whose likeliest token has at least the probability `threshold` (CD4LM's decoding).

    At least `min_tokens` and at most `max_tokens` of a row in each step, the most probable first. As many forwards as it
    takes: at most n / `min_tokens` for n masks, rounded up; with `max_steps` at most these, the last of which reveals all
    that is left.
    """
    turn = 0
    while canvas.masked.any():
        where, turn = canvas.masked, turn + 1
        answer = canvas.ask(where, time_of(canvas))
        scores = answer.score(log_confidence)
        counts = (scores >= torch.tensor(threshold).log()).sum(dim=1).clamp(min_tokens, max_tokens)
        if turn == max_steps:
            counts = where.sum(dim=1)
        answer.reveal(where & (rank(-scores, where) < counts[:, None]))
        yield


def entropy_bound(canvas: Canvas, *, entropy_bound: float = 0.1) -> Iterator[None]:
    """The EB-Sampler (arXiv 2505.24857): the largest set U, lowest entropies first, with sum_U H - max_U H <= bound.

    The left side, in nats, bounds the error of drawing the tokens of U independently. A bound of 0 reveals one token a
    forward, and any that are certain. As many forwards as it takes: at most n for n masks.
    """
    while canvas.masked.any():
        where = canvas.masked
        answer = canvas.ask(where, time_of(canvas))
        entropies, order = (-answer.score(negative_entropy).double()).sort(dim=1, stable=True)
        accepted = (
            entropies.cumsum(dim=1) - entropies <= entropy_bound
        )  # False beyond the last masked position, where inf - inf is NaN
        answer.reveal(torch.zeros_like(where).scatter(1, order, accepted))
        yield


def time_of(canvas: Canvas) -> torch.Tensor:
    """The time at which the schedule masks as many tokens as each row has masked, [B] float64, where no grid gives one."""
    return canvas.schedule.inverse(1 - canvas.masked.sum(dim=1).double() / canvas.fillable.sum(dim=1).clamp(min=1))


# --- Correcting: a revealed token may be masked again, and be drawn anew from a better context


def remdm(
    canvas: Canvas,
    *,
    steps: int,
    remasking: str = "cap",
    eta: float | None = None,
    t_on: float = LOOP_FROM,
    t_off: float = LOOP_TO,
    alpha_on: float = 0.9,
    last_step: str | None = None,
    locking: str = "independent",
) -> Iterator[None]:
    """Remasking diffusion (ReMDM, arXiv 2503.00307): a visible token is masked again with probability sigma.

    A masked one is revealed with probability (gamma_s - (1 - sigma) gamma_t) / (1 - gamma_t), which keeps the number of
    visible tokens on its schedule for every sigma up to sigma_max = min(1, (1 - gamma_s) / gamma_t) that all tokens
    share. `remasking` chooses sigma, each choice a function below: "cap", "rescale", "confidence" or "loop".

    Worth it at a hundred steps and more. At most `steps` forwards a row; a step that only remasks needs none.
    """
    times = step_times(steps, last_step)
    gammas, network_times = canvas.schedule.gamma(times), times
    if remasking == "loop":
        gammas = loop_profile(times, t_on, t_off, alpha_on)
        network_times = canvas.schedule.inverse(gammas).clamp(max=1)  # at gamma = 0 the inverse lies beyond 1
    chances = torch.zeros(canvas.tokens.shape, dtype=torch.float64)  # of each visible token, when it was revealed
    given = {} if eta is None else {"eta": eta}
    sigma_of = {
        "cap": functools.partial(capped, **given),
        "rescale": functools.partial(rescaled, **given),
        "confidence": functools.partial(by_confidence, canvas=canvas, chances=chances),
        "loop": functools.partial(looped, t_on=t_on, t_off=t_off, **given),
    }[remasking]
    clock = clock_of(canvas, locking, steps)
    for network_time, (t, gamma_t, gamma_s) in zip(network_times[:-1].tolist(), steps_of(times, gammas), strict=True):
        sigma_max = min(1.0, (1 - gamma_s) / gamma_t) if gamma_t > 0 else 1.0
        answer = correct(canvas, network_time, gamma_t, gamma_s, sigma_of(t, sigma_max), clock)
        if remasking == "confidence" and answer is not None:
            tokens = canvas.tokens[tuple(map(canvas.send, answer.where.nonzero().unbind(dim=1)))]
            measure = functools.partial(probability_of, mask_token_id=canvas.mask_token_id)
            chances[answer.where] = answer.map(measure, tokens).cpu()
        yield
    yield from finish(canvas, last_step)


def capped(t: float, sigma_max: float, eta: float = 0.008) -> float:
    """ReMDM-cap: min(eta, sigma_max)."""
    return min(eta, sigma_max)


def rescaled(t: float, sigma_max: float, eta: float = 0.015) -> float:
    """ReMDM-rescale: eta sigma_max."""
    return eta * sigma_max


def by_confidence(t: float, sigma_max: float, canvas: Canvas, chances: torch.Tensor) -> torch.Tensor:
    """ReMDM-conf: sigma_max, shared out over the visible tokens by the softmax of minus their `chances`, [B, L].

    A chance is the probability that a token had when it was revealed. Sigma is 0 at a masked token, so the number of
    visible tokens falls behind its schedule.
    """
    visible = canvas.fillable & ~canvas.masked
    return sigma_max * (-chances).masked_fill(~visible, -torch.inf).softmax(dim=1).nan_to_num(0)


def looped(t: float, sigma_max: float, t_on: float, t_off: float, eta: float = 0.02) -> float:
    """ReMDM-loop: min(eta, sigma_max) while gamma rests between `t_on` and `t_off`, and 0 before and after.

    gamma itself follows `loop_profile`, and the network is told the time at which its schedule has that gamma.
    """
    return min(eta, sigma_max) if t_off < t <= t_on else 0.0


def loop_profile(times: torch.Tensor, t_on: float, t_off: float, alpha_on: float) -> torch.Tensor:
    """Visible fraction of ReMDM-loop: rises from 0 to alpha_on at t_on, rests there until t_off, then rises to 1."""
    rising = (1 - times) * alpha_on / (1 - t_on)
    return torch.where(times > t_on, rising, 1 - times.clamp(max=t_off) * (1 - alpha_on) / t_off)


def psi(
    canvas: Canvas,
    *,
    steps: int,
    kappa: float = 0.98,
    last_step: str | None = None,
    locking: str = "independent",
) -> Iterator[None]:
    """The psi-sampler of Duo, chapter 2 (arXiv 2602.21185), under absorbing noise.

    z_s is drawn from the posterior with probability kappa, and otherwise as fresh noise of level s on a draw of all clean
    tokens. That is ReMDM with sigma = (1 - kappa) (1 - gamma_s); kappa = 1 is `ancestral` with other noise.
    """
    times, clock = step_times(steps, last_step), clock_of(canvas, locking, steps)
    for t, gamma_t, gamma_s in steps_of(times, canvas.schedule.gamma(times)):
        correct(canvas, t, gamma_t, gamma_s, (1 - kappa) * (1 - gamma_s), clock)
        yield
    yield from finish(canvas, last_step)


def clock_of(canvas: Canvas, locking: str, steps: int) -> torch.Tensor | None:
    """The clock of `correct`, [B, L] float64; None for independent locking, which draws anew in every step."""
    return None if locking == "independent" else locked_uniforms(locking, canvas.u, canvas.fillable, steps)


def correct(
    canvas: Canvas,
    time: float,
    gamma_t: float,
    gamma_s: float,
    sigma: float | torch.Tensor,
    clock: torch.Tensor | None,
) -> Answer | None:
    """One step of ReMDM's posterior. The reveals and remasks are known before the forward.

    Without a clock both are drawn anew for each token. A clock locks them: masked tokens are revealed where it is below
    their chance, for which it is uniform; where it is not, it is made uniform again, and so it is at a remasked token. Each
    token's own path then has ReMDM's law, a step reveals what lies apart, and with sigma = 0 the plan is that of `ancestral`.

    Returns:
        The network's answer for the revealed tokens; None if none were revealed.
    """
    u, v = canvas.fresh_noise()
    chance = (gamma_s - (1 - sigma) * gamma_t) / (1 - gamma_t)
    if clock is not None:
        u = locked_uniforms("spread", u, canvas.fillable)
    reveal = canvas.masked & ((u if clock is None else clock) < chance)
    remask = canvas.fillable & ~canvas.masked & (u < sigma)
    if clock is not None:
        clock.copy_(torch.where(remask, u / sigma, (clock - chance) / (1 - chance)))
    answer = canvas.ask(reveal, time, sparing=True) if reveal.any() else None
    if answer is not None:
        answer.reveal(reveal, v)
    canvas.remask(remask)
    return answer


# --- Uniform-state diffusion: no masks; every step may change every token


def uniform_ancestral(
    canvas: Canvas, *, steps: int, last_step: str = "ancestral", locking: str = "independent"
) -> Iterator[None]:
    """Ancestral sampling of a uniform-state model (Duo, arXiv 2506.10892): from noise, `steps` draws from the posterior.

    `locking` is that of the uniforms that decide, anew in each step, which tokens stay; what the others become is drawn
    independently.

    A last step removes the noise that is left at `TAIL`: "ancestral" draws from the posterior of t = 0, "greedy" takes
    the likeliest token at every position (Duo's greedy tail), "none" leaves it and saves a forward.
    """
    where, index = canvas.fillable, tuple(map(canvas.send, canvas.fillable.nonzero().unbind(dim=1)))
    times = step_times(steps, last_step)
    if last_step == "ancestral":
        times = torch.cat([times, times.new_zeros(1)])
    for t, alpha_t, alpha_s in steps_of(times, canvas.schedule.gamma(times)):
        u, v = canvas.fresh_noise()
        u = locked_uniforms(locking, u, canvas.fillable)
        draw = functools.partial(draw_posterior, alpha_t=alpha_t, alpha_s=alpha_s, **canvas.denoiser.draw)
        canvas.write(where, canvas.ask(where, t).map(draw, canvas.tokens[index], u[where], v[where]))
        yield
    if last_step == "greedy":
        canvas.reveal(where, TAIL, greedy=True)
        yield


# The samplers of each kind of diffusion, by the name that `generate(sampler=)` takes.
SAMPLERS = {
    "absorbing": {
        sampler.__name__: sampler
        for sampler in (
            *(ancestral, first_hitting, random, confidence, entropy),
            *(margin, dream, adaptive, entropy_bound, remdm, psi),
        )
    },
    "uniform": {"ancestral": uniform_ancestral},
}

# Those with a plan: each step's reveals are known before its forward, and no token is drawn twice. They alone have an N-step
# bound (docs/likelihood.md), and draw through a coupling (docs/coupling.md).
PLANNED = ("ancestral", "first_hitting", "random")

# Those whose next reveals are a function of what is visible: one path alone gives a text, so its likelihood is exact. But not
# under `dream` with the order "confidence", which is that of the tokens that were drawn.
ORDERED = ("confidence", "entropy", "margin", "dream", "adaptive", "entropy_bound")


def options_of(sampler: Callable) -> tuple[str, ...]:
    """The options that a sampler uses: its keyword arguments."""
    return tuple(inspect.signature(sampler).parameters)[1:]
