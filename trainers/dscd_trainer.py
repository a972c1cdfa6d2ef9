"""Discrete-Space Consistency Distillation (CD4LM, github.com/yihao-liang/CDLM): nested masks and a teacher that never moves.

One stage. Each step does, for every sequence x_0 of n tokens that may be masked:

    r ~ U[0.4, 0.9],  r' = r U[0.3, 0.7] within [0.1, 0.6]
    z  = x_0 with n r tokens masked, chosen at random;  z' = x_0 with n r' of these masked            nested
    loss = lambda T^2 mean over l masked in z of  KL( teacher_l(. | z'; T) || student_l(. | z; T) )
         + (1 - lambda)     mean over l masked in z of  -log student_l( x_0 | z )

with T = 2, and lambda = 0.9 for a tenth of the run, then a cosine decay to 0.5. Under SUBS the teacher is a point mass
where it sees the token, and the first term there is the cross-entropy of the student at temperature T (the released code
uses LLaDA's untrained logits there). Answers, the tokens of a row that are not its prompt, have rules of their own where they
are short, see `short_answers`.
"""

import math
from dataclasses import dataclass, field

import torch

from modeling_mcd.checks_mdlm import BELOW_1, POSITIVE, WITHIN_0_1, check_numbers
from modeling_mcd.forward_process_mdlm import mask_tokens
from trainers.distillation_trainer import DistillationArguments, DistillationTrainer
from trainers.divergences import at_temperature, cross_entropy, divergence
from trainers.trajectories import most_masked


@dataclass
class DSCDTrainingArguments(DistillationArguments):
    """The released settings, except for the length of the run: AdamW 5e-6, weight decay 0.01, 200 warm-up steps, batch 64."""

    num_rounds: int = field(
        default=1, metadata={"help": "Equal parts of the run; the student is exported after each."}
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    temperature: float = field(default=2.0, metadata={"help": "T, of both networks."})
    student_ratio: list[float] = field(
        default_factory=lambda: [0.4, 0.9], metadata={"help": "Range of the student's masked fraction."}
    )
    teacher_share: list[float] = field(
        default_factory=lambda: [0.3, 0.7],
        metadata={"help": "Range of the fraction of the student's masks that the teacher keeps."},
    )
    teacher_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.6], metadata={"help": "Bounds of the teacher's masked fraction."}
    )
    lambda_start: float = field(default=0.9, metadata={"help": "Weight of the distillation term at the start."})
    lambda_end: float = field(default=0.5, metadata={"help": "Weight of the distillation term at the end."})
    lambda_hold: float = field(default=0.1, metadata={"help": "Fraction of the run before lambda starts to fall."})
    clamp: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound on each of the two terms, above which they give no gradient; 5 in the released code."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("student_ratio", "teacher_share", "teacher_ratio"):
            if len(getattr(self, name)) != 2 or not 0 <= getattr(self, name)[0] <= getattr(self, name)[1] <= 1:
                raise ValueError(f"{name} must be two rising numbers in [0, 1], not {getattr(self, name)}")
        check_numbers(self, lambda_start=WITHIN_0_1, lambda_end=WITHIN_0_1, lambda_hold=BELOW_1)
        check_numbers(self, temperature=POSITIVE, clamp=POSITIVE)

    def lambda_of(self, step: int) -> float:
        falling = max(0.0, step / self.max_steps - self.lambda_hold) / (1 - self.lambda_hold)
        return self.lambda_end + (self.lambda_start - self.lambda_end) * (1 + math.cos(math.pi * falling)) / 2


class DSCDTrainer(DistillationTrainer):
    """Trains the student on a heavily masked sequence to predict what a frozen teacher predicts on a lightly masked one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        temperature, weight = self.args.temperature, self.args.lambda_of(self.state.global_step)

        x_0, maskable, times, u, second = self.noise_rows(inputs, draws=2)
        ratio = between(self.args.student_ratio, times)
        share = between(self.args.teacher_share, second[:, 0])  # only the first of a row's draws is needed
        teacher_ratio = torch.minimum((ratio * share).clamp(*self.args.teacher_ratio), ratio)
        available = maskable.sum(dim=1)
        least = 0
        if "labels" in inputs and self.block_size is None:  # prompts and answers
            ratio, teacher_ratio, least = short_answers(ratio, teacher_ratio, available)
        m = most_masked(u, maskable, (ratio * available).round().clamp(min=least))
        m_teacher = most_masked(u, maskable, (teacher_ratio * available).round())
        z, z_teacher = (mask_tokens(x_0, masked, self.mask_token_id) for masked in (m, m_teacher))

        student = self.compute_rows(model, m, z, 1 - ratio, inputs)
        with torch.no_grad():
            teacher = self.compute_rows(self.teacher, m_teacher, z_teacher, 1 - teacher_ratio, inputs)

        mean = self.batch_mean(m, inputs)
        still_masked, tempered = m_teacher[m], at_temperature(student, temperature)
        agree = divergence("teacher_first", tempered.at(still_masked), teacher, temperature=temperature)
        seen = cross_entropy(tempered.at(~still_masked), x_0[m & ~m_teacher])
        agree = mean.total(agree, m_teacher) + mean.total(seen, m & ~m_teacher)
        consistency = self.bounded(temperature**2 * agree / mean.count)
        reconstruction = self.bounded(mean.total(cross_entropy(student, x_0[m]), m) / mean.count)
        loss = weight * consistency + (1 - weight) * reconstruction

        self.record(
            round=self.args.round_of(self.state.global_step),
            distillation_weight=weight,
            consistency=consistency,
            reconstruction=reconstruction,
            masked_fraction_student=m.double().mean(),
            masked_fraction_teacher=m_teacher.double().mean(),
        )
        return (loss, {}) if return_outputs else loss

    def bounded(self, term: torch.Tensor) -> torch.Tensor:
        return term if self.args.clamp is None else term.clamp(max=self.args.clamp)


def between(bounds: list[float], uniforms: torch.Tensor) -> torch.Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniforms


def short_answers(
    ratio: torch.Tensor, teacher_ratio: torch.Tensor, length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The masked fractions [B] of student and teacher in answers of n = `length` tokens [B], and the fewest masks [B].

    The rules of the released code: below 20 tokens the student's fraction is at most 1/2; up to 10 tokens the student has 2
    masks and the teacher 1; everywhere the student has at least max(2, n / 10) masks, and the teacher no more than it.
    """
    ratio = torch.where(length < 20, ratio.clamp(max=0.5), ratio)
    teacher_ratio = torch.minimum(teacher_ratio, ratio)
    of_two, of_one = ((masks / length.clamp(min=1)).clamp(max=1) for masks in (2, 1))
    ratio, teacher_ratio = (
        torch.where(length <= 10, few, many) for few, many in ((of_two, ratio), (of_one, teacher_ratio))
    )
    return ratio, teacher_ratio, torch.minimum(length, (length / 10).ceil().clamp(min=2))
