"""What happens at the end of a round: the student is exported as `round-k/` and judged."""

import torch
from typing import Literal
from evaluation.generative_perplexity import CONVENTIONS
from dataclasses import dataclass, field
from evaluation.diversity import ENTROPY_UNITS
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from evaluation import EvaluationProtocol, evaluate_held_out_text, evaluate_model, load_report, read_texts, save_results, vocabulary_of, write_report
from datasets import Dataset
from pathlib import Path
from trainers.runs.output_folder import save_model


@dataclass
class JudgeArguments:
    """How the teacher and every round's student are judged. `evaluation/run_eval.py` makes larger tables of a finished run."""

    judge: str | None = field(
        default=None, metadata={"help": "Causal language model, folder or Hub name; null: no table."}
    )
    evaluation_steps: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32, 64], metadata={"help": "Numbers of sampling steps."}
    )
    evaluation_samples: int = field(default=64, metadata={"help": "Samples for each seed."})
    evaluation_seeds: int = field(default=1, metadata={"help": "Seeds."})
    evaluation_batch_size: int = field(default=32, metadata={"help": "Canvases at a time."})
    convention: Literal[CONVENTIONS] = field(default="retokenized", metadata={"help": "What the judge reads."})
    entropy_unit: Literal[ENTROPY_UNITS] = field(default="tokens", metadata={"help": "Words for a character model."})
    judge_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the judge's weights."}
    )

    def __post_init__(self):
        if min(self.evaluation_steps, default=0) < 1:
            raise ValueError(
                f"evaluation_steps must be one or more numbers of at least 1, not {self.evaluation_steps}"
            )
        names = ("evaluation_samples", "evaluation_seeds", "evaluation_batch_size")
        check_numbers(self, **dict.fromkeys(names, AT_LEAST_1))


class RunReport:
    """Judges the networks of a run, one after the other, into the report of its output folder.

    Args:
        judge: the judge and its tokenizer, as `load_judge` returns them.
        text: where the training text lies; its words count as known when it is a file or a folder.

    `held_out` is the row of the held-out text, if there is one: for the caller to save, nothing is written yet.
    """

    def __init__(
        self,
        arguments: JudgeArguments,
        judge: tuple[PreTrainedModel, PreTrainedTokenizerBase],
        tokenizer: PreTrainedTokenizerBase,
        validation: Dataset | None,
        text: str,
        output_dir: str,
    ):
        self.arguments, self.tokenizer, self.folder = arguments, tokenizer, Path(output_dir)
        self.protocol = EvaluationProtocol(
            *judge,
            samples=arguments.evaluation_samples,
            seeds=arguments.evaluation_seeds,
            convention=arguments.convention,
            entropy_unit=arguments.entropy_unit,
            vocabulary=vocabulary_of(read_texts(text)) if Path(text).exists() else None,
            batch_size=arguments.evaluation_batch_size,
        )
        self.held_out = []
        if validation is not None:
            count = min(len(validation), 512)
            chosen = torch.linspace(0, len(validation) - 1, count).round().long().tolist()
            blocks = torch.tensor(validation.select(chosen)["input_ids"])
            self.held_out = [evaluate_held_out_text(blocks, tokenizer, self.protocol)]

    def judge(self, name: str, model: PreTrainedModel) -> str:
        """Adds a model's rows, saved one by one, and returns the whole table."""
        known = load_report(self.folder)["results"]
        for row in evaluate_model(
            name, model, self.tokenizer, self.protocol, self.arguments.evaluation_steps, known_rows=known
        ):
            save_results(self.folder, [row], label=name)
        return write_report(self.folder, load_report(self.folder))


class RoundCallback(TrainerCallback):
    """Exports the student at the end of each round, and has it judged by the first process."""

    def __init__(self, trainer, tokenizer: PreTrainedTokenizerBase, report: RunReport | None):
        self.trainer, self.tokenizer, self.report = trainer, tokenizer, report

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_round:
            return
        name = f"round-{state.global_step // args.steps_per_round}"
        student = self.trainer.whole_student()
        save_model(student, self.tokenizer, args, name)
        if self.report is not None:
            print(f"\n{self.report.judge(name, student)}\n", flush=True)
        self.trainer.accelerator.wait_for_everyone()
