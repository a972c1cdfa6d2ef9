"""Tokenizers of sub-words: any text comes back, special names stay letters, the same text gives the same file."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evaluation.text import encode
from trainers.mdlm_trainer import MDLMTrainingArguments
from trainers.run_mdlm import ModelArguments, build_model
from trainers.runs.inputs import TokenizerArguments, check_tokenizer, load_run_tokenizer
from trainers.runs.recipe import parse_recipe
from trainers.runs.text_arguments import TextArguments
from trainers.subword_tokenizer import evenly, main, subword_tokenizer


RECIPES = Path(__file__).parents[1] / "recipes"
TEXT = 'He said: "The house\nof Jesus – naïve 東京 🙂\t\x00 [MASK] is <|endoftext|>!"  Twice.\n'
CORPUS = ["the cat sat on the mat and the dog sat on the cat ", "The End of THE story of the cat and the dog\n"] * 4


@pytest.fixture(scope="module", params=["novels", "bible"])
def shipped(request):
    return AutoTokenizer.from_pretrained(RECIPES / request.param / "tokenizer")


def expected(tokenizer, text: str) -> str:
    return text if len(tokenizer) == 8192 else text.lower()


def test_a_shipped_tokenizer_gives_any_text_back(shipped):
    (ids,) = encode([TEXT], shipped)
    assert shipped.decode(ids) == expected(shipped, TEXT)
    (again,) = encode([shipped.decode(ids)], shipped)
    assert again == ids


def test_special_names_in_a_text_stay_letters(shipped):
    (ids,) = encode(["[MASK]<|endoftext|>"], shipped)
    assert not {shipped.mask_token_id, shipped.eos_token_id} & set(ids)
    assert shipped.decode(ids) == expected(shipped, "[MASK]<|endoftext|>")


def test_the_last_two_ids_are_end_and_mask(shipped):
    assert shipped.bos_token_id == shipped.eos_token_id == len(shipped) - 2
    assert shipped.mask_token_id == len(shipped) - 1


def test_common_words_are_single_tokens(shipped):
    words = ["the", "man", "house", "father", "said", "would", "before"]
    assert [len(ids) for ids in encode([f" {word}" for word in words], shipped)] == [1] * len(words)


@pytest.mark.parametrize("recipe", ["novels_teacher", "novels_uniform_teacher", "bible_teacher"])
def test_a_recipe_of_a_teacher_has_the_vocabulary_of_its_tokenizer(recipe, tmp_path):
    classes = (ModelArguments, TokenizerArguments, TextArguments, MDLMTrainingArguments)
    small = {
        "output_dir": tmp_path,
        "hidden_size": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "use_cpu": "true",
    }
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    arguments, tokenizer_arguments, text, _ = parse_recipe(classes, [str(RECIPES / f"{recipe}.yaml"), *words])
    tokenizer = load_run_tokenizer(tokenizer_arguments)
    config = build_model(arguments, tokenizer, text.block_length).config
    check_tokenizer(tokenizer, config, None)
    assert config.vocab_size == len(tokenizer)
    assert config.mask_token_id == (None if "uniform" in recipe else tokenizer.mask_token_id)


def test_the_same_text_gives_the_same_file(tmp_path):
    for name in "ab":
        subword_tokenizer(CORPUS, 280, 32).save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_lower_case_reads_capitals_as_small_letters():
    tokenizer = subword_tokenizer(CORPUS, 280, 32, lower_case=True)
    assert encode(["The CAT"], tokenizer) == encode(["the cat"], tokenizer)


def test_a_share_of_each_document_is_used():
    assert "".join(evenly(["a" * 300_000, "b" * 100_000], 100_000)) == "a" * 75_000 + "b" * 25_000
    assert "".join(evenly(["ab", "c"], None)) == "abc"


@pytest.mark.parametrize(("vocabulary", "reason"), [(257, "the bytes and the special tokens"), (5000, "sub-words")])
def test_a_vocabulary_that_cannot_be_made_is_refused(vocabulary, reason, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(CORPUS))
    with pytest.raises(SystemExit) as refusal:
        main([str(tmp_path / "out"), "--text", str(text), "--vocabulary", str(vocabulary)])
    assert f"vocabulary is {vocabulary}" in refusal.value.code and reason in refusal.value.code
    assert not (tmp_path / "out").exists()
