"""A user's mistake ends in one clear line.

Exit status 2: the command line or the recipe is wrong as it is written (the parsers see to that). Status 1: what it asks for
cannot be done, or failed on the way. Anything else is a fault of ours, and keeps its traceback.
"""

import errno
import functools
import sys

from safetensors import SafetensorError


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
        line = f"{error.filename}: {error.strerror}"
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
