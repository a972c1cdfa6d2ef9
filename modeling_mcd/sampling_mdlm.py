"""The samplers of masked diffusion, one short function each: who is revealed when, and which token is drawn.

A sampler takes a `Canvas` and its own options, by keyword; `generate` refuses those that are not in its signature. It does
a step, yields, and goes on when asked for the next (`Canvas.denoise` is the loop). What a row costs is the number of steps
that reveal something in it: a row that reveals nothing takes no part in a forward.

The locked noise of a token is two uniforms, `canvas.when` and `canvas.which`. Samplers that choose whom to reveal without
the network use the first, all but the correcting ones draw the token with the second: one seed gives related texts at every
number of steps and under every order.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from .canvas_mdlm import Answer, Canvas
from .draws_mdlm import confidence as log_confidence
from .draws_mdlm import draw_posterior, draw_truncated, negative_entropy, probability_of
from .draws_mdlm import margin as probability_margin
from .noise_schedule_mdlm import NoiseSchedule


LAST_STEPS = ("ancestral", "greedy", "none")
REMASKING = ("cap", "rescale", "confidence", "loop")
TAIL = 1e-5  # the time at which the steps end when a last step follows, as in the code of MDLM and Duo


def step_times(steps: int, last_step: str | None) -> torch.Tensor:
    """The grid 1 = t_0 > t_1 > ... > t_steps, float64: down to 0, or to `TAIL` where a last step follows."""
    return torch.linspace(1, 0 if last_step is None else TAIL, steps + 1, dtype=torch.float64)


def finish(canvas: Canvas, last_step: str | None) -> Iterator[None]:
    """The last step, of the little that is still masked at `TAIL`: a draw, the likeliest tokens, or nothing at all."""
    if last_step in ("ancestral", "greedy"):
        canvas.reveal(canvas.masked, TAIL, greedy=last_step == "greedy")
        yield


# --- Exact: who is revealed does not depend on the network, so the head and the draw run once for each token


def ancestral_reveal_steps(
    uniforms: torch.Tensor, steps: int, schedule: NoiseSchedule, last_step: str | None = None
) -> torch.LongTensor:
    """The step (0 .. steps - 1) in which the ancestral sampler reveals each token. Costs no forward of the network.

    The posterior of MDLM (arXiv 2406.07524, Eq. 7) unmasks a token between t and s < t with probability
    (gamma_s - gamma_t) / (1 - gamma_t), whatever the other tokens and the network say. That is scalar trajectory
    locking read backwards (arXiv 2602.00792, Thm 3.3): with u ~ U(gamma_1, 1] fixed for each masked token, step k
    reveals those with gamma(t_k) < u <= gamma(t_{k+1}), on the grid t_k = 1 - k / steps. The last step reveals the rest;
    with a `last_step` the grid ends at `TAIL`, and `steps` itself stands for what is left then.

    Args:
        uniforms: float64, any shape, in [0, 1).
        steps: number of steps, at least 1.
        schedule: the noise schedule.
    """
    grid = schedule.gamma(step_times(steps, last_step).to(uniforms.device))
    u = grid[0] + (1 - grid[0]) * uniforms
    return torch.searchsorted(grid[1:-1] if last_step is None else grid[1:], u)


def ancestral(canvas: Canvas, *, steps: int, last_step: str | None = None) -> Iterator[None]:
    """Ancestral sampling, reveal-first (arXiv 2406.07524; 2602.00792, Thm 3.3). At most `steps` forwards a row.

    Exactly the law of the full-canvas sampler.
    """
    plan = ancestral_reveal_steps(canvas.when, steps, canvas.schedule, last_step)
    for step, time in enumerate(step_times(steps, last_step)[:-1].tolist()):
        canvas.reveal(canvas.masked & (plan == step), time)
        yield
    yield from finish(canvas, last_step)


def first_hitting(canvas: Canvas) -> Iterator[None]:
    """First-hitting sampling (arXiv 2409.02908, Alg. 1): one token at a time, each row on its own clock.

    The limit of `ancestral` for infinitely many steps, at as many forwards as a row has masks. The first of n masked
    tokens is hit at 1 - gamma = (1 - gamma_t) max(u_1 .. u_n), so that the locked uniforms, sorted, give the clock.
    """
    start = canvas.schedule.gamma(torch.ones((), dtype=torch.float64))
    times = canvas.schedule.inverse(start + (1 - start) * canvas.when)
    order = rank(canvas.when, canvas.masked)
    for turn in range(canvas.masked.sum(dim=1).max()):
        hit = canvas.masked & (order == turn)
        canvas.reveal(hit, times.masked_fill(~hit, 0).sum(dim=1))
        yield


def random(canvas: Canvas, *, steps: int) -> Iterator[None]:
    """A uniformly random order with fixed counts: after k of N steps round(n k / N) of n masks are lifted.

    Another law than `ancestral`, whose counts are binomial and cost quality at few steps. min(steps, n) forwards a row.
    """
    order, goals = rank(canvas.when, canvas.masked), goals_of(canvas.masked, steps)
    for step in range(steps):
        canvas.reveal(canvas.masked & (order < goals[:, step + 1, None]), 1 - step / steps)
        yield


def rank(values: torch.Tensor, among: torch.BoolTensor) -> torch.LongTensor:
    """Place of each value [B, L] in its row, the smallest first; those not `among` come last. Ties keep their order."""
    return values.masked_fill(~among, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)


def goals_of(masked: torch.BoolTensor, steps: int) -> torch.LongTensor:
    """How many tokens of each row are revealed after 0 .. steps steps, [B, steps + 1]: round(n k / steps)."""
    n = masked.sum(dim=1, keepdim=True)
    return (2 * n * torch.arange(steps + 1) + steps) // (2 * steps)


# --- The original code, for the comparison with old tables


def legacy_ancestral(canvas: Canvas, *, steps: int, last_step: str | None = None) -> Iterator[None]:
    """`ancestral` as the original code of MDLM and SDTT draws it, truncated noise and all (see `draw_truncated`).

    There [MASK] takes part in the race, so that the truncation changes who is revealed as well: every masked position
    needs the head in every step, and fresh noise of the size of the vocabulary.
    """
    # A block has its own first step, and so its own noise.
    generators = [torch.Generator().manual_seed(key + canvas.step) for key in canvas.keys.tolist()]

    def draw(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        there, counts = (values.tolist() for values in rows.unique_consecutive(return_counts=True))
        noise = torch.cat(
            [torch.rand(n, logits.shape[-1], generator=generators[row]) for row, n in zip(there, counts, strict=True)]
        )
        return draw_truncated(
            logits, noise.to(logits.device), canvas.mask_token_id, chance, canvas.draw["temperature"]
        )

    times = step_times(steps, last_step)
    for time, (gamma_t, gamma_s) in zip(times.tolist(), pairwise(canvas.schedule.gamma(times).tolist()), strict=False):
        chance = (gamma_s - gamma_t) / (1 - gamma_t)
        if canvas.masked.any():
            where = canvas.masked
            tokens = canvas.ask(where, time).map(draw, where.nonzero()[:, 0])
            canvas.write(where, tokens)
            canvas.remask(torch.zeros_like(where).masked_scatter(where, (tokens == canvas.mask_token_id).cpu()))
        yield
    yield from finish(canvas, last_step)


# --- The order comes from the network, which is asked for every masked position


def confidence(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """The surest tokens first, by the log-probability of the likeliest one (MaskGIT, arXiv 2202.04200; LLaDA).

    Counts as in `random`. With `order_temperature` T the order is drawn without replacement, a position with weight
    exp(score / T), which is Gumbel noise times T on the scores (MaskGIT, Dream). min(steps, n) forwards a row.
    """
    return by_score(canvas, log_confidence, steps, order_temperature)


def entropy(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """As `confidence`, the lowest entropy first (Dream, arXiv 2508.15487)."""
    return by_score(canvas, negative_entropy, steps, order_temperature)


def margin(canvas: Canvas, *, steps: int, order_temperature: float = 0.0) -> Iterator[None]:
    """As `confidence`, the largest gap between the two likeliest tokens first (arXiv 2502.06768; Dream)."""
    return by_score(canvas, probability_margin, steps, order_temperature)


def by_score(canvas: Canvas, measure: Callable, steps: int, order_temperature: float) -> Iterator[None]:
    goals = goals_of(canvas.masked, steps)
    for step in range(steps):
        counts = goals[:, step + 1] - goals[:, step]
        where = canvas.masked & (counts > 0)[:, None]
        if where.any():
            answer = canvas.ask(where, 1 - step / steps)
            scores = answer.score(measure)
            if order_temperature:
                gumbel = -(-canvas.noise(canvas.step + 1)[0].clamp(min=2**-53).log()).log()
                scores = scores + order_temperature * gumbel
            answer.reveal(where & (rank(-scores, where) < counts[:, None]))
        yield


def adaptive(
    canvas: Canvas, *, threshold: float = 0.9, min_tokens: int = 1, max_tokens: int | None = None
) -> Iterator[None]:
    """Every token whose likeliest value is surer than a threshold, at least and at most so many (CD4LM's decoding).

    As many forwards as it takes: at most n / `min_tokens` for n masks, rounded up.
    """
    while canvas.masked.any():
        where = canvas.masked
        answer = canvas.ask(where, time_of(canvas))
        scores = answer.score(log_confidence)
        counts = (scores >= torch.tensor(threshold).log()).sum(dim=1).clamp(min_tokens, max_tokens)
        answer.reveal(where & (rank(-scores, where) < counts[:, None]))
        yield


def entropy_bound(canvas: Canvas, *, entropy_bound: float = 0.1) -> Iterator[None]:
    """The EB-Sampler (arXiv 2505.24857): the largest set U, lowest entropies first, with sum_U H - max_U H <= bound.

    The left side bounds what drawing the tokens of U independently loses. A bound of 0 reveals one token a forward, and
    those that are certain; as many forwards as it takes, at most n for n masks.
    """
    while canvas.masked.any():
        where = canvas.masked
        answer = canvas.ask(where, time_of(canvas))
        entropies, order = (-answer.score(negative_entropy).double()).sort(dim=1, stable=True)
        accepted = entropies.cumsum(dim=1) - entropies <= entropy_bound  # false behind the last masked: inf - inf
        answer.reveal(torch.zeros_like(where).scatter(1, order, accepted))
        yield


def time_of(canvas: Canvas) -> torch.Tensor:
    """The time at which as many tokens are masked as in each row, [B] float64, where no grid gives one."""
    return canvas.schedule.inverse(1 - canvas.masked.sum(dim=1).double() / canvas.fillable.sum(dim=1).clamp(min=1))


# --- Correcting: a token may be taken off the canvas again, and be drawn anew from a better context


def remdm(
    canvas: Canvas,
    *,
    steps: int,
    remasking: str = "cap",
    eta: float | None = None,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    last_step: str | None = None,
) -> Iterator[None]:
    """Remasking diffusion (ReMDM, arXiv 2503.00307): a visible token is masked again with probability sigma.

    A masked one is revealed with (gamma_s - (1 - sigma) gamma_t) / (1 - gamma_t), which keeps the number of visible
    tokens on its schedule for every sigma up to sigma_max = min(1, (1 - gamma_s) / gamma_t) that all tokens share.
    `remasking` says which:

    - "cap": min(eta, sigma_max), eta 0.008 by default.
    - "rescale": eta sigma_max, eta 0.015 by default.
    - "confidence": sigma_max, shared out over the visible tokens by the softmax of minus the probability that each had
      when it was revealed. At a masked token it is 0, so that the number of visible tokens falls behind its schedule.
    - "loop": gamma rises to `alpha_on` until t = `t_on`, rests there until `t_off` with sigma = eta, 0.02 by default, and
      rises to 1. The network is told the time at which the schedule has that gamma.

    Worth it at a hundred steps and more. At most `steps` forwards a row; a step that only remasks needs none.
    """
    eta = {"cap": 0.008, "rescale": 0.015, "loop": 0.02}.get(remasking) if eta is None else eta
    times = step_times(steps, last_step)
    gamma, told = canvas.schedule.gamma(times), times
    if remasking == "loop":
        gamma = loop_profile(times, t_on, t_off, alpha_on)
        told = canvas.schedule.inverse(gamma).clamp(max=1)  # at gamma = 0 the inverse lies beyond 1
    chances = torch.zeros(canvas.tokens.shape, dtype=torch.float64)  # of each visible token, when it was revealed
    for time, told_time, (gamma_t, gamma_s) in zip(
        times.tolist(), told.tolist(), pairwise(gamma.tolist()), strict=False
    ):
        sigma = min(1.0, (1 - gamma_s) / gamma_t) if gamma_t > 0 else 1.0
        if remasking == "cap":
            sigma = min(eta, sigma)
        elif remasking == "rescale":
            sigma = eta * sigma
        elif remasking == "loop":
            sigma = min(eta, sigma) if t_off < time <= t_on else 0.0
        else:
            visible = canvas.fillable & ~canvas.masked
            sigma = sigma * (-chances).masked_fill(~visible, -torch.inf).softmax(dim=1).nan_to_num(0)
        answer = correct(canvas, told_time, gamma_t, gamma_s, sigma)
        if remasking == "confidence" and answer is not None:
            tokens = canvas.tokens[tuple(map(canvas.send, answer.where.nonzero().unbind(dim=1)))]
            measure = functools.partial(probability_of, mask_token_id=canvas.mask_token_id)
            chances[answer.where] = answer.map(measure, tokens).cpu()
        yield
    yield from finish(canvas, last_step)


def psi(canvas: Canvas, *, steps: int, kappa: float = 0.98, last_step: str | None = None) -> Iterator[None]:
    """The psi-sampler of Duo, chapter 2 (arXiv 2602.21185), under absorbing noise.

    z_s is drawn from the posterior with probability kappa, and with 1 - kappa as fresh noise of level s on a draw of all
    clean tokens. That is ReMDM with sigma = (1 - kappa) (1 - gamma_s); kappa = 1 is `ancestral` with other noise.
    """
    times = step_times(steps, last_step)
    for time, (gamma_t, gamma_s) in zip(times.tolist(), pairwise(canvas.schedule.gamma(times).tolist()), strict=False):
        correct(canvas, time, gamma_t, gamma_s, (1 - kappa) * (1 - gamma_s))
        yield
    yield from finish(canvas, last_step)


def correct(canvas: Canvas, time: float, gamma_t: float, gamma_s: float, sigma: float | torch.Tensor) -> Answer | None:
    """One step of ReMDM's posterior with fresh noise. Who is revealed and who remasked is known before the forward.

    Returns:
        What the network said of the revealed tokens, if there are any.
    """
    when, which = canvas.noise(canvas.step + 1)
    reveal = canvas.masked & (when < (gamma_s - (1 - sigma) * gamma_t) / (1 - gamma_t))
    remask = canvas.fillable & ~canvas.masked & (when < sigma)
    answer = canvas.ask(reveal, time, sparing=True) if reveal.any() else None
    if answer is not None:
        answer.reveal(reveal, which)
    canvas.remask(remask)
    return answer


def loop_profile(times: torch.Tensor, t_on: float, t_off: float, alpha_on: float) -> torch.Tensor:
    """Visible fraction of ReMDM-loop: 0 -> alpha_on until t_on, alpha_on until t_off, and on to 1."""
    rising = (1 - times) * alpha_on / (1 - t_on)
    return torch.where(times > t_on, rising, 1 - times.clamp(max=t_off) * (1 - alpha_on) / t_off)


SAMPLERS = {
    sampler.__name__: sampler
    for sampler in (ancestral, first_hitting, random, confidence, entropy, margin, adaptive, entropy_bound, remdm, psi)
}


def uniform_ancestral(canvas: Canvas, *, steps: int, last_step: str = "ancestral") -> Iterator[None]:
    """Ancestral sampling of a uniform-state model (Duo): from noise, `steps` draws from the posterior and a last step.

    The last step takes what little noise is left at t = 1e-5: "ancestral" draws from the posterior of t = 0, "greedy"
    takes the network's likeliest token at every position (Duo's greedy tail), "none" leaves it, and saves a forward.
    """
    where, columns = canvas.fillable, tuple(map(canvas.send, canvas.fillable.nonzero().unbind(dim=1)))
    times = torch.linspace(1, TAIL, steps + 1, dtype=torch.float64).tolist()
    for t, s in pairwise([*times, 0.0] if last_step == "ancestral" else times):
        alpha_t, alpha_s = canvas.schedule.gamma(torch.tensor([t, s], dtype=torch.float64)).tolist()
        part, which = canvas.noise(canvas.step + 1)
        draw = functools.partial(draw_posterior, alpha_t=alpha_t, alpha_s=alpha_s, **canvas.draw)
        canvas.write(where, canvas.ask(where, t).map(draw, canvas.tokens[columns], part[where], which[where]))
        yield
    if last_step == "greedy":
        canvas.reveal(where, TAIL, greedy=True)
        yield
