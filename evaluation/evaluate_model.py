"""From a model to rows of figures: sample at a grid of steps and temperatures, and let the judge read."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.diversity import ENTROPY_UNITS, distinct_n, known_words, unigram_entropy
from evaluation.generative_perplexity import CONVENTIONS, generative_perplexity
from evaluation.judge import describe_judge, fingerprint


HELD_OUT_TEXT = "held-out text"
# One row stands for one point of the grid; the same point evaluated again replaces it.
KEY = ("model", "steps", "temperature", "sampler")
# Rows are comparable when these agree, and held-out text gives the entropy to match when the first four do.
COMPARABLE = ("judge", "convention", "entropy_unit", "length")
FIGURES = ("nfe", "gen_ppl", "gen_ppl_std", "judge_nll", "entropy", "distinct_3", "known_words", "example")
SETTINGS = (*COMPARABLE, "samples", "seeds", "precision", "vocabulary_words")


@dataclass
class EvaluationProtocol:
    """What is held fixed over a table.

    Args:
        judge: any causal language model.
        judge_tokenizer: its tokenizer.
        samples: samples for each seed.
        seeds: number of seeds, 0 .. seeds - 1.
        length: tokens in a sample; the model's context by default.
        sampler: name of a sampler of `generate` that takes `steps`.
        last_step: what follows the steps, see `MDLMGenerationConfig`. Named with the sampler in every row.
        precision: of the draws, see `MDLMGenerationConfig`.
        convention: how Gen-PPL is computed, see `generative_perplexity.py`.
        entropy_unit: "tokens", "words" or "trigrams", see `unigram_entropy`.
        vocabulary: words that count as known, see `known_words`.
        batch_size: canvases, and texts for the judge, at a time. Changes neither samples nor figures.
    """

    judge: PreTrainedModel
    judge_tokenizer: PreTrainedTokenizerBase
    samples: int = 64
    seeds: int = 3
    length: int | None = None
    sampler: str = "ancestral"
    last_step: str | None = None
    precision: str = "float64"
    convention: str = "retokenized"
    entropy_unit: str = "tokens"
    vocabulary: set[str] | None = None
    batch_size: int = 32

    def __post_init__(self):
        for name, allowed in (("convention", CONVENTIONS), ("entropy_unit", ENTROPY_UNITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        self._settings = {
            "judge": describe_judge(self.judge),
            "convention": self.convention,
            "entropy_unit": self.entropy_unit,
            "precision": self.precision,
            "vocabulary_words": None if self.vocabulary is None else len(self.vocabulary),
        }

    @property
    def sampler_name(self) -> str:
        return self.sampler if self.last_step is None else f"{self.sampler}, last step {self.last_step}"

    def settings(self, length: int, samples: int, seeds: int) -> dict:
        return {**self._settings, "length": length, "samples": samples, "seeds": seeds}


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    steps: Sequence[int],
    temperatures: Sequence[float] = (1.0,),
    known_rows: Sequence[dict] = (),
) -> Iterator[dict]:
    """Yields a row for each number of steps and temperature, as soon as it is there, so that the caller can save it.

    A point that `known_rows` already holds for these very weights and this protocol is left out. The same seeds serve
    every point: one seed gives related texts at every number of steps, so that differences are less noisy than figures.

    Yields:
        dict: `gen_ppl` and `entropy`, `trigram_entropy`, `distinct_3`, `known_words` (means over seeds), `gen_ppl_std` (sample standard
        deviation over seeds; None for one seed), `judge_nll` (nats per token, mean over seeds), `nfe` (forwards of the
        network really made, mean over samples), `example` (a text), the keys and the settings above.
    """
    length = protocol.length or model.config.max_position_embeddings
    fixed = protocol.settings(length, protocol.samples, protocol.seeds) | {"weights": fingerprint(model)}
    points = [
        {"model": name, "steps": n, "temperature": float(temperature), "sampler": protocol.sampler_name}
        for temperature in temperatures
        for n in steps
    ]
    points = [point for point in points if not any((point | fixed).items() <= row.items() for row in known_rows)]
    total = len(points) * protocol.seeds * protocol.samples
    with tqdm(total=total, desc=name, unit="sample", disable=not points) as progress:
        for point in points:
            progress.set_postfix(steps=point["steps"], temperature=point["temperature"])
            figures, nfe = [], []
            for seed in range(protocol.seeds):
                ids, forwards = draw_samples(
                    model, protocol, length, point["steps"], point["temperature"], seed, progress
                )
                figures.append(judge_samples(ids, tokenizer, protocol))
                nfe.append(forwards)
            yield point | {"nfe": statistics.fmean(nfe)} | _over_seeds(figures) | fixed


def evaluate_held_out_text(
    blocks: torch.LongTensor, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol
) -> dict:
    """The row of held-out text: blocks [n, L] in the place of samples, so `steps`, `temperature` and `nfe` are None."""
    return (
        {"model": HELD_OUT_TEXT, "steps": None, "temperature": None, "sampler": None, "nfe": None}
        | _over_seeds([judge_samples(blocks, tokenizer, protocol)])
        | protocol.settings(blocks.shape[1], samples=len(blocks), seeds=1)
    )


def draw_samples(
    model, protocol: EvaluationProtocol, length: int, steps: int, temperature: float, seed: int, progress=None
) -> tuple[torch.LongTensor, float]:
    """`protocol.samples` sequences of ids [n, L] on the CPU, and the mean number of forwards that one took part in."""
    generator = torch.Generator().manual_seed(seed)
    sequences, forwards = [], []
    for start in range(0, protocol.samples, protocol.batch_size):
        batch = min(protocol.batch_size, protocol.samples - start)
        output = model.generate(
            steps=steps,
            temperature=temperature,
            length=length,
            sampler=protocol.sampler,
            last_step=protocol.last_step,
            precision=protocol.precision,
            num_return_sequences=batch,
            generator=generator,
            return_dict_in_generate=True,
        )
        sequences.append(output.sequences.cpu())
        forwards.append(output.nfe.cpu())
        if progress is not None:
            progress.update(batch)
    return torch.cat(sequences), torch.cat(forwards).double().mean().item()


def judge_samples(ids: torch.LongTensor, tokenizer: PreTrainedTokenizerBase, protocol: EvaluationProtocol) -> dict:
    """Every figure of one set of samples [n, L]."""
    judge, judge_tokenizer = protocol.judge, protocol.judge_tokenizer
    texts = tokenizer.batch_decode(ids)
    specials = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    if protocol.convention == "raw_ids":
        used = ids.unique().tolist()
        if tokenizer.convert_ids_to_tokens(used) != judge_tokenizer.convert_ids_to_tokens(used):
            raise ValueError(
                "raw_ids needs a judge with the model's own tokenizer: this judge reads the ids as other tokens"
            )
        judged = ids
    else:
        judged = [_in_the_words_of(judge_tokenizer, text, specials) for text in texts]
    gen_ppl = generative_perplexity(judged, judge, judge_tokenizer, protocol.convention, protocol.batch_size)
    plain = [_replace(text, specials, " ") for text in texts]
    return {
        "gen_ppl": gen_ppl.perplexity,
        "entropy": unigram_entropy(
            ids.tolist() if protocol.entropy_unit == "tokens" else plain, protocol.entropy_unit
        ),
        "trigram_entropy": unigram_entropy(plain, "trigrams"),
        "distinct_3": distinct_n(plain, 3),
        "known_words": None if protocol.vocabulary is None else known_words(plain, protocol.vocabulary),
        "example": texts[0],
    }


def _in_the_words_of(judge_tokenizer: PreTrainedTokenizerBase, text: str, specials: set[str]) -> str:
    """BOS and EOS of the model become the judge's EOS; at the start it is dropped where the judge adds a BOS itself."""
    end_of_text = judge_tokenizer.eos_token or " "
    text = _replace(text, specials, end_of_text)
    return text.removeprefix(end_of_text) if judge_tokenizer("")["input_ids"] else text


def _replace(text: str, specials: set[str], replacement: str) -> str:
    for special in specials:
        text = text.replace(special, replacement)
    return text


def _over_seeds(figures: list[dict]) -> dict:
    def mean(name: str) -> float:
        return statistics.fmean(figure[name] for figure in figures)

    perplexities = torch.tensor([figure["gen_ppl"] for figure in figures], dtype=torch.float64)
    return {
        "gen_ppl": mean("gen_ppl"),
        "gen_ppl_std": perplexities.std().item() if len(figures) > 1 else None,
        "judge_nll": perplexities.log().mean().item(),
        "entropy": mean("entropy"),
        "trigram_entropy": mean("trigram_entropy"),
        "distinct_3": mean("distinct_3"),
        "known_words": None if figures[0]["known_words"] is None else mean("known_words"),
        "example": figures[0]["example"],
    }
