"""`eval.json`: the figures of a run, from which the table, the plot and the model card are all made."""

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from evaluation.evaluate_model import FIRST_LOCKING, HELD_OUT_TEXT, KEY, SETTINGS
from evaluation.matched_entropy import add_matched
from modeling_mcd.files import write_atomically


@contextlib.contextmanager
def report_lock(folder: str | Path) -> Iterator[None]:
    """Waits until no other process is changing the report of a folder, then keeps others out. Not reentrant.

    It is held while rows are merged, not during an evaluation: several evaluations and a training may share a folder.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def load_report(folder: str | Path) -> dict:
    """The content of a folder's `eval.json`, or `{"results": []}` if there is none.

    Rows need only their key and settings: an older report lacks the figures that did not exist yet, and its rows without a
    locking have the only one that there was.

    Raises:
        ValueError: the file is not a report.
    """
    path = Path(folder) / "eval.json"
    if not path.exists():
        return {"results": []}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for row in report["results"]:
            row.setdefault("locking", None if row["model"] == HELD_OUT_TEXT else FIRST_LOCKING)
        if not all({*KEY, *SETTINGS} <= set(row) for row in report["results"]):
            raise KeyError("results")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} is not a report of this library: move it away or choose another output folder"
        ) from None
    return report


def save_results(folder: str | Path, rows: Sequence[dict] = (), **about) -> dict:
    """Merges rows into the folder's `eval.json` and returns the complete report. The file is replaced completely or not at all.

    A row replaces the one with the same point and protocol (`KEY` and `SETTINGS`). Rows that another process has saved
    meanwhile are kept. `about` is stored beside the results, as any JSON values: None leaves an entry unchanged, and a
    dictionary is merged into the old one. The card reads `label` (the row label of the folder's own model), `recipe` (YAML),
    `data` and `method` (a sentence each), `figures` (a list of lines with other figures of the folder's model), `kind`
    ("causal" for an autoregressive model), `repository` (the folder's name on the Hub), `revision` (its branch there),
    `base_model` (the Hub name of the network that this one was made from), `base_model_relation` ("adapter" or "finetune"),
    `datasets` and `language` (lists of names), `license`, and `writing` (what `writing.gif` is of, see `writing.py`).

    Raises:
        ValueError: `eval.json` is not a report, or a value is infinite or NaN; the file is left as it was.
    """
    with report_lock(folder):
        report = load_report(folder)
        for row in rows:
            missing = [name for name in (*KEY, *SETTINGS) if name not in row]
            if missing:
                raise ValueError(f"a row of results must hold {missing[0]!r}, but has {sorted(row)}")
        results = {tuple(row[name] for name in (*KEY, *SETTINGS)): row for row in [*report["results"], *rows]}
        for name, value in about.items():
            if value is not None:
                report[name] = report.get(name, {}) | value if isinstance(value, dict) else value
        report["versions"] = {"python": platform.python_version()} | {
            name: version(name) for name in ("torch", "transformers")
        }
        report["results"] = list(results.values())
        add_matched(report["results"])
        content = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(Path(folder) / "eval.json", content + "\n")
    return report
