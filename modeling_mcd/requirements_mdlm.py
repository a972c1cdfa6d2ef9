"""Refuses a transformers that is too old, in one line and before anything else of the model is imported."""

import re

import transformers


MINIMUM = "5.17"  # as in setup.py


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


if release(transformers.__version__) < release(MINIMUM):
    raise ImportError(
        f"this model needs transformers >= {MINIMUM}, found {transformers.__version__}: "
        f"pip install --upgrade 'transformers>={MINIMUM}'"
    )
