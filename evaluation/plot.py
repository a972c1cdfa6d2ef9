"""Gen-PPL, entropy and the N-step bound against the number of forwards (NFE), one line for each model and locking."""

import io
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no display and no global state
from matplotlib.ticker import LogFormatter

from evaluation.matched_entropy import held_out_row, is_matched
from evaluation.table import names_of, notes_of, plain_rows, tables_of
from modeling_mcd.files import write_atomically


def write_plot(folder: str | Path, results: list[dict]):
    """Writes `eval.png`: Gen-PPL (log-log; dashed: at matched entropy), entropy and, if measured, the bound, for each table."""
    tables, bounded = tables_of(results), any(row.get("bound") is not None for row in results)
    columns = 3 if bounded else 2
    figure = Figure(figsize=(5.5 * columns, 4.2 * len(tables)), layout="constrained")
    panels_of = figure.subplots(len(tables), columns, squeeze=False)
    for rows, (perplexity, entropy, *bound) in zip(tables, panels_of, strict=True):
        target, plain = held_out_row(results, rows[0]), plain_rows(rows)
        if target is not None and None in (target.get("gen_ppl"), target.get("entropy")):
            target = None
        # Gen-PPL is drawn only where its entropy is: a row that lacks either is in the table, with its note.
        named = list(zip(names_of(plain), plain, strict=True))
        measured = [(name, row) for name, row in named if None not in map(row.get, ("nfe", "gen_ppl", "entropy"))]
        for model in dict.fromkeys(name for name, _ in measured):
            points = sorted((row for name, row in measured if name == model), key=lambda row: row["nfe"])
            nfe = [row["nfe"] for row in points]
            (line,) = perplexity.plot(nfe, [row["gen_ppl"] for row in points], "o-", label=model)
            entropy.plot(nfe, [row["entropy"] for row in points], "o-", color=line.get_color())
            for panel in bound:
                known = [row for row in points if row.get("bound") is not None]
                heights, errors = [row["bound"] for row in known], [row["bound_se"] or 0 for row in known]
                panel.errorbar(
                    [row["nfe"] for row in known], heights, errors, fmt="o-", color=line.get_color(), capsize=2
                )
            matched = [row for row in points if target is not None and is_matched(row, target)]
            if matched:
                heights = [row["matched_gen_ppl"] for row in matched]
                perplexity.plot([row["nfe"] for row in matched], heights, "s--", color=line.get_color(), alpha=0.6)
        if notes_of(plain):
            perplexity.set_title(f"points that could not be measured: {len(notes_of(plain))}", fontsize="small")
        if target is not None:
            perplexity.axhline(target["gen_ppl"], color="grey", linestyle=":", label="held-out text")
            entropy.axhline(target["entropy"], color="grey", linestyle=":")
        scale = "log" if measured else "linear"  # a logarithmic axis cannot be empty
        perplexity.set(xscale=scale, yscale=scale, xlabel="NFE", ylabel="generative perplexity")
        entropy.set(xscale=scale, xlabel="NFE", ylabel=f"unigram entropy (nats, {rows[0]['entropy_unit']})")
        for panel in bound:
            panel.set(xscale=scale, xlabel="NFE", ylabel="N-step bound (nats per token)")
        for formatter in (perplexity.yaxis.set_major_formatter, perplexity.yaxis.set_minor_formatter):
            formatter(LogFormatter())  # 40, not 4 x 10^1
        for panel in (perplexity, entropy, *bound):
            ticks = sorted({row["steps"] for row in plain})
            panel.set_xticks(ticks, [str(n) for n in ticks])
            panel.xaxis.minorticks_off()
            panel.grid(alpha=0.3)
        if perplexity.lines:
            perplexity.legend(title=None if target is None else "dashed: at matched entropy")
        entropy.set_title(f"{rows[0]['samples']} samples x {rows[0]['seeds']} seeds", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(Path(folder) / "eval.png", buffer.getvalue())
