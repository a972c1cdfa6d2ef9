"""Training text that is read while it is trained on: `streaming: true`.

A stream has no end: when a text is read, it begins again. Everything that decides which rows come next is a small state that a
checkpoint holds: where `datasets` is in the documents (its `state_dict`), the tokens that did not fill a block yet, and the
counters of mixture and shuffling, whose draws are keyed by seed and place. So a run goes on with the next row, in any pass,
after it has read one batch of text again (and the window that is being shuffled).
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from evaluation import text as text_rule
from evaluation.instructions import example_at
from evaluation.text import Divider, check_blocks, encode
from evaluation.text_sources import TOKENS, TextSource, as_plain, found
from trainers.runs.token_rows import RowCheck


DRAWN_TOGETHER = 1000  # choices of a source that one key gives
MIXING, SHUFFLING = [0, 0, 0, 2], [0, 0, 0, 3]  # streams of random numbers that `step_noise` does not use
START = {"number": 0, "rows": None}  # the place of the first document


class Documents:
    """The documents of a source, each with its number, from a place on.

    `before` is the place of the document that was given last, and `after()` the one behind it.
    """

    def __init__(self, source: TextSource, place: dict):
        self.source, self.before, self._number = source, place, place["number"]
        self._rows = None if source.rows is None else copy.deepcopy(source.rows)

    def __iter__(self) -> Iterator[tuple[int, Iterator[str] | dict]]:
        if self._rows is None:
            documents = islice(self.source.documents(), self._number, None)
        else:
            self._rows.load_state_dict(self.before["rows"])
            documents = self._rows
        for document in documents:
            self._number += 1
            yield self._number - 1, document
            self.before = self.after()

    def after(self) -> dict:
        return {"number": self._number, "rows": None if self._rows is None else self._rows.state_dict()}


def split_by_node(source: TextSource, rank: int, world: int) -> TextSource:
    """The share of a text that one of several processes reads: some of its files or shards, or every n-th document."""
    if source.rows is None:
        if len(source.files) < world:
            raise ValueError(
                f"split_stream is true, but {source.name!r} has {len(source.files)} files for {world} processes: leave it out"
            )
        return replace(source, files=source.files[rank::world])
    from datasets.distributed import split_dataset_by_node

    return replace(source, rows=split_dataset_by_node(source.rows, rank, world))


def is_held_out(ids, fraction: float) -> bool:
    """Whether a row belongs to the validation set: by the hash of its ids alone, so that equal rows are on the same side."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class SourceStream:
    """The rows of one text, over and over: blocks, or one row for each of its rows.

    Args:
        packed: whether documents are joined and cut into blocks.
        masked: for rows of prompts and completions: give them a `completion_mask`.
        wanted: of the rows, those for which this is true of their ids.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        packed: bool,
        masked: bool = False,
        wanted: Callable[[np.ndarray], bool] | None = None,
    ):
        check_blocks(tokenizer, length)
        self.source, self.tokenizer, self.length, self.packed, self.masked = source, tokenizer, length, packed, masked
        self.wanted = wanted or bool  # a row that holds ids
        self.check = RowCheck(source, tokenizer, None if packed else length)
        self.load_state_dict(None)

    def state_dict(self) -> dict:
        """What comes after the row that was given last."""
        return {**self._base, "emitted": self._emitted}

    def load_state_dict(self, state: dict | None):
        state = state or {"place": START, "parts": 0, "rest": [], "rows": 0, "emitted": 0}
        self._base = {key: value for key, value in state.items() if key != "emitted"}
        self._emitted = state["emitted"]  # rows since the place of `_base`

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield from self.one_pass()
            if not self._base["rows"] + self._emitted:
                raise self.nothing()
            self.load_state_dict(None)

    def nothing(self) -> ValueError:
        """The error of a text that gives no row."""
        fault = f"less text than one block of {self.length} tokens: give more text, or ask for shorter blocks"
        if not self.packed:
            fault = (
                f"no row that leaves room for an answer (block_length {self.length}): give longer blocks, or more rows"
            )
        return ValueError(f"{self.source.name!r} holds {fault}")

    def one_pass(self) -> Iterator[dict]:
        """The rest of a pass."""
        return self._blocks() if self.packed else self._rows()

    def _move(self, **base):
        """The rows up to here have been given: goes on from another place."""
        self._base = {**self._base, **base, "rows": self._base["rows"] + self._emitted}
        self._emitted = 0

    def _blocks(self) -> Iterator[dict]:
        documents, skipped = Documents(self.source, self._base["place"]), self._base["parts"]
        divider, pieces, size = Divider(self.tokenizer), [], 0
        for number, document in documents:
            for i, (piece, is_last) in enumerate(self._pieces(number, document, divider)):
                if i < skipped:
                    continue
                pieces.append((piece, is_last))
                size += len(piece) + 1
                if size >= text_rule.BATCH:
                    rest = yield from self._cut(pieces)
                    place = {"place": documents.after(), "parts": 0}
                    self._move(**(place if is_last else {"place": documents.before, "parts": i + 1}), rest=rest)
                    pieces, size = [], 0
            skipped = 0
        if pieces:
            yield from self._cut(pieces)

    def _pieces(self, number: int, document, divider: Divider) -> Iterator[tuple]:
        """The pieces of a document, texts or lists of ids, and whether each is the last one."""
        if self.source.rows is None:
            return divider.parts(document)
        content = document[self.source.column]
        if self.source.kind == "tokens":
            self.check.row(number, content)
            return iter([(content, True)])
        if not isinstance(content, str):
            raise self.source.bad_row(number, self.source.column, f"holds {found(content)}, not text")
        return divider.parts(iter([as_plain(content)]))

    def _cut(self, pieces: list[tuple]):
        """Gives the blocks of what is left of the stream and of these pieces, but for those given before; returns the rest."""
        contents = [content for content, _ in pieces]
        encoded = contents if self.source.kind == "tokens" else encode(contents, self.tokenizer)
        ids, end = list(self._base["rest"]), self.tokenizer.eos_token_id
        for new, (_, is_last) in zip(encoded, pieces, strict=True):
            ids += [*new, end] if is_last else new
        body, given = self.length - 2, self._emitted
        for number in range(given, len(ids) // body):
            block = [self.tokenizer.bos_token_id, *ids[number * body : (number + 1) * body], end]
            self._emitted = number + 1
            if self.wanted(block):
                yield {"input_ids": block}
        return ids[len(ids) // body * body :]

    def _rows(self) -> Iterator[dict]:
        documents = Documents(self.source, self._base["place"])
        for number, row in documents:
            if self.source.kind == "tokens":
                self.check.row(number, row[TOKENS[0]])
            else:
                row = self._example(number, row)
            if row is None:
                continue
            self._emitted = 1
            self._move(place=documents.after())
            if self.wanted(row["input_ids"]):
                yield row

    def _example(self, number: int, row: dict) -> dict | None:
        columns = [name for name in (self.source.prompt_column, self.source.column) if name is not None]
        example = example_at(number, [row[name] for name in columns], self.source, self.tokenizer)
        ids, completion = example.ids[: self.length], example.completion[: self.length]
        if not any(completion):
            return None
        mask = {"completion_mask": list(map(int, completion))} if self.masked else {}
        return {"input_ids": ids, "length": len(ids)} | mask


class Mixture:
    """Rows of several streams; which stream gives row n is drawn by the weights and depends on the seed and n alone."""

    def __init__(self, streams: list[SourceStream], weights: list[float], seed: int):
        self.streams, self.seed = streams, seed
        self.weights = np.array(weights) / sum(weights)
        self.load_state_dict(None)

    def state_dict(self) -> dict:
        return {"number": self._number, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict | None):
        self._number = 0 if state is None else state["number"]
        for i, stream in enumerate(self.streams):
            stream.load_state_dict(None if state is None else state["streams"][i])

    def __iter__(self) -> Iterator[dict]:
        iterators = [iter(stream) for stream in self.streams]
        while True:
            key, place = divmod(self._number, DRAWN_TOGETHER)
            draws = np.random.Generator(
                np.random.Philox(key=np.array([self.seed, key], dtype=np.uint64), counter=MIXING)
            )
            for chosen in draws.choice(len(iterators), DRAWN_TOGETHER, p=self.weights)[place:]:
                row = next(iterators[chosen])
                self._number += 1
                yield row


class Shuffled:
    """The rows of an endless stream, shuffled within windows of `size` rows, in an order keyed by the seed and the window.

    While one window is given, the next one is read, row by row: at most 2 x `size` rows are held.
    """

    def __init__(self, stream: "SourceStream | Mixture", size: int, seed: int):
        self.stream, self.size, self.seed = stream, size, seed
        self.load_state_dict(None)

    def state_dict(self) -> dict:
        return {"window": self._window, "start": self._start, "given": self._given}

    def load_state_dict(self, state: dict | None):
        state = state or {"window": 0, "start": None, "given": 0}
        self._window, self._start, self._given = state["window"], state["start"], state["given"]

    def __iter__(self) -> Iterator[dict]:
        self.stream.load_state_dict(self._start)
        rows = iter(self.stream)
        window = list(islice(rows, self.size))
        while True:
            key = np.array([self.seed, self._window], dtype=np.uint64)
            order = np.random.Generator(np.random.Philox(key=key, counter=SHUFFLING)).permutation(self.size)
            start, given = self.stream.state_dict(), self._given
            following = list(islice(rows, given))
            for place in range(given, self.size):
                following.append(next(rows))
                self._given = place + 1
                yield window[order[place]]
            window, self._window, self._start, self._given = following, self._window + 1, start, 0


class TextStream(torch.utils.data.IterableDataset):
    """The rows of a stream for a data loader, and the states of the last places at which a checkpoint may be written.

    Args:
        rows: the stream.
        is_split: whether every process of the launch has a stream of its own; otherwise the first one reads for all.
        endless: whether it begins again when all is read.
    """

    def __init__(self, rows: SourceStream | Mixture | Shuffled, is_split: bool, endless: bool = False):
        self.rows, self.is_split, self.endless = rows, is_split, endless or not isinstance(rows, SourceStream)
        self._start, self._number = None, 0
        self._every, self._kept, self._states, self._given = 1, 0, OrderedDict(), None

    def remember(self, every: int, kept: int):
        """Keeps the last `kept` states at multiples of `every` rows."""
        self._every, self._kept = every, kept

    def state_at(self, number: int) -> dict | None:
        """The state after `number` rows; None if it is not known any more, or if a worker of the data loader reads."""
        rows = self.rows.state_dict() if number == self._given else self._states.get(number)
        return None if rows is None else {"number": number, "rows": rows}

    def start_at(self, state: dict):
        self._start, self._number = state["rows"], state["number"]

    def count(self, most: int) -> int:
        """How many rows one pass has, at most `most`. Where that is not known (a mixture, a share of a text): `most`."""
        if not isinstance(self.rows, SourceStream) or self.is_split:
            return most
        self.rows.load_state_dict(None)
        return sum(1 for _ in islice(self.rows.one_pass(), most))

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id > 0:
            return  # a stream is read by one
        self.rows.load_state_dict(self._start)
        rows, number = iter(self.rows) if self.endless else self.rows.one_pass(), self._number
        while True:
            if self._kept and number % self._every == 0:
                self._states[number] = self.rows.state_dict()
                while len(self._states) > self._kept:
                    self._states.popitem(last=False)
            row = next(rows, None)
            if row is None:
                return
            number += 1
            self._given = number
            yield row
