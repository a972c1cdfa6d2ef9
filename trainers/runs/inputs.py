"""What a run reads: the tokenizer and the text."""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from modeling_mcd.loading import check_tokens, reason_of
from trainers.runs.text_blocks import TextArguments, load_blocks


@dataclass
class TokenizerArguments:
    tokenizer: str = field(metadata={"help": "Folder or Hub name of the tokenizer."})
    add_mask_token: bool = field(
        default=False, metadata={"help": "Give the tokenizer a [MASK] when it has none: one more token, at the end."}
    )


def load_tokenizer(arguments: TokenizerArguments) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tokenizer {arguments.tokenizer!r} cannot be loaded: {reason_of(error)}") from None
    if tokenizer.mask_token_id is None and arguments.add_mask_token:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config):
    """Raises ValueError unless the tokenizer's [MASK] is the model's, if it has one, and all tokens are in the vocabulary."""
    if config.diffusion_kind == "absorbing" and tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: set add_mask_token to true, or give one that has")
    check_tokens(tokenizer, config)


def check_block_length(block_length: int, name: str, config):
    """Raises ValueError when a block is longer than the context of the model, which `name` calls by its argument."""
    if block_length > config.max_position_embeddings:
        raise ValueError(
            f"block_length is {block_length}, but the {name}'s context is {config.max_position_embeddings} tokens"
        )


def load_data(text: TextArguments, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments):
    """The blocks; the first process of each machine prepares the cache that the others read."""
    if text.streaming and training.max_steps <= 0:
        raise ValueError("streaming text has no known length, so an epoch has none either: give max_steps")
    with training.main_process_first():
        return load_blocks(text, tokenizer)
