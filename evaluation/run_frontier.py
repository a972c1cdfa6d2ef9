"""Judges models over temperatures, steps, lockings and precisions, and writes one page: `frontier.html`, `.png`, `.svg`, `.md`.

    python evaluation/run_frontier.py teacher=MODEL student=MODEL --judge gpt2-large --reference_text TEXT \\
        --steps 4 8 16 32 --temperatures 1.0 0.9 0.8 --lockings independent spread --precisions float64 legacy_float32

Every finished row is saved at once. If it is killed, the same command continues where it was. Without models the page is made
from the rows that the output folder holds. Several processes (`accelerate launch`, `torchrun`) share the samples.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from evaluation.evaluate_model import FIRST_LOCKING
from evaluation.frontier import ENTROPIES, frontier_of
from evaluation.frontier_page import write_page
from evaluation.judging import (
    add_evaluation_arguments,
    add_models,
    add_text_arguments,
    judge_models,
    judging_of,
)
from evaluation.options import EvaluationArguments
from evaluation.results import load_report
from evaluation.team import Team, launched_team
from modeling_mcd.command_line import OneLineParser
from modeling_mcd.generation_config_mdlm import CHOICES


ANSWERS = ("evaluation_answers", "evaluation_answer_length")


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(prog="mcd-frontier", description=__doc__.split("\n")[0])
    add_models(result, nargs="*")
    result.add_argument(
        "--precisions",
        nargs="+",
        choices=CHOICES["precision"],
        default=["float64"],
        help="Precisions of the draws; legacy_float32, the original code, goes with independent locking and has no bound.",
    )
    add_evaluation_arguments(
        result, required=(), leave_out=("evaluation_precision", *ANSWERS), evaluation_seeds=3, evaluation_samples=512
    )
    add_text_arguments(result)
    result.add_argument(
        "--match",
        choices=ENTROPIES,
        help="The entropy that is matched; of trigrams by default where words are counted.",
    )
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(options: argparse.Namespace):
    """Raises ValueError or OSError before the first sample is drawn and the first byte written."""
    with launched_team() as team:
        if options.models:
            folder = judge(options, team)
        elif options.output_dir is None:
            raise ValueError("nothing to show: name models to judge, or a folder with an eval.json by --output_dir")
        else:
            folder = Path(options.output_dir)
    if team.rank > 0:
        return
    files = write_page(folder, frontier_of(load_report(folder)["results"], folder, options.match))
    print((folder / "frontier.md").read_text(encoding="utf-8"))
    print(f"Saved in {folder}: {', '.join(file.name for file in files)}")


def judge(options: argparse.Namespace, team: Team) -> Path:
    """Adds the rows that are missing to the report; returns its folder."""
    if options.judge is None:
        raise ValueError("nothing to judge by: give --judge")
    arguments = judging_of(options)
    protocols = [of_precision(arguments, precision) for precision in dict.fromkeys(options.precisions)]
    report, own_label = judge_models(options, protocols, team)
    report.write(label=own_label)
    return report.folder


def of_precision(arguments: EvaluationArguments, precision: str) -> EvaluationArguments:
    """The grid of one precision: the original code knows neither another locking nor a bound."""
    if precision != "legacy_float32":
        return replace(arguments, evaluation_precision=precision)
    if FIRST_LOCKING not in arguments.evaluation_lockings:
        raise ValueError(
            f"precision legacy_float32 has {FIRST_LOCKING} locking alone, but --lockings are "
            f"{arguments.evaluation_lockings}: add it, or leave out that precision"
        )
    return replace(arguments, evaluation_precision=precision, evaluation_lockings=[FIRST_LOCKING], evaluation_bound=0)


if __name__ == "__main__":
    main()
