"""Where text comes from: files, folders, saved datasets and datasets of the Hub, all read as a sequence of documents.

Plain text is UTF-8; a byte-order mark is dropped and line ends become `\\n`. A document is one file of plain text, or one
row of a table (JSON, CSV, Parquet, a saved or downloaded dataset). Training text and held-out text pass through here alike.
The rows of a table may also hold a prompt and its completion, the messages of a conversation (`instructions.py`), or token ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from transformers.utils import logging

from evaluation.plain_text import digest_of_bytes, digest_of_parts, digest_of_plain, read_plain, read_span
from modeling_mcd.loading import reason_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


logger = logging.get_logger(__name__)

# Kind of a file by its suffix in lower case. `text8` and its like have none.
KINDS = {"": "text", ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown"}
KINDS |= {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KINDS |= {".arrow": "arrow"}
PLAIN = ("text", "markdown")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
KNOWN = "plain text (.txt, .md), JSON (.jsonl, .json), CSV (.csv, .tsv), Parquet (.parquet) or Arrow (.arrow)"
PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"  # columns of instruction data, as TRL names them
TOKENS = ("input_ids", "labels", "completion_mask", "attention_mask")  # columns of rows that are tokenised already
STRINGS = ("string", "large_string", "null")


@dataclass(frozen=True)
class TextSource:
    """Text that was found and checked. It can be read any number of times.

    Args:
        name: what the user gave, for messages.
        digest: 16 hexadecimal digits that change with the content. They are computed from the characters of plain text, from
            the bytes of other files, and from the fingerprint that `datasets` gives a saved or a Hub dataset. A streamed Hub
            dataset has not been read yet: its digest covers only its name, configuration, revision and split.
        files: the files, if it is plain text.
        rows: the rows, if it is a table.
        column: the column of `rows` that holds the text, the completion or the messages.
        prompt_column: the column of `rows` that holds the prompt of each completion, if they have one.
        kind: what a row is: "text", "completion" (with its prompt), "messages" or "tokens".
        uses: the options of `open_text` that mattered for this source.
        first: the number of the first of `rows`, for messages; other than 0 in a part of a source.
        span: (start, stop): only these bytes of the one file are read.
        ends: whether the last document ends with the source; false for a part that ends inside a document.
    """

    name: str
    digest: str
    files: tuple[Path, ...] = ()
    rows: Dataset | IterableDataset | None = None
    column: str = "text"
    uses: tuple[str, ...] = ()
    prompt_column: str | None = None
    kind: str = "text"
    first: int = 0
    span: tuple[int, int] | None = None
    ends: bool = True

    def rows_from(self, start: int, stop: int) -> TextSource:
        """The part of a table that holds the rows from `start` on and before `stop`."""
        return replace(self, rows=self.rows.select(range(start, stop)), first=self.first + start)

    def documents(self) -> Iterator[Iterator[str]]:
        """The documents, each as an iterator over its pieces, so that no document has to fit into memory.

        Raises:
            ValueError: a row does not hold text; names the row and the column.
        """
        for file in self.files:
            yield read_plain(file) if self.span is None else read_span(file, *self.span)
        if self.rows is None:
            return
        for number, (text,) in enumerate(self.cells(), self.first):
            if not isinstance(text, str):
                raise self.bad_row(number, self.column, f"holds {found(text)}, not text")
            yield iter([as_plain(text)])

    def cells(self) -> Iterator[tuple]:
        """The rows of a table, from row 0 on: (text,), (prompt, completion) or (messages,), not looked at yet."""
        columns = [name for name in (self.prompt_column, self.column) if name is not None]
        for batch in self.rows.iter(batch_size=64):
            yield from zip(*(batch[name] for name in columns), strict=True)

    def bad_row(self, number: int, column: str | None, fault: str) -> ValueError:
        """The error of a row that cannot be used: it names the row and, if it is not None, the column."""
        where = "" if column is None else f", column {column!r},"
        return ValueError(f"row {number} of {self.name!r}{where} {fault}: correct the row or leave it out")


def as_plain(text: str) -> str:
    """A text of a table without a byte-order mark, with `\\n` at the end of a line."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def found(value) -> str:
    """What a cell holds instead of what it should, in words."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def open_text(
    source: str | Path,
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    folder: str | None = None,
    streaming: bool = False,
    prompt_column: str | None = None,
    instructions: bool = False,
) -> TextSource:
    """Finds a text and checks everything that can be checked without tokenising it. Plain text is read once, completely.

    Args:
        source: a file, a folder of files of one kind, a folder written by `Dataset.save_to_disk`, or the name of a Hub dataset.
        column: the column with the text, for everything but plain text; with `instructions`, see `columns_of`.
        split: split of a Hub dataset (`train[:-1000]` for a slice) or of a saved `DatasetDict`.
        config, revision: of a Hub dataset.
        folder: of a Hub dataset's repository, if only the files in there are meant.
        streaming: read a table row by row instead of preparing it in the cache of `datasets`.
        prompt_column: the column with the prompts of completions; with `instructions` alone.
        instructions: take prompts with completions, and messages, too; otherwise text alone.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset, or the folder holds no text.
        ValueError: a file is not UTF-8 (names the offset) or of a kind that is not read, or there is no such column or split.
    """
    path, name = Path(source), str(source)
    suffix = path.suffix.lower()
    if path.exists() or path.is_absolute() or name.startswith(("./", "../")) or (suffix and suffix in KINDS):
        if not path.exists():
            raise FileNotFoundError(f"text {name!r}: no such file or folder")
        if path.is_dir() and any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            rows, digest, used = _read_saved(path, split, streaming)
        else:
            files = _files_in(path) if path.is_dir() else [path]
            kind = _kind_of(files, name)
            if kind in PLAIN:
                return TextSource(name, digest_of_plain(files), tuple(files))
            used, digest, options = ("column",), digest_of_bytes(files), {}
            if kind == "csv":  # `NA` and an empty cell are text, and so is a number
                separator = "\t" if files[0].suffix.lower() == ".tsv" else ","
                texts = [column, *([prompt_column or PROMPT, COMPLETION] if instructions else [])]
                options = {
                    "converters": dict.fromkeys(texts, str),
                    "keep_default_na": False,
                    "na_filter": False,
                    "sep": separator,
                }
            if not any(file.stat().st_size for file in files):
                raise ValueError(f"text {name!r} is empty: give a file with rows")
            data_files = {"train": [str(file) for file in files]}
            datasets = datasets_library(name)
            try:
                if kind == "arrow":  # where it is, not copied into the cache
                    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
                    rows = rows.to_iterable_dataset() if streaming else rows
                else:
                    rows = build_dataset(
                        datasets.load_dataset,
                        kind,
                        data_files=data_files,
                        split="train",
                        streaming=streaming,
                        **options,
                    )
            except Exception as error:  # each format's reader has its own
                if _is_disk_error(error):
                    raise
                fault = (kind == "json" and bad_line(files)) or reason_of(error)
                raise ValueError(f"text {name!r} cannot be read as {kind}: {fault}") from None
    else:
        used = ("column", "split", "config", "revision")
        load_dataset = datasets_library(name).load_dataset
        try:
            rows = build_dataset(
                load_dataset, name, config, data_dir=folder, split=split, revision=revision, streaming=streaming
            )
        except Exception as error:  # of the network, the Hub or a reader, or a dataset that is a script, never run
            if _is_disk_error(error):
                raise
            if isinstance(error, ValueError) and not isinstance(error, OSError):  # an unknown configuration or split
                raise ValueError(f"text {name!r}: {reason_of(error)}") from None
            raise FileNotFoundError(
                f"text {name!r} is not a local file or folder and could not be loaded from the Hub: {reason_of(error)}"
            ) from None
        digest = digest_of_parts(
            [
                repr(
                    (name, config, revision, split, *filter(None, [folder])) if streaming else rows._fingerprint
                ).encode()
            ]
        )
    columns = rows.column_names or list(next(iter(rows), {column: None}))  # a stream may not say
    kind = "text"
    if instructions:
        prompt_column, column = columns_of(columns, column, prompt_column)
        kind = "completion" if prompt_column is not None else kind
    for option, wanted in (("prompt_column", prompt_column), ("text_column", column)):
        if wanted is not None and wanted not in columns:
            raise ValueError(f"dataset {name!r} has no column {wanted!r} for {option}; it has {sorted(columns)}")
    feature = rows.features[column] if rows.features else None
    if instructions and prompt_column is None and _holds_messages(rows, column, feature):
        kind = "messages"
    if instructions and prompt_column is None and column == TOKENS[0]:
        item = getattr(feature, "feature", None)
        if feature is not None and not str(getattr(item, "dtype", None)).startswith(("int", "uint")):
            raise ValueError(
                f"the column {column!r} of {name!r} holds no lists of token ids: give another text_column"
            )
        rows = rows.select_columns([wanted for wanted in TOKENS if wanted in columns])
        return TextSource(name, digest, (), rows, column, used, kind="tokens")
    if kind == "text" and feature is not None and getattr(feature, "dtype", None) not in STRINGS:
        holds = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(f"the column {column!r} of {name!r} holds {holds}, not text: give another text_column")
    if kind == "text" and instructions and {PROMPT, COMPLETION} <= set(columns):
        logger.warning(f"{name!r} has prompts and completions, but its column {column!r} is read, as text_column says")
    chosen = [wanted for wanted in (prompt_column, column) if wanted is not None]
    return TextSource(name, digest, (), rows.select_columns(chosen), column, used, prompt_column, kind)


def columns_of(columns: Collection[str], column: str, prompt_column: str | None) -> tuple[str | None, str]:
    """The columns with the prompts (None: there are none) and with the completions, texts or messages.

    The names are those that TRL knows. A table without a column `text` is read by what it has: `prompt` and
    `completion`, or else `messages`, or else `input_ids`. `column` "completion" goes with the column `prompt`, any other with `prompt_column`.
    """
    missing = column == "text" and column not in columns
    if prompt_column is not None:
        return prompt_column, COMPLETION if missing else column
    if (missing or column == COMPLETION) and {PROMPT, COMPLETION} <= set(columns):
        return PROMPT, COMPLETION
    others = [other for other in (MESSAGES, TOKENS[0]) if missing and other in columns]
    return None, next(iter(others), column)


def _holds_messages(rows: Dataset | IterableDataset, column: str, feature) -> bool:
    """Whether a column holds lists of mappings, by its type or, where that does not tell, by its first row."""
    if feature is None or type(feature).__name__ == "Json":
        value = next(iter(rows), {}).get(column)
        return isinstance(value, list) and all(isinstance(item, dict) for item in value)
    inside = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(inside, dict) or type(inside).__name__ == "Json"


def bad_line(files: list[Path]) -> str | None:
    """The first line of JSON Lines that is no JSON object, in words; None if there is none, or for another kind of JSON."""
    number = 0
    for file in files:
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            return f"{file.name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        if content.lstrip().startswith("["):
            return None
        for line, text in enumerate(content.split("\n"), start=1):
            if not text.strip():
                continue
            try:
                fault = None if isinstance(json.loads(text), dict) else "it must be a mapping of columns to values"
            except ValueError as error:
                fault = str(error)
            if fault is not None:
                return f"row {number} (line {line} of {file.name}) is no JSON object: {fault}"
            number += 1
    return None


def datasets_library(text: str) -> ModuleType:
    """The package `datasets`, which only tables and Hub datasets need. ValueError, which names the text, without it."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"text {text!r} is not plain text, and the package that reads it, datasets, is not there ({error}): "
            "pip install datasets, or give plain text"
        ) from None
    return datasets


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, ordered by path, without hidden files, README and LICENSE."""

    def is_text(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return file.is_file() and not hidden and not file.name.upper().startswith(("README", "LICENSE"))

    files = sorted(file for file in folder.rglob("*") if is_text(file))
    if not files:
        raise FileNotFoundError(f"text {str(folder)!r}: no text file in this folder; {KNOWN} is read")
    return files


def _kind_of(files: list[Path], name: str) -> str:
    """The kind that all files have. Raises ValueError for a kind that is not read, or for several kinds."""
    first = {}  # kind -> its first file
    for file in files:
        suffix = file.suffix.lower()
        kind = KINDS.get(suffix)
        if kind is None:
            way = "unpack it first" if suffix in PACKED else f"{KNOWN} is read; plain text may be renamed to .txt"
            raise ValueError(f"text {name!r}: {file.name} is not a kind of file that is read ({suffix}): {way}")
        first.setdefault("tsv" if suffix == ".tsv" else kind, file)
    if len(first) > 1:
        some = " and ".join(file.name for file in list(first.values())[:2])
        raise ValueError(f"text {name!r} holds files of several kinds ({some}): give a folder with files of one kind")
    return KINDS[files[0].suffix.lower()]


def _read_saved(folder: Path, split: str, streaming: bool) -> tuple[Dataset | IterableDataset, str, tuple[str, ...]]:
    """Reads a folder written by `save_to_disk`: its rows, their digest, and the options that mattered."""
    datasets = datasets_library(str(folder))
    try:
        saved, used = datasets.load_from_disk(str(folder)), ("column",)
    except Exception as error:
        raise ValueError(f"text {str(folder)!r}: a saved dataset that cannot be loaded: {reason_of(error)}") from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"text {str(folder)!r} has no split {split!r}; it has {sorted(saved)}")
        saved, used = saved[split], ("column", "split")
    digest = digest_of_parts([saved._fingerprint.encode()])
    return (saved.to_iterable_dataset() if streaming else saved), digest, used


def _is_disk_error(error: Exception) -> bool:
    """Whether an error comes from reading or writing a file, not from its content or from the Hub."""
    return getattr(error, "errno", None) is not None or "disk space" in str(error)


def build_dataset(builder, *arguments, **options) -> Dataset | IterableDataset:
    """Calls a function that makes a dataset; re-raises the original error instead of the wrapper of `datasets`."""
    from datasets.exceptions import DatasetGenerationError

    try:
        return builder(*arguments, **options)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
