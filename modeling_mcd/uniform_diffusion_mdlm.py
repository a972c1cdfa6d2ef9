"""Uniform-state diffusion (UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892): noise turns a token into any token.

    q(z_t | x) = alpha_t [z_t = x] + (1 - alpha_t) / K                alpha_t = gamma(t), K tokens in the vocabulary

`x_hat`, the softmax of the network over all K tokens, stands for x in the posterior and in the bound. It is what the
network makes of the other tokens: the posterior takes z_t itself into account.
"""

import functools
from collections.abc import Iterator
from itertools import pairwise

import torch

from .canvas_mdlm import Canvas
from .draws_mdlm import draw_tokens, keep_likeliest, probability_of
from .sampling_mdlm import TAIL


def corrupt_uniformly(x_0: torch.Tensor, gamma: torch.Tensor, u: torch.Tensor, vocab_size: int) -> torch.LongTensor:
    """z_t ~ q(. | x_0): a token stays where u <= gamma, and becomes any token, itself included, elsewhere.

    One uniform does both: given u > gamma, (u - gamma) / (1 - gamma) is uniform again.

    Args:
        x_0: [B, L] tokens.
        gamma: [B] float64, in [0, 1).
        u: [B, L] float64, in [0, 1).
    """
    gamma = gamma[:, None]
    return torch.where(u <= gamma, x_0, pick_uniformly((u - gamma) / (1 - gamma), vocab_size))


def pick_uniformly(uniforms: torch.Tensor, vocab_size: int) -> torch.LongTensor:
    return (uniforms * vocab_size).long().clamp(max=vocab_size - 1)  # a product may round up to vocab_size


def posterior_weights(
    x_hat_at_z: torch.Tensor, alpha_t: float, alpha_s: float, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `stay` and `predict` of q(z_s | z_t, x_hat), which is a mixture of three distributions:

        q(z_s) = stay [z_s = z_t] + predict x_hat[z_s] + (1 - stay - predict) / K

    Args:
        x_hat_at_z: probability that the network gives to z_t, float64, any shape.
        alpha_t, alpha_s: alpha at t and at s < t.
    """
    seen = vocab_size * alpha_t * x_hat_at_z
    total = seen + 1 - alpha_t
    return (seen + alpha_t / alpha_s - alpha_t) / total, (alpha_s - alpha_t) / total


def draw_posterior(
    logits: torch.Tensor,
    z_t: torch.Tensor,
    part: torch.Tensor,
    which: torch.Tensor,
    alpha_t: float,
    alpha_s: float,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.LongTensor:
    """Draws z_s of each row from q(z_s | z_t, x_hat) in float64: first a part of the mixture, then a token of that part.

    Most rows stay, so only a few take the draw over the whole vocabulary.

    Args:
        logits: [rows, V], any floating dtype.
        z_t: [rows] tokens.
        part, which: [rows], float64 in [0, 1): which part, and which token of it.
        temperature, top_k, top_p: what makes x_hat of the logits, see `draw_tokens`; so does `dtype`.

    Returns:
        [rows] int64; -1 where the logits hold a NaN.
    """
    logits, vocab_size = keep_likeliest(logits.to(dtype), temperature, top_k, top_p), logits.shape[-1]
    stay, predict = posterior_weights(probability_of(logits, z_t, None, temperature), alpha_t, alpha_s, vocab_size)
    predicted = (part >= stay) & (part < stay + predict)
    z_s = torch.where(part < stay, z_t, pick_uniformly(which, vocab_size))
    z_s[predicted] = draw_tokens(logits[predicted], which[predicted], None, temperature, dtype=dtype)
    return z_s.masked_fill(stay.isnan(), -1)


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


def uniform_nelbo(
    log_x_hat: torch.Tensor, z_t: torch.Tensor, x_0: torch.Tensor, alpha: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """Integrand over t of the continuous-time NELBO, Rao-Blackwellised (Duo, Eq. 17): nats of each row, [rows].

    With bar(y) = K alpha y + 1 - alpha, it is -alpha' / (K alpha) times

        K / bar(x_hat)[z_t] - K / bar(x)[z_t] + sum_j r_j log(r_j / r_hat_j)      r_j = bar(x)[j] / bar(x)[z_t]

    and bar(x) has two values only, of ratio kappa = (1 - alpha) / (K alpha + 1 - alpha), so that the sum over j needs
    nothing but the logarithms of bar(x_hat).

    Args:
        log_x_hat: log-probabilities of the network, [rows, K], float32 or float64.
        z_t, x_0: noisy and clean token, [rows].
        alpha, slope: gamma(t) and its derivative, [rows], in the dtype of `log_x_hat`.
    """
    vocab_size = log_x_hat.shape[-1]
    low = (1 - alpha).clamp(min=torch.finfo(alpha.dtype).eps)  # near t = 0, alpha rounds to 1
    high = vocab_size * alpha + low
    log_bar = (vocab_size * alpha[:, None] * log_x_hat.exp() + low[:, None]).log()
    at_z, at_x = log_bar.gather(-1, z_t[:, None])[:, 0], log_bar.gather(-1, x_0[:, None])[:, 0]
    spread = (at_z[:, None] - log_bar).sum(dim=-1)  # sum_j log(bar(x_hat)[z_t] / bar(x_hat)[j])
    kappa = low / high
    clean = z_t == x_0
    divergence = torch.where(
        clean,
        kappa * (spread + (vocab_size - 1) * kappa.log()),
        spread + vocab_size * alpha / low * (at_z - at_x) - kappa.log() / kappa,
    )
    rates = vocab_size / at_z.exp() - vocab_size / torch.where(clean, high, low)
    return -slope / (vocab_size * alpha) * (rates + divergence)
