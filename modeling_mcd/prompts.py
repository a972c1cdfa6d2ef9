"""From what a person writes to the model's tokens and back: text to continue, text with holes, messages."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .modeling_mdlm import MDLMForMaskedDiffusion


HOLE = re.compile(r"_{3,}|\[MASK\]")


def with_masks(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the tokenizer's mask for each `[MASK]`, and for each underscore of a run of three or more.

    Raises:
        ValueError: the text has no hole, or the tokenizer no mask.
    """
    if tokenizer.mask_token is None:
        raise ValueError("an infill needs a tokenizer with a mask token, and this one has none: give a prompt")
    masked = HOLE.sub(lambda hole: tokenizer.mask_token * (len(hole[0]) if hole[0][0] == "_" else 1), text)
    if tokenizer.mask_token not in masked:
        raise ValueError(f"the infill {text!r} has no hole: write ___ or [MASK] where text is missing")
    return masked


def encode(prompt: str, tokenizer: PreTrainedTokenizerBase, model: MDLMForMaskedDiffusion) -> torch.LongTensor | None:
    """The prompt's ids [1, width], after the token with which texts begin in training; None for an empty prompt."""
    if not prompt:
        return None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    starts = (model.config.bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    return torch.tensor([([] if start is None else [start]) + ids], device=model.device)


def encode_messages(
    messages: Sequence[dict], tokenizer: PreTrainedTokenizerBase, model: MDLMForMaskedDiffusion
) -> torch.LongTensor:
    """The ids [1, width] of messages `{"role": ..., "content": ...}`, and of what the chat template puts before an answer.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: write the prompt as it should be, or give it a template")
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
    except Exception as error:  # of the template: it may refuse an order of roles, by an exception of jinja's
        raise ValueError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from None
    return torch.tensor([ids], device=model.device)


def up_to_special(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids before the first special token: the answer that a model gave."""
    special = set(tokenizer.all_special_ids)
    return list(ids[: next((i for i, token in enumerate(ids) if token in special), len(ids))])
