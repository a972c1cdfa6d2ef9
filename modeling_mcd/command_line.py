"""What all commands of the library share: a user's mistake ends in one line on standard error.

Exit status 2 means that the command line or the recipe is wrong as written. Status 1 means that what it asks for cannot be
done, or has failed. Any other error is a bug of ours: it keeps its traceback, with status 1.
"""

import argparse
import difflib
import errno
import functools
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable

from safetensors import SafetensorError


LOST_A_PROCESS = (
    "another process of the launch has ended (its own last line says why, unless it was killed); "
    "start the same command again"
)


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

    def format_help(self) -> str:
        """A usage line with what is required, and a line for each option, under its shortest name."""
        width = help_width()
        actions = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        needed = [action for action in actions if action.required]
        usage = " ".join(word for action in needed for word in _words(action))
        lines = textwrap.wrap(
            f"usage: {self.prog} {usage} [--option value ...]",
            width,
            subsequent_indent=" " * 7,
            break_on_hyphens=False,
        )
        lines += ["", *textwrap.wrap(self.description, width), ""]
        for action in actions:
            note = "required" if action in needed else action.default
            note = None if note in (None, False, argparse.SUPPRESS) else words_of(note)
            lines += option_lines(_words(action)[0], action.help, action.choices, note, width)
        return "\n".join(lines) + "\n"

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


def _words(action: argparse.Action) -> list[str]:
    """How a command line holds an argument: its name, and its value unless it has none."""
    name = min((name for name in action.option_strings if name.startswith("--")), key=len, default="")
    value = action.metavar or name.removeprefix("--").upper()
    values = [] if action.nargs == 0 else [value, f"[{value} ...]"] if action.nargs == "+" else [value]
    return [name, *values] if name else values


def help_width() -> int:
    return max(shutil.get_terminal_size((110, 24)).columns - 1, 60)


def words_of(value) -> str:
    """A value as it is written on a command line or in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def option_lines(name: str, text: str, choices: Iterable | None, note: str | None, width: int) -> list[str]:
    """The lines of an option in a help: its name, what it is, its choices and, in parentheses, a note."""
    text = " ".join((text or "").split()).replace("%%", "%")
    text = text if text.endswith("...") else text.removesuffix(".")
    if choices:
        names = [str(choice) for choice in choices if choice is not None]
        short = len(names) < 8 and sum(map(len, names)) < 64
        text += f" [{('|' if short else ' | ').join(names)}]"  # a long list can be wrapped
    if note is not None:
        text += f" ({note})"
    options = {"subsequent_indent": " " * 34, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(f"  {name} ".ljust(34) + text, width, **options)


def nearest(word: str, words: Iterable[str]) -> str:
    """The word that is most similar to `word`."""
    return difflib.get_close_matches(word, list(words), n=1, cutoff=0.0)[0]


def one_line_errors(main):
    """A decorator for entry points: a user's mistake exits with one line on standard error and status 1, no traceback."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None):
        # A line and its end are one write, even with PYTHONUNBUFFERED: the processes of a launch share one standard error.
        if sys.__stderr__ is not None:
            sys.__stderr__.reconfigure(line_buffering=True, write_through=False)
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
    elif has_lost_a_process(error):
        line = LOST_A_PROCESS
    elif isinstance(error, OSError) and error.filename is not None:  # no permission, a file for a folder, ...
        line = f"{error.filename}: {error.strerror or error}"
    elif isinstance(error, (ValueError, OSError, FloatingPointError, SafetensorError)):
        line = str(error) or type(error).__name__
    else:
        return None
    return " ".join(line.split())


def has_lost_a_process(error: Exception) -> bool:
    """Whether an error of this process says that another one of its launch has ended or does not answer."""
    from torch import distributed

    if not distributed.is_available() or not isinstance(error, RuntimeError):
        return False
    words = r"gloo|NCCL|connection (was )?(closed|reset)|broken pipe|by peer"
    return isinstance(error, distributed.DistError) or (
        distributed.is_initialized() and re.search(words, str(error), re.IGNORECASE) is not None
    )


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


def wait_for_gloo_threads():
    """Waits a second, in which gloo's threads release the tensors of the last exchange. Call it before a process ends.

    A thread releases them just after the exchange, and takes the interpreter's lock for it. Before Python 3.14 an interpreter
    that has begun to end aborts the process then (pytorch/pytorch#179291). Destroying the group joins its threads only if
    nothing refers to it any more, and wrappers of a network (DDP, for example) may refer to it to the end.
    """
    time.sleep(1)
