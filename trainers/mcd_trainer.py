"""Masked Consistency Distillation (Latent Shadows, arXiv 2602.00792): fewer steps by consistency along locked paths.

In rounds r = 0, 1, ... of `steps_per_round` steps, with delta doubling from round to round and a teacher that is a
snapshot of the student at the start of the round, each step does, for every sequence x_0:

    u ~ U[0, 1]^L,  t ~ U(delta, 1],  s = t - delta
    z_t = Mask(x_0, u, gamma_t),  z_s = Mask(x_0, u, gamma_s)             masked exactly where u > gamma
    loss = sum_i  m_s KL( student(. | z_t) || teacher(. | z_s; tau) )     masked in both: match the teacher
                + (m_t - m_s) CE( x_0, student(. | z_t) )                 masked at t, visible at s: match the data
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from modeling_mcd.checks_mdlm import BELOW_1, POSITIVE, check_choices, check_numbers
from modeling_mcd.head_mdlm import HeadRows
from trainers.distillation_trainer import DistillationTrainer, WideningGapArguments
from trainers.divergences import check_divergence, cross_entropy, divergence, divergence_from_token
from trainers.teacher import TeacherCallback


@dataclass
class MCDTrainingArguments(WideningGapArguments):
    """The paper's settings: 5 rounds of 10,000 steps, AdamW 6e-5, 500 warm-up steps, global batch 128, bf16."""

    tau: list[float] = field(
        default_factory=lambda: [0.96, 0.93, 0.90, 0.87, 0.84],
        metadata={"help": "Teacher temperature of each round; the last also applies to later rounds."},
    )
    divergence: Literal["student_first", "teacher_first", "jensen_shannon"] = field(
        default="student_first",
        metadata={
            "help": "KL(student || teacher), as the paper writes it; KL(teacher || student); or Jensen-Shannon."
        },
    )
    reveal: Literal["cross_entropy", "divergence", "none"] = field(
        default="cross_entropy",
        metadata={
            "help": "Loss on tokens masked at t but visible at s. cross_entropy: against the data, the paper's choice. "
            "divergence: against the teacher, a point mass there (with student_first the paper's diverging ablation). "
            "none: no loss there."
        },
    )
    reduction: Literal["all_tokens", "masked_tokens"] = field(
        default="all_tokens",
        metadata={"help": "Mean over all tokens but prompt and padding, or over those masked in z_t."},
    )
    teacher_update: Literal["snapshot", "ema"] = field(
        default="snapshot", metadata={"help": "Copy the student at each round's start, or follow it at every step."}
    )
    teacher_ema_decay: float | None = field(
        default=None, metadata={"help": "Decay of the teacher with teacher_update ema; null: 0.999."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_divergence(self)
        check_choices(self)
        if not self.tau or not all(map(POSITIVE[1], self.tau)):
            raise ValueError(f"tau must be one or more positive temperatures, not {self.tau}")
        default = type(self).__dataclass_fields__["tau"].default_factory()
        if len(self.tau) > self.num_rounds and self.tau != default:
            raise ValueError(
                f"tau has {len(self.tau)} temperatures, but num_rounds is {self.num_rounds}: the last would never be used"
            )
        if self.teacher_update == "ema" and self.teacher_ema_decay is None:
            self.teacher_ema_decay = 0.999
        elif self.teacher_update == "snapshot" and self.teacher_ema_decay is not None:
            raise ValueError(
                f"teacher_ema_decay ({self.teacher_ema_decay}) is for teacher_update 'ema', not for 'snapshot'"
            )
        check_numbers(self, teacher_ema_decay=BELOW_1)

    def tau_of(self, round: int) -> float:
        return self.tau[min(round, len(self.tau) - 1)]


class MCDTrainer(DistillationTrainer):
    """Distils a student that needs fewer steps from a masked diffusion teacher (Algorithm 1 of the paper)."""

    def __init__(self, model, args: MCDTrainingArguments, *, teacher: nn.Module | None = None, **kwargs):
        super().__init__(model, args, teacher=teacher, **kwargs)
        self.add_callback(TeacherCallback(self.companions["teacher"], args.teacher_ema_decay))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        round = self.args.round_of(self.state.global_step)
        delta, tau = self.args.delta_of(round), self.args.tau_of(round)

        x_0, maskable, times, u = self.noise_rows(inputs)
        t = 1 - (1 - delta) * times  # U(delta, 1]
        gamma_t, gamma_s = self.schedule.gamma(t), self.schedule.gamma(t - delta)
        (z_t, m_t), (z_s, m_s) = self.process.coupled_pair(x_0, gamma_t, gamma_s, u, maskable)

        student = self.compute_rows(model, m_t, z_t, gamma_t, inputs)
        with torch.no_grad():
            teacher = self.compute_rows(self.teacher, m_s, z_s, gamma_s, inputs)

        still_masked = m_s[m_t]  # of the student's rows, those that are masked for the teacher too
        mean = self.batch_mean(maskable if self.args.reduction == "all_tokens" else m_t, inputs)
        agree = divergence(self.args.divergence, student.at(still_masked), teacher, temperature=tau)
        reveals = self.reveal_loss(student.at(~still_masked), x_0[m_t & ~m_s])
        consistency, reveal = mean.total(agree, m_s), mean.total(reveals, m_t & ~m_s)
        loss = (consistency + reveal) / mean.count

        self.record(
            round=round,
            delta=delta,
            tau=tau,
            divergence=consistency / mean.count,
            reveal=reveal / mean.count,
            masked_fraction_t=m_t.double().mean(),
            masked_fraction_s=m_s.double().mean(),
        )
        return (loss, {}) if return_outputs else loss

    def reveal_loss(self, student: HeadRows, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of each of the tokens [R] that only the student has masked."""
        if self.args.reveal == "none":
            return student.hidden.new_zeros(len(tokens))
        if self.args.reveal == "divergence":
            return divergence_from_token(self.args.divergence, student, tokens)
        return cross_entropy(student, tokens)
