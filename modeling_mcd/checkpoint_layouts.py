"""The layouts in which MDLM, SDTT and Duo publish the network of the family, and how their names and settings map to ours.

All hold the diffusion transformer of MDLM (arXiv 2406.07524). They differ in the prefix of the parameters' names and in the
content of config.json. So shapes are taken from the weights, and everything else from the configuration.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from .configuration_mdlm import MDLMConfig
from .modeling_mdlm import MDLMForMaskedDiffusion


logger = logging.get_logger(__name__)

# Published name -> ours, in the order of the published `parameters()`.
BEFORE_BLOCKS = {
    "vocab_embed.embedding": "model.embed_tokens.weight",
    "sigma_map.mlp.0.weight": "model.noise_embedding.in_proj.weight",
    "sigma_map.mlp.0.bias": "model.noise_embedding.in_proj.bias",
    "sigma_map.mlp.2.weight": "model.noise_embedding.out_proj.weight",
    "sigma_map.mlp.2.bias": "model.noise_embedding.out_proj.bias",
}
BLOCK = {
    "norm1.weight": "attention_norm.weight",
    "attn_qkv.weight": "attention.qkv_proj.weight",
    "attn_out.weight": "attention.o_proj.weight",
    "norm2.weight": "mlp_norm.weight",
    "mlp.0.weight": "mlp.up_proj.weight",
    "mlp.0.bias": "mlp.up_proj.bias",
    "mlp.2.weight": "mlp.down_proj.weight",
    "mlp.2.bias": "mlp.down_proj.bias",
    "adaLN_modulation.weight": "modulation.weight",
    "adaLN_modulation.bias": "modulation.bias",
}
AFTER_BLOCKS = {
    "output_layer.norm_final.weight": "model.norm.weight",
    "output_layer.linear.weight": "lm_head.weight",
    "output_layer.linear.bias": "lm_head.bias",
    "output_layer.adaLN_modulation.weight": "model.norm_modulation.weight",
    "output_layer.adaLN_modulation.bias": "model.norm_modulation.bias",
}
ROTARY_BUFFER = "rotary_emb.inv_freq"  # in every published file; our network computes it
WRAPPERS = ("backbone.", "module.", "_orig_mod.")  # Lightning and MDLM's class, DistributedDataParallel, torch.compile

UNIFORM_ALGORITHMS = ("duo", "duo_base", "distillation")  # names of Duo's runs on uniform noise
# [MASK] is the last token except in two vocabularies: bert-base-uncased and text8.
MASK_TOKEN_IDS = {30522: 103, 35: 4}
# Fields that only our configuration has. They are written into a published config.json too, where the authors' code ignores
# them, so that converting back is exact.
OWN_SETTINGS = (
    *("diffusion_kind", "noise_schedule", "noise_epsilon"),
    *("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def parameter_names(blocks: int) -> dict[str, str]:
    """Published name -> our name, in the order of the published `parameters()`, which is also the order of an EMA."""
    inside = {
        f"blocks.{i}.{theirs}": f"model.layers.{i}.{ours}" for i in range(blocks) for theirs, ours in BLOCK.items()
    }
    return BEFORE_BLOCKS | inside | AFTER_BLOCKS


def count_blocks(state: Mapping) -> int:
    return len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})


def published_config(
    settings: Mapping, state: dict[str, torch.Tensor], frequencies: torch.Tensor | None, diffusion_kind: str | None
) -> MDLMConfig:
    """Shapes as the weights have them, the rest as the settings say.

    Args:
        settings: a config.json of MDLM or Duo, or the settings of a run (SDTT, Lightning); may be empty.
        state: tensors by published name, every one there.
        frequencies: the rotary buffer, which knows the width of a head.
        diffusion_kind: wins over the settings.
    """
    # A run's settings are in sections: the network's, and that of the algorithm.
    sections = {name: section for name, section in settings.items() if isinstance(section, Mapping)}
    network, algorithm = sections.get("model", settings), sections.get("algo", {})
    if state["vocab_embed.embedding"].ndim != 2:
        raise ValueError(
            f"vocab_embed.embedding has the shape {tuple(state['vocab_embed.embedding'].shape)}, not (V, d)"
        )
    vocab_size, hidden_size = state["vocab_embed.embedding"].shape
    known = frequencies is not None and frequencies.numel() > 0
    heads = hidden_size // (2 * frequencies.numel()) if known else network.get("n_heads")
    if heads is None:
        raise ValueError(f"neither {ROTARY_BUFFER} nor a config.json beside it says how many heads (n_heads) it has")
    found = {
        "vocab_size": vocab_size,
        "hidden_dim": hidden_size,
        "hidden_size": hidden_size,
        "n_blocks": count_blocks(state),
        "n_heads": heads,
        "cond_dim": len(state["sigma_map.mlp.0.bias"]),
    }
    for key, value in found.items():
        if network.get(key, value) != value:
            raise ValueError(f"its configuration says {key} = {network.get(key)}, but in the weights it is {value}")
    if not settings and diffusion_kind is None:
        logger.warning("nothing says which diffusion the weights are for: taken for absorbing (--kind uniform if not)")
    own = {name: settings[name] for name in OWN_SETTINGS if settings.get(name) is not None}
    is_duo = str(settings.get("model_type")).lower() == "duo" or algorithm.get("name") in UNIFORM_ALGORITHMS
    said = own.get("diffusion_kind") or ("uniform" if is_duo else None)
    if None not in (said, diffusion_kind) and said != diffusion_kind:
        raise ValueError(f"its configuration says {said!r} diffusion, not {diffusion_kind!r}")
    kind = said or diffusion_kind or "absorbing"
    mask_token_id = MASK_TOKEN_IDS.get(vocab_size) if kind == "absorbing" else None
    return MDLMConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=found["n_blocks"],
        num_attention_heads=heads,
        conditioning_size=found["cond_dim"],
        max_position_embeddings=network.get("model_length", network.get("length", 1024)),
        hidden_dropout=network.get("dropout", 0.1),
        time_conditioning=settings.get("time_conditioning", algorithm.get("time_conditioning")),
        **{"mask_token_id": mask_token_id} | own | {"diffusion_kind": kind},
    )


def save_published(model: MDLMForMaskedDiffusion, folder: Path, layout: str):
    """Writes model.safetensors and config.json in a published layout ("mdlm", "sdtt" or "duo").

    Raises:
        ValueError: the code of the layout would run another network, or is for another kind of noise.
    """
    config = model.config
    kind = "uniform" if layout == "duo" else "absorbing"
    if config.diffusion_kind != kind:
        raise ValueError(
            f"diffusion_kind is {config.diffusion_kind!r}, but the code of the {layout} layout is for {kind} diffusion"
        )
    built_in = {"intermediate_size": 4 * config.hidden_size, "layer_norm_eps": 1e-5, "rope_theta": 10000.0}
    for name, value in built_in.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name} is {getattr(config, name)}, but the code of the {layout} layout has {value} built in: only "
                "our own layout can hold this model"
            )
    weights = model.state_dict()
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()  # the published head is not tied
    state = {f"backbone.{name}": weights[ours] for name, ours in parameter_names(config.num_hidden_layers).items()}
    head_dim = config.hidden_size // config.num_attention_heads
    state[f"backbone.{ROTARY_BUFFER}"] = 1 / config.rope_theta ** (torch.arange(0, head_dim, 2) / head_dim)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.dumps(published_settings(config, layout), indent=2)
    (folder / "config.json").write_text(settings + "\n", encoding="utf-8")


def published_settings(config: MDLMConfig, layout: str) -> dict:
    """The config.json of a published layout."""
    own = {name: getattr(config, name) for name in OWN_SETTINGS if getattr(config, name) is not None}
    own["time_conditioning"] = config.time_conditioning
    network = {
        "n_blocks": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "cond_dim": config.conditioning_size,
        "dropout": config.hidden_dropout,
    }
    if layout == "sdtt":
        network |= {"hidden_size": config.hidden_size, "length": config.max_position_embeddings}
        network |= {"scale_by_sigma": True, "type": "ddit-orig"}
        return {
            "model": network,
            "tokenizer": {"name": "gpt2"},
            "parameterization": {"name": "multi-round-sdtt"},
        } | own
    network |= {"vocab_size": config.vocab_size, "hidden_dim": config.hidden_size}
    network |= {"model_length": config.max_position_embeddings}
    if layout == "duo":
        return {"model_type": "DUO", "architectures": ["DUO"], "causal": False, "var_min": True} | network | own
    code = {
        "AutoConfig": "kuleshov-group/mdlm-owt--configuration_mdlm.MDLMConfig",
        "AutoModelForMaskedLM": "kuleshov-group/mdlm-owt--modeling_mdlm.MDLM",
    }
    return {"model_type": "mdlm", "architectures": ["MDLM"], "auto_map": code, "return_dict": False} | network | own
