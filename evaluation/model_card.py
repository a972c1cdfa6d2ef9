"""The model card (README.md) of an output folder, made from its report alone."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from evaluation.table import markdown_table, plain_rows, tables_of
from modeling_mcd.files import write_atomically


TEMPLATE = Path(__file__).with_name("model_card_template.md")


def write_model_card(folder: str | Path, report: dict, name: str | None = None):
    """Writes README.md from a report (see `save_results`); without results a card that says so.

    The figures of the folder's own model, the rows that the report's `label` names, go into the `model-index` too. The
    snippet loads the report's `repository`, or the folder where there is none.

    Args:
        name: heading of the card; the folder's name by default.
    """
    name = name or Path(folder).resolve().name
    tables = [plain_rows(rows) for rows in tables_of(report["results"])]
    own = [row for rows in tables for row in rows if row["model"] == report.get("label")]
    card_data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["masked-diffusion", "mdlm", "masked-consistency-distillation", "arxiv:2602.00792"],
        eval_results=[result for row in own for result in _eval_results(row)] or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        repository=repr(report.get("repository") or str(folder)),
        table=markdown_table(report["results"]),
        plot=(Path(folder) / "eval.png").exists(),
        examples=_examples(tables, report.get("label")),
        method=report.get("method"),
        data=report.get("data"),
        recipe=report.get("recipe"),
        versions=report.get("versions", {}),
    )
    write_atomically(Path(folder) / "README.md", str(card) + "\n")


def _eval_results(row: dict) -> list[EvalResult]:
    """Gen-PPL and its entropy, never the one without the other."""
    if None in (row.get("gen_ppl"), row.get("entropy")):
        return []
    point = f"{row['steps']} steps, temperature {row['temperature']:g}, {row['sampler']}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="unconditional-samples",
            dataset_name=f"{row['samples']} samples x {row['seeds']} seeds of {row['length']} tokens",
            metric_type=metric,
            metric_name=f"{title}, {point}",
            metric_value=round(row[metric], 4),
            metric_config=f"{row['convention']}, {row['entropy_unit']}, {row['precision']}, judge {row['judge']}",
        )
        for metric, title in (("gen_ppl", "Gen-PPL"), ("entropy", "Unigram entropy (nats)"))
    ]


def _examples(tables: list[list[dict]], label: str | None) -> list[dict]:
    """One text of the first model (the teacher) and one of the folder's own, at the number of steps nearest to 8."""
    if not tables:
        return []
    rows = tables[0]
    chosen = {}
    for model in (rows[0]["model"], label or rows[-1]["model"]):
        candidates = [row for row in rows if row["model"] == model and row.get("example")]
        if candidates:
            chosen[model] = min(candidates, key=lambda row: abs(row["steps"] - 8))
    return list(chosen.values())
