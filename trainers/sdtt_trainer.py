"""Self-Distillation Through Time (arXiv 2410.21035): one student step for `teacher_steps` steps of the teacher.

In rounds r = 0, 1, ..., each with a teacher that is a snapshot of the student at the start of the round and a teacher step
delta that doubles from round to round (grows k-fold in the paper, where k = 2), each step does, for every sequence x_0:

    t ~ U[epsilon, 1],  z = z_t ~ q(. | x_0)
    for i = 0 .. k - 1:                                                              k ancestral steps of the teacher
        target_l = teacher(. | z) at every l that is still masked
        z        = one ancestral step of length delta from max(t - i delta, epsilon)
    loss = mean over l masked in z_t of  KL( student_l(. | z_t) || target_l )

A token's target is thus the distribution that it was drawn from, or that of the last step if it was never drawn.
"""

import functools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from modeling_mcd.checks_mdlm import AT_LEAST_1, INSIDE_0_1, check_choices, check_numbers
from modeling_mcd.draws_mdlm import draw_tokens
from modeling_mcd.forward_process_mdlm import masked_at
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.noise_schedule_mdlm import NoiseSchedule
from trainers.distillation_trainer import DistillationTrainer, WideningGapArguments
from trainers.divergences import check_divergence, divergence
from trainers.sharding import full_weights
from trainers.teacher import TeacherCallback


@dataclass
class SDTTTrainingArguments(WideningGapArguments):
    """The paper's settings: 7 rounds of 10,000 steps from 1024 steps to 8, AdamW 6e-5, 500 warm-up steps, batch 128."""

    num_rounds: int = field(default=7, metadata={"help": "Rounds N."})
    delta: float = field(default=1 / 1024, metadata={"help": "Length of a teacher step in the first round."})
    teacher_steps: int = field(default=2, metadata={"help": "Teacher steps k that one student step stands for."})
    divergence: Literal["student_first", "teacher_first", "total_variation", "mse"] = field(
        default="student_first",
        metadata={"help": "KL(student || teacher), as the paper, or another divergence of its ablation."},
    )
    time_grid: Literal["paper", "released"] = field(
        default="paper",
        metadata={
            "help": "Where the teacher's steps start: t - i delta, or as in the released code, see `step_starts`."
        },
    )
    sampling_epsilon: float = field(default=1e-5, metadata={"help": "Times lie in [sampling_epsilon, 1)."})

    def __post_init__(self):
        super().__post_init__()
        check_divergence(self)
        check_choices(self)
        check_numbers(self, teacher_steps=AT_LEAST_1, sampling_epsilon=INSIDE_0_1)
        longest = self.teacher_steps * max(self.delta, self.delta_of(self.num_rounds - 1))
        if longest > 1:
            raise ValueError(
                f"teacher_steps ({self.teacher_steps}) of up to {longest / self.teacher_steps:g} are {longest:g} in time, "
                "but time ends at 1: take a smaller delta, delta_growth, num_rounds or teacher_steps"
            )


def step_starts(t: torch.Tensor, delta: float, steps: int, time_grid: str) -> list[torch.Tensor]:
    """The times [B] at which the teacher's steps start, not yet limited from below.

    "paper": t - i delta (Algorithm 1). "released": t a_i + (1 - t) (t - k delta) with a_i from 1 down to 0, as in the code,
    where (1 - a_i) was probably meant. For k = 2 and small delta its steps start at 2t - t^2 and t - t^2, so far more, or far
    fewer, tokens are revealed than in a step of the same length from t.
    """
    if time_grid == "paper":
        return [t - i * delta for i in range(steps)]
    return [a * t + (1 - t) * (t - steps * delta) for a in torch.linspace(1, 0, steps, dtype=t.dtype).tolist()]


def reveal_thresholds(starts: list[torch.Tensor], delta: float, epsilon: float, schedule: NoiseSchedule, gamma_t):
    """The probability [B] of being visible after each step: a token stays masked while its locking scalar u is above it.

    An ancestral step from t to s keeps a masked token masked with probability (1 - gamma_s) / (1 - gamma_t), whatever the
    other tokens are. On a grid without gaps the thresholds are gamma at its points.
    """
    masked, thresholds = 1 - gamma_t, []
    for t in starts:
        t, s = t.clamp(min=epsilon), (t - delta).clamp(min=epsilon)
        masked = masked * (1 - schedule.gamma(s)) / (1 - schedule.gamma(t))
        thresholds.append(1 - masked)
    return thresholds


def draw(rows: HeadRows, uniforms: torch.Tensor) -> torch.Tensor:
    """Draws one token for each row, [R], in float64, by the uniforms [R]."""
    return rows.map(functools.partial(draw_tokens, mask_token_id=rows.mask_token_id), uniforms)


class SDTTTrainer(DistillationTrainer):
    """Distils several steps of a masked diffusion teacher into one of the student (Algorithm 1 of the paper)."""

    def __init__(self, model, args: SDTTTrainingArguments, *, teacher: nn.Module | None = None, **kwargs):
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.add_callback(TeacherCallback(self.companions["teacher"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        round, epsilon = self.args.round_of(self.state.global_step), self.args.sampling_epsilon
        delta = self.args.delta_of(round)

        x_0, maskable, times, u, second = self.noise_rows(inputs, draws=2)
        t = epsilon + (1 - epsilon) * times
        gamma_t = self.schedule.gamma(t)
        z_t, m_t = self.process.corrupt(x_0, gamma_t, u, maskable)

        # Its rows are put together, so they need one head: ZeRO-3 would gather another copy for each forward.
        with torch.no_grad(), full_weights(self.teacher.get_output_embeddings().parameters()):
            teacher, revealed = self.teacher_targets(z_t, m_t, t, gamma_t, delta, u, second, inputs)
        student = self.compute_rows(model, m_t, z_t, gamma_t, inputs)
        mean = self.batch_mean(m_t, inputs)
        loss = mean.total(divergence(self.args.divergence, student, teacher), m_t) / mean.count

        self.record(round=round, delta=delta, masked_fraction=m_t.double().mean(), revealed_fraction=revealed)
        return (loss, {}) if return_outputs else loss

    def teacher_targets(
        self,
        z: torch.Tensor,
        m_t: torch.Tensor,
        t: torch.Tensor,
        gamma_t: torch.Tensor,
        delta: float,
        u: torch.Tensor,
        second: torch.Tensor,
        inputs: dict,
    ) -> tuple[HeadRows, torch.Tensor]:
        """The teacher's row for every token masked in z_t, and the fraction of them that the teacher revealed.

        Every step overwrites the rows of the tokens that are still masked: the last value written is the target.
        """
        starts = step_starts(t, delta, self.args.teacher_steps, self.args.time_grid)
        thresholds = reveal_thresholds(starts, delta, self.args.sampling_epsilon, self.schedule, gamma_t)
        masked, targets = m_t, None
        for i, start in enumerate(starts):
            gamma = self.schedule.gamma(start.clamp(min=self.args.sampling_epsilon))
            rows = self.compute_rows(self.teacher, masked, z, gamma, inputs)
            targets = rows if targets is None else targets.put(masked[m_t], rows)
            if i + 1 < len(starts):
                reveal = masked & ~masked_at(thresholds[i], u)
                z = z.masked_scatter(reveal, draw(rows.at(reveal[masked]), second[reveal]))
                masked = masked & ~reveal
        return targets, (m_t & ~masked).sum() / m_t.sum().clamp(min=1)
