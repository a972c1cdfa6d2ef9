"""One process works while the others wait, however long it takes.

A barrier of torch.distributed, and therefore `TrainingArguments.main_process_first`, gives up after the group's timeout (10 or
30 minutes), which tokenising a large text may exceed. Here the others poll the group's key-value store, and no collective is
pending meanwhile.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator

import torch.distributed
from transformers import TrainingArguments


LONGEST_PAUSE = 1.0  # seconds between two polls
_calls = itertools.count()  # all processes make the same calls in the same order


@contextlib.contextmanager
def main_process_first(training: TrainingArguments, local: bool = True) -> Iterator[None]:
    """The first process (of each machine, if `local`) runs the block; then all others run it.

    All processes must call it, the same number of times. If the block fails in the first process, the others exit with status
    1 and no message, since the first one has given it.
    """
    if training.world_size == 1:  # also sets up the process group
        yield
        return
    own_rank = training.local_process_index if local else training.process_index
    first = training.process_index - own_rank  # global rank of the process to wait for
    store = _store()
    key = f"{next(_calls)}/{first}"
    if own_rank > 0:
        _poll(lambda: store.check([key]))
        if store.get(key) != b"done":
            sys.exit(1)
        yield
        return
    try:
        yield
    except BaseException:
        store.set(key, "failed")
        raise
    store.set(key, "done")


def wait_for_all(training: TrainingArguments, count: int):
    """Waits until the `count` processes of this machine have all come here. All processes must call it."""
    first = training.process_index - training.local_process_index
    store, key = _store(), f"all/{next(_calls)}/{first}"
    store.add(key, 1)
    _poll(lambda: store.add(key, 0) >= count)


def _store() -> torch.distributed.Store:
    return torch.distributed.PrefixStore(
        "trainers.runs.waiting", torch.distributed.distributed_c10d._get_default_store()
    )


def _poll(is_done: Callable[[], bool]):
    pause = 0.01
    while not is_done():
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
