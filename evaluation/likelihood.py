"""Likelihood on held-out blocks: the bound of a masked diffusion model, and the exact loss of an autoregressive one."""

import torch
from transformers import PreTrainedModel

from evaluation.generative_perplexity import sequence_nll
from modeling_mcd.forward_process_mdlm import corrupt_uniformly, nelbo_weight, uniform_nelbo
from modeling_mcd.noise_schedule_mdlm import noise_schedule_of


@torch.no_grad()
def validation_nelbo(model, blocks: torch.Tensor, draws: int = 4, batch_size: int = 32, seed: int = 0) -> float:
    """Continuous-time NELBO of a model (MDLM, Eq. 10; Duo, Eq. 17), in nats per token, over all tokens of the blocks.

    Each block is noised at `draws` times, one in each of as many equal parts of (0, 1]; over all blocks the times of a
    part are stratified too, in random order, so that the estimate is unbiased. The noise depends on the seed and the
    shape of the blocks alone: not on the batch size, the model or the device. The cross-entropy is that of the SUBS
    parameterisation ([MASK] has no probability, visible tokens cost nothing), in float32, summed in float64. Under
    uniform diffusion every token costs something, see `uniform_nelbo`.

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
        gamma, u = schedule.gamma(t), torch.rand(count, length, dtype=torch.float64, generator=generator)
        if model.config.diffusion_kind == "uniform":
            slope, z_t = schedule.derivative(t), corrupt_uniformly(blocks, gamma, u, model.config.vocab_size)
            for rows in torch.arange(count).split(batch_size):
                total += uniform_sum(model, blocks[rows], z_t[rows], gamma[rows], slope[rows])
            continue
        masked = u > gamma[:, None]
        weights = nelbo_weight(schedule, t)[:, None].expand(count, length)
        for rows in torch.arange(count).split(batch_size):
            noisy = blocks[rows].masked_fill(masked[rows], mask_token_id).to(model.device)
            sigma = -gamma[rows].log().float().to(model.device)
            head = model(input_ids=noisy, timesteps=sigma, hidden_rows=masked[rows].to(model.device))
            losses = head.map(negative_log, blocks[rows][masked[rows]].to(model.device))
            total += (weights[rows][masked[rows]] * losses.cpu().double()).sum().item()
    model.train(was_training)
    return total / (draws * count * length)


def negative_log(log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -log_p.gather(-1, tokens[:, None])[:, 0]


def uniform_sum(model, x_0: torch.Tensor, z_t: torch.Tensor, gamma: torch.Tensor, slope: torch.Tensor) -> float:
    """Sum of `uniform_nelbo` over the tokens of some blocks [b, L], noised to z_t at gamma [b]."""
    every = torch.ones_like(x_0, dtype=torch.bool, device=model.device)
    sigma = -gamma.log().float().to(model.device)
    head = model(input_ids=z_t.to(model.device), timesteps=sigma, hidden_rows=every)
    gamma, slope = (values[:, None].expand_as(x_0).flatten().float().to(model.device) for values in (gamma, slope))
    x_0, z_t = x_0.flatten().to(model.device), z_t.flatten().to(model.device)
    return head.map(uniform_nelbo, z_t, x_0, gamma, slope).double().sum().item()


def causal_loss(judge: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Cross-entropy of a causal LM in nats per token: the mean over the L - 1 predictions of every block [n, L]."""
    nll, tokens = sequence_nll(torch.as_tensor(blocks).tolist(), judge, batch_size)
    return (nll.sum() / tokens.sum()).item()
