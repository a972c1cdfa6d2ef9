"""From the rows of a dataset to a batch, and what of it is noised."""

from collections.abc import Sized
from functools import partial
from itertools import islice

import torch
from transformers import TrainingArguments

from modeling_mcd.forward_process_mdlm import Process


TOKEN_COLUMNS = ("input_ids", "labels", "completion_mask", "attention_mask")  # of the rows of a dataset
PADDINGS = ("unseen", "eos")


def collate_blocks(rows: list[dict], eos_token_id: int | None = None) -> dict[str, torch.Tensor]:
    """Makes a batch of rows: `input_ids` [B, L] and, where the rows need them, `labels` and `attention_mask` [B, L].

    Rows may hold `labels` (-100: neither noised nor scored), `completion_mask` (0: the same) and `attention_mask` (0: not
    seen either). Shorter rows are padded on the right.

    Args:
        eos_token_id: the token to pad with; it is seen, noised and scored as if it belonged to the row. Without it, padding is
            neither seen nor noised.

    Raises:
        ValueError: a column is missing or does not fit, or has a value for each token but no meaning here, such as
            `position_ids`; names the column.
    """
    if not rows:
        raise ValueError("a batch must hold at least one row")
    lengths = [_length_of(row) for row in rows]
    for name, value in rows[0].items():
        per_token = hasattr(value, "__len__") and not isinstance(value, str) and len(value) == lengths[0]
        if per_token and name not in TOKEN_COLUMNS:
            raise ValueError(
                f"the rows hold a column {name!r} with a value for each token, which has no meaning here "
                f"({', '.join(TOKEN_COLUMNS)} have): remove it from the dataset"
            )

    def padded(name: str, value: int) -> torch.Tensor:
        for row, length in zip(rows, lengths, strict=True):
            if len(row.get(name, ())) != length:
                raise ValueError(
                    f"{name} of a row has {len(row.get(name, ()))} values, but its input_ids have {length}"
                )
        values = torch.tensor([[*row[name], *[value] * (max(lengths) - len(row[name]))] for row in rows])
        if values.is_floating_point() and values.numel():
            raise ValueError(f"{name} of a row must hold integers, not {values.flatten()[0].item()}")
        return values.long()

    token, label, scored = (0, -100, 0) if eos_token_id is None else (eos_token_id, eos_token_id, 1)
    batch = {"input_ids": padded("input_ids", token)}
    if "labels" in rows[0]:
        batch["labels"] = padded("labels", label)
    if "completion_mask" in rows[0]:
        hidden = padded("completion_mask", scored) == 0
        batch["labels"] = batch.get("labels", batch["input_ids"]).masked_fill(hidden, -100)
    if "attention_mask" in rows[0]:
        batch["attention_mask"] = padded("attention_mask", scored)
    elif min(lengths) < max(lengths) and eos_token_id is None:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def collator_of(padding: str, config):
    """`collate_blocks` with the padding that `args.padding` names, for a model of this configuration."""
    if padding == "unseen":
        return collate_blocks
    eos = config.eos_token_id
    eos = eos[0] if isinstance(eos, list | tuple) else eos
    if eos is None:
        raise ValueError(
            "padding is 'eos', but the model's configuration has no eos_token_id: set it, or take 'unseen'"
        )
    return partial(collate_blocks, eos_token_id=eos)


def _length_of(row: dict) -> int:
    if "input_ids" not in row:
        raise ValueError(f"a row must hold input_ids, but has {list(row)}")
    ids = row["input_ids"]
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise ValueError(f"input_ids of a row must be token ids, not {ids!r}")
    return len(ids)


def maskable_tokens(inputs: dict[str, torch.Tensor], process: Process | None = None) -> torch.BoolTensor:
    """A mask [B, L] of the tokens that noise may change and that the loss counts.

    It excludes the prompt, whose `labels` are -100, the padding, and what the process cannot noise: a [MASK] that the text
    already holds stays as it is, since there is nothing to learn about it.
    """
    input_ids = inputs["input_ids"]
    maskable = torch.ones_like(input_ids, dtype=torch.bool) if process is None else process.maskable(input_ids)
    if "labels" in inputs:
        maskable &= inputs["labels"] != -100
    if "attention_mask" in inputs:
        maskable &= inputs["attention_mask"].bool()
    return maskable


def check_training_batch(arguments: TrainingArguments, dataset):
    """Raises ValueError if the text is less than one global batch: with `dataloader_drop_last`, nothing would be trained."""
    processes, accumulation = arguments.world_size, arguments.gradient_accumulation_steps
    batch = arguments.train_batch_size * processes * accumulation
    if isinstance(dataset, Sized):
        blocks = len(dataset)
    elif hasattr(dataset, "count"):  # a stream, which may have no end
        blocks = dataset.count(batch)
    else:
        blocks = sum(1 for _ in islice(dataset, batch))
    if blocks < batch:
        raise ValueError(
            f"per_device_train_batch_size is {arguments.per_device_train_batch_size}, a global batch of {batch} "
            f"(processes: {processes}, accumulated: {accumulation}), but the training text has only {blocks} blocks: "
            "make it smaller, or give more text"
        )
