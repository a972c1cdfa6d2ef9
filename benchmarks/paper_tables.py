"""The paper's Tables 1 and 2 and Figure 3 on equal terms: every method from one teacher, with one budget, under one judge.

    python -m benchmarks.paper_tables [--recipes tiny] [--seeds 1 2 3] [--rounds 3] [--steps_per_round 50] [--minutes 18]

`--recipes NAME` takes recipes/NAME.yaml, NAME_sdtt.yaml, NAME_dcd.yaml and so on; teacher or judge are trained first when
their folder does not exist and NAME_teacher.yaml, NAME_uniform_teacher.yaml or NAME_judge.yaml do. What argparse does not
know goes to every training, as in `--train_text NOVELS/train`.

The budget is counted in trunk forwards of a batch: 3 for a step of the student (its backward is 2), 1 for each forward of a teacher.
All methods get the same number, so SDTT makes fewer steps than MCD, and the control that goes on with the NELBO more.
`--spread` adds lines for samples under spread locking, and the N-step bound of everything.

The command stops after `--minutes` and says so; started again it goes on where it was, as often as needed: a training is
killed and resumes from its last checkpoint, an evaluation loses at most one cell. Seed by seed it writes
`benchmarks/results/paper_tables_NAME.{md,json,png}`, or with `--no_tables` only does the work. All that it measured is in
`eval.json` of its output folder: a network with all its cells there is not trained again, so a copy of that one file goes on
with the work on another machine. Several commands for different `--seeds` or `--methods` may share the folder.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from benchmarks.measuring import count
from benchmarks.paper_report import write_tables
from evaluation import RunReport, load_report, read_texts, save_results, text_blocks, vocabulary_of
from evaluation.judge import load_judge
from evaluation.options import EvaluationArguments
from modeling_mcd.loading import load_model
from trainers.run_mdlm import ModelArguments


ROOT = Path(__file__).resolve().parent.parent
MCD_COST = 4
# Suffix of a row's label -> what `EvaluationProtocol` is told besides, and the locking. All but the first are for masks alone.
LEGACY, SPREAD = ", legacy float32", ", spread"
VARIANTS = {"": ({}, "independent"), LEGACY: ({"precision": "legacy_float32"}, "independent"), SPREAD: ({}, "spread")}


@dataclass(frozen=True)
class Run:
    """A method as the tables know it.

    Args:
        cost: trunk forwards of a step.
        words: what it changes in its recipe.
        teacher: label of the network that it starts from.
        has_rounds: whether its rounds are rows of their own; else only its last student is.
        first_round_only: a row of Table 2.
    """

    label: str
    recipe: str
    cost: int
    words: tuple[str, ...] = ()
    teacher: str = "teacher"
    has_rounds: bool = True
    first_round_only: bool = False


RUNS = (
    Run("MCD", "{}.yaml", MCD_COST),
    Run("SDTT", "{}_sdtt.yaml", 5),
    Run("DSCD", "{}_dscd.yaml", 4, has_rounds=False),
    Run("MPDC", "{}_mpdc.yaml", 4, has_rounds=False),
    Run("NELBO goes on", "{}_teacher.yaml", 3, has_rounds=False),
    Run("DCD", "{}_dcd.yaml", 4, teacher="uniform teacher"),
    Run("uniform NELBO goes on", "{}_uniform_teacher.yaml", 3, teacher="uniform teacher", has_rounds=False),
    Run("student-first only", "{}.yaml", MCD_COST, ("--reveal", "divergence"), first_round_only=True),
    Run("teacher-first", "{}.yaml", MCD_COST, ("--divergence", "teacher_first"), first_round_only=True),
)


@dataclass(frozen=True)
class Network:
    """One network to judge: a teacher (no run), or the student of a run after a round, for one seed.

    Args:
        complete: judged at every N; otherwise only at those of the sweeps.
        sweep: judged at every temperature, with the original code's draws, and under spread locking.
    """

    folder: Path
    teacher: str
    run: Run | None = None
    round: int = 0
    seed: int = 0
    complete: bool = True
    sweep: bool = True

    @property
    def method(self) -> str:
        if self.run is None:
            return self.teacher
        return f"{self.run.label} R{self.round}" if self.run.has_rounds else self.run.label

    @property
    def label(self) -> str:
        return self.method if self.run is None else f"{self.method}, seed {self.seed}"


def default_shape() -> list:
    """Takes a recipe's shape back, on the command line: a model that is given has its own."""
    fields = [field for field in dataclasses.fields(ModelArguments) if field.default is not None]
    return [word for field in fields for word in (f"--{field.name}", field.default)]


class Tables:
    def __init__(self, options: argparse.Namespace, extra: list[str]):
        self.options, self.extra = options, extra
        self.deadline = time.monotonic() + 60 * options.minutes
        self.folder = Path(options.output_dir or ROOT / "runs" / f"paper_tables_{options.recipes}").resolve()
        self.report = load_report(self.folder)
        self.runs = [run for run in RUNS if options.methods is None or run.label in options.methods]
        self.recipe = self.read_recipe("{}.yaml")
        self.teachers = {"teacher": self.path(self.recipe["teacher"])}
        if any(run.teacher == "uniform teacher" for run in self.runs):
            self.teachers["uniform teacher"] = self.path(self.read_recipe("{}_dcd.yaml")["teacher"])

    def recipe_path(self, pattern: str) -> Path:
        return ROOT / "recipes" / pattern.format(self.options.recipes)

    def read_recipe(self, pattern: str) -> dict:
        given = dict(zip((word.lstrip("-") for word in self.extra[::2]), self.extra[1::2], strict=True))
        return yaml.safe_load(self.recipe_path(pattern).read_text(encoding="utf-8")) | given

    def path(self, name: str) -> Path:
        return (ROOT / "recipes" / name).resolve() if name.startswith((".", "..")) else (ROOT / name).resolve()

    # Pieces: each is done when its result is there.

    def stop_in_time(self):
        if time.monotonic() > self.deadline:
            sys.exit(f"{self.options.minutes:g} minutes are over; start the same command again to go on")

    def save(self, rows: tuple[dict, ...] = (), **about: dict):
        """Adds rows to the report, and entries to the dictionaries beside them. Another command may be adding too."""
        self.report = save_results(self.folder, rows, **about)

    def train(self, script: str, output: Path, *words):
        """Runs an entry point until it ends or time is over. A loss that is not finite is written down as a failure."""
        if (output / "model.safetensors").exists():
            return
        self.stop_in_time()
        print(f"training {output.name}", flush=True)
        command = [sys.executable, str(ROOT / "trainers" / script), *map(str, words), *self.extra]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            subprocess.run(
                [*command, "--output_dir", str(output)],
                env=environment,
                timeout=max(1.0, self.deadline - time.monotonic()),
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                check=True,
            )
        except subprocess.TimeoutExpired:
            self.stop_in_time()
        except subprocess.CalledProcessError as error:
            last_line = error.stderr.strip().splitlines()[-1]
            if "is nan" not in last_line and "is inf" not in last_line:
                raise SystemExit(f"{output.name}: {last_line}") from None
            self.save(failures={output.name: last_line})

    def make_judge(self):
        self.train("run_judge.py", self.path(self.recipe["judge"]), self.recipe_path("{}_judge.yaml"))

    def make_teacher(self, label: str):
        self.train("run_mdlm.py", self.teachers[label], self.recipe_path(f"{{}}_{label.replace(' ', '_')}.yaml"))

    def make_student(self, run: Run, seed: int):
        options, folder = self.options, self.student_folder(run, seed)
        rounds = 1 if run.first_round_only else options.rounds
        steps = round(options.steps_per_round * MCD_COST / run.cost)
        words = [self.recipe_path(run.recipe), "--seed", seed, "--report_to", "none", "--disable_tqdm", "true"]
        words += ["--logging_steps", 1, "--save_steps", max(1, steps // 5), *run.words]
        if run.recipe.endswith("teacher.yaml"):
            words += ["--model", self.teachers[run.teacher], "--max_steps", rounds * steps]
            words += ["--eval_strategy", "no", "--lr_scheduler_type", "constant_with_warmup"]
            words += ["--weight_decay", 0, "--adam_beta2", 0.999, *default_shape()]
            same = ("learning_rate", "warmup_steps", "per_device_train_batch_size", "ema_decay")
            words += [word for name in same for word in (f"--{name}", self.recipe[name])]
            self.train("run_mdlm.py", folder, *words)
        else:
            words += ["--teacher", self.teachers[run.teacher], "--judge", "null"]
            words += ["--num_rounds", rounds, "--steps_per_round", steps]
            if "tau" in self.read_recipe(run.recipe):  # one for each round: more are refused
                words += ["--tau", *self.recipe["tau"][:rounds]]
            self.train("run_mcd.py", folder, *words)
        self.save(trainings={folder.name: self.measured_in(folder)})

    def student_folder(self, run: Run, seed: int) -> Path:
        return self.folder / f"{run.label.replace(' ', '_')}-{seed}"

    @staticmethod
    def measured_in(folder: Path) -> dict:
        """What a training logged: its first loss, its largest loss and gradient norm; {} if it failed before a checkpoint."""
        states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
        history = [x for state in states[-1:] for x in json.loads(state.read_text())["log_history"] if "loss" in x]
        if not history:
            return {}
        return {
            "loss at step 1": history[0]["loss"],
            "largest loss": max(entry["loss"] for entry in history),
            "largest gradient norm": max(entry["grad_norm"] for entry in history),
        }

    def students(self, run: Run, seed: int) -> list[Network]:
        folder = self.student_folder(run, seed)
        if folder.name in self.report.get("failures", {}):
            return []
        if run.recipe.endswith("teacher.yaml"):
            return [Network(folder, run.teacher, run, seed=seed)]
        last = 1 if run.first_round_only else self.options.rounds
        return [
            Network(
                folder / f"round-{i}",
                run.teacher,
                run,
                i,
                seed,
                complete=i == last and not run.first_round_only,
                sweep=i == last or run.label == "MCD" and i == 1,  # MCD R1 is the hybrid of Table 2
            )
            for i in range(1 if run.has_rounds else last, last + 1)
        ]

    def variants(self, network: Network) -> list[str]:
        if network.teacher != "teacher" or not network.sweep:
            return [""]
        return [suffix for suffix in VARIANTS if suffix != SPREAD or self.options.spread]

    def grid(self, network: Network, suffix: str) -> dict[float, list[int]]:
        """Temperature -> the numbers of steps to judge a network at."""
        options = self.options
        steps = options.steps if network.complete and not suffix else options.swept_steps
        swept = network.sweep and suffix != LEGACY
        return {1.0: steps} | {t: options.swept_steps for t in options.temperatures if swept}

    def is_judged(self, network: Network) -> bool:
        rows = [row for row in self.report["results"] if row["samples"] == self.options.samples]
        if self.options.spread:
            rows = [row for row in rows if row["temperature"] != 1 or row["precision"] != "float64" or "bound" in row]
        known = {(row["model"], row["steps"], row["temperature"]) for row in rows}
        return all(
            (network.label + suffix, n, temperature) in known
            for suffix in self.variants(network)
            for temperature, steps in self.grid(network, suffix).items()
            for n in steps
        )

    def make_and_judge(self, seed: int):
        """A teacher is made when something that rests on it is still to be judged."""
        for label, folder in self.teachers.items():
            todo = [run for run in self.runs if run.teacher == label and not self.is_done(run, seed)]
            if todo or not self.is_judged(Network(folder, label)):
                self.make_teacher(label)
                self.judge([Network(folder, label)])
            for run in todo:
                self.make_student(run, seed)
                self.judge(self.students(run, seed))

    def is_done(self, run: Run, seed: int) -> bool:
        return all(map(self.is_judged, self.students(run, seed)))

    def judge(self, networks: list[Network]):
        options, recipe = self.options, self.recipe
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(self.teachers["teacher"])
        train, validation = self.path(recipe["train_text"]), self.path(recipe["validation_text"])
        arguments = EvaluationArguments(
            entropy_unit=recipe.get("entropy_unit", "tokens"),
            evaluation_samples=options.samples,
            evaluation_seeds=1,
            evaluation_batch_size=options.batch_size,
        )
        protocol = arguments.protocol(
            *load_judge(str(self.path(recipe["judge"])), recipe.get("judge_dtype", "float32"), device),
            vocabulary_of(read_texts(train)) if train.exists() else None,
        )
        text = read_texts(validation)
        if not self.report["results"]:
            blocks = text_blocks(text, tokenizer, recipe["block_length"], 512)
            RunReport(self.folder, protocol, []).judge_text(blocks, tokenizer)
        blocks = text_blocks(text, tokenizer, recipe["block_length"], options.bound_blocks)
        for network in networks:
            model = load_model(str(network.folder)).to(device)
            for suffix in self.variants(network):
                settings, locking = VARIANTS[suffix]
                bound = {"bound_blocks": blocks} if options.spread and suffix != LEGACY else {}  # whose law is another
                # A teacher is one network: its spread is over seeds of sampling, that of students over seeds of training.
                how = replace(protocol, seeds=3 if network.run is None else 1, **settings)
                for temperature, steps in self.grid(network, suffix).items():
                    for n in steps:
                        report = RunReport(self.folder, how, [n], [temperature], lockings=[locking], **bound)
                        report.judge(network.label + suffix, model, tokenizer)
                        self.stop_in_time()
        self.report = load_report(self.folder)

    def explosions(self, seeds: list[int]) -> dict:
        """Of the trainings of Table 2 (and MCD): the loss at the first step, the largest loss and gradient norm."""
        measured = {}
        for run in self.runs:
            if run.first_round_only or run.label == "MCD":
                of_seeds = [self.report["trainings"][self.student_folder(run, seed).name] for seed in seeds]
                if all(of_seeds):
                    measured[run.label] = {
                        name: (statistics.fmean if name == "loss at step 1" else max)(row[name] for row in of_seeds)
                        for name in of_seeds[0]
                    }
        return measured

    def write(self, seeds: list[int]):
        networks = [Network(folder, label) for label, folder in self.teachers.items()]
        networks += [network for run in self.runs for seed in seeds for network in self.students(run, seed)]
        options = argparse.Namespace(**vars(self.options) | {"seeds": seeds})
        write_tables(
            options,
            [(n.method + s, n.label + s, n.teacher + s) for n in networks for s in self.variants(n)],
            self.report["results"],
            compute=options.rounds * options.steps_per_round * MCD_COST,
            second={f"{run.label} R1" for run in RUNS if run.first_round_only},
            explosions=self.explosions(seeds),
            failures=[f"{name}: FAILED, {line}" for name, line in self.report.get("failures", {}).items()],
            trainings=self.extra,
        )


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--recipes", default="tiny", help="Common beginning of the recipes' names.")
    parser.add_argument("--methods", nargs="+", choices=[run.label for run in RUNS], help="All by default.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Of training.")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps_per_round", type=count, default=50, help="Of MCD; the others by their cost.")
    parser.add_argument("--steps", type=count, nargs="+", default=[2, 4, 8, 16, 32, 64, 128], help="Of sampling, N.")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.8, 0.6], help="Of the sweeps, besides 1.")
    parser.add_argument(
        "--swept_steps",
        type=count,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        help="N of the sweeps, the original code's draws, spread locking, Table 2 and the rounds before the last.",
    )
    parser.add_argument("--samples", type=count, default=16, help="For each network, N and temperature.")
    parser.add_argument("--spread", action="store_true", help="Lines for spread locking and for the N-step bound too.")
    parser.add_argument("--bound_blocks", type=int, default=16, help="Held-out blocks of the bound.")
    parser.add_argument("--batch_size", type=count, default=8)
    parser.add_argument("--minutes", type=float, default=18.0, help="Stop after so many; start again to go on.")
    parser.add_argument("--output_dir", help="Where the runs go; runs/paper_tables_NAME by default.")
    parser.add_argument("--no_tables", action="store_true", help="Only train and judge.")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), help="Where the tables go.")
    return parser


def main():
    options, extra = options_parser().parse_known_args()
    tables = Tables(options, extra)
    tables.make_judge()
    for number, seed in enumerate(options.seeds, start=1):
        tables.make_and_judge(seed)
        if not options.no_tables:
            tables.write(options.seeds[:number])


if __name__ == "__main__":
    main()
