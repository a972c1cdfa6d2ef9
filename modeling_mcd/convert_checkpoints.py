"""Published MDLM checkpoints under our parameter names, and one loader for every entry point."""

import os

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedConfig

from .configuration_mdlm import MDLMConfig
from .modeling_mdlm import MDLMForMaskedDiffusion


# Published name -> ours, in the order in which the replacements are made.
RENAMING = {
    "vocab_embed.embedding": "model.embed_tokens.weight",
    "sigma_map.mlp.0": "model.noise_embedding.in_proj",
    "sigma_map.mlp.2": "model.noise_embedding.out_proj",
    "output_layer.norm_final": "model.norm",
    "output_layer.adaLN_modulation": "model.norm_modulation",
    "output_layer.linear": "lm_head",
    "blocks.": "model.layers.",
    ".attn_qkv": ".attention.qkv_proj",
    ".attn_out": ".attention.o_proj",
    ".norm1": ".attention_norm",
    ".norm2": ".mlp_norm",
    ".mlp.0": ".mlp.up_proj",
    ".mlp.2": ".mlp.down_proj",
    ".adaLN_modulation": ".modulation",
}


def rename_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published `backbone.*` state dict under our names. The rotary buffer is left out: it is computed."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("backbone.")
        if name == "rotary_emb.inv_freq":
            continue
        for published, ours in RENAMING.items():
            name = name.replace(published, ours)
        renamed[name] = tensor
    return renamed


def load_model(source: str, dtype: torch.dtype = torch.float32) -> MDLMForMaskedDiffusion:
    """Loads one of our models, or a published one in the layout of `kuleshov-group/mdlm-owt`, from a folder or the Hub.

    Raises:
        FileNotFoundError: when there is nothing of that name.
        ValueError: when it is neither, or its weights do not fit its configuration; names the first that does not.
    """
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise FileNotFoundError(f"model {str(source)!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if settings.get("model_type") == MDLMConfig.model_type:
        return AutoModel.from_pretrained(source, dtype=dtype)
    if settings.get("model_type") != "mdlm":
        raise ValueError(
            f"model {source!r} has the model_type {settings.get('model_type')!r}; known are {MDLMConfig.model_type!r} and 'mdlm'"
        )
    config = MDLMConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_dim"],
        num_hidden_layers=settings["n_blocks"],
        num_attention_heads=settings["n_heads"],
        conditioning_size=settings["cond_dim"],
        max_position_embeddings=settings["model_length"],
        hidden_dropout=settings["dropout"],
        time_conditioning=settings["time_conditioning"],
    )
    folder = snapshot_download(source, allow_patterns=["*.safetensors"]) if not os.path.isdir(source) else source
    with torch.device("meta"):
        model = MDLMForMaskedDiffusion(config)
    state = rename_published(load_file(f"{folder}/model.safetensors"))
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ state.keys()):
        raise ValueError(
            f"model {source!r} does not fit its configuration: {name} is {'missing' if name in expected else 'unknown'}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"model {source!r} does not fit its configuration: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )
    return MDLMForMaskedDiffusion.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
