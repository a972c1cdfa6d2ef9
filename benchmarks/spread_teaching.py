"""What teaching on spread paths gives, judged by the N-step bound on held-out text: no judge, no temperature, no samples.

    python -m benchmarks.spread_teaching [--seeds 1] [--rounds 3] [--steps_per_round 50] [--blocks 32]

From the tiny teacher, with the budget of trunk forwards that `paper_tables` gives a method: MCD on independent and on spread
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

from benchmarks.paper_report import line
from benchmarks.paper_tables import MCD_COST, ROOT
from evaluation import StepBound, read_texts, step_bound, text_blocks, validation_nelbo
from modeling_mcd.files import read_object, write_atomically, write_json
from modeling_mcd.loading import load_model
from trainers import run_mcd, run_mdlm


LOCKINGS = ("independent", "spread")
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "spread_teaching"
NELBO_COST = 3  # trunk forwards of a step
MCD = {"MCD": (), "MCD, delta 1/8": ("--delta", 1 / 8, "--delta_growth", 1)}
NELBO, SCRATCH = "NELBO goes on", "from scratch"
SMALL = ("--hidden_size", 128, "--num_hidden_layers", 4, "--num_attention_heads", 4, "--learning_rate", 2e-3)


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
    words += ["--save_steps", 25, "--logging_steps", 25]
    if method in MCD:
        main, words = run_mcd.main, [RECIPES / "tiny.yaml", "--judge", "null", *MCD[method], *words]
        words += ["--num_rounds", options.rounds, "--steps_per_round", options.steps_per_round]
        words += ["--tau", *recipe["tau"][: options.rounds]]
    else:
        main, words = run_mdlm.main, [RECIPES / "tiny_teacher.yaml", "--eval_strategy", "no", *words]
        words += ["--lr_scheduler_type", "constant_with_warmup"]
        if method == SCRATCH:
            words += [*SMALL, "--ema_decay", "null", "--save_total_limit", "null", "--warmup_steps", 50]
            words += ["--max_steps", options.scratch_steps, "--save_steps", options.scratch_steps // 3]
        else:
            steps = options.rounds * options.steps_per_round * MCD_COST // NELBO_COST
            words += ["--model", RECIPES / "tiny" / "teacher", "--max_steps", steps]
            words += ["--weight_decay", 0, "--adam_beta2", 0.999]
            same = ("learning_rate", "warmup_steps", "per_device_train_batch_size", "ema_decay")
            words += [word for name in same for word in (f"--{name}", recipe[name])]
    if not (folder / "model.safetensors").exists():
        main([str(word) for word in words])
    if method != SCRATCH:
        return [Network(method, locking, seed, folder)]
    steps = [options.scratch_steps * k // 3 for k in (1, 2, 3)]
    return [Network(f"{SCRATCH}, {n} steps", locking, seed, folder / f"checkpoint-{n}") for n in steps]


def judge(options: argparse.Namespace, network: Network, blocks: torch.LongTensor, measured: dict):
    """Adds what is not yet in `measured`: the NELBO, and the nats of each block for each locking and N."""
    model, place = None, options.output_dir / "measured.json"
    grid = [(locking, n) for locking in LOCKINGS for n in options.steps]
    for locking, n in [("nelbo", 0), *grid]:
        key = f"{network.name}|{locking}|{n}|{len(blocks)}"
        if key in measured:
            continue
        model = model or load_model(network.folder).float().eval()
        if locking == "nelbo":
            measured[key] = [validation_nelbo(model, blocks)]
        else:
            bound = step_bound(model, blocks, steps=n, locking=locking, batch_size=8)
            measured[key] = [round(nats, 4) for nats in bound.nats.tolist()]
        write_json(place, measured)
        print(f"{network.name}, judged {locking}, N = {n}: {statistics.fmean(measured[key]):.4f}", flush=True)


def report(options: argparse.Namespace, networks: list[Network], length: int, measured: dict):
    """Tables of means over seeds, and of differences from the teacher under the same locking of the sampler."""

    def bounds(network: Network, locking: str, n: int) -> StepBound:
        nats = torch.tensor(measured[f"{network.name}|{locking}|{n}|{options.blocks}"], dtype=torch.float64)
        return StepBound(nats, torch.full((len(nats),), length))

    rows, teacher = {}, networks[0]
    for network in networks:
        rows.setdefault(network.row, []).append(network)
    head = [*(f"N = {n}" for n in options.steps), "NELBO"]
    lines, content = [], []
    for locking in LOCKINGS:
        plain, differences = [], []
        for row, of_seeds in rows.items():
            nelbo = statistics.fmean(measured[f"{net.name}|nelbo|0|{options.blocks}"][0] for net in of_seeds)
            means = [statistics.fmean(bounds(net, locking, n).mean for net in of_seeds) for n in options.steps]
            plain.append(line(row, [f"{mean:.3f}" for mean in (*means, nelbo)]))
            pairs = [
                [bounds(net, locking, n).minus(bounds(teacher, locking, n)) for net in of_seeds] for n in options.steps
            ]
            shown = [(statistics.fmean(d for d, _ in pair), max(e for _, e in pair)) for pair in pairs]
            if of_seeds[0] is not teacher and not row.startswith(SCRATCH):
                differences.append(line(row, [f"{d:+.3f} ± {e:.3f}" for d, e in shown]))
            content.append(
                {"network": row, "sampler": locking, "seeds": [net.seed for net in of_seeds], "nelbo": nelbo}
            )
            content[-1] |= {str(n): {"bound": m, "error": bounds(of_seeds[0], locking, n).error, "difference": d, "difference_error": e}
                            for n, m, (d, e) in zip(options.steps, means, shown, strict=True)}  # fmt: skip
        for title, table, columns in (("bound", plain, head), ("less the teacher's", differences, head[:-1])):
            if table:
                lines += [f"Sampler {locking}, {title}, nats per token:", ""]
                lines += [line("", columns), "| --- |" + " ---: |" * len(columns), *table, ""]
    about = f"{options.blocks} blocks of {length} held-out tokens; seeds {options.seeds}; {options.rounds} rounds of {options.steps_per_round} steps."
    lines += [f"{about} ± is the standard error over blocks, of the paired difference."]
    write_atomically(RESULTS.with_suffix(".md"), "\n".join(lines) + "\n")
    write_json(RESULTS.with_suffix(".json"), {"about": about, "rows": content})
    print("\n".join(lines), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps_per_round", type=int, default=50)
    parser.add_argument("--scratch_steps", type=int, default=300)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--methods", nargs="+", default=[NELBO, *MCD, SCRATCH], choices=[NELBO, *MCD, SCRATCH])
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "spread_teaching")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    place = options.output_dir / "measured.json"
    measured = read_object(place) if place.exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny" / "tokenizer")
    length = tokenizer.model_max_length
    blocks = text_blocks(read_texts(RECIPES / "tiny" / "text" / "validation"), tokenizer, length, options.blocks)
    networks = [Network("teacher", None, 0, RECIPES / "tiny" / "teacher")]
    judge(options, networks[0], blocks, measured)
    for seed in options.seeds:
        for method in options.methods:
            for locking in LOCKINGS:
                for network in train(options, method, locking, seed):
                    judge(options, network, blocks, measured)
                    networks.append(network)
                report(options, networks, length, measured)


if __name__ == "__main__":
    main()
