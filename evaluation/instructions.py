"""Prompts and completions: the rows of a table as token ids, and which of them belong to a completion.

A row of a table is one sequence. It is one of the following, by the columns that TRL knows too:

    prompt, completion     texts: BOS + prompt + completion + EOS, of which completion and EOS are the completion
    prompt, completion     lists of messages, in the tokenizer's chat template: all that follows the prompt's rendering
    messages               a conversation in the chat template: what the assistant says, with what ends its turns
    text                   BOS + text + EOS, all of it

As in TRL, a prompt and its completion are tokenised together; where a token would hold the end of the one and the start of
the other, they are tokenised apart, which is what a model is given when it answers. Text is text: the names of special tokens
in it are letters. In the rendering of a chat template they are what they are elsewhere in transformers: tokens.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from evaluation.text import encode
from evaluation.text_sources import TextSource, as_plain, found


@dataclass(frozen=True)
class Example:
    """One row.

    Args:
        ids: its token ids.
        completion: for each of them, whether it belongs to a completion.
    """

    ids: list[int]
    completion: list[bool]


def examples(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """The rows of a table, one by one.

    Raises:
        ValueError: names the row and, where it has one, the column: a cell holds something else than its column should, a
            completion is empty, a conversation cannot be rendered or told apart, or a token is the mask.
    """
    for number, cells in enumerate(source.cells()):
        yield example_at(number, cells, source, tokenizer)


def example_at(number: int, cells: Sequence, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The row `number` of a table. Errors are those of `examples`."""
    try:
        return example_of(cells, source, tokenizer)
    except BadCell as fault:
        raise source.bad_row(number, fault.column, str(fault)) from None
    except ValueError as error:
        raise source.bad_row(number, None, f"cannot be used: {error}") from None


class BadCell(ValueError):
    """What is wrong with a cell of a column; None: with the row."""

    def __init__(self, column: str | None, fault: str):
        super().__init__(fault)
        self.column = column


def example_of(cells: Sequence, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The sequence of a row, whose cells are those of `TextSource.cells`."""
    if source.kind == "messages":
        return from_chat(conversation(cells[0], source.column, tokenizer), tokenizer)
    names = [name for name in (source.prompt_column, source.column) if name is not None]
    if source.kind == "completion" and all(isinstance(cell, list) for cell in cells):
        return from_chat(prompted_conversation(*cells, *names, tokenizer), tokenizer)
    lists = [isinstance(cell, list) for cell in cells]
    for name, cell, is_list in zip(names, cells, lists, strict=True):
        if isinstance(cell, str) and any(lists):
            raise BadCell(name, "holds text, and the other column of the row messages: give two texts or two lists")
        if not isinstance(cell, str) and not (is_list and len(cells) > 1):
            kinds = "text or a list of messages" if source.kind == "completion" else "text"
            raise BadCell(name, f"holds {found(cell)}, not {kinds}")
    texts = [as_plain(cell) for cell in cells]
    if not texts[-1].strip():
        raise BadCell(names[-1], "is empty")

    def ids_of(text: str) -> list[int]:
        return encode([text], tokenizer)[0] if text else []

    *prompt, learnt = joined(texts, ids_of)
    given = [tokenizer.bos_token_id, *prompt[0]] if prompt else []
    learnt = ([] if prompt else [tokenizer.bos_token_id]) + [*learnt, tokenizer.eos_token_id]
    return Example([*given, *learnt], [False] * len(given) + [True] * len(learnt))


def joined(texts: Sequence[str], ids_of: Callable[[str], list[int]]) -> list[list[int]]:
    """The ids of each of some texts that follow each other, tokenised together as far as no token spans two of them."""
    before, ids, parts = "", [], []
    for text in texts:
        together = ids_of(before + text)
        part = together[len(ids) :] if together[: len(ids)] == ids else ids_of(text)
        before, ids = before + text, ids + part
        parts.append(part)
    return parts


# --- Conversations


def from_chat(segments: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Example:
    """The sequence of the segments of a rendering, each with whether it is a completion."""

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    parts = joined([text for text, _ in segments], ids_of)
    ids = [i for part in parts for i in part]
    if tokenizer.mask_token_id in ids:
        raise ValueError(
            f"it holds the mask token {tokenizer.mask_token!r}, which would be taken for noise: remove it from the text"
        )
    return Example(
        ids, [is_completion for part, (_, is_completion) in zip(parts, segments, strict=True) for _ in part]
    )


def conversation(messages, column: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """A conversation in segments: what the assistant says, up to the end of its turns, and what lies between.

    A turn of the assistant begins where the template's prompt for it ends. It ends with the rendering or, if messages
    follow, behind the special token after its text.
    """
    messages = checked(messages, column)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadCell(column, "holds no message of the role 'assistant', so there is nothing to learn")
    text, segments, end = render(messages, column, tokenizer), [], 0
    for i in turns:
        before = render(messages[:i], column, tokenizer, add_generation_prompt=True) if i else ""
        start = len(before)
        if not text.startswith(before) or start < end:
            raise BadCell(
                column,
                f"is rendered by the chat template in such a way that message {i} cannot be told from what leads to it: give "
                "prompt and completion instead",
            )
        segments.append((text[end:start], False))
        end = len(text) if i == len(messages) - 1 else end_of_turn(text, start, messages[i], i, column, tokenizer)
        segments.append((text[start:end], True))
    return [*segments, (text[end:], False)]


def end_of_turn(text: str, start: int, message: dict, i: int, column: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the turn of a message that others follow ends in a rendering: behind the next special token."""
    said = message["content"].strip()
    place = text.find(said, start)
    if place < 0:
        raise BadCell(column, f"is rendered by the chat template without the text of message {i}")
    special = "|".join(map(re.escape, sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)))
    mark = re.compile(special).search(text, place + len(said)) if special else None
    return place + len(said) if mark is None else mark.end()


def prompted_conversation(
    prompt, completion, prompt_column: str, column: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Messages and those that answer them, in two segments. A prompt that the assistant begins is continued."""
    prompt, completion = checked(prompt, prompt_column), checked(completion, column)
    if completion[0]["role"] != "assistant":
        raise BadCell(column, f"begins with a message of the role {completion[0]['role']!r}, not 'assistant'")
    begun = prompt[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    before = render(prompt, prompt_column, tokenizer, **how)
    text = render([*prompt, *completion], column, tokenizer)
    if not text.startswith(before):
        raise BadCell(column, "is rendered by the chat template in such a way that it does not go on from its prompt")
    return [(before, False), (text[len(before) :], True)]


def checked(messages, column: str) -> list[dict]:
    """The messages of a cell, without the empty entries that tables add. Raises BadCell for anything else."""
    if not isinstance(messages, list) or not messages:
        raise BadCell(
            column, f"holds {'an empty list' if messages == [] else found(messages)}, not a list of messages"
        )
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            value = message.get(name) if isinstance(message, dict) else None
            if not isinstance(value, str):
                raise BadCell(column, f"holds {found(value)} as {name} of message {i}, not text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadCell(column, f"holds an empty message {i} of the assistant")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def render(messages: list[dict], column: str, tokenizer: PreTrainedTokenizerBase, **options) -> str:
    if tokenizer.chat_template is None:
        raise BadCell(
            column,
            f"holds messages, but the tokenizer {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template "
            "and save it again, or give texts",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # of the template: it may refuse an order of roles, by an exception of jinja's
        raise BadCell(column, f"is refused by the chat template: {' '.join(str(error).split())}") from None
