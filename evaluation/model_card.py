"""The model card (README.md) of an output folder, made from its report alone. A README.md of the user's is never touched."""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from evaluation.answers_table import answers_markdown, order_of
from evaluation.evaluate_model import FIRST_LOCKING
from evaluation.table import example_of, markdown_table, plain_rows, tables_of
from evaluation.writing import WRITING
from modeling_mcd.adapters import ADAPTER_CONFIG
from modeling_mcd.files import write_atomically
from modeling_mcd.requirements_mdlm import MINIMUM


TEMPLATE = Path(__file__).with_name("model_card_template.md")
# The last line of a card that this library wrote: a digest of all that stands above it.
MARK = re.compile(r"<!-- Made from eval\.json; not written again once changed by hand: (\w{16}) -->\n\Z")
BESIDE = "eval_card.md"  # the card where README.md is the user's


def write_model_card(folder: str | Path, report: dict, name: str | None = None) -> Path:
    """Writes the card of a folder from a report (see `save_results`); without results a card that says so.

    It is written to README.md if there is none, or if it is a card of ours that nobody has changed; otherwise to `eval_card.md`.

    The figures of the folder's own model, the rows that the report's `label` names, go into the `model-index` too. The
    snippet loads the report's `repository` (at its `revision`), or the folder from within where there is none: no path of
    this machine.

    Args:
        name: heading of the card; the folder's name by default.

    Returns:
        The file.
    """
    folder = Path(folder)
    causal, adapter = report.get("kind") == "causal", (folder / ADAPTER_CONFIG).exists()
    tables = [plain_rows(rows) for rows in tables_of(report["results"])]
    answers = list(report.get("answers", {}).values())
    own = [row for rows in tables for row in rows if row["model"] == report.get("label")]
    own_answers = [row for row in answers if row["model"] == report.get("label") and row["exact_match"] is not None]
    tags = ["masked-diffusion", "mdlm", "masked-consistency-distillation", "arxiv:2602.00792"]
    name = name or folder.resolve().name
    card_data = ModelCardData(
        model_name=name,
        library_name="peft" if adapter else "transformers",
        base_model=report.get("base_model"),
        base_model_relation="adapter" if adapter else report.get("base_model_relation"),
        language=report.get("language"),
        license=report.get("license"),
        datasets=report.get("datasets"),
        metrics=_metrics(own, own_answers),
        pipeline_tag="text-generation" if causal else "fill-mask",
        tags=None if causal else tags,
        eval_results=[result for row in own for result in _eval_results(row)] + list(map(_exact_match, own_answers))
        or None,
    )
    by_hand = not is_ours(folder / "README.md")
    figures, results = report.get("figures", []), report["results"]
    writing = report.get("writing")
    if writing is not None and (writing["model"] != report.get("label") or not (folder / WRITING).exists()):
        writing = None
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        by_hand=by_hand,
        causal=causal,
        adapter=adapter,
        base_model=report.get("base_model"),
        transformers=MINIMUM,
        repository=report.get("repository"),
        place=json.dumps(report.get("repository") or "."),
        revision=report.get("revision"),
        context=_context(folder) if causal else None,
        figures=figures,
        table=markdown_table(results) if results or not (figures or answers) else None,
        answers=answers_markdown(answers),
        plot=(folder / "eval.png").exists(),
        writing=writing,
        examples=_examples(results, report.get("label")),
        method=report.get("method"),
        data=report.get("data"),
        recipe=report.get("recipe"),
        versions=report.get("versions", {}),
    )
    path = folder / (BESIDE if by_hand else "README.md")
    content = str(card).rstrip() + "\n"
    write_atomically(
        path, f"{content}<!-- Made from eval.json; not written again once changed by hand: {_digest(content)} -->\n"
    )
    return path


def is_ours(path: Path) -> bool:
    """Whether a card may be written here: there is no file, or one that we wrote and nobody has changed since."""
    if not path.exists():
        return True
    content = path.read_bytes().decode("utf-8", errors="replace")
    mark = MARK.search(content)
    return mark is not None and mark[1] == _digest(content[: mark.start()])


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _context(folder: Path) -> int:
    """Tokens that the autoregressive model of a folder can see."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings") or config.get("n_positions") or 64


def _eval_results(row: dict) -> list[EvalResult]:
    """Gen-PPL and its entropy, never the one without the other; the N-step bound."""
    point = f"{row['steps']} steps, temperature {row['temperature']:g}, {row['sampler']}"
    if row["locking"] != FIRST_LOCKING:
        point += f", locking {row['locking']}"
    results = []
    if row.get("bound") is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out-text",
                dataset_name=f"{row['bound_blocks']} held-out blocks of {row['length']} tokens",
                metric_type="bound",
                metric_name=f"N-step bound (nats per token), {point}",
                metric_value=round(row["bound"], 4),
            )
        ]
    if None in (row.get("gen_ppl"), row.get("entropy")):
        return results
    return results + [
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


def _metrics(own: list[dict], answers: list[dict]) -> list[str] | None:
    """The metrics of the folder's own model by the names that the Hub knows."""
    measured = {
        "perplexity": any(row.get("gen_ppl") is not None for row in own),
        "mauve": any(row.get("mauve") is not None for row in own),
        "exact_match": bool(answers),
    }
    return [name for name, is_measured in measured.items() if is_measured] or None


def _exact_match(row: dict) -> EvalResult:
    point = f"{row['steps']} steps, temperature {row['temperature']:g}, {order_of(row)}"
    return EvalResult(
        task_type="text-generation",
        dataset_type="questions",
        dataset_name=f"{row['count']} of {row['questions']}",
        metric_type="exact_match",
        metric_name=f"Exact match, {point}, {row['tokens_per_forward']:.2f} tokens per forward",
        metric_value=round(row["exact_match"], 4),
    )


def _examples(results: list[dict], label: str | None) -> list[dict]:
    """One text of the first model (the teacher) and one of the folder's own."""
    models = [row["model"] for rows in tables_of(results)[:1] for row in plain_rows(rows)]
    if not models:
        return []
    chosen = [example_of(results, model) for model in dict.fromkeys([models[0], label or models[-1]])]
    return [row for row in chosen if row is not None]
