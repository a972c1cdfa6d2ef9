"""Stages `students` and `tables`: every method from the teacher of this day on equal terms, and what it measures.

Both are `benchmarks.paper_tables`, a network at a time: all that was judged is in one `eval.json`, and a network with all its
figures there is neither trained nor judged again, on another machine either.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import yaml

from benchmarks.gpu_day.stage import Day, OutOfTimeError, Piece, Stage
from benchmarks.gpu_day.teacher import folder_of, recipe_of, training_recipe
from benchmarks.paper_tables import LEGACY, RUNS, Network, Run, Tables, options_parser


class DayTables(Tables):
    """The tables with the recipes that were written for this machine."""

    def __init__(self, options: Namespace, recipes: Path):
        self.recipes = recipes
        super().__init__(options, [])

    def recipe_path(self, pattern: str) -> Path:
        return self.recipes / pattern.format("novels")

    def variants(self, network: Network) -> list[str]:
        """Without the original code's draws: noise of the size of the vocabulary, made on the CPU, takes minutes."""
        return [suffix for suffix in super().variants(network) if suffix != LEGACY]


def tables_of(day: Day) -> DayTables:
    options = day.options
    folder = day.runs / "recipes" / "students"
    write_recipes(day, folder)
    small = {
        "rounds": 3,
        "steps_per_round": 2,
        "steps": [1, 4],
        "swept_steps": [4],
        "temperatures": [0.8],
        "samples": 4,
    }
    large = {"rounds": 3, "steps_per_round": options.steps_per_round, "steps": [1, 2, 4, 8, 16, 32, 64]}
    large |= {"swept_steps": [4, 8, 16], "temperatures": [0.9, 0.8, 0.7], "samples": options.samples}
    given = options_parser().parse_args([])
    given.__dict__ |= small if day.small else large
    given.recipes, given.seeds = "gpu_novels", options.seeds
    given.spread = True
    given.batch_size, given.bound_blocks = (4, 4) if day.small else (250, 512)
    given.minutes, given.output_dir = day.left() / 60, str(day.runs / "tables")
    given.results = str(day.runs / "results" if day.small else day.results)
    return DayTables(given, folder)


def write_recipes(day: Day, folder: Path):
    """The family `novels`, with the networks and texts of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher, uniform, judge = (str(folder_of(day, label)) for label in ("teacher", "uniform teacher", "judge"))
    family = {run.recipe: run.teacher for run in RUNS}
    for pattern, kind in family.items():
        name = pattern.format("novels").removesuffix(".yaml")
        if name.endswith("teacher"):
            recipe = training_recipe(day, kind)
        else:
            recipe = recipe_of(day, name, teacher=teacher if kind == "teacher" else uniform, judge=judge)
            if day.small:
                recipe |= {"use_cpu": True, "warmup_steps": 1, "evaluation_samples": 4}
        recipe["warmup_steps"] = min(recipe["warmup_steps"], 1 if day.small else 50)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def in_time(day: Day, function, *arguments):
    """Calls a part of `Tables`, which ends its process when time is over or a training fails."""
    try:
        return function(*arguments)
    except SystemExit as stop:
        if "minutes are over" in str(stop):
            raise OutOfTimeError from None
        raise RuntimeError(str(stop)) from None


def needs(day: Day, label: str):
    """Raises RuntimeError where a network of the stage before is missing."""
    if not (folder_of(day, label) / "model.safetensors").exists():
        raise RuntimeError(
            f"there is no {label} in {folder_of(day, label)}: finish the stage teacher, or unpack it there"
        )


def teach(day: Day, run: Run, seed: int) -> dict:
    needs(day, run.teacher)
    tables = tables_of(day)
    in_time(day, tables.make_student, run, seed)
    return tables.report["trainings"][tables.student_folder(run, seed).name]


def judge(day: Day, run: Run | None, seed: int, teacher: str) -> dict:
    """Judges the students of a run, or a teacher: Gen-PPL, entropies and known words for every N, and its sweep."""
    needs(day, teacher)
    tables = tables_of(day)
    networks = [Network(tables.teachers[teacher], teacher)] if run is None else tables.students(run, seed)
    in_time(day, tables.judge, networks)
    labels = {network.label + suffix for network in networks for suffix in tables.variants(network)}
    rows = [row for row in tables.report["results"] if row["model"] in labels and row["temperature"] == 1.0]
    names = ("model", "steps", "gen_ppl", "entropy", "trigram_entropy", "known_words", "locking", "bound")
    return {"rows": [{name: row.get(name) for name in names} for row in rows]}


def write_tables(day: Day) -> dict:
    tables = tables_of(day)
    in_time(day, tables.write, day.options.seeds)
    return {"file": "paper_tables_gpu_novels.md"}


def students(day: Day) -> Stage:
    minutes = day.options.steps_per_round / 300
    pieces = [
        Piece(f"{run.label}, seed {seed}", 0.3 + 0.5 * minutes, partial(teach, day, run, seed))
        for seed in day.options.seeds
        for run in RUNS
    ]
    return Stage(day, "students", pieces, lambda figures: [], "python -m benchmarks.gpu_day tables")


def tables(day: Day) -> Stage:
    teachers = dict.fromkeys(run.teacher for run in RUNS)
    pieces = [Piece(f"judge: {teacher}", 1, partial(judge, day, None, 0, teacher)) for teacher in teachers]
    for seed in day.options.seeds:
        pieces += [Piece(f"judge: {r.label}, seed {seed}", 0.7, partial(judge, day, r, seed, r.teacher)) for r in RUNS]
    pieces.append(Piece("tables", 0.1, partial(write_tables, day)))
    return Stage(day, "tables", pieces, lambda figures: [], "copy the results home: docs/gpu_day.md")
