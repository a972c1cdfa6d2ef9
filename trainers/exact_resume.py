"""Exact resume: a run that is stopped at any moment and started again ends bitwise as one that never was.

A checkpoint is complete when it has a manifest, which is written last and holds the digest of every file. Everything that
we use of `Trainer` beyond its documented interface is in this file; tests/test_exact_resume.py has one test for each,
which says what an upgrade of transformers broke.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from modeling_mcd.checks_mdlm import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_numbers
from modeling_mcd.files import write_json
from trainers.deepspeed_build import check_build_cache


logger = logging.get_logger(__name__)
T = TypeVar("T")

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"


# --- Checkpoints on the disk


def digest_of(path: Path) -> str:
    """BLAKE2b of a file, read in pieces. A file that has not changed since the last call is not read again."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, *version: int) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, **facts):
    """Completes a checkpoint: every file with its size and digest, and what else resuming needs to know."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_of, files)
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    write_json(folder / MANIFEST, {"files": entries, **facts})


def read_object(path: Path) -> dict:
    """Raises ValueError, which names the file, unless it holds a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or not even UTF-8
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is cut off, or no JSON object")
    return content


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file in it is the one that was saved."""
    try:
        files = read_object(folder / MANIFEST).get("files")
        read_object(folder / TRAINER_STATE)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: it was never written to the end"
    except ValueError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{MANIFEST} has no digests: it is of an earlier version of this library"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes and should have {entry['bytes']}"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_of, [folder / name for name in files])
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["blake2b"]:
                return f"{name} is damaged: its digest is not that of the file that was saved"
    return None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, complete or not, the newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of, reverse=True)


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint to resume from. Says of each newer one why it is passed over.

    Raises:
        ValueError: when checkpoints were completed there and none of them can be used: to begin again at step 0 would in
            the end write over them.
    """
    damaged = []
    for folder in checkpoints_in(output_dir):
        fault = fault_of(folder)
        if fault is None:
            return folder
        logger.warning(f"{folder} is passed over: {fault}")
        if (folder / MANIFEST).exists():
            damaged.append(f"{folder.name}: {fault}")
    if damaged:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds checkpoints, but none to resume from ({'; '.join(damaged)}). Nothing "
            "was removed: choose another output_dir, or move them away to begin again"
        )
    return None


def clear_later_checkpoints(output_dir: Path, keep: Path | None):
    """Clears the way for a run that goes on from `keep`, or begins: no remains of an interrupted save lie before it.

    With a checkpoint to go on from, later ones are removed, with a line for each. Without one nothing is removed: what was
    left by a save that never ended is renamed to `incomplete-checkpoint-N`.
    """
    for folder in checkpoints_in(output_dir):
        if keep is None:
            aside = output_dir / f"incomplete-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning(f"{folder} was never completed, and there is nothing to resume from: it is now {aside}")
        elif step_of(folder) > step_of(keep):
            logger.warning(f"removing {folder} ({fault_of(folder) or 'it is later'}): the run goes on from {keep}")
            shutil.rmtree(folder)


# --- Processes


def from_first_process(function: Callable[[], T]) -> T:
    """Calls a function in the first process of a launch alone, and returns what it returned in all of them.

    When it fails, the first process raises its error, and the others end quietly with status 1.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return function()
    outcome, error = [None, False], None
    if distributed.get_rank() == 0:
        try:
            outcome = [function(), False]
        except Exception as raised:
            outcome, error = [None, True], raised
    distributed.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1]:
        raise SystemExit(1)
    return outcome[0]


# --- Settings

# Values that `TrainingArguments` accepts unchecked and that fail mid-run or train nothing.
TRAINING_NUMBERS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), AT_LEAST_1),
    "gradient_accumulation_steps": AT_LEAST_1,
    **dict.fromkeys(("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), BELOW_1),
    **dict.fromkeys(("adam_epsilon", "weight_decay", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    "dataloader_num_workers": NOT_NEGATIVE,
    "save_total_limit": AT_LEAST_1,
    "max_steps": ("be at least 1, or -1 to count epochs", lambda value: value == -1 or value >= 1),
    "seed": ("lie in [0, 2^32)", lambda value: 0 <= value < 2**32),
}


@dataclass
class ExactResumeArguments(TrainingArguments):
    """`TrainingArguments` with every setting refused that would break exact resume, or that would do nothing.

    Raises:
        ValueError: names the setting at fault; also when several processes were launched that would not be synchronised.
    """

    output_dir: str = field(metadata={"help": "Folder of the run: its checkpoints and the finished model."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; null: all."})
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub: only 'end' is possible."})

    def __post_init__(self):
        check_build_cache(self.deepspeed)
        pick_cpu_backend(self)
        if self.learning_rate is None:
            raise ValueError("learning_rate is null, but must be a positive number")
        check_numbers(self, **TRAINING_NUMBERS)
        super().__post_init__()
        self._check_processes()
        if self.save_only_model:
            raise ValueError(
                "save_only_model is true, but such checkpoints have no optimizer, and a run could not be resumed from "
                "them: set it to false (the finished model is saved by itself, without an optimizer)"
            )
        if self.save_total_limit == 1 and self.metric_for_best_model is not None:
            raise ValueError(
                "save_total_limit is 1, but with load_best_model_at_end or metric_for_best_model the best and the last "
                "checkpoint are both needed: give at least 2"
            )
        if self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy is {self.hub_strategy.value!r}, but a run is pushed once, when it is finished: set it to 'end'"
            )
        try:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()
        except (RuntimeError, ValueError) as error:  # its package is missing, or there is no such tracker
            raise ValueError(f"report_to {self.report_to}: {error} Or take report_to none.") from None
        check_intervals(self, self.max_steps)
        self._check_scheduler()

    def _check_scheduler(self):
        kind, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        try:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
            get_scheduler(kind, optimizer, 0, 1, options)
            if options and kind in ("constant", "constant_with_warmup"):  # which would not look at them
                raise TypeError(f"it has no option {next(iter(options))!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type {kind.value!r} with lr_scheduler_kwargs {options} cannot be built: {error}"
            ) from None

    def _check_processes(self):
        """Launches that do something else than what they say."""
        if self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "FSDP is not supported (on a CPU it would silently be DDP): use recipes/accelerate/ddp_gpu.yaml, or "
                "zero2_cpu.yaml or zero3_cpu.yaml there to shard optimizer or weights"
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and (self.world_size != processes or self.distributed_state.distributed_type == "NO"):
            raise ValueError(
                f"{processes} processes were launched, but accelerate would not synchronise their gradients; start with "
                "`accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml` (or another configuration there)"
            )


def pick_cpu_backend(arguments: TrainingArguments):
    """Without an accelerator: gloo under DeepSpeed, else accelerate's CPU mode. Other launches train unsynchronised ranks."""
    if torch.accelerator.is_available():
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            arguments.ddp_backend, arguments.use_cpu = arguments.ddp_backend or "gloo", False
    else:
        arguments.use_cpu = True


def check_intervals(args: TrainingArguments, max_steps: int):
    """Raises ValueError unless checkpoints fall on log lines. Ratios below 1 are of `max_steps`, once that is known."""
    if args.save_strategy != "steps" or args.logging_strategy != "steps":
        return
    intervals = args.save_steps, args.logging_steps
    if min(intervals) < 1:
        if max_steps < 1:
            return
        intervals = [math.ceil(max_steps * steps) if steps < 1 else steps for steps in intervals]
    if intervals[0] % intervals[1]:
        of = f", which is every {intervals[0]:g} and every {intervals[1]:g} of {max_steps} steps,"
        raise ValueError(
            f"save_steps ({args.save_steps:g}) must be a multiple of logging_steps ({args.logging_steps:g})"
            f"{of if list(intervals) != [args.save_steps, args.logging_steps] else ''}: a run that is resumed between two "
            "log lines could not give the same line again"
        )


# --- The trainer


class Companion(Protocol):
    """What a run keeps beside the network that the Trainer trains, and what every checkpoint therefore holds."""

    def save(self, folder: str):
        """Writes its state into a folder, which it makes. Called by the process that saves."""

    def load(self, folder: str):
        """Restores what `save` wrote. Called by every process, when optimizer and networks are ready."""


class ExactResumeTrainer(Trainer):
    """A Trainer whose checkpoints are complete or are not trusted, and which stops when a number is not finite.

    A subclass puts what else it trains or follows into `self.companions`, by the name of its folder in a checkpoint.
    """

    def __init__(self, model, args: ExactResumeArguments, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        self._check_optimizer()
        self.companions: dict[str, Companion] = {}
        self._resumed_from: Path | None = None
        self._unfinished: Path | None = None  # the checkpoint that is being written
        self._save_total_limit = args.save_total_limit
        self.add_callback(_CheckpointCallback(self))

    def _check_optimizer(self):
        """The Trainer would build it only in `train`, after the output folder is claimed."""
        try:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f"optim {self.args.optim.value!r} with optim_args {self.args.optim_args} cannot be built: {error}"
            ) from None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`, but resumes only from a checkpoint that is complete and undamaged.

        Raises:
            ValueError: names what is wrong with the checkpoint.
            FloatingPointError: when the loss or the gradient norm is not finite. Nothing is saved then.
        """
        self._resumed_from = from_first_process(lambda: self._checkpoint_to_resume(resume_from_checkpoint))
        try:
            return super().train(self._resumed_from and str(self._resumed_from), **kwargs)
        except Exception:
            if self.args.should_save and self._unfinished is not None:  # a full disk, for example
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        finally:
            self._unfinished, self.args.save_total_limit = None, self._save_total_limit

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            folder = last_complete_checkpoint(Path(self.args.output_dir))
            if folder is None:
                raise ValueError(f"cannot resume: there is no complete checkpoint in {self.args.output_dir}")
            return folder
        fault = fault_of(Path(wanted))
        if fault is not None:
            raise ValueError(f"cannot resume from {wanted}: {fault}")
        return Path(wanted)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if _internal_call and output_dir is not None:
            self._begin_checkpoint(Path(output_dir))
        super().save_model(output_dir, _internal_call)

    def _begin_checkpoint(self, folder: Path):
        """Called before the Trainer writes its first file, on every rank."""
        # The Trainer would remove the previous checkpoint before this one has its manifest: `on_save` does it instead.
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._unfinished = folder
        if self.args.should_save:
            if folder.exists():
                logger.warning(f"writing {folder} again")
                shutil.rmtree(folder)
            for name, companion in self.companions.items():
                companion.save(str(folder / name))
        self.accelerator.wait_for_everyone()  # other ranks write into the folder too

    def _complete_checkpoint(self):
        """Called after the Trainer has written its last file, on every rank."""
        self.args.save_total_limit = self._save_total_limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(self._unfinished, learning_rate=self.args.learning_rate)
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(self.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)
        self._unfinished = None

    def _restore(self, folder: Path):
        """What the Trainer does not restore itself: the companions, and a learning rate that was changed."""
        for name, companion in self.companions.items():
            companion.load(str(folder / name))
        old, new = read_object(folder / MANIFEST)["learning_rate"], self.args.learning_rate
        if old != new:  # optimizer and scheduler have brought the old one with them
            for group in self.optimizer.param_groups:
                group["lr"] *= new / old
                group["initial_lr"] *= new / old
            self.lr_scheduler.base_lrs = [rate * new / old for rate in self.lr_scheduler.base_lrs]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
            logger.warning(f"learning_rate: {old:g} until {folder.name}, {new:g} from here on")

    # Not documented in transformers: `_run_epoch` (there is no callback before an epoch's first step that can prevent it)
    # and `_get_grad_norm` (no callback before the optimizer's step is given the norm).

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run that is restarted trains no further
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.mixed_precision != "fp16":  # its loss scaler skips such steps
            self._stop_unless_finite(grad_norm, "gradient norm")
        return grad_norm

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss, "loss")
        return loss

    def _stop_unless_finite(self, value: torch.Tensor | float, name: str):
        if math.isfinite(value):
            return
        saved = next((f for f in checkpoints_in(Path(self.args.output_dir)) if (f / MANIFEST).exists()), None)
        advice = "start again with a smaller learning_rate and another output_dir"
        if saved is not None:
            advice = (
                f"to go on from the last checkpoint with a smaller learning rate, add `--resume_from_checkpoint {saved} "
                f"--output_dir NEW_FOLDER --learning_rate {self.args.learning_rate / 2:g}` to the same command"
            )
        raise FloatingPointError(
            f"the {name} is {float(value)} at step {self.state.global_step}{self.schedule_position()}, and nothing was "
            f"saved since the last checkpoint; {advice}"
        )

    def schedule_position(self) -> str:
        """Where in the method's schedule the run is, for messages; empty when the method has no schedule."""
        return ""


class _CheckpointCallback(TrainerCallback):
    """Restores what the Trainer does not, when everything is ready and nothing has run; completes each checkpoint."""

    def __init__(self, trainer: ExactResumeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        check_intervals(args, state.max_steps)
        if is_deepspeed_zero3_enabled():
            register_head(self.trainer.accelerator.unwrap_model(self.trainer.model))
        if self.trainer._resumed_from is not None:
            self.trainer._restore(self.trainer._resumed_from)

    def on_save(self, args, state, control, **kwargs):
        self.trainer._complete_checkpoint()

    def on_train_end(self, args, state, control, **kwargs):
        if (
            args.load_best_model_at_end and state.best_model_checkpoint is not None
        ):  # the Trainer has loaded its network
            best = Path(state.best_model_checkpoint)
            fault = from_first_process(lambda: fault_of(best))
            if fault is not None:
                raise ValueError(f"load_best_model_at_end: the best checkpoint, {best}, cannot be used: {fault}")
            for name, companion in self.trainer.companions.items():
                companion.load(str(best / name))


def register_head(model: torch.nn.Module):
    """Tells ZeRO-3 that the model itself reads the head's parameters (`hidden_rows`), beside the head's own forward.

    ZeRO-3 would discover this on the first partitioned access. On a resumed run that is after it has recorded the
    parameter order, and the next step fails against that record.
    """
    import deepspeed

    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)
