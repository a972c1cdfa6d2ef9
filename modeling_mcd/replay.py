"""A generation, step by step: as an HTML page with a slider, or as a picture that moves (SVG)."""

import json
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

import torch

from .files import write_atomically


PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Replay</title>
<style>
  body { font: 16px/1.6 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; }
  #text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 12em; }
  .mask { color: #bbb; } .new { background: #ffe08a; }
  input { width: 100%; }
</style>
<p><button id="play">play</button> <span id="label"></span></p>
<input id="slider" type="range" min="0" value="0">
<p id="text"></p>
<script>
const frames = FRAMES;
const slider = document.getElementById("slider"), text = document.getElementById("text");
slider.max = frames.length - 1;
function show() {
  const now = frames[slider.value], before = slider.value > 0 ? frames[slider.value - 1].tokens : [];
  text.replaceChildren(...now.tokens.map((token, i) => {
    const part = document.createElement("span");
    part.textContent = token === null ? "\\u2591" : token;
    part.className = token === null ? "mask" : token !== before[i] ? "new" : "";
    return part;
  }));
  document.getElementById("label").textContent = "after step " + now.step;
}
slider.oninput = show;
let timer = null;
document.getElementById("play").onclick = () => {
  clearInterval(timer);
  slider.value = 0; show();
  timer = setInterval(() => {
    if (+slider.value === +slider.max) { clearInterval(timer); return; }
    slider.value = +slider.value + 1; show();
  }, Math.max(40, 4000 / frames.length));
};
show();
</script>
"""
# Of the picture: characters in a line; the size of one, in pixels; seconds of a step, and steps for which the end is shown.
COLUMNS, WIDTH, HEIGHT = 72, 8.4, 20
SECONDS, LINGER = 0.35, 8
PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}">
<style>text {{ font: 14px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #222; }}
.mask {{ fill: #bbb; }} .new {{ fill: #c2410c; font-weight: bold; }}</style>
<rect width="100%" height="100%" fill="#fff"/>
{frames}
</svg>
"""


class Replay:
    """Records every canvas of one row: give it to `generate` as `callback`, and `save` the page.

    Args:
        tokenizer: turns ids into text, one token at a time, and knows the mask's id.
        row: the number of the row in the batch.
    """

    def __init__(self, tokenizer, row: int = 0):
        self.tokenizer, self.row = tokenizer, row
        self.steps: list[int] = []
        self.canvases: list[list[int]] = []

    def __call__(self, step: int, canvas: torch.LongTensor):
        self.steps.append(step)
        self.canvases.append(canvas[self.row].tolist())

    def save(self, path: str | Path) -> Path:
        """Writes the page or, if its name ends in `.svg`, the picture; completely or not at all. Returns its path.

        Either needs only a browser. What is new in a step stands out.
        """
        texts = {token: self.tokenizer.decode([token]) for token in {t for canvas in self.canvases for t in canvas}}
        texts[self.tokenizer.mask_token_id] = None
        if Path(path).suffix == ".svg":
            write_atomically(Path(path), self._picture(texts))
            return Path(path)
        frames = [
            {"step": step, "tokens": [texts[token] for token in canvas]}
            for step, canvas in zip(self.steps, self.canvases, strict=True)
        ]
        path = Path(path)
        # "<" is written as an escape: no text of a model can end the script.
        write_atomically(path, PAGE.replace("FRAMES", json.dumps(frames).replace("<", "\\u003c")))
        return path

    def _picture(self, texts: dict[int, str | None]) -> str:
        """Each canvas is a group that is visible in its turn."""
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.mask_token_id}
        texts = {token: "" if token in special else text for token, text in texts.items()}
        end = len(self.canvases) + LINGER
        groups, most = [], 1
        for number, canvas in enumerate(self.canvases):
            lines = list(lines_of(canvas, self.canvases[number - 1] if number else canvas, texts))
            most = max(most, len(lines))
            rows = "".join(
                f'<text x="{WIDTH}" y="{HEIGHT * (row + 1.2):.0f}" xml:space="preserve">{line}</text>'
                for row, line in enumerate(lines)
            )
            last = number == len(self.canvases) - 1
            times = [0, number / end, 1 if last else (number + 1) / end]
            show = (
                f'<animate attributeName="visibility" calcMode="discrete" repeatCount="indefinite" dur="{end * SECONDS:.2f}s" '
                f'values="hidden;visible;hidden" keyTimes="{";".join(f"{time:.4f}" for time in times)}"/>'
            )
            # A viewer that does not animate shows the end.
            groups.append(f'<g visibility="{"visible" if last else "hidden"}">{show}{rows}</g>')
        size = {"width": (COLUMNS + 2) * WIDTH, "height": (most + 1) * HEIGHT}
        return PICTURE.format(frames="\n".join(groups), **size)


def lines_of(canvas: list[int], before: list[int], texts: dict[int, str | None]) -> Iterator[str]:
    """The lines of a canvas as SVG: the letters of a style together."""
    letters, lines = [], [[]]
    for token, earlier in zip(canvas, before, strict=True):
        text, style = texts[token], "new" if token != earlier else ""
        letters += [("\u2591", "mask")] if text is None else [(letter, style) for letter in text]
    for letter, style in letters:
        if letter == "\n" or len(lines[-1]) == COLUMNS:
            lines.append([])
        if letter != "\n":
            lines[-1].append((letter if letter.isprintable() else " ", style))
    for line in lines:
        runs = [(style, escape("".join(letter for letter, _ in run))) for style, run in groupby(line, lambda x: x[1])]
        yield "".join(f'<tspan class="{style}">{text}</tspan>' if style else text for style, text in runs)
