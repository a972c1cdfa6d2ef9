"""The forward process: how noise turns clean tokens x_0 into z_t, and the bound on the likelihood that belongs to it.

Two kinds, with one interface (`process_of` gives that of a model's configuration):

    absorbing   a token stays with probability gamma_t and otherwise becomes [MASK] (MDLM, arXiv 2406.07524)
    uniform     a token stays with probability gamma_t and otherwise becomes a random token of the vocabulary; Duo (arXiv
                2506.10892) calls this gamma alpha

In both, one uniform number u for each token decides: where u <= gamma_t the token is still x_0. So the tokens that change at
one noise level are among those that change at any higher one.
"""

from dataclasses import dataclass

import torch

from .noise_schedule_mdlm import NoiseSchedule, noise_schedule_of


Noisy = tuple[torch.LongTensor, torch.BoolTensor]


def sigma_of(gamma: torch.Tensor) -> torch.Tensor:
    """Total noise sigma = -log gamma, float32: the noise level that a time-conditioned network takes."""
    return -gamma.log().float()


def masked_at(gamma: torch.Tensor, u: torch.Tensor) -> torch.BoolTensor:
    """A mask [B, L] of the tokens that are masked when tokens are visible with probability gamma [B]: u > gamma (MCD, Eq. 13).

    One u fixes a token's path: a token that is masked at one noise level is masked at every higher one.
    """
    return u > gamma[:, None]


def mask_tokens(x_0: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    return x_0.masked_fill(masked, mask_token_id)


def pick_uniformly(uniforms: torch.Tensor, vocab_size: int) -> torch.LongTensor:
    """Tokens drawn with equal probability, by uniforms in [0, 1) of any shape."""
    return (uniforms * vocab_size).long().clamp(max=vocab_size - 1)  # a product may round up to vocab_size


def other_tokens(x_0: torch.Tensor, uniforms: torch.Tensor, vocab_size: int) -> torch.LongTensor:
    """Tokens [B, L] other than x_0, drawn with equal probability: the runner-up of the Gaussian path, see `duality.py`."""
    other = pick_uniformly(uniforms, vocab_size - 1)
    return other + (other >= x_0)


def at_positions(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """For each of the R positions that a boolean mask [B, L] selects, the value of its row: values [B] -> [R]."""
    return values[:, None].expand(positions.shape)[positions]


def posterior_weights(
    x_hat_at_z: torch.Tensor, alpha_t: float, alpha_s: float, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights `stay` and `predict` of q(z_s | z_t, x_hat), a mixture of three distributions:

        q(z_s) = stay [z_s = z_t] + predict x_hat[z_s] + (1 - stay - predict) / K

    Args:
        x_hat_at_z: the network's probability of z_t, float64, any shape.
        alpha_t, alpha_s: alpha at t and at s < t.
    """
    seen = vocab_size * alpha_t * x_hat_at_z
    total = seen + 1 - alpha_t
    return (seen + alpha_t / alpha_s - alpha_t) / total, (alpha_s - alpha_t) / total


def uniform_nelbo(
    log_x_hat: torch.Tensor, z_t: torch.Tensor, x_0: torch.Tensor, alpha: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """Integrand over t of the Rao-Blackwellised continuous-time NELBO of uniform diffusion (Duo, Eq. 17), in nats, [R].

    With bar(y) = K alpha y + 1 - alpha, it is -alpha' / (K alpha) times

        K / bar(x_hat)[z_t] - K / bar(x)[z_t] + sum_j r_j log(r_j / r_hat_j)      r_j = bar(x)[j] / bar(x)[z_t]

    bar(x) takes only two values, whose ratio is kappa = (1 - alpha) / (K alpha + 1 - alpha). So the sum over j needs only the
    logarithms of bar(x_hat).

    Args:
        log_x_hat: the network's log-probabilities, [R, K], float32 or float64.
        z_t, x_0: noisy and clean tokens, [R].
        alpha, slope: gamma(t) and its derivative, [R], in the dtype of `log_x_hat`.
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


@dataclass(frozen=True)
class _Scheduled:
    schedule: NoiseSchedule
    vocab_size: int

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level at times t that the network takes, see `sigma_of`."""
        return sigma_of(self.schedule.gamma(t))


@dataclass(frozen=True)
class AbsorbingProcess(_Scheduled):
    """Noise that turns tokens into [MASK]."""

    mask_token_id: int

    def maskable(self, x_0: torch.Tensor) -> torch.BoolTensor:
        """The tokens that noise can change: all but a [MASK] in the given text, for which nothing can be predicted."""
        return x_0 != self.mask_token_id

    def prior(self, uniforms: torch.Tensor) -> torch.LongTensor:
        """z_1, of the uniforms' shape: [MASK] everywhere."""
        return torch.full_like(uniforms, self.mask_token_id, dtype=torch.long)

    def corrupt(self, x_0: torch.Tensor, gamma: torch.Tensor, u: torch.Tensor, maskable: torch.Tensor) -> Noisy:
        """z_t ~ q(. | x_0), and the positions that the bound scores at z_t: the masked ones.

        Args:
            x_0: [B, L] tokens.
            gamma: [B] float64, in [0, 1].
            u: [B, L] float64, in [0, 1).
            maskable: [B, L] bool; the other tokens stay clean and are not scored.
        """
        masked = masked_at(gamma, u) & maskable
        return mask_tokens(x_0, masked, self.mask_token_id), masked

    def coupled_pair(
        self,
        x_0: torch.Tensor,
        gamma_t: torch.Tensor,
        gamma_s: torch.Tensor,
        u: torch.Tensor,
        maskable: torch.Tensor,
    ) -> tuple[Noisy, Noisy]:
        """(z_t, m_t) and (z_s, m_s) on the path that u fixes, with m_s within m_t for s < t (MCD, Algorithm 1)."""
        return self.corrupt(x_0, gamma_t, u, maskable), self.corrupt(x_0, gamma_s, u, maskable)

    def token_weights(self, gamma: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """-gamma'(t) / (1 - gamma(t)): weight of the cross-entropy in the continuous-time NELBO (MDLM, Eq. 10)."""
        return -slope / (1 - gamma)

    def nelbo(
        self,
        log_p: torch.Tensor,
        z_t: torch.Tensor,
        x_0: torch.Tensor,
        gamma: torch.Tensor,
        slope: torch.Tensor,
    ) -> torch.Tensor:
        """Integrand over t of the continuous-time NELBO (MDLM, Eq. 10) at masked positions, in nats, [R].

        Args:
            log_p: the network's log-probabilities, [R, V].
            z_t, x_0: noisy and clean tokens, [R].
            gamma, slope: gamma(t) and its derivative, [R].
        """
        return -log_p.gather(-1, x_0[:, None])[:, 0] * self.token_weights(gamma, slope)


@dataclass(frozen=True)
class UniformProcess(_Scheduled):
    """Noise that turns a token into any token of the vocabulary. Its gamma is what the papers call alpha."""

    mask_token_id = None

    def maskable(self, x_0: torch.Tensor) -> torch.BoolTensor:
        """The tokens that noise can change: all of them."""
        return torch.ones_like(x_0, dtype=torch.bool)

    def prior(self, uniforms: torch.Tensor) -> torch.LongTensor:
        """z_1, of the uniforms' shape: random tokens."""
        return pick_uniformly(uniforms, self.vocab_size)

    def corrupt(
        self,
        x_0: torch.Tensor,
        gamma: torch.Tensor,
        u: torch.Tensor,
        maskable: torch.Tensor,
        pick: torch.Tensor | None = None,
    ) -> Noisy:
        """z_t ~ q(. | x_0), and the positions that the bound scores at z_t: all maskable ones.

        Args:
            x_0: [B, L] tokens.
            gamma: [B] float64, in [0, 1).
            u: [B, L] float64, in [0, 1).
            maskable: [B, L] bool; the other tokens stay clean and are not scored.
            pick: [B, L] float64, in [0, 1), picks the token. By default u does both: given u > gamma,
                (u - gamma) / (1 - gamma) is uniform again. With a u that is locked across tokens it would tell where noise is.
        """
        gamma = gamma[:, None]
        picked = pick_uniformly((u - gamma) / (1 - gamma) if pick is None else pick, self.vocab_size)
        return torch.where((u <= gamma) | ~maskable, x_0, picked), maskable

    def coupled_pair(
        self,
        x_0: torch.Tensor,
        alpha_t: torch.Tensor,
        alpha_s: torch.Tensor,
        u: torch.Tensor,
        maskable: torch.Tensor,
        second: torch.Tensor,
    ) -> tuple[Noisy, Noisy]:
        """(z_t, maskable) and (z_s, maskable) on one path of Duo's Gaussian latent, without the Gaussian (`duality.py`).

        The latent's argmax is x_0 while u <= F_Y(a_t / s_t) = alpha_t + (1 - alpha_t) / K. After that it is always the same
        other token, which the uniforms `second` [B, L] pick.
        """
        other = other_tokens(x_0, second, self.vocab_size)

        def at(alpha: torch.Tensor) -> Noisy:
            visible = u <= (alpha + (1 - alpha) / self.vocab_size)[:, None]
            return torch.where(visible | ~maskable, x_0, other), maskable

        return at(alpha_t), at(alpha_s)

    def nelbo(
        self,
        log_p: torch.Tensor,
        z_t: torch.Tensor,
        x_0: torch.Tensor,
        gamma: torch.Tensor,
        slope: torch.Tensor,
    ) -> torch.Tensor:
        """See `uniform_nelbo`: nats, [R]."""
        return uniform_nelbo(log_p, z_t, x_0, gamma.to(log_p.dtype), slope.to(log_p.dtype))


Process = AbsorbingProcess | UniformProcess


def process_of(config) -> Process:
    """The forward process that a model's configuration names (`diffusion_kind`, `noise_schedule`, `noise_epsilon`)."""
    schedule = noise_schedule_of(config)
    if config.diffusion_kind == "uniform":
        return UniformProcess(schedule, config.vocab_size)
    return AbsorbingProcess(schedule, config.vocab_size, config.mask_token_id)
