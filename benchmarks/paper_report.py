"""From the rows of `paper_tables.py` to Tables 1 and 2 and Figure 3: means and spreads over seeds, Markdown, JSON and PNG."""

import json
import platform
import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure

from evaluation import matched_gen_ppl
from evaluation.figures import over_seeds
from evaluation.matched_entropy import MATCHED, held_out_row, is_matched


PLACES = ("output_dir", "results", "minutes", "no_tables")  # options that say nothing of the figures


def write_tables(
    options: Namespace,
    labels: list[tuple[str, str, str]],
    results: list[dict],
    *,
    compute,
    second,
    explosions,
    failures,
    trainings,
):
    """Writes `paper_tables_NAME.{md,json,png}` into `options.results`, and prints the tables.

    Args:
        labels: method, row label and teacher of each network, in the order of the tables; a method has one a seed.
        results: the rows of the report.
        compute: trunk forwards of each training.
        second: methods of Table 2 alone.
    """
    cells = cells_of(labels, results, options.steps)
    methods = list(dict.fromkeys(method for method, _, _ in labels))
    first = [method for method in methods if method.split(",")[0] not in second]
    ablation = [method for method in methods if method.split(",")[0] in (*second, "MCD R1", "teacher")]
    target = held_out_row(results, next(row for row in results if row["steps"] is not None))
    caption = (
        f"Generative perplexity ± standard deviation over {len(options.seeds)} seeds of training (3 of sampling for a "
        f"teacher), in brackets the entropy (nats, {target['entropy_unit']}, or trigrams where the line says so); "
        f"{options.samples} samples a seed of {target['length']} tokens, float64 draws unless the line says otherwise. Every training: {compute} trunk "
        f"forwards ({options.rounds} rounds; Table 2 one of them). Judge: {target['judge']}. Held-out text: "
        f"{target['gen_ppl']:.2f} ({target['entropy']:.2f}; trigrams {target['trigram_entropy']:.2f}). Matched: log Gen-PPL "
        f"interpolated over temperatures {[1.0, *options.temperatures]} to the entropy of held-out text. Teacher like X: the "
        "control, the teacher at the temperature where its trigram entropy is that of X at temperature 1. A cell entirely in "
        "brackets is the nearest point of a sweep that does not reach the entropy."
    )
    if options.spread:
        caption += f" Bound: nats per token of {options.bound_blocks} held-out blocks in N steps (`step_bound`)."
    text = ["## Table 1", "", *table(first, cells, options.steps), "", caption, "", "## Table 2", ""]
    text += [*table(ablation, cells, options.steps), "", "MCD R1 is the hybrid.", ""]
    if explosions:
        names = list(next(iter(explosions.values())))
        text += [line("training", names), "| --- |" + " ---: |" * len(names)]
        text += [line(label, [f"{value:.4g}" for value in row.values()]) for label, row in explosions.items()]
    text += ["", *failures]
    content = {
        "options": {name: value for name, value in vars(options).items() if name not in PLACES},
        "trainings": trainings,
        "trunk_forwards": compute,
        "cells": [{"method": method, "steps": steps, **cell} for (method, steps), cell in cells.items()],
        "explosions": explosions,
        "failures": failures,
        "held_out": target,
        "machine": f"{platform.machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}",
        **{name: version(name) for name in ("torch", "transformers")},
    }
    place = Path(options.results) / f"paper_tables_{options.recipes}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    place.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draw(first, cells, options.steps, target).savefig(place.with_suffix(".png"), dpi=120)
    print("\n".join(text) + f"\nSaved as {place}.md, .json and .png")


def cells_of(labels: list[tuple[str, str, str]], results: list[dict], steps: list[int]) -> dict:
    """(method, steps) -> what its networks measure at temperature 1, with the teacher's sweep at the same entropy beside it."""
    plain = {(row["model"], row["steps"]): row for row in results if row["temperature"] == 1.0}
    cells = {}
    for method, _, teacher in labels:
        for n in steps:
            rows = [plain[label, n] for other, label, _ in labels if other == method and (label, n) in plain]
            if not rows:
                continue
            sweep = [row for row in results if (row["model"], row["steps"]) == (teacher, n)]
            cells[method, n] = cell_of(rows, held_out_row(results, rows[0])) | {
                "teacher": teacher,
            }
            entropy = cells[method, n]["trigram_entropy"]
            like = None if entropy is None else matched_gen_ppl(sweep, entropy, "trigram_entropy")
            cells[method, n]["teacher_like_this"] = like
    return cells


def cell_of(rows: list[dict], target: dict) -> dict:
    """Means over the seeds' rows, and the spread of the Gen-PPL (of a single row: that over its seeds of sampling)."""
    nfe = [row["nfe"] for row in rows if row["nfe"] is not None]
    cell = {"nfe": statistics.fmean(nfe) if nfe else None} | over_seeds(rows)
    if len(rows) == 1:
        cell["gen_ppl_std"] = rows[0].get("gen_ppl_std")
    cell |= {"seeds": len(rows), "example": rows[0]["example"]}
    bounds = [row.get("bound") for row in rows]
    cell["bound"] = None if None in bounds else statistics.fmean(bounds)
    for by, (figure, reached) in MATCHED.items():
        known = [row for row in rows if row[figure] is not None]
        complete = len(known) == len(rows)
        cell[figure] = statistics.fmean(row[figure] for row in rows) if complete else None
        cell[reached] = statistics.fmean(row[reached] for row in rows) if complete else None
        cell[f"{figure}_std"] = spread_of([row[figure] for row in known])
        cell[f"{figure}_reached"] = complete and all(is_matched(row, target, by) for row in rows)
    return cell


def spread_of(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def table(methods: list[str], cells: dict, steps: list[int]) -> list[str]:
    """Every method at temperature 1; then the controls; then at the entropies of held-out text; then the bounds."""

    def lines_of(label: str, methods: list[str], cell: Callable[[dict], str]) -> list[str]:
        """A line for each method that has a cell; "-" where it has none."""
        rows = {method: [cell(cells[method, n]) if (method, n) in cells else "-" for n in steps] for method in methods}
        return [line(label.format(method), row) for method, row in rows.items() if set(row) != {"-"}]

    def plain(cell: dict) -> str:
        if None in (cell["gen_ppl"], cell["entropy"]):
            return "n/a"
        return number(cell["gen_ppl"], cell["gen_ppl_std"], cell["entropy"])

    def like(cell: dict) -> str:
        if cell["teacher_like_this"] is None:
            return "-"
        figure, reached = cell["teacher_like_this"]
        return number(figure, None, reached, abs(reached - cell["trigram_entropy"]) < 1e-9)

    def matched(cell: dict, figure: str, reached: str) -> str:
        if cell[figure] is None:
            return "-"
        return number(cell[figure], cell[f"{figure}_std"], cell[reached], cell[f"{figure}_reached"])

    teacher_of = {method: cell["teacher"] for (method, _), cell in cells.items()}
    lines = [line("Gen-PPL (entropy)", [f"N = {n}" for n in steps]), "| --- |" + " ---: |" * len(steps)]
    lines += lines_of("{}", methods, plain)
    for teacher in dict.fromkeys(teacher_of.values()):
        students = [method for method in methods if method != teacher and teacher_of[method] == teacher]
        lines += lines_of(f"{teacher} like {{}} (trigrams)", students, like)
    lines += lines_of("{}, matched", methods, partial(matched, figure="matched_gen_ppl", reached="matched_entropy"))
    trigrams = {"figure": "trigram_matched_gen_ppl", "reached": "trigram_matched_entropy"}
    lines += lines_of("{}, matched (trigrams)", methods, partial(matched, **trigrams))
    return lines + lines_of(
        "{}, bound", methods, lambda cell: "-" if cell["bound"] is None else f"{cell['bound']:.3f}"
    )


def number(value: float, spread: float | None, entropy: float, reached: bool = True) -> str:
    text = f"{value:.2f}{'' if spread is None else f' ± {spread:.2f}'} ({entropy:.2f})"
    return text if reached else f"({text})"


def line(label: str, values: list[str]) -> str:
    return f"| {label} | " + " | ".join(values) + " |"


def draw(methods: list[str], cells: dict, steps: list[int], target: dict) -> Figure:
    """Figure 3: Gen-PPL against steps, at temperature 1 and at held-out text's trigram entropy; and against entropy."""
    figure = Figure(figsize=(17, 5.5), layout="constrained")
    plain, matched, frontier = figure.subplots(1, 3)
    for method in methods:
        judged = [n for n in steps if cells.get((method, n), {}).get("gen_ppl") is not None]
        row = [cells[method, n] for n in judged]
        spread = [c["gen_ppl_std"] or 0.0 for c in row]
        drawn = plain.errorbar(judged, [c["gen_ppl"] for c in row], yerr=spread, fmt="o-", capsize=2, label=method)
        color = drawn.lines[0].get_color()
        frontier.plot([c["trigram_entropy"] for c in row], [c["gen_ppl"] for c in row], "o-", color=color)
        swept = [(n, c["trigram_matched_gen_ppl"]) for n, c in zip(judged, row, strict=True)]
        swept = [point for point in swept if point[1] is not None]
        if swept:
            matched.plot(*zip(*swept, strict=True), "o-", color=color)
    plain.legend(fontsize="x-small")
    plain.set(title="temperature 1", xscale="log", xlabel="steps", ylabel="generative perplexity")
    matched.set(title="at, or nearest to, the trigram entropy of held-out text", xscale="log", xlabel="steps")
    frontier.set(title="temperature 1: one point for each number of steps", xlabel="trigram entropy (nats)")
    frontier.axvline(target["trigram_entropy"], color="grey", linestyle=":", label="held-out text")
    frontier.legend()
    for panel in (plain, matched, frontier):
        panel.set_yscale("log")
        panel.grid(alpha=0.3, which="both")
    for panel in (plain, matched):
        panel.set_xticks(steps, [str(n) for n in steps])
        panel.xaxis.minorticks_off()
    return figure
