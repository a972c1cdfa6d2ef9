"""The adapter (LoRA) of a recipe: its options, how its base is loaded, and how what was trained is saved."""

import copy
import importlib.util
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_peft_available

from modeling_mcd.checks_mdlm import AT_LEAST_1, POSITIVE, check_numbers
from modeling_mcd.loading import load_model
from trainers.adapters import is_adapted


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class AdapterArguments:
    """With `lora_r`, a low-rank adapter is trained and the network's own weights stay as they are, see docs/lora.md.

    Raises:
        ValueError: a value is out of range, an option is given without `lora_r`, or a package is missing; names the field.
    """

    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapter (LoRA); null: train all weights."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The adapter is scaled by lora_alpha / lora_r; null: by 1."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get one, by name; null: those of the trunk."}
    )
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout of the adapter: only 0 is possible."})
    use_rslora: bool | None = field(
        default=None, metadata={"help": "Scale by lora_alpha / sqrt(lora_r) (arXiv 2312.03732)."}
    )
    base_dtype: Literal[tuple(DTYPES)] | None = field(
        default=None, metadata={"help": "Of the base's weights; null: float32."}
    )
    load_in_4bit: bool | None = field(
        default=None, metadata={"help": "Keep the base in 4 bits (nf4); needs bitsandbytes."}
    )
    merge_adapters: bool | None = field(
        default=None,
        metadata={"help": "Save complete networks, too, with the adapter multiplied out."},
    )

    def __post_init__(self):
        check_numbers(self, lora_r=AT_LEAST_1, lora_alpha=POSITIVE)
        if self.lora_r is None:
            for option in fields(self):
                if getattr(self, option.name):
                    raise ValueError(
                        f"{option.name} is {getattr(self, option.name)!r}, but there is no adapter: give lora_r too, or leave "
                        "it out"
                    )
            return
        if not is_peft_available():
            raise ValueError(f"lora_r is {self.lora_r}, but needs the package peft: install it, or leave lora_r out")
        if self.lora_dropout:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, but must be 0: see docs/lora.md")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("load_in_4bit is true, but needs the package bitsandbytes: install it, or leave it out")
        if self.load_in_4bit and self.merge_adapters:
            raise ValueError(
                "merge_adapters is true, but a base of 4 bits would round what is merged: leave it out, and merge afterwards "
                "with mcd-convert"
            )

    def config(self):
        """The `LoraConfig` of the trainer's `peft_config`; None without `lora_r`."""
        if self.lora_r is None:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_r if self.lora_alpha is None else self.lora_alpha,
            target_modules=self.lora_target_modules,
            lora_dropout=0.0,
            use_rslora=bool(self.use_rslora),
        )

    def load_base(self, source: str, **options) -> PreTrainedModel:
        """`load_model`, in the precision that these options say."""
        if self.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        return load_model(source, DTYPES[self.base_dtype or "float32"], **options)

    def about(self, base: str | None) -> dict:
        """What the model card says of the base, the network that an adapter or a student starts from."""
        on_hub = None if base is None or Path(base).exists() else base.partition("@")[0]
        if self.lora_r is None:
            return {} if on_hub is None else {"base_model": on_hub, "base_model_relation": "finetune"}
        return {"base_model": on_hub, "base_model_relation": "finetune" if self.merge_adapters else "adapter"}


def save_network(model: PreTrainedModel, folder: Path, base: str | None = None, merge: bool = False):
    """Saves a network as a repository folder; one with an adapter as the adapter alone.

    Args:
        base: where the adapter's base was loaded from.
        merge: save the network with the adapter multiplied out, and the adapter in the subfolder `adapter`.
    """
    if not is_adapted(model):
        model.save_pretrained(folder)
        return
    place = folder / "adapter" if merge else folder
    config = model.peft_config["default"]
    if base is not None:
        name, _, config.revision = (base, None, None) if Path(base).exists() else base.partition("@")
        config.base_model_name_or_path = os.path.relpath(name) if Path(name).is_relative_to(Path.cwd()) else name
        config.revision = config.revision or None
    model.save_pretrained(place, save_embedding_layers=False)
    (place / "README.md").unlink()  # PEFT's card: ours is made from the report
    if merge:
        copy.deepcopy(model).merge_and_unload().save_pretrained(folder)
