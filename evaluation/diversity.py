"""Diversity and wording of samples. Gen-PPL falls whenever diversity falls, so the two are always read together."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from modeling_mcd.checks_mdlm import COUNT, check_number


ENTROPY_UNITS = ("tokens", "words", "trigrams")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters, with apostrophes inside


def unigram_entropy(samples: Iterable[Sequence[int]] | Iterable[str], unit: str = "tokens") -> float:
    """Mean over samples of the entropy, in nats, of the unigram counts within a sample (Duo, arXiv 2506.10892).

    Args:
        samples: token ids (`tokens`: every id counts, BOS and EOS too) or texts (`words`: split at white space;
            `trigrams`: of characters).
        unit: "tokens", "words" or "trigrams". For a character model tokens say nothing, and words little while most of
            them are broken, hence all different: trigrams then tell the temperatures apart.

    Raises:
        ValueError: an unknown unit, or no sample.
    """
    if unit not in ENTROPY_UNITS:
        raise ValueError(f"unit must be one of {ENTROPY_UNITS}, not {unit!r}")
    entropies = [_entropy(_units(sample, unit)) for sample in samples]
    if not entropies:
        raise ValueError("no samples: their entropy is not defined")
    return sum(entropies) / len(entropies)


def _units(sample: Sequence[int] | str, unit: str) -> Iterable:
    if unit == "words":
        return sample.split()
    if unit == "trigrams":
        return (sample[i : i + 3] for i in range(len(sample) - 2))
    return map(int, sample)


def _entropy(items: Iterable) -> float:
    counts = Counter(items).values()
    total = sum(counts)
    return sum(count / total * math.log(total / count) for count in counts)


def distinct_n(texts: Iterable[str], n: int = 3) -> float:
    """Different word n-grams over all word n-grams, in all texts together (arXiv 1510.03055); 0 when there is none.

    Falls with the amount of text: compare equal numbers of samples of equal length only.
    """
    check_number("n", n, COUNT)
    ngrams = Counter()
    for text in _several(texts):
        words = text.split()
        ngrams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(ngrams) / max(ngrams.total(), 1)


def known_words(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Share of the words that are in the vocabulary (see `vocabulary_of`), all texts together; 0 when there is none."""
    words = Counter(word for text in _several(texts) for word in WORD.findall(text.lower()))
    return sum(count for word, count in words.items() if word in vocabulary) / max(words.total(), 1)


def _several(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # would be read as texts of one letter each
        raise ValueError("texts must be several texts, such as a list, not one str")
    return texts


def vocabulary_of(texts: Iterable[str]) -> set[str]:
    """The words of texts: lower-cased runs of letters, with apostrophes inside, without digits and punctuation."""
    return {word for text in _several(texts) for word in WORD.findall(text.lower())}
