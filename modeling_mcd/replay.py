"""A generation as one HTML page: every canvas, step by step, with a slider."""

import json
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
        """Writes the page, completely or not at all, and returns its path. It needs only a browser."""
        texts = {token: self.tokenizer.decode([token]) for token in {t for canvas in self.canvases for t in canvas}}
        texts[self.tokenizer.mask_token_id] = None
        frames = [
            {"step": step, "tokens": [texts[token] for token in canvas]}
            for step, canvas in zip(self.steps, self.canvases, strict=True)
        ]
        path = Path(path)
        # "<" is written as an escape: no text of a model can end the script.
        write_atomically(path, PAGE.replace("FRAMES", json.dumps(frames).replace("<", "\\u003c")))
        return path
