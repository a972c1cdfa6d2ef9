"""Zero-shot perplexity: the likelihood of corpora that a model was not trained on, per token and in bits per byte.

A corpus is named (`PRESETS`: the published ones), or any file or dataset. Its documents are detokenised, joined with an EOS after
each, and cut into windows BOS + text + EOS of the model's length, as in the training text (`text.py`). Given the BOS, every token
of a window is scored: by the NELBO with a fixed number of masked tokens (`sequence_nelbo`), by an autoregressive model exactly.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.detokenizers import DETOKENIZERS, detokenize
from evaluation.evaluate_model import digest_of
from evaluation.generative_perplexity import sequence_nll
from evaluation.judge import fingerprint
from evaluation.likelihood import Bound, block_nelbo
from evaluation.results import report_lock
from evaluation.sequence_nelbo import sequence_nelbo
from evaluation.text import check_blocks, token_stream
from evaluation.text_sources import open_text
from modeling_mcd.files import read_object, write_atomically, write_json


EXPORT = "refs/convert/parquet"  # the branch with the tables of datasets that are scripts
LINES = ("kept", "stripped")
FILE = "perplexity.json"
KEY = ("model", "weights", "corpus", "text", "draws")


@dataclass(frozen=True)
class Corpus:
    """A text to be scored, and how it becomes documents.

    Args:
        name: of its column in the table.
        source, config, revision, folder, split, column: see `open_text`.
        detokenizer: one of `DETOKENIZERS`; None: the text is plain text already.
        lines: in a file of plain text each line is a document, its line end "kept" or "stripped"; None: the file is one. A row
            of a table is always a document.
    """

    name: str
    source: str
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    split: str = "train"
    column: str = "text"
    detokenizer: str | None = None
    lines: str | None = None

    def __post_init__(self):
        for field, choices in (("detokenizer", (*DETOKENIZERS, None)), ("lines", (*LINES, None))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} of {self.name!r} must be one of {choices}, not {getattr(self, field)!r}")

    def documents(self) -> Iterator[str]:
        """The detokenised documents. Errors are those of `open_text`; where a preset cannot be had they say what to do."""
        where = {field: getattr(self, field) for field in ("config", "revision", "folder", "split", "column")}
        try:
            source = open_text(self.source, **where)
        except FileNotFoundError as error:
            if self.name not in PRESETS or self.source != PRESETS[self.name].source:
                raise
            raise FileNotFoundError(f"{error}; give its file: {self.name}=FILE") from None
        for document in map("".join, source.documents()):
            lines = [document]
            if self.lines is not None and source.files:
                lines = document.splitlines(keepends=True)
                # As the published tables hold them: an empty line is an empty document.
                lines = [line if self.lines == "kept" and line.strip() else line.strip() for line in lines]
            for line in lines:
                yield detokenize(line, self.detokenizer)

    @property
    def description(self) -> str:
        """Where the text comes from, in a few words."""
        parts = [self.source, self.config, self.folder, self.split]
        if Path(self.source).exists():
            parts = [Path(self.source).name]
        text = " ".join(filter(None, parts))
        return f"{text}, detokeniser {self.detokenizer}" if self.detokenizer else text


PRESETS = {
    corpus.name: corpus
    for corpus in (
        *(
            Corpus(
                name,
                "Salesforce/wikitext",
                config=config,
                split="validation",
                detokenizer="wikitext",
                lines="kept",
            )
            for name, config in (("wikitext103", "wikitext-103-raw-v1"), ("wikitext2", "wikitext-2-raw-v1"))
        ),
        Corpus(
            "ptb",
            "ptb-text-only/ptb_text_only",
            revision=EXPORT,
            folder="penn_treebank",
            split="validation",
            column="sentence",
            detokenizer="ptb",
            lines="stripped",
        ),
        Corpus(
            "lm1b",
            "billion-word-benchmark/lm1b",
            revision=EXPORT,
            folder="plain_text",
            split="test",
            detokenizer="lm1b",
            lines="stripped",
        ),
        Corpus("lambada", "EleutherAI/lambada_openai", config="default", split="test", detokenizer="lambada"),
        Corpus("ag_news", "fancyzhx/ag_news", split="test"),
        *(
            Corpus(
                name,
                "armanc/scientific_papers",
                revision=EXPORT,
                folder=name,
                split="validation",
                column="article",
                detokenizer="scientific_papers",
            )
            for name in ("pubmed", "arxiv")
        ),
    )
}
HELP = (
    f"Corpora: {', '.join(PRESETS)}, a file, a folder or a Hub dataset; NAME=FILE reads one of these from a file. Settings follow "
    "behind commas, as in Salesforce/wikitext,config=wikitext-2-v1,split=test,column=text."
)


def corpus_of(words: str) -> Corpus:
    """The corpus that a word of the command line means: `NAME`, `NAME=SOURCE` or `SOURCE`, and settings `,field=value`.

    Raises:
        ValueError: for a setting that a corpus does not have.
    """
    head, *settings = words.split(",")
    name, equals, source = head.partition("=")
    given = dict(setting.partition("=")[::2] for setting in settings)
    unknown = sorted(given.keys() - {field.name for field in dataclasses.fields(Corpus)} | {"source"} & given.keys())
    if unknown:
        allowed = [field.name for field in dataclasses.fields(Corpus) if field.name != "source"]
        raise ValueError(f"{words!r} sets {unknown[0]!r}, but a corpus has {', '.join(allowed)}")
    if name in PRESETS and not equals:
        return dataclasses.replace(PRESETS[name], **given)
    if name in PRESETS:
        own = dict.fromkeys(("config", "revision", "folder"))  # of the dataset that the source replaces
        return dataclasses.replace(PRESETS[name], **{"source": source} | own | given)
    return Corpus(**{"name": Path(head).name or head, "source": head} | given)


@dataclass(frozen=True)
class Windows:
    """Windows of a corpus, in one tokenizer.

    Args:
        blocks: [n, L] int64.
        available: how many there are in the corpus; n of them are spread evenly over it.
        size: bytes of text (UTF-8) that they hold: the corpus's bytes times their share of its tokens.
    """

    blocks: torch.LongTensor
    available: int
    size: float


def windows_of(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None,
    name: str = "the text",
) -> Windows:
    """At most `count` windows of `length` tokens (all of them if None), as `pack` cuts them.

    Raises:
        ValueError: less text than one window, or a tokenizer without BOS or EOS.
    """
    check_blocks(tokenizer, length)
    size = 0

    def counted() -> Iterator[list[str]]:
        nonlocal size
        for document in documents:
            size += len(document.encode())
            yield [document]

    stream = np.concatenate([np.empty(0, dtype=np.int32), *token_stream(counted(), tokenizer)])
    available, body = len(stream) // (length - 2), length - 2
    if not available:
        raise ValueError(
            f"{name!r} holds {len(stream)} tokens, less than one window of {length}: give more text, or a smaller --length"
        )
    n = min(count or available, available)
    chosen = torch.linspace(0, available - 1, n).round().long()
    text = torch.from_numpy(stream[: available * body]).long().view(available, body)[chosen]
    blocks = torch.nn.functional.pad(text, (1, 0), value=tokenizer.bos_token_id)
    blocks = torch.nn.functional.pad(blocks, (0, 1), value=tokenizer.eos_token_id)
    return Windows(blocks, available, size * n * body / len(stream))


def score_windows(
    network: PreTrainedModel, windows: Windows, draws: int, batch_size: int, progress: bool = False
) -> Bound:
    """Nats of each window given its BOS: an upper bound for a diffusion model, exact for an autoregressive one.

    A model of uniform noise, which has no fixed number of masked tokens, is scored by `block_nelbo`, its BOS included.

    Raises:
        ValueError: a loss is not finite.
    """
    blocks = windows.blocks
    kind = getattr(network.config, "diffusion_kind", None)
    if kind is None:
        bound = Bound(*sequence_nll(blocks.tolist(), network, batch_size), exact=True)
    elif kind == "uniform":
        bound = block_nelbo(network, blocks, draws, batch_size)
    else:
        given = torch.zeros_like(blocks, dtype=torch.bool)
        given[:, 0] = True
        bound = sequence_nelbo(network, blocks, given, draws, batch_size=batch_size, progress=progress)
    if not bound.nats.isfinite().all():
        raise ValueError(f"its loss on window {(~bound.nats.isfinite()).nonzero()[0].item()} is not finite")
    return bound


def row_of(model: str, network: PreTrainedModel, corpus: Corpus, windows: Windows, draws: int) -> dict:
    """What identifies a row of `perplexity.json`, and says what it was measured on."""
    exact = getattr(network.config, "diffusion_kind", None) is None
    return {
        "model": model,
        "weights": fingerprint(network),
        "corpus": corpus.name,
        "text": digest_of(windows.blocks),
        "draws": None if exact else draws,
        "source": corpus.description,
        "windows": len(windows.blocks),
        "available": windows.available,
        "length": windows.blocks.shape[1],
        "bytes": windows.size,
    }


def with_figures(row: dict, bound: Bound) -> dict:
    """A row with its figures and the nats of each window, from which paired differences are made."""
    error, bits = bound.error, bound.nats.sum().item() / math.log(2) / row["bytes"]
    perplexity = math.exp(bound.mean) if bound.mean < 700 else None  # beyond, it is no number
    return row | {
        "exact": bound.exact,
        "nats_per_token": bound.mean,
        "nats_per_token_se": error,
        "perplexity": perplexity,
        "perplexity_se": perplexity and error and perplexity * error,
        "bits_per_byte": bits,
        "bits_per_byte_se": error and bits * error / bound.mean,
        "window_nats": bound.nats.tolist(),
        "window_tokens": bound.tokens.tolist(),
    }


def bound_of(row: dict) -> Bound:
    nats, tokens = torch.tensor(row["window_nats"], dtype=torch.float64), torch.tensor(row["window_tokens"])
    return Bound(nats, tokens, row["exact"])


def load_rows(folder: Path) -> list[dict]:
    """The rows of a folder's `perplexity.json`. Raises ValueError if it is no such report."""
    if not (folder / FILE).exists():
        return []
    rows = read_object(folder / FILE).get("results")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {*KEY} <= set(row) for row in rows):
        raise ValueError(
            f"{folder / FILE} is not a report of this library: move it away or choose another output folder"
        )
    return rows


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def save_row(folder: Path, row: dict):
    """Adds a row to `perplexity.json`, in place of one with the same model and text, and writes `perplexity.md` anew."""
    with report_lock(folder):
        rows = {(old["model"], old["text"]): old for old in [*load_rows(folder), row]}
        write_json(folder / FILE, {"results": list(rows.values())})
        write_atomically(folder / "perplexity.md", perplexity_table(list(rows.values())) + "\n")


def perplexity_table(rows: Sequence[dict]) -> str:
    """Perplexities by model and corpus, the paired differences to the first model, and what was scored, in Markdown."""
    if not rows:
        return "No results yet."
    models, corpora = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "corpus"))
    by_place = {(row["model"], row["corpus"]): row for row in rows}
    lines = ["| perplexity (bits per byte) | " + " | ".join(corpora) + " |", "| --- |" + " ---: |" * len(corpora)]
    for model in models:
        lines.append(_line(model, [_cell(by_place.get((model, corpus))) for corpus in corpora]))
    for model in models[1:]:
        pairs = [(by_place.get((models[0], corpus)), by_place.get((model, corpus))) for corpus in corpora]
        if any(map(_paired, pairs)):
            lines.append(_line(f"{model} less {models[0]}, nats per token, paired", map(_difference, pairs)))
    notes = {}
    for row in rows:
        what = (
            f"{row['corpus']}: {row['windows']} of {row['available']} windows of {row['length']} tokens, the BOS given; "
            f"{row['source']}"
        )
        how = "exact" if row["exact"] else f"upper bound, {row['draws']} draws a window"
        notes.setdefault(what, []).append(f"{row['model']}: {how}")
    lines += [
        "",
        "± is the standard error over windows. Perplexities are per token: compare those of one tokenizer alone.",
    ]
    lines += ["", *(f"- {what} ({'; '.join(models)})" for what, models in notes.items())]
    return "\n".join(lines)


def _line(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    error = "" if row["perplexity_se"] is None else f" ± {row['perplexity_se']:.2f}"
    perplexity = f"e^{row['nats_per_token']:.0f}" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
    return f"{perplexity}{error} ({row['bits_per_byte']:.3f})"


def _paired(pair: tuple[dict | None, dict | None]) -> bool:
    return None not in pair and all(pair[0][name] == pair[1][name] for name in ("text", "window_tokens"))


def _difference(pair: tuple[dict | None, dict | None]) -> str:
    if not _paired(pair):
        return "-"
    difference, error = bound_of(pair[1]).minus(bound_of(pair[0]))
    return f"{difference:+.4f}" if error is None else f"{difference:+.4f} ± {error:.4f}"
