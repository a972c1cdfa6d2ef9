"""A run of a command, from its settings to the pushed model: what all entry points have in common."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mcd.files import in_use, lock_folder, write_json
from trainers.exact_resume import ExactResumeArguments, from_first_process
from trainers.runs.hub import push_to_hub, take_hub_api
from trainers.runs.output_folder import (
    claim_output_dir,
    find_checkpoint,
    recipe_text,
    run_settings,
    save_model,
)
from trainers.runs.text_blocks import RunText, tokenizer_digest


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

    Started again with the same arguments, it goes on from the last complete checkpoint. With `resume_from_checkpoint` in
    another folder it begins there, and may have another learning rate.

    Args:
        training: of the trainer. Its Hub token is taken out: every checkpoint stores the arguments.
        arguments: the other dataclasses of settings. Together they say what the run computes.

    Raises:
        ValueError: the output folder is in use, or holds something else; the checkpoint is damaged or of another run.
    """

    def __init__(self, training: ExactResumeArguments, *arguments):
        self.training, self.arguments = training, arguments
        self.output_dir = Path(training.output_dir)
        self.is_first = training.process_index == 0
        self._hub = take_hub_api(training)
        self.settings = run_settings(training, *arguments)
        self.checkpoint = from_first_process(self._find_checkpoint)

    def _find_checkpoint(self) -> Path | None:
        held = in_use(self.output_dir)
        if held is not None:
            raise ValueError(held)
        return find_checkpoint(self.output_dir, self.training.resume_from_checkpoint, self.settings)

    def identify(self, text: RunText, tokenizer: PreTrainedTokenizerBase):
        """Adds the content of text and tokenizer to what the run is.

        Raises:
            ValueError: the run of the output folder, or of the checkpoint, had another text or tokenizer.
        """
        self.settings |= text.digests() | {"tokenizer_digest": tokenizer_digest(tokenizer)}
        self.checkpoint = from_first_process(self._find_checkpoint)

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Holds the output folder for this run alone. What comes before it writes nothing.

        Raises:
            ValueError: another process has taken the folder meanwhile.
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
        """The run as YAML, for its model card; `more` are dataclasses of settings that do not change what it computes."""
        return recipe_text(self.training, *self.arguments, *more)

    def save(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = ""):
        """Saves a model into the output folder, or into the folder `name` in it."""
        save_model(model, tokenizer, self.training, name)

    def save_figures(self, **figures: float):
        """Writes `eval_results.json`: the figures that were printed; null for one that is not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        write_json(self.output_dir / "eval_results.json", finite)

    def push(self):
        """Sends the output folder to the Hub, if that was asked for."""
        if self._hub is not None and self.is_first:
            push_to_hub(self.training, self._hub)
