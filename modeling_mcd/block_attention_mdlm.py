"""Who sees whom in a block model: each token its own block and the blocks before it (BD3-LM, arXiv 2503.09573)."""

import torch


MASKED_ATTENTION = ("sdpa", "eager")  # the attention implementations that take a mask of [B, 1, Q, K]


def sees_blocks(blocks: torch.LongTensor, seen: torch.BoolTensor | None) -> torch.BoolTensor:
    """A mask [B, L, L]: each token sees the tokens of its own block and of those before it.

    Args:
        blocks: [B, L], the number of each token's block.
        seen: [B, L], False for padding, which only itself sees; None for no padding.
    """
    mask = blocks[:, None, :] <= blocks[:, :, None]
    return mask if seen is None else hide(mask, seen)


def sees_clean_blocks(blocks: torch.LongTensor, seen: torch.BoolTensor | None) -> torch.BoolTensor:
    """A mask [B, 2 L, 2 L] for noisy tokens, followed by the clean ones: training in one forward (BD3-LM, Sec. 3.2 and 5.2).

    A noisy token sees its own block of the noisy half and the blocks before it of the clean half: what it will see when
    its block is sampled. A clean token sees the clean blocks up to its own.

    Args:
        blocks, seen: of one half, see `sees_blocks`.
    """
    queries, keys = blocks[:, :, None], blocks[:, None, :]
    noisy = torch.cat([queries == keys, keys < queries], dim=2)
    clean = torch.cat([torch.zeros_like(queries == keys), keys <= queries], dim=2)
    mask = torch.cat([noisy, clean], dim=1)
    return mask if seen is None else hide(mask, seen.repeat(1, 2))


def hide(mask: torch.BoolTensor, seen: torch.BoolTensor) -> torch.BoolTensor:
    """The mask [B, N, N] without padding, which sees itself, since a softmax over nothing is not a number."""
    return (mask & seen[:, None, :]) | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def attention_bias(mask: torch.BoolTensor, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """The mask [B, Q, K] as an attention implementation of transformers takes it: [B, 1, Q, K], added to the scores or bool.

    Raises:
        ValueError: the implementation takes no such mask.
    """
    check_attention(implementation)
    mask = mask[:, None]
    if implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def check_attention(implementation: str):
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {implementation!r}, but block attention and caches need one of {MASKED_ATTENTION}: "
            "call model.set_attn_implementation('sdpa')"
        )
