"""The training and validation text of a run: cut into blocks by `evaluation/text.py` and kept in the cache of `datasets`.

Prompts with completions, and conversations, are not cut into blocks: each is a row of its own (`evaluation/instructions.py`).
Rows of token ids are used as they are (`token_rows.py`).

Without that package, plain text can still be used: every command makes its blocks anew and keeps them in memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from evaluation.instructions import examples
from evaluation.text import check_blocks, pack
from evaluation.text_sources import TextSource, build_dataset, datasets_library, open_text
from trainers.runs.mixtures import carve, joined_rows, mixed
from trainers.runs.streams import Mixture, Shuffled, SourceStream, TextStream, is_held_out, split_by_node
from trainers.runs.text_arguments import TextArguments, default_of
from trainers.runs.token_rows import are_blocks, packed_tokens, token_rows


if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RunText:
    """The text of a run: found and checked, but not tokenised yet.

    Args:
        train, validation: the sources; `validation` is None if there is no validation_text.
        arguments: the options with which they were opened.
        more: the other training texts.
    """

    train: TextSource
    validation: TextSource | None
    arguments: TextArguments
    more: tuple[TextSource, ...] = ()

    @property
    def sources(self) -> list[TextSource]:
        return [source for source in (self.train, *self.more, self.validation) if source is not None]

    def check_packed(self, what: str, instead: str):
        """Raises ValueError if a source is not cut into blocks, which `what` needs; `instead` says what to do."""
        for source in self.sources:
            if not (is_packed(source, self.arguments) or are_blocks(source, self.arguments.block_length)):
                raise ValueError(
                    f"{what} reads text that is cut into blocks, but the rows of {source.name!r} are each a text of its own: "
                    f"{instead}"
                )

    def digests(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
        """What identifies the content, for run.json: a run cannot be resumed with another text or tokenizer."""
        more = {}
        if any(source.kind not in ("text", "tokens") for source in self.sources):
            more["chat_template_digest"] = chat_digest(tokenizer)
        if self.more:
            more["more_text_digest"] = [source.digest for source in self.more]
        return more | {
            "train_text_digest": self.train.digest,
            "validation_text_digest": None if self.validation is None else self.validation.digest,
            "tokenizer_digest": tokenizer_digest(tokenizer),
        }


def open_run_text(text: TextArguments) -> RunText:
    """Finds the text of a run. Plain text is read once, to check it; a dataset that is not streamed is loaded.

    Raises:
        FileNotFoundError: a text does not exist.
        ValueError: a text cannot be read, or an option has no use for any text of this run.
    """
    options = {"column": text.text_column, "config": text.dataset_config, "revision": text.dataset_revision}
    options |= {"prompt_column": text.prompt_column, "instructions": True}
    train, *more = (
        open_text(name, split=text.train_split, streaming=text.streaming, **options)
        for name in (text.train_text, *(text.more_text or ()))
    )
    validation = None
    if text.validation_text is not None:
        validation = open_text(text.validation_text, split=text.validation_split, **options)
    uses = {"train_split": "split" in train.uses}
    if validation is not None:
        uses["validation_split"] = "split" in validation.uses
    sources = RunText(train, validation, text, tuple(more)).sources
    for name, use in (
        ("text_column", "column"),
        ("prompt_column", "column"),
        ("dataset_config", "config"),
        ("dataset_revision", "revision"),
    ):
        uses[name] = any(use in source.uses for source in sources)
    for name, used in uses.items():
        if not used and getattr(text, name) != default_of(name):
            source = text.validation_text if name == "validation_split" else text.train_text
            raise ValueError(f"{name} is {getattr(text, name)!r}, but {source!r} has no use for it: leave it out")
    for source in sources:
        if text.packing is False and source.rows is None:
            raise ValueError(f"packing is false, but {source.name!r} is plain text, which has no rows: leave it out")
        if text.packing and source.kind not in ("text", "tokens"):
            raise ValueError(
                f"packing is true, but {source.name!r} holds prompts and completions, which are rows of their own: leave it out"
            )
    if text.completion_only and train.kind in ("text", "tokens"):
        raise ValueError(
            f"completion_only is true, but {train.name!r} holds {train.kind} without prompts: leave it out, or name the columns by "
            "text_column and prompt_column"
        )
    if text.num_proc is not None and not any(source.kind == "text" and is_packed(source, text) for source in sources):
        raise ValueError(
            f"num_proc is {text.num_proc}, but {train.name!r} is not cut into blocks of text, which alone is shared by "
            "several processes: leave it out"
        )
    return RunText(train, validation, text, tuple(more))


def is_packed(source: TextSource, text: TextArguments) -> bool:
    """Whether a source is cut into blocks; otherwise each of its rows is a row of a batch."""
    return text.packing is True if source.kind == "tokens" else source.kind == "text" and text.packing is not False


def load_blocks(
    text: TextArguments | RunText,
    tokenizer: PreTrainedTokenizerBase,
    shares: int = 1,
    seed: int = 0,
    node: tuple[int, int] = (0, 1),
) -> tuple[Dataset | TextStream | MemoryBlocks, Dataset | MemoryBlocks | None]:
    """Training and validation blocks: rows `{"input_ids": list of block_length ids, uint16 or int32}`.

    Rows that are not packed are at most that long, have a `length`, and, if only their completions are to be learnt, a
    `completion_mask` (1: noised and scored).

    Args:
        shares: processes that have each called `tokenise_shares` before.
        seed: of the mixture of several texts, and of the order of a shuffled stream.
        node: with `split_stream`, this process and how many there are.

    Raises:
        FileNotFoundError, ValueError: name the file, offset, row or column at fault.
    """
    text = text if isinstance(text, RunText) else open_run_text(text)
    arguments = text.arguments
    length, limit, fraction = arguments.block_length, arguments.max_validation_blocks, arguments.validation_fraction
    if len({is_packed(source, arguments) or source.kind for source in (text.train, *text.more)}) > 1:
        raise ValueError(
            f"train_text and more_text {arguments.more_text} hold rows of different kinds, which no batch can hold together: "
            "give texts of one kind"
        )

    def rows_of(source: TextSource):
        if is_packed(source, arguments):
            return blocks_of(source, tokenizer, length, arguments.num_proc, shares)
        if source.kind == "tokens":
            return token_rows(source, tokenizer, length)
        return examples_of(source, tokenizer, length, has_mask(source, arguments))

    validation = None if text.validation is None else rows_of(text.validation)
    if arguments.streaming:
        train = stream_of(text, tokenizer, seed, node)
        if fraction is not None:
            validation = held_out_rows(text, tokenizer)
    else:
        parts = [rows_of(source) for source in (text.train, *text.more)]
        if fraction is not None:
            parts, held_out = zip(*(carve(rows, fraction) for rows in parts), strict=True)
            validation = joined_rows(held_out)
        train = parts[0] if len(parts) == 1 else mixed(parts, arguments.text_weights, seed)
    if validation is None or limit is None:
        return train, validation
    return train, validation.select(range(min(limit, len(validation))))


def has_mask(source: TextSource, text: TextArguments) -> bool:
    """Whether the rows of a source have a `completion_mask`."""
    return source.kind not in ("text", "tokens") and text.completion_only is not False


def tokenise_shares(text: RunText, tokenizer: PreTrainedTokenizerBase, share: int, shares: int):
    """Tokenises the share of the text that one of several processes has to, into the cache; nothing if the blocks are there."""
    if importlib.util.find_spec("datasets") is None:
        return  # plain text, which every process then makes into blocks by itself
    for source in text.sources:
        streamed = text.arguments.streaming and source is not text.validation
        if source.kind != "text" or not is_packed(source, text.arguments) or streamed:
            continue
        from trainers.runs.parallel_text import parts_of, tokenise_share

        parts = parts_of(source, tokenizer)
        blocks = _blocks_and_identity(source, tokenizer, text.arguments.block_length)
        if len(parts) > 1 and not _is_cached(*blocks):
            identity = _identity_of_tokens(source, tokenizer)
            tokenise_share(parts, tokenizer, identity, text.arguments.num_proc, share, shares)


def _identity_of_tokens(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> tuple:
    return (RULE, source.digest, tokenizer_digest(tokenizer), str(source.column))


def _blocks_and_identity(source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int) -> tuple:
    """The features of blocks, and what identifies them."""
    datasets = datasets_library(source.name)
    item = datasets.Value("uint16" if len(tokenizer) <= 2**16 else "int32")
    features = datasets.Features({"input_ids": datasets.List(item, block_length)})
    return features, (RULE, source.digest, tokenizer_digest(tokenizer), block_length, str(source.column))


def blocks_of(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    processes: int | None = None,
    shares: int = 1,
) -> Dataset | MemoryBlocks:
    """The blocks of one source.

    Args:
        processes: of this process that tokenise; None: it does so itself.
        shares: of the text, that so many processes have tokenised into the cache, see `tokenise_shares`.
    """
    check_blocks(tokenizer, block_length)
    if source.rows is None and importlib.util.find_spec("datasets") is None:
        return MemoryBlocks(np.stack(list(pack(source.documents(), tokenizer, block_length, source.name))))
    features, identity = _blocks_and_identity(source, tokenizer, block_length)
    arguments = {"source": source, "tokenizer": tokenizer, "block_length": block_length}
    if source.kind == "tokens":
        return _made_by(packed_tokens, features, arguments, (*identity, "tokens"))
    if processes is not None or shares > 1:
        from trainers.runs.parallel_text import block_rows

        arguments |= {"identity": _identity_of_tokens(source, tokenizer), "processes": processes, "shares": shares}
        return _made_by(block_rows, features, arguments, identity)
    return _made_by(_rows, features, arguments, identity)


def examples_of(source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int, masked: bool) -> Dataset:
    """The rows of one source that is not packed.

    Args:
        masked: give them a `completion_mask`.
    """
    check_blocks(tokenizer, block_length)
    datasets = datasets_library(source.name)
    item = datasets.Value("uint16" if len(tokenizer) <= 2**16 else "int32")
    columns = {"input_ids": datasets.List(item), "length": datasets.Value("int32")}
    columns |= {"completion_mask": datasets.List(datasets.Value("int8"))} if masked else {}
    arguments = {"source": source, "tokenizer": tokenizer, "block_length": block_length, "masked": masked}
    identity = (RULE, source.digest, tokenizer_digest(tokenizer), chat_digest(tokenizer), block_length, masked)
    identity += (source.kind, source.prompt_column, source.column)
    return _made_by(_example_rows, datasets.Features(columns), arguments, identity)


def _made_by(rows, features, arguments: dict, identity: tuple) -> Dataset:
    """The rows that a generator function makes of `arguments`, from the cache if what identifies them is there."""
    datasets = datasets_library(arguments["source"].name)
    return build_dataset(
        datasets.Dataset.from_generator, rows, features=features, gen_kwargs=arguments, fingerprint=_hash(identity)
    )


def _hash(identity: tuple) -> str:
    """A fingerprint of our own: that of a tokenizer object changes with its use, and a path says nothing about the content."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _is_cached(features, identity: tuple) -> bool:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        Dataset.from_generator(_nothing, features=features, fingerprint=_hash(identity))
    except DatasetGenerationError:
        return False
    return True


def _nothing() -> Iterator[dict]:
    """Called by `datasets` only if what it should make is not in the cache."""
    raise LookupError
    yield


def is_wanted(ids, fraction: float, held_out: bool) -> bool:
    return is_held_out(ids, fraction) is held_out


def held_out_rows(text: RunText, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The first held-out rows of streams, as many of each: `max_validation_blocks` together."""
    sources, arguments = [text.train, *text.more], text.arguments
    wanted = partial(is_wanted, fraction=arguments.validation_fraction, held_out=True)
    rows, each = [], -(-arguments.max_validation_blocks // len(sources))
    for source in sources:
        masked = has_mask(source, arguments)
        stream = SourceStream(source, tokenizer, arguments.block_length, is_packed(source, arguments), masked, wanted)
        rows += islice(stream.one_pass(), each)
    if not rows:
        raise ValueError(f"validation_fraction ({arguments.validation_fraction}) holds out no row: make it larger")
    return datasets_library(text.train.name).Dataset.from_list(rows)


def stream_of(text: RunText, tokenizer: PreTrainedTokenizerBase, seed: int, node: tuple[int, int]) -> TextStream:
    """The training text as a stream. A text that gives no row is refused now, not at the first step of a run."""
    arguments = text.arguments
    streams = [
        SourceStream(
            source, tokenizer, arguments.block_length, is_packed(source, arguments), has_mask(source, arguments)
        )
        for source in (text.train, *text.more)
    ]
    for stream in streams:
        if arguments.validation_fraction is not None:
            stream.wanted = partial(is_wanted, fraction=arguments.validation_fraction, held_out=False)
        if arguments.split_stream and node[1] > 1:
            stream.source = split_by_node(stream.source, *node)
        if next(stream.one_pass(), None) is None:
            raise stream.nothing()
    rows = streams[0] if len(streams) == 1 else Mixture(streams, arguments.text_weights, seed)
    if arguments.shuffle_buffer is not None:
        rows = Shuffled(rows, arguments.shuffle_buffer, seed)
    return TextStream(rows, arguments.split_stream and node[1] > 1)


class MemoryBlocks(torch.utils.data.Dataset):
    """Blocks [n, block_length] int32 with as much of the interface of a `datasets.Dataset` as a run uses."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, key: int | str) -> dict[str, list[int]] | list[list[int]]:
        return self.blocks.tolist() if key == "input_ids" else {"input_ids": self.blocks[key].tolist()}

    def select(self, chosen: Sequence[int]) -> MemoryBlocks:
        return MemoryBlocks(self.blocks[list(chosen)])


RULE = 3  # number of the rule by which text is read and packed; part of the cache's key, since another rule makes other blocks


def _rows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int
) -> Iterator[dict[str, np.ndarray]]:
    for block in pack(source.documents(), tokenizer, block_length, source.name):
        yield {"input_ids": block}


def _example_rows(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int, masked: bool
) -> Iterator[dict]:
    """Rows of at most `block_length` tokens; those in which nothing of a completion is left are left out."""
    cut = dropped = kept = 0
    for example in examples(source, tokenizer):
        ids, completion = example.ids[:block_length], example.completion[:block_length]
        cut += len(ids) < len(example.ids)
        if not any(completion):
            dropped += 1
            continue
        kept += 1
        yield {"input_ids": ids, "length": len(ids)} | (
            {"completion_mask": list(map(int, completion))} if masked else {}
        )
    if not kept:
        fault = f"of its {dropped} prompts none leaves room for an answer" if dropped else "it has no rows"
        raise ValueError(f"{source.name!r}: {fault} (block_length {block_length}): give longer blocks, or more rows")
    if cut:
        logger.warning(
            f"{source.name!r}: {cut} of {kept + dropped} rows are longer than block_length ({block_length}) and were cut; "
            f"{dropped} of them were left out, since nothing of their completion remained"
        )


def chat_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits of the chat template."""
    return hashlib.sha256(repr(tokenizer.chat_template).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that change with everything that changes a text's ids, but not with use of the tokenizer."""
    parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    parts += [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "mask", "unk")]
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({key: value for key, value in sorted(backend.items()) if key not in ("truncation", "padding")})
    else:  # the files that it loads besides its vocabulary, such as the merges of a BPE
        with tempfile.TemporaryDirectory() as folder:
            files = tokenizer.save_vocabulary(folder)
            parts += [(Path(file).name, Path(file).read_bytes()) for file in files if file is not None]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
