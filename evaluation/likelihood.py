"""Likelihood on held-out blocks: the NELBO, and the loss of an autoregressive model. That of a sampler: `sampler_likelihood.py`."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from evaluation.generative_perplexity import sequence_nll
from modeling_mcd.checks_mdlm import COUNT, check_number, check_shape
from modeling_mcd.forward_process_mdlm import process_of, sigma_of


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p of some blocks: what `step_bound` and `block_nelbo` return.

    Args:
        nats: [n] float64, CPU: of each block.
        tokens: [n] int64, CPU: how many of its tokens were scored.
        exact: whether `nats` are -log p itself: the sampler has one path to each text.
    """

    nats: torch.DoubleTensor
    tokens: torch.LongTensor
    exact: bool = False

    @property
    def mean(self) -> float:
        """Nats per token, over all blocks."""
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def error(self) -> float | None:
        """Standard error of `mean` over blocks and their noise; None for a single block."""
        return _standard_error(self.nats - self.mean * self.tokens, self.tokens)

    def minus(self, other: "Bound") -> tuple[float, float | None]:
        """The difference of two means over the same blocks, and its standard error.

        The error is that of the pairs: what makes a text hard under both cancels.
        """
        if not torch.equal(self.tokens, other.tokens):
            raise ValueError("a paired difference needs two bounds of the same blocks with the same prompts")
        difference = self.mean - other.mean
        return difference, _standard_error(self.nats - other.nats - difference * self.tokens, self.tokens)


def _standard_error(residuals: torch.Tensor, tokens: torch.Tensor) -> float | None:
    """Of a ratio of sums over blocks (nats / tokens), from the blocks' residuals."""
    count = len(residuals)
    if count < 2:
        return None
    return (residuals.square().sum() / (count - 1)).sqrt().item() / (tokens.double().mean().item() * math.sqrt(count))


@torch.no_grad()
def block_nelbo(
    model,
    blocks: torch.Tensor,
    draws: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    prompt_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Bound:
    """Continuous-time NELBO of a model (MDLM, Eq. 10; Duo, Eq. 17) for each block, in nats.

    All tokens of a block are scored but for any [MASK] that it holds: it is neither noised nor scored nor counted. A block
    model's own blocks are each noised by themselves, given the clean ones before them (BD3-LM, arXiv 2503.09573, Eq. 6).

    Each block is noised at `draws` times, one in each of as many equal parts of (0, 1]; over all blocks the times of a
    part are stratified too, in random order, so that the estimate is unbiased. The noise depends on the seed and the
    shape of the blocks alone: not on the batch size, the model or the device. Log-probabilities are float32, sums
    float64, and the head runs in chunks (`HeadRows.map`): the logits [B, L, V] are never built.

    Args:
        model: an `MDLMForMaskedDiffusion`.
        blocks: [n, L] token ids, with L a multiple of a block model's `block_size`.
        prompt_mask: [n, L], 1: given, so neither noised nor scored nor counted.
        attention_mask: [n, L], 0: padding, which is not seen either.

    Raises:
        ValueError: when the blocks or a mask have another shape, or leave nothing to score; when a number is below 1.
    """
    check_number("draws", draws, COUNT)
    check_number("batch_size", batch_size, COUNT)
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    if blocks.ndim != 2:
        raise ValueError(f"blocks must have the shape (n, L), not {tuple(blocks.shape)}")
    own = getattr(model.config, "block_size", None)
    if own is not None and blocks.shape[1] % own:
        raise ValueError(
            f"blocks are {blocks.shape[1]} tokens long, which must be a multiple of the model's block_size ({own})"
        )
    parts = 1 if own is None else blocks.shape[1] // own  # of each block, with a time of its own
    count, length = len(blocks) * parts, blocks.shape[1] // parts
    process, device = process_of(model.config), model.device
    maskable = process.maskable(blocks)
    for name, mask in (("prompt_mask", prompt_mask), ("attention_mask", attention_mask)):
        if mask is not None:
            check_shape(name, mask, blocks.shape)
            maskable &= mask.bool() == (name == "attention_mask")
    if not maskable.any():
        what = "nothing but [MASK], prompts and padding, or nothing at all"
        raise ValueError(f"blocks {tuple(blocks.shape)} hold no token to score: {what}")
    generator = torch.Generator().manual_seed(seed)
    total, was_training = torch.zeros(len(blocks), dtype=torch.float64), model.training
    model.eval()
    try:
        for draw in range(draws):
            # rand is in [0, 1), so 1 - rand keeps t away from 0, where the weight is infinite.
            order = torch.randperm(count, generator=generator)
            stratum = order + 1 - torch.rand(count, dtype=torch.float64, generator=generator)
            t = (draw + stratum / count) / draws
            gamma, slope = process.schedule.gamma(t), process.schedule.derivative(t)
            u = torch.rand(count, length, dtype=torch.float64, generator=generator)
            noised, scored = process.corrupt(blocks.reshape(count, length), gamma, u, maskable.reshape(count, length))
            noised, scored = noised.view(blocks.shape), scored.view(blocks.shape)
            gamma, slope = (values.view(-1, parts).repeat_interleave(length, dim=1) for values in (gamma, slope))
            for rows in torch.arange(len(blocks)).split(batch_size):
                z_t, x_0, positions = (tensor[rows].to(device) for tensor in (noised, blocks, scored))
                given = {"timesteps": sigma_of(gamma[rows, 0]).to(device)} if own is None else {"clean_ids": x_0}
                given |= {} if attention_mask is None else {"attention_mask": attention_mask[rows].to(device)}
                head = model(input_ids=z_t, hidden_rows=positions, **given)
                levels = (values[rows].to(device)[positions] for values in (gamma, slope))
                nats = head.map(process.nelbo, z_t[positions], x_0[positions], *levels)
                of_tokens = torch.zeros(positions.shape, dtype=torch.float64, device=device)
                of_tokens[positions] = nats.double()
                total[rows] += of_tokens.sum(dim=1).cpu()
    finally:
        model.train(was_training)
    return Bound(total / draws, maskable.sum(dim=1))


def validation_nelbo(
    model, blocks: torch.Tensor, draws: int = 4, batch_size: int = 32, seed: int = 0, **masks: torch.Tensor
) -> float:
    """The mean of `block_nelbo` over all tokens that it scores: nats per token."""
    return block_nelbo(model, blocks, draws, batch_size, seed, **masks).mean


def causal_loss(judge: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Cross-entropy of a causal LM in nats per token: the mean over the L - 1 predictions of every block [n, L]."""
    nll, tokens = sequence_nll(torch.as_tensor(blocks).tolist(), judge, batch_size)
    if not tokens.sum():
        raise ValueError("there is no block of two tokens or more: nothing to score")
    return (nll.sum() / tokens.sum()).item()


def scored_tokens(config, blocks: torch.LongTensor, prompt_mask: torch.Tensor | None) -> torch.BoolTensor:
    """The tokens that a sampler would fill, [n, L] on the CPU."""
    if blocks.ndim != 2 or not len(blocks):
        raise ValueError(f"blocks must have the shape (n, L), and n at least 1, not {tuple(blocks.shape)}")
    if blocks.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"blocks are {blocks.shape[1]} tokens long, but the model's context is {config.max_position_embeddings}"
        )
    holes = torch.zeros(len(blocks)) if config.mask_token_id is None else (blocks == config.mask_token_id).sum(dim=1)
    if holes.any():
        raise ValueError(
            f"block {holes.nonzero()[0].item()} holds a [MASK] (id {config.mask_token_id}), which has no likelihood: "
            "give text alone"
        )
    if prompt_mask is None:
        return torch.ones(blocks.shape, dtype=torch.bool)
    check_shape("prompt_mask", prompt_mask, blocks.shape)
    scored = ~prompt_mask.cpu().bool()
    if not scored.any(dim=1).all():
        raise ValueError(f"prompt_mask covers all of block {scored.any(dim=1).logical_not().nonzero()[0].item()}")
    return scored
