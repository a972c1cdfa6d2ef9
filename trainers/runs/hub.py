"""Pushing a finished run to the Hub, and what its card says there."""

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from modeling_mcd.loading import reason_of
from trainers.runs.round_pushes import PUSHED


@dataclass
class CardArguments:
    """What a model card says that no run can know."""

    card_license: str | None = field(
        default=None, metadata={"help": "Licence of the model, as the Hub names it: apache-2.0, mit, ..."}
    )
    card_language: list[str] | None = field(default=None, metadata={"help": "Languages of the text: en, de, ..."})

    def __post_init__(self):
        if self.card_license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.card_license):
            raise ValueError(
                f"card_license is {self.card_license!r}, but the Hub names licences in small letters: apache-2.0, mit, other"
            )
        for language in self.card_language or []:
            if not re.fullmatch(r"[a-z]{2,3}", language):
                raise ValueError(
                    f"card_language holds {language!r}: give codes of two or three small letters, such as en"
                )

    def about(self) -> dict:
        """For `save_results`."""
        return {"license": self.card_license, "language": self.card_language}


def take_hub_api(training: TrainingArguments) -> HfApi | None:
    """The API for the final push, or None. Removes the token from the arguments, which every checkpoint stores.

    It is blotted out in `sys.argv` too, which W&B stores.

    `hub_model_id` becomes the repository's full name, which the model card shows, or None if nothing is to be pushed.

    Raises:
        ValueError: the name is not valid, has no namespace and the Hub does not say whose token this is, or is given
            although nothing would be pushed; so is `hub_strategy`.
    """
    if training.hub_strategy != "end" and not training.push_to_hub:
        raise ValueError(
            f"hub_strategy is {training.hub_strategy.value!r}, but push_to_hub is false: set it to true, or leave both out"
        )
    if training.hub_model_id is not None and not training.push_to_hub:
        raise ValueError(
            f"hub_model_id is {training.hub_model_id!r}, but push_to_hub is false: set it to true, or leave both out"
        )
    api = HfApi(token=training.hub_token) if training.push_to_hub else None
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    if api is not None:
        try:
            validate_repo_id(name)
        except ValueError as error:
            raise ValueError(
                f"hub_model_id {name!r} is not a valid repository name: give one like 'you/model' ({reason_of(error)})"
            ) from None
    if api is not None and "/" not in name:
        try:
            name = f"{api.whoami()['name']}/{name}"
        except Exception as error:  # no token, a wrong one, no network
            raise ValueError(
                f"hub_model_id {name!r} has no namespace, and the Hub does not say whose token this is ({error}): "
                f"log in, or give the full name, as in 'you/{name}'"
            ) from None
    training.hub_model_id = None if api is None else name
    if training.hub_token:
        sys.argv[:] = [word.replace(training.hub_token, "<HUB_TOKEN>") for word in sys.argv]
    training.push_to_hub, training.hub_token = False, None
    return api


def push_to_hub(training: TrainingArguments, api: HfApi):
    """Uploads the output folder, without its checkpoints. If that fails, prints the command to try again."""
    repository = training.hub_model_id
    ignored = ["checkpoint-*", "teacher/*", "round-*", "runs/*", "scores/*", "run.json", PUSHED, ".*"]
    try:
        api.create_repo(repository, private=training.hub_private_repo, exist_ok=True)
        url = api.upload_folder(
            repo_id=repository,
            folder_path=training.output_dir,
            ignore_patterns=list(ignored),
            commit_message="End of training",
        )
        print(f"pushed to {url}")
    except Exception as error:  # whatever went wrong, the run itself has succeeded
        retry = ["hf", "upload", repository, training.output_dir, "."]
        retry += [word for pattern in ignored for word in ("--exclude", pattern)]
        retry += ["--private"] if training.hub_private_repo else []
        print(
            f"The push to {repository!r} failed ({type(error).__name__}: {reason_of(error)}). Nothing is lost: "
            f"everything is in {training.output_dir}. Try again with\n  {shlex.join(retry)}",
            file=sys.stderr,
        )
