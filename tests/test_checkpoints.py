"""Published checkpoints: golden logits of every layout, round trips, refusals, the Hub, the converter, the entry points."""

import argparse
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import assert_same_weights
from tiny_run import BLOCK, run_python, save_teacher, write_inputs
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from evaluation.run_eval import main as run_eval
from modeling_mcd import MDLMForMaskedDiffusion
from modeling_mcd.checkpoint_layouts import parameter_names
from modeling_mcd.convert_checkpoints import convert, main
from modeling_mcd.loading import load_model, load_tokenizer, read_checkpoint
from trainers import run_mcd, run_mdlm


DATA = Path(__file__).parent / "data"
CONFIGS = {"mdlm": "config.json", "sdtt": "sdtt_config.json", "duo": "duo_config.json"}
# Computed by the authors' own code, in float32 on a CPU; MDLM and SDTT give their network sigma = 0.
REFERENCES = {"mdlm": "reference.safetensors", "sdtt": "reference.safetensors", "duo": "duo_reference.safetensors"}
WEIGHTS = load_file(DATA / "model.safetensors")  # the published layouts differ in the names before the names


def bare(state: dict) -> dict:
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def save(folder: Path, state: dict, config: str | dict | None = "mdlm") -> Path:
    """A folder in a published layout."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    if isinstance(config, dict):
        (folder / "config.json").write_text(json.dumps(config))
    elif config is not None:
        shutil.copy(DATA / CONFIGS[config], folder / "config.json")
    return folder


def published(folder: Path, layout: str) -> Path:
    return save(folder, WEIGHTS, layout)


def save_lightning(file: Path, **changes) -> Path:
    content = torch.load(DATA / "lightning.ckpt", weights_only=True)
    torch.save(content | changes, file)
    return file


# --- Golden logits


@pytest.mark.parametrize("layout", CONFIGS)
def test_golden_logits_of_every_published_layout(tmp_path, layout):
    model = load_model(str(published(tmp_path / layout, layout)))
    reference = load_file(DATA / REFERENCES[layout])
    with torch.no_grad():
        logits = model(reference["input_ids"], timesteps=reference["sigma"]).logits
    assert reference["logits"].std() > 0.1 and model.dtype == torch.float32 and not model.training
    torch.testing.assert_close(logits, reference["logits"], atol=1e-5, rtol=0)
    config = model.config
    assert (config.diffusion_kind == "uniform") == config.time_conditioning == (layout == "duo")
    assert (config.vocab_size, config.max_position_embeddings, config.hidden_dropout) == (101, 24, 0.1)
    assert config.mask_token_id == (None if layout == "duo" else 100)


def test_golden_duo_logits_depend_on_sigma(tmp_path):
    model, reference = load_model(published(tmp_path / "duo", "duo")), load_file(DATA / REFERENCES["duo"])
    with torch.no_grad():
        logits = model(reference["input_ids"], timesteps=torch.zeros(3)).logits
    assert (logits - reference["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "backbone.backbone.", "module._orig_mod.", "_orig_mod.backbone.module."])
def test_golden_logits_whatever_wraps_the_network(tmp_path, prefix):
    state = {prefix + name: tensor for name, tensor in bare(WEIGHTS).items()}
    model, reference = load_model(save(tmp_path / "wrapped", state)), load_file(DATA / REFERENCES["sdtt"])
    with torch.no_grad():
        torch.testing.assert_close(model(reference["input_ids"]).logits, reference["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_golden_lightning_checkpoint_raw_and_ema(tmp_path, suffix):
    file = shutil.copy(DATA / "lightning.ckpt", tmp_path / f"last{suffix}")  # no config.json beside it
    raw, ema = load_model(file), load_model(file, ema=True)
    names = parameter_names(3)
    by_name, ours = load_file(DATA / "ema_by_name.safetensors"), ema.state_dict()
    assert by_name.keys() == names.keys()
    for name, tensor in by_name.items():
        assert torch.equal(ours[names[name]], tensor), name
        assert torch.equal(raw.state_dict()[names[name]], WEIGHTS[f"backbone.{name}"]), name
    assert not torch.equal(raw.lm_head.weight, ema.lm_head.weight)
    config = raw.config
    assert (config.num_attention_heads, config.diffusion_kind, config.time_conditioning) == (4, "absorbing", False)


def test_golden_names_are_as_many_as_published():
    assert [len(parameter_names(blocks)) for blocks in (12, 24)] == [130, 250]


def test_a_checkpoint_of_a_run_tells_its_own_settings(tmp_path):
    network = json.loads((DATA / "sdtt_config.json").read_text())["model"]
    run = {"model": network, "algo": {"name": "duo_base", "time_conditioning": True}}
    file = save_lightning(tmp_path / "run.ckpt", hyper_parameters={"config": run})
    config = read_checkpoint(file).config
    assert (config.diffusion_kind, config.time_conditioning, config.max_position_embeddings) == ("uniform", True, 24)
    assert read_checkpoint(save_lightning(tmp_path / "x.ckpt"), diffusion_kind="uniform").config.mask_token_id is None


@pytest.mark.parametrize("vocab_size, mask", [(30522, 103), (35, 4), (60, 59)])
def test_the_mask_of_a_checkpoint_is_that_of_its_vocabulary(tmp_path, vocab_size, mask):
    state = dict(WEIGHTS)
    for name in ("vocab_embed.embedding", "output_layer.linear.weight"):
        state[f"backbone.{name}"] = torch.zeros(vocab_size, 64)
    state["backbone.output_layer.linear.bias"] = torch.zeros(vocab_size)
    assert read_checkpoint(save(tmp_path / "x", state, "sdtt")).config.mask_token_id == mask


# --- Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", CONFIGS)
def test_round_trip_of_a_checkpoint_through_a_published_layout(build, tmp_path, layout, dtype):
    kind = "uniform" if layout == "duo" else "absorbing"
    model = build(
        vocab_size=40, bos_token_id=3, eos_token_id=3, noise_schedule="cosine", noise_epsilon=0.01, diffusion_kind=kind
    )
    model.to(dtype).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", layout, dtype)
    names = {f"backbone.{name}" for name in [*parameter_names(2), "rotary_emb.inv_freq"]}
    assert load_file(tmp_path / "theirs" / "model.safetensors").keys() == names
    convert(tmp_path / "theirs", tmp_path / "again", "ours", dtype)
    loaded = AutoModel.from_pretrained(tmp_path / "again")
    assert_same_weights(model, loaded)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("layout", CONFIGS)
def test_a_published_checkpoint_comes_back_as_it_was(tmp_path, layout):
    source = published(tmp_path / "theirs", layout)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", layout)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again"))
    differing = {key for key in theirs if ours.get(key) != theirs[key]}
    assert differing <= {"auto_map", "torch_dtype", "parameterization"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [None, "20KB"])
def test_our_own_checkpoints_load_bitwise(model, tmp_path, dtype, shards):
    model.generation_config.steps = 5
    model.to(dtype).save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    loaded = load_model(tmp_path, dtype)
    assert_same_weights(model, loaded)
    assert loaded.generation_config.steps == 5
    assert_same_weights(load_model(tmp_path), model.float())


def test_a_tied_checkpoint_is_untied_on_the_way_out(build, tmp_path):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "ours")
    loaded = load_model(tmp_path / "ours")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    convert(tmp_path / "ours", tmp_path / "theirs", "mdlm")
    assert torch.equal(load_model(tmp_path / "theirs").lm_head.weight, model.model.embed_tokens.weight)


# --- Refusals


def broken(kind: str, folder: Path) -> tuple[Path, dict]:
    """A source that must be refused, and the options to read it with."""
    state, config, options = dict(WEIGHTS), json.loads((DATA / "config.json").read_text()), {}
    if kind == "missing key":
        del state["backbone.blocks.1.norm2.weight"]
    elif kind == "extra key":
        state["backbone.blocks.1.norm3.weight"] = torch.ones(3)
    elif kind == "missing block":
        state = {name: tensor for name, tensor in state.items() if ".blocks.2." not in name}
    elif kind == "wrong shape":
        state["backbone.blocks.2.attn_qkv.weight"] = torch.ones(64, 192)
    elif kind == "one axis":
        state["backbone.vocab_embed.embedding"] = torch.ones(5)
    elif kind == "integers":
        state["backbone.blocks.0.norm1.weight"] = torch.ones(64, dtype=torch.int32)
    elif kind == "float8":
        state["backbone.blocks.0.norm1.weight"] = torch.ones(64).to(torch.float8_e4m3fn)
    elif kind in ("nan", "inf"):
        state["backbone.blocks.0.mlp.0.bias"] = torch.full((256,), float(kind))
    elif kind == "duo as absorbing":
        config, options = json.loads((DATA / "duo_config.json").read_text()), {"diffusion_kind": "absorbing"}
    elif kind == "two prefixes":
        state["vocab_embed.embedding"] = torch.ones(101, 64)
    elif kind in config:
        config[kind] = 7
    elif kind == "no heads":
        del state["backbone.rotary_emb.inv_freq"], config["n_heads"]
    elif kind == "another model":
        state, config = {"wte.weight": torch.ones(2)}, {"model_type": "gpt2"}
    source = save(folder / "source", state, config)
    weights = source / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no safetensors":
        weights.write_bytes(b"<html>not found</html>" * 9)
    elif kind == "git-lfs":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 857692\n")
    elif kind == "no bytes":
        weights.write_bytes(b"")
    elif kind == "a folder of that name":
        weights.unlink()
        weights.mkdir()
    elif kind == "no file":
        source = folder / "pipe"
        os.mkfifo(source)
    elif kind == "config list":
        (source / "config.json").write_text("[]")
    elif kind == "config bytes":
        (source / "config.json").write_bytes(b"\xff\xfe{}")
    elif kind.startswith("index "):
        name = {"index number": 3, "index up": "../model.safetensors", "index below": "sub/model.safetensors"}
        name |= {"index absolute": str(weights), "index pickle": "last.ckpt", "index alone": "shard.safetensors"}
        (folder / "model.safetensors").write_bytes(weights.read_bytes())
        weights.unlink()
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name[kind]}}))
    elif kind.startswith("shards"):
        names = sorted(state)
        weight_map = {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(names)}
        for letter in "ab":
            held = {name: state[name] for name in names if weight_map[name] == f"{letter}.safetensors"}
            if kind == "shards, twice" and letter == "b":
                held[names[0]] = state[names[0]]
            if kind == "shards, not there" and letter == "b":
                del held[names[1]]
            save_file(held, source / f"{letter}.safetensors")
        weights.unlink()
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif kind.startswith("ours, "):
        shutil.rmtree(source)
        save_teacher(source)
        file = "config.json" if "config" in kind else "generation_config.json"
        words = {"options list": "[]", "options text": "{", "options value": '{"steps": "many"}'}
        words |= {"options key": '{"beams": 3}', "config value": '{"model_type": "mdlm_mcd", "hidden_size": "wide"}'}
        if kind == "ours, a shard gone":
            MDLMForMaskedDiffusion.from_pretrained(source).save_pretrained(source, max_shard_size="20KB")
            (source / "model.safetensors").unlink(missing_ok=True)
            sorted(source.glob("model-*"))[1].unlink()
        elif kind == "ours, another kind":
            options = {"diffusion_kind": "uniform"}
        else:
            (source / file).write_text(words[kind.removeprefix("ours, ")])
    elif kind == "broken config":
        (source / "config.json").write_text("{")
    elif kind == "empty folder":
        shutil.rmtree(source)
        source.mkdir()
    elif kind == "empty index":
        weights.unlink()
        (source / "model.safetensors.index.json").write_text("{}")
    elif kind == "revision of a folder":
        options = {"revision": "main"}
    elif kind == "no ema":
        options = {"ema": True}
    elif kind.startswith("ckpt"):
        source, options = source / "last.ckpt", {"ema": kind.startswith("ckpt ema")}
        content = torch.load(DATA / "lightning.ckpt", weights_only=True)
        if kind == "ckpt ema short":
            content["ema"]["shadow_params"].pop()
        elif kind == "ckpt ema shape":
            content["ema"]["shadow_params"][5] = torch.ones(65)
        elif kind == "ckpt ema numbers":
            content["ema"]["shadow_params"][5] = 0.5
        elif kind == "ckpt ema empty":
            content["ema"] = {}
        elif kind == "ckpt state list":
            content["state_dict"] = [1, 2]
        elif kind == "ckpt ema none":
            del content["ema"]
        elif kind == "ckpt list":
            content = [1, 2]
        elif kind == "ckpt no state":
            content = {"epoch": 3}
        torch.save(content, source)
        if kind == "ckpt cut off":
            source.write_bytes(source.read_bytes()[:5000])
    return source, options


REFUSALS = {
    "missing key": "blocks.1.norm2.weight is missing",
    "extra key": "blocks.1.norm3.weight is not a parameter of this network",
    "missing block": "n_blocks = 3, but in the weights it is 2",
    "wrong shape": r"blocks.2.attn_qkv.weight has the shape (64, 192), not (192, 64)",
    "one axis": "vocab_embed.embedding has the shape (5,), not (V, d)",
    "integers": "blocks.0.norm1.weight holds torch.int32 numbers",
    "two prefixes": "holds 'vocab_embed.embedding' twice",
    "hidden_dim": "hidden_dim = 7, but in the weights it is 64",
    "n_heads": "n_heads = 7, but in the weights it is 4",
    "vocab_size": "vocab_size = 7, but in the weights it is 101",
    "float8": "blocks.0.norm1.weight holds torch.float8_e4m3fn numbers, not floating-point ones of 16 bits or more",
    "nan": "layers.0.mlp.up_proj.bias holds NaN or infinite numbers in torch.float32",
    "inf": "layers.0.mlp.up_proj.bias holds NaN or infinite numbers in torch.float32",
    "duo as absorbing": "its configuration says 'uniform' diffusion, not 'absorbing'",
    "no bytes": "model.safetensors is cut off, or not a safetensors file",
    "a folder of that name": "there are no weights in it",
    "no file": "it is neither a file nor a folder",
    "config list": "config.json must hold an object, not a list",
    "config bytes": "config.json is not valid JSON",
    "index number": "model.safetensors.index.json says that a is in 3, which is not a .safetensors file in its folder",
    "index up": "a is in '../model.safetensors', which is not a .safetensors file in its folder",
    "index below": "a is in 'sub/model.safetensors', which is not a .safetensors file in its folder",
    "index absolute": "model.safetensors', which is not a .safetensors file in its folder",
    "index pickle": "a is in 'last.ckpt', which is not a .safetensors file in its folder",
    "index alone": "shard.safetensors is missing, so the weights are not complete",
    "shards, twice": "b.safetensors holds backbone.blocks.0.adaLN_modulation.bias, which model.safetensors.index.json says",
    "shards, not there": "b.safetensors does not hold backbone.blocks.0.adaLN_modulation.weight, which",
    "ours, options list": "generation_config.json must hold a JSON object, not a list",
    "ours, options text": "generation_config.json is not valid JSON",
    "ours, options value": "steps must be an integer of at least 1, not 'many'",
    "ours, options key": "unknown generation arguments ['beams']",
    "ours, config value": "Field 'hidden_size' expected int",
    "ours, another kind": "its config.json says 'absorbing' diffusion, not 'uniform'",
    "no heads": "how many heads",
    "another model": "its model_type is 'gpt2', and its config.json does not say that it is a masked diffusion model",
    "truncated": "model.safetensors is cut off, or not a safetensors file",
    "no safetensors": "model.safetensors is cut off, or not a safetensors file",
    "git-lfs": "model.safetensors is a git-lfs pointer, not the weights: run `git lfs pull`",
    "broken config": "config.json is not valid JSON",
    "empty folder": "there are no weights in it",
    "empty index": "model.safetensors.index.json names no file",
    "revision of a folder": "revision 'main' is for a Hub id",
    "no ema": "model.safetensors holds no EMA: only a Lightning checkpoint does",
    "ours, a shard gone": "is missing, so the weights are not complete",
    "ckpt ema short": "the EMA of last.ckpt has 39 tensors, and the network 40 parameters",
    "ckpt ema shape": "blocks.0.norm1.weight has the shape (65,), not (64,)",
    "ckpt ema numbers": "the EMA of last.ckpt has 39 tensors, and the network 40 parameters",
    "ckpt ema empty": "last.ckpt holds no EMA: leave out --ema",
    "ckpt state list": "last.ckpt holds no state dict but a list",
    "ckpt ema none": "last.ckpt holds no EMA: leave out --ema",
    "ckpt list": "last.ckpt holds no state dict but a list",
    "ckpt no state": "last.ckpt holds no state dict: 'epoch' is a int",
    "ckpt cut off": "last.ckpt is cut off, or not a torch checkpoint",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys, kind):
    """The error is one line, and nothing is written."""
    source, options = broken(kind, tmp_path)
    with pytest.raises(ValueError) as error:
        load_model(source, **options)
    assert REFUSALS[kind] in str(error.value) and str(error.value).startswith(f"model {str(source)!r} ")
    assert "\n" not in str(error.value)
    words = {"diffusion_kind": "kind"}
    words = [
        f"--{words.get(name, name)}" + ("" if value is True else f"={value}")
        for name, value in options.items()
        if value
    ]
    before = sorted(tmp_path.rglob("*"))
    assert refusal(capsys, str(source), str(tmp_path / "out"), *words).count(REFUSALS[kind]) == 1
    assert sorted(tmp_path.rglob("*")) == before


def refusal(capsys, *arguments: str) -> str:
    """The one line that the converter ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    assert stop.value.code in (1, 2) and printed.out == ""
    (line,) = [
        line for line in printed.err.splitlines() if line and not line.startswith("Loading weights")
    ]  # but for the progress of loading
    assert line.startswith("mcd-convert: error: ")
    return line


@pytest.mark.parametrize(
    "out, message",
    [
        ("source", "source' is already there"),
        ("source/model.safetensors", "is already there"),
        ("source/new", "is inside the source"),
        ("link", "link' is already there"),
        ("file/new", "file' is not a folder that you may write to"),
        ("file/new/deeper", "file' is not a folder that you may write to"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys, out, message):
    source = published(tmp_path / "source", "mdlm")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(capsys, str(source), str(tmp_path / out))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", ["", "no/such/model", "a/b/c", "x" * 300, "nul\0byte", "/dev/null"])
def test_a_source_that_is_none_is_refused(tmp_path, capsys, monkeypatch, source):
    monkeypatch.chdir(published(tmp_path / "here", "mdlm"))
    assert f"model {source!r} " in refusal(capsys, source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_float16_is_refused(tmp_path, capsys):
    state = dict(WEIGHTS)
    state["backbone.blocks.0.mlp.0.bias"] = torch.full((256,), 1e5)
    source = save(tmp_path / "source", state)
    words = [str(source), str(tmp_path / "out"), "--dtype"]
    assert "holds NaN or infinite numbers in torch.float16" in refusal(capsys, *words, "float16")
    main([*words, "bfloat16"])
    assert load_model(tmp_path / "out").config.vocab_size == 101


@pytest.mark.parametrize("kind, layout", [("uniform", "mdlm"), ("uniform", "sdtt"), ("absorbing", "duo")])
def test_a_layout_for_another_kind_of_noise_is_refused(build, tmp_path, capsys, kind, layout):
    build(diffusion_kind=kind).save_pretrained(tmp_path / "ours")
    line = refusal(capsys, str(tmp_path / "ours"), str(tmp_path / "out"), "--to", layout)
    assert f"diffusion_kind is {kind!r}, but the code of the {layout} layout is for" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize("name", ["model.safetensors", "lightning.ckpt"])
def test_damaged_bytes_are_refused_in_one_line(tmp_path, name):
    """Bytes are damaged in fifty places near the start of a file. Whatever still loads must be a complete model."""
    content, config = (DATA / name).read_bytes(), DATA / "config.json"
    generator = torch.Generator().manual_seed(0)
    shutil.copy(config, tmp_path)
    refused = 0
    for place in torch.randint(3000, (50,), generator=generator).tolist():
        (tmp_path / name).write_bytes(content[:place] + b"\x00\xff\x7f\x80" + content[place + 4 :])
        try:
            load_model(tmp_path / name)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("model ")
            refused += 1
    assert refused > 25


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 0}'])
def test_from_pretrained_refuses_a_broken_generation_config(build, tmp_path, text):
    build().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json|steps must be"):
        AutoModel.from_pretrained(tmp_path)


# --- Tokenizers


@pytest.mark.parametrize(
    "file, text, message",
    [
        (None, None, "is not a local file or folder and could not be downloaded"),
        ("tokenizer.json", "[]", "cannot be loaded"),
        ("tokenizer.json", "{", "cannot be loaded"),
        ("tokenizer_config.json", "[]", "cannot be loaded"),
        ("tokenizer_config.json", '{"tokenizer_class": "Nothing"', "cannot be loaded"),
    ],
)
def test_a_broken_tokenizer_is_refused_in_one_line(tokenizer, tmp_path, file, text, message):
    if file is not None:
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / file).write_text(text)
    with pytest.raises(ValueError, match=f"tokenizer '.*' {message}") as error:
        load_tokenizer(tmp_path / "tokenizer")
    assert "\n" not in str(error.value)


def test_someone_elses_tokenizer_code_is_neither_run_nor_saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil/code--x.Slow", "evil/code--x.Fast"]}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path / "theirs")
    assert loaded("hello").input_ids == tokenizer("hello").input_ids
    loaded.save_pretrained(tmp_path / "ours")
    assert "evil" not in (tmp_path / "ours" / "tokenizer_config.json").read_text()


def test_foreign_files_beside_a_published_checkpoint_are_left_alone(tmp_path):
    config = json.loads((DATA / "config.json").read_text()) | {"algo": "mdlm", "model": "small"}
    source = save(tmp_path / "source", WEIGHTS, config)
    (source / "generation_config.json").write_text('{"do_sample": true}')
    assert (
        load_model(source).generation_config.to_dict()
        == load_model(published(tmp_path / "x", "mdlm")).generation_config.to_dict()
    )


def test_a_conversion_replaces_nothing_and_a_failed_one_leaves_nothing(build, tmp_path):
    source = published(tmp_path / "source", "mdlm")
    with pytest.raises(ValueError, match="source' is already there"):
        convert(source, source)
    build(rope_theta=500.0, vocab_size=40, bos_token_id=3, eos_token_id=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="rope_theta is 500.0, but the code of the mdlm layout has 10000.0 built in"):
        convert(tmp_path / "other", tmp_path / "out", "mdlm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "source"]


# --- Pickles


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_runs_code_is_refused_until_it_is_trusted(tmp_path, capsys):
    file = save_lightning(tmp_path / "last.ckpt", hyper_parameters={"tokenizer": Trap(tmp_path / "sprung")})
    line = refusal(capsys, str(file), str(tmp_path / "out"))
    assert "can run any code (found: posix.mkdir); if you trust its author, convert it with --trust-pickle" in line
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()
    main([str(file), str(tmp_path / "out"), "--trust-pickle"])
    assert (tmp_path / "sprung").is_dir() and (tmp_path / "out" / "model.safetensors").is_file()


def test_what_lightning_stores_beside_the_weights_is_allowed(tmp_path):
    beside = argparse.Namespace(lr=3e-4, sizes=OrderedDict(a=torch.Size([2])))
    assert load_model(save_lightning(tmp_path / "last.ckpt", hyper_parameters=beside)).config.num_hidden_layers == 3


# --- The Hub: a cache as the client leaves it, and no network


def cached(name: str, revisions: dict[str, str]):
    """Puts published folders into the client's cache: revision -> layout."""
    repository = Path(os.environ["HF_HOME"]) / "hub" / f"models--{name.replace('/', '--')}"
    for number, (revision, layout) in enumerate(revisions.items()):
        commit = f"{number:040x}"
        published(repository / "snapshots" / commit, layout)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return repository


def test_a_checkpoint_of_the_hub_is_found_by_name_and_revision():
    repository = cached("acme/dit", {"main": "mdlm", "teacher": "duo"})
    try:
        kinds = [
            read_checkpoint(source, revision=revision).config.diffusion_kind
            for source, revision in (("acme/dit", None), ("acme/dit@teacher", None), ("acme/dit", "teacher"))
        ]
        assert kinds == ["absorbing", "uniform", "uniform"]
        for source, revision, message in (
            (
                "acme/dit@none",
                None,
                "'acme/dit@none' is not a local file or folder and could not be downloaded from the Hub: revision 'none'",
            ),
            ("acme/dit@main", "main", "names the revision 'main' already"),
            (
                "acme/nothing",
                None,
                "model 'acme/nothing' is not a local file or folder and could not be downloaded from the Hub",
            ),
        ):
            with pytest.raises(ValueError, match=message) as error:
                load_model(source, revision=revision)
            assert "\n" not in str(error.value)
    finally:
        shutil.rmtree(repository)


# --- The converter and the entry points


CONVERT = "import runpy; runpy.run_module('modeling_mcd.convert_checkpoints', run_name='__main__')"
LOAD = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(model.generate(steps=4, seed=0).shape, model.config.diffusion_kind, "modeling_mcd" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout, kind", [("sdtt", "absorbing"), ("duo", "uniform")])
def test_a_converted_checkpoint_needs_no_package(tmp_path, layout, kind):
    """Converted by one process, it generates in another one."""
    source = published(tmp_path / "theirs", layout)
    result = run_python(CONVERT, str(source), str(tmp_path / "ours"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{sum(t.numel() for n, t in WEIGHTS.items() if 'inv_freq' not in n):,} parameters, {kind}" in result.stdout
    result = run_python(LOAD, str(tmp_path / "ours"), plain=True, cwd=tmp_path)
    assert result.stdout.split("\n")[0] == f"torch.Size([1, 24]) {kind} False", result.stderr


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of a run whose teacher is in the layout of MDLM, and a judge."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    convert(folder / "teacher", folder / "published", "mdlm")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder / "judge")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tokenizer" / name, folder / "judge")
    return folder


def test_every_entry_point_takes_a_published_model_at_a_revision(inputs, tmp_path, capsys):
    repository = cached("acme/dit", {"main": "duo"})
    shutil.copytree(inputs / "published", repository / "snapshots" / "v2")
    (repository / "refs" / "v2").write_text("v2")
    shared = {"tokenizer": inputs / "tokenizer", "train_text": inputs / "text.txt", "block_length": BLOCK}
    shared |= {"disable_tqdm": True, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 1}
    for entry, settings in (
        (run_mdlm, {"model": "acme/dit@v2", "max_steps": 1}),
        (run_mcd, {"teacher": "acme/dit@v2", "num_rounds": 1, "steps_per_round": 1}),
    ):
        out = tmp_path / entry.__name__
        entry.main([f"--{key}={value}" for key, value in {**shared, **settings, "output_dir": out}.items()])
        assert AutoModel.from_pretrained(out).num_parameters() == load_model(inputs / "published").num_parameters()
    for file in (inputs / "tokenizer").iterdir():  # ours have their tokenizer with them
        shutil.copy(file, repository / "snapshots" / "v2")
    words = ["theirs=acme/dit@v2", "--steps", "2", "--judge", str(inputs / "judge"), "--samples", "2"]
    run_eval([*words, "--seeds", "1", "--output_dir", str(tmp_path / "report")])
    shutil.rmtree(repository)
    (row,) = json.loads((tmp_path / "report" / "eval.json").read_text())["results"]
    assert (row["model"], row["steps"], row["samples"]) == ("theirs", 2, 2)


# --- Both roundings of the rotary embedding


def test_golden_logits_under_both_rotary_roundings_in_bfloat16(tmp_path):
    reference, roundings = load_file(DATA / REFERENCES["duo"]), {}
    for precision in ("float32", "native"):
        model = load_model(published(tmp_path / precision, "duo"))
        model.config.rotary_precision = precision
        with torch.no_grad():
            exact = model(reference["input_ids"], timesteps=reference["sigma"]).logits
            rounded = model.to(torch.bfloat16)(reference["input_ids"], timesteps=reference["sigma"]).logits
        torch.testing.assert_close(exact, reference["logits"], atol=1e-5, rtol=0)
        roundings[precision] = rounded
    assert not torch.equal(*roundings.values())
    for rounded in roundings.values():
        assert (rounded - reference["logits"]).abs().max() < 0.1 * reference["logits"].abs().max()
