"""MAUVE as a module of the evaluate library; the work is done by `evaluation.mauve`."""

import datasets
import evaluate

from evaluation.judge import load_judge
from evaluation.mauve import mauve, text_features


class MauveOfTexts(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="MAUVE of texts against references, by the hidden states of any causal language model; a k-means of our own.",
            citation="arXiv 2102.01454",
            inputs_description="predictions, references: texts, as many of each. model: folder or Hub name of a causal language model.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], model: str, batch_size: int = 8) -> dict:
        """`mauve`, `smoothed`, `frontier_integral` and `buckets`."""
        reader = load_judge(model)
        result = mauve(*(text_features(texts, *reader, batch_size) for texts in (predictions, references)))
        return vars(result)
