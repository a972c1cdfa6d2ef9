"""The table and the plot of answers: exact match at each number of steps, tokens per forward, accuracy under parallelism."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display and no global state

from evaluation.answers import accuracy_under_parallelism, curves_of
from evaluation.figures import ANSWER_FIGURES
from modeling_mcd.files import write_atomically


EXACT_MATCH, TPF = ANSWER_FIGURES
SAME = ("questions", "digest", "count", "length", "seeds", "precision", "temperature")  # within a table


def answer_tables(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows, grouped by the questions and by how they were asked: all figures of a table compare."""
    tables = {}
    for row in rows:
        tables.setdefault(tuple(row[name] for name in SAME), []).append(row)
    return list(tables.values())


def order_of(row: dict) -> str:
    """What decides which tokens are revealed when: the sampler, or the locking of the ancestral one."""
    others = [row["locking"]] * (row["locking"] != "independent")
    return row["locking"] if row["sampler"] == "ancestral" else ", ".join([row["sampler"], *others])


def with_aup(rows: Sequence[dict]) -> list[tuple[str, list[dict], float | None]]:
    """The curves of a table: name, rows by steps, and accuracy under parallelism (None: a point could not be measured)."""
    best = max((100 * row["exact_match"] for row in rows if row["exact_match"] is not None), default=0.0)
    curves = []
    for of_curve in curves_of(rows).values():
        points = [(row[TPF.name], row[EXACT_MATCH.name]) for row in of_curve]
        known = not any(None in point for point in points)
        aup = accuracy_under_parallelism([(rho, 100 * y) for rho, y in points], best) if known else None
        curves.append((f"{of_curve[0]['model']} / {order_of(of_curve[0])}", of_curve, aup))
    return curves


def answers_markdown(rows: Sequence[dict]) -> str:
    """A table and its caption for each set of questions; empty without rows."""
    return "\n\n".join(map(_table, answer_tables(rows)))


def _table(rows: list[dict]) -> str:
    steps, curves = sorted({row["steps"] for row in rows}), with_aup(rows)
    header = ["Exact match (TPF)", *(f"{n} step{'s' * (n > 1)}" for n in steps), "AUP"]
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(steps) + 1)]
    for name, of_curve, aup in curves:
        cells = {row["steps"]: f"{EXACT_MATCH.show(row)} ({TPF.show(row)})" for row in of_curve}
        shown = "n/a" if aup is None else f"{aup:.0f}"
        lines.append("| " + " | ".join([name, *(cells.get(n, "-") for n in steps), shown]) + " |")
    row, error = rows[0], 50 / math.sqrt(rows[0]["count"] * rows[0]["seeds"])
    lines += [
        "",
        f"Exact match of the answers to {row['count']} questions ({row['questions']}), each of up to {row['length']} tokens, at "
        f"temperature {row['temperature']:g}, {row['seeds']} seed{'s' * (row['seeds'] > 1)}; one standard error is at most "
        f"{error:.1f} points. In brackets tokens per forward (TPF): tokens of the answers, their ends included, divided by "
        "forwards of the network. AUP: accuracy under parallelism (arXiv 2601.07568), the area under accuracy against TPF, "
        "with its penalty on lost accuracy, against the best of this table.",
    ]
    notes = [f"{name}, {row['steps']} steps: {row['note']}" for name, part, _ in curves for row in part if row["note"]]
    if notes:
        lines += ["", f"n/a: could not be measured ({'; '.join(notes)})."]
    return "\n".join(lines)


def write_answers_plot(folder: str | Path, rows: Sequence[dict]):
    """Writes `answers.png`: exact match against forwards of the network, a panel for each table."""
    tables = answer_tables(rows)
    figure = Figure(figsize=(6.5 * len(tables), 4.2), layout="constrained")
    for panel, of_table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        for name, of_curve, _ in with_aup(of_table):
            points = sorted(
                (row["nfe"], 100 * row["exact_match"]) for row in of_curve if row["exact_match"] is not None
            )
            panel.plot([nfe for nfe, _ in points], [accuracy for _, accuracy in points], "o-", label=name)
        panel.set(xlabel="NFE (forwards for an answer)", ylabel="exact match (%)", ylim=(-2, 102))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(Path(folder) / "answers.png", buffer.getvalue())
