"""The gradient moment as a module of the evaluate library; the work is done by `evaluation.gradient_moment`."""

import datasets
import evaluate

from evaluation.gradient_moment import gradient_moment, text_gradients
from evaluation.judge import load_judge


class GradientMomentOfTexts(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Squared distance of the mean gradients of a causal language model's loss on texts and on references.",
            citation="arXiv 2603.20155",
            inputs_description="predictions, references: texts, as many of each. model: folder or Hub name of a causal language model.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], model: str) -> dict:
        """`gradient_moment`: without bias, so it may be negative."""
        reader = load_judge(model)
        return {
            "gradient_moment": gradient_moment(
                *(text_gradients(texts, *reader) for texts in (predictions, references))
            )
        }
