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
        spread        frac(rho + i phi); if N is a power of two, van der Corput's sequence from a random place on, see below
        interleaved   ((i + floor(N rho)) mod N + frac(N rho)) / N: a step reveals every N-th token, and the next step the
                      right-hand neighbours of these

    By the first rule of `spread`, tokens of one step are a Fibonacci number apart, for every N (three-gap theorem). By the
    second, (reversed(floor(2^32 rho) + i) + frac(2^32 rho)) / 2^32 with `reversed` the bits of a number below 2^32 from
    last to first, those of N equal steps are exactly N apart. N and 2N have the same rule, so what is visible at their
    common times agrees.

    Args:
        locking: one of `LOCKINGS`.
        u: [B, L] float64, independent uniforms in [0, 1).
        fillable: [B, L] bool, on the device of `u`: the tokens that are to be filled, or that noise may mask.
        steps: N, a sampler's number of steps. None where there is no such number, as in training; `interleaved` needs one.

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
    if locking == "interleaved":
        turn = rho * steps
        locked = ((place + turn.long()) % steps + turn % 1) / steps
    elif steps is not None and steps & (steps - 1) == 0:
        start = rho * 2**32
        locked = (bits_reversed((place + start.long()) % 2**32) + start % 1) / 2**32
    else:
        locked = (rho + place * PHI) % 1
    return torch.where(fillable, locked, u)


def bits_reversed(numbers: torch.LongTensor) -> torch.LongTensor:
    """Numbers of 32 bits, of any shape, with their last bit first."""
    for width, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        numbers = numbers >> width & mask | (numbers & mask) << width
    return numbers
