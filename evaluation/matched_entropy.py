"""Gen-PPL at matched entropy: what a model's Gen-PPL would be if it were as diverse as held-out text.

A lower temperature lowers Gen-PPL and entropy together, so a plain Gen-PPL ranks nothing. Over a sweep of temperatures
log Gen-PPL is interpolated linearly in entropy to a common entropy.
"""

import math
from collections.abc import Sequence

import numpy as np

from evaluation.evaluate_model import COMPARABLE, HELD_OUT_TEXT, SETTINGS


TOLERANCE = 0.01  # nats of entropy: as near as this counts as matched


def matched_gen_ppl(rows: Sequence[dict], entropy: float) -> tuple[float, float] | None:
    """(Gen-PPL, entropy really reached) of one model and number of steps, whose rows differ in temperature alone.

    When the sweep does not bracket the entropy, the nearest row's own figures. A single row counts only within
    `TOLERANCE`: None otherwise.
    """
    points = sorted((row["entropy"], math.log(row["gen_ppl"])) for row in rows)
    if not points or (len(points) == 1 and abs(points[0][0] - entropy) > TOLERANCE):
        return None
    entropies, logarithms = zip(*points, strict=True)
    reached = min(max(entropy, entropies[0]), entropies[-1])
    return float(np.exp(np.interp(reached, entropies, logarithms))), reached


def add_matched(results: list[dict]):
    """Writes `matched_gen_ppl` and `matched_entropy` into every row, both None where nothing can be said."""
    for row in results:
        matched = None
        target = held_out_row(results, row)
        if target is not None and row is not target:
            same = ("model", "steps", "sampler", "weights", *SETTINGS)
            sweep = [other for other in results if all(other.get(name) == row.get(name) for name in same)]
            matched = matched_gen_ppl(sweep, target["entropy"])
        row["matched_gen_ppl"], row["matched_entropy"] = matched or (None, None)


def is_matched(row: dict, target: dict) -> bool:
    """Whether the row's matched figure really stands at the entropy of the held-out row, and not only near it."""
    return row["matched_gen_ppl"] is not None and abs(row["matched_entropy"] - target["entropy"]) <= TOLERANCE


def held_out_row(results: list[dict], row: dict) -> dict | None:
    """The row of held-out text under the same judge and conventions as this row."""
    for other in results:
        if other["model"] == HELD_OUT_TEXT and all(other.get(name) == row.get(name) for name in COMPARABLE):
            return other
    return None
