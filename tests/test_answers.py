"""Answers that are right or wrong: questions, exact match, tokens per forward, AUP, the report and the commands."""

import json
import math

import pytest
import torch
from chat import chat_tokenizer, talk
from tiny_run import mcd_arguments, write_inputs
from transformers import AutoModel

from evaluation import RunReport, load_report
from evaluation.answers import (
    AnswerProtocol,
    accuracy_under_parallelism,
    evaluate_answers,
    open_questions,
    read_questions,
)
from evaluation.answers_table import answers_markdown, order_of
from evaluation.run_eval import main as run_eval
from evaluation.team import Team
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers import run_mcd


PROMPTS = ["two and two are ", "a", "the way of the data ", "one line, "]


def write(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def protocol_of(path, **settings) -> AnswerProtocol:
    return AnswerProtocol(open_questions(str(path)), **{"sampler": "confidence", "length": 6} | settings)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def teacher(inputs):
    return AutoModel.from_pretrained(inputs / "teacher").eval()


@pytest.fixture(scope="module")
def right(inputs, teacher, tokenizer):
    """Questions whose references are what the teacher says in three steps, each prompt asked alone."""
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([[46, *tokenizer(prompt)["input_ids"]]])
        answer = teacher.generate(ids, sampler="confidence", steps=3, temperature=0, max_new_tokens=6)[
            0, ids.shape[1] :
        ]
        rows.append({"prompt": prompt, "completion": tokenizer.decode(answer).split("<|endoftext|>")[0]})
    return write(inputs / "right.jsonl", rows)


def evaluate(teacher, tokenizer, protocol, steps=(3,), **more) -> list[dict]:
    return list(evaluate_answers("teacher", teacher, tokenizer, protocol, steps, [0.0], **more))


# --- Questions


def test_a_question_is_all_that_precedes_the_last_completion(tmp_path, tokenizer):
    (question,) = read_questions(
        open_questions(str(write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": " cd"}]))), tokenizer
    )
    assert (question.prompt, question.reference, question.tokens) == ([46, 1, 2], "cd", 4)
    chat, turns = chat_tokenizer(), talk("user: hi", "assistant: ho", "user: and?", "assistant: ha")
    (asked,) = read_questions(open_questions(str(write(tmp_path / "b.jsonl", [{"messages": turns}]))), chat)
    assert (asked.reference, asked.tokens) == ("ha", 3)
    assert asked.prompt == chat.apply_chat_template(turns[:3], add_generation_prompt=True)["input_ids"]


def test_text_without_prompts_asks_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds text alone, but questions need the columns prompt and completion"):
        open_questions(str(write(tmp_path / "a.jsonl", [{"text": "ab"}])))


# --- Figures


def test_what_a_model_says_alone_is_what_it_is_found_to_say(teacher, tokenizer, right):
    """In a batch, padded on the left, an answer is the one that the prompt gets alone; one wrong reference is one wrong answer."""
    (row,) = evaluate(teacher, tokenizer, protocol_of(right))
    assert (row["exact_match"], row["count"], row["nfe"], row["note"]) == (1.0, 4, 3.0, None)
    wrong = [json.loads(line) for line in right.read_text().splitlines()]
    wrong[2]["completion"] += "x"
    (other,) = evaluate(teacher, tokenizer, protocol_of(write(right.with_name("wrong.jsonl"), wrong)))
    assert other["exact_match"] == 0.75


def test_tokens_per_forward_counts_an_answer_to_its_end(teacher, tokenizer, right):
    answers = [json.loads(line)["completion"] for line in right.read_text().splitlines()]
    tokens = sum(min(len(tokenizer(answer)["input_ids"]) + 1, 6) for answer in answers)
    rows = evaluate(teacher, tokenizer, protocol_of(right), steps=(3, 1, 6))
    assert rows[0]["tokens_per_forward"] == pytest.approx(tokens / (4 * 3))
    assert [row["nfe"] for row in rows] == [3.0, 1.0, 6.0]


@pytest.mark.parametrize(
    "sampler, locking", [("ancestral", "spread"), ("adaptive", "independent"), ("random", "independent")]
)
def test_an_answer_does_not_depend_on_its_batch(teacher, tokenizer, right, sampler, locking):
    one, many = (
        evaluate(teacher, tokenizer, protocol_of(right, sampler=sampler, batch_size=n, seeds=2), lockings=[locking])[0]
        for n in (1, 4)
    )
    assert one == many and 0 < one["nfe"] <= 3  # 3 is the most steps of adaptive


class Half(Team):
    """Two processes in turn: each answers its share, and is given what the other one found."""

    size = 2

    def __init__(self, rank: int, known: list):
        self.rank, self.known = rank, known

    def share(self, count: int) -> range:
        return range(count * self.rank // 2, count * (self.rank + 1) // 2)

    def gather(self, part):
        self.known.append(part)
        return [part, part] if not isinstance(part, tuple) else [part]


def test_processes_share_the_questions(teacher, tokenizer, right):
    parts = []
    for rank in (0, 1):
        known = []
        evaluate(teacher, tokenizer, protocol_of(right), team=Half(rank, known))
        parts += [answer for answers, _ in (part for part in known if isinstance(part, tuple)) for answer in answers]
    alone = []
    evaluate(
        teacher,
        tokenizer,
        protocol_of(right),
        team=type("All", (Half,), {"share": lambda self, n: range(n)})(0, alone),
    )
    assert parts == next(part for part in alone if isinstance(part, tuple))[0] and len(parts) == 4


def test_nan_logits_are_noted_and_measured_again(teacher, tokenizer, right):
    weight = teacher.get_output_embeddings().weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    try:
        (row,) = evaluate(teacher, tokenizer, protocol_of(right))
    finally:
        weight.data.copy_(kept)
    assert row["exact_match"] is None and "NaN or infinite logits" in row["note"]
    assert "n/a" in answers_markdown([row]) and "could not be measured" in answers_markdown([row])
    again = evaluate(teacher, tokenizer, protocol_of(right), known_rows=[row])
    assert again[0]["exact_match"] == 1.0
    assert evaluate(teacher, tokenizer, protocol_of(right), known_rows=again) == []


def test_a_context_too_short_for_an_answer_is_refused(teacher, tokenizer, right):
    with pytest.raises(
        ValueError, match="the longest prompt of .* has 21 tokens and an answer 12, but .* context is 32"
    ):
        evaluate(teacher, tokenizer, protocol_of(right, length=12))


@pytest.fixture(scope="module")
def uniform(teacher):
    """A uniform-state model of the teacher's tokens."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "conditioning_size": 8}
    torch.manual_seed(0)
    config = MDLMConfig(vocab_size=48, max_position_embeddings=32, eos_token_id=46, diffusion_kind="uniform", **shape)
    model = MDLMForMaskedDiffusion(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.lm_head.bias.data[46:] = -30.0  # no answer is empty
    return model


@pytest.mark.parametrize("last_step, forwards", [(None, 4), ("none", 3), ("greedy", 4)])
def test_a_uniform_model_answers_a_batch_as_it_answers_alone(uniform, tokenizer, tmp_path, last_step, forwards):
    """Also greedily its answer depends on the noise, which is that of the question's number; a forward is counted as one."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[46, *tokenizer(prompt)["input_ids"]]])
        call = {"steps": 3, "temperature": 0, "max_new_tokens": 6, "last_step": last_step}
        answer = uniform.generate(ids, seed=[i], **call)[0, ids.shape[1] :]
        rows.append({"prompt": prompt, "completion": tokenizer.decode(answer).split("<|endoftext|>")[0]})
    right = write(tmp_path / "right.jsonl", rows)
    protocol = {"sampler": "ancestral", "last_step": last_step}
    (row,) = evaluate(uniform, tokenizer, protocol_of(right, **protocol))
    assert (row["exact_match"], row["nfe"], row["note"]) == (1.0, forwards, None)
    assert evaluate(uniform, tokenizer, protocol_of(right, batch_size=1, **protocol)) == [row]
    assert order_of(row) == ("independent" if last_step is None else f"ancestral, last step {last_step}")


def test_what_a_uniform_model_does_not_have_is_refused(uniform, teacher, tokenizer, right):
    for settings, lockings, says in (
        ({"sampler": "confidence"}, ["independent"], "sampler 'confidence' .* needs a model of absorbing diffusion"),
        ({"precision": "legacy_float32"}, ["independent"], "'ancestral' with legacy_float32 draws needs a model of"),
        ({}, ["spread", "interleaved"], "locking 'interleaved' goes with the sampler 'ancestral' of masked diffusion"),
    ):
        protocol = protocol_of(right, **{"sampler": "ancestral"} | settings)
        with pytest.raises(ValueError, match=says):
            protocol.check(tokenizer, uniform.config, [2], [1.0], lockings)
        if lockings == ["independent"]:
            protocol.check(tokenizer, teacher.config, [2], [1.0], lockings)


# --- Accuracy under parallelism


def test_aup_by_hand():
    """Points in any order; one whose accuracy is 5 points below the first's and more does not count."""
    assert accuracy_under_parallelism([(1, 72.6)], 72.6) == 72.6
    w = math.exp(-3 * (1 - 70 / 80))
    by_hand = 1 * 80 + (3 - 1) * (78 * math.exp(-3 * 2 / 80) + 80) / 2 + 0
    assert accuracy_under_parallelism([(3, 78), (1, 80), (6, 74.9)], 80) == pytest.approx(by_hand)
    assert accuracy_under_parallelism([(1, 70), (2, 70)], 80) == pytest.approx(70 + 70 * w)
    assert accuracy_under_parallelism([(1, 0), (2, 0)], 0) == 0


# --- Reports and commands


def test_a_report_of_answers_has_a_table_a_plot_and_a_card(teacher, tokenizer, right, tmp_path):
    teacher.save_pretrained(tmp_path)
    report = RunReport(tmp_path, None, [1, 3], [0.0], answers=protocol_of(right))
    report.judge("teacher", teacher, tokenizer, label="teacher")
    report.answers = protocol_of(right, sampler="ancestral")
    report.lockings = ["independent", "spread"]
    report.judge("teacher", teacher, tokenizer, label="teacher")
    table = report.write()
    lines = table.splitlines()
    assert lines[0] == "| Exact match (TPF) | 1 step | 3 steps | AUP |"
    assert [line.split(" |")[0] for line in lines[2:5]] == [
        "| teacher / confidence",
        "| teacher / independent",
        "| teacher / spread",
    ]
    assert "100.0%" in lines[2] and "4 questions (right.jsonl)" in table and "No results" not in table
    card = (tmp_path / "README.md").read_text()
    assert table in card and "answers.png" in card and "Exact match, 3 steps, temperature 0, confidence" in card
    assert (tmp_path / "answers.png").stat().st_size > 5000 and not (tmp_path / "eval.png").exists()
    assert str(right.parent) not in card + (tmp_path / "eval.json").read_text()


def test_mcd_evaluate_asks_questions_without_a_judge(inputs, right, tmp_path, capsys):
    words = [str(inputs / "teacher"), "--steps", "3", "--answers", str(right), "--sampler", "confidence"]
    words += ["--temperatures", "0", "--answer_length", "6", "--output_dir", str(tmp_path)]
    run_eval([*words, "--seeds", "1"])
    (row,) = load_report(tmp_path)["answers"].values()
    assert row["exact_match"] == 1.0 and order_of(row) == "confidence"
    assert "eval.json, eval.md, answers.png" in capsys.readouterr().out
    for more, says_so in (
        (
            [str(inputs / "teacher"), "--steps", "3", "--output_dir", str(tmp_path)],
            "nothing to judge by: give --judge",
        ),
        ([*words, "--vocabulary_text", "a"], "--vocabulary_text ('a') is for samples that a judge reads"),
        ([*words, "--lockings", "spread"], "locking ('spread') is not used by the sampler 'confidence'"),
    ):
        with pytest.raises(SystemExit):
            run_eval(more)
        assert says_so in capsys.readouterr().err


def test_a_distillation_asks_its_teacher_and_every_round(inputs, right, tmp_path):
    """On prompts and answers from end to end: rows of their own, EOS as padding, sequences averaged, buckets, no judge."""
    changes = {
        "train_text": right,
        "num_rounds": 2,
        "steps_per_round": 2,
        "evaluation_answers": right,
        "padding": "eos",
    }
    changes |= {"evaluation_temperatures": 0, "evaluation_answer_length": 6, "loss_norm": "sequence"}
    changes |= {
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": 2,
        "validation_text": right,
    }
    changes |= {"evaluation_sampler": "confidence"}
    run_mcd.main([*mcd_arguments(inputs, tmp_path / "run", **changes), "--evaluation_steps", "1", "3"])
    rows = load_report(tmp_path / "run")["answers"].values()
    assert [(row["model"], row["steps"]) for row in rows] == [
        (name, n) for name in ("teacher", "round-1", "round-2") for n in (1, 3)
    ]
    assert next(row for row in rows if (row["model"], row["steps"]) == ("teacher", 3))["exact_match"] == 1.0
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert any("eval_exact_match_3_steps_temperature_0" in entry for entry in state["log_history"])
    with pytest.raises(SystemExit):
        run_mcd.main(mcd_arguments(inputs, tmp_path / "b", **changes | {"judge": inputs / "teacher"}))
