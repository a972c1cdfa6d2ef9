"""Text into blocks: what a block holds, what it does not depend on, and one clear line for every bad source."""

import re
import shutil
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny_run import run_python
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from evaluation.text import Divider, encode, pack, read_texts, text_blocks, token_stream
from evaluation.text_sources import open_text
from trainers.character_tokenizer import ALPHABET, character_tokenizer
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks, tokenizer_digest


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


def test_a_block_does_not_depend_on_batches_or_pieces(tokenizer, monkeypatch):
    texts = many(150)
    expected = cut(stream(texts, tokenizer), 13)
    for batch, piece in ((1, 1), (50, 7), (2**18, 1000)):
        monkeypatch.setattr("evaluation.text.BATCH", batch)
        documents = ([text[i : i + piece] for i in range(0, len(text), piece)] for text in texts)
        assert [block.tolist() for block in pack(documents, tokenizer, 13)] == expected


def test_one_text_in_one_file_or_in_a_folder_is_the_same(tmp_path, tokenizer):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.txt").write_text("hello world, this is it.")
    (tmp_path / "only" / "README.md").write_text("this is no text")
    (tmp_path / "only" / ".hidden").write_text("nor is this")
    assert rows(tmp_path / "only", tokenizer) == rows(tmp_path / "only" / "a.txt", tokenizer)


def test_streaming_gives_the_same_blocks(folder, tokenizer):
    texts = many(150)
    source = folder(texts)
    blocks, _ = load_blocks(TextArguments(str(source), block_length=13, streaming=True), tokenizer)
    assert isinstance(blocks, torch.utils.data.IterableDataset)
    assert [row["input_ids"] for row in blocks] == rows(source, tokenizer, 13)
    assert [row["input_ids"] for row in blocks] == rows(source, tokenizer, 13), "a second pass"


def test_without_datasets_plain_text_gives_the_same_blocks(folder, tokenizer, monkeypatch, tmp_path):
    texts = folder(many(50))
    table = tmp_path / "table.jsonl"
    table.write_text('{"text": "hello world, this is it."}')
    options = {"train_text": str(texts), "validation_text": str(texts), "block_length": 8, "max_validation_blocks": 3}
    theirs, their_validation = load_blocks(TextArguments(**options), tokenizer)
    monkeypatch.setitem(sys.modules, "datasets", None)
    ours, validation = load_blocks(TextArguments(**options), tokenizer)
    assert ours["input_ids"] == [row["input_ids"] for row in theirs] and len(ours) == len(theirs)
    assert [validation[i] for i in range(3)] == list(their_validation) and len(validation) == 3
    with pytest.raises(ValueError, match="is not plain text, and the package that reads it, datasets, is not there"):
        rows(table, tokenizer)


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
    (tmp_path / "empty" / "README.md").write_text("this is no text")
    for source, says in (
        (tmp_path / "nowhere.txt", "no such file or folder"),
        ("nowhere.txt", "no such file or folder"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "no text file in this folder"),
        ("empty", "no text file in this folder"),
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


# --- Kinds of files


def test_the_suffix_in_any_case_and_line_ends_do_not_matter(tmp_path, tokenizer):
    text = "hello world,\nthis is it."
    (tmp_path / "a.txt").write_text(text)
    expected = rows(tmp_path / "a.txt", tokenizer)
    for name, content in (
        ("A.TXT", text.encode()),
        ("a.md", text.encode()),
        ("a", text.encode()),
        ("bom.txt", b"\xef\xbb\xbf" + text.encode()),
        ("dos.txt", text.replace("\n", "\r\n").encode()),
        ("mac.txt", text.replace("\n", "\r").encode()),
    ):
        file = tmp_path / name / name  # in a folder of its own too
        file.parent.mkdir()
        file.write_bytes(content)
        for source in (file, file.parent):
            assert rows(source, tokenizer) == expected and read_texts(source) == [text], name


TABLE = {"story": ["hello world", "this is it.\r\n"], "n": [1, 2]}


def save_table(kind: str, place: Path) -> Path:
    table = Dataset.from_dict(TABLE)
    if kind == "saved":
        table.save_to_disk(place)
    elif kind == "splits":
        DatasetDict(train=table.select([1]), held=table).save_to_disk(place)
    elif kind == "folder":
        place.mkdir()
        table.select([0]).to_parquet(place / "0.parquet")
        table.select([1]).to_parquet(place / "1.parquet")
    else:
        place = place.with_suffix(f".{kind}")
        write = {"jsonl": table.to_json, "json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}
        write.get(kind, lambda file: table.to_csv(file, sep="\t"))(place)
    return place


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder", "saved", "splits"])
def test_tables_are_read_by_their_column(tmp_path, tokenizer, kind, streaming):
    source = save_table(kind, tmp_path / "table")
    more = {"train_split": "held"} if kind == "splits" else {}
    expected = cut(stream(["hello world", "this is it.\n"], tokenizer), 8)
    assert rows(source, tokenizer, text_column="story", streaming=streaming, **more) == expected
    with pytest.raises(ValueError, match=r"no column 'text' for text_column; it has \['n', 'story'\]"):
        rows(source, tokenizer, streaming=streaming, **more)


def test_numbers_and_missing_values_of_a_csv_are_the_text_they_are(tmp_path):
    (tmp_path / "a.csv").write_text("n,text\n1,NA\n2,007\n3,\n")
    assert read_texts(tmp_path / "a.csv") == ["NA", "007", ""]


@pytest.mark.parametrize("name", ["a.txt", "a"])
@pytest.mark.parametrize("content", ['{"text": "hello"}\n{"text": "world"}\n', '[\n  {"text": "hello"}\n]'])
def test_json_under_another_name_is_never_trained_on(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content * 9)
    with pytest.raises(ValueError, match=f"{name} holds JSON, not plain text: rename it to .jsonl"):
        rows(tmp_path / name, tokenizer)


def test_braces_at_the_start_of_a_text_are_text(tmp_path):
    for text in ("{curly} beginnings", "{} and so on", "[1] a footnote", '["a", "b"]'):
        (tmp_path / "a.txt").write_text(text)
        assert read_texts(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"a.txt.gz": b"x"}, r"a.txt.gz is not a kind of file that is read \(.gz\): unpack it first"),
        ({"a.pdf": b"x"}, r"a.pdf is not a kind of file that is read \(.pdf\): plain text"),
        ({"a.txt": b"x", "b.md": b"x"}, r"files of several kinds \(a.txt and b.md\)"),
        ({"a.csv": b"x", "b.tsv": b"x"}, r"files of several kinds \(a.csv and b.tsv\)"),
        ({"a.txt": "text".encode("utf-16")}, "a.txt is not UTF-8: .* `iconv -f UTF-16 -t UTF-8`"),
        ({"a.txt": "text".encode("utf-16-le")}, "a.txt is not text, or is not UTF-8: .* `iconv -f UTF-16 -t UTF-8`"),
        ({"a.jsonl": b'{"text": "a"}\n{"text": '}, "cannot be read as json"),
        ({"a.parquet": b"text"}, "cannot be read as parquet"),
        ({"a.jsonl": b""}, "is empty: give a file with rows"),
        ({"state.json": b"{"}, "a saved dataset that cannot be loaded"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_not_read_is_refused_by_name(tmp_path, tokenizer, files, says):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for source in {tmp_path, tmp_path / next(iter(files))} if len(files) == 1 and "state" not in says else {tmp_path}:
        if source.name != "state.json":
            with pytest.raises(ValueError, match=says):
                rows(source, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "column, says",
    [
        (["hello", None], "row 1 of .*, column 'text', holds nothing, not text"),
        ([1, 2], "the column 'text' of .* holds int64, not text"),
        ([["a"], ["b"]], "the column 'text' of .* holds List, not text"),
    ],
)
def test_a_row_without_text_is_named(tmp_path, tokenizer, streaming, column, says):
    Dataset.from_dict({"text": column}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=says):
        rows(tmp_path / "a.parquet", tokenizer, 6, streaming=streaming)


@pytest.mark.parametrize(
    "option",
    [
        {"text_column": "story"},
        {"train_split": "test"},
        {"dataset_config": "en"},
        {"dataset_revision": "v1"},
        {"validation_split": "test"},
        {"max_validation_blocks": 3},
    ],
    ids=str,
)
def test_an_option_without_a_use_is_refused(tmp_path, tokenizer, option):
    (tmp_path / "a.txt").write_text("hello world")
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"^{name} is '?{value}'?, but "):
        rows(tmp_path / "a.txt", tokenizer, **option)


# --- What identifies a text and a tokenizer


def test_a_text_is_identified_by_what_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_text("one\n")
    digest = open_text(tmp_path / "a").digest
    (tmp_path / "a" / "1.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert open_text(tmp_path / "b").digest == digest, "neither the place nor the line ends are the text"
    (tmp_path / "b" / "2.txt").write_text("")
    assert open_text(tmp_path / "b").digest != digest, "an empty document is an EOS"
    (tmp_path / "a" / "1.txt").write_text("two\n")
    assert open_text(tmp_path / "a").digest != digest


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "saved"])
def test_a_table_is_identified_by_its_content(tmp_path, monkeypatch, kind):
    one = open_text(save_table(kind, tmp_path / "one"), column="story").digest
    monkeypatch.setitem(TABLE, "story", ["hello world", "that is it."])
    assert open_text(save_table(kind, tmp_path / "two"), column="story").digest != one


def test_a_tokenizer_is_identified_by_its_ids_not_by_its_use(tmp_path):
    tokenizer = character_tokenizer(32)
    digest = tokenizer_digest(tokenizer)
    tokenizer(["abc", "a"], truncation=True, max_length=2, split_special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path))
    seen = {digest, tokenizer_digest(ByT5Tokenizer()), tokenizer_digest(ByT5Tokenizer(extra_ids=7))}
    tokenizer.backend_tokenizer.normalizer = None
    seen.add(tokenizer_digest(tokenizer))
    tokenizer.mask_token = None
    seen.add(tokenizer_digest(tokenizer))
    assert len(seen) == 5


# --- Long documents, and the names of special tokens in a text

SAMPLE = "It was 1,024 days  ago\tthat the [MASK]ed man's  horse (née “Été”)\n\n\n   ran off...  日本語 ok?\r\n <|endoftext|>x "


def prose(count: int, seed: int = 0) -> str:
    """Text with everything that tokenizers treat specially, `count` characters of it."""
    generator = torch.Generator().manual_seed(seed)
    pieces = re.findall(r"\s+|\S+", SAMPLE)
    order = torch.randint(0, len(pieces), (count,), generator=generator).tolist()
    return "".join(pieces[i] for i in order)[:count]


def trained(model, trainer, pre=None, normalizer=None, mask="[MASK]", **options) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `prose`."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre or backend.pre_tokenizer
    backend.normalizer = normalizer or backend.normalizer
    backend.train_from_iterator([prose(20_000, seed=9).replace("[MASK]", " ").replace("<|endoftext|>", " ")], trainer)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "mask_token": mask}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def byte_level(**options) -> PreTrainedTokenizerFast:
    """GPT-2's: byte-level BPE with its pre-tokenizer."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | options))


def sentence_piece(scheme: str) -> PreTrainedTokenizerFast:
    """Llama 2's and Gemma's: merges over all of the text, with spaces as ▁."""
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    return trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), trainer, pre_tokenizers.Metaspace(prepend_scheme=scheme)
    )


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizers.NFKC())


def superwords() -> PreTrainedTokenizerFast:
    """Merges across spaces and lines: nothing may be cut."""
    alphabet = sorted(set(SAMPLE))
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    return trained(models.BPE(), trainer)


def bytes_of_text() -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"bos_token": "</s>", "mask_token": "[MASK]"})
    return tokenizer


TOKENIZERS = {
    "characters": lambda: character_tokenizer(32),
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(add_prefix_space=True),
    "byte-level, no regex": lambda: byte_level(use_regex=False),
    "metaspace, first": lambda: sentence_piece("first"),
    "metaspace, always": lambda: sentence_piece("always"),
    "unigram": unigram,
    "superwords": superwords,
    "bytes": bytes_of_text,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text", [prose(6_000), "a b" * 1000, "ab" * 1000, " " * 2000, "ab\n" * 1000], ids=lambda t: repr(t[:4])
)
def test_a_long_document_gives_the_ids_of_one_tokenisation(monkeypatch, name, text):
    tokenizer = TOKENIZERS[name]()
    at_once = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for part, piece in ((256, 100), (300, 10**6), (777, 1000)):
        monkeypatch.setattr("evaluation.text.PART", part)
        document = [text[i : i + piece] for i in range(0, len(text), piece)]
        ids = np.concatenate(list(token_stream([document], tokenizer))).tolist()
        assert ids == [*at_once, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_document_is_really_cut(monkeypatch, name):
    """Without cuts the test above would show nothing. Where merges may cross any place there must be no cut."""
    monkeypatch.setattr("evaluation.text.PART", 256)
    parts = [text for text, _ in Divider(TOKENIZERS[name]()).parts([prose(20_000)])]
    assert "".join(parts) == prose(20_000)
    if name in ("superwords", "byte-level, no regex"):
        assert len(parts) == 1
    else:
        assert len(parts) > 50 and max(map(len, parts[:-1])) <= 3 * 256


@pytest.mark.parametrize("name", ["superwords", "byte-level, no regex"])
def test_a_text_with_nowhere_to_cut_is_cut_all_the_same(monkeypatch, name):
    """Bounded memory, whatever the tokenizer; where it is cut does not depend on how the text is read."""
    monkeypatch.setattr("evaluation.text.PART", 256)
    monkeypatch.setattr("evaluation.text.LONGEST", 1024)
    tokenizer, text = TOKENIZERS[name](), prose(20_000)
    cuts = []
    for piece in (100, 3000, 10**6):
        document = [text[i : i + piece] for i in range(0, len(text), piece)]
        cuts.append([part for part, _ in Divider(tokenizer).parts(document)])
    assert cuts[0] == cuts[1] == cuts[2] and "".join(cuts[0]) == text
    assert len(cuts[0]) > 10 and max(map(len, cuts[0])) <= 1024 + 2 * 256
    ids = np.concatenate(list(token_stream([[text]], tokenizer)))[:-1].tolist()
    at_once = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert len(ids) <= len(at_once) + len(cuts[0]), "hardly another tokenisation"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_names_of_special_tokens_are_letters(name):
    tokenizer = TOKENIZERS[name]()
    text = "a [MASK] b[MASK]</s> <|endoftext|>c <mask>"
    (ids,) = encode([text], tokenizer)
    assert set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} & set(ids) == set()
    if name == "byte-level":
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ") == text
    plain = "no such name in here"
    assert encode([plain], tokenizer) == [tokenizer(plain, add_special_tokens=False)["input_ids"]]


def words(vocabulary: list[str], **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)


def test_a_name_that_is_also_a_word_of_the_vocabulary_is_cut():
    tokenizer = words(["?", "a", "[MASK]", "[", "MASK]"], mask_token="[MASK]")
    assert tokenizer("a [MASK]", split_special_tokens=True)["input_ids"] == [1, 2], "the model itself knows it"
    assert encode(["a [MASK] a", "a"], tokenizer) == [[1, 3, 4, 1], [1]]


def test_a_text_that_gives_the_mask_in_any_case_is_refused():
    tokenizer = words(["?", "a", "m"], mask_token="m")
    with pytest.raises(ValueError, match="reads as its mask token 'm'"):
        encode(["a m a"], tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_mask_in_a_file_never_becomes_its_id(tmp_path, tokenizer, streaming):
    (tmp_path / "a.txt").write_text("one [MASK] here and there <|endoftext|> and so on " * 3)
    blocks = torch.tensor(rows(tmp_path / "a.txt", tokenizer, streaming=streaming))
    held_out = text_blocks(read_texts(tmp_path / "a.txt"), tokenizer, 8, 99)
    assert held_out.equal(blocks) and not (blocks == tokenizer.mask_token_id).any()
    assert (blocks[:, 1:-1] == END).sum() <= 1, "the end of the document"


MEMORY = """
import resource, sys
from datasets import disable_progress_bars
from trainers.character_tokenizer import character_tokenizer
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks
disable_progress_bars()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def read(path):
    text = TextArguments(path, block_length=256, streaming=sys.argv[3] == "streaming")
    return sum(1 for block in load_blocks(text, character_tokenizer(256))[0])
read(sys.argv[1])
before = peak()
print(read(sys.argv[2]), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["streaming", "whole"])
def test_a_large_file_takes_little_memory(tmp_path, way):
    """A file of 5.5 MB would take 1.2 GB if it were tokenised in one piece."""
    sentence = "the way of the data is one line, with no walking back. "
    (tmp_path / "small.txt").write_text(sentence * 6000)
    (tmp_path / "large.txt").write_text(sentence * 100_000)
    files = [str(tmp_path / f"{name}.txt") for name in ("small", "large")]
    result = run_python(MEMORY, *files, way, launcher=("-c",))
    assert result.returncode == 0, result.stderr
    blocks, more = map(float, result.stdout.split())
    assert blocks == 100_000 * len(sentence) // 254
    assert more < 150, "MB more than a file of 330 kB"


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
