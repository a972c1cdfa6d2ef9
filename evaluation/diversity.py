"""How diverse samples are, and how many of their words exist. Gen-PPL falls with diversity, so the two are read together."""

import math
import re
from bisect import bisect_left
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
    entropies = sample_entropies(samples, unit)
    if not entropies:
        raise ValueError("no samples: their entropy is not defined")
    return sum(entropies) / len(entropies)


def sample_entropies(samples: Iterable[Sequence[int]] | Iterable[str], unit: str) -> list[float]:
    """The entropy of each sample, in nats; their mean is `unigram_entropy`."""
    return [_entropy(_units(sample, unit)) for sample in samples]


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
        ngrams.update(_ngrams(text.split(), n))
    return len(ngrams) / max(ngrams.total(), 1)


def rep_n(samples: Iterable[Sequence[int]] | Iterable[str], n: int = 4) -> float:
    """Share of the n-grams of a sample that stand in it before, the mean over samples (arXiv 1908.04319, 2202.06417).

    It grows with the length of the samples: compare only equal lengths.

    Args:
        samples: token ids, or texts, which are split into words at white space.

    Raises:
        ValueError: `n` is below 1, or `samples` is a single string.

    Returns:
        A number in [0, 1]. Samples shorter than n do not count; 0 if all are.
    """
    check_number("n", n, COUNT)
    counts = [Counter(_ngrams(_pieces(sample), n)) for sample in _several(samples)]
    shares = [1 - len(count) / count.total() for count in counts if count]
    return sum(shares) / max(len(shares), 1)


def unique_share(samples: Iterable[Sequence[int]] | Iterable[str]) -> float:
    """Number of different samples divided by the number of samples. Raises ValueError if there are none."""
    pieces = [_pieces(sample) for sample in _several(samples)]
    if not pieces:
        raise ValueError("no samples: the share of different ones is not defined")
    return len(set(pieces)) / len(pieces)


def self_bleu(samples: Iterable[Sequence[int]] | Iterable[str], n: int = 4) -> float:
    """BLEU of a sample against all others as references, the mean over samples (Texygen, arXiv 1802.01886). Lower: more diverse.

    Orders 1 .. n count equally; a precision of 0 becomes 0.1 / its number of n-grams (method 1 of Chen and Cherry, 2014), but
    without any common unigram BLEU is 0; the reference nearest in length decides the brevity penalty. For each n-gram
    the two largest counts are kept, so that the time grows with the text and not with its square.

    It grows with the number of samples: compare only equal numbers of equal length.

    Args:
        samples: token ids, or texts, which are split into words at white space.

    Raises:
        ValueError: `n` is below 1, fewer than two samples, or a single string.
    """
    check_number("n", n, COUNT)
    pieces = [_pieces(sample) for sample in _several(samples)]
    if len(pieces) < 2:
        raise ValueError(f"self-BLEU compares samples with each other: give at least 2, not {len(pieces)}")
    logarithms, matches_nothing = [0.0] * len(pieces), [False] * len(pieces)
    for order in range(1, n + 1):
        counts = [Counter(_ngrams(sample, order)) for sample in pieces]
        most: dict[tuple, tuple[int, int, int]] = {}  # n-gram -> largest count, whose it is, second largest
        for i, count in enumerate(counts):
            for gram, number in count.items():
                largest, owner, second = most.get(gram, (0, -1, 0))
                if number > largest:
                    most[gram] = number, i, largest
                elif number > second:
                    most[gram] = largest, owner, number
        for i, count in enumerate(counts):
            matched = 0
            for gram, number in count.items():
                largest, owner, second = most[gram]
                matched += min(number, second if owner == i else largest)
            matches_nothing[i] |= order == 1 and matched == 0
            logarithms[i] += math.log((matched or 0.1) / max(count.total(), 1)) / n
    lengths = sorted(map(len, pieces))
    figures = [
        0.0 if nothing else math.exp(logarithm + min(0.0, 1 - _nearest_other(lengths, len(sample)) / len(sample)))
        for sample, logarithm, nothing in zip(pieces, logarithms, matches_nothing, strict=True)
    ]
    return sum(figures) / len(figures)


def _nearest_other(lengths: list[int], length: int) -> int:
    """The length nearest to one of sorted `lengths` among the others; of two, the shorter."""
    place = bisect_left(lengths, length)
    others = lengths[max(place - 1, 0) : place] + lengths[place + 1 : place + 2]
    return min(others, key=lambda other: (abs(other - length), other))


def _pieces(sample: Sequence[int] | str) -> tuple:
    return tuple(sample.split()) if isinstance(sample, str) else tuple(map(int, sample))


def _ngrams(pieces: Sequence, n: int) -> Iterable[tuple]:
    return zip(*(pieces[i:] for i in range(n)), strict=False)


def known_words(texts: Iterable[str], vocabulary: set[str]) -> float:
    """Fraction of the words of all texts that are in the vocabulary (see `vocabulary_of`); 0 if there are no words."""
    words = Counter(word for text in _several(texts) for word in WORD.findall(text.lower()))
    return sum(count for word, count in words.items() if word in vocabulary) / max(words.total(), 1)


def _several(texts: Iterable) -> Iterable:
    if isinstance(texts, str):  # it would be taken for texts of one letter each
        raise ValueError("texts must be several texts, such as a list, not one str")
    return texts


def vocabulary_of(texts: Iterable[str]) -> set[str]:
    """The different words of some texts: lower-cased runs of letters, which may hold apostrophes."""
    return {word for text in _several(texts) for word in WORD.findall(text.lower())}
