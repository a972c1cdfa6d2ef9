"""Text into blocks of fixed length: BOS + text + EOS, with EOS between documents.

All documents are one long stream of tokens, cut every `block_length - 2` tokens; only the last incomplete block of the
whole stream is dropped. A block therefore depends on the text, the tokenizer and the length alone, never on a batch size.
"""

import hashlib
import numpy as np
from dataclasses import dataclass, field
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from transformers import PreTrainedTokenizerBase
from datasets.exceptions import DatasetGenerationError
from collections.abc import Iterator
from modeling_mcd.loading import reason_of
from pathlib import Path


@dataclass
class TextArguments:
    """Where the text comes from and how it is cut."""

    train_text: str = field(
        metadata={"help": "A UTF-8 text file, a folder of .txt files, or the name of a Hub dataset."}
    )
    validation_text: str | None = field(default=None, metadata={"help": "The same, held out."})
    train_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset, slices allowed: 'train[:-1000]'."}
    )
    validation_split: str = field(default="validation", metadata={"help": "Split of a Hub dataset for validation."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    text_column: str = field(default="text", metadata={"help": "Column of a Hub dataset that holds the text."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training text as it goes, in order, unshuffled."}
    )
    block_length: int = field(default=1024, metadata={"help": "Tokens in a block, BOS and EOS included."})
    max_validation_blocks: int | None = field(default=None, metadata={"help": "Use only the first so many."})

    def __post_init__(self):
        check_numbers(self, max_validation_blocks=AT_LEAST_1)
        for name in ("train_text", "validation_text"):
            if getattr(self, name) == "":  # as a path, it would be the current folder
                raise ValueError(
                    f"{name} is empty: give a text file, a folder of .txt files, or the name of a dataset"
                )


def load_blocks(
    text: TextArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Training and validation blocks: rows `{"input_ids": uint16 or int32 list of block_length}`.

    Raises:
        FileNotFoundError, ValueError: with the file, the offset or the column at fault.
    """
    train = blocks_of(text.train_text, tokenizer, text, text.train_split, text.streaming)
    if text.validation_text is None:
        return train, None
    validation = blocks_of(text.validation_text, tokenizer, text, text.validation_split)
    if text.max_validation_blocks is not None:
        validation = validation.select(range(min(text.max_validation_blocks, len(validation))))
    return train, validation


def blocks_of(
    source: str, tokenizer: PreTrainedTokenizerBase, text: TextArguments, split: str, streaming: bool = False
) -> Dataset | IterableDataset:
    """The blocks of one source (a file, a folder, or a split of a Hub dataset)."""
    block_length = text.block_length
    if block_length < 3:
        raise ValueError(f"block_length is {block_length}, but a block is BOS + text + EOS: at least 3")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"the tokenizer has no {name}, and a block is BOS + text + EOS: set it and save the tokenizer again"
            )
    documents, identity = _documents(source, text, split, streaming)
    features = Features({"input_ids": List(Value("uint16" if len(tokenizer) <= 2**16 else "int32"), block_length)})
    arguments = {"documents": documents, "tokenizer": tokenizer, "block_length": block_length, "source": source}
    if streaming:
        blocks = IterableDataset.from_generator(pack, features=features, gen_kwargs=arguments)
        next(iter(blocks))  # a text shorter than a block is refused here, not in the first step of a run
        return blocks
    # Our own fingerprint: that of a tokenizer object changes with its use, and a path says nothing of the file's content.
    recipe = (
        identity,
        tokenizer.backend_tokenizer.to_str(),
        block_length,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    fingerprint = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    return _build(Dataset.from_generator, pack, features=features, gen_kwargs=arguments, fingerprint=fingerprint)


def _build(builder, *arguments, **options) -> Dataset | IterableDataset:
    """Calls a function that makes a dataset; its complaint reaches the user, and not just that there was one."""
    try:
        return builder(*arguments, **options)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def pack(
    documents, tokenizer: PreTrainedTokenizerBase, block_length: int, source: str = "the text"
) -> Iterator[dict[str, np.ndarray]]:
    """Cuts a stream of documents (rows with a `text`) into blocks, as the module's docstring says."""
    body, rest, blocks = block_length - 2, np.empty(0, dtype=np.int32), 0
    for batch in documents.iter(batch_size=64):
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        rest = np.concatenate([rest, *(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32) for ids in encoded)])
        whole = len(rest) // body
        for chunk in rest[: whole * body].reshape(whole, body):
            yield {"input_ids": np.concatenate([[tokenizer.bos_token_id], chunk, [tokenizer.eos_token_id]])}
        rest, blocks = rest[whole * body :], blocks + whole
    if blocks == 0:
        raise ValueError(
            f"{source!r} holds less text than one block of {block_length} tokens: give more text or a smaller block_length"
        )


def _documents(source: str, text: TextArguments, split: str, streaming: bool):
    """The documents as a dataset with the one column `text`, and a string that identifies their content."""
    path = Path(source)
    if path.exists() or path.suffix == ".txt" or path.is_absolute():
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files or not path.exists():
            raise FileNotFoundError(
                f"text {source!r}: " + ("no .txt file in this folder" if path.is_dir() else "no such file or folder")
            )
        identity = [(str(f.resolve()), hashlib.sha256(f.read_bytes()).hexdigest()) for f in files]
        if streaming:
            for _ in _read_files(identity):  # a file that is not UTF-8 is refused here, not when a run comes to it
                pass
        builder = (IterableDataset if streaming else Dataset).from_generator
        features = Features({"text": Value("large_string")})
        return _build(builder, _read_files, features=features, gen_kwargs={"files": identity}), repr(identity)
    try:
        options = {"split": split, "revision": text.dataset_revision, "streaming": streaming}
        documents = _build(load_dataset, source, text.dataset_config, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"text {source!r} is no file or folder here, and cannot be had from the Hub: {reason_of(error)}"
        ) from None
    column, columns = text.text_column, documents.column_names
    if columns is not None and column not in columns:
        raise ValueError(f"dataset {source!r} has no column {column!r} for text_column; it has {sorted(columns)}")
    documents = documents.select_columns([column])
    if column != "text":
        documents = documents.rename_column(column, "text")
    return documents, "" if streaming else documents._fingerprint


def _read_files(files: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """One document a file. The second entry of each pair, a digest, only ties the cache to the content."""
    for name, _ in files:
        try:
            yield {"text": Path(name).read_bytes().decode("utf-8")}
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
            ) from None
