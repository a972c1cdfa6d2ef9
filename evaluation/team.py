"""The processes that share the work of one evaluation."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from modeling_mcd.command_line import wait_for_gloo_threads


class Team:
    """One process alone. A team of several has the same members."""

    rank, size = 0, 1

    def share(self, count: int) -> range:
        """Which of `count` samples this process draws and scores; every one falls to exactly one process."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, part) -> list:
        """The part of every process, in order of rank, on every process."""
        return [part]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor on the CPU, of one shape everywhere, over all processes. It may be changed in place."""
        return tensor

    def weights(self, model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """Name and value of all that a model's state holds, one after the other. Called in every process, together."""
        return model.state_dict().items()


ALONE = Team()


class Ranks(Team):
    """All processes of a launch. They exchange their results through a group of their own, on the CPU.

    A group's timeout applies to each of its exchanges, and training wants a short one. Here a process may have to wait for as
    long as another one judges, so this group has the longest timeout that gloo can count (milliseconds in 32 bits).
    """

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=24))

    def gather(self, part) -> list:
        parts = [None] * self.size
        dist.all_gather_object(parts, part, group=self.group)
        return parts

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor


def joined_team() -> Team:
    """The processes of the group that exists already; `ALONE` without one."""
    return Ranks() if dist.is_initialized() else ALONE


@contextlib.contextmanager
def launched_team() -> Iterator[Team]:
    """The processes that `accelerate launch` or `torchrun` started, each with a GPU of its own if there are any; else `ALONE`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo")
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()
        wait_for_gloo_threads()
