"""The Markdown table of a report, which the console shows too. A Gen-PPL never stands without its entropy."""

from collections.abc import Callable

from evaluation.evaluate_model import FIRST_LOCKING, HELD_OUT_TEXT, SETTINGS
from evaluation.figures import FIGURES, Figure
from evaluation.matched_entropy import MATCHED, held_out_row, is_matched


BY_NAME = {figure.name: figure for figure in FIGURES}
CONVENTIONS = {"retokenized": "text re-tokenised by the judge", "raw_ids": "token ids given to the judge as they are"}


def tables_of(results: list[dict]) -> list[list[dict]]:
    """Rows of models, grouped by sampler and settings: all figures of a table were taken in the same way."""
    tables = {}
    for row in results:
        if row["model"] != HELD_OUT_TEXT:
            tables.setdefault(tuple(row.get(name) for name in ("sampler", *SETTINGS)), []).append(row)
    return list(tables.values())


def plain_rows(rows: list[dict]) -> list[dict]:
    """Those at the temperature nearest to 1: a sweep serves the matched figures and stays in `eval.json`."""
    temperature = min((row["temperature"] for row in rows), key=lambda value: abs(value - 1))
    return [row for row in rows if row["temperature"] == temperature]


def example_of(results: list[dict], model: str) -> dict | None:
    """The row of a model whose text stands for it: of the first table, at the number of steps nearest to 8."""
    for rows in tables_of(results)[:1]:
        rows = [row for row in plain_rows(rows) if row["model"] == model and row.get("example")]
        return min(rows, key=lambda row: abs(row["steps"] - 8), default=None)


def names_of(rows: list[dict]) -> list[str]:
    """What each row of a table is called: its model, and its locking where another than `independent` is in the table."""
    lockings = {row["locking"] for row in rows}
    several = lockings != {FIRST_LOCKING}
    return [f"{row['model']} / {row['locking']}" if several else row["model"] for row in rows]


def lowest_bounds(rows: list[dict]) -> list[tuple[str, dict]]:
    """The row with the lowest bound at each number of steps, after what it is called. The bounds must be of one text."""
    bounded = [row for row in rows if row.get("bound") is not None]
    named = list(zip(names_of(bounded), bounded, strict=True))
    return [
        min((n for n in named if n[1]["steps"] == steps), key=lambda n: n[1]["bound"]) for steps in _steps(bounded)
    ]


def notes_of(rows: list[dict]) -> list[str]:
    """Why figures of some rows could not be measured."""
    named = zip(names_of(rows), rows, strict=True)
    return [f"{name}, {row['steps']} steps: {row['note']}" for name, row in named if row.get("note")]


def markdown_table(results: list[dict]) -> str:
    """Gen-PPL (entropy) by model and number of steps, the bound, Gen-PPL at matched entropy, a caption, the other figures."""
    return "\n\n".join(_table(rows, results) for rows in tables_of(results)) or "No results yet."


def _table(rows: list[dict], results: list[dict]) -> str:
    plain, target = plain_rows(rows), held_out_row(results, rows[0])
    header = ["Gen-PPL (entropy)", *(_column(n, plain) for n in _steps(plain))]
    lines = [_line(header), "| --- |" + " ---: |" * (len(header) - 1), *_lines(plain, "{model}", _plain_cell)]
    if any(row.get("bound") is not None for row in plain):
        lines += _lines(plain, "{model}, bound", bound_cell)
    swept = target is not None and any(row.get("matched_gen_ppl") is not None for row in plain)
    if swept:
        lines += _lines(plain, "{model}, matched", lambda row: _matched_cell(row, target, "entropy"))
        if plain[0]["entropy_unit"] == "words":
            label = "{model}, matched in trigrams"
            lines += _lines(plain, label, lambda row: _matched_cell(row, target, "trigram_entropy"))
    lines += ["", _caption(plain, target, swept)]
    notes = notes_of(plain)
    if notes:
        lines += ["", f"n/a: could not be measured ({'; '.join(notes)})."]
    others = [figure for figure in _others() if any(row.get(figure.name) is not None for row in plain)]
    if others:
        header[0] = _capitalised("; ".join(figure.title for figure in others))
        lines += ["", _line(header), "| --- |" + " ---: |" * (len(header) - 1)]
        lines += _lines(plain, "{model}", lambda row: "; ".join(figure.show(row) for figure in others))
    return "\n".join(lines)


def _others() -> list[Figure]:
    return [figure for figure in FIGURES if figure.title is not None]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _steps(rows: list[dict]) -> list[int]:
    return sorted({row["steps"] for row in rows})


def _column(steps: int, rows: list[dict]) -> str:
    nfe = [row["nfe"] for row in rows if row["steps"] == steps and row.get("nfe") is not None]
    mean = f" (NFE {sum(nfe) / len(nfe):.1f})" if nfe else ""
    return f"{steps} step{'s' if steps > 1 else ''}{mean}"


def _lines(rows: list[dict], label: str, cell: Callable[[dict], str]) -> list[str]:
    """A line for each model, a cell for each number of steps."""
    named = list(zip(names_of(rows), rows, strict=True))
    cells = {(name, row["steps"]): cell(row) for name, row in named}
    models = dict.fromkeys(name for name, _ in named)
    return [
        _line([label.format(model=model), *(cells.get((model, n), "-") for n in _steps(rows))]) for model in models
    ]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain_cell(row: dict) -> str:
    """Gen-PPL ± its spread (entropy)."""
    perplexity, entropy = BY_NAME["gen_ppl"], BY_NAME["entropy"]
    spread = row.get("gen_ppl_std")
    spread = "" if spread is None else f" ± {perplexity.format(spread)}"
    return f"{perplexity.show(row)}{spread} ({entropy.show(row)})"


def bound_cell(row: dict) -> str:
    """The N-step bound ± its standard error."""
    if row.get("bound") is None:
        return "n/a" if row.get("note") and "bound_text" in row else "-"
    return f"{row['bound']:.3f}" + ("" if row["bound_se"] is None else f" ± {row['bound_se']:.3f}")


def _matched_cell(row: dict, target: dict, by: str) -> str:
    figure, reached = (row.get(name) for name in MATCHED[by])
    if figure is None:
        return "-"
    cell = f"{BY_NAME['gen_ppl'].format(figure)} ({BY_NAME[by].format(reached)})"
    return cell if is_matched(row, target, by) else f"({cell})"


def _caption(rows: list[dict], target: dict | None, swept: bool) -> str:
    row, lockings = rows[0], dict.fromkeys(row["locking"] for row in rows)
    seeds = "1 seed" if row["seeds"] == 1 else f"each of {row['seeds']} seeds, ± the standard deviation over seeds"
    caption = (
        f"Generative perplexity and, in brackets, unigram entropy (nats, {row['entropy_unit']}) of {row['samples']} "
        f"samples of {row['length']} tokens for {seeds}. Judge: {row['judge']}; {CONVENTIONS[row['convention']]}. Sampler: "
        f"{row['sampler']}, {row['precision']} draws, temperature {row['temperature']:g}, locking {' or '.join(lockings)}. "
        "NFE: network evaluations per sample."
    )
    bounds = dict.fromkeys(row["bound_blocks"] for row in rows if row.get("bound") is not None)
    if bounds:
        caption += (
            f" Bound: nats per token of {' or '.join(map(str, bounds))} held-out blocks, an upper bound on -log p of this "
            "sampler with its steps, ± the standard error over blocks; differences on the same blocks are much surer."
        )
    if row.get("second_judge") is not None:
        caption += f" Second judge: {row['second_judge']}; text re-tokenised by it."
    if row.get("mauve_reference") is not None:
        caption += f" MAUVE: hidden states of {row['mauve_reference']}; its ceiling is the figure of held-out text."
    if row.get("gradient_text") is not None:
        caption += (
            " Gradient moment: squared distance of the second judge's mean gradients on samples and on held-out text, without "
            "bias; 0 is best, and noise may make it negative."
        )
    if target is not None:
        same = target["samples"] == row["samples"]
        others = [f for f in _others() if target.get(f.name) is not None and (same or not f.grows)]
        figures = [_plain_cell(target), *(f"{figure.title} {figure.show(target)}" for figure in others)]
        caption += f" Held-out text itself: {', '.join(figures)}."
    if swept:
        caption += (
            " Matched: log Gen-PPL interpolated over temperatures to the entropy of held-out text (in trigrams: to its "
            "entropy of character trigrams); a cell entirely in brackets is the nearest point of a sweep that does not "
            'reach it; "-": no sweep was run.'
        )
    return caption
