"""What all methods share: the noise of a step, logging, and evaluation of the network that is handed on."""

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import enable_tf32, is_torch_tf32_available, logging

from modeling_mcd.checks_mdlm import ABOVE_0_TO_1, BELOW_1, POSITIVE, check_numbers
from modeling_mcd.forward_process_mdlm import process_of, sigma_of
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.locking_mdlm import LOCKINGS, PHI, locked_uniforms
from modeling_mcd.transfer_mdlm import send
from trainers.adapters import AdapterFollower, follower_of, is_adapted, with_adapter
from trainers.batch_mean import LOSS_NORMS, BatchMean
from trainers.batches import PADDINGS, check_training_batch, collator_of, maskable_tokens
from trainers.compilation import compile_trunk, take_compile_options
from trainers.exact_resume import ExactResumeTrainer
from trainers.resume_arguments import ExactResumeArguments
from trainers.sharding import complete_copy, is_sharded
from trainers.step_meter import Operations, StepMeter
from trainers.teacher import EMACallback, Follower
from trainers.trajectories import spread_rows, step_noise


logger = logging.get_logger(__name__)

EVALUATION_STEP = 2**63  # no training step: evaluation has a stream of noise of its own

TRAINING_LOCKINGS = ("independent", "spread")  # see `locking_mdlm.py`

FOLLOWER_DEVICES = (None, "cpu")

# Settings of the Trainer that would do nothing here, or act on a network that is not the one handed on.
UNUSED = {
    "label_smoothing_factor": "the loss is the method's own",
    "fp16_full_eval": "evaluation runs the network that is handed on, at the training's precision",
    "bf16_full_eval": "evaluation runs the network that is handed on, at the training's precision",
    "include_for_metrics": "evaluation gives a loss and no predictions",
}


@dataclass
class DiffusionTrainingArguments(ExactResumeArguments):
    """`TrainingArguments` with the defaults that masked diffusion needs, and the EMA of the student.

    Raises:
        ValueError: names the setting at fault; also when several processes were launched that would not be synchronised.
    """

    remove_unused_columns: bool = field(default=False, metadata={"help": "Blocks are not the model's arguments."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "The time strata need full batches."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run instead."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning-rate schedule."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is always used."}
    )
    ema_decay: float | None = field(
        default=0.9999, metadata={"help": "Decay of the student's EMA, with warm-up; null: none."}
    )
    follower_device: Literal["cpu"] | None = field(
        default=None, metadata={"help": "cpu: teacher and EMA stay in main memory."}
    )
    locking: Literal[TRAINING_LOCKINGS] = field(
        default="independent",
        metadata={"help": "A row's scalars u, see docs/distillers.md."},
    )
    spread_fraction: float | None = field(
        default=None, metadata={"help": "Share of a batch's rows that locking spread is for; null: all."}
    )

    padding: Literal[PADDINGS] = field(
        default="unseen",
        metadata={"help": "Fills shorter rows: unseen, or EOS that is scored."},
    )
    loss_norm: Literal[LOSS_NORMS] = field(
        default="tokens",
        metadata={"help": "Mean over all tokens that count, or of rows' own means."},
    )
    peak_tflops: float | None = field(
        default=None,
        metadata={"help": "Peak of the device, for MFU; null: of a known GPU."},
    )

    def __post_init__(self):
        choices = {"padding": PADDINGS, "loss_norm": LOSS_NORMS, "follower_device": FOLLOWER_DEVICES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        check_numbers(self, ema_decay=("lie in [0, 1) or be null", BELOW_1[1]), spread_fraction=ABOVE_0_TO_1)
        check_numbers(self, peak_tflops=POSITIVE)
        if self.locking not in TRAINING_LOCKINGS:
            why = ", which needs a number of steps and is for sampling only" * (self.locking in LOCKINGS)
            raise ValueError(f"locking must be one of {TRAINING_LOCKINGS}, not {self.locking!r}{why}")
        if self.locking == "independent" and self.spread_fraction is not None:
            raise ValueError(
                f"spread_fraction ({self.spread_fraction}) is for locking 'spread', not for 'independent'"
            )
        if self.locking == "spread" and self.spread_fraction is None:
            self.spread_fraction = 1.0
        super().__post_init__()
        if self.torch_compile and not self.tf32 and is_torch_tf32_available():
            enable_tf32(False)  # which TrainingArguments has turned on, unasked
        for name, reason in UNUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but would do nothing: {reason}; leave it out")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy is 'batch_rebalance', but its batches have other numbers of rows, and noise is keyed by a "
                "row's place among equal ones: take 'group_by_length'"
            )
        batch = self.train_batch_size * self.world_size * self.gradient_accumulation_steps
        if self.locking == "spread" and round(self.spread_fraction * batch) == 0:
            raise ValueError(
                f"spread_fraction ({self.spread_fraction}) of a global batch of {batch} rows is none of them: make it larger"
            )


class DiffusionTrainer(ExactResumeTrainer):
    """A Trainer whose noise is keyed by seed, step and place, and whose checkpoints hold every network of the run.

    A subclass writes `compute_loss`, calling `noise_of_batch` for its randomness and `record` for what it logs, and puts
    each network that follows the student into `self.companions`.

    One network is handed on: the EMA of the student if there is one (`args.ema_decay`), otherwise the student. `evaluate`,
    `predict`, `save_model`, `push_to_hub`, early stopping and `load_best_model_at_end` all act on it.

    Args:
        model: the student; also a `PeftModel` with one LoRA adapter.
        peft_config: a `LoraConfig`: an adapter is trained instead of the network's weights, see `trainers/adapters.py`.

    Raises:
        ValueError: names an argument that would do nothing (`compute_metrics`, ...), an adapter that cannot be trained, an
            optimizer that cannot be built, or a batch that the data cannot fill.
    """

    loss_is_scaled_for_ga = False  # compute_loss returns a mean over the micro-batch
    trains_network = True  # so that an adapter may be trained in its place

    def __init__(self, model, args: DiffusionTrainingArguments, *, peft_config=None, data_collator=None, **kwargs):
        if data_collator is None:
            data_collator = collator_of(args.padding, model.config)
        elif args.padding != "unseen":
            raise ValueError(f"padding ({args.padding!r}) is of our own data_collator: leave one of them out")
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "model_init"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} would do nothing: the loss is the method's own, and evaluation gives that loss alone"
                )
        if not self.trains_network and (peft_config is not None or is_adapted(model)):
            raise ValueError(
                f"{type(self).__name__} does not train the network: give no adapter (lora_r, peft_config)"
            )
        self.choose_parameters(model, args)
        super().__init__(with_adapter(model, peft_config, args.seed), args, data_collator, **kwargs)
        train_in_float32(self.model)
        self._compile_options = take_compile_options(self.accelerator)
        self._check_follower_device()
        if self.is_fsdp_enabled and is_adapted(self.model):
            self.model.to(args.device)  # the first teacher is its base, which may be judged before it is divided
        if self.train_dataset is not None:
            check_training_batch(args, self.train_dataset)
            if args.train_sampling_strategy == "group_by_length" and not isinstance(self.train_dataset, Sized):
                raise ValueError(
                    "train_sampling_strategy is 'group_by_length', but the training data is a stream, whose lengths are not known "
                    "beforehand: leave it out"
                )
        if args.eval_strategy != "no":
            several = isinstance(self.eval_dataset, dict)
            for dataset in self.eval_dataset.values() if several else [self.eval_dataset]:
                self.check_evaluation_batch(dataset)
        self.process = process_of(self.model.config)
        self.schedule, self.mask_token_id = self.process.schedule, self.model.config.mask_token_id
        self.block_size = getattr(self.model.config, "block_size", None)  # of a block model
        if args.ema_decay is not None:
            self.companions["ema"] = follower_of(self.model, waits=self.is_fsdp_enabled)
            if not self.is_fsdp_enabled:  # which moves the parts alone
                self.place(self.companions["ema"])
            self.add_callback(EMACallback(self.companions["ema"], args.ema_decay))
        elif is_adapted(self.model):
            self._copy = AdapterFollower(self.model).to(args.device)
        self.compile_trunk(self.model)
        self._recorded: dict[str, list[torch.Tensor]] = {}
        self._operations, self._step_operations = Operations.of(self.model), 0.0
        self.meter = StepMeter(args.device, args.peak_tflops)
        self.add_callback(self.meter)
        self.reset_noise()

    def choose_parameters(self, model: torch.nn.Module, args: DiffusionTrainingArguments):
        """Called first: freezes what is not trained. A coupling is trained by its own method alone, since no other uses it."""
        if getattr(model, "coupling", None) is not None:
            model.coupling.requires_grad_(False)

    def compile_trunk(self, network: torch.nn.Module):
        """Compiles a network that takes part in every step, if `torch_compile` says so."""
        if self._compile_options is not None:
            compile_trunk(network, self._compile_options)

    def _check_follower_device(self):
        """Raises ValueError where teacher and EMA are no complete networks, of which main memory could take the place."""
        divided = "FSDP" if self.is_fsdp_enabled else "ZeRO-3" if is_deepspeed_zero3_enabled() else None
        if self.args.follower_device != "cpu":
            return
        if self._compile_options is not None:
            raise ValueError(
                "torch_compile is true, but with follower_device 'cpu' weights move within the trunk: leave one out"
            )
        if divided or is_adapted(self.model):
            what = (
                "with an adapter they are adapters" if divided is None else f"{divided} divides them like the student"
            )
            raise ValueError(
                f"follower_device is 'cpu', which is for complete teachers and EMAs, but {what}: leave it out"
            )

    def place(self, follower: Follower) -> Follower:
        """Puts a follower where `args.follower_device` says."""
        if self.args.follower_device == "cpu":
            return follower.stay(self.args.device)
        return follower.to(self.args.device)

    def judged_form(self, network: torch.nn.Module) -> torch.nn.Module:
        """A follower's network as `generate` can use it: a copy on the device if it stays in main memory."""
        return complete_copy(network, network, self.args.device) if self.args.follower_device == "cpu" else network

    @property
    def has_ema(self) -> bool:
        """Whether there is an EMA with weights: under FSDP2 it gets those of the student when training begins."""
        return "ema" in self.companions and not self.companions["ema"].waits

    def handed_on(self) -> torch.nn.Module:
        """The network that the run hands on: the EMA if there is one, otherwise the student or a copy of it.

        It may be divided among the processes: then all of them have to use it together (`trainers/runs/together.py`).
        """
        self.check_pending()
        if self.has_ema:
            return self.judged_form(self.companions["ema"].model)
        if is_sharded(self.model):
            return self.model
        if is_adapted(self.model):
            self._copy.follow(self.model)
            return self._copy.model
        return Follower(self.accelerator.unwrap_model(self.model)).to(self.args.device).model

    def whole_student(self, everywhere: bool = True) -> torch.nn.Module:
        """The network that the run hands on, complete and in eval mode. Called in every process, together.

        Args:
            everywhere: whether in every process, on its device; otherwise see `complete`.
        """
        return self.complete(self.handed_on(), everywhere)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves the network that is handed on (see the class) into `output_dir` or `args.output_dir`."""
        checkpoint = _internal_call and output_dir is not None
        if checkpoint or ("ema" not in self.companions and not is_sharded(self.model)):
            return super().save_model(output_dir, _internal_call)
        output_dir, student = output_dir or self.args.output_dir, self.whole_student(everywhere=False)
        if self.args.should_save:
            student.save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def reset_noise(self):
        """Restarts the count of micro-batches: the next batch gets the noise of the first one of its step."""
        self._noise_step, self._micro_step = None, 0

    @property
    def locking(self) -> str:
        """`args.locking` in training. Evaluation is always `independent`, so that the losses of all runs compare."""
        return self.args.locking if self.model.training else "independent"

    def noise_of_batch(self, maskable: torch.Tensor, draws: int = 1) -> tuple[torch.Tensor, ...]:
        """Stratified times [B], locking scalars u [B, L] and `draws` - 1 further uniforms [B, L], see `step_noise`.

        Under `locking: spread` the u of a row's maskable tokens [B, L] are spread, see `locked_uniforms`; the other
        uniforms, and all that the noise is keyed by, stay what they are.
        """
        rows, length = maskable.shape
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
        times, u, *more = (send(values, maskable.device) for values in noise)
        if self.locking == "spread":
            spread = spread_rows(range(first, first + rows), global_rows, self.args.spread_fraction)
            spread = send(spread, u.device)
            u = torch.where(spread[:, None], locked_uniforms("spread", u, maskable), u)
        return times, u, *more

    def noise_rows(self, inputs: dict, **draws) -> tuple[torch.Tensor, ...]:
        """What noise has a time for, as rows: x_0 and the maskable tokens [R, n], and the noise of `noise_of_batch` for them.

        They are the rows of the batch. Of a block model they are its blocks, one after the other, since each of them is a
        diffusion of its own, with its own time, given the clean blocks before it (BD3-LM, arXiv 2503.09573, Eq. 6). Block k
        of a row has the time frac(t + k phi), t being the row's: uniform, stratified over the batch for every k, and spread
        over [0, 1) along the row. A last block that is cut short is filled up with tokens that are not maskable.
        """
        x_0, maskable = inputs["input_ids"], maskable_tokens(inputs, self.process)
        times, *uniforms = self.noise_of_batch(maskable, **draws)
        if self.block_size is None:
            return x_0, maskable, times, *uniforms
        missing = -x_0.shape[1] % self.block_size
        x_0, maskable, *uniforms = (
            torch.nn.functional.pad(values, (0, missing)).reshape(-1, self.block_size)
            for values in (x_0, maskable, *uniforms)
        )
        shifts = torch.arange(len(x_0) // len(times), device=times.device) * PHI
        return x_0, maskable, ((times[:, None] + shifts) % 1).flatten(), *uniforms

    def compute_rows(
        self, network, positions: torch.Tensor, z: torch.Tensor, gamma: torch.Tensor, inputs: dict
    ) -> HeadRows:
        """Runs a network on the canvas z at noise level gamma; a block model's blocks each see the clean ones before them.

        Args:
            positions: a boolean mask of z.
            z, gamma: of `noise_rows`.
            inputs: the batch.

        Returns:
            Its head rows at `positions`.
        """
        of_canvas = {"timesteps": sigma_of(gamma)}
        if self.block_size is not None:
            clean = inputs["input_ids"]
            z, positions = (values.reshape(len(clean), -1)[:, : clean.shape[1]] for values in (z, positions))
            of_canvas = {"clean_ids": clean}
        mask = inputs.get("attention_mask")
        rows = network(hidden_rows=positions, input_ids=z, attention_mask=mask, **of_canvas)
        tokens = z.numel() if self.block_size is None else 2 * z.numel()
        trains = torch.is_grad_enabled()
        self._step_operations += self._operations.count(tokens, z.shape[1], len(rows.hidden), trains)
        return rows

    def batch_mean(self, counted: torch.Tensor, inputs: dict) -> BatchMean:
        """How the loss is averaged over the tokens of `noise_rows` that count: by `args.loss_norm`."""
        return BatchMean(counted, self.args.loss_norm, len(inputs["input_ids"]))

    def record(self, **values: torch.Tensor | float):
        """Records scalars of this micro-batch; their mean over micro-batches and ranks appears in the next log line."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).detach()
            self._recorded.setdefault(name, []).append(value)  # still on its device: a look would wait for it

    def get_batch_samples(self, *args, **kwargs):
        with self.meter.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.meter.count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict) -> float:
        """Those of the micro-batch that has just been computed, see `step_meter.py`; the Trainer adds them up as `total_flos`."""
        operations, self._step_operations = self._step_operations, 0.0
        self.meter.operations += operations
        return operations

    def log(self, logs: dict[str, float], start_time: float | None = None):
        clocked = self.meter.line(self.accelerator.gather) if "loss" in logs else {}
        if "loss" in logs and self._recorded:
            recorded = (torch.stack([value.cpu() for value in values]) for values in self._recorded.values())
            means = torch.stack([values.mean() for values in recorded])
            means = self.accelerator.reduce(means.to(self.args.device), "mean").tolist()
            logs = {**logs, **dict(zip(self._recorded, means, strict=True))}
            self._recorded.clear()
        if "train_loss" in logs:
            # The Trainer's own figure covers only the steps since the last resume.
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            logs["train_loss"] = sum(losses) / len(losses) if losses else logs["train_loss"]
        super().log({**logs, **clocked} if clocked else logs, start_time)
        for name in clocked:  # shown and tracked, but not in checkpoints, which a resumed run must write again
            del self.state.log_history[-1][name]

    def compute_loss_context_manager(self):
        return self.accelerator.autocast()  # for the teacher and the head, which run outside the student's forward

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        network = self.companions["ema"].model if self.has_ema else model
        recorded, self._recorded = self._recorded, {}  # the training's own, for its next log line
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(network, self._prepare_inputs(inputs))
        self._recorded, self._step_operations = recorded, 0.0
        return loss.detach(), None, None

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self.check_evaluation_batch(dataloader.dataset)
        self.reset_noise()
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def check_evaluation_batch(self, dataset):
        """Raises ValueError if there are fewer rows than one batch: only full batches are evaluated, so there would be no loss."""
        batch = self.args.eval_batch_size * self.args.world_size
        if isinstance(dataset, Sized) and len(dataset) < batch:
            raise ValueError(
                f"per_device_eval_batch_size is {self.args.per_device_eval_batch_size}, a batch of {batch} in all, but the "
                f"validation set has only {len(dataset)} blocks, and the time strata need a full batch: make it smaller"
            )


def train_in_float32(model: torch.nn.Module):
    """Converts the weights to float32, in place, if any trained one has half precision: bfloat16 loses steps below 0.4 %.

    transformers loads a network in the precision of its file (`dtype="auto"`). ZeRO-3 keeps float32 weights of its own.
    """
    half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if half and not is_deepspeed_zero3_enabled():
        logger.warning(
            f"the model's weights are {str(half.pop()).removeprefix('torch.')} and are trained as float32; bf16=True makes "
            "training faster and keeps float32 weights"
        )
        model.float()
