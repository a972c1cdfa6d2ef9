"""Likelihood on held-out blocks: the bound of a masked diffusion model, and the exact loss of an autoregressive one."""

import torch
from transformers import PreTrainedModel

from evaluation.generative_perplexity import sequence_nll
from modeling_mcd.checks_mdlm import COUNT, check_number
from modeling_mcd.forward_process_mdlm import at_positions, process_of, sigma_of


@torch.no_grad()
def validation_nelbo(model, blocks: torch.Tensor, draws: int = 4, batch_size: int = 32, seed: int = 0) -> float:
    """Continuous-time NELBO of a model (MDLM, Eq. 10; Duo, Eq. 17), in nats per token.

    The mean is over all tokens of the blocks, but for any [MASK] that they hold: it is neither noised nor scored nor
    counted.

    Each block is noised at `draws` times, one in each of as many equal parts of (0, 1]; over all blocks the times of a
    part are stratified too, in random order, so that the estimate is unbiased. The noise depends on the seed and the
    shape of the blocks alone: not on the batch size, the model or the device. Log-probabilities are float32, sums
    float64, and the head runs in chunks (`HeadRows.map`): the logits [B, L, V] are never built.

    Args:
        model: an `MDLMForMaskedDiffusion`.
        blocks: [n, L] token ids.

    Raises:
        ValueError: when the blocks have another shape, or hold nothing but [MASK]; when a number is below 1.
    """
    check_number("draws", draws, COUNT)
    check_number("batch_size", batch_size, COUNT)
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    if blocks.ndim != 2:
        raise ValueError(f"blocks must have the shape (n, L), not {tuple(blocks.shape)}")
    count, length = blocks.shape
    process, device = process_of(model.config), model.device
    maskable = process.maskable(blocks)
    if not maskable.any():
        raise ValueError(f"blocks {tuple(blocks.shape)} hold no token to score: nothing but [MASK], or nothing at all")
    generator = torch.Generator().manual_seed(seed)
    total, was_training = 0.0, model.training
    model.eval()
    try:
        for draw in range(draws):
            # rand is in [0, 1), so 1 - rand keeps t away from 0, where the weight is infinite.
            order = torch.randperm(count, generator=generator)
            stratum = order + 1 - torch.rand(count, dtype=torch.float64, generator=generator)
            t = (draw + stratum / count) / draws
            gamma, slope = process.schedule.gamma(t), process.schedule.derivative(t)
            u = torch.rand(count, length, dtype=torch.float64, generator=generator)
            noised, scored = process.corrupt(blocks, gamma, u, maskable)
            for rows in torch.arange(count).split(batch_size):
                z_t, x_0, positions = (tensor[rows].to(device) for tensor in (noised, blocks, scored))
                head = model(input_ids=z_t, timesteps=sigma_of(gamma[rows]).to(device), hidden_rows=positions)
                levels = (at_positions(values[rows].to(device), positions) for values in (gamma, slope))
                nats = head.map(process.nelbo, z_t[positions], x_0[positions], *levels)
                total += nats.double().sum().item()
    finally:
        model.train(was_training)
    return total / (draws * maskable.sum().item())


def causal_loss(judge: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Cross-entropy of a causal LM in nats per token: the mean over the L - 1 predictions of every block [n, L]."""
    nll, tokens = sequence_nll(torch.as_tensor(blocks).tolist(), judge, batch_size)
    if not tokens.sum():
        raise ValueError("there is no block of two tokens or more: nothing to score")
    return (nll.sum() / tokens.sum()).item()
