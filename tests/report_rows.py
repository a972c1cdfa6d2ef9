"""Rows of results with known figures, as an evaluation gives them."""

import math


SETTINGS = {"judge": "judge (2.7M)", "convention": "retokenized", "entropy_unit": "words", "length": 256}
SETTINGS |= {"samples": 64, "seeds": 3, "precision": "float64", "vocabulary_words": None}


def row(model="teacher", steps=8, temperature=1.0, gen_ppl=20.0, entropy=4.0, **changes) -> dict:
    point = {"model": model, "steps": steps, "temperature": temperature, "sampler": "ancestral", "weights": "ab"}
    point |= {"locking": "independent"}
    figures = {
        "gen_ppl": gen_ppl,
        "gen_ppl_std": 0.5,
        "judge_nll": math.log(gen_ppl),
        "entropy": entropy,
        "nfe": steps,
    }
    words = {"distinct_3": 0.9, "known_words": None, "example": f"{model} wrote this"}
    return point | figures | words | SETTINGS | changes


def held_out(entropy=3.6, **changes) -> dict:
    nowhere = {
        "steps": None,
        "temperature": None,
        "sampler": None,
        "locking": None,
        "nfe": None,
        "gen_ppl_std": None,
        "seeds": 1,
    }
    return row("held-out text", entropy=entropy, gen_ppl=4.26) | nowhere | changes


def line(entropy: float) -> float:
    """A Gen-PPL whose logarithm is linear in entropy."""
    return math.exp(0.5 + 0.7 * entropy)
