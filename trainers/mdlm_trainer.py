"""Pre-training of a diffusion language model by its continuous-time NELBO: MDLM (arXiv 2406.07524), Duo (2506.10892)."""

from dataclasses import dataclass, field

import torch

from modeling_mcd.checks_mdlm import INSIDE_0_1, check_numbers
from modeling_mcd.forward_process_mdlm import corrupt_uniformly, mask_tokens, masked_at, nelbo_weight, uniform_nelbo
from trainers.diffusion_trainer import DiffusionTrainer, DiffusionTrainingArguments, may_be_noised
from trainers.divergences import cross_entropy, differentiated


@dataclass
class MDLMTrainingArguments(DiffusionTrainingArguments):
    """The published settings of MDLM on OpenWebText, but for the batch and the number of steps."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=2500, metadata={"help": "Steps of linear warm-up."})
    sampling_epsilon: float = field(default=1e-3, metadata={"help": "Times are drawn from [sampling_epsilon, 1)."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, sampling_epsilon=INSIDE_0_1)


class MDLMTrainer(DiffusionTrainer):
    """Minimises the bound of the model's kind of diffusion, in nats per token, the mean over all tokens (not of prompt or padding).

    Absorbing: E_t [ -gamma'(t) / (1 - gamma(t)) sum_masked -log p(x_0 | z_t) ] / L (MDLM, Eq. 10). Under the log-linear
    schedule the weight is exactly 1/t. Uniform: E_t [ sum_i `uniform_nelbo` ] / L (Duo, Eq. 17, on discrete tokens).
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        times, u = self.noise_of_batch(inputs["input_ids"])
        times = self.args.sampling_epsilon + (1 - self.args.sampling_epsilon) * times
        loss_of = self.uniform_loss if self.model.config.diffusion_kind == "uniform" else self.absorbing_loss
        loss = loss_of(model, inputs, may_be_noised(inputs), times, u)
        return (loss, {}) if return_outputs else loss

    def absorbing_loss(self, model, inputs, maskable, times, u):
        x_0, gamma = inputs["input_ids"], self.schedule.gamma(times)
        masked = masked_at(gamma, u) & maskable
        z_t = mask_tokens(x_0, masked, self.mask_token_id)

        student = self.rows(model, masked, z_t, gamma, inputs)
        weights = nelbo_weight(self.schedule, times)[:, None].expand_as(u)[masked]
        loss = cross_entropy(student, x_0[masked], weights).sum() / maskable.sum().clamp(min=1)

        self.record(masked_fraction=masked.double().mean())
        return loss

    def uniform_loss(self, model, inputs, maskable, times, u):
        x_0, gamma = inputs["input_ids"], self.schedule.gamma(times)
        z_t = torch.where(maskable, corrupt_uniformly(x_0, gamma, u, self.model.config.vocab_size), x_0)

        student = self.rows(model, maskable, z_t, gamma, inputs)
        tokens = [values[maskable] for values in (z_t, x_0)]
        levels = [values[:, None].expand_as(u)[maskable] for values in (gamma, self.schedule.derivative(times))]

        def nelbo(log_p: torch.Tensor, rows: slice) -> torch.Tensor:
            return uniform_nelbo(log_p, *(x[rows] for x in tokens), *(x[rows].to(log_p.dtype) for x in levels))

        loss = differentiated(nelbo, student).sum() / maskable.sum().clamp(min=1)

        self.record(noised_fraction=(z_t != x_0).double().mean())
        return loss
