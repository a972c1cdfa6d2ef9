"""The Gaussian side of discrete diffusion: latent paths, their projection to tokens, and the scalar that locks each path.

    w_t = a_t x_0 + s_t eps          x_0 one-hot over K tokens, eps ~ N(0, I_K), a_t^2 + s_t^2 = 1
    Y   = max_{j != k} eps_j - eps_k                                                   k the token of x_0

Token k holds the largest coordinate of w_t exactly while Y < a_t / s_t. So one scalar, u = F_Y(Y) ~ U[0, 1], decides the
token's path: it is compared with F_Y(a_t / s_t) = E_e[ Phi(a_t / s_t + e)^(K - 1) ], e ~ N(0, 1). Two projections are in use:

    masked (Latent Shadows, arXiv 2602.00792)   x_0 while it is largest, else [MASK]     F_Y(a_t / s_t) = gamma_t
    argmax (Duo, arXiv 2506.10892)              the largest coordinate's token           F_Y(a_t / s_t) = alpha_t + (1 - alpha_t) / K

Training draws u directly (`trajectories.py`) and uses only `uniform_alpha` from this file. The rest shows, in
tests/test_duality.py, that nothing is lost by that.
"""

import math

import torch


# Quadrature nodes, relative to the integrand's mode. From there the integrand falls at least as fast as a standard normal
# density, so all but e^-40 of it lies within +-9; the trapezoid rule converges faster than any power of the spacing.
NODES = torch.linspace(-9, 9, 513, dtype=torch.float64)
BRACKET = (-60.0, 60.0)  # where the inverse is sought: F_Y(-60) is below the smallest float64 for every K


def log_locking_cdf(y: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """log F_Y(y), where F_Y(y) is the integral of phi(e) Phi(y + e)^(K - 1) de (Latent Shadows, Lemma 3.1); by quadrature.

    Args:
        y: any shape, within `BRACKET`.
        vocab_size: K, at least 2.

    Returns:
        float64, of the shape of `y`; the relative error of F_Y is below 1e-9 for K up to 200,000.

    Raises:
        ValueError: `vocab_size` is below 2.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, not {vocab_size}: there must be another token")
    y = y.double()[..., None]
    mode = _mode_of_integrand(y, vocab_size - 1)
    e = mode + NODES.to(y.device)
    log_integrand = -(e**2) / 2 - math.log(2 * math.pi) / 2 + (vocab_size - 1) * torch.special.log_ndtr(y + e)
    return log_integrand.logsumexp(dim=-1) + math.log(NODES[1] - NODES[0])


def _mode_of_integrand(y: torch.Tensor, power: int) -> torch.Tensor:
    """The e that maximises -e^2 / 2 + power log Phi(y + e), found by bisection: its derivative falls and has one root."""
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
    """F_Y^{-1}: the ratio a_t / s_t at which x_0 holds the largest coordinate with this probability, found by bisection.

    Probabilities below 1 / K need a negative ratio, that is, a negative a_t: under noise alone every token has the largest
    coordinate with probability 1 / K, so x_0 must be pushed down to have it less often. Latent Shadows does not say so.

    Args:
        probability: any shape, in (0, 1]; at 1 the ratio is infinite (no noise).
        vocab_size: K, at least 2.

    Returns:
        float64, of the shape of `probability`.

    Raises:
        ValueError: a probability is outside (0, 1].
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
    """Duo's operator T: the argmax of a Gaussian diffusion is a uniform-state diffusion, and this is its alpha_t (Duo, Eq. 10).

    The argmax is x_0 with probability F_Y(ratio), and otherwise any other token: q = alpha [x_0] + (1 - alpha) / K.

    Args:
        ratio: a_t / s_t, the square root of the signal-to-noise ratio; any shape.

    Returns:
        float64, of the shape of `ratio`.
    """
    return (vocab_size * locking_cdf(ratio, vocab_size) - 1) / (vocab_size - 1)


def uniform_ratio(alpha: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The inverse of `uniform_alpha`. It is never negative, since alpha >= 0 means F_Y >= 1 / K."""
    return locking_quantile(alpha + (1 - alpha) / vocab_size, vocab_size)


def latent(x_0: torch.Tensor, eps: torch.Tensor, ratio: torch.Tensor | float) -> torch.Tensor:
    """The latent w_t = a_t x_0 + s_t eps, [..., K]; its path over t depends only on (x_0, eps) (Prop. 3.2).

    Args:
        x_0: tokens [...], int64.
        eps: [..., K] standard normal noise.
        ratio: a_t / s_t, of the shape of `x_0` or one number for all.
    """
    angle = torch.as_tensor(ratio, dtype=eps.dtype, device=eps.device).expand(x_0.shape).atan()[..., None]
    return torch.cos(angle) * eps + torch.sin(angle) * torch.nn.functional.one_hot(x_0, eps.shape[-1])


def is_largest(w_t: torch.Tensor, x_0: torch.Tensor) -> torch.Tensor:
    """Whether x_0's coordinate of w_t [..., K] is the largest, [...]: the masked projection then shows the token."""
    others = w_t.scatter(-1, x_0[..., None], -torch.inf).amax(dim=-1)
    return w_t.gather(-1, x_0[..., None])[..., 0] > others


def locking_scalar(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """u = F_Y(Y) [...], uniform on [0, 1]: x_0's coordinate is the largest at t exactly when u < F_Y(a_t / s_t) (Thm 3.3)."""
    others = eps.scatter(-1, x_0[..., None], -torch.inf).amax(dim=-1)
    return locking_cdf(others - eps.gather(-1, x_0[..., None])[..., 0], eps.shape[-1])


def runner_up(x_0: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The token [...] that the argmax projection shows whenever x_0's coordinate is not the largest; the same at every time.

    It is uniform over the other K - 1 tokens and independent of u, because the identity of the largest of the others says
    nothing about its value. So u and the runner-up together determine Duo's coupled paths.
    """
    return eps.scatter(-1, x_0[..., None], -torch.inf).argmax(dim=-1)
