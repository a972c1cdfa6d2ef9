"""Networks that follow the student without a gradient: the teacher (a snapshot or an EMA) and the student's own EMA."""

import contextlib
import copy
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trainers.sharding import (
    complete,
    cut,
    fill_parts,
    full_weights,
    is_divided,
    is_partitioned,
    like,
    parameters_of,
    part_of,
    partitioned,
    shard,
    skeleton_of,
)


def gather_for_forwards(model: nn.Module):
    """Under ZeRO-3, makes each module of a network gather its own parameters for its forward, and give them back after it.

    For a network outside of DeepSpeed's engine. The network itself gathers its head's, which it hands on in `HeadRows`: what
    is gathered then lives as long as those.
    """
    if is_deepspeed_zero3_enabled():
        # Not those that are there already: for an outer module, or because they are small.
        _open_for_forwards(model, lambda own: full_weights(p for p in own if is_partitioned(p) and not p.numel()))


def bring_for_forwards(model: nn.Module, device: torch.device):
    """Moves a network into main memory, and makes each of its modules copy its own parameters to a device for its forward.

    Buffers stay on the device, and the network itself brings its head's parameters, as in `gather_for_forwards`.
    """
    model.to("cpu")
    for module in model.modules():
        module._buffers.update({name: b if b is None else b.to(device) for name, b in module._buffers.items()})
    _open_for_forwards(model, _Bringing(device))


class _Bringing:
    def __init__(self, device: torch.device):
        self.device, self.there = device, set()

    @contextlib.contextmanager
    def __call__(self, parameters: list[nn.Parameter]):
        missing = {p: p.data for p in parameters if p.is_cpu and p not in self.there}
        for parameter, value in missing.items():
            parameter.data = value.to(self.device, copy=True)
        self.there |= missing.keys()
        try:
            yield
        finally:
            for parameter, value in missing.items():
                parameter.data = value
            self.there -= missing.keys()


def _open_for_forwards(model: nn.Module, context: Callable[[list[nn.Parameter]], AbstractContextManager]):
    """Opens a context with each module's own parameters for its forward; for that of the network itself with its head's too."""
    head = list(model.get_output_embeddings().parameters())
    for module in model.modules():
        parameters = list(module.parameters(recurse=False)) + (head if module is model else [])
        if parameters:
            opened = _Opened(parameters, context)
            module.register_forward_pre_hook(opened.begin)
            module.register_forward_hook(opened.end, always_call=True)


class _Opened:
    def __init__(self, parameters: list[nn.Parameter], context: Callable):
        self.parameters, self.context, self.open = parameters, context, []

    def begin(self, *of_hook):
        self.open.append(self.context(self.parameters))
        self.open[-1].__enter__()

    def end(self, *of_hook):
        self.open.pop().__exit__(None, None, None)


def saved_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """What `Follower.save` has written in one process or in several: name -> complete tensor, mapped from its file."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


class Follower:
    """A frozen copy of a network that can be moved towards the student's weights.

    It is divided like the student, under ZeRO-3 from the start and under FSDP2 from `shard` on, so that following needs no
    communication. It is a companion (`trainers.exact_resume.Companion`): every checkpoint holds it, as complete tensors, which
    any launch can load.

    Args:
        model: the network to copy.
        dtype: the copy's dtype.
        waits: whether it gets no weights until `shard`, and then the student's. For FSDP2: it is never complete then.
    """

    waits = False

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, waits: bool = False):
        self.in_parts, self.waits = is_deepspeed_zero3_enabled(), waits
        if self.in_parts:
            self.model = partitioned(model, dtype)
            self.follow(model)
            gather_for_forwards(self.model)
        else:
            self.model = (skeleton_of(model) if waits else copy.deepcopy(model)).to(dtype)
        self.model.requires_grad_(False).eval()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that follows, and that a checkpoint holds."""
        return parameters_of(self.model)

    def to(self, device: torch.device) -> "Follower":
        if not (self.in_parts or self.waits):
            self.model.to(device)
        return self

    def stay(self, device: torch.device) -> "Follower":
        """Keeps the copy in main memory. It is followed there, and its forward, module by module, is on the device."""
        bring_for_forwards(self.model, device)
        return self

    def shard(self, student: nn.Module, accelerator):
        """Divides the copy as FSDP2 has divided the student. Called in every process, before a checkpoint is loaded."""
        shard(self.model, accelerator)
        self.in_parts = True
        if self.waits:
            fill_parts(self.model, accelerator.device)
            self.follow(student)
            self.waits = False

    @torch.no_grad()
    def follow(self, student: nn.Module, weight: float = 1.0):
        """Moves every parameter the fraction `weight` of the way to the student's; 1 copies it."""
        own = self.parameters()
        source = {name: parameter for name, parameter in parameters_of(student).items() if name in own}
        with full_weights(theirs for name, theirs in source.items() if not is_divided(own[name])):  # adapters
            for name, parameter in own.items():
                part, value = part_of(parameter), like(parameter, source[name])
                part.copy_(value) if weight == 1 else part.lerp_(value.to(part), weight)

    @torch.no_grad()
    def save(self, folder: str):
        """Creates a folder and writes the parameters there. If they are divided, each process writes its share of them."""
        rank, size = (distributed.get_rank(), distributed.get_world_size()) if self.in_parts else (0, 1)
        state = {}
        for i, (name, parameter) in enumerate(self.parameters().items()):
            value = complete(parameter)  # one at a time
            if i % size == rank:
                state[name] = value.cpu().contiguous()
        os.makedirs(folder, exist_ok=True)
        file = f"model-{rank + 1:05d}-of-{size:05d}.safetensors" if self.in_parts else "model.safetensors"
        save_file(state, os.path.join(folder, file))

    def load(self, folder: str):
        self.set(saved_weights(folder), folder)

    @torch.no_grad()
    def set(self, saved: Mapping[str, torch.Tensor], folder: str):
        parameters = self.parameters()
        if saved.keys() != parameters.keys():
            raise ValueError(
                f"{folder} holds another network: {sorted(saved.keys() ^ parameters.keys())[0]!r} does not match"
            )
        for name, parameter in parameters.items():
            part_of(parameter).copy_(cut(saved[name], parameter))


def ema_weight(decay: float, updates: int) -> float:
    """The student's weight in an EMA with MDLM's warm-up: 1 - min(decay, (1 + n) / (10 + n)) after n updates."""
    return 1 - min(decay, (1 + updates) / (10 + updates))


class EMACallback(TrainerCallback):
    """Updates the exponential moving average of the student after every step."""

    def __init__(self, follower: Follower, decay: float):
        self.follower, self.decay = follower, decay

    def on_step_end(self, args, state, control, model, **kwargs):
        self.follower.follow(model, ema_weight(self.decay, state.global_step - 1))


class TeacherCallback(TrainerCallback):
    """Updates the teacher: to a snapshot of the student at the start of each round; with a decay, to its EMA at every step."""

    def __init__(self, teacher: Follower, decay: float | None = None):
        self.teacher, self.decay = teacher, decay

    def on_step_end(self, args, state, control, model, **kwargs):
        if self.decay is not None:
            self.teacher.follow(model, 1 - self.decay)
        elif state.global_step % args.steps_per_round == 0:
            self.teacher.follow(model)
