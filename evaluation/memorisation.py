"""How much of the samples stands word for word in the training text."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np


ORDERS = (8, 13)  # words in an n-gram: long enough that two texts seldom share one by chance


class TrainingNgrams:
    """The word n-grams of a text, of the sizes `ORDERS`, as sorted 64-bit digests: 8 bytes for each different n-gram.

    Words are what stands between white space. N-grams do not cross the end of a document.

    Args:
        texts: the documents of the training text.

    Raises:
        ValueError: no document holds an n-gram of the smallest size.
    """

    def __init__(self, texts: Iterable[str]):
        self._words: dict[str, int] = {}
        found = {n: [] for n in ORDERS}
        for text in texts:
            words = self._digests(text)
            for n in ORDERS:
                found[n].append(np.unique(_combined(words, n)))
        self._known = {n: np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for n, parts in found.items()}
        self._words.clear()
        if not len(self._known[ORDERS[0]]):
            raise ValueError(f"the training text holds no {ORDERS[0]} words in a row: give more of it")
        self.digest = hashlib.sha256(b"".join(known.tobytes() for known in self._known.values())).hexdigest()[:16]

    def share(self, texts: Iterable[str], n: int) -> float | None:
        """Share of the n-grams of all texts together that the training text holds; None if there are none.

        Args:
            n: one of `ORDERS`.
        """
        known, held, total = self._known[n], 0, 0
        for text in texts:
            grams = _combined(self._digests(text), n)
            place = np.searchsorted(known, grams)
            held += int((known[np.minimum(place, len(known) - 1)] == grams).sum()) if len(known) else 0
            total += len(grams)
        return held / total if total else None

    def _digests(self, text: str) -> np.ndarray:
        return np.fromiter(self._of_words(text.split()), np.uint64)

    def _of_words(self, words: list[str]) -> Iterator[int]:
        for word in words:
            if word not in self._words:
                digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
                self._words[word] = int.from_bytes(digest, "little")
            yield self._words[word]


def _combined(words: np.ndarray, n: int) -> np.ndarray:
    """One digest for each n words in a row: a polynomial in an odd multiplier, modulo 2^64."""
    count = max(len(words) - n + 1, 0)
    result = np.zeros(count, np.uint64)
    for place in range(n):
        result = result * np.uint64(0x9E3779B97F4A7C15) + words[place : place + count]
    return result
