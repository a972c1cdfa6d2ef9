"""Backbones on the disk: published ones under the names of the native class that each one is, and native folders.

    LLaDA         a Llama without its causal mask, under the names of OLMo           (github.com/ML-GSAI/LLaDA)
    Dream         a Qwen2 without its causal mask, each token predicted from the one before it   (github.com/DreamLM/Dream)
    A2D           a Qwen3, Qwen2 or Llama without its causal mask, or causal between blocks      (github.com/ZHZisZZ/dllm)
    SDAR          a Qwen3 that is causal between blocks                              (github.com/JetAstra/SDAR)
    Fast-dLLM v2  a Qwen2 that is causal between blocks, with Dream's shift          (github.com/NVlabs/Fast-dLLM)

So none of their own code is needed. The native configuration keeps in its entry `masked_diffusion` what makes a masked
diffusion model of the network; plain transformers ignores it and writes it back.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, LlamaConfig, PreTrainedConfig

from .configuration_backbone_mdlm import MDLMBackboneConfig
from .files import read_object
from .generation_config_mdlm import DEFAULTS, MDLMGenerationConfig
from .modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion


ENTRY = "masked_diffusion"  # of a native config.json: the fields of MDLMBackboneConfig that it needs
PREFIX = "network."  # of the network's parameters among those of an MDLMBackboneForMaskedDiffusion
# Tensors that a file may hold beside the parameters: computed ones, and the heads of other tasks.
EXTRA = re.compile(r"(^|\.)(pooler|seq_relationship)\.|\.(position_ids|inv_freq)$")

# LLaDA's name -> Llama's.
LLADA_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# Settings of LLaDA's code of which Llama has one value built in.
LLADA_BUILT_IN = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "block_group_size": 1,
    **dict.fromkeys(("alibi", "scale_logits", "include_bias", "include_qkv_bias"), False),
    **dict.fromkeys(("attention_layer_norm", "input_emb_norm"), False),
}
LLADA_MASKS = {126464: 126336}  # of the published vocabularies
DREAM_MASKS = {152064: 151666}
DREAM_CONTEXT = 2048  # that it was trained with; its configuration says what Qwen2 was
SDAR_MASKS = {151936: 151669}
FAST_DLLM_MASKS = {151936: 151665, 152064: 151665}
FAST_DLLM_BLOCK = 32  # where its configuration does not say
UNSUPPORTED = ("llada2_moe",)  # mixtures of experts that transformers does not have


def llada_names(layers: int, tied: bool) -> dict[str, str]:
    """LLaDA's parameter -> Llama's."""
    outside = {
        f"model.transformer.{theirs}": ours for theirs, ours in LLADA_OUTSIDE.items() if ours != "lm_head" or not tied
    }
    inside = {
        f"model.transformer.blocks.{i}.{theirs}": f"model.layers.{i}.{ours}"
        for i in range(layers)
        for theirs, ours in LLADA_BLOCK.items()
    }
    return {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in (outside | inside).items()}


def from_llada(settings: Mapping, state: Mapping[str, torch.Tensor]) -> tuple[PreTrainedConfig, dict, dict[str, str]]:
    """The native configuration, the entry `masked_diffusion`, and the published name -> native name of each parameter.

    Raises:
        ValueError: a setting that Llama cannot have, one that the weights contradict, or one that is missing.
    """
    for name, value in LLADA_BUILT_IN.items():
        if settings.get(name) not in (None, value):
            raise ValueError(f"{name} is {settings[name]!r}, but only {value!r} fits the native Llama")
    tied = bool(settings.get("weight_tying", False))
    layers = len({match[1] for name in state if (match := re.match(r"model\.transformer\.blocks\.(\d+)\.", name))})
    names = llada_names(layers, tied)
    for name in names:
        if name not in state:
            raise ValueError(f"{name} is missing")
    vocab_size, width = state["model.transformer.wte.weight"].shape
    block = "model.transformer.blocks.0."
    heads = settings.get("n_heads")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"n_heads ({heads!r}) must be a number that divides the width of the weights ({width})")
    found = {
        "d_model": width,
        "n_layers": layers,
        "mlp_hidden_size": len(state[f"{block}ff_proj.weight"]),
        "n_kv_heads": len(state[f"{block}k_proj.weight"]) // (width // heads),
        "embedding_size": vocab_size,
    }
    for name, value in found.items():
        if settings.get(name) not in (None, value):
            raise ValueError(f"its configuration says {name} = {settings[name]}, but in the weights it is {value}")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=found["mlp_hidden_size"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=found["n_kv_heads"],
        max_position_embeddings=needed(settings, "max_sequence_length"),
        rms_norm_eps=needed(settings, "rms_norm_eps"),
        rope_parameters={"rope_type": "default", "rope_theta": needed(settings, "rope_theta")},
        tie_word_embeddings=tied,
        **{name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    return config, {"mask_token_id": mask_of(settings, vocab_size, LLADA_MASKS)}, names


def from_dream(settings: Mapping, state: Mapping[str, torch.Tensor]) -> tuple[PreTrainedConfig, dict, dict[str, str]]:
    """As `from_llada`; the names are native."""
    if settings.get("use_mrope"):
        raise ValueError("use_mrope is true, but the native Qwen2 has no such positions")
    config = native_config("qwen2", settings)
    context = min(config.max_position_embeddings, DREAM_CONTEXT)
    mask = mask_of(settings, config.vocab_size, DREAM_MASKS)
    return config, {"mask_token_id": mask, "logits_shift": 1, "max_position_embeddings": context}, {}


def from_a2d(settings: Mapping, state: Mapping[str, torch.Tensor]) -> tuple[PreTrainedConfig, dict, dict[str, str]]:
    """As `from_llada`; the names are native. The mask is the tokenizer's."""
    config = native_config(settings["model_type"].removeprefix("a2d-"), settings)
    return config, {"mask_token_id": settings.get("mask_token_id"), **in_blocks(settings.get("block_size"))}, {}


def from_sdar(settings: Mapping, state: Mapping[str, torch.Tensor]) -> tuple[PreTrainedConfig, dict, dict[str, str]]:
    """As `from_llada`; the names are native."""
    config = native_config("qwen3", settings)
    entry = {"mask_token_id": mask_of(settings, config.vocab_size, SDAR_MASKS)}
    return config, entry | in_blocks(settings.get("block_size")), {}


def from_fast_dllm(
    settings: Mapping, state: Mapping[str, torch.Tensor]
) -> tuple[PreTrainedConfig, dict, dict[str, str]]:
    """As `from_llada`; the names are native."""
    config = native_config("qwen2", settings)
    entry = {"mask_token_id": mask_of(settings, config.vocab_size, FAST_DLLM_MASKS), "logits_shift": 1}
    return config, entry | in_blocks(settings.get("bd_size", FAST_DLLM_BLOCK)), {}


PUBLISHED: dict[str, Callable] = {
    "llada": from_llada,
    "Dream": from_dream,
    **dict.fromkeys(("a2d-qwen3", "a2d-qwen2", "a2d-llama"), from_a2d),
    "sdar": from_sdar,
    "Fast_dLLM_Qwen": from_fast_dllm,
}
BLOCK_SIZE_MISSING = ("sdar", "a2d-qwen3", "a2d-qwen2", "a2d-llama")  # whose configuration need not say it


def in_blocks(size: int | None) -> dict:
    """The fields of the entry that say how the network sees: in blocks of this size, or everything."""
    return {} if size is None else {"attention": "block", "block_size": size}


def needed(settings: Mapping, name: str):
    if settings.get(name) is None:
        raise ValueError(f"its configuration has no {name}")
    return settings[name]


def mask_of(settings: Mapping, vocab_size: int, published: Mapping[int, int]) -> int | None:
    return settings.get("mask_token_id", published.get(vocab_size))


def native_config(model_type: str, settings: Mapping) -> PreTrainedConfig:
    """The settings as those of a native class, without what points at other code."""
    dropped = ("model_type", "auto_map", "architectures", "mask_token_id", "use_mrope", "transformers_version")
    dropped += ("block_size", "bd_size")
    return CONFIG_MAPPING[model_type].from_dict({key: value for key, value in settings.items() if key not in dropped})


def is_backbone(settings: Mapping) -> bool:
    """Whether a config.json is that of a network of transformers, native or as it was published, and not of ours."""
    kind = settings.get("model_type")
    known = kind in CONFIG_MAPPING and kind != "mdlm_mcd"
    return known or kind in PUBLISHED or kind in UNSUPPORTED


def read_backbone(
    settings: Mapping, state: Mapping[str, torch.Tensor], folder: Path, block_size: int | None = None
) -> tuple[MDLMBackboneConfig, dict[str, str], MDLMGenerationConfig | None]:
    """The wrapped network's configuration, the name in the file -> our name of each parameter, and options of `generate`.

    Args:
        settings: the config.json.
        state: tensors by the name in the file.
        folder: where the file is; a tokenizer in it may say which token is the mask.
        block_size: of a block model whose config.json does not say it.

    Raises:
        ValueError: in one line, what does not fit.
    """
    kind = settings["model_type"]
    if kind in UNSUPPORTED:
        raise ValueError(f"its model_type is {kind!r}, a mixture of experts that transformers does not have")
    if kind == MDLMBackboneConfig.model_type:
        check_block_size(block_size, settings.get("block_size"))
        config = MDLMBackboneConfig.from_dict(settings)
        return config, matched(config, state, lambda ours: ours), None
    names = {}
    if kind in PUBLISHED:
        network, entry, names = PUBLISHED[kind](settings, state)
    else:
        network, entry = CONFIG_MAPPING[kind].from_dict(settings), settings.get(ENTRY)
        if entry is None and type(network) not in MODEL_FOR_MASKED_LM_MAPPING:
            raise ValueError(
                f"its model_type is {kind!r}, and its config.json does not say that it is a masked diffusion model (no entry "
                f"{ENTRY!r}): if it is one, load it with transformers and wrap it with as_masked_diffusion"
            )
    if not isinstance(entry, Mapping | None):
        raise ValueError(f"the entry {ENTRY!r} of its config.json must be an object, not {entry!r}")
    entry = dict(entry or {})
    options = entry.pop("generation", None)
    check_block_size(block_size, entry.get("block_size"), may_set=kind in BLOCK_SIZE_MISSING)
    entry |= in_blocks(block_size)
    if kind == "sdar" and entry.get("block_size") is None:
        raise ValueError(
            "its model_type is 'sdar', whose attention is causal between blocks, but its config.json does not say how long "
            "they are: give block_size (mcd-convert --block-size), such as 4"
        )
    if entry.get("mask_token_id") is None:
        entry["mask_token_id"] = mask_token_beside(folder)
    if entry["mask_token_id"] is None:
        raise ValueError(
            "neither its config.json nor a tokenizer beside it says which token is the mask: load it with transformers and "
            "wrap it with as_masked_diffusion(network, mask_token_id=...)"
        )
    config = MDLMBackboneConfig(backbone_config=network, **entry)
    theirs = {native: name for name, native in names.items()}
    names = matched(config, state, lambda ours: theirs.get(ours.removeprefix(PREFIX), ours.removeprefix(PREFIX)))
    return config, names, MDLMGenerationConfig(**options) if options else None


def check_block_size(given: int | None, own: int | None, may_set: bool = False):
    """Raises ValueError for a `block_size` that the call gives, unless it is the model's own or may be set."""
    if given is not None and given != own and (own is not None or not may_set):
        said = f"says block_size = {own}" if own is not None else "has no blocks"
        raise ValueError(f"block_size is {given}, but its config.json {said}: leave it out")


def matched(
    config: MDLMBackboneConfig, state: Mapping[str, torch.Tensor], in_file: Callable[[str], str]
) -> dict[str, str]:
    """The name in the file -> our name of each parameter.

    Args:
        in_file: our name -> the name that it should have in the file.

    Raises:
        ValueError: names a parameter that is missing, or a tensor that is none.
    """
    with torch.device("meta"):
        model = MDLMBackboneForMaskedDiffusion(config)
    expected = {in_file(name): name for name, _ in model.named_parameters()}
    tied = set(map(in_file, model.all_tied_weights_keys))
    for name in expected:
        if name not in state:
            raise ValueError(f"{name} is missing")
    for name in state:
        if name not in expected and name not in tied and not EXTRA.search(name):
            raise ValueError(f"{name} is not a parameter of {type(model.network).__name__}")
    return expected


def mask_token_beside(folder: Path) -> int | None:
    """The id of the mask token of the tokenizer in a folder, read from its files alone; None where they do not say."""
    settings = folder / "tokenizer_config.json"
    token = read_object(settings).get("mask_token") if settings.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    for number, added in read_object(settings).get("added_tokens_decoder", {}).items():
        if added.get("content") == token:
            return int(number)
    file = folder / "tokenizer.json"
    content = read_object(file) if file.is_file() else {}
    for added in content.get("added_tokens", []):
        if added.get("content") == token:
            return added["id"]
    return None


def save_native(model: MDLMBackboneForMaskedDiffusion, folder: Path):
    """Writes the network as a folder of its own class: plain transformers loads it, and so does `load_model`."""
    config = model.config
    entry = {name: getattr(config, name) for name in ("mask_token_id", "logits_shift", "max_position_embeddings")}
    entry |= in_blocks(config.block_size)
    options = {name: getattr(model.generation_config, name) for name in DEFAULTS}
    entry["generation"] = {name: value for name, value in options.items() if value is not None}
    model.network.save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {ENTRY: entry}
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


__all__ = ["is_backbone", "read_backbone", "save_native"]
