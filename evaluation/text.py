"""Cuts text into blocks of fixed length, for training and for held-out text: BOS + text + EOS, with EOS between documents.

All documents form one long stream of tokens, which is cut every `length - 2` tokens. Only the incomplete block at the end of
the stream is dropped. So a block depends only on the text, the tokenizer and the length; not on a batch size, nor on how a long
document arrives in pieces.

Text is text: the letters "[MASK]" in it are tokenised as letters, and so is the name of every other special token.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from evaluation.text_sources import open_text


logger = logging.get_logger(__name__)

BATCH = 2**18  # characters that are tokenised at a time; a token takes some 200 bytes until it is an integer
PART = 2**15  # a long document is divided into parts of about this many characters
LONGEST = 2**18  # a part is cut after this many characters even if there is no good place for it
CONTEXT = 128  # characters on either side of a cut that are tokenised to check it

# How vocabularies write a space and a line end: unchanged, byte-level (GPT-2), or as SentencePiece does.
SPACE, NEWLINE, BLANK = " Ġ▁", "\nĊ", r" Ġ▁\nĊ\rč\tĉ\s"
# Places where a document may be cut, each with the tokens that forbid it because they could span the cut.
CUTS = (
    (re.compile(r"\S(?= )"), re.compile(f"[^{BLANK}][{SPACE}]")),
    (re.compile(r"\S(?=\n)"), re.compile(f"[^{BLANK}][{NEWLINE}]")),
    (re.compile(r"\n(?=\S)"), re.compile(f"[{NEWLINE}][^{BLANK}]")),
    (re.compile(r"\S(?=\S)"), re.compile(r"(?!<0x[0-9A-F]{2}>$)..", re.DOTALL)),
)


def read_texts(source: str | Path, column: str = "text", split: str = "train") -> list[str]:
    """All documents of a text. Arguments and errors are those of `open_text`."""
    return ["".join(document) for document in open_text(source, column=column, split=split).documents()]


def text_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.LongTensor:
    """At most `count` blocks, evenly spread over the documents `texts`.

    Returns:
        [count or fewer, length] int64.

    Raises:
        ValueError: less text than one block, a count below 1, or a tokenizer without BOS or EOS.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    blocks = np.array(list(pack(([text] for text in texts), tokenizer, length, "the reference text")))
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().long()
    return torch.from_numpy(blocks).long()[chosen]


def check_blocks(tokenizer: PreTrainedTokenizerBase, length: int):
    """Raises ValueError if blocks of this length cannot be made with this tokenizer."""
    if length < 3:
        raise ValueError(f"block_length is {length}, but a block is BOS + text + EOS: at least 3")
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"the tokenizer has no {name}, and a block is BOS + text + EOS: set it and save the tokenizer again"
            )


def pack(
    documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase, length: int, name: str = "the text"
) -> Iterator[np.ndarray]:
    """Yields the blocks [length] int32 of documents, each of which is an iterable of its pieces.

    Args:
        name: what an error calls the text.

    Raises:
        ValueError: less text than one block, or what `check_blocks` refuses.
    """
    check_blocks(tokenizer, length)
    yield from cut(token_stream(documents, tokenizer), tokenizer, length, name)


def cut(
    stream: Iterable[np.ndarray], tokenizer: PreTrainedTokenizerBase, length: int, name: str
) -> Iterator[np.ndarray]:
    """Yields the blocks [length] int32 of a stream of tokens that arrives in arrays of any size."""
    body, rest, tokens, blocks = length - 2, np.empty(0, dtype=np.int32), 0, 0
    for ids in stream:
        tokens += len(ids)
        rest = np.concatenate([rest, ids])
        full = len(rest) // body
        for chunk in rest[: full * body].reshape(full, body):
            yield np.concatenate([[tokenizer.bos_token_id], chunk, [tokenizer.eos_token_id]], dtype=np.int32)
        rest, blocks = rest[full * body :], blocks + full
    if blocks == 0:
        raise ValueError(
            f"{name!r} holds {tokens} tokens, less text than one block of {length} tokens: "
            "give more text, or ask for shorter blocks"
        )


def token_stream(
    documents: Iterable[Iterable[str]],
    tokenizer: PreTrainedTokenizerBase,
    divider: "Divider | None" = None,
    ends: bool = True,
) -> Iterator[np.ndarray]:
    """Yields the int32 ids of all documents in arrays of bounded size, with an EOS after each document.

    Args:
        divider: divides long documents; by default a new one.
        ends: whether an EOS follows the last part of a document; false where the one document goes on elsewhere.
    """
    divider = divider or Divider(tokenizer)
    texts, last, size = [], [], 0

    def encoded() -> np.ndarray:
        arrays = []
        for ids, is_last in zip(encode(texts, tokenizer), last, strict=True):
            arrays.append(np.array([*ids, tokenizer.eos_token_id] if is_last else ids, dtype=np.int32))
        return np.concatenate(arrays)

    for document in documents:
        for text, is_last in divider.parts(document):
            texts.append(text)
            last.append(is_last and ends)
            size += len(text) + 1
            if size >= BATCH:
                yield encoded()
                texts, last, size = [], [], 0
    if texts:
        yield encoded()


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of texts, with no special tokens added. The name of a special token in a text is read as letters.

    Some vocabularies also hold such a name as an ordinary entry. It is then cut after its first character.

    Raises:
        ValueError: a text gives the mask's id all the same.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(texts, **options, return_attention_mask=False)["input_ids"]
    names = {name for name in tokenizer.all_special_tokens if len(name) > 1 and name != tokenizer.unk_token}
    special = {*tokenizer.convert_tokens_to_ids(sorted(names)), tokenizer.mask_token_id}
    for i, ids in enumerate(encoded):
        if special.isdisjoint(ids):
            continue
        inside = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(names))
        parts = [part for part in re.split(inside, texts[i]) if part]
        encoded[i] = [j for part in tokenizer(parts, **options)["input_ids"] for j in part]
        if tokenizer.mask_token_id in encoded[i]:
            raise ValueError(
                f"the text holds something that the tokenizer reads as its mask token {tokenizer.mask_token!r}, which "
                "would be taken for noise: remove it from the text, or give the tokenizer another mask token"
            )
    return encoded


class NoPlace(ValueError):
    """A long document has no place to be cut at."""


class Divider:
    """Divides long documents so that the tokens of the parts, concatenated, are the tokens of the document.

    A cut is made only where both conditions hold:

    1. No token of the vocabulary can span it. Before a space, for example, no token may hold a non-blank character followed by
       a space. So no merge of a BPE and no piece of a Unigram model crosses the cut, and the two sides are independent.
    2. `CONTEXT` characters on either side give the same ids together as apart. This covers everything that is not in the
       vocabulary: normalisers that look at neighbours, prefixes at the start of a text, unknown tokens that are fused, and
       pre-tokenisers that look ahead.

    If no place qualifies for `LONGEST` characters (merges that cross spaces, or a text that has none), bounded memory comes
    first: the document is cut where the second condition holds, or anywhere if it never does. The tokens next to such a cut
    may differ from those of the undivided document, but they do not depend on how the document was read.

    Args:
        may_force: whether such a cut is made; otherwise `NoPlace` is raised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, may_force: bool = True):
        self.tokenizer, self.may_force, self._cuts = tokenizer, may_force, None

    @property
    def cuts(self) -> list[re.Pattern]:
        """The kinds of places that the vocabulary allows. Computed only when a document is long enough to need them."""
        if self._cuts is None:
            special = set(self.tokenizer.all_special_tokens)
            tokens = [token for token in self.tokenizer.get_vocab() if token not in special]
            self._cuts = [place for place, forbidden in CUTS if not any(map(forbidden.search, tokens))]
        return self._cuts

    def parts(self, document: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yields (part, whether it is the last of the document)."""
        text, start = "", 0  # the rest of the document; where in it to look for the next cut
        for piece in document:
            text += piece
            begin = 0
            while start + PART + CONTEXT <= len(text):
                place = self.place(text, start, start + PART)
                start += PART
                if place is None and start - begin >= LONGEST:
                    place = self.forced_place(text, start)
                if place is not None:
                    yield text[begin:place], False
                    begin = start = place
            text, start = text[begin:], start - begin
        yield text, True

    def place(self, text: str, start: int, end: int) -> int | None:
        """The last good place for a cut in the second half of text[start:end]; None if the last few candidates are not good."""
        start = (start + end) // 2
        for cut in self.cuts:
            candidates = [match.end() for match in cut.finditer(text, max(start, end - 1024), end)]
            candidates = candidates or [match.end() for match in cut.finditer(text, start, end)]
            for place in candidates[:-9:-1]:
                if self.same_apart(text, place):
                    return place
        return None

    def forced_place(self, text: str, end: int) -> int:
        """Where to cut, at `end` or shortly before, although the vocabulary allows no cut."""
        if not self.may_force:
            raise NoPlace(f"no place to cut in {LONGEST} characters")
        logger.warning_once(
            f"for {LONGEST} characters, the text has no place that no token of this tokenizer can span: it is cut there "
            "all the same, and the tokens next to the cut may differ from those of the undivided text"
        )
        return next((place for place in range(end, end - CONTEXT, -1) if self.same_apart(text, place)), end)

    def same_apart(self, text: str, place: int) -> bool:
        """Whether `CONTEXT` characters on either side of a place give the same ids together as apart."""
        left, right = text[max(place - CONTEXT, 0) : place], text[place : place + CONTEXT]
        together, *apart = encode([left + right, left, right], self.tokenizer)
        return together == [*apart[0], *apart[1]]
