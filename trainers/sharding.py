"""Networks whose weights FSDP2 or ZeRO-3 divides among the processes of a launch.

Every process holds a part of each parameter (of a `DTensor` under FSDP2, `ds_tensor` under ZeRO-3), and a module's parameters
are complete only while it runs. accelerate divides the student. What follows it is divided in the same way, by `shard` or
because `partitioned` built it, so that both can be compared part by part, without any communication.

Every function that completes weights is called in all processes, together.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled


# Settings of ZeRO-3, and the values under which a part is just that part of the weights.
PLAIN_PARTS = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
}
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


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 divides a parameter. One that it has not put together just now is empty."""
    return getattr(parameter, "ds_id", None) is not None


def is_divided(parameter: torch.Tensor) -> bool:
    """Whether each process holds a part of a parameter."""
    return isinstance(parameter, DTensor) or is_partitioned(parameter)


def part_of(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter this process holds, to be read and written: all of it if it is not divided.

    ZeRO-3 pads the flattened parameter to parts of equal size.
    """
    if isinstance(parameter, DTensor):
        return parameter.detach().to_local()
    return parameter.ds_tensor if is_partitioned(parameter) else parameter.detach()


def cut(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Of a value that is complete in every process, the part that corresponds to `part_of` a parameter."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None).to_local()
    if not is_partitioned(parameter):
        return value
    size, rank = parameter.ds_tensor.numel(), distributed.get_rank(parameter.ds_process_group)
    part = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))  # the last parts may be short, or empty


def complete(parameter: torch.Tensor) -> torch.Tensor:
    """The values of a parameter as one tensor, in every process."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor()
    if not is_partitioned(parameter) or parameter.numel():  # ZeRO-3 keeps the small ones complete
        return parameter.detach()
    with full_weights([parameter]):
        return parameter.detach().clone()


def like(parameter: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The values of another parameter of this shape, of which this process holds what it holds of this one.

    Two that are divided in the same way need no communication.
    """
    if is_divided(parameter) and is_divided(other):
        return part_of(other)
    return cut(other.detach(), parameter) if is_divided(parameter) else complete(other)


# --- Networks


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP2 divides a network."""
    return isinstance(network, FSDPModule)


def has_parts(network: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 divides a network."""
    return any(map(is_divided, parameters_of(network).values()))


def partitioned(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A new network of this kind that ZeRO-3 divides while it is built. Its weights are not set."""
    import deepspeed
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    config = deepspeed_config()
    zero = config["zero_optimization"]
    for name, plain in PLAIN_PARTS.items():
        if zero.get(name, plain) != plain:
            raise ValueError(
                f"DeepSpeed's {name} is {zero[name]!r}, but teacher and EMA follow the student part by part: leave it out"
            )
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise ValueError(
            "DeepSpeed's offload_param is on nvme, where teacher and EMA cannot follow: take cpu, or leave it out"
        )
    # Not by the argument `dtype`: where half precision is not supported, DeepSpeed takes bfloat16 whatever that says.
    half = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    init = deepspeed.zero.Init(config_dict_or_path=config | half)
    with torch.random.fork_rng(), no_init_weights(), prevent_arange_dtype_change(), init:
        new = type(network)(copy.deepcopy(network.config))
    new.tie_weights()  # which is part of initialising weights
    new.generation_config = copy.deepcopy(network.generation_config)
    return new


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


def fill_parts(network: nn.Module, device: torch.device):
    """Gives memory to the parts of a network that FSDP2 has divided as a skeleton, without any values."""
    buffers = [
        (module, name, b) for module in network.modules() for name, b in module._buffers.items() if b is not None
    ]
    network.to_empty(device=device)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(device)
    network.tie_weights()  # each module got a parameter of its own


def complete_copy(skeleton: nn.Module, network: nn.Module, device: torch.device, here: bool = True) -> nn.Module:
    """A copy of a divided network that a process can use for itself, in eval mode. One parameter after the other is completed.

    Args:
        skeleton: under FSDP2 `skeleton_of` the network, or of another one of its kind, before it was divided; under ZeRO-3
            the network.
        here: whether this process gets the values; otherwise its copy has shapes alone.
    """
    own, values = parameters_of(network), {}
    for name, parameter in skeleton.named_parameters():
        value = complete(own[name])
        value = value.to(device, copy=True) if here else torch.empty_like(value, device="meta")
        values[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(skeleton, values).to(device if here else "meta").eval()


def complete_weights(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and complete value of all that the state of a divided network holds, one after the other, as if it were undivided.

    All of it is divided again meanwhile.
    """
    parameters_of(network)
    for name, value in network.state_dict(keep_vars=True).items():
        yield WRAPPERS.sub("", name), complete(value)


@contextlib.contextmanager
def outer_weights(network: nn.Module, trunk: nn.Module) -> Iterator[Callable[[], None]]:
    """A context in which all that is outside of a divided network's trunk can stay complete, and the embeddings too.

    Yields a function that completes it if it is not. Called in all processes, together.
    """
    embeddings, head = network.get_input_embeddings(), network.get_output_embeddings()
    if not is_sharded(network):
        inside = {id(parameter) for parameter in trunk.parameters()}
        outer = [parameter for parameter in network.parameters() if id(parameter) not in inside]
        outer = [*outer, *embeddings.parameters(), *head.parameters()]
        with full_weights(p for p in outer if is_partitioned(p) and not p.numel()):
            yield lambda: None
        return
    units = [module for module in dict.fromkeys((network, embeddings, head)) if isinstance(module, FSDPModule)]
    # accelerate divides embeddings of their own again after each forward, and the others not.
    apart = isinstance(embeddings, FSDPModule) and embeddings.weight is not head.weight

    def keep():
        for unit in units:
            unit.unshard()

    if apart:
        embeddings.set_reshard_after_forward(False, recurse=False)
    try:
        yield keep
    finally:
        if apart:
            embeddings.set_reshard_after_forward(True, recurse=False)
        parameters_of(network)  # divides all again


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
