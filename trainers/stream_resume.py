"""A training set that is a stream: its place goes into every checkpoint, and a resumed run takes it up without reading again."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from transformers import TrainingArguments

from modeling_mcd.files import read_object, write_json


FOLDER = "stream"  # of a checkpoint: the place of each process that reads


@runtime_checkable
class Stream(Protocol):
    """A training set without end that knows its own place, see `runs/streams.py`."""

    is_split: bool  # whether each process has its own; otherwise the first one reads for all

    def remember(self, every: int, kept: int):
        """Asks for the states at the last `kept` multiples of `every` rows."""

    def state_at(self, number: int) -> dict | None:
        """The state after so many rows, as JSON can hold it; None if it is not known."""

    def start_at(self, state: dict):
        """Sets where the next iteration begins."""


def remember_places(stream: Stream, args: TrainingArguments):
    """Asks a stream for the states at which a checkpoint may be written, behind a loader that reads ahead."""
    ahead = (1 if stream.is_split else args.world_size) * (args.gradient_accumulation_steps + 2)
    stream.remember(every=args.train_batch_size, kept=2 * ahead)


def loader_of(stream: Stream, args: TrainingArguments, collate) -> torch.utils.data.DataLoader:
    """The loader of a stream that is split; accelerate's would let the first process read for all."""
    return torch.utils.data.DataLoader(
        stream,
        batch_size=args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
    )


def save_place(stream: Stream, args: TrainingArguments, step: int, folder: Path):
    """Saves the place of a stream after a step, in every process that reads."""
    if not (stream.is_split or args.process_index == 0):
        return
    rows = step * args.gradient_accumulation_steps * args.train_batch_size
    state = stream.state_at(rows * (1 if stream.is_split else args.world_size))
    if state is not None:  # otherwise a worker reads, and a resumed run reads the rows before again
        write_json(folder / FOLDER / f"{args.process_index}.json", {"processes": args.world_size, **state})


def check_place(stream: Stream, args: TrainingArguments, folder: Path) -> bool:
    """Whether a checkpoint holds the place of a stream.

    Raises:
        ValueError: each process had a stream of its own, and there were more or fewer of them.
    """
    if not (folder / FOLDER / "0.json").is_file():
        return False
    then, now = read_object(folder / FOLDER / "0.json")["processes"], args.world_size
    if then != now and (stream.is_split or (folder / FOLDER / "1.json").exists()):
        raise ValueError(
            f"cannot resume from {folder}: with split_stream each of {then} processes read its own share of the text, and "
            f"now there are {now}: start {then}"
        )
    return True


def restore_place(stream: Stream, args: TrainingArguments, folder: Path):
    """Takes up the place that a checkpoint holds, in every process."""
    stream.start_at(read_object(folder / FOLDER / f"{args.process_index if stream.is_split else 0}.json"))
