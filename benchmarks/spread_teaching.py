"""What teaching on spread paths gives, judged by the N-step bound on held-out text: no judge, no temperature, no samples.

    python -m benchmarks.spread_teaching [--seeds 1] [--rounds 3] [--steps_per_round 25] [--blocks 16]

From the tiny teacher, with one budget of trunk forwards for every training: MCD on independent and on spread
paths, MCD whose gap is the sampler's own step of 1/8 on both, and the control that goes on with the NELBO on both. From
scratch: a smaller network on independent and on spread masks. Every network is judged under both lockings of the sampler, on
the same blocks and plans, so that differences are paired.

Kill it at any time and start it again: a training resumes from its last checkpoint, and what has been judged is not judged
again. After each network it writes `benchmarks/results/spread_teaching.{md,json}`.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from benchmarks.measuring import count
from benchmarks.paper_report import line
from benchmarks.paper_tables import MCD_COST, ROOT, default_shape
from evaluation import Bound, block_nelbo, read_texts, step_bound, text_blocks
from modeling_mcd.files import read_object, write_atomically, write_json
from modeling_mcd.loading import load_model
from trainers import run_mcd, run_mdlm


LOCKINGS = ("independent", "spread")
NELBO_CELL = ("NELBO", 0)  # beside (locking, N)
RECIPES = ROOT / "recipes"
NELBO_COST = 3  # trunk forwards of a step
MCD = {"MCD": (), "MCD, delta 1/8": ("--delta", 1 / 8, "--delta_growth", 1)}
NELBO, SCRATCH = "NELBO goes on", "from scratch"
SMALL = ("--hidden_size", 64, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--learning_rate", 2e-3)


@dataclass(frozen=True)
class Network:
    """One network to judge.

    Args:
        method: the row of the tables that it belongs to.
        locking: of its training; None: the teacher.
        folder: where its weights are.
    """

    method: str
    locking: str | None
    seed: int
    folder: Path

    @property
    def row(self) -> str:
        return self.method if self.locking is None else f"{self.method}, taught {self.locking}"

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"


def train(options: argparse.Namespace, method: str, locking: str, seed: int) -> list[Network]:
    """Trains one network unless it is there; from scratch, one for each checkpoint."""
    folder = options.output_dir / f"{method}-{locking}-{seed}".replace(" ", "_").replace(",", "").replace("/", "_")
    recipe = yaml.safe_load((RECIPES / "tiny.yaml").read_text(encoding="utf-8"))
    words = ["--seed", seed, "--locking", locking, "--output_dir", folder, "--disable_tqdm", True]
    words += ["--save_steps", 25, "--logging_steps", 1, "--block_length", options.block_length, "--bf16", False]
    if method in MCD:
        main, words = run_mcd.main, [RECIPES / "tiny.yaml", "--judge", "null", *MCD[method], *words]
        words += ["--teacher", RECIPES / "tiny" / "teacher"]  # without the chain of the recipe's
        words += ["--num_rounds", options.rounds, "--steps_per_round", options.steps_per_round]
        words += ["--tau", *recipe["tau"][: options.rounds]]
    else:
        main, words = (
            run_mdlm.main,
            [RECIPES / "tiny_teacher.yaml", "--lr_scheduler_type", "constant_with_warmup", *words],
        )
        words += ["--validation_text", "null", "--max_validation_blocks", "null", "--eval_strategy", "no"]
        if method == SCRATCH:
            words += [*SMALL, "--ema_decay", "null", "--save_total_limit", "null", "--warmup_steps", 50]
            words += ["--max_steps", options.scratch_steps, "--save_steps", options.scratch_steps // 3]
        else:
            steps = options.rounds * options.steps_per_round * MCD_COST // NELBO_COST
            words += ["--model", RECIPES / "tiny" / "teacher", "--max_steps", steps, *default_shape()]
            words += ["--weight_decay", 0, "--adam_beta2", 0.999]
            same = ("learning_rate", "warmup_steps", "per_device_train_batch_size", "ema_decay")
            words += [word for name in same for word in (f"--{name}", recipe[name])]
    if not (folder / "model.safetensors").exists():
        main([str(word) for word in words])
    if method != SCRATCH:
        return [Network(method, locking, seed, folder)]
    steps = [options.scratch_steps * k // 3 for k in (1, 2, 3)]
    return [Network(f"{SCRATCH}, {n} steps", locking, seed, folder / f"checkpoint-{n}") for n in steps]


def key_of(network: Network, cell: tuple[str, int], blocks: int) -> str:
    return f"{network.name}|{cell[0]}|{cell[1]}|{blocks}"


def judge(options: argparse.Namespace, network: Network, blocks: torch.LongTensor, measured: dict):
    """Adds what is not yet in `measured`: the nats of each block, for the NELBO and for each locking and N."""
    model = None
    for cell in [NELBO_CELL, *((locking, n) for locking in LOCKINGS for n in options.steps)]:
        key = key_of(network, cell, len(blocks))
        if key in measured:
            continue
        model = model or load_model(network.folder).float().eval()
        if cell == NELBO_CELL:
            bound = block_nelbo(model, blocks, batch_size=16)
        else:
            bound = step_bound(model, blocks, steps=cell[1], locking=cell[0], batch_size=16)
        measured[key] = [round(nats, 4) for nats in bound.nats.tolist()]
        write_json(options.output_dir / "measured.json", measured)
        print(f"{network.name}, {cell[0]}, {cell[1]}: {bound.mean:.4f} nats per token", flush=True)


def report(options: argparse.Namespace, networks: list[Network], measured: dict):
    """Tables of the bounds, of what teaching adds to the teacher, and of what spread paths add to independent ones.

    Means over seeds, each sampler by itself; a difference is that of the same blocks and plans.
    """

    def bound(network: Network, cell: tuple[str, int]) -> Bound:
        nats = torch.tensor(measured[key_of(network, cell, options.blocks)], dtype=torch.float64)
        return Bound(nats, torch.full((len(nats),), options.block_length))

    rows = {}
    for network in networks:
        rows.setdefault((network.method, network.locking), []).append(network)
    lines, content = [], []
    for sampler in LOCKINGS:
        cells = {f"N = {n}": (sampler, n) for n in options.steps} | {"NELBO": NELBO_CELL}
        tables = {"": [], ", less the teacher's": [], ", taught spread less taught independent": []}

        def add(title: str, row: str, pairs: list, sampler=sampler, cells=cells, tables=tables):
            """A line of a table: the mean of the first networks of `pairs`, less that of the second if there are any."""
            measures = {}
            for name, cell in cells.items():
                if pairs[0][1] is None:
                    values, error = [bound(one, cell).mean for one, _ in pairs], None
                else:
                    values, errors = zip(
                        *(bound(one, cell).minus(bound(two, cell)) for one, two in pairs), strict=True
                    )
                    error = statistics.stdev(values) if len(values) > 1 else errors[0]
                measures[name] = {"nats": statistics.fmean(values), "error": error, "of_seeds": values}
            content.append({"network": row, "sampler": sampler, "what": f"bound{title}"} | measures)
            shown = [
                f"{m['nats']:+.3f} ± {m['error']:.3f}" if title else f"{m['nats']:.3f}" for m in measures.values()
            ]
            tables[title].append(line(row, shown))

        for (method, locking), of_seeds in rows.items():
            add("", of_seeds[0].row, [(network, None) for network in of_seeds])
            if locking is not None and not method.startswith(SCRATCH):
                teacher = rows["teacher", None][0]
                add(", less the teacher's", of_seeds[0].row, [(network, teacher) for network in of_seeds])
            if locking == "spread":
                plain = {network.seed: network for network in rows[method, "independent"]}
                pairs = [(network, plain[network.seed]) for network in of_seeds]
                add(", taught spread less taught independent", method, pairs)
        for title, table in tables.items():
            if table:
                lines += [f"Sampler {sampler}, the bound{title}:", "", line("", list(cells))]
                lines += ["| --- |" + " ---: |" * len(cells), *table, ""]
    seeds = sorted({network.seed for network in networks if network.locking is not None})
    budget = f"{options.rounds} rounds of {options.steps_per_round} steps of MCD or their cost. "
    about = (
        f"Nats per token on {options.blocks} blocks of {options.block_length} held-out tokens; seeds {seeds}. "
        f"{'' if set(options.methods) == {SCRATCH} else budget}± is the spread of the difference over seeds; of a single one its "
        "standard error over blocks, which says nothing of another training."
    )
    write_atomically(options.results.with_suffix(".md"), "\n".join([*lines, about]) + "\n")
    write_json(options.results.with_suffix(".json"), {"about": about, "rows": content})
    print("\n".join([*lines, about]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps_per_round", type=count, default=25)
    parser.add_argument("--scratch_steps", type=count, default=300)
    parser.add_argument("--blocks", type=count, default=16)
    parser.add_argument("--block_length", type=count, default=256)
    parser.add_argument("--steps", type=count, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--methods", nargs="+", default=[NELBO, *MCD, SCRATCH], choices=[NELBO, *MCD, SCRATCH])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "spread_teaching")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "spread_teaching")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    place = options.output_dir / "measured.json"
    measured = read_object(place) if place.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny" / "tokenizer")
    text = read_texts(RECIPES / "tiny" / "text" / "validation")
    blocks = text_blocks(text, tokenizer, options.block_length, options.blocks)
    networks = []
    if set(options.methods) != {SCRATCH}:
        networks.append(Network("teacher", None, 0, RECIPES / "tiny" / "teacher"))
        judge(options, networks[0], blocks, measured)
    for seed in options.seeds:
        for method in options.methods:
            for locking in LOCKINGS:
                for network in train(options, method, locking, seed):
                    judge(options, network, blocks, measured)
                    networks.append(network)
            report(options, networks, measured)


if __name__ == "__main__":
    main()
