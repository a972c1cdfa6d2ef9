"""Scores of the lm-evaluation-harness for the Hub's leaderboards: `.eval_results/TASK.yaml` in a model's folder.

    mcd-eval-results runs/harness/results_2026-11-27.json runs/student

The Hub reads these files from a model's repository, for the benchmarks that it has registered. All other figures of a model stand
in its card.
"""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from modeling_mcd.adapters import ADAPTER_CONFIG
from modeling_mcd.command_line import OneLineParser
from modeling_mcd.files import write_atomically


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that the Hub has registered.

    Args:
        dataset, task: its ids on the Hub.
        metric: of the harness, with the filter that the harness names first.
    """

    dataset: str
    task: str
    metric: str


# By the harness's name. Others are registered too, but the harness does not measure them, or their ids are not certain.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "gsm8k", "exact_match,strict-match"),
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match,custom-extract"),
}


def eval_result_entries(results: dict) -> dict[str, EvalResultEntry]:
    """The entries of the `results_*.json` that the harness writes with `--output_path`, by the harness's name of the benchmark.

    Values are percentages, as the leaderboards have them. `notes` say how the score came about.

    Raises:
        ValueError: none of its tasks is in `BENCHMARKS`, or one was run on a part of its questions.
    """
    found = {}
    for name, benchmark in BENCHMARKS.items():
        scores = results["results"].get(name)
        if scores is None:
            continue
        parts = results.get("group_subtasks", {}).get(name) or [name]
        counts = [results["n-samples"][part] for part in parts]
        asked, there = (sum(count[key] for count in counts) for key in ("effective", "original"))
        if asked < there:
            raise ValueError(
                f"{name} was run on {asked} of its {there} questions, which is no score for a leaderboard: run it without --limit"
            )
        metric, _, filtered = benchmark.metric.partition(",")
        notes = [f"{results['n-shot'][parts[0]]}-shot", f"{metric} ({filtered})", *_settings(results["config"])]
        found[name] = EvalResultEntry(
            benchmark.dataset,
            benchmark.task,
            round(100 * scores[benchmark.metric], 2),
            notes=", ".join([*notes, f"lm-evaluation-harness {results['lm_eval_version']}"]),
        )
    if not found:
        raise ValueError(
            f"none of the tasks {', '.join(results['results'])} is one whose leaderboard is known here: "
            f"{' and '.join(BENCHMARKS)} are"
        )
    return found


def _settings(config: dict) -> list[str]:
    """How the texts were written; never the path of a model."""
    model = config.get("model_args") or {}
    if isinstance(model, str):
        model = dict(part.split("=", 1) for part in model.split(",") if "=" in part)
    options = {name: model[name] for name in ("draws", "steps", "seed") if name in model}
    return [f"{name} {value}" for name, value in (options | (config.get("gen_kwargs") or {})).items()]


def write_eval_results(file: str | Path, folder: str | Path) -> dict[Path, EvalResultEntry]:
    """Writes `.eval_results/TASK.yaml` into a model's folder for each registered benchmark in a file of the harness.

    A file that is there already is written anew. Returns what was written, by file.

    Raises:
        ValueError: see `eval_result_entries`; the file is not one of the harness's, or the folder holds no model.
        FileNotFoundError: there is no such file.
    """
    file, folder = Path(file), Path(folder)
    if not any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
        raise ValueError(
            f"{folder} holds no config.json and no {ADAPTER_CONFIG}: give the folder of the model that was measured"
        )
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        entries = eval_result_entries(results)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no file of results of the lm-evaluation-harness ({type(error).__name__}: {error}): give the "
            "results_*.json that it writes with --output_path"
        ) from None
    written = {folder / ".eval_results" / f"{name}.yaml": entry for name, entry in entries.items()}
    for path, entry in written.items():
        write_atomically(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
    return written


def parser() -> OneLineParser:
    result = OneLineParser(prog="mcd-eval-results", description=__doc__.split("\n")[0])
    result.add_argument("results", metavar="RESULTS", help="The results_*.json of mcd-lm-eval run --output_path.")
    result.add_argument("model", metavar="MODEL", help="Folder of the model that was measured.")
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(options: argparse.Namespace):
    for path, entry in write_eval_results(options.results, options.model).items():
        print(f"wrote {path}: {entry.value} on {entry.dataset_id} ({entry.notes})")
    print("To the Hub:", shlex.join(["hf", "upload", "you/model", str(path.parent), ".eval_results"]))


if __name__ == "__main__":
    main()
