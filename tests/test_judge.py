"""A judge is a complete causal language model, or it is refused before it gives a figure."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import ROOT, save_judge
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from evaluation import generative_perplexity
from evaluation.judge import check_judge, check_same_ids, describe_judge, fingerprint, load_judge
from trainers.character_tokenizer import character_tokenizer


BERT = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def folder(tmp_path):
    return save_judge(tmp_path / "judge")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_complete_judge_is_loaded_in_eval_mode(folder, tokenizer):
    judge, judge_tokenizer = load_judge(str(folder), "bfloat16")
    assert judge.dtype == torch.bfloat16 and not judge.training
    assert judge_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert describe_judge(judge).startswith("judge (GPT2LMHeadModel, ") and str(folder) not in describe_judge(judge)


def test_missing_weights_are_refused(folder):
    change_weights(folder, lambda weights: {name: w for name, w in weights.items() if ".mlp." not in name})
    with pytest.raises(
        ValueError, match=r"not a complete causal language model: 4 of its weights are missing in GPT2LM"
    ):
        load_judge(str(folder))


def test_weights_without_a_place_are_refused(folder):
    """The configuration says one layer, but the file holds two."""
    change_weights(
        folder,
        lambda weights: weights | {n.replace("h.0.", "h.1."): w.clone() for n, w in weights.items() if "h.0." in n},
    )
    with pytest.raises(ValueError, match=r"11 of its weights have no place in GPT2LMHeadModel, the first is .*h\.1\."):
        load_judge(str(folder))


def test_weights_that_are_not_finite_are_refused(folder):
    def poison(weights):
        weights["transformer.ln_f.bias"][3] = torch.nan
        return weights

    change_weights(folder, poison)
    with pytest.raises(ValueError, match=r"its weight transformer.ln_f.bias holds a number that is not finite"):
        load_judge(str(folder))


def test_logits_that_overflow_are_refused(folder):
    change_weights(folder, lambda weights: weights | {"transformer.ln_f.weight": torch.full((16,), 3e38)})
    with pytest.raises(ValueError, match="its logits are not finite"):
        load_judge(str(folder))


@pytest.mark.parametrize(
    ("network", "message"), [(BertModel, "weights are missing"), (BertForMaskedLM, "is not causal")]
)
def test_bert_is_no_judge(network, message, tmp_path, tokenizer):
    network(BertConfig(**BERT)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_judge(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causality_is_told_from_the_logits(dtype, tokenizer):
    """A causal Llama passes in both precisions; the same weights with attention to the right do not."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    judge = LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=32, **shape)).to(dtype).eval()
    check_judge(judge, tokenizer)
    judge.set_attn_implementation("eager")
    for layer in judge.model.layers:
        attention = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, of=attention, **k: of(*a, **{**k, "attention_mask": None})
    with pytest.raises(ValueError, match="not causal"):
        check_judge(judge, tokenizer)


def test_a_nested_text_configuration_gives_vocabulary_and_context(tokenizer):
    """A multimodal judge has no vocab_size of its own; its windows are those of its text network."""
    text = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=40,
        eoi_token_index=41,
        image_token_index=42,
    )
    judge = Gemma3ForConditionalGeneration(config).eval()
    assert not hasattr(config, "vocab_size") or config.vocab_size == 48
    check_judge(judge, tokenizer)
    result = generative_perplexity(["abcdefghijkl"], judge, tokenizer)
    assert result.tokens.item() == 7 + 3  # windows of 8 and 4 tokens


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(folder):
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    with pytest.raises(ValueError, match="its tokenizer has 48 tokens, more than its vocabulary of 40"):
        load_judge(str(folder))


def test_a_judge_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="the tokenizer's files are missing"):
        load_judge(str(folder))


def test_code_from_a_folder_is_never_run(folder, monkeypatch):
    """An `auto_map` neither runs nor asks on a terminal."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    with pytest.raises(ValueError, match="judge '.*' cannot be loaded"):
        load_judge(str(folder))


def test_raw_ids_need_the_same_token_behind_every_id(tokenizer):
    check_same_ids(tokenizer, character_tokenizer(model_max_length=32))
    other = tokenizer.__class__.from_pretrained(ROOT / "recipes" / "tiny" / "tokenizer")
    content = json.loads(other.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other._tokenizer = other._tokenizer.from_str(json.dumps(content))
    with pytest.raises(ValueError, match="this judge reads the id 1 as 'b', and the model as 'a'"):
        check_same_ids(tokenizer, other)


def test_a_fingerprint_changes_with_any_weight(folder):
    judge = AutoModelForCausalLM.from_pretrained(folder)
    before = fingerprint(judge)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(folder)) == before
    judge.transformer.ln_f.bias.data[0] += 1e-6
    assert fingerprint(judge) != before
