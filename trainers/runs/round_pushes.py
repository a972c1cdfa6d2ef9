"""Rounds on the Hub: the student of each round is pushed as a branch `round-k` of the repository while the next one trains."""

import hashlib
import shlex
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils import logging

from modeling_mcd.files import read_object, write_json
from modeling_mcd.loading import reason_of


logger = logging.get_logger(__name__)

PUSHED = "pushed.json"  # in the output folder: the repository, and what of which round it holds


class RoundPushes:
    """Pushes the rounds of an output folder that its repository lacks, one after the other, in a thread.

    A push that fails never ends a run: it is tried again at the end of the next round, and once more at the end of the run. What has
    been pushed is written into the folder, so that a resumed run does not push it again.

    Args:
        api: with the token.
        repository: full name; it is made if it does not exist.
        private: whether it is then private; None: as the Hub's settings say.
        folder: the output folder of the run.
    """

    def __init__(self, api: HfApi, repository: str, private: bool | None, folder: Path):
        self.api, self.repository, self.private, self.folder = api, repository, private, folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="push")
        self._last: Future | None = None

    def start(self):
        """Pushes what is missing; returns at once."""
        self._last = self._thread.submit(self._push_missing)

    def finish(self):
        """Waits for the pushes, tries once more what has failed, and prints the commands for what fails again."""
        failed = self._last.result() if self._last is not None else []
        if failed or self._last is None:
            failed = self._thread.submit(self._push_missing).result()
        self._thread.shutdown()
        for name in failed:
            retry = ["hf", "upload", self.repository, str(self.folder / name), ".", "--revision", name]
            retry += ["--private"] if self.private else []
            print(f"{name} is not on the Hub. Try again with\n  {shlex.join(retry)}", file=sys.stderr)

    def _push_missing(self) -> list[str]:
        """The names of the rounds that could not be pushed."""
        failed = []
        for round_folder in sorted(self.folder.glob("round-*"), key=lambda path: (len(path.name), path.name)):
            name = round_folder.name
            try:
                pushed, digest = self._pushed(), digest_of(round_folder)
                if pushed.get(name) == digest:
                    continue
                self._push(round_folder)
                write_json(self.folder / PUSHED, {"repository": self.repository, "rounds": pushed | {name: digest}})
            except Exception as error:  # whatever went wrong, the training has not failed
                failed.append(name)
                logger.warning(
                    f"the push of {name} to {self.repository!r} failed, and the run goes on "
                    f"({type(error).__name__}: {reason_of(error)}); it is tried again"
                )
        return failed

    def _push(self, round_folder: Path):
        name = round_folder.name
        self.api.create_repo(self.repository, private=self.private, exist_ok=True)
        self.api.create_branch(self.repository, branch=name, exist_ok=True)
        self.api.upload_folder(
            repo_id=self.repository, folder_path=round_folder, revision=name, commit_message=f"End of {name}"
        )

    def _pushed(self) -> dict[str, str]:
        """Round -> digest of what the repository holds of it."""
        if not (self.folder / PUSHED).exists():
            return {}
        known = read_object(self.folder / PUSHED)
        return known["rounds"] if known.get("repository") == self.repository else {}


def digest_of(folder: Path) -> str:
    """Of all files of a folder, with their names."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
