"""Self-BLEU as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import self_bleu


class SelfBleu(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU of each text against all others, the mean over texts; words are split at white space.",
            citation="arXiv 1802.01886",
            inputs_description="predictions: texts. n: the longest n-gram.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], n: int = 4) -> dict:
        """`self_bleu`."""
        return {"self_bleu": self_bleu(predictions, n)}
