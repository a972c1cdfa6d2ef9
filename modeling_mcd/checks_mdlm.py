"""Rules for numbers, the same for configurations, options and recipes."""

import math
from collections.abc import Callable


# What a number may be: in words, and as a condition, written so that NaN does not meet it.
COUNT = "be an integer of at least 1", lambda value: isinstance(value, int) and value >= 1
AT_LEAST_1 = "be at least 1", lambda value: value >= 1
NOT_NEGATIVE = "be at least 0 and finite", lambda value: 0 <= value < math.inf
POSITIVE = "be positive and finite", lambda value: 0 < value < math.inf
BELOW_1 = "lie in [0, 1)", lambda value: 0 <= value < 1
INSIDE_0_1 = "lie in (0, 1)", lambda value: 0 < value < 1
WITHIN_0_1 = "lie in [0, 1]", lambda value: 0 <= value <= 1
ABOVE_0_TO_1 = "lie in (0, 1]", lambda value: 0 < value <= 1


def check_numbers(settings, **rules: tuple[str, Callable]):
    """Raises ValueError, naming field and value, when a field of `settings` breaks its rule. None breaks no rule.

    What is no number at all (a string, True, False) breaks every rule.
    """
    for name, (words, allows) in rules.items():
        value = getattr(settings, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and allows(value)):
            raise ValueError(f"{name} must {words}, not {value!r}")
