"""Where text comes from: files, folders, saved datasets and datasets of the Hub, all read as a sequence of documents.

Plain text is UTF-8; a byte-order mark is dropped and line ends become `\\n`. A document is one file of plain text, or one
row of a table (JSON, CSV, Parquet, a saved or downloaded dataset). Training text and held-out text pass through here alike.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from modeling_mcd.loading import reason_of


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


PIECE = 2**20  # characters of a file that are read at a time
# Kind of a file by its suffix in lower case. `text8` and its like have none.
KINDS = {"": "text", ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown"}
KINDS |= {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PLAIN = ("text", "markdown")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
KNOWN = "plain text (.txt, .md), JSON (.jsonl, .json), CSV (.csv, .tsv) or Parquet (.parquet)"
ZERO = b"\0"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE starts as UTF-16-LE does


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
        column: the column of `rows` that holds the text.
        uses: the options of `open_text` that mattered for this source.
    """

    name: str
    digest: str
    files: tuple[Path, ...] = ()
    rows: Dataset | IterableDataset | None = None
    column: str = "text"
    uses: tuple[str, ...] = ()

    def documents(self) -> Iterator[Iterator[str]]:
        """The documents, each as an iterator over its pieces, so that no document has to fit into memory.

        Raises:
            ValueError: a row does not hold text; names the row and the column.
        """
        for file in self.files:
            yield _read_plain(file)
        if self.rows is None:
            return
        number = 0
        for batch in self.rows.iter(batch_size=64):
            for text in batch[self.column]:
                if not isinstance(text, str):
                    found = "nothing" if text is None else f"a {type(text).__name__}"
                    raise ValueError(
                        f"row {number} of {self.name!r} holds {found} in the column {self.column!r}, not text: "
                        "correct the row or leave it out"
                    )
                yield iter([text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")])
                number += 1


def open_text(
    source: str | Path,
    *,
    column: str = "text",
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> TextSource:
    """Finds a text and checks everything that can be checked without tokenising it. Plain text is read once, completely.

    Args:
        source: a file, a folder of files of one kind, a folder written by `Dataset.save_to_disk`, or the name of a Hub dataset.
        column: the column with the text, for everything but plain text.
        split: split of a Hub dataset (`train[:-1000]` for a slice) or of a saved `DatasetDict`.
        config, revision: of a Hub dataset.
        streaming: read a table row by row instead of preparing it in the cache of `datasets`.

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
                return TextSource(name, _digest_of_plain(files), tuple(files))
            used, digest, options = ("column",), _digest(file.read_bytes() for file in files), {}
            if kind == "csv":  # `NA` and an empty cell are text, and so is a number
                separator = "\t" if files[0].suffix.lower() == ".tsv" else ","
                options = {"converters": {column: str}, "keep_default_na": False, "na_filter": False, "sep": separator}
            files = {"train": [str(file) for file in files]}
            load_dataset = datasets_library(name).load_dataset
            try:
                rows = build_dataset(
                    load_dataset, kind, data_files=files, split="train", streaming=streaming, **options
                )
            except Exception as error:  # each format's reader has its own
                if _is_disk_error(error):
                    raise
                raise ValueError(f"text {name!r} cannot be read as {kind}: {reason_of(error)}") from None
    else:
        used = ("column", "split", "config", "revision")
        load_dataset = datasets_library(name).load_dataset
        try:
            rows = build_dataset(load_dataset, name, config, split=split, revision=revision, streaming=streaming)
        except OSError as error:
            if _is_disk_error(error):
                raise
            raise FileNotFoundError(
                f"text {name!r} is not a local file or folder and could not be loaded from the Hub: {reason_of(error)}"
            ) from None
        digest = _digest([repr((name, config, revision, split) if streaming else rows._fingerprint).encode()])
    columns = rows.column_names or list(next(iter(rows), {column: None}))  # a stream may not say
    if column not in columns:
        raise ValueError(f"dataset {name!r} has no column {column!r} for text_column; it has {sorted(columns)}")
    kind = rows.features[column] if rows.features else None
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        found = getattr(kind, "dtype", type(kind).__name__)
        raise ValueError(f"the column {column!r} of {name!r} holds {found}, not text: give another text_column")
    return TextSource(name, digest, (), rows.select_columns([column]), column, used)


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


def _read_plain(file: Path) -> Iterator[str]:
    """Yields the characters of a UTF-8 file in pieces, without a byte-order mark, with `\\n` at the end of a line."""
    try:
        with file.open(encoding="utf-8-sig", newline=None) as opened:
            while piece := opened.read(PIECE):
                yield piece
    except UnicodeDecodeError:
        try:
            file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
            raise ValueError(f"{file} is not UTF-8: {place}; {_remedy(error.object)}") from None
        raise


def _remedy(content: bytes) -> str:
    encoding = "UTF-16" if content.startswith(WIDE) or ZERO in content[:1000] else "LATIN1 (or what it is written in)"
    return f"convert it, for example with `iconv -f {encoding} -t UTF-8`"


def _digest_of_plain(files: list[Path]) -> str:
    """The digest of files, each of which is read to its end. Raises ValueError for a file that is not plain text."""

    def digests():
        for file in files:
            digest = hashlib.sha256()
            for number, piece in enumerate(_read_plain(file)):
                if "\0" in piece:
                    raise ValueError(f"{file} is not text, or is not UTF-8: it holds zero bytes; {_remedy(ZERO)}")
                if number == 0 and _is_json(piece):
                    raise ValueError(
                        f"{file} holds JSON, not plain text: rename it to .jsonl (or .json), and name the column with "
                        "the text (text_column)"
                    )
                digest.update(piece.encode())
            yield digest.digest()

    return _digest(digests())


def _digest(parts) -> str:
    """16 hexadecimal digits of a sequence of bytes objects."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


def _is_json(start: str) -> bool:
    """Whether a file begins with a JSON object, alone or in a list."""
    try:
        found, _ = json.JSONDecoder().raw_decode(start.lstrip("[ \t\n"))
    except ValueError:
        return False
    return isinstance(found, dict) and bool(found)


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
    digest = _digest([saved._fingerprint.encode()])
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
