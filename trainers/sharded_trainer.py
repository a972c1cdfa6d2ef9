"""A Trainer whose networks may be divided among the processes, and what of FSDP's settings cannot be used here."""

import os

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from trainers.sharding import (
    as_own_class,
    complete_copy,
    complete_head,
    has_parts,
    is_sharded,
    skeleton_of,
)


def asks_for_fsdp(arguments: TrainingArguments) -> bool:
    """Whether a run is to be divided by FSDP, by its settings or by its launch."""
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_fsdp(arguments: TrainingArguments):
    """Raises ValueError, naming the setting, for a launch with FSDP that would do something else than it says."""
    if not asks_for_fsdp(arguments):
        return
    given = (arguments.fsdp_config or {}) if arguments.fsdp else {}

    def setting(name: str, default: str) -> str:
        return str(given.get(name, default) if arguments.fsdp else os.environ.get(f"FSDP_{name.upper()}", default))

    version = setting("version", "2" if arguments.fsdp else "1")
    if version != "2":
        raise ValueError(f"fsdp_version is {version}, but only 2 is supported: see recipes/accelerate/fsdp2.yaml")
    if setting("cpu_ram_efficient_loading", "false").lower() == "true":
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is true, but the first teacher is needed in every process: set it to false"
        )
    if arguments.save_on_each_node:
        raise ValueError(
            "save_on_each_node is true, but every process writes a part of a checkpoint: give an output_dir that all "
            "machines share, and leave it out"
        )
    refuse_without_accelerator(arguments)


def refuse_without_accelerator(arguments: TrainingArguments):
    """Raises ValueError on a CPU, where accelerate takes DDP and says nothing."""
    if arguments.device.type == "cpu":
        raise ValueError(
            "FSDP needs GPUs (on a CPU it would silently be DDP): use recipes/accelerate/ddp_cpu.yaml, or zero2_cpu.yaml or "
            "zero3_cpu.yaml there to shard optimizer or weights"
        )


class ShardedTrainer(Trainer):
    """A Trainer whose student and followers may be divided by FSDP2.

    Raises:
        ValueError: names what cannot be divided, or a launch that would not divide anything.
    """

    def __init__(self, model, args: TrainingArguments, *arguments, **kwargs):
        if getattr(model, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "the model was loaded with a distributed_config, and could not be resumed: load it without one, and start with "
                "recipes/accelerate/fsdp2.yaml"
            )
        super().__init__(model, args, *arguments, **kwargs)
        if asks_for_fsdp(args):
            if self.accelerator.distributed_type != DistributedType.FSDP:
                raise ValueError(
                    f"FSDP is asked for, but accelerate would run {self.accelerator.distributed_type.value}: start several "
                    "processes on GPUs with `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`"
                )
            if getattr(self.model, "is_quantized", False):
                raise ValueError(
                    "the model is quantised (load_in_4bit), which FSDP cannot divide: take DDP, or leave it out"
                )
        self._skeleton: nn.Module | None = None

    # Not documented in transformers: `_prepare_for_training` (there is no callback between the division of the student and the
    # loading of a checkpoint), `_save` and `_get_grad_norm`.

    def _prepare_for_training(self, *args, **kwargs):
        first = self.is_fsdp_enabled and not is_sharded(self.model)
        if first:
            self._skeleton = skeleton_of(self.model)
            plugin = self.accelerator.state.fsdp_plugin
            if plugin.mixed_precision_policy is not None:
                # accelerate's would round the residual stream, the angles and the sums of gradients too.
                plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=plugin.mixed_precision_policy.param_dtype,
                    reduce_dtype=torch.float32,
                    cast_forward_inputs=False,
                )
        prepared = super()._prepare_for_training(*args, **kwargs)
        if first:
            complete_head(self.model)
            for companion in self.companions.values():
                companion.shard(self.model, self.accelerator)
        return prepared

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        with as_own_class(self.model):
            super()._save(output_dir, state_dict)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm

    def complete(self, network: nn.Module, everywhere: bool = True) -> nn.Module:
        """A network that is not divided: itself if it is none, otherwise a copy in eval mode. Called in all processes, together.

        Args:
            network: under ZeRO-3 none that DeepSpeed trains: a `Follower`'s.
            everywhere: whether every process gets it, on its device; otherwise only the one that saves, in main memory, and the
                others a copy that has no values.
        """
        if not has_parts(network):
            return network
        skeleton = self._skeleton if is_sharded(network) else network
        device = self.args.device if everywhere else torch.device("cpu")
        return complete_copy(skeleton, network, device, everywhere or self.args.should_save)
