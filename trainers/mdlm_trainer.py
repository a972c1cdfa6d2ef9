"""Pre-training of a diffusion language model by its continuous-time NELBO: MDLM (arXiv 2406.07524), Duo (2506.10892)."""

import os
from dataclasses import dataclass, field

from transformers.training_args import OptimizerNames

from modeling_mcd.checks_mdlm import INSIDE_0_1, check_numbers
from modeling_mcd.forward_process_mdlm import at_positions
from trainers.diffusion_trainer import DiffusionTrainer, DiffusionTrainingArguments
from trainers.divergences import nelbo
from trainers.muon import build_muon
from trainers.sharded_trainer import asks_for_fsdp


@dataclass
class MDLMTrainingArguments(DiffusionTrainingArguments):
    """The published settings of MDLM on OpenWebText, except for the batch and the number of steps."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=2500, metadata={"help": "Steps of linear warm-up."})
    sampling_epsilon: float = field(default=1e-3, metadata={"help": "Times are drawn from [sampling_epsilon, 1)."})
    muon: bool = field(
        default=False, metadata={"help": "Muon for the matrices inside the network, AdamW for the rest."}
    )

    def __post_init__(self):
        deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if self.muon and (deepspeed or asks_for_fsdp(self)):
            raise ValueError(
                f"muon is true, but {'DeepSpeed' if deepspeed else 'FSDP'} shards the matrices that Muon needs in one piece: "
                "leave it out"
            )
        super().__post_init__()
        if self.muon and self.optim != OptimizerNames(type(self).__dataclass_fields__["optim"].default):
            raise ValueError(
                f"optim is {self.optim.value!r}, but muon brings its own optimizer: leave one of them out"
            )
        check_numbers(self, sampling_epsilon=INSIDE_0_1)


class MDLMTrainer(DiffusionTrainer):
    """Minimises the NELBO of the model's kind of diffusion, in nats per token: the mean over all tokens but prompt and padding
    (`args.loss_norm`: or first over those of each row, as LLaDA's fine-tuning does).

    Absorbing: E_t [ -gamma'(t) / (1 - gamma(t)) sum_masked -log p(x_0 | z_t) ] / L (MDLM, Eq. 10). Under the log-linear
    schedule the weight is exactly 1/t. Uniform: E_t [ sum_i `uniform_nelbo` ] / L (Duo, Eq. 17, on discrete tokens).
    """

    def create_optimizer(self, model=None):
        if self.args.muon and self.optimizer is None:
            self.optimizer = build_muon(self.model, self.args, self.get_decay_parameter_names(self.model))
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Under uniform noise, u also picks the token, unless u is spread: the picks must not depend on each other.
        picks = self.process.mask_token_id is None and self.locking == "spread"
        x_0, maskable, times, u, *pick = self.noise_rows(inputs, draws=1 + picks)
        t = self.args.sampling_epsilon + (1 - self.args.sampling_epsilon) * times
        gamma, slope = self.schedule.gamma(t), self.schedule.derivative(t)
        z_t, scored = self.process.corrupt(x_0, gamma, u, maskable, *pick)

        student = self.compute_rows(model, scored, z_t, gamma, inputs)
        levels = at_positions(gamma, scored), at_positions(slope, scored)
        mean = self.batch_mean(maskable, inputs)
        loss = mean.total(nelbo(self.process, student, z_t[scored], x_0[scored], *levels), scored) / mean.count

        self.record(noised_fraction=(z_t != x_0).double().mean())
        return (loss, {}) if return_outputs else loss
