"""What happens at the end of a round: the student is exported as `round-k/`, saved as a checkpoint, and then judged."""

import contextlib
from collections.abc import Iterator, Sized
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from evaluation import RunReport, read_texts, vocabulary_of
from evaluation.evaluate_model import FIRST_LOCKING
from evaluation.figures import FIGURES
from evaluation.judge import load_judge
from evaluation.options import EvaluationArguments
from evaluation.team import ALONE, Team
from trainers.runs.output_folder import save_model
from trainers.runs.text_blocks import TextArguments


HELD_OUT_BLOCKS = 512  # judged, evenly spread over the validation set


class Ranks(Team):
    """All processes of a run. They exchange their parts through a group of their own, on the CPU.

    The timeout of a group is that of every exchange in it, and training wants a short one. Here a process may have to wait
    for as long as another one judges, so this group's is the longest that gloo can count (milliseconds in 32 bits).
    """

    def __init__(self):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=24))

    def gather(self, part) -> list:
        parts = [None] * self.size
        dist.all_gather_object(parts, part, group=self.group)
        return parts


@contextlib.contextmanager
def without_partitioning(training: TrainingArguments) -> Iterator[None]:
    """Networks that are loaded inside are complete in every process, under ZeRO-3 too."""
    if getattr(training, "hf_deepspeed_config", None) is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(training.hf_deepspeed_config)


def load_run_judge(
    arguments: EvaluationArguments, training: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The judge of a run and its tokenizer, in every process; None when nothing is judged. Raises as `load_judge` does."""
    if arguments.judge is None:
        return None
    with without_partitioning(training):
        return load_judge(arguments.judge, arguments.judge_dtype, training.device)


def start_report(
    arguments: EvaluationArguments,
    judge: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tokenizer: PreTrainedTokenizerBase,
    config,
    text: TextArguments,
    training: TrainingArguments,
    validation: Sized | None = None,
) -> RunReport:
    """The report of a run's output folder, in all processes. Nothing is written yet, and nothing drawn.

    Args:
        judge: as `load_run_judge` returns it.
        config: the configuration of the networks to judge.
        text: the training text; its words count as known if it is a local file or folder.
        validation: the held-out blocks of the N-step bound, if `evaluation_bound` asks for it.

    Raises:
        ValueError: the judge or an option does not fit the networks.
    """
    local = Path(text.train_text).exists()
    vocabulary = vocabulary_of(read_texts(text.train_text, text.text_column, text.train_split)) if local else None
    protocol = arguments.protocol(*judge, vocabulary)
    steps, temperatures = arguments.evaluation_steps, arguments.evaluation_temperatures
    lockings, count = arguments.evaluation_lockings, arguments.evaluation_bound
    protocol.check(tokenizer, config, steps, temperatures, lockings, bound=count > 0)
    if count and validation is None:
        raise ValueError(f"evaluation_bound ({count}) needs held-out text: give validation_text, or 0 for no bound")
    team = Ranks() if training.world_size > 1 else ALONE
    blocks = held_out_blocks(validation, count) if count else None
    return RunReport(training.output_dir, protocol, steps, temperatures, team, lockings, blocks)


def held_out_blocks(validation: Sized, count: int = HELD_OUT_BLOCKS) -> torch.LongTensor:
    """At most `count` blocks [n, L], evenly spread over a validation set."""
    count = min(len(validation), count)
    chosen = torch.linspace(0, len(validation) - 1, count).round().long().tolist()
    return torch.tensor(validation.select(chosen)["input_ids"])


class RoundCallback(TrainerCallback):
    """Exports the student at the end of each round; when the checkpoint of that step is safe, all processes judge it.

    A checkpoint is therefore written at the end of every round, unless `save_strategy` is "no". A run that is killed
    while it judges resumes there and judges what is missing.

    Args:
        report: None when nothing is judged; with several processes, in all of them or in none.
    """

    def __init__(self, trainer, tokenizer: PreTrainedTokenizerBase, report: RunReport | None):
        self.trainer, self.tokenizer, self.report = trainer, tokenizer, report
        self.exported: str | None = None  # the round that is still to be judged

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._log("teacher")
        elif state.global_step % args.steps_per_round == 0:
            self.exported = f"round-{state.global_step // args.steps_per_round}"
            self._judge()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.steps_per_round:
            return
        self.exported = f"round-{state.global_step // args.steps_per_round}"
        save_model(self.trainer.whole_student(), self.tokenizer, args, self.exported)
        if args.save_strategy != "no" and not control.should_save:
            control.should_save = True
            # A line of the log then ends here too: a run that resumes at this step has no earlier losses to add to it.
            control.should_log = args.logging_strategy != "no"

    def on_save(self, args, state, control, **kwargs):
        self._judge()

    def on_step_begin(self, args, state, control, **kwargs):
        self._judge()  # of a run without checkpoints

    def on_train_end(self, args, state, control, **kwargs):
        self._judge()

    def _judge(self):
        name, self.exported = self.exported, None
        if name is None or self.report is None:
            return
        self.report.judge(name, self.trainer.whole_student(), self.tokenizer, label=name)
        table = self.report.write()
        if self.report.team.rank == 0:
            print(f"\n{table}\n", flush=True)
        self._log(name)

    def _log(self, name: str):
        """Sends a network's figures, and the sample nearest to 8 steps, to the Trainer's trackers."""
        rows = [] if self.report is None else self.report.rows_of(name)
        rows = [row for row in rows if None not in (row.get("gen_ppl"), row.get("entropy"))]
        if not rows:
            return
        logs = {}
        for row in rows:
            point = f"{row['steps']}_steps"
            point += f"_temperature_{row['temperature']:g}" if row["temperature"] != 1 else ""
            point += f"_{row['locking']}" if row["locking"] != FIRST_LOCKING else ""
            measured = {name: row.get(name) for name in (*(figure.name for figure in FIGURES), "bound")}
            logs |= {f"eval_{key}_{point}": value for key, value in measured.items() if value is not None}
        logs["eval_sample"] = min(rows, key=lambda row: abs(row["steps"] - 8))["example"]
        self.trainer.log(logs)
