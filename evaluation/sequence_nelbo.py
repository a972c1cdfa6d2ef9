"""The NELBO of single texts, with the standard error of each: a fixed number of masked tokens, drawn without replacement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from tqdm.auto import tqdm

from evaluation.likelihood import Bound, scored_tokens
from modeling_mcd.checks_mdlm import COUNT, check_number
from modeling_mcd.forward_process_mdlm import process_of, sigma_of
from modeling_mcd.generation_inputs_mdlm import keys_of
from modeling_mcd.noise_mdlm import uniforms
from modeling_mcd.sampling_mdlm import rank


EVEN = "be an even integer of at least 2", lambda value: isinstance(value, int) and value >= 2 and value % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Estimate(Bound):
    """The NELBO of single texts, estimated from draws of the masked tokens: what `sequence_nelbo` returns.

    Args:
        draws: [n, D] float64, CPU: the nats that each draw gives. Draws 2k and 2k + 1 share a stratum. All are equal for a
            text that was enumerated.
    """

    draws: torch.DoubleTensor

    @property
    def errors(self) -> torch.DoubleTensor:
        """[n] float64: the standard error of each text's `nats` over its draws; their squares are unbiased."""
        return _errors(self.draws)

    def differences(self, other: "Estimate") -> tuple[torch.DoubleTensor, torch.DoubleTensor]:
        """Each text's nats less those of another estimate with the same seed, and the standard errors: two [n] float64.

        The draws are paired, so what they share cancels: two models on one text, or two answers to one question.
        """
        if self.draws.shape != other.draws.shape:
            raise ValueError(
                f"paired differences need as many texts and draws: {tuple(self.draws.shape)}, not {tuple(other.draws.shape)}"
            )
        return self.nats - other.nats, _errors(self.draws - other.draws)


def _errors(draws: torch.Tensor) -> torch.Tensor:
    """Standard errors of the means of draws [n, D], two to a stratum: their squared differences have mean 2 sigma^2."""
    return draws.unflatten(1, (-1, 2)).diff(dim=2).square().sum(dim=(1, 2)).sqrt() / draws.shape[1]


@torch.no_grad()
def sequence_nelbo(
    model,
    blocks: torch.Tensor,
    prompt_mask: torch.Tensor | None = None,
    draws: int = 32,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Estimate:
    """The NELBO of each text given its prompt, in nats, with its own standard error.

    For T tokens to score, the continuous-time NELBO of masked diffusion is, under any schedule and for a network that is not
    told the time,

        E_x E_S (T / x) sum_{i in S} -log p(x_i | all but S),       x uniform on 1 .. T, S any x of the T tokens

    (LLaDA, arXiv 2502.09992, its conditional likelihood; also the mean over all orders of the chain rule). Drawing a number of tokens instead of
    a time keeps the variance finite, which the estimator with weight 1/t has not. The numbers are stratified: two draws in each
    of D / 2 equal parts of 1 .. T. A text for which all 2^T - 1 sets S cost no more forwards than D draws (T <= 7 for 128) is
    enumerated: its figure is exact, and its error 0.

    A network with time conditioning is told the time at which its schedule shows as large a share of the row as is visible;
    the figure is then the bound of the model with these times. A block model's own blocks are drawn for each by itself, given
    the clean ones before it, and never enumerated; the rest of a last block that the text does not fill stays masked.

    Args:
        model: an `MDLMForMaskedDiffusion` of absorbing diffusion.
        blocks: [n, L] token ids without padding and without [MASK], L within the context.
        prompt_mask: [n, L] bool, True at the tokens that are given, which are neither masked nor scored.
        draws: D, an even number; as many forwards of a row.
        seed: fixes the draws; a sequence gives each text its own. The draws depend on it and on the rank of a token among the
            scored ones, so the same seed makes pairs: of two models on a text, or of two endings of one prompt.
        batch_size: rows of a forward. Changes no draw.
        progress: show a progress bar.

    Raises:
        ValueError: for a model of uniform diffusion; for blocks or masks of another shape, with nothing to score, or with
            [MASK]; for an odd number of draws.
    """
    check_number("draws", draws, EVEN)
    check_number("batch_size", batch_size, COUNT)
    process = process_of(model.config)
    if process.mask_token_id is None:
        raise ValueError("a fixed number of masked tokens needs a [MASK]; this model is uniform: take block_nelbo")
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    scored = scored_tokens(model.config, blocks, prompt_mask)
    own = getattr(model.config, "block_size", None)
    if own is not None:  # the rest of the last block stays masked, and is not scored
        rest = 0, -blocks.shape[1] % own
        blocks, scored = pad(blocks, rest, value=process.mask_token_id), pad(scored, rest, value=False)
    masks = _Masks(scored, draws, keys_of(seed, None, len(blocks)), own)
    start = process.schedule.gamma(torch.ones((), dtype=torch.float64))
    values = torch.zeros(len(blocks), draws, dtype=torch.float64)
    row_of, number_of = masks.jobs()
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(row_of), unit="forward", desc="NELBO", disable=not progress) as bar:
            for jobs in torch.arange(len(row_of)).split(batch_size):
                rows, numbers = row_of[jobs], number_of[jobs]
                masked, weight = masks.of(rows, numbers)
                text, positions = blocks[rows].to(model.device), masked.to(model.device)
                visible = 1 - masked.double().mean(dim=1)
                given = {"clean_ids": text}
                if own is None:
                    given = {"timesteps": sigma_of(start + (1 - start) * visible).to(model.device)}
                head = model(
                    input_ids=text.masked_fill(positions, process.mask_token_id), hidden_rows=positions, **given
                )
                nats = -head.map(lambda log_p, token: log_p.gather(-1, token[:, None])[:, 0], text[positions])
                of_tokens = torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(masked, nats.double().cpu())
                total = (of_tokens * weight).sum(dim=1)
                # The sets of an enumerated text add up in its first column.
                values.index_put_((rows, numbers.where(~masks.enumerated[rows], 0)), total, accumulate=True)
                bar.update(len(jobs))
    finally:
        model.train(was_training)
    values = torch.where(masks.enumerated[:, None], values[:, :1], values)
    return Estimate(values.mean(dim=1), scored.sum(dim=1), draws=values)


class _Masks:
    """The sets S of all texts, made when they are needed: by draw, or for a short text all of them.

    Args:
        scored: [n, L] bool.
        draws: for each text that is not enumerated.
        keys: [n] int64, of the rows' noise.
        own: the length of a block model's blocks; None: one block.
    """

    def __init__(self, scored: torch.BoolTensor, draws: int, keys: torch.LongTensor, own: int | None):
        self.scored, self.draws, self.keys, self.own = scored, draws, keys, own or scored.shape[1]
        self.tokens = scored.sum(dim=1)
        self.ranks = (scored.cumsum(dim=1) - 1).clamp(min=0)
        self.enumerated = self.tokens <= (draws + 1).bit_length() - 1
        if own is not None:
            self.enumerated = torch.zeros_like(self.enumerated)

    def jobs(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The row of each forward, and its number among the forwards of the row."""
        forwards = torch.where(self.enumerated, 2 ** self.tokens.clamp(max=62) - 1, self.draws)
        rows = torch.arange(len(forwards)).repeat_interleave(forwards)
        return rows, torch.arange(len(rows)) - (forwards.cumsum(0) - forwards)[rows]

    def of(self, rows: torch.LongTensor, numbers: torch.LongTensor) -> tuple[torch.BoolTensor, torch.DoubleTensor]:
        """The masked tokens [b, L] of some forwards, and the weight of each token."""
        scored, exact = self.scored[rows], self.enumerated[rows, None]
        drawn, weight = self.drawn(rows, numbers)
        listed = scored & ((numbers[:, None] + 1) >> self.ranks[rows].clamp(max=62)).bitwise_and(1).bool()
        size, total = listed.sum(dim=1, keepdim=True).double(), self.tokens[rows, None].double()
        log_sets = (total + 1).lgamma() - (size + 1).lgamma() - (total - size + 1).lgamma()  # log of T over x
        return torch.where(exact, listed, drawn), torch.where(exact, (-log_sets).exp() / size, weight)

    def drawn(self, rows: torch.LongTensor, numbers: torch.LongTensor) -> tuple[torch.BoolTensor, torch.DoubleTensor]:
        """Of each block of its own, x of the tokens to score: [b, L] bool, and their weight T / x."""
        u, v = uniforms(self.keys[rows], self.ranks[rows], numbers[:, None])
        u, v, scored = (values.unflatten(1, (-1, self.own)) for values in (u, v, self.scored[rows]))
        total, first = scored.sum(dim=2, keepdim=True), scored.long().argmax(dim=2, keepdim=True)
        quantile = (numbers[:, None, None] // 2 + v.gather(2, first)) / (self.draws // 2)
        size = ((quantile * total).long() + 1).minimum(total).clamp(min=1)  # a block may hold nothing to score
        order = rank(u.flatten(0, 1), scored.flatten(0, 1)).view(scored.shape)
        weight = (total / size).expand(scored.shape)
        return (scored & (order < size)).flatten(1), weight.flatten(1).double()
