"""Generative perplexity as a module of the evaluate library; the work is done by `evaluation.generative_perplexity`."""

import datasets
import evaluate

from evaluation.generative_perplexity import generative_perplexity
from evaluation.judge import load_judge


class GenPPL(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity of texts under a causal language model, the judge (MDLM's convention: re-tokenised).",
            citation="arXiv 2406.07524",
            inputs_description="predictions: texts. judge: folder or Hub name of a causal language model. batch_size: texts at a time.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], judge: str, batch_size: int = 8) -> dict:
        """`gen_ppl`, and `nll` and `tokens` of each text."""
        result = generative_perplexity(predictions, *load_judge(judge), batch_size=batch_size)
        return {"gen_ppl": result.perplexity, "nll": result.nll.tolist(), "tokens": result.tokens.tolist()}
