"""LoRA: a student whose base stays as it is, and teachers and averages that share it.

`with_adapter` gives a network a trainable adapter. What follows such a student (`AdapterFollower`) has modules of its own
around the student's own frozen parameters, and beside them an adapter of a few megabytes. So the base is in memory once, the
student's adapter is never switched off or exchanged, and a teacher's forward between the student's and `backward` is
harmless: with PEFT's own switching, an adapter that is not switched back in time trains nothing and says nothing.
"""

import copy
import dataclasses

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available

from trainers.sharding import parameters_of, shard
from trainers.teacher import Follower, gather_for_forwards, saved_weights


if is_peft_available():
    from peft import LoraConfig, PeftModel, PeftType, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists


# The linear layers of our network that the text passes through. Its modulations depend on the noise level alone.
OUR_TARGETS = ["qkv_proj", "o_proj", "up_proj", "down_proj"]
# What of a LoraConfig may differ from its default. Other fields train more than two factors, change the base, or need a
# forward of their own.
FREE = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights", "inference_mode"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
)
RESERVED = ("teacher", "ema")  # folders of a checkpoint


def is_adapted(model: nn.Module) -> bool:
    """Whether a network is a `PeftModel`."""
    return is_peft_available() and isinstance(model, PeftModel)


def with_adapter(model: nn.Module, config: "LoraConfig | None", seed: int = 0) -> nn.Module:
    """The network with a fresh adapter, in a `PeftModel`; without a configuration the network as it is.

    The linear layers are wrapped in place. The factor A is drawn from the seed alone, and B is zero: at first the adapter
    changes nothing.

    Args:
        model: a network, or a `PeftModel` with one trainable LoRA adapter.
        config: the adapter's; `target_modules` None stands for `default_targets`.

    Raises:
        ValueError: names what cannot be trained so, before anything is changed.
    """
    if is_adapted(model):
        if config is not None:
            raise ValueError("peft_config is given, but the model has an adapter already: leave one of them out")
        check_adapters(model)
    elif is_peft_available() and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model holds an adapter without being a PeftModel: load it by PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)"
        )
    if config is None:
        return model
    check_config(config, model)
    config = copy.copy(config)
    if config.target_modules is None:
        config.target_modules = default_targets(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def default_targets(model: nn.Module) -> list[str]:
    """The last parts of the names of the layers that get an adapter: all linear ones of the trunk, for our own network
    without those that see the noise level alone.
    """
    if not hasattr(model.config, "backbone_config"):
        return OUR_TARGETS
    layers = model.network.base_model.named_modules()
    return sorted({name.rpartition(".")[2] for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)})


def check_adapters(model: "PeftModel"):
    """Raises ValueError unless a `PeftModel` has one adapter, called "default", trainable, and of a kind that we train."""
    names = list(model.peft_config)
    if names != ["default"]:
        reserved = [name for name in names if name in RESERVED]
        reason = f"; {reserved[0]!r} is a name of ours, in checkpoints" if reserved else ""
        raise ValueError(f"the model's adapters are {names}, but there must be one, called 'default'{reason}")
    check_config(model.peft_config["default"], model.get_base_model())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the model's adapter is frozen: load it with is_trainable=True")
    for name in trained:
        if ".lora_A." not in name and ".lora_B." not in name:
            raise ValueError(f"the model trains {name!r} beside its adapter: freeze it, only the adapter is saved")


def check_config(config: "LoraConfig", model: nn.Module):
    """Raises ValueError, naming the field and its value, for an adapter that cannot be trained here."""
    if getattr(config, "peft_type", None) != PeftType.LORA:
        kind = getattr(getattr(config, "peft_type", None), "value", type(config).__name__)
        raise ValueError(f"the adapter is of the type {kind}, but only LORA can be trained here: give a LoraConfig")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout is {config.lora_dropout}, but must be 0: the teacher would be compared with a student that is "
            "never handed on"
        )
    if config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f"init_lora_weights is {config.init_lora_weights!r}, but must be True or 'gaussian': the base without its adapter "
            "is the first teacher, and a new adapter must not change it"
        )
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(plain, field.name, None)
        if field.name not in FREE and value != default:
            raise ValueError(
                f"{field.name} is {value!r}, but must be {default!r}: only the factors A and B are trained"
            )
    layers = {"head": model.get_output_embeddings(), "embeddings": model.get_input_embeddings()}
    for what, layer in layers.items():
        names = [name for name, module in model.named_modules() if module is layer]
        targeted = config.target_modules is not None and any(check_target_module_exists(config, n) for n in names)
        if targeted or isinstance(layer, BaseTunerLayer):
            raise ValueError(
                f"target_modules names the {what} ({', '.join(names)}), which can have no adapter: losses are computed from "
                "hidden rows and the weights of the head itself"
            )


class AdapterFollower(Follower):
    """Follows a student with an adapter: by an adapter of its own, on the student's frozen base.

    Only the adapter is copied, saved and loaded.

    Args:
        student: a `PeftModel` (`with_adapter`), not yet wrapped for several processes.
        off: begin without an adapter, so as the base alone; the first `follow` gives it one.
    """

    in_parts = False  # the adapter is complete on every rank

    def __init__(self, student: "PeftModel", off: bool = False):
        shared = {id(parameter): parameter for parameter in student.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(student, shared).requires_grad_(False).eval()
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self.spare: list[tuple[nn.Module, nn.Module]] = []  # the adapter's shape, on the meta device, while it is off
        if off:
            self.turn_off()
        gather_for_forwards(self.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if ".lora_A." in name or ".lora_B." in name}

    def to(self, device: torch.device) -> "AdapterFollower":
        """Moves what is not the student's: the Trainer moves the rest."""
        for module in self.model.modules():
            module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
        for parameter in self.parameters().values():
            parameter.data = parameter.data.to(device)
        return self

    def shard(self, student: "PeftModel", accelerator):
        """Divides the base, and then takes the student's parts of it. The adapter stays complete on every rank."""
        adapters = [(layer.lora_A, layer.lora_B) for layer in self.layers]
        for layer in self.layers:
            layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
        shard(self.model, accelerator)
        theirs = parameters_of(student)
        for name, module in self.model.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    setattr(module, key, theirs[f"{name}.{key}"])
        for layer, (factor_a, factor_b) in zip(self.layers, adapters, strict=True):
            layer.lora_A, layer.lora_B = factor_a, factor_b
        self.to(accelerator.device)

    def turn_off(self):
        """Takes the adapter out: the network is the base, and computes and holds nothing else."""
        for layer in self.layers:
            self.spare.append((layer.lora_A.to("meta"), layer.lora_B.to("meta")))
            layer.lora_A, layer.lora_B, layer._disable_adapters = nn.ModuleDict(), nn.ModuleDict(), True

    def turn_on(self, device: torch.device):
        """Puts the adapter back in; its values are not yet set."""
        for layer, (factor_a, factor_b) in zip(self.layers, self.spare, strict=True):
            layer.lora_A, layer.lora_B = factor_a.to_empty(device=device), factor_b.to_empty(device=device)
            layer._disable_adapters = False
        self.spare = []

    @torch.no_grad()
    def follow(self, student: nn.Module, weight: float = 1.0):
        if self.spare:
            self.turn_on(student.device)
            super().follow(student)
            for name, parameter in self.parameters().items():
                if ".lora_B." in name:
                    parameter.zero_()  # B = 0 is the base, which it was until now
        super().follow(student, weight)

    @torch.no_grad()
    def load(self, folder: str):
        saved = saved_weights(folder)
        if self.spare and saved:
            self.turn_on(self.model.device)
        elif not self.spare and not saved:
            self.turn_off()
        self.set(saved, folder)


def follower_of(student: nn.Module, waits: bool = False) -> Follower:
    """A follower of the student's kind: a float32 copy of the network (`waits`: see there), or of its adapter alone."""
    return AdapterFollower(student) if is_adapted(student) else Follower(student, waits=waits)
