"""Gen-PPL at matched entropy: what a model's Gen-PPL would be if its samples were as diverse as held-out text.

A lower temperature lowers Gen-PPL and entropy together, so Gen-PPL alone cannot rank models. Over a sweep of temperatures,
log Gen-PPL is interpolated linearly in entropy, to the entropy of held-out text. The kind of entropy can reverse the ranking,
so a report whose unit is words also gives the figure at matched entropy of character trigrams.
"""

import math
from collections.abc import Sequence

import numpy as np

from evaluation.evaluate_model import COMPARABLE, HELD_OUT_TEXT, SETTINGS


TOLERANCE = 0.01  # nats of entropy: as near as this counts as matched


# The entropy of a row that is matched -> the names of the two resulting figures.
MATCHED = {
    "entropy": ("matched_gen_ppl", "matched_entropy"),
    "trigram_entropy": ("trigram_matched_gen_ppl", "trigram_matched_entropy"),
}


def matched_gen_ppl(rows: Sequence[dict], entropy: float, by: str = "entropy") -> tuple[float, float] | None:
    """(Gen-PPL, entropy actually reached) of one model and number of steps, whose rows differ in temperature alone.

    If the sweep does not bracket the entropy, these are the figures of its nearest row. A single row counts only within
    `TOLERANCE`, otherwise the result is None. Rows that lack either figure are ignored.
    """
    measured = [row for row in rows if None not in (row.get(by), row.get("gen_ppl"))]
    points = sorted((row[by], math.log(row["gen_ppl"])) for row in measured)
    if not points or (len(points) == 1 and abs(points[0][0] - entropy) > TOLERANCE):
        return None
    entropies, logarithms = zip(*points, strict=True)
    reached = min(max(entropy, entropies[0]), entropies[-1])
    return float(np.exp(np.interp(reached, entropies, logarithms))), reached


def add_matched(results: list[dict]):
    """Writes the figures of `MATCHED` into every row; None where the sweep does not allow one."""
    for row in results:
        target = held_out_row(results, row)
        same = ("model", "steps", "sampler", "locking", "weights", *SETTINGS)
        sweep = [other for other in results if all(other.get(name) == row.get(name) for name in same)]
        for by, names in MATCHED.items():
            matched = None
            if target is not None and target.get(by) is not None and row is not target:
                matched = matched_gen_ppl(sweep, target[by], by)
            row.update(zip(names, matched or (None, None), strict=True))


def is_matched(row: dict, target: dict, by: str = "entropy") -> bool:
    """Whether the row's matched figure is at the entropy of the held-out row, and not only the sweep's nearest point."""
    figure, reached = MATCHED[by]
    return row[figure] is not None and abs(row[reached] - target[by]) <= TOLERANCE


def held_out_row(results: list[dict], row: dict) -> dict | None:
    """The row of held-out text under the same judge and conventions as this row."""
    for other in results:
        if other["model"] == HELD_OUT_TEXT and all(other.get(name) == row.get(name) for name in COMPARABLE):
            return other
    return None
