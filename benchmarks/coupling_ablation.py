"""What the shape of a chain is worth: states, levels, windows, and other ways to know the noise level, at equal updates.

    python -m benchmarks.coupling_ablation [CELL ...] [--updates 200] [--blocks 24]

Every chain is trained over the shipped tiny teacher on the same batches and plans, for 1, 2 and 4 spread steps, and judged by
the N-step bound on the same held-out blocks. The network is frozen and its batches are the same, so its hidden rows are computed
once. Cells named "1 chain" have one chain for all levels, which a level may change (`shared`, or `SharedCoupling`), and about as many
parameters as the first cell. Each cell is saved in `benchmarks/results/coupling_ablation.json` as soon as it is measured, and the
table in `coupling_ablation.md`: a command that was killed goes on where it was.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, set_seed

from benchmarks.coupling_bound import ROOT, bound_of, saved
from benchmarks.measuring import circumstances, count
from evaluation import Bound, read_texts, step_bound, text_blocks
from evaluation.judge import fingerprint
from modeling_mcd.coupling_mdlm import CouplingWeights, MDLMCoupling
from modeling_mcd.files import write_atomically
from modeling_mcd.loading import load_model
from trainers import CouplingTrainer, CouplingTrainingArguments


TINY = ROOT / "recipes" / "tiny"
CENTRE = {"states": 64, "levels": 4, "window": None, "shared": False}
CELLS = {
    "64 states, 4 levels": {},
    "16 states": {"states": 16},
    "32 states": {"states": 32},
    "128 states": {"states": 128},
    "256 states": {"states": 256},
    "1 level": {"levels": 1},
    "2 levels": {"levels": 2},
    "window 128": {"window": 128},
    "window 32": {"window": 32},
    "window 8": {"window": 8},
    "1 chain, 147 states": {"states": 147, "levels": 1},
    "1 chain, 147 states, gates": {"states": 147, "sharing": "gates"},
    "1 chain, 147 states, powers": {"states": 147, "shared": True},
    "1 chain, 108 states, updates of rank 8": {"states": 108, "sharing": 8},
    "shared, 64 states, 4 levels": {"shared": True},
    "shared, 16 states": {"shared": True, "states": 16},
    "shared, 256 states": {"shared": True, "states": 256},
    "shared, 2 levels": {"shared": True, "levels": 2},
    "shared, 8 levels": {"shared": True, "levels": 8},
    "shared, 16 levels": {"shared": True, "levels": 16},
    "shared, window 128": {"shared": True, "window": 128},
    "shared, window 32": {"shared": True, "window": 32},
    "shared, window 8": {"shared": True, "window": 8},
}
STEPS = (1, 2, 4)


class SharedCoupling(MDLMCoupling):
    """One chain for all levels, which each level changes in another way than the `shared` chain of the library.

    Args:
        config: of the network, with its `coupling`.
        sharing: "gates": a level takes a and T to one power of its own; a number: it adds matrices of this rank to log T and
            log W, and a vector to log a.
    """

    def __init__(self, config, sharing: str | int):
        super().__init__(config)
        levels, states = self.start.shape
        for name in ("start", "transition", "emission"):
            setattr(self, name, nn.Parameter(getattr(self, name)[:1].detach()))
        self.initialize()
        self.sharing = sharing
        if isinstance(sharing, int):
            shapes = (states,), (states, sharing), (sharing, states), (states, sharing), (sharing, self.width)
            self.own = nn.ParameterList(nn.Parameter(torch.zeros(levels, *shape)) for shape in shapes)
            for factor in (self.own[2], self.own[4]):  # the others are zero: at first all levels are the same
                nn.init.normal_(factor, std=sharing**-0.5)
        else:
            self.own = nn.ParameterList([nn.Parameter(torch.ones(levels, 1))])

    def forward(self, embedding: torch.Tensor) -> CouplingWeights:
        if isinstance(self.sharing, int):
            start, left, right, left_of_tokens, right_of_tokens = self.own
            transition, emission = self.transition + left @ right, self.emission + left_of_tokens @ right_of_tokens
            return CouplingWeights(self.start + start, transition, emission)
        gate = self.own[0]
        emission = self.emission.expand(len(gate), -1, -1)
        return CouplingWeights(self.start * gate, self.transition * gate[..., None], emission)


class RememberingTrainer(CouplingTrainer):
    """Takes the hidden rows of each step from `rows_of_step`, if an earlier trainer over the same network left them there.

    The noise is keyed by the step, so all trainers of one seed see the same canvases: that is checked.
    """

    rows_of_step: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def compute_rows(self, network, positions, z, gamma, inputs):
        step = self.state.global_step
        if step not in self.rows_of_step:
            with torch.no_grad():
                rows = super().compute_rows(network, positions, z, gamma, inputs)
            self.rows_of_step[step] = z, rows.hidden
        canvas, hidden = self.rows_of_step[step]
        if not torch.equal(canvas, z):
            raise RuntimeError(f"step {step} has another canvas than before")
        model = self.accelerator.unwrap_model(network)
        nothing = torch.zeros_like(positions[:1, :1])
        head = model(input_ids=z[:1, :1], hidden_rows=nothing)  # the head and the chain, as views of their parameters
        return replace(head, hidden=hidden)


def train_chain(model, blocks: torch.LongTensor, updates: int, rows_of_step=None, sharing=None, **settings):
    """The model with a chain that was trained for so many updates of 24 blocks, as `recipes/tiny_coupling.yaml` trains it.

    Args:
        model: with a chain, which goes on; or without, and then `settings` hold its shape.
        blocks: of text, [n, L], n at least 24 a step.
        rows_of_step: a dict, see `RememberingTrainer`; None: every forward is run.
        sharing: of a `SharedCoupling`; None: a chain as `settings` say.
        settings: of `CouplingTrainingArguments`.
    """
    set_seed(1)  # of a new chain's emission
    settings = {"learning_rate": 3e-2, "warmup_steps": 10, "lr_scheduler_type": "cosine", "ema_decay": 0.9} | settings
    settings |= {"plan_steps": list(STEPS), "locking": "spread", "per_device_train_batch_size": 24, "seed": 1}
    with tempfile.TemporaryDirectory() as folder:
        arguments = CouplingTrainingArguments(
            output_dir=folder, steps_per_round=updates, use_cpu=True, save_strategy="no", report_to="none", **settings
        )
        if sharing is not None:
            model.add_coupling(arguments.coupling())
            model.coupling = SharedCoupling(model.config, sharing)
        data = [{"input_ids": block} for block in blocks.tolist()]
        trainer_class = CouplingTrainer
        if rows_of_step is not None:
            trainer_class = type("Remembering", (RememberingTrainer,), {"rows_of_step": rows_of_step})
        trainer = trainer_class(model, arguments, train_dataset=data)
        trainer.train()
        return trainer.whole_student()


def table(cells: dict[str, dict], tokens: int) -> str:
    """The bound of every cell, and its difference to the first."""
    bounds = {name: {n: bound_of(cell, tokens) for n, cell in of.items()} for name, of in cells.items()}
    first = next(iter(bounds.values()))
    lines = [
        f"Nats per token of {len(first['1'].nats)} held-out blocks of {tokens} tokens, ± the standard error over blocks; in brackets "
        f"less the first line, paired.",
        "",
        "| chain | " + " | ".join(f"N = {n}" for n in STEPS) + " |",
        "| --- |" + " ---: |" * len(STEPS),
    ]

    def shown(bound: Bound, n: str) -> str:
        if bound is first[n]:
            return f"{bound.mean:.3f} ± {bound.error:.3f}"
        difference, error = bound.minus(first[n])
        return f"{bound.mean:.3f} ({difference:+.3f} ± {error:.3f})"

    lines += [
        "| " + " | ".join([name, *(shown(of[str(n)], str(n)) for n in STEPS)]) + " |" for name, of in bounds.items()
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"Some of: {', '.join(CELLS)}; all by default.")
    parser.add_argument("--updates", type=count, default=200)
    parser.add_argument("--blocks", type=count, default=24)
    parser.add_argument("--batch_size", type=count, default=12)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--model", default=str(TINY / "teacher"), help="Without a chain.")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    names = options.cells or list(CELLS)
    if not set(names) <= set(CELLS):
        raise SystemExit(f"no cell {min(set(names) - set(CELLS))!r}: there are {list(CELLS)}")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = load_model(options.model).eval()
    held_out = text_blocks(read_texts(TINY / "text" / "validation"), tokenizer, options.length, options.blocks)
    about = {
        "weights": fingerprint(model),
        "updates": options.updates,
        "blocks": len(held_out),
        "tokens": options.length,
    }
    path = options.results / "coupling_ablation.json"
    content = saved(path, about, cells={}, centre=CENTRE)
    text, rows_of_step = None, {}
    for name in names:
        cell = content["cells"].setdefault(name, {})
        missing = [n for n in STEPS if str(n) not in cell]
        if not missing:
            continue
        if text is None:
            text = text_blocks(read_texts(TINY / "text" / "train"), tokenizer, options.length, 24 * options.updates)
        chained = train_chain(load_model(options.model), text, options.updates, rows_of_step, **CENTRE | CELLS[name])
        for n in missing:
            how = {"steps": n, "locking": "spread", "coupling": True, "batch_size": options.batch_size}
            bound = step_bound(chained, held_out, **how)
            cell[str(n)] = {"mean": round(bound.mean, 5), "nats": [round(value, 3) for value in bound.nats.tolist()]}
            print(f"{name}, N = {n}: {bound.mean:.4f} ± {bound.error:.4f}", flush=True)
            write_atomically(path, json.dumps(content | circumstances()) + "\n")
    complete = {name: cell for name, cell in content["cells"].items() if len(cell) == len(STEPS)}
    found = table(complete, options.length)
    write_atomically(path.with_suffix(".md"), found)
    print(found)


if __name__ == "__main__":
    main()
