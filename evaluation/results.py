"""`eval.json`: the figures of a run, from which the table, the plot and the model card are all made."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from evaluation.evaluate_model import FIGURES, KEY, SETTINGS
from evaluation.matched_entropy import add_matched
from modeling_mcd.files import write_atomically


def load_report(folder: str | Path) -> dict:
    """`eval.json` of a folder, `{"results": []}` when there is none.

    Raises:
        ValueError: the file is not a report.
    """
    path = Path(folder) / "eval.json"
    if not path.exists():
        return {"results": []}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not all({*KEY, *FIGURES, *SETTINGS} <= set(row) for row in report["results"]):
            raise KeyError("results")
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is not a report of this library: move it away or choose another output folder"
        ) from None
    return report


def save_results(folder: str | Path, rows: Sequence[dict] = (), **about) -> dict:
    """Merges rows into the folder's `eval.json` and returns the whole report. The file is replaced at once, or not at all.

    A row takes the place of the one with the same model, steps, temperature and sampler. `about` is kept beside the
    results, entries of None left as they were: `label` (the row label of the folder's own model), `recipe` (YAML),
    `data` (a sentence), `repository` (where the folder is on the Hub), anything that JSON can hold.
    """
    report = load_report(folder)
    results = {tuple(row[name] for name in KEY): row for row in [*report["results"], *rows]}
    report |= {name: value for name, value in about.items() if value is not None}
    report["versions"] = {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers")
    }
    report["results"] = list(results.values())
    add_matched(report["results"])
    write_atomically(
        Path(folder) / "eval.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return report
