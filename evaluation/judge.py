"""The judge of generative perplexity: loading, checking, describing and identifying it."""

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from evaluation.team import ALONE, Team
from modeling_mcd.loading import load_pretrained, load_tokenizer, reason_of


def load_judge(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model, in eval mode, and its tokenizer from a folder or the Hub (`name@revision`).

    Args:
        name: folder or Hub name.
        dtype: of the weights, such as "float32".
        device: where the model runs.

    Raises:
        ValueError: it cannot be loaded, or it is not a complete causal language model (see `check_judge`).
    """
    tokenizer = load_tokenizer(name, "judge")
    judge, loading = load_pretrained(
        AutoModelForCausalLM, "judge", name, dtype=getattr(torch, dtype), output_loading_info=True
    )
    for fault, keys in (("are missing", loading["missing_keys"]), ("have no place", loading["unexpected_keys"])):
        if keys:
            raise ValueError(
                f"judge {name!r} is not a complete causal language model: {len(keys)} of its weights {fault} in "
                f"{type(judge).__name__}, the first is {min(keys)}"
            )
    judge = judge.to(device).eval()
    try:
        check_judge(judge, tokenizer)
    except ValueError as error:
        raise ValueError(f"judge {name!r} cannot judge: {error}") from None
    return judge, tokenizer


def check_judge(judge: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Raises ValueError unless all weights are finite, all of the tokenizer's ids exist, and no logit sees a later token."""
    for name, parameter in judge.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"its weight {name} holds a number that is not finite")
    if set(tokenizer.get_vocab().values()) <= set(
        tokenizer.all_special_ids
    ):  # transformers makes such a tokenizer when there are no files
        raise ValueError("its tokenizer has no tokens but special ones: the tokenizer's files are missing")
    vocabulary = vocabulary_size(judge)
    if len(tokenizer) > vocabulary:
        raise ValueError(f"its tokenizer has {len(tokenizer)} tokens, more than its vocabulary of {vocabulary}")
    length = min(context_of(judge) or 16, 16)
    ids = torch.arange(length) * 7919 % vocabulary
    changed = torch.where(torch.arange(length) < length // 2, ids, (ids + 1) % vocabulary)
    try:
        with torch.inference_mode():
            logits = judge(input_ids=torch.stack([ids, changed]).to(judge.device), use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"it fails on {length} tokens: {reason_of(error)}") from None
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")
    one, other = logits[:, : length // 2].float()
    if (one - other).abs().max() > 4 * torch.finfo(judge.dtype).eps * one.abs().max():
        raise ValueError("it is not causal: a change of later tokens changes the logits of earlier ones")


def check_same_ids(tokenizer: PreTrainedTokenizerBase, judge_tokenizer: PreTrainedTokenizerBase):
    """Raises ValueError unless both tokenizers give every id, except [MASK], the same meaning."""
    ids = [i for i in range(len(tokenizer)) if i != tokenizer.mask_token_id]
    known = len(judge_tokenizer)
    theirs = judge_tokenizer.convert_ids_to_tokens([i for i in ids if i < known]) + [None] * sum(
        i >= known for i in ids
    )
    for i, mine, their in zip(ids, tokenizer.convert_ids_to_tokens(ids), theirs, strict=True):
        if mine != their:
            raise ValueError(
                f"raw_ids needs a judge with the model's own tokenizer: this judge reads the id {i} as {their!r}, and the "
                f"model as {mine!r}; take the convention retokenized"
            )


def vocabulary_size(judge: PreTrainedModel) -> int:
    """The size of the judge's vocabulary, also for a multimodal model, whose text configuration is nested."""
    return judge.config.get_text_config().vocab_size


def context_of(judge: PreTrainedModel) -> int | None:
    """The number of tokens that the judge can see at once; None if it has no limit."""
    return getattr(judge.config.get_text_config(), "max_position_embeddings", None)


def fingerprint(model: PreTrainedModel, team: Team = ALONE) -> str:
    """16 hexadecimal digits that change with any weight. A label or a path does not identify the weights.

    Args:
        team: the processes that have the model together; all of them call this.
    """
    digest = hashlib.sha256()
    for name, tensor in team.weights(model):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe_judge(judge: PreTrainedModel) -> str:
    """The judge's name (for a local folder its last part), class, size and fingerprint in one line. Hashes all weights."""
    name = judge.name_or_path
    if Path(name).is_dir():
        name = Path(name).resolve().name
    size = f"{judge.num_parameters() / 1e6:.3g}M parameters in {str(judge.dtype).removeprefix('torch.')}"
    return f"{name or 'judge'} ({type(judge).__name__}, {size}, weights {fingerprint(judge)[:8]})"
