"""Writes text with a model: continues a prompt, fills the holes of a text, or starts from nothing.

mcd-generate MODEL --prompt "It was a dark" --steps 16 --seed 0
mcd-generate MODEL --prompt - < prompt.txt
mcd-generate MODEL --infill "the ______ was open" --num 4 --json
mcd-generate MODEL --prompt "What is 7 times 8?" --chat --preset llada_low_confidence
"""

import argparse
import json
import secrets
import sys
import time
from itertools import groupby
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from .command_line import OneLineParser
from .prompts import encode, encode_messages, with_masks
from .replay import Replay
from .terminal import BOLD, PLAIN, Drafts, add_options, given_options, has_color, load_both


def parser() -> OneLineParser:
    result = OneLineParser(prog="mcd-generate", description=__doc__.split("\n")[0])
    result.add_argument("model", metavar="MODEL", help="Folder, file or Hub name (`name@revision`).")
    result.add_argument("--prompt", help="Text to continue; [MASK] in it is a token to fill; - reads standard input.")
    result.add_argument("--infill", metavar="TEXT", help="Text with holes: [MASK], or ___ with an underscore a token.")
    result.add_argument("--chat", action="store_true", help="The prompt is a message, put into the chat template.")
    result.add_argument(
        "--length", type=int, help="Tokens in the text, prompt included; the model's context by default."
    )
    result.add_argument(
        "--num", "--num_return_sequences", type=int, dest="num_return_sequences", help="Texts to write; 1 by default."
    )
    add_options(result)
    result.add_argument("--stream", action="store_true", help="Fail where there is no terminal to show drafts on.")
    result.add_argument("--json", action="store_true", help="Write a line of JSON for each text, with its cost.")
    result.add_argument(
        "--replay",
        metavar="PAGE",
        help="Write the first text, step by step, as this HTML page, or picture (.svg, .gif).",
    )
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(options: argparse.Namespace):
    if options.stream and not sys.stderr.isatty():
        raise ValueError("--stream needs a terminal on standard error, and there is none")
    if options.replay is not None and (Path(options.replay).is_dir() or not Path(options.replay).parent.is_dir()):
        raise ValueError(f"--replay {options.replay!r} must name a file in a folder that is there")
    given = given_options(options, "length", "num_return_sequences")
    for other in ("prompt", "chat"):
        if options.infill is not None and getattr(options, other):
            raise ValueError(f"--infill and --{other} do not go together: give one of them")
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt or ""
    if options.chat and not prompt:
        raise ValueError("--chat needs a --prompt: the message to answer")
    model, tokenizer = load_both(options.model, options.tokenizer, options.device)
    if options.infill is not None:
        prompt = with_masks(options.infill, tokenizer)
    if options.chat:
        ids = encode_messages([{"role": "user", "content": prompt}], tokenizer, model)
    else:
        ids = encode(prompt, tokenizer, model)
    replay = Replay(tokenizer)
    drafts = Drafts(tokenizer, model.config.mask_token_id, sys.stderr, has_color(sys.stderr))
    streams = options.stream or (sys.stderr.isatty() and not options.quiet)

    def watch(step: int, canvas: torch.LongTensor):
        if options.replay is not None:
            replay(step, canvas)
        if streams:
            drafts.show(canvas[0])

    seed = secrets.randbits(32) if options.seed is None else options.seed
    start = time.perf_counter()
    output = model.generate(ids, seed=seed, callback=watch, return_dict_in_generate=True, **given)
    seconds = time.perf_counter() - start
    drafts.clear()
    for number, (sequence, nfe) in enumerate(zip(output.sequences, output.nfe.tolist(), strict=True), start=1):
        if options.chat:
            text = tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True)
        elif options.json:
            text = tokenizer.decode(sequence, skip_special_tokens=True)
        else:
            text = readable(sequence, ids, tokenizer, highlight=has_color(sys.stdout))
        if options.json:
            row = {"text": text, "prompt": prompt, "number": number, "seed": seed, "nfe": nfe}
            print(json.dumps(row | {"tokens": len(sequence), "seconds": round(seconds, 3)}, ensure_ascii=False))
        else:
            print(f"--- {number} of {len(output.sequences)}\n" * (len(output.sequences) > 1) + text)
    if options.replay is not None:
        print(f"replay: {replay.save(options.replay)}", file=sys.stderr)


def readable(
    sequence: torch.LongTensor, ids: torch.LongTensor | None, tokenizer: PreTrainedTokenizerBase, highlight: bool
) -> str:
    """The text without special tokens; with `highlight`, what was given in bold."""
    text = tokenizer.decode(sequence, skip_special_tokens=True)
    if ids is None or not highlight:
        return text
    given = [token != tokenizer.mask_token_id for token in ids[0].tolist()]
    given += [False] * (len(sequence) - len(given))
    runs = [
        (is_given, tokenizer.decode([token for _, token in run], skip_special_tokens=True))
        for is_given, run in groupby(zip(given, sequence.tolist(), strict=True), key=lambda pair: pair[0])
    ]
    if "".join(part for _, part in runs) != text:  # a tokenizer that decodes parts in another way than the text
        return text
    return "".join(f"{BOLD}{part}{PLAIN}" if is_given and part else part for is_given, part in runs)


if __name__ == "__main__":
    main()
