"""How diverse samples are, and how many of their words exist. Gen-PPL falls with diversity, so the two are read together."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from modeling_mcd.checks_mdlm import COUNT, check_number


ENTROPY_UNITS = ("tokens", "words", "trigrams")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # letters, with apostrophes inside


def unigram_entropy(samples: Iterable[Sequence[int]] | Iterable[str], unit: str = "tokens") -> float:
    """Entropy of the unigram counts within a sample, in nats; the mean over samples (Duo, arXiv 2506.10892).

    Args:
        samples: token ids for the unit "tokens", in which BOS and EOS count too; texts for the other units.
        unit: "tokens", "words" (split at white space) or "trigrams" (of characters). For a character model, tokens say
            nothing. Words say little while most of them are misspelt, since they then all differ; trigrams still tell
            temperatures apart.

    Raises:
        ValueError: an unknown unit, or no samples.
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
    """Number of distinct word n-grams divided by that of all word n-grams, over all texts together (arXiv 1510.03055).

    It falls with the amount of text: compare only equal numbers of samples of equal length.

    Raises:
        ValueError: `n` is below 1, or `texts` is a single string.

    Returns:
        A number in [0, 1]; 0 if there are no n-grams.
    """
    check_number("n", n, COUNT)
    ngrams = Counter()
    for text in _several(texts):
        words = text.split()
        ngrams.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(ngrams) / max(ngrams.total(), 1)


def known_words(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Fraction of the words of all texts that are in the vocabulary (see `vocabulary_of`); 0 if there are no words."""
    words = Counter(word for text in _several(texts) for word in WORD.findall(text.lower()))
    return sum(count for word, count in words.items() if word in vocabulary) / max(words.total(), 1)


def _several(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # it would be taken for texts of one letter each
        raise ValueError("texts must be several texts, such as a list, not one str")
    return texts


def vocabulary_of(texts: Iterable[str]) -> set[str]:
    """The different words of some texts: lower-cased runs of letters, which may hold apostrophes."""
    return {word for text in _several(texts) for word in WORD.findall(text.lower())}
