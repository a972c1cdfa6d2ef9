"""One seed at several numbers of steps, with locked noise: a picture of the texts, and how many tokens they share.

    python -m benchmarks.one_seed [--model recipes/tiny/teacher] [--steps 4 8 16 64] [--seed 0]

A token is dark where it equals that of the last number of steps. Prints the share of equal tokens over `--samples` seeds,
against the share between different seeds, and writes `docs/images/one_seed.png`.
"""

import argparse
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from transformers import AutoModel, AutoTokenizer

import modeling_mcd  # noqa: F401 - registers the model with the Auto classes
from benchmarks.measuring import count


WIDTH = 64  # characters in a line of the picture


def draw(path: Path, texts: dict[int, list[str]]):
    """`texts`: steps -> the tokens of the text."""
    last = list(texts.values())[-1]
    lines = -(-max(sum(map(len, tokens)) for tokens in texts.values()) // WIDTH)
    figure, axes = plt.subplots(len(texts), 1, figsize=(0.1 * WIDTH, 0.2 * len(texts) * (lines + 2)))
    for axis, (steps, tokens) in zip(axes, texts.items(), strict=True):
        axis.set(xlim=(0, WIDTH), ylim=(lines, -0.5))
        axis.axis("off")
        same = sum(token == other for token, other in zip(tokens, last, strict=True)) / len(last)
        axis.set_title(f"{steps} steps: {same:.0%} of the tokens as after {list(texts)[-1]}", loc="left", fontsize=9)
        colors = ["black" if token == other else "darkorange" for token, other in zip(tokens, last, strict=True)]
        letters = [(letter, color) for token, color in zip(tokens, colors, strict=True) for letter in token]
        for i, (letter, color) in enumerate(letters):
            axis.text(i % WIDTH, i // WIDTH, letter, family="monospace", fontsize=9, color=color, va="top")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="recipes/tiny/teacher")
    parser.add_argument("--steps", type=count, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--seed", type=int, default=0, help="Of the picture; the figures take those that follow too.")
    parser.add_argument("--samples", type=count, default=16)
    options = parser.parse_args()
    model = AutoModel.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    seeds = list(range(options.seed, options.seed + options.samples))
    ids = {n: model.generate(steps=n, seed=seeds, num_return_sequences=len(seeds)) for n in options.steps}
    last = ids[options.steps[-1]]
    for steps, sequences in ids.items():
        same = (sequences == last).double().mean().item()
        other = (sequences == last.roll(1, dims=0)).double().mean().item()
        print(f"{steps:4d} steps: {same:.1%} of the tokens as after {options.steps[-1]}; another seed: {other:.1%}")
    picture = Path(__file__).parent.parent / "docs" / "images" / "one_seed.png"
    marks = {tokenizer.bos_token_id: "|", tokenizer.eos_token_id: "|"}
    texts = {n: [marks.get(t) or tokenizer.decode([t]) for t in rows[0].tolist()] for n, rows in ids.items()}
    draw(picture, texts)
    print(picture)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
