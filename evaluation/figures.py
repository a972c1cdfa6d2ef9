"""The figures of a set of samples, in one table: a new metric is one line of `FIGURES`.

The evaluation, the report's tables, the plot and the paper's tables all loop over it. A row that was written before a figure
existed stays readable: it merely lacks that figure.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evaluation.diversity import distinct_n, known_words, rep_n, self_bleu, unigram_entropy, unique_share
from evaluation.generative_perplexity import GenerativePerplexity
from evaluation.gradient_moment import Gradients


@dataclass(frozen=True)
class Samples:
    """What a figure can be computed from: the samples of one seed.

    Args:
        ids: token ids of each sample.
        text: each sample decoded, BOS and EOS replaced by a space.
        units: ids or text, whichever the protocol's `entropy_unit` counts.
        judge: the judge's scores; None if there are none, and `trouble` says why.
        second: those of the second judge; None if there is none.
        features: hidden states [n, d] for MAUVE; None if it is not asked for.
        gradients: of the second judge's loss, for the gradient moment; None if it is not asked for.
        seconds: that one process took to draw a sample, the mean.
        answers: to the questions that were asked, if any were.
    """

    ids: Sequence[Sequence[int]]
    text: Sequence[str]
    units: Sequence
    judge: GenerativePerplexity | None
    trouble: str | None = None
    second: GenerativePerplexity | None = None
    features: torch.Tensor | None = None
    gradients: Gradients | None = None
    seconds: float | None = None
    answers: Sequence["Answer"] | None = None


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Args:
        text: up to its end.
        reference: the right one.
        tokens: of the answer, its end included; what stands behind it does not count.
        forwards: of the network.
    """

    text: str
    reference: str
    tokens: int
    forwards: int


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        name: its key in a row.
        reads: the attribute of `Samples` that `function` is given.
        function: (that attribute, the protocol) -> the figure of one seed; None where the protocol does not ask for it.
        format: how tables print a number of it.
        title: its heading in the tables; None keeps it in `eval.json` alone.
        mean: over seeds.
        spread: whether the sample standard deviation over seeds is kept too, as `NAME_std`.
        grows: whether it depends on the amount of text, so that only equal numbers of samples are comparable.
    """

    name: str
    reads: str
    function: Callable
    format: Callable[[float], str] = "{:.3f}".format
    title: str | None = None
    mean: Callable[[Sequence[float]], float] = statistics.fmean
    spread: bool = False
    grows: bool = False

    def show(self, row: dict) -> str:
        """The figure of a row in words; "-" where it was not measured, "n/a" where it could not be."""
        value = row.get(self.name)
        return self.format(value) if value is not None else "n/a" if row.get("note") else "-"


def format_perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


FIGURES = (
    Figure("gen_ppl", "judge", lambda judged, _: judged.perplexity, format_perplexity, spread=True),
    Figure("judge_nll", "judge", lambda judged, _: judged.mean_nll),
    Figure("entropy", "units", lambda units, protocol: unigram_entropy(units, protocol.entropy_unit), "{:.2f}".format),
    Figure(
        "trigram_entropy",
        "text",
        lambda text, _: unigram_entropy(text, "trigrams"),
        "{:.2f}".format,
        "trigram entropy (nats)",
    ),
    Figure("distinct_3", "text", lambda text, _: distinct_n(text, 3), title="distinct-3", grows=True),
    Figure(
        "known_words",
        "text",
        lambda text, protocol: None if protocol.vocabulary is None else known_words(text, protocol.vocabulary),
        "{:.1%}".format,
        "known words",
    ),
    Figure("rep_2", "units", lambda units, _: rep_n(units, 2)),
    Figure("rep_3", "units", lambda units, _: rep_n(units, 3)),
    Figure("rep_4", "units", lambda units, _: rep_n(units, 4), "{:.1%}".format, "rep-4"),
    Figure(
        "self_bleu",
        "units",
        lambda units, _: self_bleu(units) if len(units) > 1 else None,
        title="self-BLEU",
        grows=True,
    ),
    Figure("unique_share", "units", lambda units, _: unique_share(units), "{:.1%}".format, grows=True),
    # What follows is measured where it is asked for.
    Figure(
        "memorised_8",
        "text",
        lambda text, protocol: protocol.training_ngrams and protocol.training_ngrams.share(text, 8),
        "{:.2%}".format,
        "8-grams of the training text",
    ),
    Figure(
        "memorised_13",
        "text",
        lambda text, protocol: protocol.training_ngrams and protocol.training_ngrams.share(text, 13),
    ),
    Figure(
        "mauve",
        "features",
        lambda features, protocol: protocol.mauve_reference.compare(features).mauve,
        title="MAUVE",
        spread=True,
        grows=True,
    ),
    Figure(
        "second_gen_ppl",
        "second",
        lambda judged, _: judged.perplexity,
        format_perplexity,
        "Gen-PPL of the second judge",
        spread=True,
    ),
    Figure(
        "gradient_moment",
        "gradients",
        lambda gradients, protocol: protocol.gradient_reference.compare(gradients),
        "{:.3g}".format,
        "gradient moment",
        spread=True,
    ),
)


# Of answers to questions, each of which is right or wrong; see `answers.py`.
ANSWER_FIGURES = (
    Figure(
        "exact_match",
        "answers",
        lambda answers, _: statistics.fmean(one.text == one.reference for one in answers),
        "{:.1%}".format,
        "exact match",
        spread=True,
    ),
    Figure(
        "tokens_per_forward",
        "answers",
        lambda answers, _: sum(one.tokens for one in answers) / sum(one.forwards for one in answers),
        "{:.2f}".format,
        "tokens per forward (TPF)",
    ),
)


def figures_of(
    samples: Samples, protocol, table: Sequence[Figure] | None = None
) -> tuple[dict[str, float | None], list[str]]:
    """Every figure of one seed by name, and notes that say why some could not be measured. `table`: `FIGURES` by default."""
    figures, notes = {}, []
    for figure in FIGURES if table is None else table:
        figures[figure.name] = None
        source = getattr(samples, figure.reads)
        if source is None:
            notes += [samples.trouble] if samples.trouble else []
            continue
        try:
            value = figure.function(source, protocol)
        except (ValueError, ArithmeticError) as error:
            notes.append(f"{figure.name}: {error}")
            continue
        if value is None or math.isfinite(value):
            figures[figure.name] = value
        else:
            notes.append(f"{figure.name} is {value}")
    return figures, notes


def over_seeds(
    seeds: Sequence[dict[str, float | None]], table: Sequence[Figure] | None = None
) -> dict[str, float | None]:
    """Means and spreads of figures over seeds (of sampling, or of training); None unless every seed has the figure."""
    row = {}
    for figure in FIGURES if table is None else table:
        values = [figures.get(figure.name) for figures in seeds] or [None]
        row[figure.name] = None if None in values else figure.mean(values)
        if figure.spread:
            row[f"{figure.name}_std"] = None if None in values or len(values) < 2 else statistics.stdev(values)
    return row
