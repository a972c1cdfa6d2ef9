"""The training and validation text of a run: cut into blocks by `evaluation/text.py` and kept in the cache of `datasets`.

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

from evaluation.text import check_blocks, pack
from evaluation.text_sources import TextSource, build_dataset, datasets_library, open_text
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass
class TextArguments:
    """Where the text comes from, and how it is cut into blocks."""

    train_text: str = field(
        metadata={
            "help": "Training text: a UTF-8 text file, a file or folder of .txt, .jsonl, .csv or .parquet, a folder of "
            "save_to_disk, or the name of a Hub dataset."
        }
    )
    validation_text: str | None = field(
        default=None, metadata={"help": "Held-out text, of the same kinds as the training text."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text; plain text files have none."})
    train_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset; 'train[:-1000]' for a slice."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of the Hub dataset held out."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise the training text during training, in order and not shuffled."}
    )
    block_length: int = field(default=1024, metadata={"help": "Tokens in a block, BOS and EOS included."})
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

    def digests(self) -> dict[str, str | None]:
        """What identifies the content, for run.json: a run cannot be resumed with another text."""
        return {
            "train_text_digest": self.train.digest,
            "validation_text_digest": None if self.validation is None else self.validation.digest,
        }


def open_run_text(text: TextArguments) -> RunText:
    """Finds the text of a run. Plain text is read once, to check it; a dataset that is not streamed is loaded.

    Raises:
        FileNotFoundError: a text does not exist.
        ValueError: a text cannot be read, or an option has no use for any text of this run.
    """
    options = {"column": text.text_column, "config": text.dataset_config, "revision": text.dataset_revision}
    train = open_text(text.train_text, split=text.train_split, streaming=text.streaming, **options)
    validation = None
    if text.validation_text is not None:
        validation = open_text(text.validation_text, split=text.validation_split, **options)
    uses = {"train_split": "split" in train.uses}
    if validation is not None:
        uses["validation_split"] = "split" in validation.uses
    for name, use in (("text_column", "column"), ("dataset_config", "config"), ("dataset_revision", "revision")):
        uses[name] = any(use in source.uses for source in (train, validation) if source is not None)
    for name, used in uses.items():
        if not used and getattr(text, name) != default_of(name):
            source = text.validation_text if name == "validation_split" else text.train_text
            raise ValueError(f"{name} is {getattr(text, name)!r}, but {source!r} has no use for it: leave it out")
    return RunText(train, validation, text)


def load_blocks(
    text: TextArguments | RunText, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset | MemoryBlocks, Dataset | MemoryBlocks | None]:
    """Training and validation blocks: rows `{"input_ids": list of block_length ids, uint16 or int32}`.

    Raises:
        FileNotFoundError, ValueError: name the file, offset, row or column at fault.
    """
    text = text if isinstance(text, RunText) else open_run_text(text)
    length, limit = text.arguments.block_length, text.arguments.max_validation_blocks
    train = blocks_of(text.train, tokenizer, length, text.arguments.streaming)
    if text.validation is None:
        return train, None
    validation = blocks_of(text.validation, tokenizer, length)
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
    if streaming:
        blocks = datasets.IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
        next(iter(blocks))  # a text shorter than a block is refused now, not at the first step of a run
        return blocks
    # A fingerprint of our own: that of a tokenizer object changes with its use, and a path says nothing about the content.
    identity = repr((RULE, source.digest, tokenizer_digest(tokenizer), block_length, str(source.column)))
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return build_dataset(
        datasets.Dataset.from_generator, _rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint
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
