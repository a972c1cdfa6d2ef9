"""Divergences between token distributions under SUBS, one value a row, in float32 whatever the autocast.

Every row is a masked position: SUBS gives [MASK] no probability and normalises over the other tokens. (On visible
positions SUBS is a point mass on the token itself, and nothing here is ever asked about those.)
"""

import torch


MASK_LOGIT = -1e6  # Finite, as in the published code: 0 * log(0) is then 0 and not NaN in a divergence.


def subs_log_probabilities(logits: torch.Tensor, mask_token_id: int, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [rows, V] of softmax(logits / temperature) without [MASK]; float32, or float64 for float64 logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_token_id
    return logits.masked_fill(is_mask, MASK_LOGIT).log_softmax(dim=-1)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each row, [rows, V] -> [rows]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def cross_entropy(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """-log p(token) of each row, [rows, V] and [rows] -> [rows]."""
    return -log_p.gather(-1, tokens[:, None])[:, 0]
