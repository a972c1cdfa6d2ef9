"""What `mcd-generate` and `mcd-chat` share: options of a sampler, a model with its tokenizer, drafts on a terminal."""

import argparse
import os
import shutil
from collections.abc import Iterator
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase

from .generation_config_mdlm import CHOICES, PRESETS, MDLMGenerationConfig, preset_options
from .loading import check_tokens, load_model, load_tokenizer
from .modeling_mdlm import MDLMForMaskedDiffusion


# Handed to `generate` as they are; None is left to the model's own generation configuration.
OPTIONS = {
    "steps": (int, "Denoising steps; 64 by default."),
    "max_new_tokens": (int, "Tokens to write after the prompt."),
    "block_length": (int, "Write in blocks of this many tokens, from left to right; goes beyond the model's context."),
    "temperature": (float, "Divides the logits; 0 takes the likeliest token, 1 is the default."),
    "top_k": (int, "Draw among this many likeliest tokens."),
    "top_p": (float, "Draw among the likeliest tokens that together have this probability."),
    "threshold": (float, "Of the sampler adaptive: reveal every token that is at least this certain."),
    "max_steps": (int, "Of the sampler adaptive: reveal all that is left in this step of a block."),
    "eos_after": (float, "Draw no end of sequence in this first share of the text to write, in [0, 1)."),
    "suppress_above": (int, "Draw no token from this id on: those of a vocabulary larger than its tokenizer."),
}
NAMES = (*OPTIONS, "sampler", "locking", "cache", "coupling")
BLANK = "\u2591"  # shows a masked token
BOLD, DIM, GREEN, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[0m"


def add_options(parser: argparse.ArgumentParser):
    """The options of both commands."""
    for name, (kind, words) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=words)
    parser.add_argument("--sampler", choices=CHOICES["sampler"], help="See docs/generation.md; ancestral by default.")
    parser.add_argument(
        "--locking", choices=CHOICES["locking"], help="See docs/locking.md; spread is better at few steps."
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="Published settings, see docs/backbones.md; other options win."
    )
    parser.add_argument("--cache", choices=CHOICES["cache"], help="Keys and values to keep, see docs/blocks.md.")
    chain = parser.add_mutually_exclusive_group()
    chain.add_argument(
        "--coupling",
        action="store_true",
        default=None,
        help="Draw a step's tokens jointly, see docs/coupling.md; the default of a model with a coupling.",
    )
    chain.add_argument(
        "--no_coupling",
        action="store_false",
        dest="coupling",
        default=None,
        help="Draw them independently of each other.",
    )
    parser.add_argument("--stop_at_eos", action="store_true", help="End a text after the block that ends it.")
    parser.add_argument("--seed", type=int, help="Fixes the text; random by default.")
    parser.add_argument("--tokenizer", help="Folder or Hub name, for a model that comes without one.")
    parser.add_argument("--device", help="Such as cpu or cuda; an accelerator by default, where there is one.")
    parser.add_argument("--quiet", action="store_true", help="Show no drafts while the text fills.")


def given_options(options: argparse.Namespace, *names: str) -> dict:
    """The options for `generate` of a command line, checked before anything is loaded; a preset has its settings under them.

    Args:
        names: options beside those of `add_options`.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    given = {name: getattr(options, name) for name in (*NAMES, *names)}
    given["stop_at_eos"] = options.stop_at_eos or None
    if options.preset is not None:
        given = preset_options(options.preset, given)
    MDLMGenerationConfig(**given)
    return given


def load_both(
    source: str, tokenizer_source: str | None, device: str | None
) -> tuple[MDLMForMaskedDiffusion, PreTrainedTokenizerBase]:
    """The model, in eval mode and on its device, and a tokenizer that fits it."""
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # an unknown name; one that this torch was built without
        raise ValueError(f"--device {device!r}: {str(error).splitlines()[0]}") from None
    if tokenizer_source is None and os.path.isfile(source):
        raise ValueError(f"model {source!r} is a file, which holds no tokenizer: give --tokenizer")
    tokenizer = load_tokenizer(source if tokenizer_source is None else tokenizer_source)
    model = load_model(source)
    check_tokens(tokenizer, model.config)
    return model.eval().to(device), tokenizer


def has_color(out: TextIO) -> bool:
    """Whether `out` is a terminal that may be written to in colours (https://no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Drafts:
    """Shows a canvas on a terminal; each draft replaces the one before.

    Args:
        tokenizer: turns ids into text.
        mask_token_id: shown as `BLANK`.
        out: the terminal.
        color: show what is new in green and masks dimly.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None, out: TextIO, color: bool = False
    ):
        self.tokenizer, self.mask_token_id, self.out, self.color = tokenizer, mask_token_id, out, color
        self.lines, self.before = 0, []

    def show(self, row: torch.LongTensor):
        columns, height = shutil.get_terminal_size()
        lines = [[]]
        for text, style in self.parts_of(row.tolist()):
            for letter in text:
                if letter == "\n" or len(lines[-1]) == columns:
                    lines.append([])
                if letter != "\n":
                    lines[-1].append((letter, style))
        lines = lines[1 - height :]  # a longer canvas shows its end
        self.clear()
        self.out.write("".join(self.painted(line) + "\n" for line in lines))
        self.out.flush()
        self.lines = len(lines)

    def clear(self):
        if self.lines:
            self.out.write(f"\033[{self.lines}F\033[J")
            self.out.flush()
            self.lines = 0

    def parts_of(self, ids: list[int]) -> Iterator[tuple[str, str]]:
        """Yields texts with their styles. A run of one style is decoded at once: tokens may share a character."""
        old = self.before if len(self.before) == len(ids) else ids
        self.before, run, style = ids, [], ""
        for token, earlier in zip([*ids, None], [*old, None], strict=True):
            now = DIM if token == self.mask_token_id else GREEN if self.color and token != earlier else ""
            if run and (now != style or token is None):
                masked = style == DIM
                yield BLANK * len(run) if masked else self.tokenizer.decode(run, skip_special_tokens=True), style
                run = []
            run, style = [*run, token], now

    def painted(self, line: list[tuple[str, str]]) -> str:
        if not self.color:
            return "".join(letter for letter, _ in line)
        parts, style = [], ""
        for letter, now in [*line, ("", "")]:
            parts.append((PLAIN * bool(style) + now if now != style else "") + letter)
            style = now
        return "".join(parts)
