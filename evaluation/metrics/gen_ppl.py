"""Generative perplexity as a module of the evaluate library; the work is done by `evaluation.generative_perplexity`."""

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.generative_perplexity import generative_perplexity


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
        model, tokenizer = AutoModelForCausalLM.from_pretrained(judge), AutoTokenizer.from_pretrained(judge)
        result = generative_perplexity(predictions, model, tokenizer, batch_size=batch_size)
        return {"gen_ppl": result.perplexity, "nll": result.nll.tolist(), "tokens": result.tokens.tolist()}
