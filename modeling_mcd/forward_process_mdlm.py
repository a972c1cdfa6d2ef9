"""The forward process: how noise turns clean tokens into z_t, its posterior, and the bound that belongs to it."""

import torch

from .noise_schedule_mdlm import NoiseSchedule


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


def masked_at(gamma: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, L] are masked at visible probability gamma [B]: those with u > gamma (MCD, Eq. 13).

    One u fixes a token's whole path: what is masked at a smaller noise is masked at every larger one.
    """
    return u > gamma[:, None]


def mask_tokens(input_ids: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    return input_ids.masked_fill(masked, mask_token_id)


def other_tokens(x_0: torch.Tensor, uniforms: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """A token drawn uniformly from all but x_0, [B, L]: the runner-up of the Gaussian path, see `duality.py`."""
    other = (uniforms * (vocab_size - 1)).long().clamp(max=vocab_size - 2)
    return other + (other >= x_0)


def uniform_state(x_0: torch.Tensor, other: torch.Tensor, alpha: torch.Tensor, u: torch.Tensor, vocab_size: int):
    """z_t [B, L] of uniform-state diffusion at alpha [B]: the argmax of Duo's Gaussian latent, without the Gaussian.

    x_0 while u <= F_Y(a_t / s_t) = alpha + (1 - alpha) / K, and from then on always the same other token. One u and one
    other token fix the whole path, as one u does for masks (`duality.py` and its tests).
    """
    return torch.where(u <= (alpha + (1 - alpha) / vocab_size)[:, None], x_0, other)


def nelbo_weight(schedule: NoiseSchedule, t: torch.Tensor) -> torch.Tensor:
    """-gamma'(t) / (1 - gamma(t)): weight of the cross-entropy in the continuous-time NELBO (MDLM, Eq. 10)."""
    return -schedule.derivative(t) / (1 - schedule.gamma(t))
