"""The push of a finished run to the Hub."""

import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments

from modeling_mcd.loading import reason_of


def take_hub_api(training: TrainingArguments) -> HfApi | None:
    """The Hub that the finished run is pushed to, if it is. Every checkpoint holds the arguments: they lose the token.

    The model card names the repository, so `hub_model_id` becomes its full name; without a push it becomes None.

    Raises:
        ValueError: when the name has no namespace, and the Hub does not say whose token this is.
    """
    api = HfApi(token=training.hub_token) if training.push_to_hub else None
    name = training.hub_model_id or Path(training.output_dir).resolve().name
    if api is not None and "/" not in name:
        try:
            name = f"{api.whoami()['name']}/{name}"
        except Exception as error:  # no token, a wrong one, no network
            raise ValueError(
                f"hub_model_id {name!r} has no namespace, and the Hub does not say whose token this is ({error}): "
                f"log in, or give the whole name, as in 'you/{name}'"
            ) from None
    training.hub_model_id = None if api is None else name
    training.push_to_hub, training.hub_token = False, None
    return api


def push_to_hub(training: TrainingArguments, api: HfApi):
    """Sends the output folder, without checkpoints, to the Hub. A failure is reported with the way to try again."""
    repository = training.hub_model_id
    ignored = ["checkpoint-*", "teacher/*", "round-*", "runs/*", "run.json", ".*"]
    try:
        api.create_repo(repository, private=training.hub_private_repo, exist_ok=True)
        url = api.upload_folder(
            repo_id=repository,
            folder_path=training.output_dir,
            ignore_patterns=list(ignored),
            commit_message="End of training",
        )
        print(f"pushed to {url}")
    except Exception as error:  # whatever it is, the run itself has succeeded
        retry = ["hf", "upload", repository, training.output_dir, "."]
        retry += [word for pattern in ignored for word in ("--exclude", pattern)]
        retry += ["--private"] if training.hub_private_repo else []
        print(
            f"The push to {repository!r} failed ({type(error).__name__}: {reason_of(error)}). Nothing is lost: "
            f"everything is in {training.output_dir}. Try again with\n  {shlex.join(retry)}",
            file=sys.stderr,
        )
