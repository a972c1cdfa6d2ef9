"""Rows of several texts in given proportions, and a validation set that is held out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainers.runs.streams import is_held_out


if TYPE_CHECKING:
    from datasets import Dataset

READ_TOGETHER = 1000  # rows


def mixed(parts: Sequence[Dataset], weights: Sequence[float], seed: int) -> Dataset:
    """A pass over several sets of rows: each row is drawn from one of them, by the weights, until each was given completely.

    A set that is used up before begins again (`interleave_datasets` of datasets). Nothing is copied.

    Raises:
        ValueError: the sets have rows of different columns or types.
    """
    from datasets import interleave_datasets

    if any(part.features != parts[0].features for part in parts):
        kinds = " and ".join(str(dict(part.features)) for part in parts)
        raise ValueError(f"train_text and more_text hold rows of different types, {kinds}: save them with the same")
    shares = np.array(weights) / sum(weights)
    return interleave_datasets(
        list(parts), probabilities=shares.tolist(), seed=seed, stopping_strategy="all_exhausted"
    )


def joined_rows(parts: Sequence[Dataset]) -> Dataset:
    """The rows of several sets, one after the other."""
    if len(parts) == 1:
        return parts[0]
    from datasets import concatenate_datasets

    return concatenate_datasets(list(parts))


def carve(rows, fraction: float) -> tuple:
    """Divides rows into those to train on and those that are held out, by the hash of their ids, see `is_held_out`.

    Raises:
        ValueError: all rows are on one side.
    """
    sides = [[], []]
    for number, ids in enumerate(ids_of(rows)):
        sides[is_held_out(ids, fraction)].append(number)
    if not all(sides):
        which = "every" if sides[1] else "none"
        raise ValueError(
            f"validation_fraction ({fraction}) holds out {which} of the {len(rows)} rows: give another, or more text"
        )
    return tuple(rows.select(side) for side in sides)


def ids_of(rows) -> Iterator[np.ndarray]:
    """The token ids of each row."""
    if not hasattr(rows, "with_format"):
        yield from rows.blocks
        return
    for table in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=READ_TOGETHER):
        yield from (row.values.to_numpy() for row in table["input_ids"])
