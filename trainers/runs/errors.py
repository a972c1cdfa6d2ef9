"""A user's mistake ends in one clear line."""

import errno
import functools
import sys


def one_line_errors(main):
    """A user's mistake ends in one line on standard error and status 1, without a traceback."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        try:
            return main(arguments)
        except Exception as error:
            if disk_is_full(error):
                # Of a copy, `filename` is what was read, and `filename2` what could not be written.
                file = getattr(error, "filename2", None) or getattr(error, "filename", None) or f"a file ({error})"
                line = f"no space left on the disk while writing {file}: free some and start again"
            elif isinstance(error, OSError) and error.filename is not None:  # no permission, a file for a folder, ...
                line = f"{error.filename}: {error.strerror}"
            elif isinstance(error, (ValueError, FileNotFoundError, FloatingPointError)):
                line = str(error)
            else:
                raise
        sys.exit(f"error: {' '.join(line.split())}")

    return wrapped


def disk_is_full(error: Exception) -> bool:
    """safetensors, torch and datasets have errors of their own for a failed write, without its number."""
    words = (
        "No space left on device",
        "Not enough disk space",
        "PytorchStreamWriter failed writing",
        "iostream error",
    )
    return getattr(error, "errno", None) == errno.ENOSPC or any(part in str(error) for part in words)
