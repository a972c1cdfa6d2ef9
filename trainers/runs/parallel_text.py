"""Text tokenised by several processes: the same blocks as by one, byte for byte.

A text is divided into parts of some 8 MB that do not depend on who tokenises them: files, rows of a table, or spans of one
large file, which is cut only where `Divider` may cut it. `datasets` tokenises the parts in `num_proc` processes into its cache;
the processes of a launch each take a share of them. What they wrote is read back memory-mapped, in order, and cut into
blocks. No process holds more than a few batches of text and tokens.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from evaluation.text import CONTEXT, Divider, NoPlace, cut, pack, token_stream
from evaluation.text_sources import TextSource


PART_BYTES = 2**23  # of a part
WINDOW = 2**16  # bytes in which a place is sought where one part ends and the next begins
WRITTEN_TOGETHER = 4  # arrays of tokens that a process keeps until it writes them; some 6 MB each on the way


def parts_of(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> list[TextSource]:
    """The parts of a source, in order. Together they hold it all, and only spans of one file end inside a document."""
    if source.rows is not None:
        count = max(1, min(len(source.rows), source.rows.data.nbytes // PART_BYTES))
        edges = [len(source.rows) * i // count for i in range(count + 1)]
        return [source.rows_from(*pair) for pair in zip(edges, edges[1:], strict=False)]
    parts, group, size, divider = [], [], 0, Divider(tokenizer)

    def flush():
        nonlocal group, size
        if group:
            parts.append(part_of_files(source, tuple(group)))
        group, size = [], 0

    for file in source.files:
        if file.stat().st_size >= 2 * PART_BYTES and divider.cuts:
            flush()
            edges = edges_in(file, divider)
            for start, stop in zip(edges, edges[1:], strict=False):
                parts.append(part_of_files(source, (file,), (start, stop), stop == edges[-1]))
        else:
            group, size = [*group, file], size + file.stat().st_size
        if size >= PART_BYTES:
            flush()
    flush()
    return parts


def part_of_files(
    source: TextSource, files: tuple[Path, ...], span: tuple[int, int] | None = None, ends: bool = True
) -> TextSource:
    return TextSource(source.name, source.digest, files, span=span, ends=ends)


def edges_in(file: Path, divider: Divider) -> list[int]:
    """Offsets in bytes, with 0 and the file's size, between which its spans can be tokenised apart."""
    size, edges = file.stat().st_size, [0]
    with file.open("rb") as opened:
        for offset in range(PART_BYTES, size - PART_BYTES // 2, PART_BYTES):
            opened.seek(offset)
            window = opened.read(WINDOW)
            begin = next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))
            # Characters as a reader sees them: a line end is one, however it is written.
            units = re.findall(r"\r\n|.", window[begin:].decode(errors="ignore"), re.DOTALL)
            text = "".join("\n" if unit[0] == "\r" else unit for unit in units)
            place = divider.place(text, 0, len(text) - CONTEXT)
            if place is not None:
                edges.append(offset + begin + len("".join(units[:place]).encode()))
    return [*edges, size]


def share_of(parts: list[TextSource], share: int, shares: int) -> list[TextSource]:
    """The parts that one of several processes of a launch tokenises; they follow each other."""
    return parts[len(parts) * share // shares : len(parts) * (share + 1) // shares]


def tokens_of(
    parts: list[TextSource], tokenizer: PreTrainedTokenizerBase, identity: tuple, processes: int | None
) -> Dataset:
    """The tokens of some parts, in rows of any length, from the cache if they are there.

    Args:
        identity: what identifies the text, how it is read, and the tokenizer.

    Raises:
        NoPlace: a part that ends inside a document has no place where its text may be cut.
        ValueError: a row does not hold text, or the processes failed.
    """
    name, count = parts[0].name, min(processes or 1, len(parts))
    spans = [(part.span, part.first, *map(str, part.files)) for part in (parts[0], parts[-1])]
    fingerprint = hashlib.sha256(repr(("tokens", *identity, len(parts), spans)).encode()).hexdigest()[:16]
    item = Value("uint16" if len(tokenizer) <= 2**16 else "int32")
    try:
        return Dataset.from_generator(
            _token_rows,
            features=Features({"ids": List(item)}),
            gen_kwargs={"parts": parts, "tokenizer": tokenizer, "alone": count == 1},
            num_proc=count if count > 1 else None,
            fingerprint=fingerprint,
            writer_batch_size=WRITTEN_TOGETHER,
        )
    except DatasetGenerationError as error:
        if count == 1:
            raise (error.__cause__ or error) from None
        kind, reason = first_error(str(error.__cause__))
        if kind == NoPlace.__name__:
            raise NoPlace(reason) from None
        if kind == "ValueError":
            raise ValueError(reason) from None
        raise ValueError(f"text {name!r} could not be tokenised by {count} processes: {kind}: {reason}") from None
    except RuntimeError as error:  # that of `datasets` names neither
        raise ValueError(
            f"text {name!r}: one of the {count} processes that tokenised it was killed, perhaps for want of memory "
            f"({str(error).split('.')[0]}): give a smaller num_proc"
        ) from None


def first_error(traceback: str) -> tuple[str, str]:
    """Name and message of the error that a traceback begins with: in another process, `datasets` wraps it."""
    found = re.search(r"^(?:\w+\.)*(\w+): (.*)$", traceback, re.MULTILINE)
    return found.groups() if found else ("error", traceback)


def _token_rows(parts: list[TextSource], tokenizer: PreTrainedTokenizerBase, alone: bool) -> Iterator[dict]:
    if not alone:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # of this process, which is one of several
    for part in parts:
        divider = Divider(tokenizer, may_force=part.span is None)
        for ids in token_stream(part.documents(), tokenizer, divider, part.ends):
            yield {"ids": ids}


def block_rows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    identity: tuple,
    processes: int | None,
    shares: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The blocks of a source, for `datasets`. Tokens that other processes of a launch have made are in the cache."""
    parts = parts_of(source, tokenizer)
    groups = [group for share in range(shares) if (group := share_of(parts, share, shares))]
    blocks = pack(source.documents(), tokenizer, block_length, source.name)
    if len(parts) > 1:
        try:
            tokens = [tokens_of(group, tokenizer, identity, processes) for group in groups]
            blocks = cut(_arrays(tokens), tokenizer, block_length, source.name)
        except NoPlace:  # one process cuts it all the same, and knows where
            pass
    for block in blocks:
        yield {"input_ids": block}


def _arrays(tokens: list[Dataset]) -> Iterator[np.ndarray]:
    for rows in tokens:
        for table in rows.with_format("arrow").iter(batch_size=WRITTEN_TOGETHER):
            yield from (array.flatten().to_numpy() for array in table["ids"].chunks)


def tokenise_share(
    parts: list[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    identity: tuple,
    processes: int | None,
    share: int,
    shares: int,
):
    """Tokenises what one of several processes of a launch has to, into the cache.

    A fault is not reported here: the first process meets it again when it puts the parts together.
    """
    mine = share_of(parts, share, shares)
    if mine:
        with contextlib.suppress(ValueError, OSError):
            tokens_of(mine, tokenizer, identity, processes)
