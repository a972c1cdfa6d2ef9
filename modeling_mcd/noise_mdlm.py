"""The noise of generation: uniforms that depend only on a row's key, a token's position and the number of the draw.

Philox is a counter-based generator and has no state. A token's noise therefore does not change with the other rows of the
batch, the width of the batch, the device or the number of steps. It uses 64-bit integers only, so the bits are the same on
every device.
"""

from dataclasses import dataclass

import torch


WORD = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): turns a counter of four 32-bit words and a key of two into four random words.

    Words are int64 tensors with values below 2^32; their shapes must broadcast.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # may wrap to a negative int64, but keeps all 64 bits
        a, b, c, d = second >> 32 & WORD ^ b ^ low, second & WORD, first >> 32 & WORD ^ d ^ high, first & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return a, b, c, d


def row_keys(rows: int, generator: torch.Generator | None) -> torch.LongTensor:
    """One random key for each row, [rows] int64, drawn in order from `generator`, or from torch's default generator."""
    return torch.randint(2**63 - 1, (rows,), generator=generator)


def uniforms(keys: torch.LongTensor, positions: torch.LongTensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniforms in [0, 1) for each token.

    Args:
        keys: [B] int64, one for each row.
        positions: [B, L] int64, the position of each token in its row, below 2^32.
        draw: the number of the draw, at least 0.

    Returns:
        Two tensors [B, L] float64, with 53 random bits in each number.
    """
    key = keys[:, None] & WORD, keys[:, None] >> 32 & WORD
    zero = torch.zeros((), dtype=torch.long, device=keys.device)
    a, b, c, d = philox((positions, zero + draw, zero, zero), key)
    return tuple(((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53 for high, low in ((a, b), (c, d)))


@dataclass(frozen=True)
class RowNoise:
    """The source of a `Canvas`'s uniforms.

    Args:
        keys: [B] int64, CPU: one for each row, see `row_keys`.
        positions: [B, L] int64, CPU: the position of each token in its row, not counting padding.
    """

    keys: torch.LongTensor
    positions: torch.LongTensor

    def uniforms(self, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two uniforms for each token, [B, L] float64, for the draw with this number; see `uniforms`."""
        return uniforms(self.keys, self.positions, draw)
