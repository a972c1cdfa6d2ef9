"""The Gaussian side of discrete diffusion: latent paths, their projection to tokens, and the one scalar that locks them.

    w_t = a_t x_0 + s_t eps          x_0 one-hot over K tokens, eps ~ N(0, I_K), a_t^2 + s_t^2 = 1
    Y   = max_{j != k} eps_j - eps_k                                                   k the token of x_0

Token k holds the largest coordinate of w_t exactly while Y < a_t / s_t, so one scalar decides the token's whole path:
u = F_Y(Y) ~ U[0, 1] against F_Y(a_t / s_t) = E_e[ Phi(a_t / s_t + e)^(K - 1) ], e ~ N(0, 1). Two projections are in use:

    masked (Latent Shadows, arXiv 2602.00792)   x_0 while it is largest, else [MASK]     F_Y(a_t / s_t) = gamma_t
    argmax (Duo, arXiv 2506.10892)              the largest coordinate's token           F_Y(a_t / s_t) = alpha_t + (1 - alpha_t) / K

Training needs none of this: `trajectories.py` draws u itself. Here it is shown that nothing is lost by that.
"""

import math

import torch


# Of the quadrature, around the integrand's mode. The integrand falls at least as fast as a standard normal density from
# there, so that all but e^-40 of it lies within +-9; and the trapezoid rule converges faster than any power of the width.
NODES = torch.linspace(-9, 9, 513, dtype=torch.float64)
BRACKET = (-60.0, 60.0)  # of the inverse: F_Y(-60) is below the smallest float64 for every K


def log_locking_cdf(y: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """log F_Y(y), F_Y(y) = integral of phi(e) Phi(y + e)^(K - 1) de, by quadrature in log space (Latent Shadows, Lemma 3.1).

    Args:
        y: any shape, within `BRACKET`.
        vocab_size: K, at least 2.

    Returns:
        float64, of the shape of `y`; the relative error of F_Y is below 1e-9 for K up to 200,000.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, not {vocab_size}: there is no other token to win")
    y = y.double()[..., None]
    mode = _mode_of_integrand(y, vocab_size - 1)
    e = mode + NODES.to(y.device)
    log_integrand = -(e**2) / 2 - math.log(2 * math.pi) / 2 + (vocab_size - 1) * torch.special.log_ndtr(y + e)
    return log_integrand.logsumexp(dim=-1) + math.log(NODES[1] - NODES[0])


def _mode_of_integrand(y: torch.Tensor, power: int) -> torch.Tensor:
    """The e that maximises -e^2 / 2 + power log Phi(y + e): the one root of its falling derivative, by bisection."""
    low, high = torch.zeros_like(y), y.abs() + math.sqrt(2 * math.log(power + 1)) + 2
    for _ in range(40):
        middle = (low + high) / 2
        x = y + middle
        slope = power * torch.exp(-(x**2) / 2 - torch.special.log_ndtr(x)) / math.sqrt(2 * math.pi) - middle
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return low


def locking_cdf(y: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """F_Y(y), see `log_locking_cdf`. F_Y(0) = 1 / K."""
    return log_locking_cdf(y, vocab_size).exp()


def locking_quantile(probability: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """F_Y^{-1}: the ratio a_t / s_t at which x_0 holds the largest coordinate with this probability. By bisection.

    Probabilities below 1 / K need a negative ratio, that is a negative a_t: noise alone lets every token win with
    probability 1 / K, and to win less often than that x_0 must be pushed down. Latent Shadows does not say so.

    Args:
        probability: any shape, in (0, 1]; at 1 the ratio is infinite (no noise).
        vocab_size: K, at least 2.

    Returns:
        float64, of the shape of `probability`.
    """
    probability = probability.double()
    if not ((probability > 0) & (probability <= 1)).all():
        raise ValueError(f"probabilities must lie in (0, 1], not {probability.min()} .. {probability.max()}")
    target = probability.log()
    low, high = (torch.full_like(target, end) for end in BRACKET)
    for _ in range(60):
        middle = (low + high) / 2
        below = log_locking_cdf(middle, vocab_size) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(probability == 1, torch.inf, (low + high) / 2)


def uniform_alpha(ratio: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Duo's operator T: alpha_t of the uniform-state diffusion that the argmax of a Gaussian one is (Duo, Eq. 10).

    The argmax is x_0 with probability F_Y(ratio), and else any other token: q = alpha [x_0] + (1 - alpha) / K.

    Args:
        ratio: a_t / s_t, the square root of the signal-to-noise ratio; any shape.
    """
    return (vocab_size * locking_cdf(ratio, vocab_size) - 1) / (vocab_size - 1)


def uniform_ratio(alpha: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The inverse of `uniform_alpha`: never negative, since alpha >= 0 is F_Y >= 1 / K."""
    return locking_quantile(alpha + (1 - alpha) / vocab_size, vocab_size)


def latent(x_0: torch.Tensor, eps: torch.Tensor, ratio: torch.Tensor | float) -> torch.Tensor:
    """w_t = a_t x_0 + s_t eps, [..., K]; the path over t is a function of (x_0, eps) alone (Prop. 3.2).

    Args:
        x_0: tokens [...], int64.
        eps: [..., K].
        ratio: a_t / s_t, of the shape of `x_0` or one for all.
    """
    angle = torch.as_tensor(ratio, dtype=eps.dtype, device=eps.device).expand(x_0.shape).atan()[..., None]
    return torch.cos(angle) * eps + torch.sin(angle) * torch.nn.functional.one_hot(x_0, eps.shape[-1])


def is_largest(w_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """Whether x_0's coordinate of w_t [..., K] is larger than every other: the token is then visible (masked projection)."""
    others = w_t.scatter(-1, x_0[..., None], -torch.inf).amax(dim=-1)
    return w_t.gather(-1, x_0[..., None])[..., 0] > others


def locking_scalar(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """u = F_Y(Y), uniform on [0, 1]: x_0 is the largest at t exactly when u < F_Y(a_t / s_t) (Thm 3.3)."""
    others = eps.scatter(-1, x_0[..., None], -torch.inf).amax(dim=-1)
    return locking_cdf(others - eps.gather(-1, x_0[..., None])[..., 0], eps.shape[-1])


def runner_up(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The token that the argmax projection shows wherever x_0 is not the largest: the same at every such time.

    Uniform over the other K - 1 tokens and independent of u, because which of the others is largest tells nothing about
    how large it is. So (u, runner-up) is the whole law of Duo's coupled paths.
    """
    return eps.scatter(-1, x_0[..., None], -torch.inf).argmax(dim=-1)
