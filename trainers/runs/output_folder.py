"""The output folder of a run: whether it belongs to the run, where to resume, and how models are saved into it."""

import dataclasses
import os
import shutil
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from modeling_mcd.files import LOCK, new_folder, read_object, write_json
from trainers.checkpoints import clear_later_checkpoints, fault_of, last_complete_checkpoint
from trainers.runs.adapter_options import save_network
from trainers.runs.recipe import RECIPE_FOLDER


RUN = "run.json"  # the settings of the run that a folder holds
STARTED_FROM = (
    "started_from"  # a key of run.json that is not a setting: a checkpoint in another folder, and what changed since
)

# The settings of `TrainingArguments` that decide what a run computes. All of a method's own settings do.
DECISIVE_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("seed", "data_seed", "tf32", "full_determinism", "train_sampling_strategy"),
)
# Settings that the run.json of earlier versions lacks, and what these did.
EARLIER = {"padding": "unseen", "loss_norm": "tokens", "train_sampling_strategy": "random", "split_stream": False}
INDECISIVE = (
    "num_proc",
    "checkpoint_staging",
    "peak_tflops",
    "follower_device",
)  # how something is computed or measured, not what
# Those that may change when a run goes on from a checkpoint in another folder.
CHANGEABLE_SETTINGS = ("learning_rate", "max_grad_norm")


def run_settings(training: TrainingArguments, *arguments) -> dict:
    """The settings that identify a run: equal ones compute the same, whatever the number of processes."""
    settings = {key: value for instance in arguments for key, value in dataclasses.asdict(instance).items()}
    own = {f.name for f in dataclasses.fields(training)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    settings |= {key: value for key, value in training.to_dict().items() if key in own or key in DECISIVE_SETTINGS}
    settings = {key: value for key, value in settings.items() if key not in INDECISIVE}
    # The precision that is really used: it may come from `accelerate launch` or its configuration.
    settings |= {precision: training.mixed_precision == precision for precision in ("bf16", "fp16")}
    settings["global_batch_size"] = (
        training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    return settings


def recipe_text(training: TrainingArguments, *arguments) -> str:
    """The recipe of a run as YAML, for its model card. It runs as it is and names no path of this machine.

    Of a local path only the last part is kept; the first line says for which keys readers have to put in their own.
    """
    defaults = {f.name: f.default for instance in (training, *arguments) for f in dataclasses.fields(instance)}
    settings = run_settings(training, *arguments)
    settings = {key: value for key, value in settings.items() if value is not None or defaults.get(key) is not None}
    settings["per_device_train_batch_size"] = settings.pop("global_batch_size") // training.gradient_accumulation_steps
    settings["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    portable = {key: portable_path(value) for key, value in settings.items()}
    local = [key for key, value in portable.items() if value != settings[key] and not str(value).startswith("./")]
    portable["output_dir"] = portable_path(training.output_dir)
    head = f"# Local files of the author, put yours: {', '.join(local)}\n" if local else ""
    return head + yaml.safe_dump(portable, sort_keys=False)


def portable_path(value):
    """A path without the parts that only this machine has. Shipped files are named relative to the shipped recipes."""
    if isinstance(value, list):
        return [portable_path(item) for item in value]
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    path = Path(value)
    if path.is_relative_to(RECIPE_FOLDER):
        return f"./{path.relative_to(RECIPE_FOLDER)}"
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def short_name(source: str | None) -> str | None:
    """A folder's path without the parts that only this machine has; a Hub name is returned unchanged."""
    if source is None or not Path(source).exists():
        return source
    path = Path(source).resolve()
    for root in (RECIPE_FOLDER.parent, Path.cwd()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return path.name


def difference(output_dir: Path, settings: dict, changeable: tuple[str, ...] = ()) -> str | None:
    """The first setting in which the run of a folder differs from ours, in words; None if there is no run, or it is ours.

    Settings that only the folder's run has are not compared.
    """
    if not (output_dir / RUN).is_file():
        return None
    try:
        other = read_object(output_dir / RUN)
    except ValueError as error:
        return f"which cannot be identified: {error}"
    for key in sorted(settings.keys() - {STARTED_FROM, *changeable}):
        if settings[key] != other.get(key, EARLIER.get(key)):
            if key.endswith("_digest"):
                return f"its {key.removesuffix('_digest').replace('_', ' ')} was another one"
            return f"{key} was {other.get(key)!r} there and is {settings[key]!r} here"
    return None


def check_checkpoint(folder: Path, settings: dict):
    """Raises ValueError unless a checkpoint is complete and, as far as its folder says, from a run with these settings."""
    fault, other = fault_of(folder), difference(folder.parent, settings, CHANGEABLE_SETTINGS)
    if fault or other:
        raise ValueError(
            f"cannot resume from {folder}: "
            + (fault or f"it belongs to another run: {other} (only {' and '.join(CHANGEABLE_SETTINGS)} may change)")
        )


def check_output_dir(output_dir: Path, settings: dict):
    """Raises ValueError if a folder cannot belong to this run; names the first setting that differs from another run's."""
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r}: {str(place)!r} is a file; choose another one")
    other = difference(output_dir, settings)
    if other is not None:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds another run: {other}; choose another output_dir, or remove that folder"
        )
    names = {path.name for path in output_dir.iterdir()} if place == output_dir else set()
    # A run that was killed during its first write has left its lock and part of run.json.
    names = {name for name in names if name != LOCK and not name.startswith(f".{RUN}.")}
    if names and RUN not in names:
        raise ValueError(
            f"output_dir {str(output_dir)!r} is not empty and holds no run of ours ({RUN}); choose another one"
        )


def find_checkpoint(output_dir: Path, wanted: str | None, settings: dict) -> Path | None:
    """The checkpoint to resume from; None if there is none. Writes nothing.

    `wanted` names one. If it is in another folder, this run begins there; once this run has a checkpoint of its own, it
    resumes from that.

    Raises:
        ValueError: the checkpoint or the output folder belongs to another run.
    """
    check_output_dir(output_dir, settings)
    if wanted is not None:
        check_checkpoint(Path(wanted), settings)
        if Path(wanted).resolve().parent == output_dir.resolve():
            return Path(wanted)
    return last_complete_checkpoint(output_dir) or (Path(wanted) if wanted is not None else None)


def claim_output_dir(output_dir: Path, settings: dict, checkpoint: Path | None):
    """Claims a folder for this run: the first write. Call it after every check has passed, with the folder locked."""
    for remains in output_dir.glob(f".{RUN}.*"):
        remains.unlink()
    if not (output_dir / RUN).is_file():
        if checkpoint is not None and (checkpoint.parent / RUN).is_file():
            old = read_object(checkpoint.parent / RUN)
            changed = {
                key: [old.get(key), settings[key]] for key in CHANGEABLE_SETTINGS if old.get(key) != settings[key]
            }
            settings = settings | {STARTED_FROM: {"checkpoint": str(checkpoint), "changed": changed}}
        write_json(output_dir / RUN, settings)
    own = checkpoint is None or checkpoint.resolve().parent == output_dir.resolve()
    if own:
        clear_later_checkpoints(output_dir, checkpoint)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments, name: str = "", **adapter
):
    """Saves a model and its tokenizer into the output folder, or into its subfolder `name`. No file is left half-written.

    Args:
        adapter: how an adapter is saved, see `save_network`.
    """
    if not training.should_save:
        return
    output_dir = Path(training.output_dir)
    if name:
        with new_folder(output_dir / name) as folder:
            save_network(model, folder, **adapter)
            tokenizer.save_pretrained(folder)
            shutil.rmtree(output_dir / name, ignore_errors=True)
        return
    folder = output_dir / ".student.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        save_network(model, folder, **adapter)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.is_dir():
                shutil.rmtree(output_dir / file.name, ignore_errors=True)
            os.replace(file, output_dir / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
