"""What a run reads besides its networks: the tokenizer and the text."""

import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase, TrainingArguments

from modeling_mcd.backbones import warn_of_wrong_shift
from modeling_mcd.loading import check_tokens, load_tokenizer, split_revision
from modeling_mcd.modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import RunText, load_blocks, open_run_text, tokenise_shares
from trainers.runs.waiting import main_process_first, wait_for_all


@dataclass
class TokenizerArguments:
    tokenizer: str = field(metadata={"help": "Folder or Hub name (`name@revision`) of the tokenizer."})
    add_mask_token: bool = field(
        default=False, metadata={"help": "If the tokenizer has no mask token, add [MASK] as its last token."}
    )


def load_run_tokenizer(arguments: TokenizerArguments) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; adds a mask token if `add_mask_token` says so, and uses EOS as BOS if it has no BOS.

    Raises:
        ValueError: the tokenizer cannot be loaded; names it.
    """
    tokenizer = load_tokenizer(arguments.tokenizer)
    if tokenizer.mask_token_id is None and arguments.add_mask_token:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config, network: str | None = None):
    """Refuses a tokenizer other than the one that a network was trained with.

    Args:
        config: the network's configuration.
        network: where the network was loaded from, if it was. The tokenizer saved there is compared token by token.

    Raises:
        ValueError: the tokenizer has no mask token or another one than the network, has tokens outside its vocabulary, or
            gives tokens other ids.
    """
    if config.diffusion_kind == "absorbing" and tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: set add_mask_token to true, or give another tokenizer")
    check_tokens(tokenizer, config)
    other = None if network is None else tokenizer_beside(network)
    if other is None:
        return
    ids = [i for i in range(min(len(tokenizer), len(other))) if i != config.mask_token_id]
    ours, theirs = tokenizer.convert_ids_to_tokens(ids), other.convert_ids_to_tokens(ids)
    for i, our, their in zip(ids, ours, theirs, strict=True):
        if our != their:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} reads the id {i} as {our!r}, and the one saved with {network!r} "
                f"as {their!r}: a model needs the tokenizer that it was trained with, not merely one as large"
            )


def tokenizer_beside(network: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a network that was loaded; None if there is none, or if it cannot be loaded."""
    name, revision = split_revision(network)
    file = Path(name, "tokenizer_config.json")
    if not Path(name).exists():
        file = try_to_load_from_cache(name, file.name, revision=revision)
    if not isinstance(file, (str, Path)) or not Path(file).is_file():
        return None
    try:
        return load_tokenizer(Path(file).parent)
    except ValueError:  # it needs code of its own, for example; the vocabulary's size was checked
        return None


def check_block_length(block_length: int, name: str, config):
    """Raises ValueError if a block does not fit the network that the recipe calls `name`: its context, or its own blocks."""
    if block_length > config.max_position_embeddings:
        raise ValueError(
            f"block_length is {block_length}, but the {name}'s context is {config.max_position_embeddings} tokens"
        )
    size = getattr(config, "block_size", None)
    if size is not None and block_length % size:
        raise ValueError(
            f"block_length is {block_length}, but must be a multiple of the {name}'s own block_size ({size})"
        )


def check_shift(model, train, training: TrainingArguments):
    """Warns when the training text says that a wrapped network has the wrong `logits_shift`: it would learn garbage."""
    if training.should_log and isinstance(model, MDLMBackboneForMaskedDiffusion):
        rows = [list(row["input_ids"]) for row in islice(train, 4)]
        length = min(map(len, rows))  # rows that are not packed differ
        warn_of_wrong_shift(model, torch.tensor([row[:length] for row in rows]))


def open_data(text: TextArguments, training: TrainingArguments) -> RunText:
    """Finds and checks the text of a run, before anything else is loaded. Every process must call it.

    Raises:
        FileNotFoundError, ValueError: see `open_run_text`; ValueError also for streaming text without max_steps.
    """
    if text.streaming and training.max_steps <= 0:
        raise ValueError("streaming text has no known length, so an epoch has none either: give max_steps")
    with main_process_first(training):
        return open_run_text(text)


def load_data(text: RunText | TextArguments, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments):
    """Training and validation blocks, see `load_blocks`.

    The processes of a machine share the work of tokenising; the first one puts the blocks into the cache for the others.
    """
    text = text if isinstance(text, RunText) else open_data(text, training)
    shares = min(training.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", training.world_size)))
    if shares > 1:
        tokenise_shares(text, tokenizer, training.local_process_index, shares)
        wait_for_all(training, shares)
    seed = training.seed if training.data_seed is None else training.data_seed
    with main_process_first(training):
        train, validation = load_blocks(text, tokenizer, shares, seed, (training.process_index, training.world_size))
    if text.arguments.streaming:
        train.endless = True  # steps are counted, not passes
    return train, validation
