"""Text into blocks: what a block holds, what it does not depend on, and one clear line for every bad source."""

import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainers.character_tokenizer import ALPHABET, character_tokenizer
from trainers.runs.text_blocks import TextArguments, load_blocks, pack


END = 46
REPOSITORY = Path(__file__).parent.parent


def rows(source, tokenizer, length: int = 8, **more) -> list[list[int]]:
    train, validation = load_blocks(TextArguments(train_text=str(source), block_length=length, **more), tokenizer)
    assert validation is None
    return [row["input_ids"] for row in train]


def stream(documents: list[str], tokenizer) -> list[int]:
    """The definition: every document's tokens and an EOS behind each."""
    return [i for text in documents for i in (*tokenizer(text, add_special_tokens=False)["input_ids"], END)]


def cut(ids: list[int], length: int) -> list[list[int]]:
    body = length - 2
    return [[END, *ids[i : i + body], END] for i in range(0, len(ids) - body + 1, body)]


def many(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 40, (count,), generator=generator).tolist()
    return ["".join("abcdefgh"[i] for i in torch.randint(0, 8, (n,), generator=generator)) for n in lengths]


@pytest.fixture
def folder(tmp_path):
    """`folder(texts)`: a folder with one file a text, in this order, in sub-folders too."""

    def folder(texts: list[str]) -> Path:
        for i, text in enumerate(texts):
            file = tmp_path / "texts" / f"part{i // 100:02d}" / f"{i:05d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return tmp_path / "texts"

    return folder


# --- What a block is


def test_a_block_is_bos_text_eos(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("hello world, this is it.")
    blocks = rows(file, tokenizer)
    assert [tokenizer.decode(block[1:-1]) for block in blocks] == ["hello ", "world,", " this ", "is it."]
    assert all(block[0] == block[-1] == END == tokenizer.bos_token_id for block in blocks)
    file.write_text("hello world, this is it. no")  # 27 characters and an EOS: the last four do not fill a block
    assert rows(file, tokenizer) == blocks
    file.write_text("hello world, this is it. well")
    assert rows(file, tokenizer)[4:] == [[END, *tokenizer(" well")["input_ids"], END, END]]


def test_blocks_are_columns_of_small_integers(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdef" * 5)
    blocks, _ = load_blocks(TextArguments(str(tmp_path / "a.txt"), block_length=8), tokenizer)
    assert blocks.column_names == ["input_ids"] and blocks.features["input_ids"].feature.dtype == "uint16"
    assert blocks.with_format("torch")[:]["input_ids"].shape == (5, 8)


def test_documents_are_one_stream_joined_by_eos(folder, tokenizer):
    texts = many(250)
    assert rows(folder(texts), tokenizer, 13) == cut(stream(texts, tokenizer), 13)


def test_a_block_does_not_depend_on_the_batches_of_documents(tokenizer):
    texts = many(150)
    documents = Dataset.from_dict({"text": texts})

    class Batched:
        def __init__(self, size: int):
            self.size = size

        def iter(self, batch_size: int):
            return documents.iter(batch_size=self.size)

    expected = cut(stream(texts, tokenizer), 13)
    for size in (1, 7, 64, 1000):
        assert [row["input_ids"].tolist() for row in pack(Batched(size), tokenizer, 13)] == expected


def test_one_text_in_one_file_or_in_a_folder_is_the_same(tmp_path, tokenizer):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("hello world, this is it.")
    (tmp_path / "only" / "notes.md").write_text("this is no text")
    assert rows(tmp_path / "only", tokenizer) == rows(tmp_path / "only" / "a.txt", tokenizer)


def test_streaming_gives_the_same_blocks(folder, tokenizer):
    texts = many(150)
    source = folder(texts)
    blocks, _ = load_blocks(TextArguments(str(source), block_length=13, streaming=True), tokenizer)
    assert isinstance(blocks, IterableDataset)
    assert [row["input_ids"] for row in blocks] == rows(source, tokenizer, 13)
    assert [row["input_ids"] for row in blocks] == rows(source, tokenizer, 13), "a second pass"


def test_validation_text_and_its_limit(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdef" * 5)
    (tmp_path / "b.txt").write_text("ghijkl" * 5)
    text = TextArguments(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), block_length=8, max_validation_blocks=3)
    train, validation = load_blocks(text, tokenizer)
    assert (len(train), len(validation)) == (5, 3)
    assert tokenizer.decode(validation[2]["input_ids"][1:-1]) == "ghijkl"
    text.max_validation_blocks = 99
    assert len(load_blocks(text, tokenizer)[1]) == 5


# --- The cache


def test_a_changed_file_is_not_served_from_the_cache(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    for text in ("hello world.", "jello world.", "hello world."):
        file.write_text(text)
        assert "".join(tokenizer.decode(block[1:-1]) for block in rows(file, tokenizer)) == text


def test_another_length_or_tokenizer_is_not_served_from_the_cache(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("hello world, this is it.")
    assert [len(block) for block in rows(file, tokenizer, 8)] == [8] * 4
    assert [len(block) for block in rows(file, tokenizer, 6)] == [6] * 6
    reversed_alphabet = {character: i for i, character in enumerate(reversed(ALPHABET))}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=reversed_alphabet, merges=[])),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    theirs = rows(file, other, 8)
    assert other.decode(theirs[0][1:-1]).replace(" ", "") == "hello" and theirs != rows(file, tokenizer, 8)


def test_using_the_tokenizer_does_not_change_the_blocks(tmp_path):
    tokenizer = character_tokenizer(32)
    file = tmp_path / "a.txt"
    file.write_text("hello world, this is it.")
    before = rows(file, tokenizer)
    tokenizer(["abc", "a"], padding=False, truncation=True, max_length=2)
    assert rows(file, tokenizer) == before == rows(file, tokenizer, streaming=True)


# --- Bad sources


def said(error: pytest.ExceptionInfo) -> str:
    """What a user reads last: the message of the exception itself, not of a cause further up."""
    return traceback.format_exception_only(error.value)[-1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_that_is_not_utf8_is_named_with_its_file_and_offset(folder, tokenizer, streaming):
    source = folder(["good text", "more good text"])
    bad = source / "part00" / "00002.txt"
    bad.write_bytes("é".encode() + b"abc\xff def")
    with pytest.raises(ValueError) as error:
        rows(source, tokenizer, streaming=streaming)
    assert f"{bad} is not UTF-8: byte 0xff at offset 5" in said(error)


@pytest.mark.parametrize("content", ["", "abc", "\n\n\n", "abcd"])
def test_an_empty_or_too_short_text_is_refused(tmp_path, tokenizer, content):
    file = tmp_path / "a.txt"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        rows(file, tokenizer)
    assert "less text than one block of 8 tokens" in said(error) and str(file) in said(error)
    file.write_text("abcde")  # and its EOS: just one block
    assert len(rows(file, tokenizer)) == 1


def test_a_missing_file_or_an_empty_folder_is_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("this is no text")
    for source, says in (
        (tmp_path / "nowhere.txt", "no such file or folder"),
        ("nowhere.txt", "no such file or folder"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "no .txt file in this folder"),
        ("empty", "no .txt file in this folder"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            rows(source, tokenizer)
        assert f"text '{source}': {says}" in said(error)


def test_a_missing_validation_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdef" * 5)
    text = TextArguments(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), block_length=8)
    with pytest.raises(FileNotFoundError, match="b.txt.*no such file"):
        load_blocks(text, tokenizer)


def test_a_block_must_hold_a_token(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdef")
    with pytest.raises(ValueError, match="block_length is 2, .* at least 3"):
        rows(tmp_path / "a.txt", tokenizer, 2)
    assert rows(tmp_path / "a.txt", tokenizer, 3)[0] == [END, 1, END]


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_refused(tmp_path, missing):
    tokenizer = character_tokenizer(32)
    setattr(tokenizer, missing, None)
    (tmp_path / "a.txt").write_text("abcdef")
    with pytest.raises(ValueError, match=f"the tokenizer has no {missing}_id"):
        rows(tmp_path / "a.txt", tokenizer)


# --- A dataset of the Hub, as the library of datasets keeps it once loaded


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_gives_the_blocks_of_its_column(hub_dataset, tokenizer, streaming):
    assert rows(hub_dataset, tokenizer, streaming=streaming) == cut(
        stream(["hello world", "this is it."], tokenizer), 8
    )
    titles = rows(hub_dataset, tokenizer, 6, streaming=streaming, text_column="title")
    assert titles == [[END, 1, END, 2, END, END]]


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_column_is_refused_with_those_there_are(hub_dataset, tokenizer, streaming):
    with pytest.raises(ValueError, match=r"'acme/novels' has no column 'txet' .*\['n', 'text', 'title'\]"):
        rows(hub_dataset, tokenizer, streaming=streaming, text_column="txet")


def test_a_split_may_be_a_slice(hub_dataset, tokenizer):
    assert rows(hub_dataset, tokenizer, train_split="train[1:]") == cut(stream(["this is it."], tokenizer), 8)
    with pytest.raises(ValueError, match="nowhere"):
        rows(hub_dataset, tokenizer, train_split="nowhere")


# --- The character tokenizer


def test_the_character_tokenizer_has_its_48_tokens(tokenizer):
    assert len(ALPHABET) == len(set(ALPHABET)) == 46 and len(tokenizer) == 48
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (46, 46, 47)
    assert tokenizer(ALPHABET[1:])["input_ids"] == list(range(1, 46))


def test_decoding_and_encoding_again_gives_the_same_ids(tokenizer):
    for seed in range(20):
        ids = torch.randint(0, 46, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
        ids = [i for i, before in zip(ids, [None, *ids], strict=False) if (i, before) != (0, 0)]  # no runs of spaces
        assert 190 < len(ids) <= 200
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
        with_specials = [END, *ids, 47, END]
        assert tokenizer(tokenizer.decode(with_specials))["input_ids"] == with_specials


@pytest.mark.parametrize(
    "text, plain",
    [
        ("Hello, World!", "hello, world!"),
        ("Élan naïve façade", "elan naive facade"),
        ("“Yes” — she said, ‘no’…", "\"yes\" - she said, 'no'..."),
        ("one\r\n\r\n  two\tthree", "one two three"),
        ("a_b*c €5 日本 d", "a b c 5 d"),
        ("ﬁne ½", "fine 1 2"),
    ],
)
def test_text_is_made_plain_once_and_for_all(tokenizer, text, plain):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == plain and tokenizer(plain)["input_ids"] == ids


def test_the_shipped_tokenizer_is_the_one_the_code_makes(tokenizer, tmp_path):
    shipped = AutoTokenizer.from_pretrained(REPOSITORY / "recipes" / "tiny" / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    text = "“Yes,” said Élan — 1 of 2;\n\nno_more."
    for other in (shipped, AutoTokenizer.from_pretrained(tmp_path)):
        assert other.get_vocab() == tokenizer.get_vocab() and other(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (other.bos_token_id, other.eos_token_id, other.mask_token_id) == (46, 46, 47)
        assert other.decode(other(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
