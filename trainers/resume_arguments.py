"""The settings of a run that can be resumed: those that would break exact resume, or would do nothing, are refused."""

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from modeling_mcd.checks_mdlm import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_numbers
from trainers.deepspeed_build import check_build_cache
from trainers.sharded_trainer import check_fsdp


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
    """`TrainingArguments` that refuse every setting that would break exact resume or would do nothing.

    Raises:
        ValueError: names the setting at fault; also if several processes were launched that would not be synchronised.
    """

    output_dir: str = field(metadata={"help": "Folder of the run: its checkpoints and the finished model."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; null: all."})
    checkpoint_staging: str | None = field(
        default=None,
        metadata={"help": "Fast folder, as /dev/shm: checkpoints are copied from it meanwhile."},
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push to the Hub: only 'end' is possible."})
    # Those that a run follows, and why it refuses the others.
    hub_strategies = {"end": "a run is pushed once, when it is finished"}

    def __post_init__(self):
        check_build_cache(self.deepspeed)
        pick_cpu_backend(self)
        if self.learning_rate is None:
            raise ValueError("learning_rate is null, but must be a positive number")
        check_numbers(self, **TRAINING_NUMBERS)
        given = self.accelerator_config
        super().__post_init__()
        if given is None and self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # or every batch waits until the device has nothing left to do
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
        if self.hub_strategy.value not in self.hub_strategies:
            raise ValueError(
                f"hub_strategy is {self.hub_strategy.value!r}, but {', or '.join(self.hub_strategies.values())}: set it to "
                f"{' or '.join(map(repr, self.hub_strategies))}"
            )
        try:
            for callback in get_reporting_integration_callbacks(self.report_to):
                callback()
        except (RuntimeError, ValueError) as error:  # its package is missing, or there is no such tracker
            raise ValueError(f"report_to {self.report_to}: {error} Or take report_to none.") from None
        check_intervals(self, self.max_steps)
        self._check_scheduler()
        self._check_staging()

    def staging_folder(self) -> Path | None:
        """Where the checkpoints of this run are first written, if not in its output folder."""
        if self.checkpoint_staging is None:
            return None
        place = Path(self.output_dir).absolute()
        name = f"{place.name}-{hashlib.blake2b(str(place).encode(), digest_size=8).hexdigest()}"
        return Path(self.checkpoint_staging) / name

    def _check_staging(self):
        if self.checkpoint_staging is None:
            return
        fault = None
        if not os.access(self.checkpoint_staging, os.W_OK | os.X_OK):
            fault = "but no folder there can be written to: create it, or leave it out"
        elif self.metric_for_best_model is not None:
            fault = "which cannot keep the best checkpoint: leave it or metric_for_best_model out"
        elif self.world_size > int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size)):
            fault = "which is for the processes of one machine: leave it out"
        if fault is not None:
            raise ValueError(f"checkpoint_staging is {self.checkpoint_staging!r}, {fault}")

    def _check_scheduler(self):
        kind, options = self.lr_scheduler_type, self.lr_scheduler_kwargs
        try:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
            get_scheduler(kind, optimizer, 0, 1, options)
            if options and kind in ("constant", "constant_with_warmup"):  # these two ignore their options
                raise TypeError(f"it has no option {next(iter(options))!r}")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type {kind.value!r} with lr_scheduler_kwargs {options} cannot be built: {error}"
            ) from None

    def _check_processes(self):
        """Raises ValueError for launches that would not do what they say."""
        check_fsdp(self)
        if self.mixed_precision == "fp16" and self.device.type == "cpu":
            raise ValueError(
                "fp16 does nothing on a CPU, where a run would silently be in float32: leave it out, or take bf16"
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process, which the Trainer would use through DataParallel: start with "
                "`accelerate launch --multi_gpu`, or choose one by CUDA_VISIBLE_DEVICES=0"
            )
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and (self.world_size != processes or self.distributed_state.distributed_type == "NO"):
            raise ValueError(
                f"{processes} processes were launched, but accelerate would not synchronise their gradients; start with "
                "`accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml` (or another configuration there)"
            )


def pick_cpu_backend(arguments: TrainingArguments):
    """Without an accelerator, chooses gloo under DeepSpeed and accelerate's CPU mode otherwise.

    With any other choice the ranks would train without being synchronised.
    """
    if torch.accelerator.is_available():
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            arguments.ddp_backend, arguments.use_cpu = arguments.ddp_backend or "gloo", False
    else:
        arguments.use_cpu = True


def check_intervals(args: TrainingArguments, max_steps: int):
    """Raises ValueError unless every checkpoint falls on a log line. Intervals below 1 are fractions of `max_steps`."""
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
