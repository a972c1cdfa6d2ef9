"""Unigram entropy of samples as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import unigram_entropy


class UnigramEntropy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Entropy in nats of the words or character trigrams within a text, the mean over texts.",
            citation="arXiv 2506.10892",
            inputs_description="predictions: texts. unit: words or trigrams.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], unit: str = "words") -> dict:
        """`unigram_entropy`."""
        return {"unigram_entropy": unigram_entropy(predictions, unit)}
