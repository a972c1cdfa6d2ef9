"""The frontier of a report: Gen-PPL against entropy over steps, lockings and precisions, with intervals, ties and paired differences."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.evaluate_model import COMPARABLE, HELD_OUT_TEXT, SETTINGS
from evaluation.figures import format_perplexity
from evaluation.intervals import LEVEL, Interval, Replicates, matched_replicates, places, row_replicates
from evaluation.matched_entropy import MATCHED, TOLERANCE, held_out_row, matched_gen_ppl
from evaluation.scores import load_scores


ENTROPIES = tuple(MATCHED)
SERIES = ("model", "locking", "precision")  # what a line of the plots stands for
SURE = statistics.NormalDist().inv_cdf(0.5 + LEVEL / 200)  # standard errors on either side of a bound


@dataclass
class Point:
    """One model, locking and precision at one number of steps.

    Args:
        name: of its series.
        steps: of the sampler.
        row: at the temperature nearest to 1.
        plain: its Gen-PPL; None if nothing says how sure it is.
        matched: Gen-PPL at matched entropy; None where the sweep does not reach it.
        sweep: (temperature, entropy, Gen-PPL) of each row, the lowest temperature first.
        seconds: that one process takes for a sample; None if that was not measured.
    """

    name: str
    steps: int
    row: dict
    plain: Replicates | None
    matched: Replicates | None
    sweep: list[tuple[float, float, Interval]] = field(default_factory=list)
    seconds: float | None = None


@dataclass
class Frontier:
    """All points of a report.

    Args:
        points: series by series, each from few steps to many.
        target: the row of held-out text, whose entropy is matched; None if there is none.
        by: the entropy that is matched, one of `ENTROPIES`.
    """

    points: list[Point]
    target: dict | None
    by: str

    @property
    def series(self) -> dict[str, list[Point]]:
        found = {}
        for point in self.points:
            found.setdefault(point.name, []).append(point)
        return found

    @property
    def reference(self) -> list[Point]:
        """The first series, from which all differences are taken: the teacher, if it comes first."""
        return next(iter(self.series.values()))


def frontier_of(results: Sequence[dict], folder: str | Path, by: str | None = None) -> Frontier:
    """The frontier of the rows of a report.

    Args:
        folder: of the report: scores of single samples lie in it.
        by: one of `ENTROPIES`; by default trigrams where words are counted, since the entropy of misspelt words hardly moves.

    Raises:
        ValueError: no row of samples, or rows that cannot be compared.
    """
    rows = [row for row in results if row["model"] != HELD_OUT_TEXT and row.get("gen_ppl") is not None]
    if not rows:
        raise ValueError(f"{folder} holds no row of samples: name models to judge")
    for row in rows:
        other = next((name for name in (*COMPARABLE, "sampler") if row.get(name) != rows[0].get(name)), None)
        if other is not None:
            raise ValueError(
                f"{folder} holds rows with {other} {rows[0][other]!r} and {row[other]!r}, which cannot be compared: "
                "choose another output folder"
            )
    by = by or ("trigram_entropy" if rows[0]["entropy_unit"] == "words" else "entropy")
    target = held_out_row(list(results), rows[0])
    target = target if target is not None and target.get(by) is not None else None
    named = [name for name in SERIES if name == "model" or len({row[name] for row in rows}) > 1]
    sweeps: dict[tuple, list[dict]] = {}
    for row in rows:
        sweeps.setdefault(tuple(row.get(name) for name in (*SERIES, "weights", *SETTINGS, "steps")), []).append(row)
    points = []
    for sweep in sweeps.values():
        sweep = sorted(sweep, key=lambda row: row["temperature"])
        points.append(_point(" / ".join(sweep[0][name] for name in named), sweep, folder, target, by))
    order = list(dict.fromkeys(point.name for point in points))
    return Frontier(sorted(points, key=lambda point: (order.index(point.name), point.steps)), target, by)


def _point(name: str, sweep: list[dict], folder: str | Path, target: dict | None, by: str) -> Point:
    scores = {row["temperature"]: load_scores(folder, row) for row in sweep}
    found = [(row, row_replicates(row, scores[row["temperature"]], by)) for row in sweep]
    plain = min(sweep, key=lambda row: abs(row["temperature"] - 1))
    point = Point(name, plain["steps"], plain, None, None)
    for row, replicates in found:
        if row is plain and replicates is not None:
            point.plain = replicates[0]
        if row.get(by) is not None:
            value = row["gen_ppl"]
            interval = Interval(value, value, value) if replicates is None else replicates[0].interval
            point.sweep.append((row["temperature"], row[by], interval))
    if target is not None and all(replicates is not None for _, replicates in found):
        figure, reached = matched_gen_ppl(sweep, target[by], by) or (None, math.inf)
        if abs(reached - target[by]) <= TOLERANCE:
            point.matched = matched_replicates([pair for _, pair in found], target[by], math.log(figure))
    timed = scores[plain["temperature"]]
    if timed is not None:
        point.seconds = statistics.fmean(seed["seconds"] for seed in timed)
    return point


# --- Tables


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]


def tables_of(frontier: Frontier) -> list[Table]:
    """Gen-PPL at matched entropy; time to the reference's quality; the bound against the number of steps, if measured."""
    tables = [matched_table(frontier), time_table(frontier)]
    if any(point.row.get("bound") is not None for point in frontier.points):
        tables.append(bound_table(frontier))
    return [table for table in tables if table.lines]


def matched_table(frontier: Frontier) -> Table:
    """One line for each point, placed within each number of steps by Gen-PPL at matched entropy.

    Points that share a place stand in the order of the report: not even their order says that one is better.
    """
    reference = {point.steps: point for point in frontier.reference}
    name = frontier.reference[0].name
    lines = []
    for steps in sorted({point.steps for point in frontier.points}):
        group = [point for point in frontier.points if point.steps == steps]
        intervals = [point.matched and point.matched.interval for point in group]
        placed = list(zip(group, intervals, places(intervals), strict=True))
        placed.sort(key=lambda entry: math.inf if entry[1] is None else int(entry[2].split("-")[0]))
        for point, interval, place in placed:
            other = reference.get(steps)
            lines.append(
                [
                    str(steps),
                    place,
                    point.name,
                    "-" if interval is None else _perplexity(interval),
                    _difference(point, other),
                    f"{_perplexity(point.plain.interval) if point.plain else format_perplexity(point.row['gen_ppl'])} "
                    f"({point.row[frontier.by]:.2f})",
                    "-" if point.row.get("nfe") is None else f"{point.row['nfe']:.1f}",
                    "-" if point.seconds is None else f"{point.seconds:.3g}",
                ]
            )
    temperature = " or ".join(dict.fromkeys(f"{point.row['temperature']:g}" for point in frontier.points))
    header = [
        "steps",
        "place",
        "model",
        "Gen-PPL at matched entropy",
        f"less {name}, nats",
        f"at temperature {temperature} (entropy)",
    ]
    entropy = "trigram entropy" if frontier.by == "trigram_entropy" else "entropy"
    notes = [f"In brackets {LEVEL}% intervals. Figures of one number of steps whose intervals overlap share a place."]
    if frontier.target is None:
        notes.append("No place without held-out text: at different entropies a Gen-PPL ranks nothing.")
    else:
        notes.append(
            f"Matched: interpolated over temperatures to the {entropy} of held-out text, {frontier.target[frontier.by]:.3f} nats; "
            '"-": the sweep does not reach it, or nothing says how sure it is.'
        )
    kept = [point.plain.samples is not None for point in frontier.points if point.plain is not None]
    if any(kept):
        notes.append(
            "Intervals: bootstrap over samples. Differences are paired: sample i of every row has the same seed and noise, and the "
            "same samples are taken again on both sides."
        )
    if not all(kept):
        notes.append(
            "Rows whose single samples were not kept have the interval of Student's t over their seeds, the entropy taken as "
            "exact; their differences are not paired, so their intervals are wider than they need be."
        )
    return Table("Gen-PPL at matched entropy", [*header, "NFE", "seconds"], lines, notes)


def _perplexity(interval: Interval) -> str:
    low, high = format_perplexity(interval.low), format_perplexity(interval.high)
    return f"{format_perplexity(interval.value)} [{low}, {high}]"


def _difference(point: Point, other: Point | None) -> str:
    if other is point:
        return "0"
    if other is None or other.matched is None or point.matched is None:
        return "-"
    less = point.matched.less(other.matched)
    words = [] if point.matched.is_paired_with(other.matched) else ["unpaired"]
    words += ["tie"] if less.low <= 0 <= less.high else []
    return f"{less.value:+.3f} [{less.low:+.3f}, {less.high:+.3f}]" + (f" ({', '.join(words)})" if words else "")


def time_table(frontier: Frontier) -> Table:
    """For each series the fewest measured steps at which it is as good as the reference at its most steps."""
    best = next((point for point in reversed(frontier.reference) if point.matched is not None), None)
    lines = []
    if best is not None:
        for name, points in frontier.series.items():
            measured = [point for point in points if point.matched is not None]
            reached = next((point for point in measured if point.matched.value <= best.matched.value), None)
            if reached is None:
                most = f"not within {measured[-1].steps} steps" if measured else "entropy not reached"
                lines.append([name, most, "-", "-", "-"])
                continue
            figure = _perplexity(reached.matched.interval)
            less = reached.matched.less(best.matched)
            tie = " (tie)" if reached is not best and less.low <= 0 <= less.high else ""
            nfe = "-" if reached.row.get("nfe") is None else f"{reached.row['nfe']:.1f}"
            seconds = "-" if reached.seconds is None else f"{reached.seconds:.3g}"
            lines.append([name, str(reached.steps), nfe, seconds, figure + tie])
    header = ["model", "steps", "NFE", "seconds a sample", "Gen-PPL at matched entropy"]
    notes = []
    if best is not None:
        notes = [
            f"The fewest steps measured at which the figure is no higher than that of {best.name} at {best.steps} steps, "
            f"{_perplexity(best.matched.interval)}. Tie: the two may be equal. Seconds: of one process on the machine that "
            'drew the samples, in batches as they were drawn; "-": not measured.'
        ]
    return Table(f"Time to the quality of {frontier.reference[0].name}", header, lines, notes)


def bound_table(frontier: Frontier) -> Table:
    steps = sorted({point.steps for point in frontier.points if point.row.get("bound") is not None})
    lines = []
    for name, points in frontier.series.items():
        cells = {point.steps: _bound(point.row) for point in points if point.row.get("bound") is not None}
        if cells:
            lines.append([name, *(cells.get(n, "-") for n in steps)])
    header = ["nats per token", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)]
    note = (
        f"An upper bound on -log p of the sampler with N steps at temperature 1, with its {LEVEL}% interval over blocks. All rows are "
        "scored on the same blocks with the same noise, so differences are much surer than the figures."
    )
    return Table("N-step bound", header, lines, [note])


def _bound(row: dict) -> str:
    return f"{row['bound']:.3f}" + ("" if row["bound_se"] is None else f" ± {SURE * row['bound_se']:.3f}")
