"""Plain text in UTF-8, read in pieces, and digests of what files hold."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path


PIECE = 2**20  # characters of a file that are read at a time
ZERO = b"\0"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE starts as UTF-16-LE does


def read_plain(file: Path) -> Iterator[str]:
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


def read_span(file: Path, start: int, stop: int) -> Iterator[str]:
    """Some bytes of a file that is known to be UTF-8, read as `read_plain` does. They begin and end between characters."""
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")(), translate=True
    )
    with file.open("rb") as opened:
        opened.seek(start)
        for place in range(start, stop, PIECE):
            end = min(place + PIECE, stop)
            yield decoder.decode(opened.read(end - place), final=end == stop)


def _remedy(content: bytes) -> str:
    encoding = "UTF-16" if content.startswith(WIDE) or ZERO in content[:1000] else "LATIN1 (or what it is written in)"
    return f"convert it, for example with `iconv -f {encoding} -t UTF-8`"


def digest_of_plain(files: list[Path]) -> str:
    """The digest of files, each of which is read to its end. Raises ValueError for a file that is not plain text."""

    def digests():
        for file in files:
            digest = hashlib.sha256()
            for number, piece in enumerate(read_plain(file)):
                if "\0" in piece:
                    raise ValueError(f"{file} is not text, or is not UTF-8: it holds zero bytes; {_remedy(ZERO)}")
                if number == 0 and _is_json(piece):
                    raise ValueError(
                        f"{file} holds JSON, not plain text: rename it to .jsonl (or .json), and name the column with "
                        "the text (text_column)"
                    )
                digest.update(piece.encode())
            yield digest.digest()

    return digest_of_parts(digests())


def _is_json(start: str) -> bool:
    """Whether a file begins with a JSON object, alone or in a list."""
    try:
        found, _ = json.JSONDecoder().raw_decode(start.lstrip("[ \t\n"))
    except ValueError:
        return False
    return isinstance(found, dict) and bool(found)


def digest_of_bytes(files: list[Path]) -> str:
    """The digest of what files hold, none of which has to fit into memory."""

    def digests():
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as opened:
                while piece := opened.read(PIECE):
                    digest.update(piece)
            yield digest.digest()

    return _of_digests(digests())


def digest_of_parts(parts) -> str:
    """16 hexadecimal digits of a sequence of bytes objects."""
    return _of_digests(hashlib.sha256(part).digest() for part in parts)


def _of_digests(digests) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
