"""`writing.gif`: a text being written, for the card. It is the text that the card shows, sampled once more."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.evaluate_model import KEY, EvaluationProtocol
from evaluation.table import example_of
from modeling_mcd.replay import Replay


WRITING = "writing.gif"
LINES, FRAMES = 6, 12  # enough to see it, and below 200 kB whatever is written


def point_of_writing(results: list[dict], name: str, protocol: EvaluationProtocol) -> dict | None:
    """What the picture of a model is of: the point and the weights of its row that the card shows a text of.

    None if there is no such row, or it is of another sampler or precision than the protocol's.
    """
    row = example_of(results, name)
    if row is None or (row["sampler"], row["precision"]) != (protocol.sampler_name, protocol.precision):
        return None
    return {key: row[key] for key in (*KEY, "length", "weights")}


def write_writing(
    folder: str | Path,
    point: dict,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
):
    """Writes the picture: sample 0 of seed 0 at a point, which is the row's `example`."""
    replay, at = Replay(tokenizer), (point["steps"], point["temperature"], point["length"])
    options = protocol.generation_config(*at, 1, point["locking"])
    model.generate(generation_config=options, generator=torch.Generator().manual_seed(0), callback=replay)
    replay.save(Path(folder) / WRITING, lines=LINES, frames=FRAMES)
