"""Exact resume: a run that is stopped at any moment and started again ends bitwise like one that was never stopped.

`checkpoints.py` says what a checkpoint is on the disk, `other_launch.py` how one of another launch is read. Everything that we
use of `Trainer` beyond its documented interface is in this file and, for FSDP2, in `sharded_trainer.py`; tests/test_exact_resume.py
has one test for each hook here, which says what an upgrade of transformers broke.
"""

import math
import shutil
import sys
from collections.abc import Callable, Sized
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import distributed
from torch.utils.data import RandomSampler
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from modeling_mcd.command_line import LOST_A_PROCESS, has_lost_a_process, wait_for_gloo_threads
from modeling_mcd.files import read_object
from trainers.adapters import is_adapted
from trainers.checkpoints import (
    MANIFEST,
    checkpoints_in,
    fault_of,
    last_complete_checkpoint,
    write_manifest,
)
from trainers.length_buckets import LengthBuckets
from trainers.other_launch import check_launch, format_of, load_optimizer, load_weights, own_format
from trainers.resume_arguments import ExactResumeArguments, check_intervals
from trainers.sharded_trainer import ShardedTrainer
from trainers.staging import Writer, copy_checkpoint
from trainers.stopping import TERMINATED, Termination
from trainers.stream_resume import Stream, check_place, loader_of, remember_places, restore_place, save_place


logger = logging.get_logger(__name__)
T = TypeVar("T")


# --- Processes


def from_first_process(function: Callable[[], T]) -> T:
    """Calls a function in the first process of a launch only, and returns its result in every process.

    If it fails, the first process raises its error and the others exit quietly with status 1.
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


# --- The trainer


class Companion(Protocol):
    """Something that a run keeps beside the network that the Trainer trains. Every checkpoint holds it."""

    in_parts: bool  # whether each process holds a part, and takes part in saving

    def save(self, folder: str):
        """Creates a folder and writes its state there. Called in the process that saves; with `in_parts` in all, together."""

    def shard(self, student, accelerator):
        """Called in every process once FSDP2 has divided the student, and never without FSDP2."""

    def load(self, folder: str):
        """Restores what `save` wrote. Called in every process, once optimizer and networks are ready."""


class _Number(NamedTuple):
    """A loss or a gradient norm that must be finite, and where in the run it was met."""

    name: str
    value: torch.Tensor | float
    step: int
    position: str
    done: torch.cuda.Event | None  # happens when the value has arrived on the CPU


class ExactResumeTrainer(ShardedTrainer):
    """A Trainer that resumes only from complete checkpoints, and that stops when a loss or gradient norm is not finite.

    A subclass puts everything else that it trains or follows into `self.companions`, under the name of its folder in a
    checkpoint.
    """

    def __init__(self, model, args: ExactResumeArguments, *arguments, **kwargs):
        super().__init__(model, args, *arguments, **kwargs)
        self._check_optimizer()
        self.companions: dict[str, Companion] = {}
        self._resumed_from: Path | None = None
        self._unfinished: Path | None = None  # the checkpoint that is being written
        self._stream_from: Path | None = None  # the checkpoint whose place in a stream is taken up
        self.termination = Termination()
        self._writer, self._staging = Writer(), args.staging_folder()
        self._unchecked: list[_Number] = []
        self.checks_later = self.args.device.type == "cuda"
        self._save_total_limit = args.save_total_limit
        self.add_callback(_CheckpointCallback(self))

    def _check_optimizer(self):
        """Raises ValueError if the optimizer cannot be built: the Trainer would notice only when the folder is claimed."""
        try:
            self.get_optimizer_cls_and_kwargs(self.args, self.model)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f"optim {self.args.optim.value!r} with optim_args {self.args.optim_args} cannot be built: {error}"
            ) from None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Like `Trainer.train`, but resumes only from a checkpoint that is complete and undamaged.

        SIGTERM ends the run after the next step: a checkpoint is saved, and the process exits with status 143 (`SystemExit`).

        Raises:
            ValueError: names what is wrong with the checkpoint.
            FloatingPointError: the loss or the gradient norm is not finite. Nothing is saved then.
            ConnectionError: another process of the launch has ended.
        """
        self._resumed_from = from_first_process(lambda: self._checkpoint_to_resume(resume_from_checkpoint))
        ignore_data_skip = self.args.ignore_data_skip
        if self._resumed_from is not None and self._restore_stream(self._resumed_from):
            self._stream_from, self.args.ignore_data_skip = self._resumed_from, True
        self.termination, self._writer = Termination(), Writer()
        self._clear_staging()  # of a run that was killed
        try:
            with self.termination:
                result = super().train(self._resumed_from and str(self._resumed_from), **kwargs)
                self._writer.wait()
            self.check_pending()
            if self.termination.stopped:
                self._exit()
            return result
        except Exception as error:
            if self.args.should_save and self._unfinished is not None:  # a full disk, for example
                shutil.rmtree(self._unfinished, ignore_errors=True)
            if has_lost_a_process(error):
                raise ConnectionError(f"{LOST_A_PROCESS}: {self._going_on()}") from None
            raise
        finally:
            self._writer.join()
            self._clear_staging()
            self._unfinished, self.args.save_total_limit = None, self._save_total_limit
            self._stream_from, self.args.ignore_data_skip = None, ignore_data_skip

    def _clear_staging(self):
        if self._staging is not None and self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _exit(self):
        """Ends a run that was told to stop, after its checkpoint was saved."""
        self.end()
        if self.args.process_index == 0:
            step, steps = self.state.global_step, self.state.max_steps
            line = f"stopped by SIGTERM after step {step} of {steps}; start the same command again: {self._going_on()}"
            print(line, file=sys.stderr, flush=True)
        raise SystemExit(TERMINATED)

    def _going_on(self) -> str:
        saved = self._last_saved()
        return "it begins again" if saved is None else f"it goes on from {saved}"

    def _last_saved(self) -> Path | None:
        self._writer.join()
        return next((f for f in checkpoints_in(Path(self.args.output_dir)) if (f / MANIFEST).exists()), None)

    def end(self):
        """Finishes trackers and the process group, at the end of a command. transformers before 5.20 has no such method."""
        self.accelerator.end_training()
        if self.args.world_size > 1:
            wait_for_gloo_threads()

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            folder = last_complete_checkpoint(Path(self.args.output_dir))
            if folder is None:
                raise ValueError(f"cannot resume: there is no complete checkpoint in {self.args.output_dir}")
        else:
            folder = Path(wanted)
            fault = fault_of(folder)
            if fault is not None:
                raise ValueError(f"cannot resume from {wanted}: {fault}")
        check_launch(folder, self)
        return folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        self.check_pending()
        if _internal_call and output_dir is not None:
            self._begin_checkpoint(Path(output_dir))
        super().save_model(output_dir, _internal_call)

    def _begin_checkpoint(self, folder: Path):
        """Called on every rank before the Trainer writes its first file."""
        # The Trainer would remove the previous checkpoint before this one has its manifest: `on_save` does it instead.
        self._save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._writer.wait()
        self._unfinished = folder
        if self.args.should_save:
            for place in {folder, Path(self.args.output_dir) / folder.name}:
                if place.exists():
                    logger.warning(f"writing {place} again")
                    shutil.rmtree(place)
        self.accelerator.wait_for_everyone()  # other ranks write into the folder too
        for name, companion in self.companions.items():
            if self.args.should_save or companion.in_parts:
                companion.save(str(folder / name))

    def _complete_checkpoint(self):
        """Called on every rank after the Trainer has written its last file."""
        self.args.save_total_limit = self._save_total_limit
        if isinstance(self.train_dataset, Stream):
            save_place(self.train_dataset, self.args, self.state.global_step, self._unfinished)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder, output_dir, rate = self._unfinished, self.args.output_dir, self.args.learning_rate
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit

            def write():
                if self._staging is None:
                    write_manifest(folder, learning_rate=rate)
                else:
                    copy_checkpoint(folder, Path(output_dir) / folder.name, learning_rate=rate)
                    shutil.rmtree(folder)
                rotate_checkpoints(output_dir, limit, best_model_checkpoint=best)  # by step: clocks are set back

            write() if self._staging is None else self._writer.start(write)
        self._unfinished = None

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _restore(self, folder: Path):
        """Restores what the Trainer does not: the companions, and a learning rate that was changed."""
        for name, companion in self.companions.items():
            companion.load(str(folder / name))
        old, new = read_object(folder / MANIFEST)["learning_rate"], self.args.learning_rate
        if old != new:  # optimizer and scheduler were restored with the old one
            for group in self.optimizer.param_groups:
                group["lr"] *= new / old
                group["initial_lr"] *= new / old
            self.lr_scheduler.base_lrs = [rate * new / old for rate in self.lr_scheduler.base_lrs]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
            logger.warning(f"learning_rate: {old:g} until {folder.name}, {new:g} from here on")

    def _is_of_another_launch(self, folder: str) -> bool:
        return format_of(Path(folder)) not in (None, own_format(self))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        if self._is_of_another_launch(resume_from_checkpoint):
            load_weights(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        if checkpoint is None or not self._is_of_another_launch(checkpoint):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def get_train_dataloader(self):
        stream = self.train_dataset
        if isinstance(stream, Stream):
            remember_places(stream, self.args)
            if stream.is_split:
                return loader_of(stream, self.args, self.data_collator)
        return super().get_train_dataloader()

    def _restore_stream(self, folder: Path) -> bool:
        """Takes up the place in a stream, if there is one and a checkpoint holds it; whether that was so."""
        stream = self.train_dataset
        known = isinstance(stream, Stream) and from_first_process(lambda: check_place(stream, self.args, folder))
        if known:
            restore_place(stream, self.args, folder)
        return known

    def get_batch_samples(self, *args, **kwargs):
        batches = super().get_batch_samples(*args, **kwargs)
        if self._stream_from is not None:  # the loader has drawn a number since the Trainer restored them
            self._load_rng_state(str(self._stream_from))
            self._stream_from = None
        return batches

    # Not documented in transformers: `_run_epoch` (there is no callback before an epoch's first step that can prevent it),
    # `_get_grad_norm` (no callback before the optimizer's step is given the norm), `_get_train_sampler` (there is no
    # argument for a sampler), and `_load_from_checkpoint`, `_load_optimizer_and_scheduler` and
    # `_get_output_dir` (the folder in which the Trainer creates a checkpoint) above.

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run that is restarted trains no further
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """`train_sampling_strategy: group_by_length` by an order that a resumed run repeats.

        With `dataloader_drop_last`, an epoch ends with its last complete global batch, however that is divided: the Trainer
        would take one more step of fewer micro-batches.
        """
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Sized):
            sampler = super()._get_train_sampler(train_dataset)
            full = len(rows) // self._global_batch() * self._global_batch() if isinstance(rows, Sized) else 0
            if type(sampler) is RandomSampler and self.args.dataloader_drop_last and full:
                sampler = RandomSampler(rows, num_samples=full, generator=sampler.generator)
            return sampler
        column = self.args.length_column_name
        if column in getattr(rows, "column_names", ()):
            lengths = rows[column]
        else:
            lengths = [len(rows[i]["input_ids"]) for i in range(len(rows))]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBuckets(lengths, self._global_batch(), seed, self.args.dataloader_drop_last)

    def _global_batch(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and self.accelerator.mixed_precision != "fp16":  # its loss scaler skips such steps
            self._stop_unless_finite(grad_norm, "gradient norm")
        return grad_norm

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.check_pending()  # those of the step before: this one's work is queued, so that the device has no pause
        self._stop_unless_finite(loss, "loss")
        return loss

    def _stop_unless_finite(self, value: torch.Tensor | float, name: str):
        """Checks a number: on a GPU later, since a look at it would wait until the GPU has computed it."""
        done = None
        if self.checks_later and isinstance(value, torch.Tensor):
            value = value.detach().to("cpu", non_blocking=True)
            if torch.cuda.is_available():
                done = torch.cuda.Event()
                done.record()
        self._unchecked.append(_Number(name, value, self.state.global_step, self.schedule_position(), done))
        if not self.checks_later:
            self.check_pending()

    def check_pending(self):
        """Waits for the numbers that were not checked yet. Called before anything of the network is saved or handed on.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        numbers, self._unchecked = self._unchecked, []
        for number in numbers:
            if number.done is not None:
                number.done.synchronize()
            if not math.isfinite(number.value):
                self._stop(number)

    def _stop(self, number: "_Number"):
        saved = self._last_saved()
        advice = "start again with a smaller learning_rate and another output_dir"
        if saved is not None:
            advice = (
                f"to go on from the last checkpoint with a smaller learning rate, add `--resume_from_checkpoint {saved} "
                f"--output_dir NEW_FOLDER --learning_rate {self.args.learning_rate / 2:g}` to the same command"
            )
        raise FloatingPointError(
            f"the {number.name} is {float(number.value)} at step {number.step}{number.position}, and nothing was saved since "
            f"the last checkpoint; {advice}"
        )

    def schedule_position(self) -> str:
        """Where the run is in the method's schedule, for messages; empty if the method has none."""
        return ""


class _CheckpointCallback(TrainerCallback):
    """Restores what the Trainer does not, before the first step, and completes each checkpoint."""

    def __init__(self, trainer: ExactResumeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        check_intervals(args, state.max_steps)
        if is_deepspeed_zero3_enabled():
            network = self.trainer.accelerator.unwrap_model(self.trainer.model)
            register_head(network.get_base_model() if is_adapted(network) else network)
        if self.trainer._resumed_from is not None:
            self.trainer._restore(self.trainer._resumed_from)
        self.trainer.termination.listen()

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(
            self.trainer.train_dataset, Stream
        ):  # one epoch, of which a resumed run does not count the start
            state.epoch = state.global_step / state.max_steps
        self.trainer._writer.check()
        if self.trainer.termination.stops_after(state.global_step):
            control.should_log = control.should_save = control.should_training_stop = True

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
    """Tells ZeRO-3 that the model itself reads the head's parameters (`hidden_rows`), beside the head's own forward, and the
    coupling's.

    ZeRO-3 would discover this on the first partitioned access. On a resumed run that is after it has recorded the
    parameter order, and the next step fails against that record.
    """
    import deepspeed

    coupling = getattr(model, "coupling", None)
    modules = (model.get_output_embeddings(), *([] if coupling is None else [coupling]))
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        deepspeed.zero.register_external_parameter(model, parameter)
