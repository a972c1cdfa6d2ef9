"""What all commands of the library share: a user's mistake ends in one line on standard error.

Exit status 2 means that the command line or the recipe is wrong as written. Status 1 means that what it asks for cannot be
done, or has failed. Any other error is a bug of ours: it keeps its traceback, with status 1.
"""

import argparse
import difflib
import errno
import functools
import sys
from collections.abc import Callable, Iterable

from safetensors import SafetensorError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, which names the nearest valid argument where there is a typo."""

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
        """Exits with status 2 for a mistake in the command line."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, command: Callable[[argparse.Namespace], object], arguments: list[str] | None):
        """Parses the arguments and calls `command` with the options. A user's mistake exits with one line and status 1."""
        options = self.parse_args(arguments)
        try:
            command(options)
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            self.exit(1, f"{self.prog}: error: {line}\n")


def nearest(word: str, words: Iterable[str]) -> str:
    """The word that is most similar to `word`."""
    return difflib.get_close_matches(word, list(words), n=1, cutoff=0.0)[0]


def one_line_errors(main):
    """A decorator for entry points: a user's mistake exits with one line on standard error and status 1, no traceback."""

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
    """What to tell the user about an error, in one line; None for an error that is not the user's mistake."""
    if disk_is_full(error):
        # When a file is copied, `filename` is what was read and `filename2` what could not be written.
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
    """Whether a write failed because the disk is full. safetensors, torch and datasets raise errors without an errno."""
    words = (
        "No space left on device",
        "Not enough disk space",
        "PytorchStreamWriter failed",
        "iostream error",
        "unexpected pos",  # torch.save, when it closes a file that it could not write to the end
    )
    return getattr(error, "errno", None) == errno.ENOSPC or any(part in str(error) for part in words)
