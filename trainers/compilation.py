"""`torch_compile`: the trunk is compiled in place, and what changes from step to step stays outside.

accelerate would compile the complete network. The rows that the head is given are as many as the noise says: they break the graph,
and their number is another one in each step. And a teacher, which the Trainer does not know, would not be compiled at all.
"""

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trainers.step_meter import trunk_of


def take_compile_options(accelerator: Accelerator) -> dict | None:
    """The options of `torch.compile` that the run was started with, of which accelerate then knows nothing; None: no compilation.

    Raises:
        ValueError: the launch gathers weights within the trunk.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    if fsdp or is_deepspeed_zero3_enabled():
        raise ValueError(
            f"torch_compile is true, but {'FSDP2' if fsdp else 'ZeRO-3'} gathers weights between the layers of the trunk, which is one "
            "graph: leave it out"
        )
    options = {name: getattr(plugin, name) for name in ("mode", "fullgraph", "dynamic", "options", "disable")}
    options["backend"], plugin.backend = plugin.backend.value.lower(), DynamoBackend.NO
    return options


def compile_trunk(model: nn.Module, options: dict):
    """Compiles the trunk of a network in place: its names and its class stay as they are.

    Args:
        options: of `torch.compile`.
    """
    trunk_of(model).compile(**options)
