"""Masked Consistency Distillation (Latent Shadows, arXiv 2602.00792): fewer steps by consistency along locked paths.

In rounds r = 0, 1, ... of `steps_per_round` steps, with delta doubling from round to round and a teacher that is a
snapshot of the student at the start of the round, each step does, for every sequence x_0:

    u ~ U[0, 1]^L,  t ~ U(delta, 1],  s = t - delta
    z_t = Mask(x_0, u, gamma_t),  z_s = Mask(x_0, u, gamma_s)             masked exactly where u > gamma
    loss = sum_i  m_s KL( student(. | z_t) || teacher(. | z_s; tau) )     what both see masked: match the teacher
                + (m_t - m_s) CE( x_0, student(. | z_t) )                 what s reveals: match the data
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from trainers.diffusion_trainer import DiffusionTrainer, DiffusionTrainingArguments
from trainers.divergences import cross_entropy, kl_divergence, subs_log_probabilities
from trainers.teacher import Follower, TeacherCallback
from trainers.trajectories import mask_tokens, masked_at


@dataclass
class MCDTrainingArguments(DiffusionTrainingArguments):
    """The paper's settings: 5 rounds of 10,000 steps, AdamW 6e-5, 500 warm-up steps, global batch 128, bf16."""

    num_rounds: int = field(default=5, metadata={"help": "Rounds N."})
    steps_per_round: int = field(
        default=10_000, metadata={"help": "Steps M of a round; max_steps is N * M unless given."}
    )
    delta: float = field(default=1 / 512, metadata={"help": "Time gap t - s in the first round."})
    delta_growth: float = field(default=2.0, metadata={"help": "Factor on delta from each round to the next."})
    tau: list[float] = field(
        default_factory=lambda: [0.96, 0.93, 0.90, 0.87, 0.84],
        metadata={"help": "Teacher temperature of each round; the last one holds for the rounds after it."},
    )
    divergence: Literal["student_teacher", "teacher_student"] = field(
        default="student_teacher", metadata={"help": "KL(student || teacher), as the paper writes it, or the reverse."}
    )
    reduction: Literal["all_tokens", "masked_tokens"] = field(
        default="all_tokens",
        metadata={"help": "Mean over all B * L tokens, or over those masked in z_t (per micro-batch)."},
    )
    teacher_update: Literal["snapshot", "ema"] = field(
        default="snapshot", metadata={"help": "Copy the student at each round's start, or follow it at every step."}
    )
    teacher_ema_decay: float = field(default=0.999, metadata={"help": "Decay of the teacher with teacher_update ema."})
    learning_rate: float = field(default=6e-5, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=500, metadata={"help": "Steps of linear warm-up."})

    def __post_init__(self):
        for name in ("num_rounds", "steps_per_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.delta <= 0 or self.delta_growth <= 0:
            raise ValueError(f"delta ({self.delta}) and delta_growth ({self.delta_growth}) must be positive")
        widest = self.delta * max(1.0, self.delta_growth ** (self.num_rounds - 1))
        if widest >= 1:
            raise ValueError(
                f"delta ({self.delta}) grows to {widest:g} in {self.num_rounds} rounds, but t - s must stay below 1: "
                "take a smaller delta, delta_growth or num_rounds"
            )
        if not self.tau or min(self.tau) <= 0:
            raise ValueError(f"tau must be one or more positive temperatures, not {self.tau}")
        if not 0 <= self.teacher_ema_decay < 1:
            raise ValueError(f"teacher_ema_decay must lie in [0, 1), not {self.teacher_ema_decay}")
        if self.max_steps <= 0:
            self.max_steps = self.num_rounds * self.steps_per_round
        super().__post_init__()

    # Round, delta and tau are functions of the step alone, so that there is nothing to save or to restore.

    def round_of(self, step: int) -> int:
        return min(step // self.steps_per_round, self.num_rounds - 1)

    def delta_of(self, round: int) -> float:
        return self.delta * self.delta_growth**round

    def tau_of(self, round: int) -> float:
        return self.tau[min(round, len(self.tau) - 1)]


def check_same_tokens(teacher, student):
    """Raises ValueError unless both configurations are of absorbing diffusion, with one vocabulary and one mask."""
    for name, config in (("teacher", teacher), ("student", student)):
        if config.diffusion_kind != "absorbing":
            raise ValueError(
                f"the {name}'s diffusion_kind is {config.diffusion_kind!r}, but MCD reveals masked tokens: give one of "
                "absorbing diffusion"
            )
    for name in ("vocab_size", "mask_token_id"):
        theirs, ours = getattr(teacher, name), getattr(student, name)
        if theirs != ours:
            raise ValueError(
                f"teacher and student differ in {name}: {theirs} and {ours}; their tokens must be the same"
            )


# What of a configuration decides which function given weights are. Dropout, context and noise schedule do not.
ARCHITECTURE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "conditioning_size"),
    *("layer_norm_eps", "rope_theta", "time_conditioning", "tie_word_embeddings"),
)


def check_same_network(teacher, student):
    """Raises ValueError, which names every field that differs, unless the student can become the next round's teacher."""
    pairs = {name: (getattr(teacher, name), getattr(student, name)) for name in ARCHITECTURE}
    differing = [f"{name} ({theirs} and {ours})" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if differing:
        raise ValueError(
            f"teacher and student differ in {', '.join(differing)}: they must be the same network, since each round's "
            "student becomes the next one's teacher"
        )


class MCDTrainer(DiffusionTrainer):
    """Distils a student that needs fewer steps from a masked diffusion teacher (Algorithm 1 of the paper).

    Args:
        model: the student; usually a copy of the teacher.
        teacher: the first round's teacher, of the same architecture and vocabulary; the student itself when not given.

    Raises:
        ValueError: when teacher and student have different vocabularies, masks or architectures.
    """

    def __init__(self, model, args: MCDTrainingArguments, *, teacher: nn.Module | None = None, **kwargs):
        super().__init__(model, args, **kwargs)
        if teacher is not None:
            check_same_tokens(teacher.config, self.model.config)
            check_same_network(teacher.config, self.model.config)
        self.followers["teacher"] = Follower(self.model if teacher is None else teacher, self.model.dtype)
        self.teacher = self.followers["teacher"].model.to(args.device)
        self.add_callback(TeacherCallback(self.followers["teacher"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x_0 = inputs["input_ids"]
        round = self.args.round_of(self.state.global_step)
        delta, tau = self.args.delta_of(round), self.args.tau_of(round)

        times, u = self.noise_of_batch(x_0)
        t = 1 - (1 - delta) * times  # U(delta, 1]
        gamma_t, gamma_s = self.schedule.gamma(t), self.schedule.gamma(t - delta)
        m_t, m_s = masked_at(gamma_t, u), masked_at(gamma_s, u)
        z_t, z_s = mask_tokens(x_0, m_t, self.mask_token_id), mask_tokens(x_0, m_s, self.mask_token_id)

        outputs = model(input_ids=z_t, timesteps=-gamma_t.log().float(), logits_rows=m_t)
        log_student = subs_log_probabilities(outputs.logits, self.mask_token_id)
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher(input_ids=z_s, timesteps=-gamma_s.log().float(), logits_rows=m_s).logits
        log_teacher = subs_log_probabilities(teacher_logits, self.mask_token_id, tau)

        still_masked = m_s[m_t]  # of the student's rows, those that the teacher sees masked too
        pair = (log_student[still_masked], log_teacher)
        kl = kl_divergence(*(pair if self.args.divergence == "student_teacher" else reversed(pair))).sum()
        reveal = cross_entropy(log_student[~still_masked], x_0[m_t & ~m_s]).sum()
        tokens = x_0.numel() if self.args.reduction == "all_tokens" else m_t.sum().clamp(min=1)
        loss = (kl + reveal) / tokens

        self.record(
            round=round,
            delta=delta,
            tau=tau,
            kl=kl / tokens,
            reveal_cross_entropy=reveal / tokens,
            masked_fraction_t=m_t.double().mean(),
            masked_fraction_s=m_s.double().mean(),
        )
        return (loss, outputs) if return_outputs else loss

    def place(self) -> str:
        return f" (round {self.args.round_of(self.state.global_step) + 1} of {self.args.num_rounds})"
