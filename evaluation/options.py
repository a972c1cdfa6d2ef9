"""The options of an evaluation, the same in a recipe and on the command line of `run_eval.py`."""

from dataclasses import dataclass, field
from typing import Literal

from evaluation.answers import AnswerProtocol, open_questions
from evaluation.diversity import ENTROPY_UNITS
from evaluation.evaluate_model import COUPLED, EVALUATED_LOCKINGS, FIRST_LOCKING, STEPPED, EvaluationProtocol
from evaluation.generative_perplexity import CONVENTIONS
from modeling_mcd.checks_mdlm import AT_LEAST_1, NOT_NEGATIVE, check_numbers
from modeling_mcd.generation_config_mdlm import CHOICES
from modeling_mcd.locking_mdlm import LOCKINGS
from modeling_mcd.reveal_grid_mdlm import LAST_STEPS


PREFIX = "evaluation_"  # `run_eval.py` takes these names without it too


@dataclass
class EvaluationArguments:
    """How models are judged: the teacher and every round's student in a recipe, finished models with `run_eval.py`."""

    judge: str | None = field(
        default=None,
        metadata={"help": "Causal language model that reads the samples; null: nothing is judged."},
    )
    judge_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Precision of the judge's weights."}
    )
    convention: Literal[CONVENTIONS] = field(
        default="retokenized", metadata={"help": "What the judge reads: the text, or its ids."}
    )
    entropy_unit: Literal[ENTROPY_UNITS] = field(
        default="tokens", metadata={"help": "What the entropy counts; words for a character model."}
    )
    evaluation_steps: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64], metadata={"help": "Numbers of sampling steps."}
    )
    evaluation_temperatures: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Sampling temperatures; several make a sweep."}
    )
    evaluation_samples: int = field(
        default=64, metadata={"help": "Samples for each seed; of evaluation_answers the first so many rows."}
    )
    evaluation_seeds: int = field(default=1, metadata={"help": "Number of seeds: 0, 1, ..."})
    evaluation_length: int | None = field(
        default=None, metadata={"help": "Tokens in a sample; the model's context by default."}
    )
    evaluation_sampler: Literal[tuple(STEPPED)] = field(
        default="ancestral",
        metadata={"help": "One of the samplers that take a number of steps; to adaptive it is the most steps."},
    )
    evaluation_lockings: list[str] = field(
        default_factory=lambda: [FIRST_LOCKING],
        metadata={
            "help": f"How reveals hang together, one or more of {', '.join(LOCKINGS)}; see docs/locking.md. With "
            f"{COUPLED} at the end through a model's chain, docs/coupling.md. A run's teacher is judged under independent too."
        },
    )
    evaluation_coupled_up_to: int | None = field(
        default=None, metadata={"help": f"Most steps at which lockings with {COUPLED} are judged; null: all."}
    )
    evaluation_bound: int = field(
        default=0,
        metadata={
            "help": "Held-out blocks for the N-step bound, see docs/likelihood.md; 0: none.",
            "nargs": "?",
            "const": 64,
        },
    )
    evaluation_answers: str | None = field(
        default=None,
        metadata={
            "help": "Prompts and the completions that are right, a table as for train_text: judged by exact match, see "
            "docs/instruction_data.md."
        },
    )
    evaluation_answer_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of an answer; null: as many as the longest right one takes."},
    )
    evaluation_last_step: Literal[LAST_STEPS] | None = field(
        default=None, metadata={"help": "What follows the steps, see docs/generation.md."}
    )
    evaluation_precision: Literal[CHOICES["precision"]] = field(
        default="float64", metadata={"help": "Precision of the draws; legacy_float32 is that of the original code."}
    )
    evaluation_batch_size: int = field(
        default=32, metadata={"help": "Samples that are drawn and judged at a time; changes no figure."}
    )

    def __post_init__(self):
        for name, least, allows in (
            ("evaluation_steps", "numbers of at least 1", AT_LEAST_1[1]),
            ("evaluation_temperatures", "finite numbers of at least 0", NOT_NEGATIVE[1]),
        ):
            values = getattr(self, name)
            if not values or not all(map(allows, values)):
                raise ValueError(f"{name} must be one or more {least}, not {values}")
        unknown = [locking for locking in self.evaluation_lockings if locking not in EVALUATED_LOCKINGS]
        if unknown or not self.evaluation_lockings:
            raise ValueError(
                f"evaluation_lockings must be one or more of {list(EVALUATED_LOCKINGS)}, not {self.evaluation_lockings}"
            )
        check_numbers(self, evaluation_bound=NOT_NEGATIVE, evaluation_coupled_up_to=AT_LEAST_1)
        if self.evaluation_coupled_up_to is not None and not any(
            locking.endswith(COUPLED) for locking in self.evaluation_lockings
        ):
            raise ValueError(
                f"evaluation_coupled_up_to ({self.evaluation_coupled_up_to}) is for lockings with {COUPLED}, but "
                f"evaluation_lockings are {self.evaluation_lockings}"
            )
        if self.evaluation_answer_length is not None and self.evaluation_answers is None:
            raise ValueError(
                f"evaluation_answer_length is {self.evaluation_answer_length}, but there are no evaluation_answers"
            )
        if self.evaluation_bound and 1 not in self.evaluation_temperatures:
            raise ValueError(
                f"evaluation_bound ({self.evaluation_bound}) is of temperature 1, but evaluation_temperatures are "
                f"{self.evaluation_temperatures}: add 1.0"
            )
        names = ("evaluation_samples", "evaluation_seeds", "evaluation_batch_size", "evaluation_answer_length")
        check_numbers(self, **dict.fromkeys(names, AT_LEAST_1), evaluation_length=("be at least 2", lambda n: n >= 2))

    def answer_protocol(self) -> AnswerProtocol | None:
        """How answers are judged; None if there are none to judge. Raises what `open_questions` raises."""
        if self.evaluation_answers is None:
            return None
        names = ("seeds", "sampler", "last_step", "precision", "batch_size")
        return AnswerProtocol(
            open_questions(self.evaluation_answers),
            count=self.evaluation_samples,
            length=self.evaluation_answer_length,
            **{name: getattr(self, PREFIX + name) for name in names},
        )

    def protocol(self, judge, judge_tokenizer, vocabulary: set[str] | None = None, **beside) -> EvaluationProtocol:
        """The evaluation protocol that these options describe, with a loaded judge; `beside`: other arguments of it."""
        names = ("samples", "seeds", "length", "sampler", "last_step", "precision", "batch_size")
        return EvaluationProtocol(
            judge,
            judge_tokenizer,
            convention=self.convention,
            entropy_unit=self.entropy_unit,
            vocabulary=vocabulary,
            **{name: getattr(self, PREFIX + name) for name in names},
            **beside,
        )
