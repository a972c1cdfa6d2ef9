"""Divergences between token distributions, one value a row, from hidden rows and the head instead of from logits.

`head_rows` runs a network's trunk and hands out the hidden rows at the positions that carry loss, with the head that
belongs to them. `divergence` and `cross_entropy` put these through the head themselves.

SUBS is inside: for absorbing diffusion every row is a masked position, [MASK] gets no probability, and the softmax goes
over the other tokens. (On visible positions SUBS is a point mass on the token itself, and nothing here is ever asked
about those.) The softmax and all that follows is in float32, or float64 for float64 rows, whatever the autocast.
"""

from dataclasses import dataclass, replace

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn


MASK_LOGIT = -1e6  # Finite, as in the published code: 0 * log(0) is then 0 and not NaN in a divergence.
KINDS = ("student_teacher", "teacher_student", "jensen_shannon", "total_variation", "mse")


@dataclass
class HeadRows:
    """Hidden rows of one network and the head that makes token distributions of them.

    Args:
        hidden: [rows, d].
        weight, bias: of the head, [V, d] and [V].
        mask_token_id: the token that gets no probability; None for uniform-state diffusion, where every token is one.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    mask_token_id: int | None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, which) -> "HeadRows":
        """The rows that a boolean mask [rows], indices or a slice choose."""
        return replace(self, hidden=self.hidden[which])

    def put(self, which: torch.Tensor, rows: "HeadRows") -> "HeadRows":
        """A copy in which `rows`, of the same head, stand at the places that a boolean mask [rows] or indices choose."""
        if rows.weight.data_ptr() != self.weight.data_ptr():
            raise ValueError("put: the rows belong to another head, and would get another meaning under this one")
        hidden = self.hidden.clone()
        hidden[which] = rows.hidden
        return replace(self, hidden=hidden)

    def log_probabilities(self, temperature: float = 1.0) -> torch.Tensor:
        """[rows, V] of softmax(logits / temperature) under SUBS; float32, or float64 for float64 rows."""
        logits = nn.functional.linear(self.hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if self.mask_token_id is not None:
            is_mask = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
            logits = logits.masked_fill(is_mask, MASK_LOGIT)
        return logits.log_softmax(dim=-1)


def head_rows(model: nn.Module, positions: torch.Tensor, **inputs) -> HeadRows:
    """Runs the trunk of `model`, wrapped for training (DDP, DeepSpeed) or not, and hands out rows of its output.

    Args:
        positions: a boolean mask [B, L], or indices into the flattened canvas, [rows].
        inputs: of the forward: input_ids, timesteps, attention_mask.
    """
    outputs = model(hidden_rows=positions, **inputs)
    config = extract_model_from_parallel(model).config
    mask_token_id = config.mask_token_id if config.diffusion_kind == "absorbing" else None
    return HeadRows(outputs.hidden_rows, outputs.head_weight, outputs.head_bias, mask_token_id)


def divergence(
    kind: str, student: HeadRows, teacher: HeadRows, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """D(student, teacher at `temperature`) of each row, [rows]; the gradient is the student's alone.

    With p the student's and q the teacher's distribution:

        student_teacher   KL(p || q)
        teacher_student   KL(q || p)
        jensen_shannon    beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; at beta 0 and 1, where this
                          is zero, its limits after division by beta and 1 - beta: KL(q || p) and KL(p || q)
        total_variation   sum |p - q| / 2
        mse               mean (log p - log q)^2 over the tokens other than [MASK]
    """
    log_p = student.log_probabilities()
    with torch.no_grad():
        log_q = teacher.log_probabilities(temperature)
    if kind == "jensen_shannon" and beta in (0, 1):
        kind = "student_teacher" if beta == 1 else "teacher_student"
    if kind == "student_teacher":
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if kind == "teacher_student":
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    if kind == "jensen_shannon":
        log_m = torch.logsumexp(
            torch.stack([log_p + torch.tensor(1 - beta).log(), log_q + torch.tensor(beta).log()]), 0
        )
        return (beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)).sum(dim=-1)
    if kind == "total_variation":
        return (log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2
    if kind == "mse":
        squares = (log_p - log_q).square()
        if student.mask_token_id is not None:
            squares = squares.index_fill(1, torch.tensor(student.mask_token_id, device=squares.device), 0)
        return squares.sum(dim=-1) / (squares.shape[-1] - (student.mask_token_id is not None))
    raise ValueError(f"divergence is {kind!r}, but must be one of {', '.join(KINDS)}")


def cross_entropy(student: HeadRows, tokens: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """-log p(token) of each row, [rows], times its weight if `weights` [rows] are given."""
    values = -student.log_probabilities().gather(-1, tokens[:, None])[:, 0]
    return values if weights is None else values * weights.to(values.dtype)
