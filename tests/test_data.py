"""Data without end: tokenised by several processes, tokenised already, mixed, streamed, and resumed exactly."""

import json
import random
import shutil
from itertools import islice
from pathlib import Path

import pytest
from datasets import Dataset, List, Value
from tiny_run import mdlm_arguments, write_inputs

from evaluation.text import encode
from evaluation.text_sources import open_text
from trainers import run_mdlm
from trainers.runs import parallel_text
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import blocks_of, load_blocks, open_run_text, tokenise_shares


END, BLOCK = 46, 16
SENTENCE = "the way of the data is one line, with no walking back. "


def prose(count: int, seed: int = 0) -> str:
    """About `count` characters of words and lines."""
    words = random.Random(seed).choices(
        ["the", "way", "of", "data,", "naïve", "is\n", "one\r\n", "line.", "  and"], k=count // 4
    )
    return " ".join(words)


def rows(source, tokenizer, **more) -> list[list[int]]:
    blocks, _ = load_blocks(TextArguments(**{"train_text": str(source), "block_length": BLOCK} | more), tokenizer)
    return [list(row["input_ids"]) for row in blocks]


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 4 kB instead of 8 MB, and blocks that are never served from the cache of one process."""
    monkeypatch.setattr(parallel_text, "PART_BYTES", 4000)
    monkeypatch.setattr(parallel_text, "WINDOW", 2000)


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """`cold()`: an empty cache of `datasets` from here on."""
    import datasets

    counter = iter(range(99))
    return lambda: monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / f"cache{next(counter)}"))


# --- Several processes


def write_sources(folder: Path) -> dict[str, Path]:
    """One large file with every kind of line end, many small files with an empty one, and a table."""
    (folder / "large.txt").write_bytes(prose(30_000).encode())
    for i in range(30):
        (folder / "many").mkdir(exist_ok=True)
        (folder / "many" / f"{i:02d}.txt").write_text(prose(60 * i, i))
    Dataset.from_dict({"text": [prose(20 * i, i) for i in range(60)]}).to_parquet(folder / "table.parquet")
    return {"large": folder / "large.txt", "many": folder / "many", "table": folder / "table.parquet"}


@pytest.mark.parametrize(
    "kind, processes", [("large", 1), ("many", 1), ("table", 1), pytest.param("large", 2, marks=pytest.mark.slow)]
)
def test_several_processes_give_the_blocks_of_one(tmp_path, tokenizer, small_parts, cold, kind, processes):
    source = write_sources(tmp_path)[kind]
    cold()
    expected = rows(source, tokenizer)
    parts = parallel_text.parts_of(open_text(source), tokenizer)
    assert len(parts) >= 4 and len({part.name for part in parts}) == 1
    cold()
    assert rows(source, tokenizer, num_proc=processes) == expected


def test_spans_of_a_file_join_to_the_file(tmp_path, tokenizer, small_parts):
    file = write_sources(tmp_path)["large"]
    parts = parallel_text.parts_of(open_text(file), tokenizer)
    spans = [part.span for part in parts]
    assert (
        spans[0][0] == 0
        and spans[-1][1] == file.stat().st_size
        and [part.ends for part in parts[-2:]] == [False, True]
    )
    assert all(one[1] == two[0] for one, two in zip(spans, spans[1:], strict=False))
    texts = ["".join(piece for document in part.documents() for piece in document) for part in parts]
    assert "".join(texts) == file.read_text(encoding="utf-8") and "\r" not in "".join(texts)


def test_the_processes_of_a_launch_share_the_text(tmp_path, tokenizer, small_parts, cold, monkeypatch):
    """Each writes its share, once; the first then only reads them."""
    source = write_sources(tmp_path)["large"]
    cold()
    expected = rows(source, tokenizer)
    cold()
    text = open_run_text(TextArguments(train_text=str(source), block_length=BLOCK))
    made = []
    token_rows = parallel_text._token_rows

    def recorded(parts, **arguments):
        made.extend(part.span for part in parts)
        yield from token_rows(parts, **arguments)

    monkeypatch.setattr(parallel_text, "_token_rows", recorded)
    for share in range(3):
        tokenise_shares(text, tokenizer, share, 3)
    parts = [part.span for part in parallel_text.parts_of(text.train, tokenizer)]
    assert made == parts and len(parts) > 6
    blocks = blocks_of(text.train, tokenizer, BLOCK, shares=3)
    assert [row["input_ids"] for row in blocks] == expected and made == parts
    tokenise_shares(text, tokenizer, 0, 2)
    assert made == parts, "the blocks are there: other shares are not needed"
    blocks_of(text.train, tokenizer, 2 * BLOCK, shares=3)
    assert made == parts, "another length, the same tokens"


def test_a_text_with_nowhere_to_cut_is_left_to_one_process(tmp_path, tokenizer, small_parts, cold, monkeypatch):
    monkeypatch.setattr("evaluation.text.PART", 256)
    monkeypatch.setattr("evaluation.text.LONGEST", 1024)
    monkeypatch.setattr(
        "evaluation.text.Divider.same_apart", lambda self, text, place: "x" not in text[place - 1 : place + 1]
    )
    (tmp_path / "a.txt").write_text("word " * 3000 + "x" * 3000)
    cold()
    expected = rows(tmp_path / "a.txt", tokenizer)
    cold()
    assert rows(tmp_path / "a.txt", tokenizer, num_proc=1) == expected


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_row_is_named_whoever_reads_it(tmp_path, tokenizer, small_parts, cold, processes):
    Dataset.from_dict({"text": [SENTENCE * 4] * 90 + [None] + [SENTENCE] * 9}).to_parquet(tmp_path / "a.parquet")
    cold()
    with pytest.raises(ValueError, match="^row 90 of .*a.parquet', column 'text', holds nothing, not text"):
        rows(tmp_path / "a.parquet", tokenizer, num_proc=processes)


@pytest.mark.slow
def test_a_killed_process_is_said_in_one_line(tmp_path, tokenizer, small_parts, cold, monkeypatch):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(parallel_text, "token_stream", lambda *_: exec(kill))
    cold()
    with pytest.raises(
        ValueError, match="one of the 2 processes that tokenised it was killed.*give a smaller num_proc"
    ):
        rows(write_sources(tmp_path)["large"], tokenizer, num_proc=2)


def test_num_proc_is_refused_where_it_does_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="num_proc is 2, but .* is not cut into blocks"):
        rows(tmp_path / "a.jsonl", tokenizer, num_proc=2)
    with pytest.raises(ValueError, match="num_proc is 2, but streaming text is tokenised as it is read"):
        TextArguments("a", streaming=True, num_proc=2)
    with pytest.raises(ValueError, match="num_proc must be at least 1, not 0"):
        TextArguments("a", num_proc=0)


# --- Text that is tokenised already


IDS = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def save_ids(kind: str, place: Path, ids=IDS, **more) -> Path:
    table = Dataset.from_dict({"input_ids": ids, "n": list(range(len(ids))), **more})
    table = table.cast_column("input_ids", List(Value("uint16")))
    if kind == "saved":
        table.save_to_disk(place)
        return place
    if kind == "arrow":
        table.save_to_disk(place.with_suffix(".saved"))
        return next(place.with_suffix(".saved").glob("*.arrow")).rename(place.with_suffix(".arrow"))
    table.to_parquet(place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


@pytest.mark.parametrize("kind", ["saved", "arrow", "parquet"])
def test_rows_of_token_ids_are_used_as_they_are(tmp_path, tokenizer, kind):
    source = save_ids(kind, tmp_path / "ids", completion_mask=[[0, 0, 1, 1]] * 3)
    blocks, _ = load_blocks(TextArguments(train_text=str(source), block_length=4), tokenizer)
    assert blocks.column_names == ["input_ids", "completion_mask"] and blocks["input_ids"][:] == IDS
    assert (
        type(blocks.data.blocks[0][0] if hasattr(blocks.data, "blocks") else blocks.data).__name__
        == "MemoryMappedTable"
    )
    if kind == "saved":
        assert Path(blocks.cache_files[0]["filename"]).parent == source, "where it was, not a copy"
    assert rows(source, tokenizer, streaming=True, block_length=4) == IDS
    run_text = open_run_text(TextArguments(train_text=str(source), block_length=4))
    run_text.check_packed("judge", "")
    assert "chat_template_digest" not in run_text.digests(tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
def test_token_ids_may_be_joined_and_cut(tmp_path, tokenizer, streaming):
    source = save_ids("parquet", tmp_path / "ids", ids=[[1, 2, 3], [4], [5, 6, 7, 8, 9]])
    stream = [1, 2, 3, END, 4, END, 5, 6, 7, 8, 9, END]
    expected = [[END, *stream[i : i + 3], END] for i in (0, 3, 6, 9)]
    assert rows(source, tokenizer, packing=True, block_length=5, streaming=streaming) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row, says",
    [
        ([1, 48], "row 1 of .*, column 'input_ids', holds the id 48, but the tokenizer has 48 tokens"),
        ([1, 47], r"row 1 of .* holds the mask token '\[MASK\]', which is noise"),
        ([], "row 1 of .* is empty"),
        ([1] * 5, r"row 1 of .* has 5 tokens, more than block_length \(4\): .* packing: true"),
    ],
)
def test_a_row_of_ids_that_cannot_be_used_is_named(tmp_path, tokenizer, row, says, streaming):
    source = save_ids("saved", tmp_path / "ids", ids=[[1, 2], row, [3]])
    with pytest.raises(ValueError, match=says):
        rows(source, tokenizer, block_length=4, streaming=streaming)


def test_a_column_of_ids_that_holds_none_is_refused(tmp_path, tokenizer):
    Dataset.from_dict({"input_ids": ["a b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column 'input_ids' of .* holds no lists of token ids"):
        rows(tmp_path / "a.parquet", tokenizer)


# --- Streams


def stream(sources, tokenizer, **more):
    """The rows of an endless stream, as lists of ids, and the stream."""
    names = [str(source) for source in sources]
    options = {"train_text": names[0], "block_length": BLOCK, "streaming": True}
    if len(names) > 1:
        options |= {"more_text": names[1:], "text_weights": [3.0, 1.0]}
    node = more.pop("node", (0, 1))
    blocks, _ = load_blocks(TextArguments(**options | more), tokenizer, seed=7, node=node)
    blocks.endless = True
    return blocks


def take(rows, count: int) -> list[list[int]]:
    return [list(row["input_ids"]) for row in islice(rows, count)]


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Small texts of every kind, in pieces that are much smaller than a document."""
    monkeypatch.setattr("evaluation.text.BATCH", 300)
    monkeypatch.setattr("evaluation.text.PART", 256)
    (tmp_path / "files").mkdir()
    for i, count in enumerate((40, 1200, 0, 500)):
        (tmp_path / "files" / f"{i}.txt").write_text(prose(count, i))
    table = Dataset.from_dict({"text": [prose(8 * i, i) for i in range(20)]})
    table.to_parquet(tmp_path / "table.parquet")
    pairs = Dataset.from_dict(
        {"prompt": [f"{i}+1=" for i in range(20)], "completion": [str(i + 1) for i in range(20)]}
    )
    pairs.to_json(tmp_path / "pairs.jsonl")
    save_ids("parquet", tmp_path / "ids", ids=[[i, *range(i % 9)] for i in range(1, 30)])
    return {name: tmp_path / name for name in ("files", "table.parquet", "pairs.jsonl", "ids.parquet")}


CASES = {
    "long files": (["files"], {}),
    "a table": (["table.parquet"], {}),
    "rows of ids": (["ids.parquet"], {}),
    "ids, joined": (["ids.parquet"], {"packing": True}),
    "prompts": (["pairs.jsonl"], {}),
    "shuffled": (["table.parquet"], {"shuffle_buffer": 10}),
    "mixed and shuffled": (
        ["files", "table.parquet"],
        {"shuffle_buffer": 10, "validation_fraction": 0.2, "max_validation_blocks": 5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stream_goes_on_from_any_place(texts, tokenizer, case):
    """Over several passes, in a new process as it were: the state goes through JSON."""
    names, options = CASES[case]
    whole = take(stream([texts[name] for name in names], tokenizer, **options), 200)
    if not names[1:] and "shuffle_buffer" not in options:
        one_pass = rows(texts[names[0]], tokenizer, **options)
        assert whole == (one_pass * 99)[:200] and len(one_pass) < 170, "no pass loses a row"
    for place in (1, 38, 173):
        first, then = (stream([texts[name] for name in names], tokenizer, **options) for _ in range(2))
        assert take(first, place) == whole[:place]
        then.start_at(json.loads(json.dumps(first.state_at(place))))
        assert take(then, 200 - place) == whole[place:], place


def test_states_are_kept_behind_a_loader_that_reads_ahead(texts, tokenizer):
    blocks = stream([texts["files"]], tokenizer)
    blocks.remember(every=8, kept=3)
    iterator = iter(blocks)
    whole = take(iterator, 47)
    assert blocks.state_at(16) is None and blocks.state_at(33) is None
    then = stream([texts["files"]], tokenizer)
    then.start_at(blocks.state_at(32))
    assert take(then, 15) == whole[32:]


def test_a_shuffled_stream_holds_the_same_rows_in_another_order(texts, tokenizer):
    plain, mixed = (take(stream([texts["files"]], tokenizer, **more), 100) for more in ({}, {"shuffle_buffer": 50}))
    assert plain[:50] != mixed[:50] and sorted(plain[:50]) == sorted(mixed[:50]) and sorted(plain) == sorted(mixed)


def test_processes_split_a_stream_between_them(texts, tokenizer):
    whole = rows(texts["ids.parquet"], tokenizer)
    shares = [take(stream([texts["ids.parquet"]], tokenizer, node=(i, 2), split_stream=True), 14) for i in range(2)]
    assert all(len(share) == 14 for share in shares)
    assert len([row for row in whole if row in shares[0] and row in shares[1]]) == 0
    assert sum(row in shares[0] + shares[1] for row in whole) >= 28
    with pytest.raises(ValueError, match="split_stream is true, but .* has 4 files for 5 processes"):
        stream([texts["files"]], tokenizer, node=(0, 5), split_stream=True)


# --- Mixtures, and a validation set held out by hash


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_are_mixed_by_their_weights(tmp_path, tokenizer, streaming):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 14 * 600)
    options = {"more_text": [str(tmp_path / "b.txt")], "text_weights": [4.0, 1.0], "streaming": streaming}
    text = TextArguments(train_text=str(tmp_path / "a.txt"), block_length=BLOCK, **options)
    (of_a,) = tokenizer("a")["input_ids"]
    one, again, other = (
        [row["input_ids"][1] == of_a for row in islice(load_blocks(text, tokenizer, seed=seed)[0], 2500)]
        for seed in (1, 1, 2)
    )
    assert one == again != other and len(one) == 2500
    assert abs(sum(one) / len(one) - 0.8) < 4 * (0.8 * 0.2 / 2500) ** 0.5


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_set_is_held_out_by_hash(texts, tokenizer, streaming):
    whole = rows(texts["files"], tokenizer)
    options = {"train_text": str(texts["files"]), "block_length": BLOCK, "streaming": streaming}
    train, validation = load_blocks(
        TextArguments(**options, validation_fraction=0.2, max_validation_blocks=99), tokenizer
    )
    train, held_out = ([list(row["input_ids"]) for row in part] for part in (train, validation))
    assert sorted(train + held_out) == sorted(whole) and not [row for row in train if row in held_out]
    assert train == [row for row in whole if row not in held_out] and 0.1 < len(held_out) / len(whole) < 0.3
    _, fewer = load_blocks(TextArguments(**options, validation_fraction=0.1, max_validation_blocks=99), tokenizer)
    assert 0 < len(fewer) < len(held_out) and all(row in held_out for row in fewer["input_ids"])


@pytest.mark.parametrize(
    "options, says",
    [
        ({"shuffle_buffer": 5}, "shuffle_buffer is 5, but is for streaming text"),
        ({"split_stream": True}, "split_stream is True, but is for streaming text"),
        (
            {"more_text": ["b"]},
            r"text_weights is None, but must have one weight for train_text and one for each of more_text",
        ),
        ({"more_text": ["b"], "text_weights": [1.0]}, r"text_weights is \[1.0\], but must have one weight"),
        ({"more_text": ["b"], "text_weights": [1.0, 0.0]}, "every weight must be positive"),
        ({"validation_fraction": 1.5}, r"validation_fraction must lie in \(0, 1\), not 1.5"),
        ({"validation_fraction": 0.1, "validation_text": "b"}, "validation_text is given: leave one of them out"),
        ({"validation_fraction": 0.1, "streaming": True}, "needs max_validation_blocks"),
    ],
    ids=str,
)
def test_options_of_data_that_contradict_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        TextArguments("a", **options)


def test_rows_of_two_kinds_are_not_mixed(texts, tokenizer):
    for other in ("pairs.jsonl", "ids.parquet"):
        with pytest.raises(ValueError, match="hold rows of different kinds"):
            rows(texts["files"], tokenizer, more_text=[str(texts[other])], text_weights=[1.0, 1.0])


# --- Runs


def stream_arguments(inputs: Path, output: Path, **changes) -> list[str]:
    settings = {"streaming": True, "shuffle_buffer": 10, "per_device_train_batch_size": 8, "save_total_limit": 9}
    settings |= {"max_steps": 12, "logging_steps": 1, "save_steps": 5, "learning_rate": 1e-2, "disable_tqdm": True}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4} | changes
    return mdlm_arguments(inputs, output) + [
        word for key, value in settings.items() for word in (f"--{key}", str(value))
    ]


@pytest.mark.slow
def test_a_run_on_a_stream_resumes_exactly_over_passes(tmp_path, monkeypatch):
    """12 steps of 8 rows are a pass and a half of 64 blocks; the text before is not tokenised again."""
    inputs, output = write_inputs(tmp_path / "inputs"), tmp_path / "run"
    (inputs / "text").mkdir()
    text = (inputs / "text.txt").read_text()
    for i in range(4):
        (inputs / "text" / f"{i}.txt").write_text(text[i::4])
    monkeypatch.setattr("evaluation.text.BATCH", 100)
    arguments = [*stream_arguments(inputs, output), f"--train_text={inputs / 'text'}"]
    run_mdlm.main(arguments)
    history = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    weights = (output / "checkpoint-12" / "model.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoint-12")
    read = []
    monkeypatch.setattr(
        "trainers.runs.streams.encode", lambda texts, tokenizer: read.extend(texts) or encode(texts, tokenizer)
    )
    run_mdlm.main(arguments)
    again = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    measured = ("loss", "grad_norm", "epoch", "learning_rate", "step")
    assert [[entry.get(key) for key in measured] for entry in again] == [
        [entry.get(key) for key in measured] for entry in history
    ]
    assert (output / "checkpoint-12" / "model.safetensors").read_bytes() == weights
    assert sum(map(len, read)) < 2 * len(text), sum(map(len, read))
