"""The Markdown table of a report, which the console shows too. A Gen-PPL never stands without its entropy."""

from collections.abc import Callable

from evaluation.evaluate_model import HELD_OUT_TEXT, SETTINGS
from evaluation.matched_entropy import MATCHED, held_out_row, is_matched


def tables_of(results: list[dict]) -> list[list[dict]]:
    """Rows of models, apart by sampler and settings: figures in one table were all taken in the same way."""
    tables = {}
    for row in results:
        if row["model"] != HELD_OUT_TEXT:
            tables.setdefault(tuple(row.get(name) for name in ("sampler", *SETTINGS)), []).append(row)
    return list(tables.values())


def plain_rows(rows: list[dict]) -> list[dict]:
    """Those at the temperature nearest to 1: a sweep serves the matched figures and stays in `eval.json`."""
    temperature = min((row["temperature"] for row in rows), key=lambda value: abs(value - 1))
    return [row for row in rows if row["temperature"] == temperature]


def markdown_table(results: list[dict]) -> str:
    """Gen-PPL (entropy) by model and number of steps, the same at matched entropy, and the words; a caption under it."""
    return "\n\n".join(_table(rows, results) for rows in tables_of(results)) or "No results yet."


def _table(rows: list[dict], results: list[dict]) -> str:
    plain, target = plain_rows(rows), held_out_row(results, rows[0])
    header = ["Gen-PPL (entropy)", *(_column(n, plain) for n in _steps(plain))]
    lines = [_line(header), "| --- |" + " ---: |" * (len(header) - 1), *_lines(plain, "{model}", _plain_cell)]
    swept = target is not None and any(row["matched_gen_ppl"] is not None for row in plain)
    if swept:
        lines += _lines(plain, "{model}, matched", lambda row: _matched_cell(row, target, "entropy"))
        if plain[0]["entropy_unit"] == "words":
            label = "{model}, matched in trigrams"
            lines += _lines(plain, label, lambda row: _matched_cell(row, target, "trigram_entropy"))
    header[0] = _words_title(plain[0])
    lines += ["", _caption(plain[0], target, swept), "", _line(header), "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *_lines(plain, "{model}", _words_cell)])


def _steps(rows: list[dict]) -> list[int]:
    return sorted({row["steps"] for row in rows})


def _column(steps: int, rows: list[dict]) -> str:
    nfe = [row["nfe"] for row in rows if row["steps"] == steps]
    return f"{steps} step{'s' if steps > 1 else ''} (NFE {sum(nfe) / len(nfe):.1f})"


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
    spread = "" if row["gen_ppl_std"] is None else f" ± {_number(row['gen_ppl_std'])}"
    return f"{_number(row['gen_ppl'])}{spread} ({row['entropy']:.2f})"


def _matched_cell(row: dict, target: dict, by: str) -> str:
    figure, reached = (row.get(name) for name in MATCHED[by])
    if figure is None:
        return "-"
    cell = f"{_number(figure)} ({reached:.2f})"
    return cell if is_matched(row, target, by) else f"({cell})"


def _words_title(row: dict) -> str:
    return "distinct-3" if row["known_words"] is None else "distinct-3; known words"


def _words_cell(row: dict) -> str:
    known = "" if row["known_words"] is None else f"; {row['known_words']:.1%}"
    return f"{row['distinct_3']:.3f}{known}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _caption(row: dict, target: dict | None, swept: bool) -> str:
    conventions = {
        "retokenized": "text re-tokenised by the judge",
        "raw_ids": "token ids given to the judge as they are",
    }
    seeds = "1 seed" if row["seeds"] == 1 else f"each of {row['seeds']} seeds, ± the standard deviation over seeds"
    caption = (
        f"Generative perplexity, in brackets unigram entropy (nats, {row['entropy_unit']}), of {row['samples']} samples of "
        f"{row['length']} tokens for {seeds}. Judge: {row['judge']}; {conventions[row['convention']]}. Sampler: "
        f"{row['sampler']}, {row['precision']} draws, temperature {row['temperature']:g}."
    )
    if target is not None:
        caption += f" Held-out text itself: {_number(target['gen_ppl'])} ({target['entropy']:.2f})"
        if target["known_words"] is not None:
            caption += f", known words {target['known_words']:.1%}"
        if target["samples"] == row["samples"]:  # distinct-3 falls with the amount of text
            caption += f", distinct-3 {target['distinct_3']:.3f}"
        caption += "."
    if swept:
        caption += (
            " Matched: log Gen-PPL interpolated over temperatures to the entropy of held-out text (in trigrams: to "
            "its entropy of character trigrams, again within a sample); a cell wholly in brackets is the nearest point of a "
            "sweep that does not reach it; - says that no sweep was run."
        )
    return caption
