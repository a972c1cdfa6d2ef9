"""Answers that are right or wrong: exact match, tokens per forward, and accuracy under parallelism.

A model is given the prompt of each row of a table (`instructions.py`), room for an answer (masks; random tokens, if it is a
uniform-state model), and a number of steps. Its answer is the text up to the first special token. It is right if it is the
reference, white space at either end aside.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.evaluate_model import (
    FIRST_LOCKING,
    check_draw,
    check_sampler,
    locking_options,
    lockings_for,
    step_option,
    steps_for,
)
from evaluation.figures import ANSWER_FIGURES, Answer, Samples, figures_of, over_seeds
from evaluation.instructions import examples
from evaluation.judge import fingerprint
from evaluation.measure import TROUBLE
from evaluation.team import ALONE, Team
from evaluation.text_sources import TextSource, open_text
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from modeling_mcd.generation_config_mdlm import MDLMGenerationConfig
from modeling_mcd.loading import reason_of
from modeling_mcd.prompts import up_to_special
from modeling_mcd.sampling_mdlm import SAMPLERS, options_of


# What identifies a row of figures: evaluated again, it is replaced.
CURVE = ("model", "sampler", "locking", "temperature", "questions", "digest", "count", "length", "seeds", "precision")
PENALTY, TOLERANCE = 3.0, 5.0  # of accuracy under parallelism


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, what answers it, and the tokens that the reference takes, its end included."""

    prompt: list[int]
    reference: str
    tokens: int


def read_questions(source: TextSource, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> list[Question]:
    """The first `count` rows of a table as questions: all that precedes the last completion of a row is its prompt.

    Raises:
        ValueError: the source holds text without prompts, or no row; or what `examples` refuses.
    """
    if source.kind == "text":
        raise ValueError(
            f"{source.name!r} holds text alone, but questions need the columns prompt and completion, or messages"
        )
    questions = []
    for example in islice(examples(source, tokenizer), count):
        end = len(example.completion) - example.completion[::-1].index(True)
        start = end
        while start and example.completion[start - 1]:
            start -= 1
        answer = example.ids[start:end]
        stated = up_to_special(answer, tokenizer)
        text = tokenizer.decode(stated).strip()
        questions.append(Question(example.ids[:start], text, min(len(stated) + 1, len(answer))))
    if not questions:
        raise ValueError(f"{source.name!r} has no rows, so there is nothing to ask")
    return questions


@dataclass
class AnswerProtocol:
    """What is held fixed over a table of answers. It alone determines how they are drawn.

    Args:
        source: the questions, see `open_questions`.
        count: only the first so many; all by default.
        length: tokens to fill for an answer; as many as the longest reference takes, its end included, by default.
        seeds: number of seeds, 0 .. seeds - 1.
        sampler: name of a sampler of `generate` that takes a number of steps (or, as `adaptive`, the most steps).
        last_step, precision: see `MDLMGenerationConfig`.
        batch_size: questions that are answered at a time. It does not change the answers.

    Raises:
        ValueError: names the setting at fault.
    """

    source: TextSource
    count: int | None = None
    length: int | None = None
    seeds: int = 1
    sampler: str = "ancestral"
    last_step: str | None = None
    precision: str = "float64"
    batch_size: int = 32

    def __post_init__(self):
        check_numbers(self, **dict.fromkeys(("count", "length", "seeds", "batch_size"), AT_LEAST_1))
        step_option(self.sampler)
        if self.last_step is not None and "last_step" not in options_of(SAMPLERS["absorbing"][self.sampler]):
            raise ValueError(f"last_step ({self.last_step!r}) is not used by the sampler {self.sampler!r}")
        self.generation_config(1, 1.0, self.length or 1)  # has the rules of the other settings

    def generation_config(
        self, steps: int, temperature: float, length: int, locking: str = FIRST_LOCKING
    ) -> MDLMGenerationConfig:
        """All options of `generate`."""
        return MDLMGenerationConfig(
            **{step_option(self.sampler): steps},
            temperature=temperature,
            max_new_tokens=length,
            sampler=self.sampler,
            **locking_options(locking),
            last_step=self.last_step,
            precision=self.precision,
            return_dict_in_generate=True,
        )

    def questions(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Question], int]:
        """The questions in a model's tokens, and the tokens to fill for each answer."""
        questions = read_questions(self.source, tokenizer, self.count)
        return questions, self.length or max(question.tokens for question in questions)

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config,
        steps: Sequence[int],
        temperatures: Sequence[float],
        lockings: Sequence[str] = (FIRST_LOCKING,),
    ):
        """Raises ValueError if this protocol cannot be used with a model, before anything is drawn."""
        check_sampler(self, config)
        for locking in lockings_for(config, self.sampler, lockings):
            check_draw(self.generation_config(1, 1.0, 1, locking), config)
            for temperature in temperatures:
                for n in steps:
                    self.generation_config(n, temperature, 1, locking)
        questions, length = self.questions(tokenizer)
        longest = max(len(question.prompt) for question in questions)
        if longest + length > config.max_position_embeddings:
            raise ValueError(
                f"the longest prompt of {self.source.name!r} has {longest} tokens and an answer {length}, but the model's "
                f"context is {config.max_position_embeddings}: leave out that row, or ask for shorter answers"
            )


def open_questions(source: str) -> TextSource:
    """Finds a table of questions. Raises what `open_text` raises, and ValueError for text without prompts."""
    found = open_text(source, instructions=True)
    if found.kind == "text":
        raise ValueError(
            f"{source!r} holds text alone, but questions need the columns prompt and completion, or messages"
        )
    return found


def evaluate_answers(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: AnswerProtocol,
    steps: Sequence[int],
    temperatures: Sequence[float] = (1.0,),
    known_rows: Sequence[dict] = (),
    team: Team = ALONE,
    lockings: Sequence[str] = (FIRST_LOCKING,),
    coupled_up_to: int | None = None,
) -> Iterator[dict]:
    """Yields a row for each locking, temperature and number of steps as soon as it is measured; see `evaluate_model`.

    A point that `known_rows` already holds for the same weights and protocol is left out. An answer depends only on its
    question, its number and the seed: not on the batch, nor on the process that draws it.

    Yields:
        dict: `CURVE`, `steps`, the figures of `ANSWER_FIGURES` (means over seeds), `nfe` (forwards, mean over answers),
        `example` (prompt, answer and reference of the first question), `weights` and `note`, which says why a figure is None.

    Raises:
        ValueError: the protocol does not fit the model, see `AnswerProtocol.check`.
    """
    protocol.check(tokenizer, model.config, steps, temperatures, lockings)
    questions, length = protocol.questions(tokenizer)
    sampler = protocol.sampler if protocol.last_step is None else f"{protocol.sampler}, last step {protocol.last_step}"
    name_of = Path(protocol.source.name)  # no path of this machine goes into a card
    fixed = {
        "questions": name_of.name if name_of.exists() else protocol.source.name,
        "digest": protocol.source.digest,
        "count": len(questions),
    }
    fixed |= {"length": length, "seeds": protocol.seeds, "precision": protocol.precision}
    fixed |= {"weights": team.gather(fingerprint(model, team))[0]}
    todo = []
    for locking in lockings_for(model.config, protocol.sampler, lockings):
        for temperature in map(float, temperatures):
            for n in steps_for(locking, steps, coupled_up_to):
                point = {"model": name, "steps": n, "temperature": temperature, "sampler": sampler, "locking": locking}
                if not any(holds(row, point | fixed) for row in known_rows):
                    todo.append(point)
    total = len(todo) * protocol.seeds * len(team.share(len(questions)))
    with tqdm(total=total, desc=name, unit="answer", disable=not todo or team.rank > 0) as progress:
        for point in todo:
            progress.set_postfix({name: point[name] for name in ("steps", "temperature", "locking")})
            options = protocol.generation_config(point["steps"], point["temperature"], length, point["locking"])
            by_seed, notes, nfe, example = [], [], [], None
            for seed in range(protocol.seeds):
                answers, trouble = None, None
                try:
                    share = team.share(len(questions))
                    answers = list(
                        answer(model, tokenizer, questions, share, options, seed, protocol.batch_size, progress)
                    )
                except TROUBLE as error:
                    trouble = reason_of(error)
                parts = team.gather((answers, trouble))
                troubles = [trouble for _, trouble in parts if trouble is not None]
                answers = None if troubles else [one for part, _ in parts for one in part]
                samples = Samples([], [], [], None, next(iter(troubles), None), answers=answers)
                figures, why = figures_of(samples, protocol, ANSWER_FIGURES)
                by_seed.append(figures)
                notes += why
                if answers is not None:
                    nfe.append(statistics.fmean(one.forwards for one in answers))
                    example = example or [
                        tokenizer.decode(questions[0].prompt),
                        answers[0].text,
                        questions[0].reference,
                    ]
            yield (
                point
                | fixed
                | {"nfe": statistics.fmean(nfe) if len(nfe) == protocol.seeds else None}
                | over_seeds(by_seed, ANSWER_FIGURES)
                | {"example": example, "note": "; ".join(dict.fromkeys(notes)) or None}
            )


def holds(row: dict, point: dict) -> bool:
    """Whether a row is the measurement of this point. A row without a figure is measured again."""
    return row.get("exact_match") is not None and point.items() <= row.items()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    share: range,
    options: MDLMGenerationConfig,
    seed: int,
    batch_size: int,
    progress: tqdm | None = None,
) -> Iterator[Answer]:
    """Answers the questions whose numbers are in `share`."""
    for start in range(share.start, share.stop, batch_size):
        numbers = range(start, min(start + batch_size, share.stop))
        prompts = [torch.tensor(questions[i].prompt, dtype=torch.long) for i in numbers]
        sides = {"batch_first": True, "padding_side": "left"}
        result = model.generate(
            pad_sequence(prompts, **sides).to(model.device),
            generation_config=options,
            attention_mask=pad_sequence([torch.ones_like(prompt) for prompt in prompts], **sides).to(model.device),
            seed=[(seed << 32) + i for i in numbers],
        )
        filled = result.sequences[:, -options.max_new_tokens :].tolist()
        for i, ids, forwards in zip(numbers, filled, result.nfe.tolist(), strict=True):
            stated = up_to_special(ids, tokenizer)
            tokens = min(len(stated) + 1, len(ids))
            yield Answer(tokenizer.decode(stated).strip(), questions[i].reference, tokens, forwards)
        if progress is not None:
            progress.update(len(numbers))


def key_of(row: dict) -> str:
    """The name of a row in a report."""
    return " | ".join(str(row[name]) for name in (*CURVE, "steps"))


def curves_of(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    """The rows of each curve, the values of `CURVE`, by rising numbers of steps."""
    curves = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        curves.setdefault(tuple(row[name] for name in CURVE), []).append(row)
    return curves


def accuracy_under_parallelism(points: Sequence[tuple[float, float]], best: float) -> float:
    """AUP, the accuracy in per cent integrated over tokens per forward, with a penalty on what it loses (d3LLM,
    arXiv 2601.07568).

    With the points (rho_i, y_i) in order of rho, only those with y_i >= y_1 - 5, and W(y) = min(exp(-3 (1 - y / best)), 1):

        rho_1 y_1 + sum_i (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2

    Args:
        points: (tokens per forward, accuracy in [0, 100]) of one model under one sampler; at least one.
        best: the best accuracy of all models that are compared, in [0, 100].
    """
    points = sorted(points)
    kept = [(rho, y) for rho, y in points if y >= points[0][1] - TOLERANCE]
    weighted = [(rho, y * min(math.exp(-PENALTY * (1 - y / best)), 1) if best else 0.0) for rho, y in kept]
    area = sum((rho - before) * (y + y_before) / 2 for (before, y_before), (rho, y) in pairwise(weighted))
    return kept[0][0] * kept[0][1] + area
