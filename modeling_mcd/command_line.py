"""What every command of the library has in common: a user's mistake ends in one line on standard error.

Exit status 2: the command line, or the recipe, is wrong as it is written. Status 1: what it asks for cannot be done, or failed
on the way. Any other error is a fault of ours: it keeps its traceback, and status 1.
"""

import argparse
import difflib
import errno
import functools
import sys
from collections.abc import Iterable

from safetensors import SafetensorError


class OneLineParser(argparse.ArgumentParser):
    """A parser that names the nearest valid argument, and says in one line what is wrong."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        options, unknown = super().parse_known_args(arguments)
        for word in unknown:
            key = word.split("=")[0]
            self.error(
                f"unknown argument {key!r}; the nearest valid one is {nearest(key, self._option_string_actions)!r}"
            )
        return options

    def error(self, message: str):
        """Ends the command for a mistake in its words."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def fail(self, error: Exception):
        """Ends the command for an error on the way. Raises it again if it is no mistake of the user's."""
        line = line_of(error)
        if line is None:
            raise error
        self.exit(1, f"{self.prog}: error: {line}\n")


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of some words that is most like `word`."""
    return difflib.get_close_matches(word, list(words), n=1, cutoff=0.0)[0]


def one_line_errors(main):
    """Makes an entry point end in one line on standard error and status 1, without a traceback, for a user's mistake."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        try:
            return main(arguments)
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
        sys.exit(f"error: {line}")

    return wrapped


def line_of(error: Exception) -> str | None:
    """What to tell the user of an error, in one line; None for an error that is no mistake of the user's."""
    if disk_is_full(error):
        # Of a copy, `filename` is what was read, and `filename2` what could not be written.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None) or f"a file ({error})"
        line = f"no space left on the disk while writing {file}: free some and start again"
    elif isinstance(error, OSError) and error.filename is not None:  # no permission, a file for a folder, ...
        line = f"{error.filename}: {error.strerror or error}"
    elif isinstance(error, (ValueError, OSError, FloatingPointError, SafetensorError)):
        line = str(error) or type(error).__name__
    else:
        return None
    return " ".join(line.split())


def disk_is_full(error: Exception) -> bool:
    """safetensors, torch and datasets have errors of their own for a failed write, without its number."""
    words = (
        "No space left on device",
        "Not enough disk space",
        "PytorchStreamWriter failed",
        "iostream error",
        "unexpected pos",  # torch.save, when it closes a file that it could not write to the end
    )
    return getattr(error, "errno", None) == errno.ENOSPC or any(part in str(error) for part in words)
