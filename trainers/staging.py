"""Checkpoints that are written while training goes on: first into a fast folder, from which a thread copies them.

`checkpoint_staging` names that folder: /dev/shm, or a fast disk of its own. The Trainer writes a checkpoint there as it would into
the output folder, so it is complete before the next step changes anything. Then training goes on, and a thread copies the
files to the output folder, where the checkpoint is complete once its manifest is there: the last file, as always.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from modeling_mcd.files import read_object, write_json
from trainers.checkpoints import MANIFEST, write_manifest


def copy_checkpoint(source: Path, target: Path, **facts):
    """Copies a checkpoint that has no manifest yet, and completes it. If that fails, nothing of it is left.

    The manifest holds the digests of the files in `source`: a copy that differs counts as damaged.

    Args:
        facts: see `write_manifest`.
    """
    try:
        write_manifest(source, **facts)
        for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != MANIFEST):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        write_json(target / MANIFEST, read_object(source / MANIFEST))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


class Writer:
    """Calls a function in a thread, one at a time, and raises its error in the thread that asks."""

    def __init__(self):
        self._thread, self._error = None, None

    def start(self, function: Callable[[], None]):
        """Calls a function as soon as the one before has returned. Waits for that."""
        self.wait()

        def call():
            try:
                function()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=call, name="checkpoint writer")
        self._thread.start()

    def join(self):
        """Waits until nothing is written any more."""
        if self._thread is not None:
            self._thread.join()

    def check(self):
        """Raises the error of a function that has failed. Waits for nothing."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self):
        """Waits until nothing is written any more, and raises the error of what was written."""
        self.join()
        self.check()
