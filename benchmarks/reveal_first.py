"""Reveal-first ancestral sampling against the full-canvas sampler of the published algorithm: time, at the same law.

    python benchmarks/reveal_first.py [--steps 8 16 64] [--length 256] [--hidden_size 256] [--vocab_size 50258]

Both sides use the same random weights in one run, alternating, and float64 draws. The full-canvas side is the sampler as
published (MDLM, arXiv 2406.07524): logits, softmax and Gumbel noise for every position in every step. Prints the ratio
of the medians and writes `benchmarks/results/reveal_first.json`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.noise_schedule_mdlm import noise_schedule_of


@torch.no_grad()
def full_canvas(model: MDLMForMaskedDiffusion, steps: int, length: int) -> torch.LongTensor:
    mask, schedule = model.config.mask_token_id, noise_schedule_of(model.config)
    canvas = torch.full((1, length), mask)
    grid = schedule.gamma(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    for step in range(steps):
        logits = model(input_ids=canvas).logits.double()
        logits[..., mask] = -torch.inf
        probabilities = logits.softmax(dim=-1) * (grid[step + 1] - grid[step])
        probabilities[..., mask] = 1 - grid[step + 1]
        noise = -torch.rand_like(probabilities).log()
        canvas = torch.where(canvas == mask, (probabilities / noise).argmax(dim=-1), canvas)
    return canvas


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = MDLMConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        max_position_embeddings=options.length,
    )
    model = MDLMForMaskedDiffusion(config).eval()
    rows = []
    for steps in options.steps:
        sides = {
            "full_canvas": lambda n=steps: full_canvas(model, n, options.length),
            "reveal_first": lambda n=steps: model.generate(steps=n, seed=0),
            "trunk": lambda n=steps: [model.model(torch.zeros(1, options.length, dtype=torch.long)) for _ in range(n)],
        }
        with torch.no_grad():
            times = {name: [] for name in sides}
            for _ in range(options.repeats):
                for name, call in sides.items():
                    times[name].append(seconds(call))
        medians = {name: statistics.median(values) for name, values in times.items()}
        row = {
            "steps": steps,
            "speedup": medians["full_canvas"] / medians["reveal_first"],
            "over_trunk": medians["reveal_first"] / medians["trunk"],
            "seconds": medians,
        }
        rows.append(row)
        print(
            f"{steps:4d} steps: reveal-first is {row['speedup']:.2f}x as fast as the full canvas, "
            f"and takes {row['over_trunk']:.2f}x the time of {steps} trunk forwards"
        )
    result = {
        "rows": rows,
        "settings": vars(options),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    path = Path(__file__).parent / "results" / "reveal_first.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
