"""Going on from a checkpoint of another launch: under DDP from FSDP2's, under FSDP2 from DDP's or from its own other format.

Student and optimizer are read as complete tensors, whatever wrote them, and each process takes its part of each. Teacher, EMA
and all else are the same files in every format. DeepSpeed's optimizer can be read by DeepSpeed alone, in as many processes.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from trainers.sharding import WRAPPERS, cut, part_of


PLAIN, COMPLETE, PARTS, ZERO = "no FSDP", "FSDP2 with FULL_STATE_DICT", "FSDP2 with SHARDED_STATE_DICT", "DeepSpeed"
# What a checkpoint of each format holds, and no other one.
SIGNS = {PLAIN: "optimizer.pt", COMPLETE: "optimizer.bin", PARTS: "optimizer_0", ZERO: "latest"}


def format_of(folder: Path) -> str | None:
    """The format of a checkpoint: under which kind of launch it was written."""
    return next((name for name, sign in SIGNS.items() if (folder / sign).exists()), None)


def own_format(trainer: Trainer) -> str:
    """The format of the checkpoints that a trainer writes."""
    if trainer.is_deepspeed_enabled:
        return ZERO
    if not trainer.is_fsdp_enabled:
        return PLAIN
    return COMPLETE if "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type) else PARTS


def check_launch(folder: Path, trainer: Trainer):
    """Raises ValueError, with the reason, if a trainer cannot go on from a checkpoint of this launch."""
    written, own = format_of(folder), own_format(trainer)
    then, now = len(list(folder.glob("rng_state*.pth"))), trainer.args.world_size
    fault = None
    if ZERO in (written, own) and written != own:
        fault = f"it was written under {written}, and this launch has {own}: nothing else reads or writes DeepSpeed's optimizer"
    elif own == ZERO and then != now:
        fault = f"DeepSpeed has saved its optimizer in {then} pieces, one for each process, and now there are {now}"
    elif own == ZERO and any(folder.glob("*/zero_pp_rank_0_*model_states.pt")) != is_deepspeed_zero3_enabled():
        was, now = ("another stage", "ZeRO-3") if is_deepspeed_zero3_enabled() else ("ZeRO-3", "another stage")
        fault = f"DeepSpeed has written it under {was}, and this launch has {now}"
    elif written != own and trainer.args.load_best_model_at_end:
        fault = f"it was written under {written}, this launch has {own}, and load_best_model_at_end needs one for all checkpoints"
    if fault is not None:
        raise ValueError(f"cannot resume from {folder}: {fault}; start as it was started")


# --- Reading


def read_parts(folder: Path) -> dict:
    """What torch.distributed.checkpoint has written in parts, as complete tensors."""
    content: dict = {}
    _load_state_dict(content, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return content


@torch.no_grad()
def load_weights(network: nn.Module, folder: Path):
    """Takes the student's weights, or its adapter's, from a checkpoint of any format but DeepSpeed's.

    Raises:
        ValueError: a trained parameter is not there.
    """
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")]
    if files:
        saved = {name: value for file in files for name, value in load_file(file).items()}
    else:
        saved = read_parts(folder / "pytorch_model_fsdp_0")["model"]
    found = set()
    for name, parameter in network.named_parameters(
        remove_duplicate=False
    ):  # a tied one is saved under one of its names
        name = WRAPPERS.sub("", name).replace(".default.", ".")  # PEFT leaves the name of the adapter out
        if name in saved:
            part_of(parameter).copy_(cut(saved[name], parameter))
            found.add(id(parameter))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and id(parameter) not in found:
            raise ValueError(f"{folder} holds another network: {name!r} does not match")


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path):
    """Takes an optimizer's state from a checkpoint of any format but DeepSpeed's."""
    if (folder / SIGNS[PLAIN]).exists():
        state = torch.load(folder / SIGNS[PLAIN], map_location="cpu", weights_only=True)
    elif (folder / SIGNS[COMPLETE]).exists():
        state = numbered(torch.load(folder / SIGNS[COMPLETE], map_location="cpu", weights_only=True))
    else:
        state = numbered(read_parts(folder / SIGNS[PARTS])["optimizer"])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        for name, value in values.items():
            if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                place = parameter.device_mesh, parameter.placements
                values[name] = distribute_tensor(value.to(parameter.device), *place, src_data_rank=None)
    optimizer.load_state_dict(state)


def numbered(state: dict) -> dict:
    """The state of an optimizer whose parameters have names, as one whose parameters have numbers, in the same order."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: values for name, values in state["state"].items()}, "param_groups": groups}
