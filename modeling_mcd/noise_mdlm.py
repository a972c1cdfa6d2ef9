"""The noise of generation: uniforms that depend on a row's key, a token's position and the draw, and on nothing else.

Philox is a counter-based generator: no state, so that neither the rows of a batch, nor its width, nor the device, nor the
number of steps changes the noise of a token. In integers of 64 bits it gives the same bits everywhere.
"""

from dataclasses import dataclass

import torch


WORD = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four words of 32 bits for each counter of four words and key of two.

    Words are int64 tensors below 2^32, of shapes that broadcast.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # wraps at 64 bits, and keeps all of them
        a, b, c, d = second >> 32 & WORD ^ b ^ low, second & WORD, first >> 32 & WORD ^ d ^ high, first & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return a, b, c, d


def row_keys(rows: int, generator: torch.Generator | None) -> torch.LongTensor:
    """One key for each row, [rows] int64, taken from the generator (torch's own by default) one after the other."""
    return torch.randint(2**63 - 1, (rows,), generator=generator)


def uniforms(keys: torch.LongTensor, positions: torch.LongTensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniforms for each token, float64 with 53 random bits, in [0, 1).

    Args:
        keys: [B], one for each row.
        positions: [B, L], the position of each token in its row, below 2^32.
        draw: the number of the draw, at least 0.

    Returns:
        Two tensors [B, L].
    """
    key = keys[:, None] & WORD, keys[:, None] >> 32 & WORD
    zero = torch.zeros((), dtype=torch.long, device=keys.device)
    a, b, c, d = philox((positions, zero + draw, zero, zero), key)
    return tuple(((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53 for high, low in ((a, b), (c, d)))


@dataclass(frozen=True)
class RowNoise:
    """The uniforms of a batch of rows: what a `Canvas` asks for.

    Args:
        keys: [B] int64, CPU: one a row, see `row_keys`.
        positions: [B, L] int64, CPU: the position of each token in its row, padding not counted.
    """

    keys: torch.LongTensor
    positions: torch.LongTensor

    def uniforms(self, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two uniforms of each token, [B, L] float64, for the draw with this number; see `uniforms`."""
        return uniforms(self.keys, self.positions, draw)
