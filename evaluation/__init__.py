"""How a model is judged: generative perplexity, diversity, likelihood, the report and the model card."""

from .diversity import distinct_n, known_words, rep_n, self_bleu, unigram_entropy, unique_share, vocabulary_of
from .evaluate_model import EvaluationProtocol, evaluate_held_out_text, evaluate_model
from .generative_perplexity import GenerativePerplexity, generative_perplexity, sequence_nll
from .judge import load_judge
from .likelihood import Bound, block_nelbo, causal_loss, validation_nelbo
from .matched_entropy import matched_gen_ppl
from .model_card import write_model_card
from .plot import write_plot
from .report import RunReport, write_report
from .results import load_report, save_results
from .sampler_likelihood import step_bound
from .sequence_nelbo import Estimate, sequence_nelbo
from .table import markdown_table
from .text import read_texts, text_blocks


__all__ = [
    "Bound",
    "Estimate",
    "EvaluationProtocol",
    "GenerativePerplexity",
    "RunReport",
    "block_nelbo",
    "causal_loss",
    "distinct_n",
    "evaluate_held_out_text",
    "evaluate_model",
    "generative_perplexity",
    "known_words",
    "load_judge",
    "load_report",
    "markdown_table",
    "matched_gen_ppl",
    "read_texts",
    "rep_n",
    "save_results",
    "self_bleu",
    "sequence_nelbo",
    "sequence_nll",
    "step_bound",
    "text_blocks",
    "unigram_entropy",
    "unique_share",
    "validation_nelbo",
    "vocabulary_of",
    "write_model_card",
    "write_plot",
    "write_report",
]
