"""What the demo shows, without any web framework: two models write one text from one seed, and every step is kept.

A text is shown as HTML in which all that a model or a visitor wrote is escaped.
"""

import html
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.diversity import unigram_entropy
from evaluation.generative_perplexity import generative_perplexity
from evaluation.judge import load_judge
from modeling_mcd.command_line import line_of
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer
from modeling_mcd.locking_mdlm import LOCKINGS
from modeling_mcd.prompts import HOLE, encode, with_masks
from modeling_mcd.sampling_mdlm import SAMPLERS, options_of


STEPPED = tuple(name for name, sampler in SAMPLERS["absorbing"].items() if "steps" in options_of(sampler))
LONGEST_PROMPT = 400  # characters
LIMITS = {"steps": (1, 128), "temperature": (0.0, 2.0), "length": (8, 256), "seed": (0, 2**32 - 1)}
BLANK, SPECIAL = "\u2591", "\u00b7"
CSS = """
.canvas { font: 15px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 9em;
  padding: .8em; border: 1px solid #8884; border-radius: 6px; color: #111; background: #fff; }
.canvas .mask { color: #aaa; } .canvas .given { font-weight: 700; } .canvas .new { outline: 2px solid #c2410c; }
.facts { font: 14px/1.5 system-ui, sans-serif; } .trouble { color: #b91c1c; font: 15px/1.5 system-ui, sans-serif; }
"""


def takes_locking(sampler: str) -> bool:
    """Whether a sampler's plan is drawn from locked noise; other samplers choose by themselves what to reveal."""
    return "locking" in options_of(SAMPLERS["absorbing"][sampler])


@dataclass(frozen=True)
class Settings:
    """What a visitor asks for. Nothing of it is trusted: it may come from anywhere.

    Args:
        prompt: text to continue or, where it holds `[MASK]` or `___`, to fill.
        steps, sampler, locking, temperature, seed: see `generate`.
        length: tokens of a text that continues a prompt.

    Raises:
        ValueError: names the setting, its value and what is allowed.
    """

    prompt: str = ""
    steps: int = 16
    sampler: str = "ancestral"
    locking: str = "independent"
    temperature: float = 1.0
    length: int = 128
    seed: int = 0

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise ValueError("the prompt must be text")
        if len(self.prompt) > LONGEST_PROMPT:
            raise ValueError(f"the prompt has {len(self.prompt)} characters, but at most {LONGEST_PROMPT} are taken")
        for name, choices in (("sampler", STEPPED), ("locking", LOCKINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and least <= value <= most and (name == "temperature" or value == int(value))):
                kind = "a number" if name == "temperature" else "an integer"
                raise ValueError(f"{name} must be {kind} from {least} to {most}")
            if name != "temperature":
                object.__setattr__(self, name, int(value))  # a slider sends 16.0

    def options(self) -> dict:
        """The keyword arguments of `generate`."""
        options = {name: getattr(self, name) for name in ("steps", "sampler", "temperature", "seed")}
        # Said even where it is the default: a model may have its own.
        if takes_locking(self.sampler) or self.locking != LOCKINGS[0]:
            options["locking"] = self.locking
        return options


@dataclass(frozen=True)
class Writer:
    """A model by the name that a visitor sees."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def canvas(self, settings: Settings) -> tuple[torch.LongTensor | None, dict]:
        """`input_ids`, and the length that goes with them."""
        context = self.model.config.max_position_embeddings
        if HOLE.search(settings.prompt):
            ids, length = encode(with_masks(settings.prompt, self.tokenizer), self.tokenizer, self.model), {}
        else:
            ids = encode(settings.prompt, self.tokenizer, self.model)
            length = {"length": min(settings.length, context)}
        width, room = (0 if ids is None else ids.shape[1]), length.get("length", context + 1)
        if width >= room:
            raise ValueError(f"the prompt takes {width} tokens of {self.name}, which must be fewer than {room}")
        return ids, length


@dataclass
class Writing:
    """What one model wrote, step by step.

    Args:
        name: of the model.
        frames: the tokens [L] after each step; the first frame is the canvas at the start.
        given: [L], the tokens that were there from the start.
        nfe: forwards of the network.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    frames: list[list[int]] = field(default_factory=list)
    given: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    nfe: int | None = None
    figure: str = ""

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.frames[-1], skip_special_tokens=True)

    def html(self, number: int | None = None) -> str:
        """The canvas after so many steps, the last by default: each token in the colour of the step that wrote it."""
        if not self.frames:
            return '<div class="canvas"></div>'
        last = len(self.frames) - 1
        number = last if number is None else max(0, min(int(number), last))
        special = set(self.tokenizer.all_special_ids)
        return f'<div class="canvas">{"".join(self._parts(number, max(last, 1), special))}</div>'

    def _parts(self, number: int, steps: int, special: set[int]) -> Iterator[str]:
        for i, token in enumerate(self.frames[number]):
            if token == self.tokenizer.mask_token_id:
                yield f'<span class="mask">{BLANK}</span>'
                continue
            text = SPECIAL if token in special else html.escape(self.tokenizer.decode([token]))
            if self.given[i]:
                yield f'<span class="given">{text}</span>'
                continue
            step = number
            while step > 0 and self.frames[step - 1][i] == token:
                step -= 1
            new = ' class="new"' if step == number else ""
            yield f'<span{new} title="step {step}" style="background:hsl({210 - 180 * step / steps:.0f} 80% 88%)">{text}</span>'

    def facts(self) -> str:
        if self.nfe is None:
            return '<div class="facts">&nbsp;</div>'
        line = f"{self.nfe} forwards, {self.seconds:.2f} s{', ' if self.figure else ''}{self.figure}"
        return f'<div class="facts">{html.escape(line)}</div>'


@dataclass(frozen=True)
class Judge:
    """A causal language model that reads what was written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def figure(self, text: str) -> str:
        """Gen-PPL and, since it falls with diversity, the entropy beside it; of one text, so no more than an impression."""
        try:
            perplexity = generative_perplexity([text], self.model, self.tokenizer).perplexity
        except ValueError:
            return "too short to judge"
        return f"Gen-PPL {perplexity:.1f} (trigram entropy {unigram_entropy([text], 'trigrams'):.2f})"


class Left(Exception):
    """The visitor no longer looks."""


def write(writer: Writer, settings: Settings, judge: Judge | None = None) -> Iterator[Writing]:
    """Yields the writing after each step, always the same object, and once more when it is judged.

    Raises:
        ValueError: what `generate` refuses.
    """
    ids, length = writer.canvas(settings)
    writing, events, gone = Writing(writer.name, writer.tokenizer), queue.Queue(), threading.Event()

    def watch(step: int, canvas: torch.LongTensor):
        if gone.is_set():
            raise Left
        events.put(canvas[0].tolist())

    def run():
        start = time.perf_counter()
        try:
            output = writer.model.generate(
                ids, callback=watch, return_dict_in_generate=True, **settings.options(), **length
            )
            writing.seconds = time.perf_counter() - start
            events.put(int(output.nfe[0]))
        except Left:
            pass
        except Exception as error:
            events.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, int):
                break
            if not writing.frames:
                begun = [] if ids is None else ids[0].tolist()
                mask = writer.tokenizer.mask_token_id
                writing.frames.append(begun + [mask] * (len(event) - len(begun)))
                writing.given = [token != mask for token in writing.frames[0]]
            writing.frames.append(event)
            yield writing
    finally:
        gone.set()
    writing.nfe = event
    if judge is not None:
        writing.figure = judge.figure(writing.text)
    yield writing


def compare(writers: Sequence[Writer], settings: Settings, judge: Judge | None = None) -> Iterator[list[Writing]]:
    """The writings of some models from one seed, one model after the other, after each step."""
    for writer in writers:
        writer.canvas(settings)  # refused before anything is written
    done = [Writing(writer.name, writer.tokenizer) for writer in writers]
    for i, writer in enumerate(writers):
        for writing in write(writer, settings, judge):
            done[i] = writing
            yield done


def trouble(error: Exception) -> str:
    """What a visitor reads about an error: a line about a mistake of theirs, and nothing of this machine otherwise."""
    line = (
        str(error) if isinstance(error, ValueError) and line_of(error) else "This did not work, by no fault of yours."
    )
    return f'<div class="trouble">{html.escape(" ".join(line.split()))}</div>'


def load_writer(name: str, source: str) -> Writer:
    tokenizer, model = load_tokenizer(source), load_model(source).eval()
    check_tokens(tokenizer, model.config)
    if model.config.mask_token_id is None:
        raise ValueError(f"{name} ({source}) is a uniform-state model: the demo shows those with a [MASK]")
    return Writer(name, model, tokenizer)


def load_judge_of(source: str) -> Judge:
    return Judge(*load_judge(source))
