"""Everything that is made from a report."""

from pathlib import Path

from evaluation.model_card import write_model_card
from evaluation.plot import write_plot
from evaluation.table import markdown_table
from modeling_mcd.files import write_atomically


def write_report(folder: str | Path, report: dict, name: str | None = None) -> str:
    """Writes `eval.md`, `eval.png` and, where a model lies in the folder, its card; returns the table for the console.

    Args:
        report: as `save_results` returns it.
        name: heading of the card; the folder's name by default.
    """
    table = markdown_table(report["results"])
    write_atomically(Path(folder) / "eval.md", table + "\n")
    if report["results"]:
        write_plot(folder, report["results"])
    if (Path(folder) / "config.json").exists():
        write_model_card(folder, report, name)
    return table
