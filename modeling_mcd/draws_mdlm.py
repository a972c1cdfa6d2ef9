"""From logits to tokens (float64 by default), and from logits to confidence scores."""

import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from .forward_process_mdlm import pick_uniformly, posterior_weights
from .head_mdlm import exclude_mask


PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def substitute(logits: torch.Tensor, mask_token_id: int | None, dtype: torch.dtype) -> torch.Tensor:
    """A copy of logits [rows, V] in which [MASK] has probability zero at any temperature, see `exclude_mask`."""
    return exclude_mask(logits.to(dtype, copy=True), mask_token_id, -torch.inf)


def keep_likeliest(scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Scores [rows, V] with -inf outside the `top_k` likeliest tokens, and then outside the nucleus of mass `top_p`."""
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = scores.masked_fill(
            TopPLogitsWarper(top_p)(None, scores / (temperature or 1)) == -torch.inf, -torch.inf
        )
    return scores


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    mask_token_id: int | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.LongTensor:
    """Draws one token for each row from the SUBS distribution softmax(logits / temperature), which excludes [MASK].

    It inverts the cumulative distribution, which is exact to the 53 bits of a float64 uniform. The usual Gumbel trick in
    float32 truncates the noise and so lowers the temperature (arXiv 2409.02908). Temperature 0 takes the likeliest token.

    Args:
        logits: [rows, V], any floating dtype.
        uniforms: [rows], float64, in [0, 1).
        mask_token_id: never drawn; None where the vocabulary has no [MASK] (uniform diffusion).
        temperature: at least 0.
        top_k, top_p: see `keep_likeliest`.
        dtype: of the arithmetic.

    Returns:
        [rows] int64; -1 where the logits hold a NaN, or +inf, or nothing but -inf.
    """
    scores = keep_likeliest(substitute(logits, mask_token_id, dtype), temperature, top_k, top_p)
    best = scores.amax(dim=-1, keepdim=True)
    if temperature < torch.finfo(dtype).tiny:
        return scores.argmax(dim=-1).where(best[:, 0].isfinite(), -1)
    scores.sub_(best)  # before the division: no temperature is too small
    if temperature != 1:
        scores.div_(temperature)
    cumulative = scores.exp_().cumsum_(dim=-1)
    # Scaling by the last entry absorbs the rounding of the sum; `right=True` skips tokens of probability zero.
    total = cumulative[:, -1:]
    targets = torch.minimum(uniforms[:, None].to(dtype) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].where(total[:, 0].isfinite(), -1)


def draw_truncated(
    logits: torch.Tensor,
    noise: torch.Tensor,
    mask_token_id: int,
    reveal: float,
    temperature: float = 1.0,
) -> torch.LongTensor:
    """The draw of the original code (MDLM, SDTT), flaw included: 24-bit float32 noise truncates the Gumbel variable.

    Token v has the weight `reveal` p(v), and [MASK] has 1 - `reveal`. Each weight is divided by an exponential variable, and
    the largest quotient wins. The smallest variable that can be drawn is 2^-24, so tokens with `reveal` p(v) below that win
    too rarely: a lower temperature in disguise (arXiv 2409.02908, Sec. 4).

    Args:
        logits: [rows, V].
        noise: [rows, V], float32 uniforms in [0, 1).
        reveal: probability that the mask is lifted in this step.

    Returns:
        [rows] int64: `mask_token_id` where the token stays masked, and -1 where the logits hold a NaN.
    """
    weights = substitute(logits, mask_token_id, torch.float32).div_(temperature).softmax(dim=-1).mul_(reveal)
    weights[:, mask_token_id] += 1 - reveal
    race = weights.div_(noise.add(1e-10).log_().neg_().add_(1e-10))
    return race.argmax(dim=-1).where(~race[:, 0].isnan(), -1)


# --- Confidence scores: [rows, V] -> [rows] float32; larger means more certain


def log_confidence(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """log-probability of the likeliest token: max - logsumexp (MaskGIT, arXiv 2202.04200; LLaDA, arXiv 2502.09992)."""
    scores = substitute(logits, mask_token_id, torch.float32)
    return scores.amax(dim=-1) - scores.logsumexp(dim=-1)


def probability_margin(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Probability of the likeliest token minus that of the second likeliest (top-k margin, arXiv 2502.06768; Dream)."""
    scores = substitute(logits, mask_token_id, torch.float32)
    first, second = (scores.topk(2, dim=-1).values - scores.logsumexp(dim=-1, keepdim=True)).exp().unbind(dim=-1)
    return first - second


def negative_entropy(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """sum p log p, in nats (Dream; EB-Sampler, arXiv 2505.24857)."""
    return -torch.special.entr(substitute(logits, mask_token_id, torch.float32).softmax(dim=-1)).sum(dim=-1)


def probability_of(
    logits: torch.Tensor, tokens: torch.Tensor, mask_token_id: int | None, temperature: float = 1.0
) -> torch.Tensor:
    """Probability of one given token in each row: [rows, V] and [rows] -> [rows] float64."""
    if temperature == 0:
        return (logits.argmax(dim=-1) == tokens).double()
    scores = substitute(logits, mask_token_id, torch.float64)
    scores = scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperature)
    return scores.softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]


def draw_and_score(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    mask_token_id: int | None,
    order: str,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`draw_tokens`, and how certain each draw is by the very distribution that it comes from (Dream, arXiv 2508.15487).

    Args:
        order: "confidence", the probability of the drawn token; "margin", the gap between the two likeliest tokens; or
            "entropy", sum p log p. At temperature 0 of the distribution at temperature 1, after top_k and top_p.

    Returns:
        [rows, 2] float64: token, and score; -1 and infinity where the logits give no token.
    """
    scores = keep_likeliest(substitute(logits, mask_token_id, dtype), temperature, top_k, top_p)
    tokens = draw_tokens(scores, uniforms, None, temperature, dtype=dtype)
    p = scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperature or 1).softmax(dim=-1)
    if order == "confidence":
        certain = p.gather(-1, tokens.clamp(min=0)[:, None])[:, 0]
    elif order == "margin":
        certain = p.topk(2, dim=-1).values.diff(dim=-1)[:, 0].neg()
    else:
        certain = -torch.special.entr(p).sum(dim=-1)
    return torch.stack([tokens.double(), certain.double().where(tokens >= 0, torch.inf)], dim=1)


def draw_posterior(
    logits: torch.Tensor,
    z_t: torch.Tensor,
    part: torch.Tensor,
    choice: torch.Tensor,
    alpha_t: float,
    alpha_s: float,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.LongTensor:
    """Draws z_s for each row from q(z_s | z_t, x_hat): first a component of the mixture, then a token from it.

    Most rows keep their token, so only a few need a draw over the vocabulary.

    Args:
        logits: [rows, V], any floating dtype.
        z_t: [rows] tokens.
        part, choice: [rows] float64 in [0, 1): they pick the component of the mixture, and the token from it.
        alpha_t, alpha_s: alpha at t and at s < t.
        temperature, top_k, top_p, dtype: how x_hat is computed from the logits, see `draw_tokens`.

    Returns:
        [rows] int64; -1 where the logits hold a NaN.
    """
    logits, vocab_size = keep_likeliest(logits.to(dtype), temperature, top_k, top_p), logits.shape[-1]
    stay, predict = posterior_weights(probability_of(logits, z_t, None, temperature), alpha_t, alpha_s, vocab_size)
    predicted = (part >= stay) & (part < stay + predict)
    z_s = torch.where(part < stay, z_t, pick_uniformly(choice, vocab_size))
    z_s[predicted] = draw_tokens(logits[predicted], choice[predicted], None, temperature, dtype=dtype)
    return z_s.masked_fill(stay.isnan(), -1)
