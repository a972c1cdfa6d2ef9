"""Multi-Path Discrete Consistency (Consistent Diffusion Language Models, arXiv 2605.00161): the student teaches itself.

One stage, with a gap delta that falls linearly over the run. Each step does, for every sequence x_0:

    u ~ U[0, 1]^L,  t ~ U(delta, 1],  s = t - delta                       shared u: exactly the bridge q(z_s | z_t, x_0)
    z_t = Mask(x_0, u, gamma_t),  z_s = Mask(x_0, u, gamma_s)
    loss = sum over l masked in z_t of  JSD( student_l(. | z_t), stop_gradient student_l(. | z_s) )
        or, for `anchor_fraction` of the sequences, where t ~ U(0.001, 1], s = 0 and z_s = x_0:
           -gamma'_t / (1 - gamma_t) sum over l masked in z_t of  -log student_l( x_0 | z_t )              the NELBO

Without the anchor every prediction that is constant along paths is a solution. Where the token
is visible at s, the student at s is a point mass, and the divergence from it is at most log 2. The paper's appendix and
tables were not available: its equations are followed here, but the values of delta and of the anchor are our own, and so is
the mean over all tokens.
"""

from dataclasses import dataclass, field, replace

import torch

from modeling_mcd.checks_mdlm import INSIDE_0_1, WITHIN_0_1, check_numbers
from modeling_mcd.forward_process_mdlm import at_positions
from trainers.distillation_trainer import DistillationArguments, DistillationTrainer
from trainers.divergences import divergence, divergence_from_token, nelbo


ANCHOR_EPSILON = 1e-3  # times of the NELBO are drawn from (this, 1], as in pre-training


@dataclass
class MPDCTrainingArguments(DistillationArguments):
    """One stage. The optimizer's settings are those of MCD, the others are our own."""

    num_rounds: int = field(
        default=1, metadata={"help": "Equal parts of the run; the student is exported after each."}
    )
    delta: float = field(default=0.25, metadata={"help": "Time gap t - s at the first step."})
    delta_end: float = field(default=1 / 64, metadata={"help": "Time gap at the last step; linear in between."})
    anchor_fraction: float = field(default=0.1, metadata={"help": "Part of the sequences with s = 0: their NELBO."})

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, delta=INSIDE_0_1, delta_end=INSIDE_0_1, anchor_fraction=WITHIN_0_1)

    def delta_of(self, step: int) -> float:
        return self.delta + (self.delta_end - self.delta) * min(step / max(self.max_steps - 1, 1), 1.0)


class MPDCTrainer(DistillationTrainer):
    """Trains a masked diffusion model to agree with itself along its own paths."""

    has_teacher = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        delta = self.args.delta_of(self.state.global_step)

        x_0, maskable, times, u, second = self.noise_rows(inputs, draws=2)
        anchored = second[:, 0] < self.args.anchor_fraction  # only the first of a row's draws is needed
        t = 1 - (1 - torch.full_like(times, delta).masked_fill(anchored, ANCHOR_EPSILON)) * times
        s = torch.where(anchored, 0, t - delta)
        gamma_t, gamma_s = self.schedule.gamma(t), self.schedule.gamma(s)
        (z_t, m_t), (z_s, m_s) = self.process.coupled_pair(x_0, gamma_t, gamma_s, u, maskable)

        with torch.no_grad():
            target = self.compute_own_rows(model, m_s, z_s, gamma_s, inputs)
        student = self.compute_rows(model, m_t, z_t, gamma_t, inputs)
        target = replace(student, hidden=target.hidden)  # one network, one head

        anchor, still_masked = anchored[:, None].expand_as(m_t)[m_t], m_s[m_t]
        revealed = ~still_masked & ~anchor
        mean, at_anchors = self.batch_mean(maskable, inputs), m_t & anchored[:, None]
        agree = mean.total(divergence("jensen_shannon", student.at(still_masked), target), m_s)
        from_token = divergence_from_token("jensen_shannon", student.at(revealed), x_0[m_t][revealed])
        agree = agree + mean.total(from_token, m_t & ~m_s & ~at_anchors)
        tokens, levels = (z_t, x_0), (gamma_t, self.schedule.derivative(t))
        at_anchor = [x[m_t][anchor] for x in tokens] + [at_positions(x, m_t)[anchor] for x in levels]
        bound = mean.total(nelbo(self.process, student.at(anchor), *at_anchor), at_anchors)
        loss = (agree + bound) / mean.count

        self.record(
            round=self.args.round_of(self.state.global_step),
            delta=delta,
            divergence=agree / mean.count,
            nelbo=bound / mean.count,
            masked_fraction_t=m_t.double().mean(),
            masked_fraction_s=m_s.double().mean(),
        )
        return (loss, {}) if return_outputs else loss

    def compute_own_rows(self, model, *canvas):
        """The student's rows without dropout, as its own target. Arguments are those of `compute_rows`."""
        was_training = model.training
        model.eval()
        try:
            return self.compute_rows(model, *canvas)
        finally:
            model.train(was_training)
