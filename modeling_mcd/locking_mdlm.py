"""Locking: how the uniforms u of a row's tokens, which decide when each is masked or revealed, hang together.

The theory of masked diffusion asks only that each token's own u be uniform on [0, 1) (MCD, arXiv 2602.00792, Lemma 3.1 to
Thm 3.3): a token is masked at visible probability gamma iff u > gamma, so the smallest u of a row is revealed first. How the
u of different tokens depend on each other is free, and decides what is revealed together. See docs/locking.md.
"""

import torch


LOCKINGS = ("independent", "spread", "interleaved")
PHI = (5**0.5 - 1) / 2  # the golden ratio less 1: of all steps round a circle, it keeps the points farthest apart


def locked_uniforms(
    locking: str, u: torch.Tensor, fillable: torch.BoolTensor, steps: int | None = None
) -> torch.Tensor:
    """The uniforms of a locking, made of those of independent tokens. Each one by itself is uniform on [0, 1).

    One uniform rho, the u of the row's first fillable token, locks the entire row. With i = 0, 1, .. the rank of a token
    among the fillable ones of its row, in reading order:

        independent   u, as it is
        spread        frac(rho + i phi): what is revealed at neighbouring times lies Fibonacci numbers apart
        interleaved   ((i + floor(N rho)) mod N + frac(N rho)) / N for N steps: each reveals every N-th token, and the next
                      step the right-hand neighbours of these

    Args:
        locking: one of `LOCKINGS`.
        u: [B, L] float64, independent uniforms in [0, 1).
        fillable: [B, L] bool, on the device of `u`: the tokens that are to be filled, or that noise may mask.
        steps: N, the number of steps of a sampler; only `interleaved` needs it.

    Returns:
        [B, L] float64; places that are not fillable keep their u. A row depends on nothing but itself.

    Raises:
        ValueError: for an unknown locking, or `interleaved` without `steps`.
    """
    if locking not in LOCKINGS:
        raise ValueError(f"locking must be one of {list(LOCKINGS)}, not {locking!r}")
    if locking == "independent":
        return u
    if locking == "interleaved" and steps is None:
        raise ValueError("locking 'interleaved' needs a number of steps, and this use has none: take 'spread'")
    rho = u.gather(1, fillable.long().argmax(dim=1, keepdim=True))
    place = fillable.cumsum(dim=1) - 1
    if locking == "spread":
        locked = (rho + place * PHI) % 1
    else:
        turn = rho * steps
        locked = ((place + turn.long()) % steps + turn % 1) / steps
    return torch.where(fillable, locked, u)
