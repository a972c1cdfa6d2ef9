"""Networks whose weights FSDP2 divides among the processes of a launch.

Under FSDP2 every process holds a part of each parameter (a `DTensor`), and a module's parameters are complete only while it
runs. accelerate divides the student; `shard` divides what follows it in the same way, so that both can be compared part by part,
without any communication.

Every function that completes weights is called in all processes, together.
"""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


# What recomputed activations and compilation add to the names of parameters.
WRAPPERS = re.compile(r"(?<![^.])(_checkpoint_wrapped_module|_orig_mod)\.")


# --- Parameters


def full_weights(parameters: Iterable[nn.Parameter]):
    """A context in which parameters that ZeRO-3 has partitioned are gathered on every rank. Others need nothing."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def parameters_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, in the parts that this process holds. The names are those without any wrapper around a layer."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward some are still complete
    return {WRAPPERS.sub("", name): parameter for name, parameter in network.named_parameters()}


def part_of(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter this process holds, to be read and written: all of it if FSDP2 does not divide it."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def cut(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Of a value that is complete in every process, the part that corresponds to `part_of` a parameter."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None).to_local()


def complete(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter as one tensor, in every process. One that ZeRO-3 divides has to be gathered (`full_weights`)."""
    return parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def like(parameter: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The values of another parameter of this shape, of which this process holds what it holds of this one.

    Two that are divided in the same way need no communication.
    """
    return part_of(other) if isinstance(parameter, DTensor) else complete(other)


# --- Networks


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 divides a network."""
    return isinstance(network, FSDPModule)


def shard(network: nn.Module, accelerator):
    """Divides a frozen network as accelerate divides the student, in place."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, network.requires_grad_(False))
    complete_head(network)
    register_fsdp_forward_method(network, "generate")


def complete_head(network: nn.Module):
    """Makes a network complete its head for its own forward, which hands on the head's parameters (`HeadRows`).

    accelerate puts the head into one unit with the last norm, which completes both. It does not find the norm of a network
    within another one: of a `PeftModel`, or of a wrapped language model.
    """
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    head = network.get_output_embeddings()
    if isinstance(head, FSDPModule):
        inner.register_forward_pre_hook(lambda *of_hook: head.unshard())


def skeleton_of(network: nn.Module) -> nn.Module:
    """A copy of a network, not yet divided, whose parameters have shapes and no values."""
    shapes = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in network.parameters()}
    return copy.deepcopy(network, shapes)


def complete_copy(skeleton: nn.Module, network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a divided network that every process can use for itself, in eval mode.

    Args:
        skeleton: `skeleton_of` the network, or of another one of its kind, before it was divided.
    """
    own, values = parameters_of(network), {}
    for name, parameter in skeleton.named_parameters():
        values[id(parameter)] = nn.Parameter(complete(own[name]).to(device), requires_grad=False)
    return copy.deepcopy(skeleton, values).eval()


@contextlib.contextmanager
def as_own_class(network: nn.Module) -> Iterator[None]:
    """A context in which a divided network has the class that it was built with.

    FSDP2 makes a class of its own, and a repository folder would get the files of torch in which that is defined.
    """
    divided = type(network)
    if is_sharded(network):
        network.__class__ = next(base for base in divided.__bases__ if base is not FSDPModule)
    try:
        yield
    finally:
        network.__class__ = divided
