"""The page of a frontier: `frontier.png`, `frontier.svg`, `frontier.md`, and `frontier.html` that needs no other file."""

import html
import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.ticker import LogFormatter, NullLocator

from evaluation.frontier import SURE, Frontier, Table, tables_of
from modeling_mcd.files import write_atomically


TITLE = "Gen-PPL, entropy and likelihood over steps"
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; }
td { text-align: right; } td.words { text-align: left; } svg { width: 100%; height: auto; } .note { color: #555; }"""


def write_page(folder: str | Path, frontier: Frontier) -> list[Path]:
    """Writes the four files, each all or nothing, and returns them."""
    folder, figure, tables, caption = Path(folder), plot(frontier), tables_of(frontier), caption_of(frontier)
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=120)
    with rc_context({"svg.hashsalt": "frontier"}):  # the same figures give the same file
        figure.savefig(svg, format="svg", metadata={"Date": None})
    files = {
        "frontier.png": png.getvalue(),
        "frontier.svg": svg.getvalue(),
        "frontier.md": "\n\n".join([caption, *map(markdown, tables)]) + "\n",
        "frontier.html": page(svg.getvalue(), tables, caption),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def caption_of(frontier: Frontier) -> str:
    row = frontier.points[0].row
    sizes = dict.fromkeys(f"{point.row['samples']} samples x {point.row['seeds']} seeds" for point in frontier.points)
    precisions = " or ".join(dict.fromkeys(point.row["precision"] for point in frontier.points))
    return (
        f"{' or '.join(sizes)} of {row['length']} tokens. Judge: {row['judge']}, {row['convention']}. Sampler: {row['sampler']}, "
        f"{precisions} draws. Every row draws from the same seeds."
    )


def markdown(table: Table) -> str:
    lines = [table.header, ["---"] + ["---:"] * (len(table.header) - 1), *table.lines]
    return "\n".join([f"## {table.title}", "", *(f"| {' | '.join(line)} |" for line in lines), "", *table.notes])


def page(svg: str, tables: list[Table], caption: str) -> str:
    """HTML without anything from elsewhere, scripts included."""
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style></head><body>',
        f"<h1>{TITLE}</h1><p>{html.escape(caption)}</p>",
        svg[svg.index("<svg") :],
    ]
    for table in tables:
        words = {i for i, name in enumerate(table.header) if name in ("model", "nats per token")}
        parts.append(f"<h2>{html.escape(table.title)}</h2><table><tr>")
        parts += [f"<th>{html.escape(name)}</th>" for name in table.header]
        for line in table.lines:
            parts.append("</tr><tr>")
            for i, cell in enumerate(line):
                kind = ' class="words"' if i in words else ""
                parts.append(f"<td{kind}>{html.escape(cell)}</td>")
        parts.append("</tr></table>")
        parts += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    return "\n".join([*parts, "</body></html>", ""])


def plot(frontier: Frontier) -> Figure:
    """Gen-PPL against entropy, at matched entropy against NFE and against seconds, and the bound against N; what was measured."""
    panels = [_entropy_panel]
    if any(point.matched is not None and point.row.get("nfe") is not None for point in frontier.points):
        panels.append(_nfe_panel)
    if any(point.matched is not None and point.seconds is not None for point in frontier.points):
        panels.append(_seconds_panel)
    if any(point.row.get("bound") is not None for point in frontier.points):
        panels.append(_bound_panel)
    columns = 3 if len(panels) == 3 else 2
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 5 * lines), layout="constrained")
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    colours = {name: f"C{i}" for i, name in enumerate(frontier.series)}
    for draw, place in zip(panels, places, strict=False):
        draw(place, frontier, colours)
        place.grid(alpha=0.3)
    for place in places[len(panels) :]:
        place.set_visible(False)
    return figure


def _entropy_panel(panel, frontier: Frontier, colours: dict[str, str]):
    """One line for each number of steps: its temperatures."""
    labelled = set()
    for point in frontier.points:
        entropies = [entropy for _, entropy, _ in point.sweep]
        intervals = [interval for *_, interval in point.sweep]
        label = point.name if point.name not in labelled else None
        labelled.add(point.name)
        _bars(panel, entropies, intervals, colours[point.name], label)
        if entropies:
            panel.annotate(
                str(point.steps),
                (entropies[-1], intervals[-1].value),
                xytext=(5, 2),
                textcoords="offset points",
                fontsize="small",
                color=colours[point.name],
            )
    if frontier.target is not None:
        panel.plot(
            frontier.target[frontier.by], frontier.target["gen_ppl"], "k*", markersize=11, label="held-out text"
        )
        panel.axvline(frontier.target[frontier.by], color="grey", linestyle=":")
    unit = frontier.points[0].row["entropy_unit"]
    what = "trigram entropy (nats)" if frontier.by == "trigram_entropy" else f"unigram entropy (nats, {unit})"
    panel.set(
        yscale="log", xlabel=what, ylabel="generative perplexity", title="number: steps; along a line: temperatures"
    )
    _plain_ticks(panel.yaxis)
    panel.legend(fontsize="small")


def _nfe_panel(panel, frontier: Frontier, colours: dict[str, str]):
    _matched_panel(panel, frontier, colours, lambda point: point.row.get("nfe"))
    panel.set(xlabel="NFE")
    known = [point for point in frontier.points if point.matched is not None and point.row.get("nfe") is not None]
    _ticks_at(panel.xaxis, {round(point.row["nfe"]) for point in known})


def _seconds_panel(panel, frontier: Frontier, colours: dict[str, str]):
    _matched_panel(panel, frontier, colours, lambda point: point.seconds)
    panel.set(xlabel="seconds a sample, one process")
    best = next((point for point in reversed(frontier.reference) if point.matched is not None), None)
    if best is not None:
        label = f"{best.name}, {best.steps} steps"
        panel.axhline(best.matched.interval.value, color="grey", linestyle=":", label=label)
        panel.legend(fontsize="small")


def _matched_panel(panel, frontier: Frontier, colours: dict[str, str], place_of):
    for name, points in frontier.series.items():
        known = [point for point in points if point.matched is not None and place_of(point) is not None]
        if known:
            _bars(panel, list(map(place_of, known)), [point.matched.interval for point in known], colours[name], None)
    panel.set(xscale="log", yscale="log", ylabel="Gen-PPL at matched entropy")
    for axis in (panel.xaxis, panel.yaxis):
        _plain_ticks(axis)


def _bound_panel(panel, frontier: Frontier, colours: dict[str, str]):
    for name, points in frontier.series.items():
        known = [point for point in points if point.row.get("bound") is not None]
        heights, errors = [p.row["bound"] for p in known], [SURE * (p.row["bound_se"] or 0) for p in known]
        panel.errorbar([p.steps for p in known], heights, errors, fmt="o-", color=colours[name], capsize=2)
    panel.set(xscale="log", xlabel="steps N", ylabel="N-step bound (nats per token)")
    _ticks_at(panel.xaxis, {point.steps for point in frontier.points if point.row.get("bound") is not None})


def _bars(panel, places: list[float], intervals: list, colour: str, label: str | None):
    heights = [interval.value for interval in intervals]
    # A percentile interval may leave out the figure itself.
    below = [max(interval.value - interval.low, 0) for interval in intervals]
    above = [max(interval.high - interval.value, 0) for interval in intervals]
    panel.errorbar(places, heights, [below, above], fmt="o-", color=colour, capsize=2, markersize=4, label=label)


def _ticks_at(axis, values: set[int]):
    axis.set_ticks(sorted(values), list(map(str, sorted(values))))
    axis.set_minor_locator(NullLocator())


class _Plain(LogFormatter):
    """40 and 0.1, not 4 x 10^1 and 1e-01."""

    def __call__(self, x, pos=None):
        return f"{x:g}" if super().__call__(x, pos) else ""


def _plain_ticks(axis):
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
