"""The report of a folder: which models are judged into it, and everything that is made from it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from evaluation.answers import AnswerProtocol, evaluate_answers, key_of
from evaluation.answers_table import answers_markdown, write_answers_plot
from evaluation.evaluate_model import (
    FIRST_LOCKING,
    HELD_OUT_TEXT,
    EvaluationProtocol,
    evaluate_held_out_text,
    evaluate_model,
)
from evaluation.model_card import write_model_card
from evaluation.plot import write_plot
from evaluation.results import load_report, report_lock, save_results
from evaluation.scores import save_scores
from evaluation.table import markdown_table
from evaluation.team import ALONE, Team
from evaluation.writing import WRITING, point_of_writing, write_writing
from modeling_mcd.adapters import ADAPTER_CONFIG
from modeling_mcd.files import write_atomically
from modeling_mcd.loading import reason_of


logger = logging.get_logger(__name__)

MODELS = ("config.json", ADAPTER_CONFIG)  # either makes a folder one with a model, and so with a card


def write_report(folder: str | Path, report: dict, name: str | None = None) -> str:
    """Writes `eval.md`, `eval.png` and, if a model lies in the folder, its card; returns the table for the console.

    Args:
        report: as `save_results` returns it.
        name: heading of the card; the folder's name by default.
    """
    table, figures = markdown_table(report["results"]), report.get("figures", [])
    answers = list(report.get("answers", {}).values())
    if answers:
        write_answers_plot(folder, answers)
        table = "\n\n".join([table] * bool(report["results"]) + [answers_markdown(answers)])
    parts = [*figures, table] if report["results"] or answers or not figures else figures
    write_atomically(Path(folder) / "eval.md", "\n\n".join(parts) + "\n")
    if any(row["model"] != HELD_OUT_TEXT for row in report["results"]):
        write_plot(folder, report["results"])
    if any((Path(folder) / name).exists() for name in MODELS):
        write_model_card(folder, report, name)
    return table


class RunReport:
    """Judges models one after the other into the report of a folder; every row is saved as soon as it is measured.

    Args:
        folder: where `eval.json` and what is made of it go.
        protocol: of generative perplexity; None if no judge reads samples.
        steps, temperatures, lockings, coupled_up_to: the grid at which each model is sampled, see `evaluate_model`.
        bound_blocks: held-out blocks [n, L] for the N-step bound, see `evaluate_model`.
        team: the processes that share the work. All call the same methods in the same order; the first one writes.
        answers: of questions, each of whose answers is right or wrong; None if nothing is asked.
        keep_scores: whether the scores of single samples are kept beside the report, see `scores.py`.
    """

    def __init__(
        self,
        folder: str | Path,
        protocol: EvaluationProtocol | None,
        steps: Sequence[int],
        temperatures: Sequence[float] = (1.0,),
        team: Team = ALONE,
        lockings: Sequence[str] = (FIRST_LOCKING,),
        bound_blocks: torch.LongTensor | None = None,
        answers: AnswerProtocol | None = None,
        keep_scores: bool = False,
        coupled_up_to: int | None = None,
    ):
        self.folder, self.protocol, self.team = Path(folder), protocol, team
        self.steps, self.temperatures, self.lockings = steps, temperatures, lockings
        self.coupled_up_to = coupled_up_to
        self.bound_blocks, self.answers, self.keep_scores = bound_blocks, answers, keep_scores

    def judge_text(self, blocks: torch.LongTensor, tokenizer: PreTrainedTokenizerBase):
        """Adds the row of held-out text, blocks [n, L], unless it is there."""
        self.save([evaluate_held_out_text(blocks, tokenizer, self.protocol, self.known_rows(), self.team)])

    def judge(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        label: str | None = None,
        plain: bool = False,
    ):
        """Adds the rows of a model, called `name` in the table, that are not there yet.

        Args:
            label: the row label of the folder's own model from now on, see `save_results`.
            plain: under the published sampler too, whatever `lockings` are: what others are compared with.

        Raises:
            ValueError: the protocol does not fit the model.
        """
        grid = {"steps": self.steps, "temperatures": self.temperatures, "team": self.team}
        grid["lockings"] = list(dict.fromkeys([*[FIRST_LOCKING] * plain, *self.lockings]))
        grid["coupled_up_to"] = self.coupled_up_to
        of_model = name, model, tokenizer
        if self.protocol is not None:
            known = {"known_rows": self.known_rows(), "bound_blocks": self.bound_blocks}
            for row in evaluate_model(*of_model, self.protocol, **grid, **known, keep_scores=self.keep_scores):
                scores = row.pop("scores", None)
                if scores is not None and self.team.rank == 0:  # first: a row that is saved is not measured again
                    save_scores(self.folder, row, scores)
                self.save([row], label=label)
            if label == name:
                self.show_writing(*of_model)
        if self.answers is not None:
            for row in evaluate_answers(*of_model, self.answers, **grid, known_rows=self.known_answers()):
                self.save(answers={key_of(row): row}, label=label)

    def show_writing(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Draws `writing.gif` of the folder's own model, unless it is there. Whatever goes wrong, the figures are not touched."""
        rows = self.known_rows()
        if self.team.rank > 0:
            return
        try:
            point, drawn = point_of_writing(rows, name, self.protocol), load_report(self.folder).get("writing")
            if point is not None and (point != drawn or not (self.folder / WRITING).exists()):
                write_writing(self.folder, point, model, tokenizer, self.protocol)
                self.save(writing=point)
        except Exception as error:  # a picture is no reason to lose an evaluation
            logger.warning(f"there is no picture of {name} writing: {reason_of(error)}")

    def known_rows(self) -> list[dict]:
        """The rows of the report, the same in all processes."""
        return self.team.gather(load_report(self.folder)["results"] if self.team.rank == 0 else None)[0]

    def known_answers(self) -> list[dict]:
        """The rows of the answers in the report, the same in all processes."""
        known = load_report(self.folder).get("answers", {}) if self.team.rank == 0 else {}
        return self.team.gather(list(known.values()))[0]

    def rows_of(self, name: str) -> list[dict]:
        return [row for row in self.known_rows() if row["model"] == name]

    def save(self, rows: Sequence[dict] = (), **about):
        if self.team.rank == 0:
            save_results(self.folder, rows, **about)

    def write(self, **about) -> str:
        """Writes the table, the plot and the card from all that is in `eval.json` now; returns the table."""
        self.save(**about)
        if self.team.rank > 0:
            return ""
        with report_lock(self.folder):  # so that of two evaluations none writes the older state over the newer one
            return write_report(self.folder, load_report(self.folder))
