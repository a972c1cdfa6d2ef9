"""The Markdown table of a report, which the console shows too. A Gen-PPL never stands without its entropy."""

from collections.abc import Callable

from evaluation.evaluate_model import HELD_OUT_TEXT, SETTINGS
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


def notes_of(rows: list[dict]) -> list[str]:
    """Why figures of some rows could not be measured."""
    return [f"{row['model']}, {row['steps']} steps: {row['note']}" for row in rows if row.get("note")]


def markdown_table(results: list[dict]) -> str:
    """Gen-PPL (entropy) by model and number of steps, the same at matched entropy, a caption, and the other figures."""
    return "\n\n".join(_table(rows, results) for rows in tables_of(results)) or "No results yet."


def _table(rows: list[dict], results: list[dict]) -> str:
    plain, target = plain_rows(rows), held_out_row(results, rows[0])
    header = ["Gen-PPL (entropy)", *(_column(n, plain) for n in _steps(plain))]
    lines = [_line(header), "| --- |" + " ---: |" * (len(header) - 1), *_lines(plain, "{model}", _plain_cell)]
    swept = target is not None and any(row.get("matched_gen_ppl") is not None for row in plain)
    if swept:
        lines += _lines(plain, "{model}, matched", lambda row: _matched_cell(row, target, "entropy"))
        if plain[0]["entropy_unit"] == "words":
            label = "{model}, matched in trigrams"
            lines += _lines(plain, label, lambda row: _matched_cell(row, target, "trigram_entropy"))
    lines += ["", _caption(plain[0], target, swept)]
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
    cells = {(row["model"], row["steps"]): cell(row) for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
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


def _matched_cell(row: dict, target: dict, by: str) -> str:
    figure, reached = (row.get(name) for name in MATCHED[by])
    if figure is None:
        return "-"
    cell = f"{BY_NAME['gen_ppl'].format(figure)} ({BY_NAME[by].format(reached)})"
    return cell if is_matched(row, target, by) else f"({cell})"


def _caption(row: dict, target: dict | None, swept: bool) -> str:
    seeds = "1 seed" if row["seeds"] == 1 else f"each of {row['seeds']} seeds, ± the standard deviation over seeds"
    caption = (
        f"Generative perplexity and, in brackets, unigram entropy (nats, {row['entropy_unit']}) of {row['samples']} "
        f"samples of {row['length']} tokens for {seeds}. Judge: {row['judge']}; {CONVENTIONS[row['convention']]}. Sampler: "
        f"{row['sampler']}, {row['precision']} draws, temperature {row['temperature']:g}. NFE: network evaluations per "
        "sample."
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
