"""Distinct-n as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import distinct_n


class DistinctN(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Different word n-grams of all texts divided by all of their word n-grams.",
            citation="arXiv 1510.03055",
            inputs_description="predictions: texts. n: words in an n-gram.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], n: int = 3) -> dict:
        """`distinct_n`."""
        return {"distinct_n": distinct_n(predictions, n)}
