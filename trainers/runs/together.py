"""Judging a network that is divided among the processes, while each of them draws and scores texts of its own.

The weights of a layer are put together by all processes at once, so all of them have to run the trunk equally often, and in the
same order. A process that has finished its share runs it on two tokens for as long as another one still needs it. Nothing but
embeddings, head and the layer that runs is ever complete.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import distributed, nn

from evaluation.team import Team
from trainers.sharding import complete_weights, has_parts, outer_weights
from trainers.step_meter import trunk_of


class Together(Team):
    """A team whose processes use a network together that is divided among them; made by `together`."""

    def __init__(self, team: Team, network: nn.Module, keep):
        self.team, self.network, self.keep = team, network, keep
        self.rank, self.size = team.rank, team.size
        self.helping = False

    def gather(self, part) -> list:
        self.help()
        return self.team.gather(part)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.help()
        return self.team.sum(tensor)

    def weights(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        self.help()
        yield from complete_weights(self.network)
        self.keep()  # which FSDP2 has divided for that

    def announce(self, *of_hook):
        """Called before each forward of the trunk: the others take part in it."""
        if not self.helping:
            self._anybody_runs(True)

    def help(self):
        """Takes part in the forwards of the other processes until all of them have called this."""
        while self._anybody_runs(False):
            self.run()

    @torch.no_grad()
    def run(self):
        """A forward that only serves the other processes."""
        self.helping, device = True, self.network.device
        tokens, times = torch.zeros(1, 2, dtype=torch.long, device=device), torch.ones(1, device=device)
        self.network(input_ids=tokens, timesteps=times)
        self.helping = False

    def _anybody_runs(self, runs: bool) -> bool:
        if self.size == 1:
            return False
        count = torch.tensor(int(runs))
        distributed.all_reduce(count, group=self.team.group)  # on the CPU; it may wait for as long as a judge reads
        return count.item() > 0


@contextlib.contextmanager
def together(network: nn.Module, team: Team) -> Iterator[Team]:
    """A context in which every process may use a network as if it were complete; a divided one with all others at once.

    Opened and closed by all processes, and yields the team to work with. Where FSDP2 gathers the weights in half precision the
    network runs in that, as in training.
    """
    if not has_parts(network):
        yield team
        return
    was_training, stored = network.training, network.dtype
    trunk, head = trunk_of(network), network.get_output_embeddings()
    network.eval()
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(outer_weights(network, trunk))
        keep()
        if head.weight.dtype != stored:
            for module in (trunk, head):
                stack.enter_context(autocast_in(module, network.device.type, head.weight.dtype))
        crew = Together(team, network, keep)
        crew.run()  # in a network's first forward FSDP2 finds out what belongs to it
        # Before any hook of the trunk that gathers something.
        stack.callback(trunk.register_forward_pre_hook(crew.announce, prepend=True).remove)
        try:
            yield crew
            crew.help()
            crew.run()  # which puts in order what a failed `generate` has left of FSDP2's state
        finally:
            network.train(was_training)


@contextlib.contextmanager
def autocast_in(module: nn.Module, device: str, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the forward of a module is under autocast."""
    opened = []

    def begin(*of_hook):
        opened.append(torch.autocast(device, dtype))
        opened[-1].__enter__()

    def end(*of_hook):  # what it returned would be the forward's result
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
