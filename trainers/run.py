"""What the entry points share: one clear line for a user's mistake, the tokenizer, the blocks, and where to resume."""

import dataclasses
import errno
import functools
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
import yaml
from huggingface_hub import HfApi
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from evaluation.run_eval import check_tokens
from modeling_mcd.convert_checkpoints import reason_of
from trainers.checkpoints import (
    check_checkpoint,
    check_output_dir,
    claim_output_dir,
    last_whole_checkpoint,
    remove_later_checkpoints,
)
from trainers.text_blocks import TextArguments, load_blocks


# The settings of `TrainingArguments` that decide what a run computes; a method's own settings all do.
DECISIVE_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "tf32", "full_determinism"),
)


@dataclass
class TokenizerArguments:
    tokenizer: str = field(metadata={"help": "Folder or Hub name of the tokenizer."})
    add_mask_token: bool = field(
        default=False, metadata={"help": "Give the tokenizer a [MASK] when it has none: one more token, at the end."}
    )


def one_line_errors(main):
    """A user's mistake ends in one line on standard error and status 1, without a traceback."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        try:
            return main(arguments)
        except Exception as error:
            if disk_is_full(error):
                # Of a copy, `filename` is what was read, and `filename2` what could not be written.
                file = getattr(error, "filename2", None) or getattr(error, "filename", None) or f"a file ({error})"
                line = f"no space left on the disk while writing {file}: free some and start again"
            elif isinstance(error, OSError) and error.filename is not None:  # no permission, a file for a folder, ...
                line = f"{error.filename}: {error.strerror}"
            elif isinstance(error, (ValueError, FileNotFoundError, FloatingPointError)):
                line = str(error)
            else:
                raise
        sys.exit(f"error: {' '.join(line.split())}")

    return wrapped


def disk_is_full(error: Exception) -> bool:
    """safetensors, torch and datasets have errors of their own for a failed write, without its number."""
    words = (
        "No space left on device",
        "Not enough disk space",
        "PytorchStreamWriter failed writing",
        "iostream error",
    )
    return getattr(error, "errno", None) == errno.ENOSPC or any(part in str(error) for part in words)


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


def run_settings(training: TrainingArguments, *arguments) -> dict:
    """What a run is: equal settings compute the same thing, whatever the number of processes."""
    settings = {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}
    own = {f.name for f in dataclasses.fields(training)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    settings |= {key: value for key, value in training.to_dict().items() if key in own or key in DECISIVE_SETTINGS}
    settings["global_batch_size"] = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    return settings


def recipe_text(training: TrainingArguments, *arguments) -> str:
    """The recipe of a run as YAML, for its model card."""
    settings = {key: value for key, value in run_settings(training, *arguments).items() if value is not None}
    return yaml.safe_dump(settings, sort_keys=False)


def find_checkpoint(training: TrainingArguments, settings: dict) -> str | None:
    """The checkpoint to resume from, if there is one. Nothing is written yet.

    Raises:
        ValueError: when the checkpoint or the output folder is not of this run.
    """
    output_dir = Path(training.output_dir)
    with training.main_process_first(local=False):
        if training.process_index == 0:
            if training.resume_from_checkpoint is not None:
                check_checkpoint(Path(training.resume_from_checkpoint), settings)
            check_output_dir(output_dir, settings)
        checkpoint = training.resume_from_checkpoint or last_whole_checkpoint(output_dir)
    return None if checkpoint is None else str(checkpoint)


def start_run(training: TrainingArguments, settings: dict, checkpoint: str | None):
    """Makes the output folder this run's, the first thing that is written, when all that can be refused has been."""
    output_dir = Path(training.output_dir)
    with training.main_process_first(local=False):
        if training.process_index == 0:
            claim_output_dir(output_dir, settings)
            if training.resume_from_checkpoint is None:
                remove_later_checkpoints(output_dir, checkpoint and Path(checkpoint))
    if checkpoint is not None:
        transformers.utils.logging.get_logger(__name__).warning(f"resuming from {checkpoint}")


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments, name: str = ""
):
    """Saves a model and its tokenizer into the output folder, or into a folder in it; no file is ever half there."""
    if not training.should_save:
        return
    output_dir = Path(training.output_dir)
    folder = output_dir / f".{name or 'student'}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if name:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            folder.rename(output_dir / name)
        else:
            for file in folder.iterdir():
                os.replace(file, output_dir / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def short_name(source: str | None) -> str | None:
    """A folder's name without the path of this machine; a Hub name as it is."""
    return source if source is None or not Path(source).exists() else "/".join(Path(source).parts[-3:])


def take_hub_api(training: TrainingArguments) -> HfApi | None:
    """The Hub that the finished run is pushed to, if it is. Every checkpoint holds the arguments: they lose the token.

    The model card names the repository, so `hub_model_id` becomes its full name; without a push it becomes None.

    Raises:
        ValueError: when the name has no namespace, and the Hub does not say whose token this is.
    """
    api = HfApi(token=training.hub_token) if training.push_to_hub else None
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    if api is not None and "/" not in name:
        try:
            name = f"{api.whoami()['name']}/{name}"
        except Exception as error:  # no token, a wrong one, no network
            raise ValueError(
                f"hub_model_id {name!r} has no namespace, and the Hub does not say whose token this is ({error}): "
                f"log in, or give the whole name, as in 'you/{name}'"
            ) from None
    training.hub_model_id = None if api is None else name
    training.push_to_hub, training.hub_token = False, None
    return api


def push_to_hub(training: TrainingArguments, api: HfApi):
    """Sends the output folder, without checkpoints, to the Hub. A failure is reported with the way to try again."""
    repository = training.hub_model_id
    ignored = ["checkpoint-*", "teacher/*", "round-*", "runs/*", "run.json", ".*"]
    try:
        api.create_repo(repository, private=training.hub_private_repo, exist_ok=True)
        url = api.upload_folder(
            repo_id=repository,
            folder_path=training.output_dir,
            ignore_patterns=list(ignored),
            commit_message="End of training",
        )
        print(f"pushed to {url}")
    except Exception as error:  # whatever it is, the run itself has succeeded
        retry = ["hf", "upload", repository, training.output_dir, "."]
        retry += [word for pattern in ignored for word in ("--exclude", pattern)]
        retry += ["--private"] if training.hub_private_repo else []
        print(
            f"The push to {repository!r} failed ({type(error).__name__}: {reason_of(error)}). Nothing is lost: "
            f"everything is in {training.output_dir}. Try again with\n  {shlex.join(retry)}",
            file=sys.stderr,
        )
