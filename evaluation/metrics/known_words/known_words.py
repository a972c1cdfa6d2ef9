"""The share of known words as a module of the evaluate library; the work is done by `evaluation.diversity`."""

import datasets
import evaluate

from evaluation.diversity import known_words, vocabulary_of


class KnownWords(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of the words of texts that some other texts hold.",
            citation="",
            inputs_description="predictions: texts. vocabulary_texts: texts whose words count as known.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], vocabulary_texts: list[str]) -> dict:
        """`known_words`."""
        return {"known_words": known_words(predictions, vocabulary_of(vocabulary_texts))}
