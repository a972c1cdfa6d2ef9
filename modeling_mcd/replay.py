"""A generation, step by step: as an HTML page with a slider, or as a picture that moves (SVG, GIF)."""

import io
import json
from bisect import bisect_right
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
# Of a GIF: the colours of the styles, and how many shades each has, for smooth edges.
COLOURS, SHADES = {"": "#222222", "mask": "#bbbbbb", "new": "#c2410c"}, 5
PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
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

    def save(self, path: str | Path, lines: int | None = None, frames: int | None = None) -> Path:
        """Writes the page or, if its name ends in `.svg` or `.gif`, the picture; completely or not at all. Returns its path.

        Each needs only a browser. What is new in a step stands out. A GIF is shown wherever pictures are, but with letters of
        ours (DejaVu Sans Mono), which has those of Latin, Greek and Cyrillic; an SVG with those of whoever looks at it.

        Args:
            lines: as many as the text of a picture may take at its end; what is behind is left out of every step.
            frames: at most so many steps are in a picture, at least 2, evenly spread, the last one among them.
        """
        path = Path(path)
        texts = {token: self.tokenizer.decode([token]) for token in {t for canvas in self.canvases for t in canvas}}
        texts[self.tokenizer.mask_token_id] = None
        if path.suffix in PICTURES:
            write_atomically(path, PICTURES[path.suffix](self._pages(texts, lines, frames)))
            return path
        content = [
            {"step": step, "tokens": [texts[token] for token in canvas]}
            for step, canvas in zip(self.steps, self.canvases, strict=True)
        ]
        # "<" is written as an escape: no text of a model can end the script.
        write_atomically(path, PAGE.replace("FRAMES", json.dumps(content).replace("<", "\\u003c")))
        return path

    def _pages(self, texts: dict[int, str | None], lines: int | None, frames: int | None) -> list[list]:
        """The lines of each canvas that a picture shows, see `runs_of`; special tokens but masks have no letters."""
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.mask_token_id}
        texts = {token: "" if token in special else text for token, text in texts.items()}
        end, count = self.canvases[-1], len(self.canvases)
        cut = len(end)
        if lines is not None:
            cut = bisect_right(range(1, cut + 1), lines, key=lambda n: len(runs_of(end[:n], end[:n], texts)))
        chosen = range(count)
        if frames is not None and frames < count:
            chosen = [i * (count - 1) // (frames - 1) for i in range(frames)]
        canvases = [self.canvases[i][:cut] for i in chosen]
        return [
            runs_of(now, before, texts) for now, before in zip(canvases, canvases[:1] + canvases[:-1], strict=True)
        ]


def size_of(pages: list[list], width: float = WIDTH) -> tuple[int, int]:
    """Width and height, in pixels, of a picture that shows these pages one after the other; `width` is that of a character."""
    return round((COLUMNS + 2) * width), (max(map(len, pages)) + 1) * HEIGHT


def svg_of(pages: list[list]) -> str:
    """Each page is a group that is visible in its turn."""
    end, groups = len(pages) + LINGER, []
    for number, page in enumerate(pages):
        rows = "".join(
            f'<text x="{WIDTH}" y="{HEIGHT * (row + 1.2):.0f}" xml:space="preserve">{svg_line(line)}</text>'
            for row, line in enumerate(page)
        )
        last = number == len(pages) - 1
        times = [0, number / end, 1 if last else (number + 1) / end]
        show = (
            f'<animate attributeName="visibility" calcMode="discrete" repeatCount="indefinite" dur="{end * SECONDS:.2f}s" '
            f'values="hidden;visible;hidden" keyTimes="{";".join(f"{time:.4f}" for time in times)}"/>'
        )
        # A viewer that does not animate shows the end.
        groups.append(f'<g visibility="{"visible" if last else "hidden"}">{show}{rows}</g>')
    width, height = size_of(pages)
    return PICTURE.format(frames="\n".join(groups), width=width, height=height)


def svg_line(line: list[tuple[str, str]]) -> str:
    """The runs of a line as SVG."""
    runs = ((style, escape(text)) for style, text in line)
    return "".join(f'<tspan class="{style}">{text}</tspan>' if style else text for style, text in runs)


def gif_of(pages: list[list]) -> bytes:
    """Each page is a frame; the last one stays."""
    from matplotlib import get_data_path  # here, and for its font: only those who ask for a GIF wait for the import
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), 14)
    width, palette, images = font.getlength("m"), Image.new("P", (1, 1)), []
    colours = [ImageColor.getrgb(colour) for colour in COLOURS.values()]
    palette.putpalette(
        [255 + (value - 255) * n // SHADES for colour in colours for n in range(SHADES + 1) for value in colour]
    )
    for page in pages:
        image = Image.new("RGB", size_of(pages, width), "white")
        draw = ImageDraw.Draw(image)
        for row, line in enumerate(page):
            column = 0
            for style, text in line:
                place = ((column + 1) * width, HEIGHT * (row + 1.2))
                draw.text(place, text, COLOURS[style], font, anchor="ls")
                column += len(text)
        images.append(image.quantize(palette=palette, dither=Image.Dither.NONE))
    buffer, step = io.BytesIO(), round(1000 * SECONDS)
    times = [step] * (len(images) - 1) + [step * (LINGER + 1)]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0)
    return buffer.getvalue()


PICTURES = {".svg": svg_of, ".gif": gif_of}


def runs_of(canvas: list[int], before: list[int], texts: dict[int, str | None]) -> list[list[tuple[str, str]]]:
    """The lines of a canvas; each as runs of a style ("", "mask", "new") and the letters that have it."""
    letters, lines = [], [[]]
    for token, earlier in zip(canvas, before, strict=True):
        text, style = texts[token], "new" if token != earlier else ""
        letters += [("\u2591", "mask")] if text is None else [(letter, style) for letter in text]
    for letter, style in letters:
        if letter == "\n" or len(lines[-1]) == COLUMNS:
            lines.append([])
        if letter != "\n":
            lines[-1].append((letter if letter.isprintable() else " ", style))
    return [
        [(style, "".join(letter for letter, _ in run)) for style, run in groupby(line, lambda pair: pair[1])]
        for line in lines
    ]
