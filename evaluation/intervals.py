"""Intervals of Gen-PPL, plain and at matched entropy, and of their differences, by the bootstrap over samples.

Every row of a report draws its samples from the same seeds, so that sample i of one row and sample i of another share their noise: the
same samples are taken again in all rows, and the interval of a difference is a paired one. A row whose single samples were not
kept has the interval that its spread over seeds allows (Student's t), and its differences are not paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np


REPLICATES = 1000
LEVEL = 95  # per cent


@dataclass(frozen=True)
class Interval:
    """
    Args:
        value: the figure itself.
        low, high: of the `LEVEL` interval.
    """

    value: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Replicates:
    """A figure, computed again from samples that were drawn again.

    Args:
        value: log Gen-PPL, nats.
        again: [REPLICATES].
        samples: (seeds, samples for each) if single samples were kept; None if not.
    """

    value: float
    again: np.ndarray
    samples: tuple[int, int] | None

    @property
    def interval(self) -> Interval:
        """Of Gen-PPL."""
        low, high = np.percentile(self.again, [50 - LEVEL / 2, 50 + LEVEL / 2])
        return Interval(*(math.exp(value) for value in (self.value, low, high)))

    def is_paired_with(self, other: "Replicates") -> bool:
        return self.samples is not None and self.samples == other.samples

    def less(self, other: "Replicates") -> Interval:
        """The difference from another figure in nats."""
        differences = self.again - (other.again if self.is_paired_with(other) else np.roll(other.again, 1))
        low, high = np.percentile(differences, [50 - LEVEL / 2, 50 + LEVEL / 2])
        return Interval(self.value - other.value, low, high)


@cache
def _chosen(seeds: int, samples: int) -> np.ndarray:
    """Which samples each replicate takes, [REPLICATES, seeds, samples]; the same for all rows."""
    return np.random.default_rng(0).integers(samples, size=(REPLICATES, seeds, samples), dtype=np.int32)


def row_replicates(row: dict, scores: Sequence[dict] | None, by: str) -> tuple[Replicates, np.ndarray] | None:
    """log Gen-PPL of a row, and the entropy `by` of each replicate [REPLICATES]; None if the row has no interval.

    Args:
        scores: of its samples, see `scores.py`; None if they were not kept.
        by: "entropy" or "trigram_entropy".
    """
    if row.get("gen_ppl") is None or row.get(by) is None:
        return None
    value = math.log(row["gen_ppl"])
    if scores is None:
        if row.get("gen_ppl_std") is None or row["seeds"] < 2:
            return None
        error = row["gen_ppl_std"] / row["gen_ppl"] / math.sqrt(row["seeds"])
        noise = np.random.default_rng(_seed_of(row)).standard_t(row["seeds"] - 1, REPLICATES)
        return Replicates(value, value + error * noise, samples=None), np.full(REPLICATES, row[by])
    chosen = _chosen(row["seeds"], row["samples"])
    nll, tokens, entropy = (
        np.take_along_axis(np.array([seed[name] for seed in scores], dtype=float)[None], chosen, axis=2)
        for name in ("nll", "tokens", by)
    )
    if row["convention"] == "retokenized":
        means = nll.sum(axis=2) / tokens.sum(axis=2)
    else:
        means = (nll / np.maximum(tokens, 1)).sum(axis=2) / (tokens > 0).sum(axis=2)
    return Replicates(value, np.log(np.exp(means).mean(axis=1)), samples=(row["seeds"], row["samples"])), entropy.mean(
        axis=(1, 2)
    )


def _seed_of(row: dict) -> int:
    """Rows without single samples get noise of their own: it must not look paired."""
    return abs(hash((row["gen_ppl"], row["gen_ppl_std"]))) % 2**32


def matched_replicates(sweep: Sequence[tuple[Replicates, np.ndarray]], entropy: float, value: float) -> Replicates:
    """log Gen-PPL at matched entropy: each replicate is interpolated as `matched_gen_ppl` does it.

    Args:
        sweep: what `row_replicates` gives for rows that differ in temperature alone.
        value: the figure itself, log Gen-PPL.
    """
    entropies = np.stack([entropies for _, entropies in sweep], axis=1)
    logarithms = np.stack([replicates.again for replicates, _ in sweep], axis=1)
    order = entropies.argsort(axis=1)
    entropies, logarithms = (np.take_along_axis(each, order, axis=1) for each in (entropies, logarithms))
    again = [np.interp(entropy, *pair) for pair in zip(entropies, logarithms, strict=True)]
    kept = {replicates.samples for replicates, _ in sweep}
    return Replicates(value, np.array(again), samples=kept.pop() if len(kept) == 1 else None)


def places(intervals: Sequence[Interval | None]) -> list[str]:
    """The place of each figure, the lowest first; figures whose intervals overlap, also by way of others, share one.

    Returns:
        Such as "1", "2-3" for a tie of two, and "-" without an interval.
    """
    known = sorted((i for i, one in enumerate(intervals) if one is not None), key=lambda i: intervals[i].low)
    result, ties, reach = ["-"] * len(intervals), [], -math.inf
    for i in known:
        if intervals[i].low > reach:
            ties.append([])
        ties[-1].append(i)
        reach = max(reach, intervals[i].high)
    before = 0
    for tie in ties:
        place = str(before + 1) if len(tie) == 1 else f"{before + 1}-{before + len(tie)}"
        for i in tie:
            result[i] = place
        before += len(tie)
    return result
