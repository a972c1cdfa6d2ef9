"""From a model to rows of figures: samples at a grid of steps and temperatures, scored by the judge."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.diversity import ENTROPY_UNITS
from evaluation.generative_perplexity import CONVENTIONS
from evaluation.gradient_moment import GradientReference
from evaluation.judge import check_same_ids, describe_judge, fingerprint
from evaluation.likelihood import Bound
from evaluation.mauve import MauveReference
from evaluation.measure import TROUBLE, draw_samples, measure
from evaluation.memorisation import TrainingNgrams
from evaluation.sampler_likelihood import check_bound, step_bound
from evaluation.team import ALONE, Team
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from modeling_mcd.generation_config_mdlm import MDLMGenerationConfig
from modeling_mcd.generation_inputs_mdlm import check_interleaved, is_coupled
from modeling_mcd.loading import reason_of
from modeling_mcd.locking_mdlm import LOCKINGS
from modeling_mcd.sampling_mdlm import SAMPLERS, options_of


HELD_OUT_TEXT = "held-out text"
FIRST_LOCKING = LOCKINGS[0]  # of rows that were written before there was another
COUPLED = "+coupling"  # after a locking: with the model's chain (docs/coupling.md), which is otherwise switched off
EVALUATED_LOCKINGS = (*LOCKINGS, *(locking + COUPLED for locking in LOCKINGS))
# The point of the grid that a row stands for.
KEY = ("model", "steps", "temperature", "sampler", "locking")
# Held-out text gives the entropy to match to the rows that agree with it in these.
COMPARABLE = ("judge", "convention", "entropy_unit", "length")
# What is held fixed over a table. With the key it identifies a row: evaluated again, a row is replaced.
SETTINGS = (*COMPARABLE, "samples", "seeds", "precision", "vocabulary_words")
# The N-step bound of a row; `bound_text` says of which text.
BOUND = ("bound", "bound_se", "bound_blocks", "bound_text")
# The samplers that take a number of steps, and the option that it is given as.
STEPPED = {
    name: next(option for option in ("steps", "max_steps") if option in options_of(sampler))
    for name, sampler in SAMPLERS["absorbing"].items()
    if {"steps", "max_steps"} & set(options_of(sampler))
}


def step_option(sampler: str) -> str:
    """The option of a sampler that a number of steps of the grid stands for: `steps`, or the most steps of `adaptive`.

    Raises:
        ValueError: there is no such sampler, or it takes no number of steps.
    """
    if sampler not in STEPPED:
        raise ValueError(f"sampler must be one of {tuple(STEPPED)}, not {sampler!r}")
    return STEPPED[sampler]


def check_sampler(protocol, config):
    """Raises ValueError unless a model of this configuration has the sampler and the precision of a protocol."""
    is_there = protocol.sampler in SAMPLERS[config.diffusion_kind]
    if not is_there or (config.mask_token_id is None and protocol.precision == "legacy_float32"):
        raise ValueError(
            f"sampler {protocol.sampler!r} with {protocol.precision} draws needs a model of absorbing diffusion; this one is "
            "uniform: take the sampler ancestral and float64"
        )


def check_draw(options: MDLMGenerationConfig, config):
    """Raises ValueError unless a model of this configuration has the locking and the chain of these options."""
    is_coupled(options, {"coupling"}, config)
    if options.locking == "interleaved":
        check_interleaved(options, config)


def lockings_for(config, sampler: str, lockings: Sequence[str]) -> list[str]:
    """Those of a table's lockings under which a model has rows: the coupled ones are of models with a chain only.

    Raises:
        ValueError: none is left, or the sampler does not use one of them.
    """
    has_chain = getattr(config, "coupling", None) is not None
    found = [locking for locking in lockings if has_chain or not locking.endswith(COUPLED)]
    if not found:
        raise ValueError(
            f"locking {lockings[0]!r} needs a model with a chain, and this one has none: see docs/coupling.md"
        )
    takes_one = "locking" in options_of(SAMPLERS[config.diffusion_kind][sampler])
    for locking in found:
        if locking_options(locking)["locking"] is not None and not takes_one:
            raise ValueError(f"locking ({locking!r}) is not used by the sampler {sampler!r} of this model")
    return found


def steps_for(locking: str, steps: Sequence[int], coupled_up_to: int | None) -> list[int]:
    """Those of a table's numbers of steps at which a locking has rows: a coupled one up to `coupled_up_to`; None: all."""
    return [n for n in steps if coupled_up_to is None or n <= coupled_up_to or not locking.endswith(COUPLED)]


def locking_options(locking: str) -> dict:
    """What a locking of a table is in the options of `generate`. `independent` is the default, which some samplers lack."""
    name = locking.removesuffix(COUPLED)
    return {"locking": None if name == FIRST_LOCKING else name, "coupling": locking.endswith(COUPLED)}


@dataclass
class EvaluationProtocol:
    """What is held fixed over a table. It alone determines how samples are drawn: a model's generation config is not used.

    Args:
        judge: any causal language model.
        judge_tokenizer: its tokenizer.
        samples: samples for each seed.
        seeds: number of seeds, 0 .. seeds - 1.
        length: tokens in a sample; the model's context by default.
        sampler: name of a sampler of `generate` that takes `steps` (or, as `adaptive`, `max_steps`).
        last_step: what follows the steps, see `MDLMGenerationConfig`. Every row names it with the sampler.
        precision: of the draws, see `MDLMGenerationConfig`.
        convention: how Gen-PPL is computed, see `generative_perplexity.py`.
        entropy_unit: "tokens", "words" or "trigrams", see `unigram_entropy`.
        vocabulary: words that count as known, see `known_words`.
        batch_size: samples that are drawn and judged at a time. It changes neither samples nor figures.
        second_judge: another causal language model and its tokenizer, which reads the samples' text too.
        mauve_reference: held-out text that the samples are compared with by MAUVE.
        gradient_reference: held-out text that they are compared with by the gradients of the second judge.
        training_ngrams: of the training text, to see what is copied from it.

    Raises:
        ValueError: names the setting at fault.
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
    second_judge: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    mauve_reference: MauveReference | None = None
    gradient_reference: GradientReference | None = None
    training_ngrams: TrainingNgrams | None = None

    def __post_init__(self):
        choices = {"convention": CONVENTIONS, "entropy_unit": ENTROPY_UNITS, "sampler": STEPPED}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {tuple(allowed)}, not {getattr(self, name)!r}")
        check_numbers(self, **dict.fromkeys(("samples", "seeds", "batch_size"), AT_LEAST_1))
        check_numbers(self, length=("be at least 2: the first token is not predicted", lambda value: value >= 2))
        if self.last_step is not None and "last_step" not in options_of(SAMPLERS["absorbing"][self.sampler]):
            raise ValueError(f"last_step ({self.last_step!r}) is not used by the sampler {self.sampler!r}")
        self.generation_config(1, 1.0, self.length or 2, 1)  # has the rules of the other settings

    def check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config,
        steps: Sequence[int],
        temperatures: Sequence[float],
        lockings: Sequence[str] = (FIRST_LOCKING,),
        bound: bool = False,
    ):
        """Raises ValueError if this protocol cannot be used with a model, before anything is drawn.

        Args:
            config: the model's `MDLMConfig`.
            bound: whether the N-step bound is asked for too.
        """
        if self.length is not None and self.length > config.max_position_embeddings:
            raise ValueError(
                f"length is {self.length}, but the model's context is {config.max_position_embeddings} tokens"
            )
        check_sampler(self, config)
        if self.convention == "raw_ids":
            check_same_ids(tokenizer, self.judge_tokenizer)
        for locking in lockings_for(config, self.sampler, lockings):
            check_draw(self.generation_config(1, 1.0, 2, 1, locking), config)
            for temperature in temperatures:
                for n in steps:
                    self.generation_config(n, temperature, config.max_position_embeddings, 1, locking)
            if bound:
                check_bound(self.generation_config(1, 1.0, 2, 1, locking), config.diffusion_kind)

    def generation_config(
        self, steps: int, temperature: float, length: int, count: int, locking: str = FIRST_LOCKING
    ) -> MDLMGenerationConfig:
        """All options of `generate`, for `count` samples of `length` tokens."""
        return MDLMGenerationConfig(
            **{step_option(self.sampler): steps},
            temperature=temperature,
            length=length,
            sampler=self.sampler,
            **locking_options(locking),
            last_step=self.last_step,
            precision=self.precision,
            num_return_sequences=count,
            return_dict_in_generate=True,
        )

    @property
    def sampler_name(self) -> str:
        return self.sampler if self.last_step is None else f"{self.sampler}, last step {self.last_step}"

    @cached_property
    def judge_description(self) -> str:
        """The judge in one line. The first access hashes the judge's weights."""
        return describe_judge(self.judge)

    @cached_property
    def beside(self) -> dict:
        """What the figures that are not always measured depend on; only those that are asked for. A row holds it too."""
        asked = {}
        if self.second_judge is not None:
            asked["second_judge"] = describe_judge(self.second_judge[0])
        if self.mauve_reference is not None:
            asked["mauve_reference"] = self.mauve_reference.description
            asked["mauve_text"] = self.mauve_reference.digest
        if self.gradient_reference is not None:
            asked["gradient_text"] = self.gradient_reference.digest
        if self.training_ngrams is not None:
            asked["training_text"] = self.training_ngrams.digest
        return asked

    def settings(self, length: int, samples: int, seeds: int) -> dict:
        """The `SETTINGS` of a row."""
        return {
            "judge": self.judge_description,
            "convention": self.convention,
            "entropy_unit": self.entropy_unit,
            "precision": self.precision,
            "vocabulary_words": None if self.vocabulary is None else len(self.vocabulary),
            "length": length,
            "samples": samples,
            "seeds": seeds,
        }


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    steps: Sequence[int],
    temperatures: Sequence[float] = (1.0,),
    known_rows: Sequence[dict] = (),
    team: Team = ALONE,
    lockings: Sequence[str] = (FIRST_LOCKING,),
    bound_blocks: torch.LongTensor | None = None,
    keep_scores: bool = False,
    coupled_up_to: int | None = None,
) -> Iterator[dict]:
    """Yields a row for each locking, temperature and number of steps as soon as it is measured, so that the caller can save it.

    A point that `known_rows` already holds for the same weights and protocol is left out, unless it lacks a figure that is asked
    for (one of those that `EvaluationProtocol.beside` names): then it is sampled again, and keeps its bound. All points share
    their seeds: one seed gives related texts at every number of steps, so differences between points are less noisy than the
    figures.
    A figure that cannot be measured (NaN logits, nothing to score, an infinite perplexity) is None, and the row's `note` says
    why.

    Args:
        team: the processes that share the work; each yields every row. `known_rows` must be the same in all of them.
        lockings: some of `EVALUATED_LOCKINGS`, see `lockings_for`.
        bound_blocks: held-out blocks [n, L] in the model's tokens: rows at temperature 1 get the N-step bound on them too
            (`step_bound`), a known row without any new sample.
        keep_scores: whether a row that is sampled holds the scores of its samples too, as `scores`, see `measure`.
        coupled_up_to: the most steps at which a coupled locking has rows; None: all of `steps`.

    Yields:
        dict: the figures of `FIGURES` (means over seeds), `gen_ppl_std` (sample standard deviation over seeds; None for
        one seed), `nfe` (forwards of the network really made, mean over samples), `example` (a text without BOS and EOS),
        `note`, `weights` (their fingerprint), and the values of `KEY` and `SETTINGS`; with `bound_blocks` those of
        `measure_bound`.

    Raises:
        ValueError: the protocol does not fit the model, see `EvaluationProtocol.check`.
    """
    protocol.check(tokenizer, model.config, steps, temperatures, lockings, bound=bound_blocks is not None)
    length = protocol.length or model.config.max_position_embeddings
    fixed = protocol.settings(length, protocol.samples, protocol.seeds)
    fixed |= {"weights": team.gather(fingerprint(model, team))[0]}
    asked = fixed | protocol.beside
    text = None if bound_blocks is None else digest_of(bound_blocks)
    todo = []
    for locking in lockings_for(model.config, protocol.sampler, lockings):
        for temperature in map(float, temperatures):
            for n in steps_for(locking, steps, coupled_up_to):
                point = {"model": name, "steps": n, "temperature": temperature, "sampler": protocol.sampler_name}
                point |= {"locking": locking}
                earlier = next((row for row in known_rows if _holds(row, point | fixed)), None)
                bounded = text is not None and temperature == 1 and (earlier or {}).get("bound_text") != text
                known = earlier if earlier is not None and _holds(earlier, asked) else None
                if earlier is not None and known is None:
                    point |= {name: earlier[name] for name in BOUND if name in earlier}
                if known is None or bounded:
                    todo.append((point, known, bounded))
    # In forwards of one text, so that the time left is about right: 32 steps take as long as 16 times 2.
    texts = len(team.share(protocol.samples)) * protocol.seeds
    blocks = 0 if text is None else len(team.share(len(bound_blocks)))
    total = sum(point["steps"] * (texts * (row is None) + blocks * bounded) for point, row, bounded in todo)
    with tqdm(total=total, desc=name, unit="forward", disable=not todo or team.rank > 0) as progress:
        for point, row, bounded in todo:
            at = {key: point[key] for key in ("steps", "temperature", "locking")}
            progress.set_postfix(at)

            def advance(count: int, steps: int = point["steps"]):
                progress.update(count * steps)

            def draw(
                seed: int, share: range, at: dict = at, advance: Callable = advance
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return draw_samples(model, protocol, length, **at, seed=seed, share=share, on_batch=advance)

            if row is None:
                scores = [] if keep_scores else None
                figures = measure(draw, protocol.seeds, protocol.samples, tokenizer, protocol, team, scores)
                row = point | figures | asked | ({"scores": scores} if scores else {})
            if bounded:
                how = protocol.generation_config(point["steps"], 1.0, length, 1, point["locking"])
                bound, trouble = measure_bound(model, bound_blocks, how, protocol.batch_size, team, advance)
                note = "; ".join(filter(None, dict.fromkeys((row["note"], trouble)))) or None
                row = row | bound | {"bound_text": text, "note": note}
            yield row


def digest_of(blocks: torch.LongTensor) -> str:
    """16 hexadecimal digits of blocks of text."""
    return hashlib.sha256(blocks.cpu().contiguous().numpy()).hexdigest()[:16]


def measure_bound(
    model: PreTrainedModel,
    blocks: torch.LongTensor,
    options: MDLMGenerationConfig,
    batch_size: int,
    team: Team,
    on_batch: Callable[[int], object],
) -> tuple[dict, str | None]:
    """The N-step bound of a row, and what went wrong.

    Returns:
        `bound` in nats per token, its standard error over blocks `bound_se`, and their number `bound_blocks`.
    """
    share, bounds, trouble = team.share(len(blocks)), [], None
    try:
        for rows in torch.arange(share.start, share.stop).split(batch_size) if len(share) else ():
            # A block's plan is that of its number, whoever scores it, so that all rows of a report are pairs.
            how = {"generation_config": options, "seed": rows.tolist(), "batch_size": batch_size}
            bounds.append(step_bound(model, blocks[rows], **how))
            on_batch(len(rows))
    except TROUBLE as error:
        trouble = f"bound: {reason_of(error)}"
    parts = team.gather((bounds, trouble))
    troubles = [trouble for _, trouble in parts if trouble is not None]
    if troubles:
        return {"bound": None, "bound_se": None, "bound_blocks": len(blocks)}, troubles[0]
    every = [bound for bounds, _ in parts for bound in bounds]
    bound = Bound(torch.cat([bound.nats for bound in every]), torch.cat([bound.tokens for bound in every]))
    return {"bound": bound.mean, "bound_se": bound.error, "bound_blocks": len(blocks)}, None


def _holds(row: dict, point: dict) -> bool:
    """Whether a row is the measurement of this point. A row without a perplexity is measured again."""
    return row.get("gen_ppl") is not None and point.items() <= row.items()


def evaluate_held_out_text(
    blocks: torch.LongTensor,
    tokenizer: PreTrainedTokenizerBase,
    protocol: EvaluationProtocol,
    known_rows: Sequence[dict] = (),
    team: Team = ALONE,
) -> dict:
    """The row of held-out text: blocks [n, L] take the place of samples, so its point and `nfe` are None."""
    point = dict.fromkeys(KEY) | {"model": HELD_OUT_TEXT}
    fixed = protocol.settings(blocks.shape[1], samples=len(blocks), seeds=1) | {"text": digest_of(blocks)}
    fixed |= protocol.beside
    known = next((row for row in known_rows if _holds(row, point | fixed)), None)
    if known is not None:
        return known

    def draw(seed: int, share: range) -> tuple[torch.Tensor, torch.Tensor]:
        return blocks[share.start : share.stop], torch.zeros(len(share))

    row = point | measure(draw, 1, len(blocks), tokenizer, protocol, team) | fixed
    return row | {"nfe": None}
