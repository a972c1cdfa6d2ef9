"""The report on a small teacher: the figures are those of the library's functions, and what ships is what was measured."""

import json

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from benchmarks.teacher_report import figures_of, main
from evaluation import causal_loss, text_blocks, validation_nelbo
from trainers.subword_tokenizer import subword_tokenizer


TEXT = "it was the best of times, it was the worst of times. " * 12


@pytest.fixture
def judge():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=46, eos_token_id=46
    )
    return GPT2LMHeadModel(config).eval()


def test_figures_are_those_of_the_library(model, judge, tokenizer):
    blocks = text_blocks([TEXT], tokenizer, 32, 8)
    figures = figures_of(model, judge, tokenizer, [TEXT], 8)
    assert figures["nelbo_nats_per_token"] == validation_nelbo(model, blocks)
    assert figures["nelbo_nats_per_character"] == pytest.approx(
        figures["nelbo_nats_per_token"]
    )  # one token a character
    assert figures["nelbo_over_judge_loss"] == pytest.approx(
        validation_nelbo(model, blocks) / causal_loss(judge, blocks)
    )


def test_a_figure_per_character_counts_the_characters_of_the_tokens(build):
    words = subword_tokenizer([TEXT], 270, 32)
    model = build(vocab_size=270, bos_token_id=268, eos_token_id=268, mask_token_id=269)
    figures, blocks = figures_of(model, None, words, [TEXT], 4), text_blocks([TEXT], words, 32, 4)
    characters = len("".join(words.batch_decode(blocks[:, 1:-1])))
    ratio = figures["nelbo_nats_per_character"] / figures["nelbo_nats_per_token"]
    assert ratio == pytest.approx(30 * len(blocks) / characters) and ratio < 0.9


def test_what_ships_is_rounded_and_is_what_was_measured(model, judge, tokenizer, tmp_path):
    for name, network in (("run", model), ("judge_run", judge)):
        network.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    words = [
        str(tmp_path / "run"),
        "--judge",
        str(tmp_path / "judge_run"),
        "--validation_text",
        str(tmp_path / "text.txt"),
    ]
    main([*words, "--ship", str(tmp_path / "out"), "--steps", "2", "--blocks", "4"])
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    shipped = AutoModel.from_pretrained(tmp_path / "out" / "teacher")
    assert shipped.dtype == torch.bfloat16 and not list((tmp_path / "out" / "teacher").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "teacher" / "config.json").read_text())
    assert (
        figures["nelbo_nats_per_token"]
        == figures_of(shipped.float(), None, tokenizer, [TEXT], 4)["nelbo_nats_per_token"]
    )
    assert [(entry["locking"], entry["temperature"]) for entry in figures["samples"]] == [
        ("independent", 1.0), ("independent", 0.8), ("spread", 1.0), ("spread", 0.8)
    ]  # fmt: skip
    assert all(len(entry["texts"]) == 2 for entry in figures["samples"])
