"""A denoiser given by a table, for exact laws: three tokens and a mask (id 3) at three positions, 64 canvases."""

import itertools

import torch

from modeling_mcd.canvas_mdlm import Canvas, Denoiser
from modeling_mcd.forward_process_mdlm import AbsorbingProcess
from modeling_mcd.noise_mdlm import RowNoise, row_keys
from modeling_mcd.noise_schedule_mdlm import LogLinearSchedule


MASK = 3
CANVASES = torch.tensor(list(itertools.product(range(4), repeat=3)))


def table_of_logits(seed: int = 0) -> torch.Tensor:
    """Logits [canvas, position, token] of a denoiser that looks at the whole canvas; the mask is often its favourite."""
    return 1.5 * torch.randn(64, 3, 4, generator=torch.Generator().manual_seed(seed))


def index_of(canvas: torch.Tensor) -> torch.Tensor:
    return canvas @ torch.tensor([16, 4, 1])


def at(states: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
    """The states [b, L, n] at some positions [b, R] of each row, or all of them."""
    return states if wanted is None else torch.take_along_dim(states, wanted[..., None], dim=1)


def toy_canvas(
    table, start, draws=1, seed=1, schedule=None, temperature=1.0, trunk=None, head=None, keys=None
) -> Canvas:
    """`draws` rows of the canvas `start` before the table [canvas, position, token]; a row does not feel the others.

    `trunk(tokens [b, L], rows [b], time [b])` may stand for the table: hidden states [b, L, ...] of all positions.
    """
    trunk = trunk or (lambda tokens, rows, time: table[index_of(tokens)])
    tokens = torch.tensor(start).repeat(draws, 1)
    keys = row_keys(draws, torch.Generator().manual_seed(seed)) if keys is None else keys
    denoiser = Denoiser(
        trunk=lambda tokens, rows, time, wanted: at(trunk(tokens, rows, time), wanted),
        head=head or (lambda hidden, *unused: hidden),
        process=AbsorbingProcess(schedule or LogLinearSchedule(), table.shape[-1], MASK),
        draw={"temperature": temperature},
    )
    return Canvas(tokens, tokens == MASK, RowNoise(keys, torch.arange(tokens.shape[1]).expand_as(tokens)), denoiser)


def finish(canvas: Canvas, sampler) -> Canvas:
    """The canvas after `sampler(canvas)`, all its steps done."""
    for _ in canvas.denoise(sampler):
        pass
    return canvas


def counts_of(canvas: Canvas) -> torch.Tensor:
    return index_of(canvas.tokens).bincount(minlength=64)


class EarlyEnd:
    """A schedule that ends early: at the sampler's last time, 1e-5, as much is still masked as under the other schedule
    at 0.3.
    """

    def __init__(self, schedule):
        self.schedule = schedule

    def gamma(self, t: torch.Tensor) -> torch.Tensor:
        return self.schedule.gamma(0.3 + 0.7 * (t - 1e-5) / (1 - 1e-5))


def sample(
    sampler, table, start=(3, 3, 3), draws=100_000, seed=1, schedule=None, temperature=1.0, **options
) -> Canvas:
    """A canvas after `sampler(canvas, **options)`."""
    canvas = toy_canvas(table, list(start), draws, seed, schedule, temperature)
    return finish(canvas, sampler(canvas, **options))
