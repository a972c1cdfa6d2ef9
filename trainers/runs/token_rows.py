"""Text that is tokenised already: rows of a column `input_ids`, used as they are, or joined and cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluation.text import cut
from evaluation.text_sources import TOKENS, TextSource


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

CHECKED_TOGETHER = 1000  # rows
JOINED_TOGETHER = 2**16  # tokens


def token_rows(source: TextSource, tokenizer: PreTrainedTokenizerBase, most: int) -> Dataset | IterableDataset:
    """The rows of a source as they are: nothing is copied, and the file stays memory-mapped.

    Each row is looked at once: before the training, or, of a stream, when it is read.

    Args:
        most: tokens that a row may hold.

    Raises:
        ValueError: names the first row that is empty or too long, or that holds something else than ids of the tokenizer.
    """
    from datasets import Dataset

    if not isinstance(source.rows, Dataset):
        return source.rows.map(_checked, with_indices=True, fn_kwargs={"check": RowCheck(source, tokenizer, most)})
    number, check = 0, RowCheck(source, tokenizer, most)
    for table in source.rows.select_columns([TOKENS[0]]).with_format("arrow").iter(batch_size=CHECKED_TOGETHER):
        for column in table[TOKENS[0]].chunks:
            check.rows(number, column)
            number += len(column)
    if number == 0:
        raise ValueError(f"{source.name!r}: it has no rows")
    return source.rows


def are_blocks(source: TextSource, length: int) -> bool:
    """Whether the rows of a source are token ids that were cut into blocks of this length before."""
    from datasets import Dataset

    if source.kind != "tokens" or not isinstance(source.rows, Dataset):
        return False
    import pyarrow.compute as pc

    tables = source.rows.select_columns([TOKENS[0]]).with_format("arrow").iter(batch_size=CHECKED_TOGETHER)
    return all(pc.all(pc.equal(pc.list_value_length(table[TOKENS[0]]), length)).as_py() for table in tables)


def _checked(row: dict, number: int, check: RowCheck) -> dict:
    check.row(number, row[TOKENS[0]])
    return row


class RowCheck:
    """Raises ValueError for a row of token ids that cannot be trained on; see `token_rows`."""

    def __init__(self, source: TextSource, tokenizer: PreTrainedTokenizerBase, most: int | None):
        self.source, self.vocabulary, self.most = source, len(tokenizer), most
        self.mask, self.mask_token = tokenizer.mask_token_id, tokenizer.mask_token

    def rows(self, number: int, column):
        """Checks an Arrow array of lists, the first of which is the row `number`."""
        import pyarrow.compute as pc

        lengths, ids = pc.list_value_length(column), pc.list_flatten(column)
        least, most = pc.min_max(lengths).as_py().values() if len(column) else (1, 1)
        smallest, largest = pc.min_max(ids).as_py().values()
        mask = self.mask is not None and self.mask <= (largest or 0) and pc.any(pc.equal(ids, self.mask)).as_py()
        nothing = column.null_count or ids.null_count or not least
        if nothing or (self.most or most) < most or smallest < 0 or largest >= self.vocabulary or mask:
            for i, row in enumerate(column.to_pylist()):
                self.row(number + i, row)

    def row(self, number: int, ids: list[int] | None):
        if not ids:
            raise self.source.bad_row(number, TOKENS[0], "is empty")
        if None in ids:
            raise self.source.bad_row(number, TOKENS[0], "holds an id that is missing")
        if self.most is not None and len(ids) > self.most:
            raise ValueError(
                f"row {number} of {self.source.name!r} has {len(ids)} tokens, more than block_length ({self.most}): give a "
                "larger block_length, or packing: true to join the rows and cut them into blocks"
            )
        wrong = next((i for i in ids if not (isinstance(i, int) and 0 <= i < self.vocabulary)), None)
        if wrong is not None:
            raise self.source.bad_row(
                number, TOKENS[0], f"holds the id {wrong!r}, but the tokenizer has {self.vocabulary} tokens"
            )
        if self.mask in ids:
            raise self.source.bad_row(number, TOKENS[0], f"holds the mask token {self.mask_token!r}, which is noise")


def packed_tokens(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks of the documents whose tokens are the rows, joined by EOS and cut as text is; for `datasets`."""
    for block in cut(joined(source, tokenizer), tokenizer, block_length, source.name):
        yield {"input_ids": block}


def joined(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The ids of all rows, int32, with an EOS behind each, in arrays of bounded size."""
    check, ids = RowCheck(source, tokenizer, None), []
    for number, (row,) in enumerate(source.cells()):
        check.row(number, row)
        ids += [*row, tokenizer.eos_token_id]
        if len(ids) >= JOINED_TOGETHER:
            yield np.array(ids, dtype=np.int32)
            ids = []
    yield np.array(ids, dtype=np.int32)
