"""Batches of rows of similar length, so that little of a batch is padding: `train_sampling_strategy: group_by_length`."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


MEGABATCH = 50  # batches whose rows are sorted together; as transformers has it


class LengthBuckets(Sampler[int]):
    """The order of the rows of an epoch: shuffled, sorted by length within every 50 batches, and these batches shuffled.

    It depends on the seed and the epoch alone, so a resumed run goes on with the same rows. The sampler of transformers draws
    from the global random state, and serves the batches of a megabatch from the longest to the shortest.

    Args:
        lengths: tokens of each row.
        batch: rows in a global batch. Rows that do not fill one come last.
        drop_last: leave those out.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, drop_last: bool = False):
        self.lengths, self.batch, self.seed, self.epoch = torch.as_tensor(lengths), batch, seed, 0
        self.drop_last = drop_last and len(lengths) >= batch

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) - self.drop_last * (len(self.lengths) % self.batch)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        full = len(order) // self.batch * self.batch
        megabatches = order[:full].split(MEGABATCH * self.batch)
        batches = [part[self.lengths[part].argsort(stable=True)].view(-1, self.batch) for part in megabatches]
        if batches:
            batches = torch.cat(batches)
            yield from batches[torch.randperm(len(batches), generator=generator)].flatten().tolist()
        if not self.drop_last:
            yield from order[full:].tolist()
