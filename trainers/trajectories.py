"""The noise of a training step: the times of its rows, and the locking scalar u and further uniforms of its tokens."""

import numpy as np
import torch


def step_noise(
    seed: int, step: int, rows: range, global_rows: int, length: int, draws: int = 1
) -> tuple[torch.Tensor, ...]:
    """Stratified times, and uniforms for each token, of some rows of one optimization step's global batch.

    A row's noise depends only on the seed, the step and the row's place in the global batch, and micro-step and rank
    determine that place. So ranks get different noise, a resumed run repeats its noise, and the same global batch gets the
    same noise however it is divided into processes and micro-batches.

    Args:
        seed, step: the key of the step.
        rows: places of these rows in the global batch, within `range(global_rows)`.
        global_rows: rows in the global batch. [0, 1) is divided into as many strata, and each row's time lies in its own.
        length: tokens in a row.
        draws: uniforms for each token. The first is the locking scalar u; asking for more does not change it.

    Returns:
        times float64 [rows] in [0, 1), and `draws` tensors float64 [rows, length] in [0, 1).
    """
    key = np.array([seed, step], dtype=np.uint64)
    strata = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1])).permutation(global_rows)
    uniforms = np.stack(
        [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, row, 0])).random(1 + draws * length)
            for row in rows
        ]
    )
    times = (strata[rows.start : rows.stop] + uniforms[:, 0]) / global_rows
    return torch.from_numpy(times), *torch.from_numpy(uniforms[:, 1:]).split(length, dim=1)


def spread_rows(rows: range, global_rows: int, fraction: float) -> torch.BoolTensor:
    """Of some rows of a global batch, those whose tokens are spread, [rows].

    Exactly round(fraction * global_rows) rows of the global batch, evenly apart in it, chosen by their place alone: however
    the batch is cut, and independent of the time stratum of a row, which is another one at every step.

    Args:
        rows: places of these rows in the global batch, within `range(global_rows)`.
    """
    spread = round(fraction * global_rows)
    place = torch.arange(rows.start, rows.stop)
    return (place + 1) * spread // global_rows > place * spread // global_rows


def most_masked(u: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A mask [B, L] of the `counts` [B] maskable tokens with the largest u in each row; a smaller count gives a subset."""
    order = u.masked_fill(~maskable, -1.0).argsort(dim=1, descending=True)
    return order.argsort(dim=1) < counts[:, None]
