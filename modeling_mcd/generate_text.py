"""Writes text with a model: continues a prompt, fills its [MASK] tokens, or starts from nothing.

mcd-generate MODEL --prompt "It was a dark" --steps 16 --seed 0
mcd-generate MODEL --prompt - < prompt.txt
mcd-generate MODEL --prompt "What is 7 times 8?" --chat --preset llada_low_confidence
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase

from .command_line import OneLineParser
from .generation_config_mdlm import CHOICES, PRESETS, MDLMGenerationConfig, preset_options
from .loading import check_tokens, load_model, load_tokenizer
from .modeling_mdlm import MDLMForMaskedDiffusion
from .replay import Replay


# Handed to `generate` as they are; None is left to the model's own generation configuration.
OPTIONS = {
    "steps": (int, "Denoising steps; 64 by default."),
    "length": (int, "Tokens in the text, prompt included; the model's context by default."),
    "max_new_tokens": (int, "Tokens after the prompt, instead of --length."),
    "block_length": (int, "Write in blocks of this many tokens, from left to right; goes beyond the model's context."),
    "temperature": (float, "Divides the logits; 0 takes the likeliest token, 1 is the default."),
    "top_k": (int, "Draw among this many likeliest tokens."),
    "top_p": (float, "Draw among the likeliest tokens that together have this probability."),
    "threshold": (float, "Of the sampler adaptive: reveal every token that is at least this certain."),
    "max_steps": (int, "Of the sampler adaptive: reveal all that is left in this step of a block."),
    "eos_after": (float, "Draw no end of sequence in this first share of the text to write, in [0, 1)."),
    "suppress_above": (int, "Draw no token from this id on: those of a vocabulary larger than its tokenizer."),
    "num_return_sequences": (int, "Texts to write; 1 by default."),
}
BLANK = "\u2591"  # shows a masked token


def parser() -> OneLineParser:
    result = OneLineParser(prog="mcd-generate", description=__doc__.split("\n")[0])
    result.add_argument("model", metavar="MODEL", help="Folder, file or Hub name (`name@revision`).")
    result.add_argument("--prompt", help="Text to continue; [MASK] in it is a token to fill; - reads standard input.")
    for name, (kind, words) in OPTIONS.items():
        result.add_argument(f"--{name}", type=kind, help=words)
    result.add_argument("--sampler", choices=CHOICES["sampler"], help="See docs/generation.md; ancestral by default.")
    result.add_argument(
        "--locking", choices=CHOICES["locking"], help="See docs/locking.md; spread is better at few steps."
    )
    result.add_argument(
        "--preset", choices=PRESETS, help="Published settings, see docs/backbones.md; other options win."
    )
    result.add_argument("--cache", choices=CHOICES["cache"], help="Keys and values to keep, see docs/blocks.md.")
    result.add_argument("--chat", action="store_true", help="The prompt is a message, put into the chat template.")
    result.add_argument("--stop_at_eos", action="store_true", help="End a text after the block that ends it.")
    result.add_argument("--seed", type=int, help="Fixes the text; random by default.")
    result.add_argument("--tokenizer", help="Folder or Hub name, for a model that comes without one.")
    result.add_argument("--device", help="Such as cpu or cuda; an accelerator by default, where there is one.")
    result.add_argument("--stream", action="store_true", help="Show the text as it fills, on standard error.")
    result.add_argument("--replay", metavar="PAGE", help="Write the first text, step by step, as this HTML page.")
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(options: argparse.Namespace):
    if options.stream and not sys.stderr.isatty():
        raise ValueError("--stream needs a terminal on standard error, and there is none")
    if options.replay is not None and (Path(options.replay).is_dir() or not Path(options.replay).parent.is_dir()):
        raise ValueError(f"--replay {options.replay!r} must name a file in a folder that is there")
    given = {name: getattr(options, name) for name in (*OPTIONS, "sampler", "locking", "cache")}
    given["stop_at_eos"] = options.stop_at_eos or None
    if options.preset is not None:
        given = preset_options(options.preset, given)
    MDLMGenerationConfig(**given)  # refuses what is wrong before anything is loaded
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
    if options.chat and not prompt:
        raise ValueError("--chat needs a --prompt: the message to answer")
    model, tokenizer = load_both(options.model, options.tokenizer, options.device)
    ids = (encode_message if options.chat else encode)(prompt, tokenizer, model)
    replay, drafts = Replay(tokenizer), Drafts(tokenizer, model.config.mask_token_id, sys.stderr)

    def watch(step: int, canvas: torch.LongTensor):
        if options.replay is not None:
            replay(step, canvas)
        if options.stream:
            drafts.show(canvas[0])

    sequences = model.generate(ids, seed=options.seed, callback=watch, return_dict_in_generate=False, **given)
    drafts.clear()
    for number, sequence in enumerate(sequences, start=1):
        if len(sequences) > 1:
            print(f"--- {number} of {len(sequences)}")
        if options.chat:
            print(tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True))
        else:
            print(readable(sequence, ids, tokenizer, highlight=sys.stdout.isatty()))
    if options.replay is not None:
        print(f"replay: {replay.save(options.replay)}", file=sys.stderr)


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


def encode(prompt: str, tokenizer: PreTrainedTokenizerBase, model: MDLMForMaskedDiffusion) -> torch.LongTensor | None:
    """The prompt's ids [1, width], after the token with which texts begin in training; None for an empty prompt."""
    if not prompt:
        return None
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    starts = (model.config.bos_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    return torch.tensor([([] if start is None else [start]) + ids], device=model.device)


def encode_message(prompt: str, tokenizer: PreTrainedTokenizerBase, model: MDLMForMaskedDiffusion) -> torch.LongTensor:
    """The ids [1, width] of a message of the user, and of what the tokenizer's chat template puts before its answer."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "--chat: the tokenizer has no chat template; leave --chat out, and write the prompt as it should be"
        )
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([ids], device=model.device)


def readable(
    sequence: torch.LongTensor, ids: torch.LongTensor | None, tokenizer: PreTrainedTokenizerBase, highlight: bool
) -> str:
    """The text without special tokens; with `highlight`, the prompt in bold."""
    text = tokenizer.decode(sequence, skip_special_tokens=True)
    if ids is None or not highlight:
        return text
    prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
    return f"\033[1m{prompt}\033[0m{text.removeprefix(prompt)}" if text.startswith(prompt) else text


class Drafts:
    """Shows a canvas on a terminal; each draft replaces the one before.

    Args:
        tokenizer: turns ids into text.
        mask_token_id: shown as `BLANK`.
        out: the terminal.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None, out: TextIO):
        self.tokenizer, self.mask_token_id, self.out = tokenizer, mask_token_id, out
        self.lines = 0

    def show(self, row: torch.LongTensor):
        columns, height = shutil.get_terminal_size()
        text = "".join(self.text_of(row.tolist()))
        lines = [
            line[start : start + columns]
            for line in text.split("\n")
            for start in range(0, max(1, len(line)), columns)
        ][1 - height :]  # a longer canvas shows its end
        self.clear()
        self.out.write("\n".join(lines) + "\n")
        self.out.flush()
        self.lines = len(lines)

    def clear(self):
        if self.lines:
            self.out.write(f"\033[{self.lines}F\033[J")
            self.out.flush()
            self.lines = 0

    def text_of(self, ids: list[int]):
        """Yields the text between masks and a blank for each mask. A run is decoded at once: tokens may share a character."""
        run = []
        for token in [*ids, None]:
            if token is not None and token != self.mask_token_id:
                run.append(token)
                continue
            yield self.tokenizer.decode(run, skip_special_tokens=True)
            run = []
            if token is not None:
                yield BLANK


if __name__ == "__main__":
    main()
