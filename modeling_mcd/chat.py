"""Talks with an instruction model, turn by turn, through its chat template.

mcd-chat MODEL --steps 64 --max_new_tokens 128
printf 'What is 7 times 8?\\n' | mcd-chat MODEL --preset llada_low_confidence

Each line of standard input is a message. `/reset` begins a new conversation; `/exit` or the end of the input ends it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .command_line import OneLineParser, line_of
from .modeling_mdlm import MDLMForMaskedDiffusion
from .prompts import encode_messages, up_to_special
from .terminal import Drafts, add_options, given_options, has_color, load_both


LONGEST = 128  # tokens of an answer, where neither the call nor the model says


def parser() -> OneLineParser:
    result = OneLineParser(prog="mcd-chat", description=__doc__.split("\n")[0])
    result.add_argument("model", metavar="MODEL", help="Folder, file or Hub name (`name@revision`).")
    result.add_argument("--system", help="A message of the system that comes first.")
    result.add_argument("--chat_template", metavar="FILE", help="Template in Jinja, instead of the tokenizer's.")
    add_options(result)
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


class Conversation:
    """What was said so far, and the model that answers.

    Args:
        model, tokenizer: an instruction model; the tokenizer has its chat template.
        given: options of `generate`.
        seed: of the first answer; each answer has the next one. None: random.
        system: a first message of the system.
    """

    def __init__(
        self,
        model: MDLMForMaskedDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        given: dict,
        seed: int | None = None,
        system: str | None = None,
    ):
        self.model, self.tokenizer, self.given, self.seed = model, tokenizer, given, seed
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self):
        self.messages, self.turns = list(self.system), 0

    def ask(self, message: str, watch: Callable[[torch.LongTensor], None] | None = None) -> str:
        """The answer to a message of the user. Both join the conversation, unless an error is raised.

        Args:
            watch: called with the answer's tokens [n] after each step.

        Raises:
            ValueError: the conversation no longer fits into the model's context, or an option is refused.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        ids = encode_messages(messages, self.tokenizer, self.model)
        width = ids.shape[1]
        output = self.model.generate(
            ids,
            seed=None if self.seed is None else self.seed + self.turns,
            callback=None if watch is None else lambda step, canvas: watch(canvas[0, width:]),
            return_dict_in_generate=False,
            **self.given | self.length(width),
        )
        answer = self.tokenizer.decode(up_to_special(output[0, width:].tolist(), self.tokenizer)).strip()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.turns += 1
        return answer

    def length(self, width: int) -> dict[str, int]:
        """The most tokens of an answer to so many."""
        own, context = self.model.generation_config, self.model.config.max_position_embeddings
        asked = self.given.get("max_new_tokens") or own.max_new_tokens
        beyond = (self.given.get("block_length") or own.block_length) and not getattr(
            self.model.config, "block_size", None
        )
        room = context - width
        if not beyond and room < (asked or 1):
            raise ValueError(
                f"the conversation takes {width} tokens, and {asked or 1} more do not fit into the context of {context}: "
                "/reset begins a new one"
            )
        return {"max_new_tokens": asked or (LONGEST if beyond else min(LONGEST, room))}


def run(options: argparse.Namespace):
    given = given_options(options)
    model, tokenizer = load_both(options.model, options.tokenizer, options.device)
    if options.chat_template is not None:
        tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
    talk = Conversation(model, tokenizer, given, options.seed, options.system)
    encode_messages([*talk.messages, {"role": "user", "content": "a"}], tokenizer, model)  # refuses a missing template
    drafts = Drafts(tokenizer, model.config.mask_token_id, sys.stderr, has_color(sys.stderr))
    shows = sys.stderr.isatty() and not options.quiet
    for message in messages():
        if message == "/reset":
            talk.reset()
            continue
        try:
            answer = talk.ask(message, drafts.show if shows else None)
        except Exception as error:
            drafts.clear()
            if not sys.stdin.isatty() or line_of(error) is None:
                raise
            print(f"mcd-chat: {line_of(error)}", file=sys.stderr)
            continue
        drafts.clear()
        print(answer, flush=True)


def messages() -> Iterator[str]:
    """The lines of standard input up to `/exit`, blank ones left out; asks for each on a terminal."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/exit":
            return
        if line:
            yield line


if __name__ == "__main__":
    main()
