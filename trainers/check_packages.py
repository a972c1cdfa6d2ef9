"""Imported before the rest of `trainers`: ends a command that would import a user's file in place of one of our packages."""

import importlib.util
import sys
from pathlib import Path


def _check_packages():
    """`python -m trainers.x` searches the current folder first, so a file `evaluation.py` there would hide our package."""
    for name in ("modeling_mcd", "evaluation"):
        found = importlib.util.find_spec(name)
        ours = Path(__file__).resolve().parents[1] / name / "__init__.py"
        if found is not None and found.origin is not None and Path(found.origin).resolve() != ours:
            sys.exit(
                f"error: {found.origin} hides the package {name!r} of this library: rename it, or call the command in "
                "another folder"
            )


if sys.argv[0] == "-m":  # as Python says while it looks for the module to run; a script may have such files of its own
    _check_packages()
