"""Language models of transformers as masked diffusion models: rows, attention, the shift, saving, training, generation."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from laws import p_value
from safetensors.torch import load_file, save_file
from small_model import assert_same_weights
from tiny_run import mcd_arguments, write_inputs
from toy_backbones import LENGTH, MASK, SHAPE, SHIFT, K, make_network, shifted, tokens
from toy_distillers import METHODS, assert_same_step, blocks, make_trainer, prompted
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from modeling_mcd import MDLMBackboneForMaskedDiffusion, MDLMGenerationConfig, as_masked_diffusion
from modeling_mcd.backbones import shift_losses, warn_of_wrong_shift
from modeling_mcd.convert_checkpoints import convert, main
from modeling_mcd.forward_process_mdlm import process_of
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.loading import load_model, load_tokenizer
from trainers import run_mcd
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.trajectories import step_noise


KNOWN = ("llama", "qwen2", "qwen3", "gemma", "modernbert", "bert", "roberta", "eurobert")
FOUND = ("gpt2", "distilbert")  # of kinds that are in no table
CAUSAL = ("llama", "qwen2", "qwen3", "gemma")


@pytest.fixture(scope="module")
def models():
    """Every kind in float64, none of which a test may change."""
    return {name: wrapped(name) for name in (*KNOWN, *FOUND)}


def wrapped(name: str, **options) -> MDLMBackboneForMaskedDiffusion:
    return as_masked_diffusion(make_network(name, **options), MASK, SHIFT.get(name, 0))


@torch.no_grad()
def logits_of(model, ids, mask=None):
    return model(ids, attention_mask=mask).logits


# --- Rows and logits


@pytest.mark.parametrize("name", (*KNOWN, *FOUND))
def test_rows_at_positions_make_the_networks_own_logits(models, name):
    """By a mask, by indices and through the sampler's trunk, of a canvas with padding on the right."""
    model, ids = models[name], tokens(3, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 3:] = 0
    with torch.no_grad():
        expected = shifted(model.network(input_ids=ids, attention_mask=mask).logits, model.config.logits_shift)
    chosen = (tokens(3, 10, seed=1) % 2 == 0) & mask.bool()
    assert torch.equal(chosen.any(dim=1), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(logits_of(model, ids, mask)[mask.bool()], expected[mask.bool()], rtol=1e-12, atol=1e-12)
    for positions in (chosen, chosen.flatten().nonzero()[:, 0].flip(0)):
        rows = model(ids, attention_mask=mask, hidden_rows=positions)
        logits = rows.hidden @ rows.weight.T + rows.bias
        assert isinstance(rows, HeadRows) and rows.mask_token_id == MASK and logits.shape == (chosen.sum(), K)
        torch.testing.assert_close(logits, expected.flatten(0, 1)[positions.flatten()], rtol=1e-12, atol=1e-12)
    wanted = torch.tensor([[0, 5, 1], [3, 0, 0], [2, 2, 1]])
    hidden = model.trunk()(input_ids=ids, attention_mask=mask, hidden_rows=wanted).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, expected.gather(1, wanted[..., None].expand(-1, -1, K)), rtol=1e-12, atol=1e-12)


def test_the_first_two_tokens_of_a_row_share_a_source_under_the_shift(models):
    model, ids = models["qwen2"], tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert model.sources(ids[..., None], None).tolist() == [[0, 0, 1, 2, 3], [5, 5, 6, 7, 8]]
    assert model.sources(ids[..., None], mask)[mask.bool()].tolist() == [2, 2, 3, 5, 5, 6, 7]
    assert models["llama"].sources(ids[..., None], None).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_the_head_of_an_unknown_kind_is_found(models):
    assert models["gpt2"].config.head_transform == []
    assert models["distilbert"].config.head_transform == "without_head"


# --- Attention


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", (*KNOWN, *FOUND))
def test_the_first_token_sees_the_last_one(name, attention):
    """Without a mask, and with padding on either side. The same network, not wrapped, is causal."""
    network = make_network(name)
    network.set_attn_implementation(attention)
    ids, ones, pad = tokens(2, 7), torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    changed = ids.clone()
    changed[:, 4] = (ids[:, 4] + 1).clamp(max=MASK - 1).where(ids[:, 4] < MASK - 1, ids[:, 4] - 1)
    if name in CAUSAL:
        with torch.no_grad():
            before, after = (network(input_ids=x).logits[:, 0] for x in (ids, changed))
        assert torch.equal(before, after)
    model = as_masked_diffusion(network, MASK, SHIFT.get(name, 0))
    assert model.network.config._attn_implementation == attention
    for left, right in ((0, 0), (2, 0), (0, 2)):
        mask = torch.cat([pad[:, :left], ones, pad[:, :right]], dim=1)
        canvases = [torch.cat([pad[:, :left], x, pad[:, :right]], dim=1) for x in (ids, changed)]
        for given in [mask] if left or right else [None, mask]:
            before, after = (logits_of(model, canvas, given)[:, left] for canvas in canvases)
            assert ((before - after).abs().amax(dim=-1) > 1e-3).all(), (left, right)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", (*KNOWN, *FOUND))
def test_padding_changes_no_token_on_either_side(name, attention):
    network = make_network(name)
    network.set_attn_implementation(attention)
    model, ids = as_masked_diffusion(network, MASK, SHIFT.get(name, 0)), tokens(2, 7)
    alone = logits_of(model, ids)
    tolerance = {"rtol": 0, "atol": 1e-9 if attention == "sdpa" else 1e-5}  # eager attention has a float32 softmax
    for filler, (left, right) in itertools.product((3, MASK), ((5, 0), (0, 5), (2, 3))):
        canvas = torch.nn.functional.pad(ids, (left, right), value=filler)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        torch.testing.assert_close(logits_of(model, canvas, mask)[:, left : left + 7], alone, **tolerance)


# --- Refusals


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gemma2", {}, "logits of Gemma2ForCausalLM are not its head's on its own input: .*a cap"),
        ("openai-gpt", {}, "OpenAIGPTLMHeadModel does not see the tokens to the right"),
        ("bert", {"head_transform": []}, r"BertForMaskedLM are not its head's on the trunk's hidden states \(not"),
        ("llama", {"mask_token_id": 48}, r"mask_token_id \(48\) must lie in \[0, vocab_size = 48\)"),
        ("llama", {"mask_token_id": None}, "mask_token_id is missing"),
        ("llama", {"max_position_embeddings": 33}, r"\(33\) must not exceed the network's \(32\)"),
        ("roberta", {"max_position_embeddings": 33}, r"\(33\) must not exceed the network's \(32\)"),
        ("llama", {"logits_shift": 2}, "logits_shift"),
        ("llama", {"attention": "block"}, "attention"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, options, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        as_masked_diffusion(make_network(name), **{"mask_token_id": MASK, **options})


def test_only_a_language_model_of_transformers_is_wrapped(models):
    trunk = make_network("llama").model
    for network, message in (
        (torch.nn.Linear(2, 2), "must be a language model of transformers, not a Linear"),
        (models["llama"], "not a MDLMBackboneForMaskedDiffusion"),
        (trunk, "network is a LlamaModel, but the language model for model_type 'llama' is LlamaForCausalLM"),
    ):
        with pytest.raises(ValueError, match=message):
            as_masked_diffusion(network, MASK)


# --- Saving, loading, converting


@pytest.mark.parametrize("name", ["qwen2", "bert", "distilbert"])
def test_a_wrapped_network_is_saved_and_loaded(models, name, tmp_path):
    """By the Auto classes and by `load_model`, with its shift, head and options of `generate`; tied weights stay tied."""
    model, ids = wrapped(name, dtype=torch.float32), tokens(2, 6)
    model.generation_config.steps = 3
    model.save_pretrained(tmp_path)
    for load in (AutoModel.from_pretrained, AutoModelForMaskedLM.from_pretrained, load_model):
        loaded = load(tmp_path)
        assert type(loaded) is MDLMBackboneForMaskedDiffusion and loaded.generation_config.steps == 3
        assert_same_weights(loaded, model)
        assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
        torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=0, atol=1e-5)
        tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert tied == (name != "qwen2")
    with pytest.raises(ValueError, match="not a causal .*: load it with AutoModel"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}


LLADA = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
SETTINGS = {
    "llada": {
        **{"model_type": "llada", "architectures": ["LLaDAModelLM"], "auto_map": {"AutoModel": "x--y.Z"}},
        **{"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "mlp_hidden_size": 48, "mlp_ratio": 4},
        **{"embedding_size": K, "vocab_size": K, "max_sequence_length": LENGTH, "weight_tying": False},
        **{"rope": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "rope_full_precision": True, "block_group_size": 1},
        **{"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "alibi": False},
        **{"scale_logits": False, "include_bias": False, "multi_query_attention": None, "mask_token_id": MASK},
        **{"eos_token_id": 5, "pad_token_id": 5},
    },
    "Dream": {
        **{"model_type": "Dream", "architectures": ["DreamModel"], "auto_map": {"AutoModel": "x--y.Z"}},
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": K, "max_position_embeddings": 4096, "rope_theta": 1e6},
        **{"use_mrope": False, "mask_token_id": MASK, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    },
    "a2d-qwen3": {
        **{"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"], "auto_map": {"AutoModel": "x--y.Z"}},
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 16, "vocab_size": K, "max_position_embeddings": LENGTH},
        **{"rope_theta": 1e6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    },
}
SETTINGS["sdar"] = SETTINGS["a2d-qwen3"] | {
    **{"model_type": "sdar", "architectures": ["SDARForCausalLM"], "block_size": 8, "mask_token_id": MASK},
    **{"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "rope_scaling": None},
}
SETTINGS["Fast_dLLM_Qwen"] = SETTINGS["Dream"] | {
    **{
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "bd_size": 8,
        "use_mrope": None,
    },
    **{"layer_types": ["full_attention"] * 2, "max_position_embeddings": LENGTH},
}
NATIVE = {"llada": "llama", "Dream": "qwen2", "a2d-qwen3": "qwen3", "sdar": "qwen3", "Fast_dLLM_Qwen": "qwen2"}
BLOCK_SIZE = {"sdar": 8, "Fast_dLLM_Qwen": 8}


def published(folder: Path, kind: str, dtype: torch.dtype = torch.float32, drop: str = "", **changes) -> Path:
    """A folder as its authors publish it, with the weights of the native network, and settings changed; None removes one."""
    state = {
        name: tensor.contiguous() for name, tensor in make_network(NATIVE[kind], dtype=dtype).state_dict().items()
    }
    if kind == "llada":
        for ours, theirs in LLADA.items():
            state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    if SETTINGS[kind].get("tie_word_embeddings"):
        del state["lm_head.weight"]
    state = {name: tensor for name, tensor in state.items() if name != drop}
    state |= {name: changes.pop(name) for name in list(changes) if isinstance(changes[name], torch.Tensor)}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    settings = {name: value for name, value in (SETTINGS[kind] | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    token = {"content": "<|mask|>"}
    tokenizer = {"mask_token": token, "added_tokens_decoder": {"3": {"content": "<|a|>"}, str(MASK): token}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("kind, dtype", [*((kind, torch.float32) for kind in SETTINGS), ("llada", torch.bfloat16)])
def test_published_weights_become_a_native_folder_bitwise(kind, dtype, tmp_path):
    """Plain transformers loads it, bidirectional; so does `load_model`, with the mask, the shift and the context."""
    convert(published(tmp_path / "theirs", kind, dtype), tmp_path / "native", dtype=dtype)
    network = make_network(NATIVE[kind], dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(loaded) is type(network) and loaded.config.is_causal is False
    assert_same_weights(loaded, network)
    settings = json.loads((tmp_path / "native" / "config.json").read_text())
    assert "auto_map" not in settings and settings["rope_parameters"]["rope_theta"] == SETTINGS[kind]["rope_theta"]
    shift, context = int(NATIVE[kind] == "qwen2"), 2048 if kind == "Dream" else LENGTH
    for source in ("theirs", "native"):
        model = load_model(tmp_path / source, dtype)
        config = model.config
        assert (config.mask_token_id, config.logits_shift, config.max_position_embeddings) == (MASK, shift, context)
        assert config.block_size == BLOCK_SIZE.get(kind) and config.attention == (
            "block" if config.block_size else "full"
        )
        assert_same_weights(model.network, network)
        ids = tokens(2, 6)
        torch.testing.assert_close(logits_of(model, ids), shifted(logits_of(loaded, ids), shift), rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")  # by plain transformers, which keeps the entry
    assert load_model(tmp_path / "again").config.mask_token_id == MASK


def test_the_converted_llada_computes_with_its_own_constants(tmp_path):
    config = load_model(published(tmp_path / "theirs", "llada")).config.backbone_config
    assert (config.rms_norm_eps, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (
        1e-5,
        2,
        8,
        48,
    )
    assert (config.eos_token_id, config.bos_token_id, config.use_cache) == (5, None, False)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llada", {"drop": "model.transformer.blocks.1.ff_out.weight"}, "blocks.1.ff_out.weight is missing"),
        (
            "llada",
            {"model.transformer.blocks.0.q_proj.bias": torch.ones(32)},
            "q_proj.bias is not a parameter of Llama",
        ),
        ("llada", {"alibi": True}, "alibi is True, but only False fits the native Llama"),
        ("llada", {"block_type": "sequential"}, "block_type is 'sequential'"),
        ("llada", {"mlp_hidden_size": 64}, "its configuration says mlp_hidden_size = 64, but in the weights it is 48"),
        ("llada", {"n_kv_heads": 4}, "n_kv_heads = 4, but in the weights it is 2"),
        ("llada", {"n_heads": 5}, r"n_heads \(5\) must be a number that divides the width of the weights \(32\)"),
        ("llada", {"rope_theta": None}, "its configuration has no rope_theta"),
        ("Dream", {"use_mrope": True}, "use_mrope is true"),
        ("Dream", {"intermediate_size": 64}, r"mlp.gate_proj.weight has the shape \(48, 32\), not \(64, 32\)"),
        ("Dream", {"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ("Dream", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not a parameter of Qwen2"),
        ("Dream", {"mask_token_id": 99}, r"mask_token_id \(99\) must lie in \[0, vocab_size = 48\)"),
        ("a2d-qwen3", {"model_type": "a2d-qwen2", "head_dim": None}, "q_proj.bias is missing"),
        ("sdar", {"block_size": None}, "does not say how long they are: give block_size .mcd-convert --block-size."),
        ("sdar", {"model_type": "llada2_moe"}, "'llada2_moe', a mixture of experts that transformers does not have"),
        (
            "a2d-qwen3",
            {"model_type": "qwen3"},
            "does not say that it is a masked diffusion model .*as_masked_diffusion",
        ),
    ],
)
def test_a_published_network_that_does_not_fit_is_refused(kind, changes, message, tmp_path):
    source = published(tmp_path / "theirs", kind, **changes)
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_native_masked_language_model_has_the_mask_of_its_tokenizer(tmp_path):
    network = make_network("bert", dtype=torch.float32)
    network.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="nor a tokenizer beside it says which token is the mask"):
        load_model(tmp_path / "bert")
    settings = {"mask_token": "[MASK]", "added_tokens_decoder": {str(MASK): {"content": "[MASK]"}}}
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_model(tmp_path / "bert")
    assert model.config.mask_token_id == MASK
    assert_same_weights(model.network, network)


def test_a_block_size_is_given_where_no_file_says_it(tmp_path, capsys):
    """BD3-LM's A2D, whose files do not differ from MDLM's, and SDAR; what has a block size, or none, takes no other."""
    for kind in ("a2d-qwen3", "sdar"):
        source = str(published(tmp_path / kind, kind, block_size=None))
        main([source, str(tmp_path / f"{kind}-native"), "--block-size", "4"])
        for folder, given in ((source, {"block_size": 4}), (tmp_path / f"{kind}-native", {})):
            config = load_model(folder, **given).config
            assert (config.attention, config.block_size) == ("block", 4)
    for source, reason in (
        (tmp_path / "sdar-native", "says block_size = 4"),
        (published(tmp_path / "dream", "Dream"), "has no blocks"),
    ):
        with pytest.raises(ValueError, match=f"block_size is 8, but its config.json {reason}: leave it out"):
            load_model(source, block_size=8)


def test_the_converter_writes_either_layout_and_no_other(tmp_path, capsys):
    source = str(published(tmp_path / "theirs", "Dream"))
    main([source, str(tmp_path / "ours"), "--to", "ours"])
    main([str(tmp_path / "ours"), str(tmp_path / "native")])
    assert "parameters, absorbing diffusion" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "native"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(
        ValueError, match="to is 'mdlm', but a MDLMBackbone.* can be written as one of .'ours', 'native'"
    ):
        convert(source, tmp_path / "x", "mdlm")


# --- Training


@pytest.fixture(scope="module")
def pairs():
    """Teacher and student of each kind."""
    return {name: (wrapped(name), wrapped(name, seed=1)) for name in ("llama", "qwen2", "qwen3", "bert", "modernbert")}


def trainer_of(method, networks, folder):
    if method == "mdlm":
        settings = {"ema_decay": None, "save_strategy": "no", "per_device_train_batch_size": 4}
        trainer = MDLMTrainer(networks[1], MDLMTrainingArguments(output_dir=str(folder), seed=11, **settings))
        trainer.model.train()
        return trainer
    return make_trainer(method, {"absorbing": networks}, folder)


def from_full_logits(network, positions, z, gamma, inputs):
    """Rows whose head is the identity: the logits of all positions by transformers' own forward, shifted by hand."""
    logits = network.network(input_ids=z, attention_mask=inputs.get("attention_mask")).logits
    chain = None if network.coupling is None else network.coupling(network.get_input_embeddings().weight)
    return HeadRows(shifted(logits, network.config.logits_shift)[positions], EYE, EYE.new_zeros(K), MASK, chain)


EYE = torch.eye(K, dtype=torch.float64)
TRAINED = [("qwen2", method) for method in ("mdlm", *METHODS) if method != "dcd"]
TRAINED += [(name, "mcd") for name in ("llama", "qwen3", "bert", "modernbert")]


@pytest.mark.parametrize("name, method", TRAINED)
def test_a_step_has_the_gradients_of_the_plain_formula(name, method, pairs, tmp_path):
    """Every trainer's loss from rows, and from all logits of the network itself, on prompts and padding."""
    trainer = trainer_of(method, pairs[name], tmp_path)
    assert_same_step(trainer, prompted(), from_full_logits, rtol=1e-8, atol=1e-12)


def test_the_mcd_loss_is_the_papers_on_a_linear_schedule(pairs, tmp_path):
    """KL where both are masked, cross-entropy where the teacher sees the token, gamma(t) = 1 - t, all in plain torch."""
    teacher, student = pairs["qwen2"]
    trainer, x_0 = trainer_of("mcd", pairs["qwen2"], tmp_path), blocks()
    loss = trainer.compute_loss(trainer.model, {"input_ids": x_0})
    times, u = step_noise(11, 0, range(4), 4, x_0.shape[1])
    t = 1 - (1 - 0.125) * times
    m_t, m_s = u > 1 - t[:, None], u > 1 - (t - 0.125)[:, None]

    def log_p(model, masked, tau=1.0):
        logits = shifted(model.network(input_ids=x_0.masked_fill(masked, MASK)).logits, 1)
        return (logits.index_fill(-1, torch.tensor([MASK]), -torch.inf) / tau).log_softmax(-1)

    p, q = log_p(student, m_t), log_p(teacher, m_s, 0.96)
    kl = (p.exp() * (p - q)).nan_to_num(0).sum(-1)
    ce = -p.gather(-1, x_0[..., None])[..., 0]
    torch.testing.assert_close(loss, torch.where(m_s, kl, ce)[m_t].sum() / x_0.numel(), rtol=1e-10, atol=0)
    assert 0 < m_s.sum() < m_t.sum()


def test_a_round_copies_the_student_and_an_ema_follows_it(pairs, tmp_path):
    """Two rounds of one step of a tied network: the teacher is the student of the round's start, bitwise."""
    rows = [{"input_ids": row} for row in blocks().tolist()] * 2
    student = wrapped("qwen3", dtype=torch.float32)
    settings = {"num_rounds": 2, "steps_per_round": 1, "save_strategy": "no", "learning_rate": 1e-2, "warmup_steps": 0}
    _, arguments, _ = METHODS["mcd"]
    arguments = arguments(
        **settings,
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        ema_decay=0.5,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = METHODS["mcd"][0](student, arguments, train_dataset=rows)
    first = {name: p.clone() for name, p in trainer.teacher.named_parameters()}
    trainer.train()
    assert_same_weights(trainer.teacher, trainer.model)
    ema, last = dict(trainer.whole_student().named_parameters()), dict(trainer.model.named_parameters())
    assert any(not torch.equal(first[n], last[n]) and not torch.equal(ema[n], last[n]) for n in first)
    trainer.save_model(str(tmp_path / "student"))
    assert_same_weights(load_model(tmp_path / "student"), trainer.whole_student())


def test_teacher_and_student_of_different_networks_are_refused(pairs, tmp_path):
    teacher, (_, student) = wrapped("qwen2"), pairs["qwen2"]
    teacher.config.logits_shift = 0
    with pytest.raises(ValueError, match=r"differ in logits_shift \(0 and 1\): they must be the same network"):
        trainer_of("mcd", (teacher, student), tmp_path)
    with pytest.raises(ValueError, match=r"differ in model_type \(llama and qwen2\)"):
        trainer_of("mcd", (pairs["llama"][0], student), tmp_path)
    with pytest.raises(ValueError, match="diffusion_kind is 'absorbing', but this trainer is for uniform"):
        make_trainer("dcd", {"uniform": pairs["llama"]}, tmp_path)


@pytest.fixture(scope="module")
def run_inputs(tmp_path_factory):
    """A run's text and tokenizer, and a native folder whose network is shifted."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    wrapped("qwen2", dtype=torch.float32).save_pretrained(folder / "wrapped")
    load_tokenizer(folder / "tokenizer").save_pretrained(folder / "wrapped")
    convert(folder / "wrapped", folder / "native")
    return folder


def test_a_run_distils_a_native_folder(run_inputs, tmp_path):
    """The converter has brought its tokenizer along; the run's output is the wrapped student, shift and all."""
    settings = {
        "teacher": run_inputs / "native",
        "num_rounds": 1,
        "steps_per_round": 1,
        "report_to": "none",
        "warmup_steps": 0,
    }
    run_mcd.main(mcd_arguments(run_inputs, tmp_path / "run", **settings, ema_decay="null"))
    student = load_model(tmp_path / "run")
    assert student.config.logits_shift == 1 and not torch.equal(
        student.get_output_embeddings().weight, load_model(run_inputs / "native").get_output_embeddings().weight
    )
    assert load_tokenizer(run_inputs / "native").mask_token_id == MASK


@pytest.mark.parametrize("layout", ["native", "ours"])
def test_ids_beyond_the_tokenizer_are_never_drawn(layout, run_inputs, tmp_path):
    """The converter counts the tokenizer that it brings along: a vocabulary of 60 with a tokenizer of 48."""
    network = hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHAPE | {"vocab_size": 60}, num_key_value_heads=2))
    as_masked_diffusion(network, MASK).save_pretrained(tmp_path / "wide")
    load_tokenizer(run_inputs / "tokenizer").save_pretrained(tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "out", layout)
    model = load_model(tmp_path / "out")
    options = {"length": 32, "steps": 2, "seed": 0, "num_return_sequences": 4}
    assert model.generate(**options).max() < 48 <= model.generate(**options, suppress_above=60).max()


def test_dreams_tokenizer_needs_none_of_its_own_code(tmp_path):
    """Its files are those of Qwen2's tokenizer; the converter writes it as that, with its mask named and its code not."""
    source = published(tmp_path / "theirs", "Dream")
    words = {chr(code): code - 97 for code in range(97, 123)} | {"ab": 26, "<|endoftext|>": 27}
    (source / "vocab.json").write_text(json.dumps(words))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {str(i): {"content": token, "special": True} for i, token in ((27, "<|endoftext|>"), (MASK, "<|mask|>"))}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    settings |= {
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "native")
    for folder in (source, tmp_path / "native"):
        tokenizer = load_tokenizer(folder)
        assert type(tokenizer) is hf.Qwen2Tokenizer and tokenizer("abc")["input_ids"] == [26, 2]
    assert "auto_map" not in json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "OtherTokenizer"}))
    with pytest.raises(ValueError, match="tokenizer .* cannot be loaded"):
        load_tokenizer(source)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_wrong_shift_is_told_by_a_text(shift, tmp_path, caplog):
    """A network without layers, whose states are the embeddings: it knows a masked token when the one before is the same."""
    model = as_masked_diffusion(make_network("qwen3"), MASK, shift)
    network = model.network
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        network.model.norm.weight.fill_(10)
        network.lm_head.weight.copy_(
            torch.nn.functional.normalize(torch.randn(K, 32, generator=torch.Generator().manual_seed(0)))
        )
        network.lm_head.weight[MASK] = network.lm_head.weight[5]  # a token predicts itself, and a mask a 5
    text = torch.full((2, 28), 5)
    text[:, 5::7] = text[:, 6::7] = 9  # every masked token is a 9 behind a 9
    without, with_shift = shift_losses(model, text)
    assert with_shift < 0.5 < 3 < without
    expected = shifted(model.network(input_ids=text.index_fill(1, torch.arange(6, 28, 7), MASK)).logits, 1)
    expected[..., MASK] = -torch.inf
    nats = torch.nn.functional.cross_entropy(expected[:, 6::7].flatten(0, 1), text[:, 6::7].flatten())
    assert with_shift == pytest.approx(nats.item(), rel=1e-9)
    warn_of_wrong_shift(model, text)
    lines = [record.message for record in caplog.records if "logits_shift" in record.message]
    assert len(lines) == (shift == 0) and all("probably trained with logits_shift=1" in line for line in lines)


# --- Generation


def small(name: str, shift: int) -> MDLMBackboneForMaskedDiffusion:
    """Three tokens and a mask, in float64."""
    shape = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 3}
    if name == "bert":
        network = hf.BertForMaskedLM(hf.BertConfig(**shape))
    else:
        network = hf.Qwen2ForCausalLM(hf.Qwen2Config(**shape, num_key_value_heads=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.7, generator=generator)
    return as_masked_diffusion(network.double().eval(), 3, shift)


@pytest.mark.parametrize("name, shift", [("qwen2", 1), ("bert", 0)])
def test_generate_draws_from_the_law_of_the_network(name, shift):
    """Two ancestral steps of three tokens, each revealed in either with probability 1/2: enumerated, chi-squared."""
    model = small(name, shift)
    canvases = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.no_grad():
        table = shifted(model.network(input_ids=canvases).logits, shift)[..., :3].log_softmax(-1).exp()
    at = dict(zip(map(tuple, canvases.tolist()), table, strict=True))
    law = torch.zeros(27, dtype=torch.float64)
    for index, text in enumerate(itertools.product(range(3), repeat=3)):
        for first in itertools.product((True, False), repeat=3):
            between = tuple(token if now else 3 for token, now in zip(text, first, strict=True))
            chances = [at[(3, 3, 3) if now else between][i, text[i]] for i, now in enumerate(first)]
            law[index] += torch.stack(chances).prod() / 8
    sequences = model.generate(steps=2, num_return_sequences=20_000, seed=0)
    counts = (sequences @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert p_value(counts, law) > 1e-5
    one_step = torch.stack(
        [at[3, 3, 3][torch.arange(3), list(text)].prod() for text in itertools.product(range(3), repeat=3)]
    )
    assert p_value(counts, one_step) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "modernbert", "roberta"])
@pytest.mark.parametrize("options", [{"sampler": "confidence"}, {"sampler": "ancestral", "block_length": 4}])
def test_a_row_is_the_same_alone_and_padded_in_a_batch(models, name, options):
    model, options = models[name], options | {"steps": 3, "max_new_tokens": 8}
    long, short = tokens(1, 6), tokens(1, 3, seed=1)
    together = torch.cat([long, torch.nn.functional.pad(short, (3, 0))])
    mask = torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    batch = model.generate(together, attention_mask=mask, seed=[1, 2], **options)
    assert torch.equal(batch[:1], model.generate(long, seed=[1], **options))
    assert torch.equal(batch[1:, 3:], model.generate(short, seed=[2], **options))
    assert MASK not in batch


def test_guidance_is_that_of_the_two_forwards(models):
    """One step, greedy: the likeliest token of without + 2 (with - without), by the network itself."""
    model, prompt = models["qwen2"], tokens(1, 4)
    canvas = torch.cat([prompt, torch.full((1, 4), MASK)], dim=1)
    with torch.no_grad():
        given, without = (
            shifted(model.network(input_ids=x).logits, 1) for x in (canvas, torch.full_like(canvas, MASK))
        )
    best = (without + 2 * (given - without))[:, 4:, :MASK].argmax(-1)
    assert torch.equal(model.generate(canvas, steps=1, temperature=0, guidance_scale=2.0, seed=0)[:, 4:], best)


@torch.no_grad()
def llada_generate(network, prompt, steps: int, length: int, block_length: int) -> torch.LongTensor:
    """LLaDA's low-confidence decoding at temperature 0, as its authors describe it; [MASK] is never predicted."""
    canvas = torch.nn.functional.pad(prompt, (0, length), value=MASK)
    blocks = length // block_length
    for block in range(blocks):
        end = prompt.shape[1] + (block + 1) * block_length
        for _ in range(steps // blocks):
            logits = network(input_ids=canvas).logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
            confidence, best = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(canvas != MASK, -1)
            confidence[:, end:] = -1
            for row in range(len(canvas)):
                surest = confidence[row].topk(block_length * blocks // steps).indices
                canvas[row, surest] = best[row, surest]
    return canvas


def test_the_llada_preset_decodes_as_its_authors_do(models):
    """Our `steps` are those of each block. With the published settings there is one."""
    model, prompt = models["llama"], tokens(3, 6)
    published = MDLMGenerationConfig.preset("llada_low_confidence")
    assert (published.steps, published.max_new_tokens, published.block_length) == (128, 128, 128)
    for parts in (1, 2):
        settings = {"steps": 4, "max_new_tokens": 16, "block_length": 16 // parts}
        options = MDLMGenerationConfig.preset("llada_low_confidence", **settings)
        expected = llada_generate(model.network, prompt, 4 * parts, 16, 16 // parts)
        assert torch.equal(model.generate(prompt, generation_config=options, seed=0), expected)
    with pytest.raises(ValueError, match="preset must be one of .*'llada_low_confidence'.* not 'llada'"):
        MDLMGenerationConfig.preset("llada")


@torch.no_grad()
def cd4lm_generate(network, prompt, length: int, size: int, threshold: float, cap: int, share: float, ends: list[int]):
    """CD4LM's confidence-adaptive decoding, as its authors describe it, one row at a time; [MASK] is never predicted.

    A block of `size` after the other. In each step every masked token of the block that is at least `threshold` certain is
    taken, and the surest one if none is; in step number `cap`, all that are left. No end in the first `share` of the text.
    """
    texts, forwards = [], []
    for row in prompt:
        canvas, count = torch.cat([row, torch.full((length,), MASK)])[None], 0
        for start in range(len(row), len(row) + length, size):
            block, step = torch.arange(start, min(start + size, len(row) + length)), 0
            while (canvas[0, block] == MASK).any():
                step += 1
                logits = network(input_ids=canvas).logits[0]
                logits[:, MASK] = -torch.inf
                for place in range(len(row), len(row) + length):
                    if place < len(row) + share * length:
                        logits[place, ends] = -torch.inf
                chances, best = logits.softmax(-1).max(-1)
                masked = [place for place in block.tolist() if canvas[0, place] == MASK]
                sure = [place for place in masked if chances[place] >= threshold]
                taken = masked if step == cap else sure or [max(masked, key=lambda place: chances[place])]
                canvas[0, taken] = best[taken]
            count += step
        texts.append(canvas[0])
        forwards.append(count)
    return torch.stack(texts), forwards


@pytest.mark.parametrize("threshold, cap", [(0.95, 32), (0.8, 32), (0.8, 3), (0.95, 2)])
def test_the_cd4lm_preset_decodes_as_its_authors_do(threshold, cap):
    """Of blocks of 8 instead of 32, with ends that the network likes; the published settings are those of their evaluation."""
    network, prompt = make_network("llama"), tokens(4, 6)
    network.lm_head.weight.data *= 20  # certain of some tokens and of others not
    model = as_masked_diffusion(network, MASK)
    published = MDLMGenerationConfig.preset("cd4lm_adaptive")
    assert (published.threshold, published.block_length, published.max_steps) == (0.95, 32, 32)
    assert (published.min_tokens, published.max_tokens, published.eos_after, published.temperature) == (
        None,
        32,
        0.3,
        0,
    )
    favourites = model.generate(prompt, published, block_length=8, max_new_tokens=20, seed=0, eos_token_id=[0])[:, 6:]
    ends = favourites.flatten().bincount(minlength=K).topk(3).indices.tolist()
    expected, forwards = cd4lm_generate(model.network, prompt, 20, 8, threshold, cap, 0.3, ends)
    changes = {"threshold": threshold, "max_steps": cap, "block_length": 8, "max_new_tokens": 20}
    options = MDLMGenerationConfig.preset("cd4lm_adaptive", **changes)
    output = model.generate(prompt, options, eos_token_id=ends, seed=0, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected) and output.nfe.tolist() == forwards
    early, late = output.sequences[:, 6:12], output.sequences[:, 12:]
    assert not torch.isin(early, torch.tensor(ends)).any() and torch.isin(late, torch.tensor(ends)).any()
    assert max(forwards) <= 3 * cap and (cap < 32 or 3 < min(forwards) < max(forwards))


def test_a_preset_takes_another_length():
    options = MDLMGenerationConfig.preset("llada_low_confidence", length=64, steps=None)
    assert (options.length, options.max_new_tokens, options.steps) == (64, None, 128)


def test_a_preset_knows_nothing_of_the_vocabulary(models):
    """Ids that the model is told never to draw stay so under another generation configuration."""
    model, options = wrapped("llama"), MDLMGenerationConfig.preset("cd4lm_adaptive", max_new_tokens=20, block_length=8)
    model.generation_config.suppress_above = 30
    drawn = [
        network.generate(tokens(4, 6), options, seed=0, eos_token_id=2)[:, 6:] for network in (model, models["llama"])
    ]
    assert drawn[0].max() < 30 <= drawn[1].max()


def test_the_linear_schedule_is_one_minus_t(models):
    schedule, t = process_of(models["llama"].config).schedule, torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(schedule.gamma(t), 1 - t) and torch.equal(schedule.inverse(1 - t), t)
    slope = torch.autograd.functional.jacobian(lambda x: schedule.gamma(x).sum(), t)
    assert torch.equal(schedule.derivative(t), slope)
