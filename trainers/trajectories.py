"""The noise of a training step: times, the locked scalar u of each token, and the coupled pair (z_t, z_s)."""

import numpy as np
import torch


def step_noise(seed: int, step: int, rows: range, global_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified times and locking scalars for some rows of one optimisation step's global batch.

    A row's noise is a function of (seed, step, its place in the global batch) alone. The micro-step and the rank decide
    the place, so ranks differ, a resumed run sees the same noise, and so does the same global batch cut in another way.

    Args:
        seed, step: the key of the step.
        rows: places of these rows in the global batch, within `range(global_rows)`.
        global_rows: rows in the global batch; each falls in a time stratum of its own, 1 / global_rows wide.
        length: tokens in a row.

    Returns:
        times float64 [rows] in [0, 1), and u float64 [rows, length] in [0, 1).
    """
    key = np.array([seed, step], dtype=np.uint64)
    strata = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1])).permutation(global_rows)
    draws = np.stack(
        [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, row, 0])).random(length + 1) for row in rows]
    )
    times = (strata[rows.start : rows.stop] + draws[:, 0]) / global_rows
    return torch.from_numpy(times), torch.from_numpy(draws[:, 1:])


def masked_at(gamma: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, L] are masked at visible probability gamma [B]: those with u > gamma (MCD, Eq. 13).

    One u fixes a token's whole path: what is masked at a smaller noise is masked at every larger one.
    """
    return u > gamma[:, None]


def mask_tokens(input_ids: torch.Tensor, masked: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    return input_ids.masked_fill(masked, mask_token_id)
