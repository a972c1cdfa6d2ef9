"""LoRA adapters on the disk: what an adapter folder of PEFT says, and its factors multiplied out into the weights of its base."""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from .files import read_object


ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<which>[AB])\.weight")
# What an adapter may do beside adding B A to a weight, and the values under which it does not.
ELSE = {
    **dict.fromkeys(("use_dora", "lora_bias", "modules_to_save", "alpha_pattern"), (None, False, {}, [])),
    "bias": (None, "none"),
}


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base that an adapter folder names, and its revision.

    Raises:
        ValueError: it names none, or itself.
    """
    settings = read_object(folder / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"its {ADAPTER_CONFIG} does not name the base: write base_model_name_or_path into it")
    if Path(base).resolve() == folder.resolve():
        raise ValueError(f"its {ADAPTER_CONFIG} names the adapter's own folder as its base")
    return base, settings.get("revision")


def merged_weights(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights W of a base with those that an adapter changes replaced by W + s B A, computed in float32.

    s is alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv 2312.03732).

    Args:
        folder: the adapter's.
        weights: the base's, by our names; not changed.

    Raises:
        ValueError: the adapter is of another kind than LoRA, does more than that, or does not fit the base.
    """
    settings, factors = read_object(folder / ADAPTER_CONFIG), load_file(folder / ADAPTER)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"its adapter is of the type {settings.get('peft_type')!r}, and only LORA can be used")
    for name, plain in ELSE.items():
        if settings.get(name) not in plain:
            raise ValueError(f"its {ADAPTER_CONFIG} has {name} {settings[name]!r}, which cannot be merged into a base")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, factor in factors.items():
        found = FACTOR.fullmatch(key)
        if found is None:
            raise ValueError(f"{key} in its {ADAPTER} is not a factor of LoRA")
        pairs.setdefault(f"{found['layer']}.weight", {})[found["which"]] = factor
    merged = dict(weights)
    for name, pair in pairs.items():
        if name not in weights or len(pair) < 2:
            raise ValueError(
                f"the base has no {name}" if name not in weights else f"the adapter of {name} is incomplete"
            )
        rank = len(pair["A"])
        scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        change = scale * (pair["B"].float() @ pair["A"].float())
        change = change.T if settings.get("fan_in_fan_out") else change
        if change.shape != weights[name].shape:
            shapes = tuple(change.shape), tuple(weights[name].shape)
            raise ValueError(f"the adapter of {name} is for the shape {shapes[0]}, but the base's is {shapes[1]}")
        merged[name] = weights[name].float() + change
    return merged
