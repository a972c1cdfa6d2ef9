"""The noise of a training step: times, the locked scalar u of each token, and the coupled canvases of every method."""

import numpy as np
import torch


def step_noise(
    seed: int, step: int, rows: range, global_rows: int, length: int, draws: int = 1
) -> tuple[torch.Tensor, ...]:
    """Stratified times and uniforms of each token for some rows of one optimisation step's global batch.

    A row's noise is a function of (seed, step, its place in the global batch) alone. The micro-step and the rank decide
    the place, so ranks differ, a resumed run sees the same noise, and so does the same global batch cut in another way.

    Args:
        seed, step: the key of the step.
        rows: places of these rows in the global batch, within `range(global_rows)`.
        global_rows: rows in the global batch; each falls in a time stratum of its own, 1 / global_rows wide.
        length: tokens in a row.
        draws: uniforms for each token. The first is the locking scalar u; how many follow does not change it.

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


def most_masked(u: torch.Tensor, maskable: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` [B] maskable tokens of each row with the largest u, [B, L]: nested for falling counts."""
    order = u.masked_fill(~maskable, -1.0).argsort(dim=1, descending=True)
    return order.argsort(dim=1) < counts[:, None]
