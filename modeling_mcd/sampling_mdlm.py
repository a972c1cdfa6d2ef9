"""Samplers as small pure functions over tensors: who is revealed when, and which token is drawn.

All noise of a sampler is two float64 uniforms per token, drawn before the first step: one decides when the token is
revealed, the other which token it is. A seed therefore locks the whole trajectory, whatever the number of steps.
"""

import torch

from .noise_schedule_mdlm import NoiseSchedule


def ancestral_reveal_steps(uniforms: torch.Tensor, steps: int, schedule: NoiseSchedule) -> torch.LongTensor:
    """The step (0 .. steps - 1) in which the ancestral sampler reveals each token. Costs no forward of the network.

    The posterior of MDLM (arXiv 2406.07524, Eq. 7) unmasks a token between t and s < t with probability
    (gamma_s - gamma_t) / (1 - gamma_t), whatever the other tokens and the network say. That is scalar trajectory
    locking read backwards (arXiv 2602.00792, Thm 3.3): with u ~ U(gamma_1, 1] fixed for each masked token, step k
    reveals those with gamma(t_k) < u <= gamma(t_{k+1}), on the grid t_k = 1 - k / steps. The last step reveals the rest.

    Args:
        uniforms: float64, any shape, in [0, 1).
        steps: number of steps, at least 1.
        schedule: the noise schedule.
    """
    grid = schedule.gamma(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=uniforms.device))
    u = grid[0] + (1 - grid[0]) * uniforms
    return torch.searchsorted(grid[1:-1].contiguous(), u)


def draw_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, mask_token_id: int | None, temperature: float = 1.0
) -> torch.LongTensor:
    """Draws one token a row from the SUBS distribution softmax(logits / temperature), [MASK] excluded, in float64.

    By inversion of the cumulative distribution: exact to the 53 bits of a float64 uniform, where the usual Gumbel trick
    in float32 truncates the noise and so lowers the temperature (arXiv 2409.02908). Temperature 0 takes the likeliest.

    Args:
        logits: [rows, V], any floating dtype.
        uniforms: [rows], float64, in [0, 1).
        mask_token_id: never drawn; None where the vocabulary has no [MASK] (uniform diffusion).
        temperature: at least 0.
    """
    scores = logits.to(torch.float64, copy=True)
    if mask_token_id is not None:
        scores[:, mask_token_id] = -torch.inf
    if temperature == 0:
        return scores.argmax(dim=-1)
    scores -= scores.amax(dim=-1, keepdim=True)  # before the division: no temperature is too small
    cumulative = torch.softmax(scores / temperature, dim=-1).cumsum(dim=-1)
    # Scaling by the last entry absorbs the rounding of the sum; `right=True` skips tokens of probability zero.
    total = cumulative[:, -1:]
    targets = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def ancestral(predict, canvas, maskable, uniforms, *, steps, schedule, mask_token_id, temperature, on_step):
    """Ancestral sampling of the masked positions of a canvas, reveal-first (arXiv 2406.07524; 2602.00792, Thm 3.3).

    Exactly the law of the full-canvas sampler, but the head and the draw run on the revealed tokens alone, and a row of
    the canvas that reveals nothing in a step takes no part in its forward. At most `steps` forwards a row.

    Args:
        predict: `(canvas [b, L], reveal [b, L] bool, rows [b], t) -> logits [revealed, V]`, in row-major order.
        canvas: [B, L] int64; changed in place.
        maskable: [B, L] bool, the positions to fill.
        uniforms: [2, B, L] float64 in [0, 1): when, and which.
        on_step: called with the canvas after each step that revealed something.

    Returns:
        [B] int64: the number of forwards that each row took part in.
    """
    reveal_steps = ancestral_reveal_steps(uniforms[0], steps, schedule).masked_fill(~maskable, -1)
    forwards = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
    for step in range(steps):
        reveal = reveal_steps == step
        rows = reveal.any(dim=1).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        logits = predict(canvas[rows], reveal[rows], rows, 1 - step / steps)
        canvas[reveal] = draw_tokens(logits, uniforms[1][reveal], mask_token_id, temperature)
        forwards[rows] += 1
        on_step(canvas)
    return forwards


SAMPLERS = {"ancestral": ancestral}
