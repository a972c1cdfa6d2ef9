"""Command lines whose every complaint is one line on standard error."""

import argparse
import difflib


class OneLineParser(argparse.ArgumentParser):
    """A parser that names the nearest valid argument; ends with status 2."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        options, unknown = super().parse_known_args(arguments)
        for word in unknown:
            key = word.split("=")[0]
            nearest = difflib.get_close_matches(key, self._option_string_actions, n=1, cutoff=0.0)
            self.error(f"unknown argument {key!r}; the nearest valid one is {nearest[0]!r}")
        return options

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")
