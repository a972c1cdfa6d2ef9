"""Whether a chain is worth as much over a student as over its teacher, and whether it has to be trained again for it.

    python -m benchmarks.coupling_students [NAME=MODEL ...] [--chain recipes/tiny/coupled] [--steps 1 2 4 8]

By default the shipped teacher and the last students of `recipes/tiny.yaml` and `tiny_sdtt.yaml` in `runs/`. The N-step bound of each
network under both lockings, then spread with the chain of `--chain` as it is, and with that chain trained on over this network:
over the teacher too, which is the control. Then the seconds of a sample, of all networks in turn. Each cell is saved in
`benchmarks/results/coupling_students.json` as soon as it is measured, and the tables in `coupling_students.md`: a command that was
killed goes on where it was.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.coupling_ablation import TINY, train_chain
from benchmarks.coupling_bound import ROOT, bound_of, saved
from benchmarks.measuring import circumstances, count
from evaluation import Bound, read_texts, step_bound, text_blocks
from evaluation.judge import fingerprint
from modeling_mcd.files import write_atomically
from modeling_mcd.loading import load_model


MODELS = ["teacher=recipes/tiny/teacher", "MCD=runs/tiny", "SDTT=runs/tiny_sdtt"]
PLANS = {
    "independent": {"locking": "independent", "coupling": False},
    "spread": {"locking": "spread", "coupling": False},
    "its teacher's chain": {"locking": "spread", "coupling": True},
    "the chain trained on": {"locking": "spread", "coupling": True},
}
TIMED = list(PLANS)[:3]  # a chain that is trained on costs what it did before


def with_chain(model, chain):
    """The network of a model under a copy of another's chain."""
    model = copy.deepcopy(model)
    if model.coupling is None:
        model.add_coupling(chain.config.coupling)
    model.coupling.load_state_dict(chain.coupling.state_dict())
    return model.eval()


def seconds_of_a_sample(models: dict, steps: list[int], rows: int, runs: int = 3) -> dict[str, dict[str, float]]:
    """Median seconds of a sample of `generate`, for each model with a chain, plan and number of steps; all take turns."""
    times = {name: {f"{plan}, {n}": [] for plan in TIMED for n in steps} for name in models}
    for run in range(runs):
        for name, model in models.items():
            for plan in TIMED:
                for n in steps:
                    start = time.perf_counter()
                    model.generate(num_return_sequences=rows, steps=n, seed=run, **PLANS[plan])
                    times[name][f"{plan}, {n}"].append((time.perf_counter() - start) / rows)
    return {
        name: {cell: round(statistics.median(values), 5) for cell, values in cells.items()}
        for name, cells in times.items()
    }


def table(models: dict[str, dict], steps: list[int], tokens: int) -> str:
    lines = [
        f"Nats per token of held-out blocks of {tokens} tokens, ± the standard error over blocks; in brackets less spread alone, paired.",
        "",
        "| network | N | " + " | ".join(PLANS) + " |",
        "| --- | ---: |" + " ---: |" * len(PLANS),
    ]

    def shown(cells: dict[str, Bound], plan: str) -> str:
        if plan not in cells:
            return "-"
        mean = f"{cells[plan].mean:.3f}"
        if "chain" not in plan:
            return f"{mean} ± {cells[plan].error:.3f}"
        difference, error = cells[plan].minus(cells["spread"])
        return f"{mean} ({difference:+.3f} ± {error:.3f})"

    for name, model in models.items():
        for n in steps:
            ends = f", {n}"
            cells = {
                key[: -len(ends)]: bound_of(cell, tokens) for key, cell in model["cells"].items() if key.endswith(ends)
            }
            lines.append("| " + " | ".join([name, str(n), *(shown(cells, plan) for plan in PLANS)]) + " |")
    return "\n".join(lines) + "\n"


def table_of_seconds(seconds: dict[str, dict[str, float]], steps: list[int], rows: int) -> str:
    lines = [
        f"Seconds of a sample of `generate`, {rows} at a time, median of 3; in brackets the ratio to the first network's independent draw.",
        "",
        "| network | N | " + " | ".join(TIMED) + " |",
        "| --- | ---: |" + " ---: |" * len(TIMED),
    ]
    first = next(iter(seconds.values()))
    for name, found in seconds.items():
        for n in steps:
            base = first[f"{TIMED[0]}, {n}"]
            cells = [f"{found[f'{plan}, {n}']:.4f} ({found[f'{plan}, {n}'] / base:.2f})" for plan in TIMED]
            lines.append("| " + " | ".join([name, str(n), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", default=MODELS)
    parser.add_argument("--chain", default=str(TINY / "coupled"), help="The model whose chain all networks get.")
    parser.add_argument("--steps", type=count, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--updates", type=count, default=50, help="Of the chain that is trained on.")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--blocks", type=count, default=24)
    parser.add_argument("--batch_size", type=count, default=12)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--timed_steps", type=count, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rows", type=count, default=8, help="Samples that are drawn at a time where they are timed.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "coupling_students", help="Of the chains.")
    options = parser.parse_args()
    for model in options.models:
        if not all(model.partition("=")):
            parser.error(f"a network is given as NAME=MODEL, not {model!r}")
    chain, tokenizer = load_model(options.chain), AutoTokenizer.from_pretrained(options.chain)
    held_out = text_blocks(read_texts(TINY / "text" / "validation"), tokenizer, options.length, options.blocks)
    about = {"chain": fingerprint(chain), "blocks": len(held_out), "tokens": options.length}
    about |= {"updates": options.updates, "learning_rate": options.learning_rate}
    path = options.results / "coupling_students.json"
    content = saved(path, about, models={})
    models = dict(model.partition("=")[::2] for model in options.models)
    for name, folder in models.items():
        network = load_model(folder)
        weights = fingerprint(with_chain(network, chain))
        if content["models"].get(name, {}).get("weights") != weights:
            content["models"][name] = {"weights": weights, "cells": {}}
        cells = content["models"][name]["cells"]
        for plan, how in PLANS.items():
            missing = [n for n in options.steps if f"{plan}, {n}" not in cells and (n > 1 or plan != "independent")]
            if not missing:
                continue
            model = with_chain(network, chain)
            if plan == "the chain trained on":
                file = options.output_dir / f"{name}-{weights}-{options.updates}-{options.learning_rate}.safetensors"
                if not file.exists():
                    text = text_blocks(
                        read_texts(TINY / "text" / "train"), tokenizer, options.length, 24 * options.updates
                    )
                    shape = chain.config.coupling
                    trained = train_chain(model, text, options.updates, learning_rate=options.learning_rate, **shape)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_file(trained.coupling.state_dict(), file)
                model = with_chain(network, chain)
                model.coupling.load_state_dict(load_file(file))
            for n in missing:
                bound = step_bound(model, held_out, steps=n, batch_size=options.batch_size, **how)
                nats = [round(value, 3) for value in bound.nats.tolist()]
                cells[f"{plan}, {n}"] = {"mean": round(bound.mean, 5), "nats": nats}
                print(f"{name}, {plan}, {n}: {bound.mean:.4f} ± {bound.error:.4f}", flush=True)
                write_atomically(path, json.dumps(content | circumstances()) + "\n")
    networks = {name: with_chain(load_model(folder), chain) for name, folder in models.items()}
    seconds = seconds_of_a_sample(networks, options.timed_steps, options.rows)
    content["seconds"] = {"rows": options.rows, "threads": torch.get_num_threads(), "of": seconds}
    write_atomically(path, json.dumps(content | circumstances()) + "\n")
    found = table(content["models"], options.steps, options.length)
    found += "\n" + table_of_seconds(seconds, options.timed_steps, options.rows)
    write_atomically(path.with_suffix(".md"), found)
    print(found)


if __name__ == "__main__":
    main()
