"""Own sampler: a function that does one step and yields. Its keyword arguments are its options of `generate`.

python examples/own_sampler.py [MODEL]
"""

import sys
from collections.abc import Iterator

import torch

from modeling_mcd.canvas_mdlm import Canvas
from modeling_mcd.loading import load_model, load_tokenizer
from modeling_mcd.sampling_mdlm import SAMPLERS, rank


def left_to_right(canvas: Canvas, *, steps: int) -> Iterator[None]:
    """Reveals the masks from left to right, as many in each of `steps` steps: what an autoregressive model would do."""
    place = torch.arange(canvas.masked.shape[1]).expand_as(canvas.masked).double()
    order, total = rank(place, canvas.masked), canvas.masked.sum(dim=1, keepdim=True)
    for step in range(steps):
        canvas.reveal(canvas.masked & (order < (total * (step + 1) / steps).round()), 1 - step / steps)
        yield


def main(source: str = "recipes/tiny/teacher") -> torch.Tensor:
    SAMPLERS["absorbing"]["left_to_right"] = left_to_right
    model, tokenizer = load_model(source), load_tokenizer(source)
    options = {"steps": 8, "seed": 0, "return_dict_in_generate": True, "output_reveal_steps": True}
    for sampler in ("ancestral", "left_to_right"):
        output = model.generate(sampler=sampler, **options)
        print(f"{sampler}: {tokenizer.decode(output.sequences[0], skip_special_tokens=True)}")
    return output.reveal_steps[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
