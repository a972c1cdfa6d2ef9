"""The command line: `python -m benchmarks.gpu_day STAGE [options]`."""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu_day import bring, check, speed, students, teacher
from benchmarks.gpu_day.stage import OUT_OF_TIME, Day, Stage
from benchmarks.measuring import count
from modeling_mcd.command_line import OneLineParser


STAGES = {
    "check": check.stage,
    "speed": speed.stage,
    "teacher": teacher.stage,
    "students": students.students,
    "tables": students.tables,
}


PACKING = 120.0  # seconds, beside the minutes of the command


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(prog="gpu_day", description="What only a GPU can show, in stages that may be cut off.")
    words = [*STAGES, "all", "bring", "unpack"]
    result.add_argument(
        "stage", nargs="?", default="all", choices=words, help="bring: copy home what is left; unpack: there."
    )
    result.add_argument("--dry-run", dest="dry_run", action="store_true", help="Print the plan and its minutes.")
    result.add_argument("--scale", choices=("gpu", "cpu"), default="gpu", help="cpu: a rehearsal, everything tiny.")
    result.add_argument("--minutes", type=float, default=8.0, help="Of this command; started again it goes on.")
    result.add_argument("--novels", help="The corpus: a folder with train/ and validation/, or that as .tar.xz.")
    result.add_argument("--tokenizer", help="Of the sub-word models; the recipe's by default.")
    result.add_argument("--training_minutes", type=float, help="Of each training of the stage teacher.")
    result.add_argument("--steps_per_round", type=count, default=300, help="Of MCD; the other methods by their cost.")
    result.add_argument("--samples", type=count, default=1000, help="For each network, N and temperature.")
    result.add_argument("--seeds", type=int, nargs="+", default=[1], help="Of the students' training.")
    result.add_argument("--results", help="Where gpu_STAGE.json goes; benchmarks/results by default.")
    result.add_argument("--runs", help="Where networks and logs go; runs/gpu_day by default.")
    result.add_argument("--bring", metavar="FOLDER", help="At the end, copy results and networks here.")
    result.add_argument("--file_mb", type=float, default=15.9, help="A file that comes home is smaller than this.")
    result.add_argument("--files", type=count, default=8, help="At most so many files come home from one command.")
    result.add_argument("--total_mb", type=float, default=64.0, help="And no more than this together.")
    result.add_argument("--source", help="Of unpack: the folder with what was brought.")
    return result


def plan(stages: list[Stage], minutes: float):
    """Prints what is left to do. The estimates are guesses until a card has done it."""
    for stage in stages:
        pieces = stage.unfinished()
        total = sum(piece.minutes for piece in pieces)
        print(
            f"{stage.name}: {len(pieces)} of {len(stage.pieces)} pieces left, about {total:.1f} min on an H100", end=""
        )
        print(f" ({max(1, -(-total // minutes)):.0f} commands of {minutes:g} min)" if pieces else "")
        for piece in pieces:
            print(f"    {piece.minutes:4.1f} min  {piece.name}")


def main(arguments: list[str] | None = None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = parser()
    options = commands.parse_args(words)
    options.words = words
    if options.minutes <= 0:
        commands.error(f"--minutes must be positive, not {options.minutes:g}")
    day = Day(options)
    if options.stage == "unpack":
        if options.source is None:
            commands.error("unpack needs --source FOLDER, what was brought home")
        day.say(f"in {day.runs}: {', '.join(bring.unpack(Path(options.source), day.runs))}")
        return
    stages = [make(day) for name, make in STAGES.items() if options.stage in (name, "all")]
    if options.dry_run:
        plan(stages, options.minutes)
        return
    complete = True
    with day.sign_of_life():
        for stage in stages:
            complete &= stage.run()
            if day.left() <= 0:
                break
        if options.bring or options.stage == "bring":
            day.doing, day.deadline = "packing", time.monotonic() + PACKING
            bring.bring(day, Path(options.bring or day.runs / "bring"))
    failed = any("failed" in piece for stage in stages for piece in day.read(stage.name).get("pieces", {}).values())
    sys.exit(0 if complete else 1 if failed and day.left() > 0 else OUT_OF_TIME)
