"""What a coupling is worth: the N-step bound with and without it, of the chain alone, and the cost of a step.

    python -m benchmarks.coupling_bound MODEL [--text recipes/tiny/text/validation] [--blocks 96]

MODEL has a coupling (`trainer: coupling`). Under every plan a block has the same rho, so differences are paired. The chain
alone has the unigrams of the training text in place of the network's distributions; by the chain rule it costs the same at
every N. Each cell is saved in `benchmarks/results/coupling_NAME.json`, with the value of every block, as soon as it is measured,
and the table in `coupling_NAME.md`: a command that was killed goes on where it was.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.measuring import circumstances, count
from evaluation import Bound, block_nelbo, read_texts, step_bound, text_blocks
from evaluation.judge import fingerprint
from modeling_mcd.files import write_atomically
from modeling_mcd.loading import load_model


ROOT = Path(__file__).resolve().parent.parent
PLANS = {
    "independent": {"coupling": False, "locking": "independent"},
    "spread": {"coupling": False, "locking": "spread"},
    "spread + coupling": {"coupling": True, "locking": "spread"},
}


def chain_alone(model, texts: torch.LongTensor):
    """A copy of a model whose network says nothing but how frequent each token is in some blocks [n, L]."""
    alone = copy.deepcopy(model)
    counts = texts.flatten().bincount(minlength=model.config.vocab_size) + 1.0
    alone.lm_head.weight.data.zero_()
    alone.lm_head.bias.data.copy_((counts / counts.sum()).log())
    return alone


def seconds_of_a_step(model, steps: int, rows: int, coupling: bool, runs: int = 3) -> float:
    """Median seconds of one step of `generate` for some rows of the model's context."""
    times = []
    for run in range(runs):
        start = time.perf_counter()
        model.generate(num_return_sequences=rows, steps=steps, locking="spread", coupling=coupling, seed=run)
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def saved(path: Path, about: dict, **empty) -> dict:
    """What a killed command left in its file; or `about` and `empty`, if there is none or it was measured otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    return content if {name: content.get(name) for name in about} == about else about | empty


def bound_of(cell: dict, tokens: int) -> Bound:
    nats = torch.tensor(cell["nats"], dtype=torch.float64)
    return Bound(nats, torch.full(nats.shape, tokens))


def table(bounds: dict[str, Bound], numbers: list[int], seconds: dict[str, dict]) -> str:
    """The bounds, what the coupling adds to spread locking, and the time of a step."""

    def value(name: str) -> str:
        return f"{bounds[name].mean:.3f} ± {bounds[name].error:.3f}" if name in bounds else "-"

    nelbo, alone = value("NELBO"), value("chain alone")
    first = next(iter(bounds.values()))
    count, tokens = len(first.nats), int(first.tokens[0])
    lines = [
        f"Nats per token on {count} held-out blocks of {tokens} tokens, ± the standard error over blocks. NELBO: {nelbo}. The "
        f"chain alone, at every N: {alone}.",
        "",
        "| N | independent | spread | spread + coupling | coupling less spread, paired | less the chain alone, paired |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for n in numbers:
        coupled = bounds[f"spread + coupling, {n}"]
        differences = [coupled.minus(bounds[name]) for name in (f"spread, {n}", "chain alone")]
        cells = [n, *(value(f"{plan}, {n}") for plan in PLANS), *(f"{d:+.3f} ± {e:.3f}" for d, e in differences)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if not seconds:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Seconds of a step of `generate`, median of 3:",
        "",
        "| rows | without | with | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for rows, row in seconds.items():
        lines.append(f"| {rows} | {row['without']:.3f} | {row['with']:.3f} | {row['with'] / row['without']:.2f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", default=str(ROOT / "recipes" / "tiny" / "coupled"))
    parser.add_argument("--text", default=str(ROOT / "recipes" / "tiny" / "text" / "validation"))
    parser.add_argument("--train_text", default=str(ROOT / "recipes" / "tiny" / "text" / "train"))
    parser.add_argument("--name", default="tiny", help="Of the result.")
    parser.add_argument("--steps", type=count, nargs="+", default=[1, 2, 4])
    parser.add_argument("--blocks", type=count, default=96)
    parser.add_argument("--draws", type=count, default=4, help="Times at which the NELBO is measured on each block.")
    parser.add_argument("--batch_size", type=count, default=16)
    parser.add_argument("--rows", type=count, nargs="*", default=[1, 8], help="Batches whose steps are timed.")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model).eval(), AutoTokenizer.from_pretrained(options.model)
    if model.config.coupling is None:
        raise SystemExit(f"{options.model} has no coupling: train one with `trainer: coupling`")
    length = model.config.max_position_embeddings
    blocks = text_blocks(read_texts(options.text), tokenizer, length, options.blocks)
    batch = {"batch_size": options.batch_size}
    about = {"weights": fingerprint(model), "blocks": len(blocks), "tokens": length, "draws": options.draws}
    path = Path(options.results) / f"coupling_{options.name}.json"
    content = saved(path, about, coupling=model.config.coupling, cells={}, seconds={})
    cells, seconds = content["cells"], content["seconds"]

    def measure(name: str, of):
        if name not in cells:
            bound = of()
            nats = [round(value, 3) for value in bound.nats.tolist()]
            cells[name] = {"mean": round(bound.mean, 5), "error": round(bound.error, 5), "nats": nats}
            print(f"{name}: {bound.mean:.4f} ± {bound.error:.4f}", flush=True)
            write_atomically(path, json.dumps(content | circumstances()) + "\n")

    for n in options.steps:
        for plan, how in reversed(PLANS.items()):
            if n > 1 or plan != "independent":  # one step reveals everything, under any locking
                measure(f"{plan}, {n}", lambda n=n, how=how: step_bound(model, blocks, steps=n, **how, **batch))
    texts = text_blocks(read_texts(options.train_text), tokenizer, length, 1000)
    measure("chain alone", lambda: step_bound(chain_alone(model, texts), blocks, steps=1, coupling=True, **batch))
    measure("NELBO", lambda: block_nelbo(model, blocks, options.draws, options.batch_size))
    for rows in options.rows:
        if str(rows) not in seconds:
            both = (("without", False), ("with", True))
            seconds[str(rows)] = {name: seconds_of_a_step(model, 2, rows, coupling) for name, coupling in both}
            write_atomically(path, json.dumps(content | circumstances()) + "\n")
    bounds = {name: bound_of(cell, length) for name, cell in cells.items()}
    found = table(bounds, options.steps, seconds)
    write_atomically(path.with_suffix(".md"), found)
    print(found)


if __name__ == "__main__":
    main()
