"""Additions with many carries, whose answers are right or wrong: data, questions and tokenizer of the tiny_sums recipes.

    python -m trainers.sums_data recipes/tiny_sums

A row is `{"prompt": "271828+314159=", "completion": "0585987"}`: two numbers of six digits, zeros in front kept, and their sum in
seven. Every digit of the sum has its place then, so that what makes a sum hard is the carry alone. At half of the places the
two digits add up to 9: a carry that arrives there goes on to the next place, and one that does not arrive does not start
there. So a digit often depends on digits far to its right, until the ones between are known.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from modeling_mcd.command_line import one_line_errors
from modeling_mcd.files import write_atomically


DIGITS = 6
ALPHABET = "0123456789+="
END_OF_TEXT, MASK = "<|endoftext|>", "[MASK]"
LENGTH = 1 + (2 * DIGITS + 2) + (DIGITS + 1) + 1  # BOS, prompt, answer, EOS
TRAIN, QUESTIONS = 20_000, 500


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """Different additions, the same for one count and seed."""
    generator, rows = np.random.default_rng(seed), {}
    while len(rows) < count:
        first, second, chance = generator.random((3, DIGITS))
        first, second = (10 * first).astype(int), (10 * second).astype(int)
        second = np.where(chance < 0.5, 9 - first, second)
        a, b = ("".join(map(str, digits)) for digits in (first, second))
        rows[f"{a}+{b}="] = f"{int(a) + int(b):0{DIGITS + 1}d}"
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows.items()]


def longest_carry(prompt: str) -> int:
    """The most places in a row that a carry leaves."""
    a, b = prompt.rstrip("=").split("+")
    longest = run = carry = 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        carry = int(x) + int(y) + carry > 9
        run = run + 1 if carry else 0
        longest = max(longest, run)
    return longest


def sums_tokenizer() -> PreTrainedTokenizerFast:
    """The ten digits, `+`, `=`, `<|endoftext|>` (BOS = EOS) and `[MASK]`: 14 tokens."""
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(ALPHABET)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m trainers.sums_data", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="Where train.parquet, questions.jsonl and tokenizer/ go.")
    parser.add_argument("--rows", type=int, default=TRAIN, help="Rows to train on (default: %(default)s).")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="Rows to ask, not among these (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Of the additions (default: %(default)s).")
    options = parser.parse_args(arguments)
    check_numbers(options, rows=AT_LEAST_1, questions=AT_LEAST_1)
    rows = sums(options.questions + options.rows, options.seed)
    questions, train = rows[: options.questions], rows[options.questions :]
    write_atomically(options.folder / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in questions))
    from datasets import Dataset  # only here: the tokenizer needs none

    table = io.BytesIO()
    Dataset.from_list(train).to_parquet(table)
    write_atomically(options.folder / "train.parquet", table.getvalue())
    sums_tokenizer().save_pretrained(options.folder / "tokenizer")
    print(f"{len(train)} rows and {len(questions)} questions in {options.folder}")


if __name__ == "__main__":
    main()
