"""Divergences between token distributions, one value for each row, computed from hidden rows without building [rows, V].

A network's `forward(hidden_rows=...)` returns the hidden rows at the positions that carry loss, together with the head
(`HeadRows`). `divergence` and `cross_entropy` run the head themselves, one chunk of rows at a time. A chunk's logits become
its values and its share of the gradients, and are freed before those of the next chunk are made.

SUBS is built in: under absorbing diffusion every row is a masked position, [MASK] gets no probability, and the softmax runs
over the other tokens. (At a visible position SUBS is a point mass on the token itself; no function here is called for those.)
The head's matrix products run in the autocast's dtype; the softmax and everything after it run in float32, or in float64 for
float64 rows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import get_args, get_type_hints

import torch
from torch.autograd.function import once_differentiable

from modeling_mcd.checks_mdlm import POSITIVE, WITHIN_0_1, check_integers, check_number, check_shape
from modeling_mcd.forward_process_mdlm import AbsorbingProcess, Process
from modeling_mcd.head_mdlm import MASK_LOGIT, HeadRows, in_chunks


# Each formula takes log p and log q [chunk, V], which it may overwrite. It returns the value of each row and its gradient
# with respect to the student's logits. Since p = softmax(logits), a function of p with derivative s has the gradient
# p (s - sum p s).


def through_softmax(p: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum p s [chunk], and p (s - sum p s) [chunk, V]."""
    mean = torch.linalg.vecdot(p, slope)
    return mean, slope.sub_(mean[:, None]).mul_(p)


def student_first(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q)."""
    log_ratio = torch.sub(log_p, log_q, out=log_q)
    return through_softmax(log_p.exp_(), log_ratio)


def teacher_first(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p)."""
    q = log_q.exp()
    values = torch.linalg.vecdot(q, log_q.sub_(log_p))
    return values, log_p.exp_().sub_(q)


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""
    weights = torch.tensor([1 - beta, beta], dtype=torch.float64).log().tolist()
    log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
    from_teacher = torch.linalg.vecdot(log_q.exp(), log_q.sub_(log_m)) * beta
    from_student, gradient = through_softmax(log_p.exp(), log_p.sub_(log_m).mul_(1 - beta))
    return from_teacher + from_student, gradient


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum |p - q| / 2."""
    p = log_p.exp_()
    difference = torch.sub(p, log_q.exp_(), out=log_q)
    values = difference.abs().sum(dim=-1) / 2
    return values, through_softmax(p, difference.sign_().div_(2))[1]


def mean_squared(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum (log p - log q)^2 / V."""
    difference = torch.sub(log_p, log_q, out=log_q)
    values = torch.linalg.vecdot(difference, difference) / log_p.shape[-1]
    slope = difference.mul_(2 / log_p.shape[-1])
    return values, slope.sub_(log_p.exp_().mul_(slope.sum(dim=-1, keepdim=True)))


DIVERGENCES = {
    "student_first": student_first,
    "teacher_first": teacher_first,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "mse": mean_squared,
}

RENAMED = {"student_teacher": "student_first", "teacher_student": "teacher_first"}


def unknown_divergence(kind: str, allowed: Iterable[str]) -> ValueError:
    renamed = f" ({kind} is now called {RENAMED[kind]})" if kind in RENAMED else ""
    return ValueError(f"the divergence is {kind!r}, but must be one of {', '.join(allowed)}{renamed}")


def check_divergence(arguments):
    """Raises ValueError when the `divergence` of a method's arguments is not one of those that its type lists."""
    allowed = get_args(get_type_hints(type(arguments))["divergence"])
    if arguments.divergence not in allowed:
        raise unknown_divergence(arguments.divergence, allowed)


def divergence(
    kind: str, student: HeadRows, teacher: HeadRows, temperature: float = 1.0, beta: float = 0.5
) -> torch.Tensor:
    """D(student, teacher at `temperature`) of each row, [rows]. Only the student gets a gradient.

    With p the student's distribution and q the teacher's, `kind` is one of

        student_first     KL(p || q)
        teacher_first     KL(q || p)
        jensen_shannon    beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, Eq. 1);
                          at beta 0 and 1, where this is zero whatever p and q, its limits after division by beta and by
                          1 - beta: KL(q || p) and KL(p || q)
        total_variation   sum |p - q| / 2
        mse               sum (log p - log q)^2 / V, without [MASK]

    Raises:
        ValueError: an unknown kind, beta outside [0, 1], a temperature that is not positive, or a teacher that has another
            vocabulary or another number of rows.
    """
    if kind not in DIVERGENCES:
        raise unknown_divergence(kind, DIVERGENCES)
    check_number("beta", beta, WITHIN_0_1)
    check_number("temperature", temperature, POSITIVE)
    if len(student.weight) != len(teacher.weight):
        raise ValueError(f"the student has {len(student.weight)} tokens and the teacher {len(teacher.weight)}")
    if len(student.hidden) != len(teacher.hidden):
        raise ValueError(
            f"the student has {len(student.hidden)} rows and the teacher {len(teacher.hidden)}: give them in pairs"
        )
    formula, options = DIVERGENCES[kind], ()
    if kind == "jensen_shannon":
        formula, options = {0: (teacher_first, ()), 1: (student_first, ())}.get(beta, (formula, (beta,)))
    with torch.no_grad():
        teacher = teacher.to(teacher.matmul_dtype())

    def loss(log_p: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return formula(log_p, teacher.at(rows).log_probabilities(temperature), *options)

    return row_losses(loss, student)


def cross_entropy(student: HeadRows, tokens: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """-log p(token) of each row, [rows], times its weight.

    Args:
        tokens: [rows] int64.
        weights: [rows]; ones by default. Multiplying the result by them gives the same but costs more, see `RowLosses`.

    Raises:
        ValueError: tokens or weights do not fit the rows, or a token is outside the vocabulary.
    """
    if len(student.hidden) != len(tokens):
        raise ValueError(f"{len(student.hidden)} rows, but {len(tokens)} tokens: give one for each row")
    check_integers("tokens", tokens, len(student.weight))
    if weights is not None:
        check_shape("weights", weights, tokens.shape)

    def loss(log_p: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = tokens[rows, None]
        values = -log_p.gather(-1, wanted)
        gradient = log_p.exp_().scatter_add_(-1, wanted, -torch.ones_like(values))
        if weights is not None:
            values, gradient = values * weights[rows, None], gradient.mul_(weights[rows, None])
        return values[:, 0], gradient

    return row_losses(loss, student)


def differentiated(function: Callable[[torch.Tensor, slice], torch.Tensor], student: HeadRows) -> torch.Tensor:
    """The values [rows] of any function of the student's distribution; autograd differentiates it within each chunk.

    Args:
        function: `(log p [chunk, V], slice of the chunk's rows) -> values [chunk]`, differentiable.
    """

    def loss(log_p: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            values = function(log_p.requires_grad_(), rows)
            (slope,) = torch.autograd.grad(values.sum(), log_p)
        return values.detach(), slope.sub_(log_p.detach().exp_().mul_(slope.sum(dim=-1, keepdim=True)))

    return row_losses(loss, student)


def nelbo(
    process: Process,
    student: HeadRows,
    z_t: torch.Tensor,
    x_0: torch.Tensor,
    gamma: torch.Tensor,
    slope: torch.Tensor,
) -> torch.Tensor:
    """`process.nelbo` of each row, [R], with a gradient: the integrand over t of the bound, in nats."""
    if isinstance(process, AbsorbingProcess):  # a weighted cross-entropy, which needs no autograd within a chunk
        return cross_entropy(student, x_0, process.token_weights(gamma, slope))
    return differentiated(
        lambda log_p, rows: process.nelbo(log_p, z_t[rows], x_0[rows], gamma[rows], slope[rows]), student
    )


def at_temperature(rows: HeadRows, temperature: float) -> HeadRows:
    """The same rows with their logits divided by the temperature."""
    return replace(rows, hidden=rows.hidden / temperature, bias=rows.bias / temperature)


def divergence_from_token(kind: str, student: HeadRows, tokens: torch.Tensor) -> torch.Tensor:
    """D(student, teacher) [R] at rows whose token the teacher sees: with SUBS the teacher is a point mass there.

    With p the student's probability of the token,

        teacher_first     -log p, the cross-entropy
        student_first     1e6 (1 - p) - H(student), which explodes: log 0 is -1e6 here
        jensen_shannon    log 2 - ((1 + p) log(1 + p) - p log p) / 2, at most log 2 (beta 1/2)
        total_variation   1 - p

    Raises:
        ValueError: another kind, which is not defined there.
    """
    nll = cross_entropy(student, tokens)
    if kind == "teacher_first":
        return nll
    p = torch.exp(-nll)
    if kind == "student_first":
        uniform = replace(student, hidden=torch.zeros_like(student.hidden), bias=torch.zeros_like(student.bias))
        kinds = len(student.bias) - (student.mask_token_id is not None)  # of tokens
        negative_entropy = divergence("student_first", student, uniform) - math.log(kinds)
        return -MASK_LOGIT * (1 - p) + negative_entropy
    if kind == "jensen_shannon":
        return math.log(2) - ((1 + p) * torch.log1p(p) + p * nll) / 2
    if kind == "total_variation":
        return 1 - p
    raise ValueError(f"divergence {kind!r} is not defined where the teacher is a point mass")


Loss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


def row_losses(loss: Loss, student: HeadRows) -> torch.Tensor:
    """The values of a loss over all rows, [rows], with the gradients that `loss` computes beside them, see `RowLosses`."""
    tensors = (student.hidden, student.weight, student.bias)
    if not torch.is_grad_enabled():
        tensors = tuple(tensor.detach() for tensor in tensors)
    return RowLosses.apply(loss, student.matmul_dtype(), student.mask_token_id, *tensors)


class RowLosses(torch.autograd.Function):
    """Computes a loss over all rows, [rows].

    The forward has each chunk's logits at hand, so it also computes the gradients of the plain sum, and the backward only
    scales them. For two networks this takes four products with a head's weights, as many as the plain formula. It is right
    when every row's value receives the same gradient, as under a sum or a mean. Otherwise the gradient of the head's weights
    does not follow from that of the sum, and the backward goes over the rows once more.
    """

    @staticmethod
    def forward(ctx, loss: Loss, dtype: torch.dtype, mask_token_id: int | None, *tensors: torch.Tensor):
        ctx.loss, ctx.dtype, ctx.mask_token_id = loss, dtype, mask_token_id
        ctx.save_for_backward(*tensors)
        values, ctx.gradients = sweep(loss, HeadRows(*tensors, mask_token_id).to(dtype), ctx.needs_input_grad[3:])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor):
        # A sum expands one number to all rows (stride 0), which can be seen without waiting for the device.
        alike = len(upstream) == 0 or upstream.stride(0) == 0 or bool((upstream == upstream[0]).all())
        gradients, ctx.gradients = (
            ctx.gradients,
            None,
        )  # scaled in place, so usable once; a second backward computes its own
        if alike and gradients is not None:
            for gradient in gradients:
                if gradient is not None and len(upstream):
                    gradient.mul_(upstream[0])
        else:
            student = HeadRows(*ctx.saved_tensors, ctx.mask_token_id).to(ctx.dtype)
            _, gradients = sweep(ctx.loss, student, ctx.needs_input_grad[3:], upstream)
        return None, None, None, *gradients


def sweep(loss: Loss, student: HeadRows, needed: tuple[bool, ...], upstream: torch.Tensor | None = None):
    """The values of all rows and, where needed, the gradients of (upstream * values).sum(), computed chunk by chunk.

    Args:
        needed: whether to compute the gradients of hidden rows, weight and bias. The last two are summed in float32 or better.
        upstream: [rows]; ones by default.
    """
    hidden, weight, dtype = student.hidden, student.weight, torch.promote_types(student.weight.dtype, torch.float32)
    of_hidden = torch.zeros_like(hidden) if needed[0] else None
    of_weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
    of_bias = torch.zeros_like(student.bias, dtype=dtype) if needed[2] else None

    def of_chunk(rows: slice) -> torch.Tensor:
        values, gradient = loss(student.at(rows).log_probabilities(), rows)
        if upstream is not None:
            gradient.mul_(upstream[rows, None])
        if needed[2]:
            of_bias.add_(gradient.sum(dim=0))
        gradient = gradient.to(weight.dtype)
        if needed[0]:
            torch.mm(gradient, weight, out=of_hidden[rows])
        if needed[1] and weight.dtype == dtype:
            of_weight.addmm_(gradient.T, hidden[rows])
        elif needed[1]:
            of_weight.add_(gradient.T @ hidden[rows])
        return values.to(dtype)

    with torch.autocast(
        hidden.device.type, enabled=False
    ):  # the products have their dtype; nothing else may be rounded
        values = in_chunks(of_chunk, len(hidden), len(weight), hidden.device)
    return values, (of_hidden, of_weight, of_bias)
