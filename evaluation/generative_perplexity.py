"""Generative perplexity (Gen-PPL): the perplexity of samples under another language model, the judge.

Two conventions are published, and their figures must not be compared with each other:

- `retokenized` (MDLM, arXiv 2406.07524; Duo, arXiv 2506.10892): samples are texts in which BOS and EOS are written out, and
  the judge's own tokenizer reads them (the name of any other special token as letters). Within a window only the first EOS is
  scored; every other token is. The figure is exp(total NLL / total tokens) over all samples together. Padding is never
  scored; the published code scores the first padding token of a text without EOS, so its figure depends on the batch.
- `raw_ids` (SDTT, arXiv 2410.21035): the judge reads the samples' own ids, and every token is scored. The figure is exp of the
  mean over samples of the mean over the L - 1 predictions. It needs a judge with the model's vocabulary.

Text longer than the judge's context is cut into windows of that size. As in the published code, each window is scored on its
own: its first token is only context, and it sees nothing of the window before it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.judge import context_of, vocabulary_size
from evaluation.text import encode
from modeling_mcd.checks_mdlm import COUNT, check_number


CONVENTIONS = ("retokenized", "raw_ids")


@dataclass(frozen=True)
class GenerativePerplexity:
    """
    Args:
        perplexity: over all samples, averaged as the convention says; infinite where the exponential overflows.
        nll: [samples] float64, nats: the judge's total over the scored tokens of each sample.
        tokens: [samples] int64, the number of scored tokens; 0 for a sample of a single token.
        mean_nll: nats per token, the logarithm of the perplexity.
    """

    perplexity: float
    nll: torch.Tensor
    tokens: torch.Tensor
    mean_nll: float


def generative_perplexity(
    samples: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase | None = None,
    convention: str = "retokenized",
    batch_size: int = 8,
) -> GenerativePerplexity:
    """Gen-PPL of texts (`retokenized`, needs the judge's tokenizer) or of token ids (`raw_ids`) under any causal LM.

    Raises:
        ValueError: an unknown convention, ids outside the judge's vocabulary, or nothing to score.
    """
    return perplexity_of(*score(samples, judge, judge_tokenizer, convention, batch_size), convention)


def score(
    samples: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase | None,
    convention: str,
    batch_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Total NLL in nats [samples] float64 and number of scored tokens [samples] int64, by the convention's rules."""
    if convention == "retokenized":
        if judge_tokenizer is None:
            raise ValueError(
                "judge_tokenizer is None, but the convention retokenized needs it: give it, or take raw_ids"
            )
        sequences = [read_as_judge(text, judge_tokenizer) for text in samples]
        return sequence_nll(sequences, judge, batch_size, judge_tokenizer.eos_token_id)
    if convention == "raw_ids":
        return sequence_nll([[int(token) for token in ids] for ids in samples], judge, batch_size)
    raise ValueError(f"convention must be one of {CONVENTIONS}, not {convention!r}")


def read_as_judge(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds around it.

    The names of BOS and EOS in the text stand for these tokens; the name of any other special token is read as letters.
    """
    marks = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    others = {token for token in tokenizer.all_special_tokens if len(token) > 1} - marks - {tokenizer.unk_token}
    if not any(name in text for name in others):
        return tokenizer(text, verbose=False)["input_ids"]
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, sorted(marks))) + ")", text) if marks else [text]:
        ids += [tokenizer.convert_tokens_to_ids(part)] if part in marks else encode([part], tokenizer)[0]
    letter, around = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(around)) if around[i : i + len(letter)] == letter)
    return [*around[:start], *ids, *around[start + len(letter) :]]


def perplexity_of(nll: torch.Tensor, tokens: torch.Tensor, convention: str) -> GenerativePerplexity:
    """Averages scores as the convention says. Raises ValueError if no token was scored."""
    scored = tokens > 0
    if not scored.any():
        raise ValueError(
            "nothing to score: the first token of a sample is not predicted, and of several EOS only the first counts"
        )
    mean = nll.sum() / tokens.sum() if convention == "retokenized" else (nll[scored] / tokens[scored]).mean()
    return GenerativePerplexity(mean.exp().item(), nll, tokens, mean.item())


@torch.inference_mode()
def sequence_nll(
    sequences: Sequence[Sequence[int]], judge: PreTrainedModel, batch_size: int = 8, eos_token_id: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Total NLL in nats [n] float64 and number of scored tokens [n] of each sequence of ids. Puts the judge in eval mode.

    With `eos_token_id`, an EOS is scored only if it is the first of its window. Losses in float32, sums in float64.

    Raises:
        ValueError: an id outside the judge's vocabulary, or a batch_size below 1.
    """
    check_number("batch_size", batch_size, COUNT)
    judge.eval()
    vocabulary = vocabulary_size(judge)
    outside = next((i for ids in sequences if ids for i in (min(ids), max(ids)) if not 0 <= i < vocabulary), None)
    if outside is not None:
        raise ValueError(
            f"token id {outside} is outside the judge's vocabulary of {vocabulary}: judge the text, re-tokenised"
        )
    context = context_of(judge) or max((len(ids) for ids in sequences), default=1)
    windows = [
        (row, torch.tensor(ids[start : start + context]))
        for row, ids in enumerate(sequences)
        for start in range(0, len(ids), context)
        if len(ids) - start > 1  # a window of one token predicts nothing
    ]
    nll = torch.zeros(len(sequences), dtype=torch.float64)
    tokens = torch.zeros(len(sequences), dtype=torch.long)
    for start in range(0, len(windows), batch_size):
        rows, batch = zip(*windows[start : start + batch_size], strict=True)
        lengths = torch.tensor([len(window) for window in batch])
        # Padding is on the right, where a causal model cannot see it: neither its id nor an attention mask matters.
        input_ids = pad_sequence(batch, batch_first=True)
        scored = torch.arange(1, input_ids.shape[1]) < lengths[:, None]
        if eos_token_id is not None:
            is_eos = input_ids == eos_token_id
            scored &= (~is_eos | (is_eos.cumsum(dim=1) == 1))[:, 1:]
        input_ids = input_ids.to(judge.device)
        logits = judge(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(scored.shape).cpu().double().masked_fill(~scored, 0.0)
        nll.index_add_(0, torch.tensor(rows), losses.sum(dim=1))
        tokens.index_add_(0, torch.tensor(rows), scored.sum(dim=1))
    return nll, tokens
