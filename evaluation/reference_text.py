"""Held-out text, cut as the model's training text is, so that it can be judged exactly as samples are."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase


def read_texts(source: str | Path) -> list[str]:
    """The contents of a UTF-8 text file, or of all .txt files under a folder, in the order of their paths.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without a .txt file.
        ValueError: a file that is not UTF-8, with the offset.
    """
    source = Path(source)
    files = sorted(source.rglob("*.txt")) if source.is_dir() else [source]
    if not source.exists() or not files:
        raise FileNotFoundError(
            f"text {str(source)!r}: "
            + ("no .txt file in this folder" if source.exists() else "no such file or folder")
        )
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
            ) from None
    return texts


def text_blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.LongTensor:
    """At most `count` blocks [count, length], BOS + text + EOS, spread evenly over the texts; EOS between two texts.

    Raises:
        ValueError: less text than one block, or a tokenizer without BOS or EOS.
    """
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no bos_token_id or no eos_token_id, and a block is BOS + text + EOS")
    stream = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    body = length - 2
    whole = len(stream) // body if body > 0 else 0
    if whole == 0:
        raise ValueError(f"the reference text holds {len(stream)} tokens, less than one block of {length}")
    bodies = torch.tensor(stream[: whole * body]).view(whole, body)
    bodies = bodies[torch.linspace(0, whole - 1, min(count, whole)).round().long()]
    blocks = torch.nn.functional.pad(bodies, (1, 1), value=tokenizer.eos_token_id)
    blocks[:, 0] = tokenizer.bos_token_id
    return blocks
