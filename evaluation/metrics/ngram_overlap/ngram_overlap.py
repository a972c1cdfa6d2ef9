"""Overlap with the training text as a module of the evaluate library; the work is done by `evaluation.memorisation`."""

import datasets
import evaluate

from evaluation.memorisation import ORDERS, TrainingNgrams


class NgramOverlap(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the word 8-grams and 13-grams of texts that the training text holds.",
            citation="",
            inputs_description="predictions: texts. training_texts: documents of the training text.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], training_texts: list[str]) -> dict:
        """`memorised_8` and `memorised_13`; None where no text is that long."""
        known = TrainingNgrams(training_texts)
        return {f"memorised_{n}": known.share(predictions, n) for n in ORDERS}
