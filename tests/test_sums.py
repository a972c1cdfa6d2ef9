"""The task tiny_sums: what ships is what the script makes, its answers are right, and the teacher gives them."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from evaluation.answers import AnswerProtocol, evaluate_answers, open_questions
from modeling_mcd.loading import load_model
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks
from trainers.sums_data import DIGITS, LENGTH, QUESTIONS, TRAIN, longest_carry, main, sums, sums_tokenizer


FOLDER = Path(__file__).parents[1] / "recipes" / "tiny_sums"


def test_the_shipped_rows_are_the_script_s(tmp_path):
    rows = sums(QUESTIONS + TRAIN, 0)
    assert [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()] == rows[:QUESTIONS]
    assert Dataset.from_parquet(str(FOLDER / "train.parquet"), cache_dir=tmp_path).to_list() == rows[QUESTIONS:]
    sums_tokenizer().save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_text() == (FOLDER / "tokenizer" / file).read_text()


def test_answers_are_right_and_carries_run_far():
    rows = sums(2000, 5)
    for row in rows:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(row["completion"]) == int(a) + int(b) and len(a) == len(b) == DIGITS == len(row["completion"]) - 1
    assert len({row["prompt"] for row in rows}) == 2000
    far = sum(longest_carry(row["prompt"]) >= 3 for row in rows) / 2000
    assert 0.35 < far < 0.65, far
    assert [longest_carry(f"{a:06d}+{b:06d}=") for a, b in ((1, 2), (5, 5), (999999, 1), (990, 10))] == [0, 1, 6, 2]


def test_the_command_writes_data_that_a_recipe_reads(tmp_path, capsys):
    main([str(tmp_path), "--rows", "30", "--questions", "4", "--seed", "7"])
    assert "30 rows and 4 questions" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    text = TextArguments(train_text=str(tmp_path / "train.parquet"), block_length=LENGTH)
    rows, _ = load_blocks(text, tokenizer)
    assert len(rows) == 30 and {len(row["input_ids"]) for row in rows} == {LENGTH}
    assert all(row["completion_mask"] == [0] * 15 + [1] * 8 for row in rows)


def test_a_number_of_rows_below_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: questions must be at least 1, not 0"):
        main([str(tmp_path / "new"), "--questions", "0"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "teacher, sampler, steps, least",
    [
        ("teacher", "confidence", 8, 0.9),
        ("teacher", "confidence", 1, 0.7),
        ("uniform_teacher", "ancestral", 8, 0.75),
        ("uniform_teacher", "ancestral", 1, 0.35),
    ],
)
def test_the_shipped_teachers_answer(teacher, sampler, steps, least):
    protocol = AnswerProtocol(
        open_questions(str(FOLDER / "questions.jsonl")),
        count=50,
        sampler=sampler,
        last_step="none" if sampler == "ancestral" else None,
        batch_size=50,
    )
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / teacher)
    model = load_model(FOLDER / teacher).float().eval()
    (row,) = evaluate_answers(teacher, model, tokenizer, protocol, [steps], [0.0])
    assert row["exact_match"] >= least and row["nfe"] == steps and row["tokens_per_forward"] == 8 / steps
