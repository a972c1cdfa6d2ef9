"""A run of a command, from its settings to the pushed model: what all entry points share."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from evaluation import save_results
from modeling_mcd.files import in_use, lock_folder, write_json
from trainers.exact_resume import from_first_process
from trainers.resume_arguments import ExactResumeArguments
from trainers.runs.adapter_options import AdapterArguments
from trainers.runs.hub import push_to_hub, take_hub_api
from trainers.runs.output_folder import (
    claim_output_dir,
    find_checkpoint,
    recipe_text,
    run_settings,
    save_model,
    short_name,
)
from trainers.runs.round_pushes import RoundPushes
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import RunText


logger = logging.get_logger(__name__)


class Run:
    """A run and its output folder.

        run = Run(training, other, arguments)        # refuses what can be refused; nothing is written or loaded
        run.identify(text, tokenizer)                # refuses another text
        ...                                          # load text and networks; build the trainer
        with run.start():
            trainer.train(run.checkpoint)
            run.save(model, tokenizer)
            run.push()

    Started again with the same arguments, it resumes from the last complete checkpoint. If `resume_from_checkpoint` is in
    another folder, the run begins there and may have another learning rate.

    Args:
        training: the trainer's arguments. The Hub token is removed from them, since every checkpoint stores them.
        arguments: the other dataclasses of settings. Together they determine what the run computes.
        base: where the network was loaded from that an adapter among the settings (`AdapterArguments`) is trained on.

    Raises:
        ValueError: the output folder is in use or holds something else, or the checkpoint is damaged or from another run.
    """

    def __init__(self, training: ExactResumeArguments, *arguments, base: str | None = None):
        self.training, self.arguments, self.base = training, arguments, base
        adapters = (instance for instance in arguments if isinstance(instance, AdapterArguments))
        self.adapter = next(adapters, AdapterArguments())
        self.output_dir = Path(training.output_dir)
        self.is_first = training.process_index == 0
        self._hub, self._rounds = take_hub_api(training), None
        if self._hub is not None and self.is_first and training.hub_strategy == "every_save":
            to = training.hub_model_id, training.hub_private_repo, self.output_dir
            self._rounds = RoundPushes(self._hub, *to)
        self.settings = run_settings(training, *arguments)
        self.checkpoint = from_first_process(self._find_checkpoint)

    def _find_checkpoint(self) -> Path | None:
        held = in_use(self.output_dir)
        if held is not None:
            raise ValueError(held)
        return find_checkpoint(self.output_dir, self.training.resume_from_checkpoint, self.settings)

    def identify(self, text: RunText, tokenizer: PreTrainedTokenizerBase):
        """Adds digests of text and tokenizer to the settings that identify the run.

        Raises:
            ValueError: the run in the output folder, or that of the checkpoint, had another text or tokenizer.
        """
        self.settings |= text.digests(tokenizer)
        self.checkpoint = from_first_process(self._find_checkpoint)

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Locks the output folder for this run. Nothing is written before that.

        Raises:
            ValueError: another process has taken the folder in the meantime.
        """
        with contextlib.ExitStack() as held:
            self.checkpoint = from_first_process(lambda: self._claim(held))
            if self.checkpoint is not None:
                logger.warning(f"resuming from {self.checkpoint}")
            yield

    def _claim(self, held: contextlib.ExitStack) -> Path | None:
        held.enter_context(lock_folder(self.output_dir, "training"))
        checkpoint = find_checkpoint(self.output_dir, self.training.resume_from_checkpoint, self.settings)
        claim_output_dir(self.output_dir, self.settings, checkpoint)
        return checkpoint

    def recipe(self, *more) -> str:
        """The run as YAML, for its model card. `more`: dataclasses of settings that do not change what the run computes."""
        return recipe_text(self.training, *self.arguments, *more)

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = ""):
        """Saves a model and its tokenizer into the output folder, or into its subfolder `name`."""
        merge = bool(self.adapter.merge_adapters)
        save_model(model, tokenizer, self.training, name, base=self.base, merge=merge)

    def save_about(self, text: TextArguments, *more, verb: str = "Trained", **about) -> dict:
        """Writes a description of the run into `eval.json`, from which the card is made; returns the report.

        Args:
            text: the text that the description names.
            more: see `recipe`.
            verb: what was done on the text.
            about: see `save_results`.
        """
        names = ", ".join(short_name(name) for name in (text.train_text, *(text.more_text or ())))
        held_out = short_name(text.validation_text)
        if text.validation_fraction is not None:
            held_out = f"{text.validation_fraction:g} of its rows, by hash"
        return save_results(
            self.output_dir,
            recipe=self.recipe(*more),
            data=f"{verb} on {names}; held out: {held_out}.",
            repository=self.training.hub_model_id,
            datasets=None if Path(text.train_text).exists() else [text.train_text.partition("@")[0]],
            **self.adapter.about(self.base),
            **about,
        )

    def save_figures(self, **figures: float):
        """Writes the figures to `eval_results.json`; one that is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        write_json(self.output_dir / "eval_results.json", finite)

    def push_rounds(self):
        """Begins to upload the rounds that the Hub lacks, if the settings say so; returns at once."""
        if self._rounds is not None:
            self._rounds.start()

    def push(self):
        """Uploads the output folder to the Hub if the settings say so, and what is missing of the rounds."""
        if self._rounds is not None:
            self._rounds.finish()
        if self._hub is not None and self.is_first:
            push_to_hub(self.training, self._hub)
