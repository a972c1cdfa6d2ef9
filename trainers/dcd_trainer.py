"""Discrete Consistency Distillation of uniform-state models (Duo, arXiv 2506.10892, Algorithm 1).

In rounds r = 0, 1, ... with delta doubling from round to round and a teacher that is a snapshot of the student at the
start of the round, each step does, for every sequence x_0:

    eps ~ N(0, I_K) for each token,  t ~ U[0, 1],  s = max(t - delta, 0)
    z_t = argmax(a_t x_0 + s_t eps),  z_s = argmax(a_s x_0 + s_s eps)              one noise for both latents
    loss = mean over all l of  KL( student_l(. | z_t) || teacher_l(. | z_s) )

No Gaussian is drawn: the argmax is x_0 while u <= F_Y(a_t / s_t), and from then on always the same other token, so that
one uniform u and one other token for each position give both canvases, exactly (`duality.py`).
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from trainers.batches import maskable_tokens
from trainers.distillation_trainer import DistillationTrainer, WideningGapArguments
from trainers.divergences import check_divergence, divergence
from trainers.duality import uniform_alpha
from trainers.teacher import TeacherCallback


@dataclass
class DCDTrainingArguments(WideningGapArguments):
    """The paper's settings: 5 rounds of 10,000 steps, delta from 1/512, AdamW 6e-5, 500 warm-up steps, batch 128."""

    divergence: Literal["student_first", "teacher_first"] = field(
        default="student_first",
        metadata={"help": "KL(student || teacher), as the paper writes it, or KL(teacher || student)."},
    )
    log_snr: list[float] | None = field(
        default=None,
        metadata={
            "help": "Log signal-to-noise ratio of the latent at t = 0 and t = 1, linear in between: 4 1 is Duo's for the "
            "GPT-2 vocabulary. Null: the path whose alpha_t is the model's own schedule, for any vocabulary."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_divergence(self)
        falling = self.log_snr is None or (
            len(self.log_snr) == 2 and math.inf > self.log_snr[0] > self.log_snr[1] > -math.inf
        )
        if not falling:
            raise ValueError(f"log_snr must be two falling numbers, at t = 0 and at t = 1, not {self.log_snr}")


class DCDTrainer(DistillationTrainer):
    """Distils a uniform-state teacher along paths that share their Gaussian noise."""

    diffusion_kind = "uniform"

    def __init__(self, model, args: DCDTrainingArguments, *, teacher: nn.Module | None = None, **kwargs):
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.add_callback(TeacherCallback(self.companions["teacher"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x_0, maskable = inputs["input_ids"], maskable_tokens(inputs, self.process)
        round = self.args.round_of(self.state.global_step)
        delta = self.args.delta_of(round)

        t, u, second = self.noise_of_batch(maskable, draws=2)
        alpha_t, alpha_s = self.alpha(t), self.alpha((t - delta).clamp(min=0))
        (z_t, _), (z_s, _) = self.process.coupled_pair(x_0, alpha_t, alpha_s, u, maskable, second)

        student = self.compute_rows(model, maskable, z_t, alpha_t, inputs)
        with torch.no_grad():
            teacher = self.compute_rows(self.teacher, maskable, z_s, alpha_s, inputs)
        mean = self.batch_mean(maskable, inputs)
        loss = mean.total(divergence(self.args.divergence, student, teacher), maskable) / mean.count

        noised = (z_t != x_0).double().mean(), (z_s != x_0).double().mean()
        self.record(round=round, delta=delta, noised_fraction_t=noised[0], noised_fraction_s=noised[1])
        return (loss, {}) if return_outputs else loss

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """Signal alpha [B] of the uniform-state diffusion at times t [B]."""
        if self.args.log_snr is None:
            return self.schedule.gamma(t)
        first, last = self.args.log_snr
        return uniform_alpha(torch.exp((first + (last - first) * t) / 2), self.model.config.vocab_size)
