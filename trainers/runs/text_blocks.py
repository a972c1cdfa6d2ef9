"""The training and validation text of a run: cut into blocks by `evaluation/text.py` and kept in the cache of `datasets`.

Prompts with completions, and conversations, are not cut into blocks: each is a row of its own (`evaluation/instructions.py`).

Without that package, plain text can still be used: every command makes its blocks anew and keeps them in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from evaluation.instructions import examples
from evaluation.text import check_blocks, pack
from evaluation.text_sources import TextSource, build_dataset, datasets_library, open_text
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


logger = logging.get_logger(__name__)


@dataclass
class TextArguments:
    """Where the text comes from, and how it is cut into blocks."""

    train_text: str = field(
        metadata={
            "help": "Training text: a UTF-8 text file, a file or folder of .txt, .jsonl, .csv or .parquet, a folder of "
            "save_to_disk, or the name of a Hub dataset. Tables may hold prompts and completions or messages, see "
            "docs/instruction_data.md."
        }
    )
    validation_text: str | None = field(
        default=None, metadata={"help": "Held-out text, of the same kinds as the training text."}
    )
    text_column: str = field(
        default="text",
        metadata={
            "help": "Column with the text, the completions or the messages; plain text files have none. Where there is no "
            "column text: completion with prompt, or else messages."
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the prompts, if text_column holds completions; null: prompt."}
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Join texts and cut them into blocks; false: one row for each. Null: join text, nothing else."
        },
    )
    completion_only: bool | None = field(
        default=None,
        metadata={"help": "Noise and score completions alone, not their prompts. Null: where there are completions."},
    )
    train_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset; 'train[:-1000]' for a slice."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of the Hub dataset held out."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise the training text during training, in order and not shuffled."}
    )
    block_length: int = field(
        default=1024,
        metadata={
            "help": "Tokens in a block, BOS and EOS included; of rows that are not packed the most, the rest is cut."
        },
    )
    max_validation_blocks: int | None = field(
        default=None, metadata={"help": "Use only this many validation blocks, the first ones."}
    )

    def __post_init__(self):
        check_numbers(self, max_validation_blocks=AT_LEAST_1)
        for name in ("train_text", "validation_text"):
            if getattr(self, name) == "":  # as a path, it would be the current folder
                raise ValueError(f"{name} is empty: give a text file, a folder of text, or the name of a dataset")
        if self.validation_text is None:
            for name in ("validation_split", "max_validation_blocks"):
                if getattr(self, name) != default_of(name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but there is no validation_text to use it for"
                    )


def default_of(name: str):
    return next(field.default for field in dataclasses.fields(TextArguments) if field.name == name)


@dataclass(frozen=True)
class RunText:
    """The text of a run: found and checked, but not tokenised yet.

    Args:
        train, validation: the sources; `validation` is None if there is no validation_text.
        arguments: the options with which they were opened.
    """

    train: TextSource
    validation: TextSource | None
    arguments: TextArguments

    def check_packed(self, what: str, instead: str):
        """Raises ValueError if a source is not cut into blocks, which `what` needs; `instead` says what to do."""
        for source in filter(None, (self.train, self.validation)):
            if not is_packed(source, self.arguments):
                raise ValueError(
                    f"{what} reads text that is cut into blocks, but the rows of {source.name!r} are each a text of its own: "
                    f"{instead}"
                )

    def digests(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
        """What identifies the content, for run.json: a run cannot be resumed with another text or tokenizer."""
        sources = [source for source in (self.train, self.validation) if source is not None]
        of_chat = (
            {}
            if all(source.kind == "text" for source in sources)
            else {"chat_template_digest": chat_digest(tokenizer)}
        )
        return of_chat | {
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
    train = open_text(text.train_text, split=text.train_split, streaming=text.streaming, **options)
    validation = None
    if text.validation_text is not None:
        validation = open_text(text.validation_text, split=text.validation_split, **options)
    uses = {"train_split": "split" in train.uses}
    if validation is not None:
        uses["validation_split"] = "split" in validation.uses
    sources = [source for source in (train, validation) if source is not None]
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
        if text.packing and source.kind != "text":
            raise ValueError(
                f"packing is true, but {source.name!r} holds prompts and completions, which are rows of their own: leave it out"
            )
    if text.completion_only and train.kind == "text":
        raise ValueError(
            f"completion_only is true, but {train.name!r} holds text without prompts: leave it out, or name the columns by "
            "text_column and prompt_column"
        )
    return RunText(train, validation, text)


def is_packed(source: TextSource, text: TextArguments) -> bool:
    """Whether a source is cut into blocks; otherwise each of its rows is a row of a batch."""
    return source.kind == "text" and text.packing is not False


def load_blocks(
    text: TextArguments | RunText, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset | MemoryBlocks, Dataset | MemoryBlocks | None]:
    """Training and validation blocks: rows `{"input_ids": list of block_length ids, uint16 or int32}`.

    Rows that are not packed are at most that long, have a `length`, and, if only their completions are to be learnt, a
    `completion_mask` (1: noised and scored).

    Raises:
        FileNotFoundError, ValueError: name the file, offset, row or column at fault.
    """
    text = text if isinstance(text, RunText) else open_run_text(text)
    length, limit = text.arguments.block_length, text.arguments.max_validation_blocks

    def rows_of(source: TextSource, streaming: bool = False):
        if is_packed(source, text.arguments):
            return blocks_of(source, tokenizer, length, streaming)
        masked = source.kind != "text" and text.arguments.completion_only is not False
        return examples_of(source, tokenizer, length, masked, streaming)

    train = rows_of(text.train, text.arguments.streaming)
    if text.validation is None:
        return train, None
    validation = rows_of(text.validation)
    return train, validation if limit is None else validation.select(range(min(limit, len(validation))))


def blocks_of(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int, streaming: bool = False
) -> Dataset | IterableDataset | MemoryBlocks:
    """The blocks of one source."""
    check_blocks(tokenizer, block_length)
    if source.rows is None and not streaming and importlib.util.find_spec("datasets") is None:
        return MemoryBlocks(np.stack(list(pack(source.documents(), tokenizer, block_length, source.name))))
    datasets = datasets_library(source.name)
    item = datasets.Value("uint16" if len(tokenizer) <= 2**16 else "int32")
    features = datasets.Features({"input_ids": datasets.List(item, block_length)})
    arguments = {"source": source, "tokenizer": tokenizer, "block_length": block_length}
    identity = (RULE, source.digest, tokenizer_digest(tokenizer), block_length, str(source.column))
    return _made_by(_rows, features, arguments, identity, streaming)


def examples_of(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, block_length: int, masked: bool, streaming: bool = False
) -> Dataset | IterableDataset:
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
    return _made_by(_example_rows, datasets.Features(columns), arguments, identity, streaming)


def _made_by(rows, features, arguments: dict, identity: tuple, streaming: bool) -> Dataset | IterableDataset:
    """The rows that a generator function makes of `arguments`, from the cache if what identifies them is there."""
    datasets = datasets_library(arguments["source"].name)
    if streaming:
        blocks = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs=arguments)
        next(iter(blocks))  # a text shorter than a block is refused now, not at the first step of a run
        return blocks
    # A fingerprint of our own: that of a tokenizer object changes with its use, and a path says nothing about the content.
    fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return build_dataset(
        datasets.Dataset.from_generator, rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint
    )


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
