"""The end of a round: the student is exported as `round-k/`, a checkpoint is saved, and then the student is judged."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging

from evaluation import RunReport, load_report, read_texts, vocabulary_of
from evaluation.evaluate_model import FIRST_LOCKING
from evaluation.figures import FIGURES
from evaluation.judge import load_judge
from evaluation.model_card import write_model_card
from evaluation.options import EvaluationArguments
from evaluation.team import ALONE, Ranks
from evaluation.writing import WRITING
from modeling_mcd.files import write_json
from modeling_mcd.loading import reason_of
from trainers.runs.text_arguments import TextArguments
from trainers.runs.together import together
from trainers.runs.trackers import show_report


logger = logging.get_logger(__name__)
T = TypeVar("T")

HELD_OUT_BLOCKS = 512  # judged, evenly spread over the validation set


@contextlib.contextmanager
def without_partitioning(training: TrainingArguments) -> Iterator[None]:
    """A context in which networks are loaded completely in every process, even under ZeRO-3."""
    # Of `accelerate launch`, or of the argument `deepspeed`: the object that says "ZeRO-3" to `from_pretrained`.
    config = getattr(training.deepspeed_plugin, "dschf", None) or getattr(training, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def load_run_judge(
    arguments: EvaluationArguments, training: TrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The judge of a run and its tokenizer, in every process; None if nothing is judged. Raises what `load_judge` raises."""
    if arguments.judge is None:
        return None
    with without_partitioning(training):
        return load_judge(arguments.judge, arguments.judge_dtype, training.device)


class TrainingReport(RunReport):
    """A report whose failures do not end a training: if it cannot be read or written (a full disk, say), it warns.

    Rows that could not be saved are kept and saved with the next ones.
    """

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self._unsaved: list[dict] = []
        self._unsaved_answers: dict[str, dict] = {}

    def _attempt(self, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action()
        except Exception as error:  # whatever went wrong, the training has not failed
            logger.warning(f"the report in {self.folder} is not up to date, and training goes on: {reason_of(error)}")
            return otherwise

    def judge(self, name: str, model: PreTrainedModel, *arguments, **settings):
        """As `RunReport.judge`. A model that is divided among the processes is judged by all of them together."""
        team = self.team
        try:
            with together(model, team) as self.team:
                super().judge(name, model, *arguments, **settings)
        finally:
            self.team = team

    def known_rows(self) -> list[dict]:
        rows = None
        if self.team.rank == 0:
            rows = self._attempt(lambda: load_report(self.folder)["results"], []) + self._unsaved
        return self.team.gather(rows)[0]

    def known_answers(self) -> list[dict]:
        rows = None
        if self.team.rank == 0:
            known = self._attempt(lambda: load_report(self.folder).get("answers", {}), {})
            rows = list((known | self._unsaved_answers).values())
        return self.team.gather(rows)[0]

    def save(self, rows: Sequence[dict] = (), answers: dict[str, dict] | None = None, **about):
        self._unsaved += rows
        self._unsaved_answers |= answers or {}
        about |= {"answers": self._unsaved_answers} if self._unsaved_answers else {}
        if self._attempt(lambda: super(TrainingReport, self).save(self._unsaved, **about) or True, False):
            self._unsaved, self._unsaved_answers = [], {}

    def write(self, **about) -> str:
        return self._attempt(lambda: super(TrainingReport, self).write(**about), "")


def start_report(
    arguments: EvaluationArguments,
    judge: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    tokenizer: PreTrainedTokenizerBase,
    config,
    text: TextArguments,
    training: TrainingArguments,
    validation: Sized | None = None,
) -> TrainingReport:
    """The report of a run's output folder, in all processes. Nothing is written or sampled yet.

    Args:
        judge: as `load_run_judge` returns it; None if answers alone are judged.
        config: the configuration of the networks to judge.
        text: the training text. If it is a local file or folder, its words count as known.
        validation: the held-out blocks of the N-step bound, if `evaluation_bound` asks for it.

    Raises:
        ValueError: the judge, the questions or an option do not fit the networks.
    """
    steps, temperatures = arguments.evaluation_steps, arguments.evaluation_temperatures
    lockings, count = arguments.evaluation_lockings, arguments.evaluation_bound
    protocol, answers = None, arguments.answer_protocol()
    if answers is not None:
        answers.check(tokenizer, config, steps, temperatures, lockings)
    if judge is not None:
        local = Path(text.train_text).exists()
        vocabulary = None
        if local:
            with contextlib.suppress(ValueError):  # token ids have no words
                vocabulary = vocabulary_of(read_texts(text.train_text, text.text_column, text.train_split))
        protocol = arguments.protocol(*judge, vocabulary)
        protocol.check(tokenizer, config, steps, temperatures, lockings, bound=count > 0)
    if count and (validation is None or judge is None):
        raise ValueError(
            f"evaluation_bound ({count}) needs a judge and held-out text: give judge and validation_text, or 0 for no bound"
        )
    team = Ranks() if training.world_size > 1 else ALONE
    blocks = held_out_blocks(validation, count) if count else None
    grid = {"steps": steps, "temperatures": temperatures, "lockings": lockings}
    grid["coupled_up_to"] = arguments.evaluation_coupled_up_to
    return TrainingReport(training.output_dir, protocol, **grid, team=team, bound_blocks=blocks, answers=answers)


def held_out_blocks(validation: Sized, count: int = HELD_OUT_BLOCKS) -> torch.LongTensor:
    """At most `count` blocks [n, L], evenly spread over a validation set."""
    count = min(len(validation), count)
    chosen = torch.linspace(0, len(validation) - 1, count).round().long().tolist()
    return torch.tensor(validation.select(chosen)["input_ids"])


def write_round_card(folder: Path, training: TrainingArguments):
    """Makes a round's folder a repository as it stands: the report of the run so far, and a card. One that is there is left.

    The card's snippet loads the branch that `hub_strategy: every_save` pushes, or otherwise the folder from within.
    """
    if (folder / "README.md").exists():
        return
    run, name = folder.parent, folder.name
    report, place = load_report(run), training.hub_model_id
    if training.hub_strategy == "every_save" and place is not None:
        report |= {"repository": place, "revision": name}
        heading = f"{place.partition('/')[2]}, {name}"
    else:
        report, heading = {key: value for key, value in report.items() if key != "repository"}, name
    write_json(folder / "eval.json", report)
    of_round = report.get("writing", {}).get("model") == name
    for file in ("eval.md", "eval.png", "answers.png", *[WRITING] * of_round):
        if (run / file).exists():
            shutil.copy(run / file, folder / file)
    write_model_card(folder, report, heading)


class RoundCallback(TrainerCallback):
    """Exports the student at the end of each round; once the checkpoint of that step is written, all processes judge it.

    Then the round's folder gets its card, and is pushed.

    For this a checkpoint is written at the end of every round, unless `save_strategy` is "no". A run that is killed while it
    judges resumes there and judges what is missing.

    Args:
        save: `Run.save`.
        report: None if nothing is judged. It must be None in all processes or in none.
        push: `Run.push_rounds`.
    """

    def __init__(
        self,
        trainer,
        tokenizer: PreTrainedTokenizerBase,
        save: Callable,
        report: RunReport | None,
        push: Callable = lambda: None,
    ):
        self.trainer, self.tokenizer, self.save, self.report, self.push = trainer, tokenizer, save, report, push
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
        self.save(self.trainer.whole_student(everywhere=False), self.tokenizer, self.exported)
        if args.save_strategy != "no" and not control.should_save:
            control.should_save = True
            # The log then gets a line here too: a run that resumes at this step no longer has the losses before it.
            control.should_log = args.logging_strategy != "no"

    def on_save(self, args, state, control, **kwargs):
        self._judge()

    def on_step_begin(self, args, state, control, **kwargs):
        self._judge()  # in a run without checkpoints

    def on_epoch_end(self, args, state, control, **kwargs):
        if args.save_strategy == "no":
            self._judge()  # the last round too while the trackers are open, which the end of the training closes

    def on_train_end(self, args, state, control, **kwargs):
        self._judge()

    def _judge(self):
        name, self.exported = self.exported, None
        if name is None:
            return
        if self.report is not None:
            self.report.judge(name, self.trainer.handed_on(), self.tokenizer, label=name)
            table = self.report.write()
            if self.report.team.rank == 0:
                print(f"\n{table}\n", flush=True)
            self._log(name)
        if self.trainer.is_world_process_zero():
            try:
                write_round_card(Path(self.trainer.args.output_dir) / name, self.trainer.args)
            except Exception as error:  # whatever went wrong, the training has not failed
                logger.warning(f"{name} has no card, and training goes on: {reason_of(error)}")
            self.push()

    def _log(self, name: str):
        """Sends a network's figures, and the sample nearest to 8 steps, to the Trainer's trackers."""
        if self.report is None:
            return
        rows = [row for row in self.report.rows_of(name) if None not in (row.get("gen_ppl"), row.get("entropy"))]
        answers = [row for row in self.report.known_answers() if (row["model"], row["note"]) == (name, None)]
        if not rows and not answers:
            return

        def point_of(row: dict) -> str:
            point = f"{row['steps']}_steps"
            point += f"_temperature_{row['temperature']:g}" if row["temperature"] != 1 else ""
            return point + (f"_{row['locking']}" if row["locking"] != FIRST_LOCKING else "")

        logs = {f"eval_exact_match_{point_of(row)}": row["exact_match"] for row in answers}
        for row in rows:
            point = point_of(row)
            measured = {name: row.get(name) for name in (*(figure.name for figure in FIGURES), "bound")}
            logs |= {f"eval_{key}_{point}": value for key, value in measured.items() if value is not None}
        if rows:
            logs["eval_sample"] = min(rows, key=lambda row: abs(row["steps"] - 8))["example"]
        self.trainer.log(logs)
        if rows and self.trainer.is_world_process_zero():
            try:
                show_report(self.trainer, self.report.folder)
            except Exception as error:  # whatever went wrong, the training has not failed
                logger.warning(f"the trackers did not take the table of {name}: {reason_of(error)}")
