"""`mcd-chat`: several turns through the chat template, and one line for every mistake."""

import io
from pathlib import Path

import pytest
import torch
from chat import chat_tokenizer
from tiny_run import ROOT

from modeling_mcd.chat import Conversation, main
from modeling_mcd.loading import load_model, load_tokenizer
from modeling_mcd.prompts import up_to_special


GIVEN = {"steps": 4, "max_new_tokens": 6}


@pytest.fixture
def talk(build) -> Conversation:
    tokenizer = chat_tokenizer(96)
    model = build(vocab_size=51, mask_token_id=tokenizer.mask_token_id, max_position_embeddings=96)
    return Conversation(model, tokenizer, GIVEN, seed=3)


def answer_to(talk: Conversation, text: str, seed: int) -> str:
    ids = torch.tensor([talk.tokenizer(text, add_special_tokens=False)["input_ids"]])
    row = talk.model.generate(ids, seed=seed, **GIVEN)[0, ids.shape[1] :].tolist()
    return talk.tokenizer.decode(up_to_special(row, talk.tokenizer)).strip()


def test_each_turn_sees_those_before_it(talk):
    first = "<|start|>user<|say|>hi<|end|><|start|>assistant<|say|>"
    answer = talk.ask("hi")
    assert answer == answer_to(talk, first, seed=3)
    second = f"{first}{answer}<|end|><|start|>user<|say|>so<|end|><|start|>assistant<|say|>"
    assert talk.ask("so") == answer_to(talk, second, seed=4)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    talk.reset()
    assert talk.ask("hi") == answer


def test_a_message_of_the_system_comes_first_and_stays(talk):
    talk = Conversation(talk.model, talk.tokenizer, GIVEN, 3, system="be brief")
    for _ in range(2):
        begun = "<|start|>system<|say|>be brief<|end|><|start|>user<|say|>hi<|end|><|start|>assistant<|say|>"
        assert talk.ask("hi") == answer_to(talk, begun, seed=3)
        talk.reset()


def test_an_answer_that_does_not_fit_is_refused_and_forgotten(talk):
    with pytest.raises(ValueError, match=r"takes \d+ tokens, and 6 more do not fit into the context of 96: /reset"):
        talk.ask("a" * 80)
    assert talk.messages == []
    talk.given = {"steps": 4}
    talk.ask("a" * 40)  # what is left of the context is the answer's


@pytest.fixture
def sums(tmp_path) -> list[str]:
    """The shipped teacher of additions: a message is a sum, and each stands for itself."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ bos_token }}{{ messages[-1]['content'] }}")
    return [str(ROOT / "recipes/tiny_sums/teacher"), "--chat_template", str(template), "--max_new_tokens", "8"]


def test_the_teacher_of_additions_answers_line_by_line(sums, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("271828+314159=\n\n/reset\n000012+000030=\n/exit\n000000+000000=\n"))
    main([*sums, "--sampler", "confidence", "--temperature", "0", "--steps", "8"])
    assert capsys.readouterr().out == "0585987\n0000042\n"


@pytest.mark.parametrize(
    "change, line, message",
    [
        ([], "1" * 30, "the conversation takes 31 tokens, and 8 more do not fit into the context of 23"),
        (["--chat_template", "no/such/file"], "1", "no/such/file: No such file or directory"),
        (["--chat_template", ""], "1", "Is a directory"),
        (["--steps", "0"], "1", "steps must be an integer of at least 1, not 0"),
        (["--lenght", "4"], "1", "unknown argument '--lenght'"),
    ],
)
def test_a_mistake_is_one_line(sums, capsys, monkeypatch, change, line, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(line))
    with pytest.raises(SystemExit):
        main([*sums, *change])
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err.splitlines()[-1] and "Traceback" not in printed.err


def test_a_tokenizer_without_a_template_is_refused(capsys):
    with pytest.raises(SystemExit):
        main([str(ROOT / "recipes/tiny_sums/teacher")])
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_the_shipped_teacher_is_what_the_test_says():
    folder = Path(ROOT / "recipes/tiny_sums/teacher")
    assert load_tokenizer(folder).chat_template is None and load_model(folder).config.max_position_embeddings == 23
