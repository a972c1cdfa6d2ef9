"""Likelihood on held-out blocks: the bound of a masked diffusion model, and the exact loss of an autoregressive one."""

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from evaluation.generative_perplexity import sequence_nll
from modeling_mcd.noise_schedule_mdlm import nelbo_weight, noise_schedule_of


@torch.no_grad()
def validation_nelbo(model, blocks: torch.Tensor, draws: int = 4, batch_size: int = 32, seed: int = 0) -> float:
    """Continuous-time NELBO of an MDLM (arXiv 2406.07524, Eq. 10), in nats per token, over all tokens of the blocks.

    Each block is masked at `draws` times, one in each of as many equal parts of (0, 1]; over all blocks the times of a
    part are stratified too, in random order, so that the estimate is unbiased. The noise depends on the seed and the
    shape of the blocks alone: not on the batch size, the model or the device. The cross-entropy is that of the SUBS
    parameterisation ([MASK] has no probability, visible tokens cost nothing), in float32, summed in float64.

    Args:
        model: an `MDLMForMaskedDiffusion`.
        blocks: [n, L] token ids without masks.
    """
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    count, length = blocks.shape
    schedule, mask_token_id = noise_schedule_of(model.config), model.config.mask_token_id
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    was_training = model.training
    model.eval()
    for draw in range(draws):
        # rand is in [0, 1), so 1 - rand keeps t away from 0, where the weight is infinite.
        stratum = (
            torch.randperm(count, generator=generator)
            + 1
            - torch.rand(count, dtype=torch.float64, generator=generator)
        )
        t = (draw + stratum / count) / draws
        masked = torch.rand(count, length, dtype=torch.float64, generator=generator) > schedule.gamma(t)[:, None]
        weights = nelbo_weight(schedule, t)[:, None].expand(count, length)
        for rows in torch.arange(count).split(batch_size):
            noisy = blocks[rows].masked_fill(masked[rows], mask_token_id).to(model.device)
            sigma = -schedule.gamma(t[rows]).log().float().to(model.device)
            logits = model(input_ids=noisy, timesteps=sigma, logits_rows=masked[rows].to(model.device)).logits.float()
            logits[:, mask_token_id] = -torch.inf
            losses = cross_entropy(logits, blocks[rows][masked[rows]].to(model.device), reduction="none")
            total += (weights[rows][masked[rows]] * losses.cpu().double()).sum().item()
    model.train(was_training)
    return total / (draws * count * length)


def causal_loss(judge: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Cross-entropy of a causal LM in nats per token: the mean over the L - 1 predictions of every block [n, L]."""
    nll, tokens = sequence_nll(torch.as_tensor(blocks).tolist(), judge, batch_size)
    return (nll.sum() / tokens.sum()).item()
