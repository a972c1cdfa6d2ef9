"""The N-step bound of one model on held-out text, for every locking and number of steps, and paired differences.

    python -m benchmarks.bound_table [--model recipes/tiny/teacher] [--text recipes/tiny/text/validation] [--blocks 96]

Under every locking a block has the same seed, hence the same rho, and the NELBO is that of the same blocks. Each cell is
saved in `benchmarks/results/bound_NAME.json` as soon as it is measured, and the table in `bound_NAME.md`: a command that was
killed goes on where it was.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.measuring import circumstances, count
from evaluation import Bound, block_nelbo, read_texts, step_bound, text_blocks
from evaluation.judge import fingerprint
from modeling_mcd.files import write_atomically
from modeling_mcd.loading import load_model
from modeling_mcd.locking_mdlm import LOCKINGS


ROOT = Path(__file__).resolve().parent.parent
NELBO = "NELBO"
FIRST = "independent"  # what the others are compared with


def bound_of(cell: dict) -> Bound:
    nats = torch.tensor(cell["nats"], dtype=torch.float64)
    return Bound(nats, torch.full(nats.shape, cell["tokens"]))


def table(cells: dict[str, dict], steps: list[int], lockings: list[str]) -> str:
    """Bounds with their standard errors; paired differences from `independent`, and from the NELBO. "-": not measured."""
    bounds = {name: bound_of(cell) for name, cell in cells.items()}
    nelbo = bounds[NELBO]
    lines = [
        f"Nats per token on {len(nelbo.nats)} held-out blocks of {int(nelbo.tokens[0])} tokens, ± the standard error over "
        f"blocks. NELBO of the same blocks: {nelbo.mean:.3f} ± {nelbo.error:.3f}."
    ]

    def add(title: str, cell):
        lines.extend(["", title, "", _line(["N", *lockings]), "| ---: |" + " ---: |" * len(lockings)])
        lines.extend(_line([n, *(cell(n, locking) for locking in lockings)]) for n in sorted(steps))

    def plain(n: int, locking: str) -> str:
        bound = bounds.get(f"{locking}, {n}")
        return "-" if bound is None else f"{bound.mean:.3f} ± {bound.error:.3f}"

    def less(name: str, other: str) -> str:
        if name == other or not {name, other} <= set(bounds):
            return "-"
        difference, error = bounds[name].minus(bounds[other])
        return f"{difference:+.3f} ± {error:.3f}"

    add("The bound:", plain)
    add(f"Less `{FIRST}` at the same N, paired:", lambda n, locking: less(f"{locking}, {n}", f"{FIRST}, {n}"))
    add("Less the NELBO, paired:", lambda n, locking: less(f"{locking}, {n}", NELBO))
    lines += ["", f"4 spread steps less 16 independent ones, paired: {less('spread, 4', f'{FIRST}, 16')}."]
    return "\n".join(lines) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=str(ROOT / "recipes" / "tiny" / "teacher"))
    parser.add_argument("--text", default=str(ROOT / "recipes" / "tiny" / "text" / "validation"))
    parser.add_argument("--name", default="tiny", help="Of the result.")
    parser.add_argument("--steps", type=count, nargs="+", default=[8, 4, 16, 2, 1, 32], help="In the order of work.")
    parser.add_argument("--lockings", nargs="+", choices=LOCKINGS, default=list(LOCKINGS))
    parser.add_argument("--blocks", type=count, default=96)
    parser.add_argument("--length", type=count, help="Tokens of a block; the model's context by default.")
    parser.add_argument("--draws", type=count, default=16, help="Times at which the NELBO is measured on each block.")
    parser.add_argument("--batch_size", type=count, default=16)
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(options.model).to(device).eval(), AutoTokenizer.from_pretrained(options.model)
    length = options.length or model.config.max_position_embeddings
    blocks = text_blocks(read_texts(options.text), tokenizer, length, options.blocks)
    about = {"weights": fingerprint(model), "blocks": len(blocks), "length": length, "draws": options.draws}
    path = Path(options.results) / f"bound_{options.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {}
    if {name: content.get(name) for name in about} != about:
        content = about | {"cells": {}}
    cells = content["cells"]

    def measure(name: str, of):
        if name in cells:
            return
        start = time.perf_counter()
        bound = of()
        cells[name] = {
            "mean": round(bound.mean, 5),
            "error": round(bound.error, 5),
            "seconds": round(time.perf_counter() - start, 1),
            "tokens": int(bound.tokens[0]),
            "nats": [round(value, 3) for value in bound.nats.tolist()],
        }
        print(f"{name}: {bound.mean:.4f} ± {bound.error:.4f}", flush=True)
        write_atomically(path, json.dumps(content | circumstances()) + "\n")
        write_atomically(path.with_suffix(".md"), table(cells, options.steps, options.lockings))

    measure(NELBO, lambda: block_nelbo(model, blocks, options.draws, options.batch_size))
    for n in options.steps:
        for locking in options.lockings:
            # One step reveals everything, under any locking.
            if n > 1 or locking == FIRST:
                how = {"steps": n, "locking": locking, "batch_size": options.batch_size, "progress": True}
                measure(f"{locking}, {n}", lambda how=how: step_bound(model, blocks, **how))
    print(table(cells, options.steps, options.lockings))


if __name__ == "__main__":
    main()
