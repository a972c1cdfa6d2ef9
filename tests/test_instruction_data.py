"""Prompts with completions, and conversations: how rows are read, rendered, masked, cut and kept."""

import json

import pytest
from chat import chat_tokenizer, talk
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from evaluation.instructions import joined
from trainers.character_tokenizer import character_tokenizer
from trainers.runs.inputs import check_shift
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks, open_run_text


END = 46
PAIRS = [{"prompt": "2+2 is ", "completion": "4."}, {"prompt": "", "completion": "so be it"}]


@pytest.fixture(scope="module")
def chat():
    return chat_tokenizer()


def write(folder, rows: list[dict], name: str = "rows.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


def load(source, tokenizer, length: int = 32, **more) -> list[dict]:
    return list(load_blocks(TextArguments(train_text=str(source), block_length=length, **more), tokenizer)[0])


def shown(row: dict, tokenizer) -> tuple[str, str]:
    """What a row holds, and what of it is to be learnt; spaces for the rest."""
    pieces = tokenizer.convert_ids_to_tokens(row["input_ids"])
    learnt = [piece if seen else " " * len(piece) for piece, seen in zip(pieces, row["completion_mask"], strict=True)]
    return "".join(pieces), "".join(learnt)


# --- Rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "saved"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_is_bos_prompt_completion_eos(tmp_path, tokenizer, kind, streaming):
    source = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(tmp_path, PAIRS)
    elif kind == "json":
        source.write_text(json.dumps(PAIRS))
    elif kind == "saved":
        Dataset.from_list(PAIRS).save_to_disk(source)
    else:
        getattr(Dataset.from_list(PAIRS), f"to_{kind}")(source)
    rows = load(source, tokenizer, streaming=streaming)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in PAIRS]
    assert [row["input_ids"] for row in rows] == [[END, *of_row, END] for of_row in ids]
    assert [row["completion_mask"] for row in rows] == [[0] * 8 + [1] * 3, [0] + [1] * 9]
    assert [row["length"] for row in rows] == [11, 10]


def test_a_hub_dataset_is_read_by_its_columns(hub_dataset, tokenizer):
    (row, _) = load(hub_dataset, tokenizer, prompt_column="title", text_column="text")
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True) == "ahello world"
    assert row["completion_mask"] == [0, 0, *[1] * 12]


def test_numbers_and_names_of_a_csv_are_text(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text("question,answer\n007,1\nNA,NA\n")
    rows = load(tmp_path / "rows.csv", tokenizer, prompt_column="question", text_column="answer")
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows] == ["0071", "nana"]


def test_the_columns_are_found_as_trl_finds_them(tmp_path, chat, caplog):
    both = {"messages": talk("user: hi", "assistant: ho"), **PAIRS[0]}
    assert load(write(tmp_path, [both]), chat) == load(write(tmp_path, [PAIRS[0]], "b.jsonl"), chat)
    (of_messages,) = load(tmp_path / "rows.jsonl", chat, text_column="messages")
    assert of_messages["length"] != 11
    text = {"text": "a text that is long enough for a block of it", **PAIRS[0]}
    (block,) = load(write(tmp_path, [text], "c.jsonl"), chat)
    assert "completion_mask" not in block and "its column 'text' is read" in caplog.text
    (pair,) = load(tmp_path / "c.jsonl", chat, text_column="completion")
    assert pair["completion_mask"] == [0] * 8 + [1] * 3


def test_prompts_are_learnt_too_where_the_recipe_says_so(tmp_path, tokenizer):
    row = load(write(tmp_path, PAIRS), tokenizer, completion_only=False)[0]
    assert "completion_mask" not in row and row["length"] == len(row["input_ids"]) == 11


def test_texts_are_rows_of_their_own_without_packing(tmp_path, tokenizer):
    rows = load(write(tmp_path, [{"text": "one"}, {"text": "three"}]), tokenizer, packing=False)
    assert rows == [
        {"input_ids": [END, *tokenizer(text)["input_ids"], END], "length": len(text) + 2} for text in ("one", "three")
    ]


def test_long_rows_are_cut_and_prompts_without_room_left_out(tmp_path, tokenizer, caplog):
    rows = [*PAIRS, {"prompt": "a prompt of 22 letters", "completion": "x"}]
    kept = load(write(tmp_path, rows), tokenizer, length=9)
    assert [row["completion_mask"] for row in kept] == [[0] * 8 + [1], [0] + [1] * 8]
    assert "3 of 3 rows are longer than block_length (9) and were cut; 1 of them were left out" in caplog.text
    with pytest.raises(ValueError, match="of its 1 prompts none leaves room for an answer .block_length 9"):
        load(write(tmp_path, rows[2:], "c.jsonl"), tokenizer, length=9)


def test_names_of_special_tokens_are_letters_in_a_pair(tmp_path, tokenizer):
    (row,) = load(write(tmp_path, [{"prompt": "a [MASK] ", "completion": "<|endoftext|>"}]), tokenizer)
    assert tokenizer.mask_token_id not in row["input_ids"] and row["input_ids"].count(END) == 2


def test_a_token_never_spans_prompt_and_completion():
    """As in TRL the two are tokenised together; where "ab" is one token, what a model is asked with is "a"."""
    bpe = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}, merges=[("a", "b"), ("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)

    def ids_of(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    assert joined(["ab", "c"], ids_of) == [[3], [2]]
    assert joined(["a", "bc", "ab"], ids_of) == [[0], [4], [3]]


# --- Conversations


CHAT = talk("system: be brief", "user: hi", "assistant: ho", "user: and?", "assistant: ha")


def test_what_the_assistant_says_is_the_completion(tmp_path, chat):
    """The oracle is the mask that transformers makes of the template's own {% generation %}."""
    (row,) = load(write(tmp_path, [{"messages": CHAT}]), chat, length=99)
    known = chat.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert row["input_ids"] == known["input_ids"]
    assert row["completion_mask"] == known["assistant_masks"] and sum(row["completion_mask"]) == 6


def test_a_conversation_and_its_last_answer_as_a_pair_agree(tmp_path, chat):
    pair = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    (row,) = load(write(tmp_path, [pair]), chat, length=99)
    text, learnt = shown(row, chat)
    assert text == chat.apply_chat_template(CHAT, tokenize=False).replace(" ", chat.convert_ids_to_tokens([0])[0])
    assert learnt.strip() == "ha<|end|>"


def test_another_chat_template_makes_other_rows(tmp_path, chat):
    source, other = write(tmp_path, [{"messages": CHAT}]), chat_tokenizer()
    first = load(source, chat, length=99)
    other.chat_template = chat.chat_template.replace("<|say|>", " ")
    assert load(source, other, length=99) != first
    texts = [
        open_run_text(TextArguments(train_text=str(path))) for path in (source, write(tmp_path, PAIRS, "b.jsonl"))
    ]
    for text in texts:
        assert text.digests(chat)["chat_template_digest"] != text.digests(other)["chat_template_digest"]
    (tmp_path / "plain.txt").write_text("text")
    plain = open_run_text(TextArguments(train_text=str(tmp_path / "plain.txt")))
    assert set(plain.digests(chat)) == {"train_text_digest", "validation_text_digest", "tokenizer_digest"}


# --- Rows that cannot be used


GOOD = {"prompt": "a", "completion": "b"}
BAD = {
    "nothing": (
        {"prompt": "a", "completion": None},
        "column 'completion', holds nothing, not text or a list of messages",
    ),
    "a number": ({"prompt": 7, "completion": "b"}, "column 'prompt', holds a int, not text"),
    "an empty completion": ({"prompt": "a", "completion": " "}, "column 'completion', is empty"),
    "text and messages": (
        {"prompt": "a", "completion": talk("assistant: b")},
        "column 'prompt', holds text, and the other column of the row messages",
    ),
}
CONVERSATIONS = {
    "no assistant": (talk("user: a"), "holds no message of the role 'assistant', so there is nothing to learn"),
    "an empty answer": (talk("user: a", "assistant: "), "holds an empty message 1 of the assistant"),
    "no message": ([], "holds an empty list, not a list of messages"),
    "no content": ([{"role": "user"}, {"role": "assistant", "content": "b"}], "holds nothing as content of message 0"),
    "a role it refuses": (talk("tool: a", "assistant: b"), "is refused by the chat template: no tools here"),
    "the mask": (talk("user: [MASK]", "assistant: b"), "cannot be used: it holds the mask token '.MASK.'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_pair_is_named_by_row_and_column(tmp_path, tokenizer, bad):
    row, says_so = BAD[bad]
    with pytest.raises(ValueError, match=f"row 1 of .*rows.jsonl.*{says_so}.*: correct the row or leave it out"):
        load(write(tmp_path, [GOOD, row, GOOD]), tokenizer)


@pytest.mark.parametrize("bad", CONVERSATIONS)
def test_a_bad_conversation_is_named_by_its_row(tmp_path, chat, bad):
    messages, says_so = CONVERSATIONS[bad]
    with pytest.raises(ValueError, match=f"row 1 of .*rows.jsonl.*{says_so}"):
        load(write(tmp_path, [{"messages": CHAT}, {"messages": messages}]), chat, length=99)


def test_a_line_that_is_no_json_is_named(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n\n" + '{"prompt": "a", "completion\n')
    with pytest.raises(ValueError, match="row 1 .line 3 of rows.jsonl. is no JSON object: Unterminated string"):
        load(tmp_path / "rows.jsonl", tokenizer)


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(ValueError, match="row 0 of .*'messages'.* has no chat template: set tokenizer.chat_template"):
        load(write(tmp_path, [{"messages": CHAT}]), character_tokenizer(32))


@pytest.mark.parametrize(
    "options, says_so",
    [
        ({"packing": True}, "packing is true, but .* holds prompts and completions"),
        ({"prompt_column": "question"}, "has no column 'question' for prompt_column; it has .'completion', 'prompt'."),
        ({"text_column": "answer"}, "has no column 'answer' for text_column"),
    ],
    ids=str,
)
def test_an_option_that_does_not_fit_the_rows_is_refused(tmp_path, tokenizer, options, says_so):
    with pytest.raises(ValueError, match=says_so):
        load(write(tmp_path, [GOOD]), tokenizer, **options)


def test_text_has_no_completion_and_files_no_rows(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("plain text that is long enough for a block of 32")
    for options, says_so in (
        ({"completion_only": True}, "completion_only is true, but .* holds text without prompts"),
        ({"packing": False}, "packing is false, but .* is plain text, which has no rows"),
        ({"prompt_column": "a"}, "prompt_column is 'a', but .* has no use for it"),
    ):
        with pytest.raises(ValueError, match=says_so):
            load(tmp_path / "a.txt", tokenizer, **options)


def test_the_shift_is_checked_on_rows_of_different_lengths(tmp_path, tokenizer, model):
    class Training:
        should_log = True

    check_shift(model, load_blocks(TextArguments(train_text=str(write(tmp_path, PAIRS))), tokenizer)[0], Training)
