"""What all methods share: the noise of a step, followers in every checkpoint, exact resume, logs, and when to stop."""

import math
import os
import shutil
from collections.abc import Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from modeling_mcd.checks_mdlm import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, check_numbers
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.noise_schedule_mdlm import noise_schedule_of
from trainers.exact_resume import fault_of, last_whole_checkpoint, register_head, write_manifest
from trainers.teacher import EMACallback, Follower
from trainers.trajectories import step_noise


EVALUATION_STEP = 2**63  # no training step: evaluation has a stream of noise of its own

TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "attention_mask")  # of the rows of a dataset

# What `TrainingArguments` takes as it comes, to fail on it in the middle of a run, or to train nothing.
TRAINING_NUMBERS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), AT_LEAST_1),
    "gradient_accumulation_steps": AT_LEAST_1,
    **dict.fromkeys(("learning_rate", "num_train_epochs", "logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), BELOW_1),
    **dict.fromkeys(("adam_epsilon", "weight_decay", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    "dataloader_num_workers": NOT_NEGATIVE,
    "max_steps": ("be at least 1, or -1 to count epochs", lambda value: value == -1 or value >= 1),
    "seed": ("lie in [0, 2^32)", lambda value: 0 <= value < 2**32),
}


@dataclass
class DiffusionTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults that masked diffusion needs, and the EMA of the student.

    Raises:
        ValueError: names the setting at fault; also when several processes were launched that would not be synchronised.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Blocks are not the model's arguments."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "The time strata need whole batches."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run instead."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning-rate schedule."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is always used."}
    )
    ema_decay: float | None = field(
        default=0.9999, metadata={"help": "Decay of the student's EMA, with warm-up; null: none."}
    )

    def __post_init__(self):
        pick_cpu_backend(self)
        check_numbers(self, **TRAINING_NUMBERS, ema_decay=("lie in [0, 1) or be null", BELOW_1[1]))
        super().__post_init__()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and (self.world_size != processes or self.distributed_state.distributed_type == "NO"):
            raise ValueError(
                f"{processes} processes were launched, but accelerate would not synchronise their gradients; start with "
                "`accelerate launch --config_file recipes/accelerate/ddp_cpu.yaml` (or another configuration there)"
            )
        for callback in get_reporting_integration_callbacks(self.report_to):
            try:
                callback()
            except RuntimeError as error:  # its package is missing
                raise ValueError(f"report_to {self.report_to}: {error} Or take report_to none.") from None
        if self.save_strategy == "steps" and self.logging_strategy == "steps" and self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of logging_steps ({self.logging_steps}): a run that "
                "is resumed between two log lines could not give the same line again"
            )


def pick_cpu_backend(arguments: TrainingArguments):
    """Without an accelerator: gloo under DeepSpeed, else accelerate's CPU mode. Other launches train unsynchronised ranks."""
    if torch.accelerator.is_available():
        return
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if distributed:
            arguments.ddp_backend, arguments.use_cpu = arguments.ddp_backend or "gloo", False
    else:
        arguments.use_cpu = True


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of rows: `input_ids` [B, L], with `labels` and `attention_mask` [B, L] where the rows call for them.

    Rows may hold `labels` (-100: neither noised nor scored), `completion_mask` (0: the same) and `attention_mask` (0: not
    seen either). Shorter rows are padded on the right, and the padding is neither seen nor noised.

    Raises:
        ValueError: names a column with a value for each token that has no meaning here, such as `position_ids`.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    for name, value in rows[0].items():
        per_token = hasattr(value, "__len__") and not isinstance(value, str) and len(value) == lengths[0]
        if per_token and name not in TOKEN_COLUMNS:
            raise ValueError(
                f"the rows hold a column {name!r} with a value for each token, which has no meaning here "
                f"({', '.join(TOKEN_COLUMNS)} have): remove it from the dataset"
            )

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[value] * (max(lengths) - len(row[name]))] for row in rows]).long()

    batch = {"input_ids": padded("input_ids", 0)}
    if "labels" in rows[0]:
        batch["labels"] = padded("labels", -100)
    if "completion_mask" in rows[0]:
        batch["labels"] = batch.get("labels", batch["input_ids"]).masked_fill(padded("completion_mask", 0) == 0, -100)
    if "attention_mask" in rows[0]:
        batch["attention_mask"] = padded("attention_mask", 0)
    elif min(lengths) < max(lengths):
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def may_be_noised(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tokens [B, L] that noise and loss are for: not the prompt, whose `labels` are -100, and not the padding."""
    maskable = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    if "labels" in inputs:
        maskable &= inputs["labels"] != -100
    if "attention_mask" in inputs:
        maskable &= inputs["attention_mask"].bool()
    return maskable


def check_training_batch(arguments: TrainingArguments, dataset):
    """Raises ValueError for less text than one global batch: with `dataloader_drop_last`, nothing at all would be trained."""
    processes, accumulation = arguments.world_size, arguments.gradient_accumulation_steps
    batch = arguments.train_batch_size * processes * accumulation
    blocks = len(dataset) if isinstance(dataset, Sized) else sum(1 for _ in islice(dataset, batch))
    if blocks < batch:
        raise ValueError(
            f"per_device_train_batch_size is {arguments.per_device_train_batch_size}, a global batch of {batch} "
            f"(processes: {processes}, accumulated: {accumulation}), but the training text has only {blocks} blocks: "
            "make it smaller, or give more text"
        )


class DiffusionTrainer(Trainer):
    """A Trainer whose loss is drawn from keyed noise, and whose checkpoints hold every network that the run needs.

    A subclass writes `compute_loss`, calling `noise_of_batch` for its randomness and `record` for what it logs, and puts
    each network that follows the student into `self.followers`.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the micro-batch

    def __init__(self, model, args: DiffusionTrainingArguments, *, data_collator=collate_blocks, **kwargs):
        super().__init__(model, args, data_collator, **kwargs)
        self.check_optimizer()
        if self.train_dataset is not None:
            check_training_batch(args, self.train_dataset)
        if args.eval_strategy != "no":
            self.check_evaluation_batch(self.eval_dataset)
        self.model_accepts_loss_kwargs = False
        self.schedule = noise_schedule_of(self.model.config)
        self.mask_token_id = self.model.config.mask_token_id
        self.followers: dict[str, Follower] = {}
        if args.ema_decay is not None:
            self.followers["ema"] = Follower(self.model)
            self.followers["ema"].model.to(args.device)
            self.add_callback(EMACallback(self.followers["ema"], args.ema_decay))
        self._recorded: dict[str, list[torch.Tensor]] = {}
        self._noise_step, self._micro_step = None, 0

    def check_optimizer(self):
        """Raises ValueError for what the Trainer would find out only in `train`, when a run has claimed its folder."""
        args = self.args
        try:
            self.get_optimizer_cls_and_kwargs(args, self.model)
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
            get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, args.lr_scheduler_kwargs)
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(
                f"optim {args.optim.value!r} with optim_args {args.optim_args}, or lr_scheduler_type "
                f"{args.lr_scheduler_type.value!r} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}, cannot be had: {error}"
            ) from None

    def whole_student(self) -> torch.nn.Module:
        """The network that the run hands on, whole on every rank: the EMA if one is kept, else a copy of the student."""
        if "ema" in self.followers:
            return self.followers["ema"].model
        return Follower(self.accelerator.unwrap_model(self.model)).model

    def noise_of_batch(self, input_ids: torch.Tensor, draws: int = 1) -> tuple[torch.Tensor, ...]:
        """Stratified times [B], locking scalars u [B, L] and `draws` - 1 further uniforms [B, L], see `step_noise`."""
        rows, length = input_ids.shape
        seed, world_size = self.args.seed, self.args.world_size
        step = self.state.global_step if self.model.training else EVALUATION_STEP
        self._micro_step = self._micro_step + 1 if step == self._noise_step else 0
        self._noise_step = step
        first = (self._micro_step * world_size + self.args.process_index) * rows
        if step == EVALUATION_STEP:  # each batch is stratified by itself
            noise = step_noise(seed, step + first, range(rows), rows, length, draws)
        else:
            global_rows = rows * world_size * self.args.gradient_accumulation_steps
            noise = step_noise(seed, step, range(first, first + rows), global_rows, length, draws)
        return tuple(values.to(input_ids.device) for values in noise)

    def rows(self, network, positions: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, inputs: dict) -> HeadRows:
        """What a network makes of the canvas z [B, L] at noise level gamma [B], at some positions [B, L]."""
        return network(
            hidden_rows=positions,
            input_ids=z,
            timesteps=-gamma.log().float(),
            attention_mask=inputs.get("attention_mask"),
        )

    def record(self, **values: torch.Tensor | float):
        """Notes scalars of this micro-batch; their mean over micro-batches and ranks joins the next log line."""
        for name, value in values.items():
            self._recorded.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float64).detach().cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self._recorded:
            means = torch.stack([torch.stack(values).mean() for values in self._recorded.values()])
            means = self.accelerator.reduce(means.to(self.args.device), "mean").tolist()
            logs = {**logs, **dict(zip(self._recorded, means, strict=True))}
            self._recorded.clear()
        if "train_loss" in logs:
            # The Trainer's own figure covers only the steps since the last resume.
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            logs["train_loss"] = sum(losses) / len(losses) if losses else logs["train_loss"]
        super().log(logs, start_time)

    def compute_loss_context_manager(self):
        return self.accelerator.autocast()  # for the teacher and the head, which run outside the student's forward

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss, "loss")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if grad_norm is not None and not self.args.fp16:  # under fp16 the loss scaler skips such steps itself
            self._stop_unless_finite(grad_norm, "gradient norm")
        return grad_norm

    def _stop_unless_finite(self, value: torch.Tensor | float, name: str):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {name} is {float(value)} at step {self.state.global_step}{self.place()}; nothing was saved since "
                "the last checkpoint, and a run with a smaller learning_rate can go on from there"
            )

    def place(self) -> str:
        """Where in the method's schedule the run stands, for messages; empty when there is no schedule."""
        return ""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        recorded, self._recorded = self._recorded, {}  # the training's own, for its next log line
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self._recorded = recorded
        return loss.detach(), None, None

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self.check_evaluation_batch(self.eval_dataset if eval_dataset is None else eval_dataset)
        self._noise_step = None
        return super().evaluate(eval_dataset, *args, **kwargs)

    def check_evaluation_batch(self, dataset):
        """Only whole batches are evaluated, so that fewer rows than one would silently give no loss at all."""
        batch = self.args.eval_batch_size * self.args.world_size
        if isinstance(dataset, Sized) and not isinstance(dataset, dict) and len(dataset) < batch:
            raise ValueError(
                f"per_device_eval_batch_size is {self.args.per_device_eval_batch_size}, a batch of {batch} in all, but the "
                f"validation set has only {len(dataset)} blocks, and the time strata need a whole batch: make it smaller"
            )

    # Checkpoints: followers first, then the Trainer's own files, the manifest, and the trainer's state last of all.

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                for name, follower in self.followers.items():
                    follower.save(str(folder / name))
            super()._save_checkpoint(model, trial)
        except Exception:
            if self.args.should_save and fault_of(folder) is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(Path(output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"cannot resume: no whole checkpoint in {self.args.output_dir}")
        if resume_from_checkpoint is not None:
            resume_from_checkpoint = str(resume_from_checkpoint)
            fault = fault_of(Path(resume_from_checkpoint))
            if fault is not None:
                raise ValueError(f"cannot resume from {resume_from_checkpoint}: {fault}")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # a finished run, started again: not a step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if is_deepspeed_zero3_enabled():
            register_head(self.accelerator.unwrap_model(self.model))
        if resume_from_checkpoint is not None:
            for name, follower in self.followers.items():
                follower.load(os.path.join(resume_from_checkpoint, name))
        return prepared
