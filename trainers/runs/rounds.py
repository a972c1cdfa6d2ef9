"""What happens at the end of a round: the student is exported as `round-k/` and judged."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from evaluation import RunReport, read_texts, vocabulary_of
from evaluation.options import EvaluationArguments
from trainers.runs.output_folder import save_model
from trainers.runs.text_blocks import TextArguments


HELD_OUT_BLOCKS = 512  # judged, evenly spread over the validation set


def start_report(
    arguments: EvaluationArguments,
    judge: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tokenizer: PreTrainedTokenizerBase,
    config,
    text: TextArguments,
    output_dir: str,
) -> RunReport:
    """The report of a run's output folder. Nothing is written yet, and nothing drawn.

    Args:
        judge: the judge and its tokenizer, as `load_judge` returns them.
        config: the configuration of the networks to judge.
        text: the training text; its words count as known if it is a local file or folder.

    Raises:
        ValueError: the judge or an option does not fit the networks.
    """
    local = Path(text.train_text).exists()
    vocabulary = vocabulary_of(read_texts(text.train_text, text.text_column, text.train_split)) if local else None
    protocol = arguments.protocol(*judge, vocabulary)
    steps, temperatures = arguments.evaluation_steps, arguments.evaluation_temperatures
    protocol.check(tokenizer, config, steps, temperatures)
    return RunReport(output_dir, protocol, steps, temperatures)


def held_out_blocks(validation: Dataset) -> torch.LongTensor:
    """At most `HELD_OUT_BLOCKS` blocks [n, L], evenly spread over a validation set."""
    count = min(len(validation), HELD_OUT_BLOCKS)
    chosen = torch.linspace(0, len(validation) - 1, count).round().long().tolist()
    return torch.tensor(validation.select(chosen)["input_ids"])


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
            self.report.judge(name, student, self.tokenizer, label=name)
            print(f"\n{self.report.write()}\n", flush=True)
        self.trainer.accelerator.wait_for_everyone()
