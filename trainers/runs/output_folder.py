"""The output folder of a run: whose it is, where to resume, and how models are saved into it."""

import dataclasses
import os
import shutil
from pathlib import Path

import transformers
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from modeling_mcd.files import write_json
from trainers.exact_resume import fault_of, last_whole_checkpoint, read_object, remove_later_checkpoints


RUN = "run.json"  # which run a folder holds


def difference(output_dir: Path, settings: dict) -> str | None:
    """The first setting in which the run of a folder is not ours, in words; None when it is ours, or there is no run."""
    if not (output_dir / RUN).is_file():
        return None
    try:
        other = read_object(output_dir / RUN)
    except ValueError as error:
        return f"of which nothing is known, for {error}"
    for key in sorted(settings.keys() | other.keys()):
        if settings.get(key) != other.get(key):
            return f"{key} was {other.get(key)!r} there and is {settings.get(key)!r} here"
    return None


def check_checkpoint(folder: Path, settings: dict):
    """Raises ValueError unless a checkpoint is whole and, as far as its folder tells, of a run with these settings."""
    fault, other = fault_of(folder), difference(folder.parent, settings)
    if fault or other:
        raise ValueError(f"cannot resume from {folder}: " + (fault or f"it belongs to another run: {other}"))


def check_output_dir(output_dir: Path, settings: dict):
    """Raises ValueError when a folder cannot be this run's; for another run's it names the first setting that differs."""
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r}: {str(place)!r} is a file; choose another one")
    other = difference(output_dir, settings)
    if other is not None:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds another run: {other}; choose another output_dir, or remove that folder"
        )
    # A run that was killed in its very first write has left `run.json.tmp` alone.
    names = {path.name for path in output_dir.iterdir()} if place == output_dir else set()
    if RUN not in names and names - {f"{RUN}.tmp"}:
        raise ValueError(
            f"output_dir {str(output_dir)!r} is not empty and holds no run of ours ({RUN}); choose another one"
        )


def claim_output_dir(output_dir: Path, settings: dict):
    """Marks a folder as this run's. Raises ValueError when it cannot be."""
    check_output_dir(output_dir, settings)
    if not (output_dir / RUN).is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RUN, settings)


# The settings of `TrainingArguments` that decide what a run computes; a method's own settings all do.
DECISIVE_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "tf32", "full_determinism"),
)


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
