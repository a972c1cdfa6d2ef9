"""Rep-n as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import rep_n


class RepN(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the word n-grams of a text that stand in it before, the mean over texts.",
            citation="arXiv 1908.04319",
            inputs_description="predictions: texts. n: words in an n-gram.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], n: int = 4) -> dict:
        """`rep_n`."""
        return {"rep_n": rep_n(predictions, n)}
