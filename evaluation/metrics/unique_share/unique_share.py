"""The share of different samples as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import unique_share


class UniqueShare(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Different texts divided by texts.",
            citation="",
            inputs_description="predictions: texts.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str]) -> dict:
        """`unique_share`."""
        return {"unique_share": unique_share(predictions)}
