"""The picture of locking: which step of N reveals each token of a row, and how far apart the tokens of a step lie.

python -m benchmarks.locking_figure [--output docs/images/three_gaps.png] [--steps 8]
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.measuring import count
from modeling_mcd.locking_mdlm import locked_uniforms


ROOT = Path(__file__).resolve().parent.parent
WIDTH, ROWS, LENGTH, SEED = 80, 40, 1500, 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "three_gaps.png")
    parser.add_argument("--steps", type=count, default=8)
    options = parser.parse_args()
    n = options.steps
    u = torch.rand(ROWS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    everywhere = torch.ones_like(u, dtype=torch.bool)
    kinds = {
        "independent": ("independent", None),
        "spread, golden ratio": ("spread", None),
        f"spread, N = {n}": ("spread", n),
        "interleaved": ("interleaved", n),
    }
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(len(kinds), 2, width_ratios=(3, 1), sharex="col")
    for (left, right), (name, (locking, steps)) in zip(axes, kinds.items(), strict=True):
        step = (locked_uniforms(locking, u, everywhere, steps) * n).long()
        left.imshow(step[:1, :WIDTH], aspect="auto", cmap="Greys", vmin=-1, vmax=n, interpolation="nearest")
        for place in (step[0, :WIDTH] == n // 2).nonzero()[:, 0].tolist():
            left.axvspan(place - 0.5, place + 0.5, color="tab:red")
        left.set(title=name, yticks=[])
        gaps = torch.cat([(row == k).nonzero()[:, 0].diff() for row in step for k in range(n)])
        share = gaps.bincount(minlength=25)[:25].double() / len(gaps)
        right.bar(range(25), share, color="black")
        right.set(ylim=(0, 1.05), yticks=[0, 1])
        print(f"{name}: gaps {gaps.unique().tolist()[:12]}, {share.max():.0%} of them {share.argmax().item()}")
    axes[-1, 0].set(xlabel=f"token; light: first step, dark: last of {n}; red: step {n // 2 + 1}")
    axes[-1, 1].set(xlabel="gap between tokens of one step")
    figure.savefig(options.output, dpi=75)
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
