"""The canvas of a generation: the one place where the network is asked, tokens are written and forwards are counted."""

import functools
from collections.abc import Callable, Iterator

import torch

from .draws_mdlm import draw_tokens
from .noise_mdlm import uniforms
from .noise_schedule_mdlm import NoiseSchedule


CHUNK = 2**24  # logits at a time: whatever the batch, the length and the vocabulary, memory for the head is bounded


class Canvas:
    """Tokens under denoising.

    Who is masked is kept on the CPU: a sampler whose reveals do not depend on the logits never waits for the device.

    Args:
        tokens: [B, L] int64, on the network's device; changed in place.
        fillable: [B, L] bool, CPU: the positions to fill. The others stay.
        keys: [B] int64, CPU: the rows' noise, see `noise_mdlm.py`.
        positions: [B, L] int64, CPU: the place of each token in its row, padding not counted.
        trunk: `(tokens [b, L], rows [b], time [b] float64, CPU, wanted [b, R]) -> hidden states [b, R, ...]` of the wanted
            positions; of all, [b, L, ...], for None.
        head: `(hidden states [n, ...], tokens [b, L], the row of tokens of each state [n]) -> logits [n, V]`.
        schedule: the noise schedule of the model.
        vocab_size: V.
        mask_token_id: never drawn; None under uniform diffusion.
        draw: keyword arguments of every draw: temperature, top_k, top_p, dtype.
        forwards: what one call of the trunk counts for; 2 with guidance.
        whole: every row takes part in every forward (static shapes, for a compiled trunk).
        step: the number of the first step.

    Attributes:
        masked: [B, L] bool, CPU: the fillable positions without a token.
        when, which: [B, L] float64, CPU: the locked noise, that is the first draw of each token.
        nfe: [B] int64, CPU: forwards that each row took part in.
        reveal_steps: [B, L] int64, CPU: the step that revealed each token, -1 for none.
    """

    def __init__(
        self,
        tokens: torch.LongTensor,
        fillable: torch.BoolTensor,
        keys: torch.LongTensor,
        positions: torch.LongTensor,
        *,
        trunk: Callable,
        head: Callable,
        schedule: NoiseSchedule,
        vocab_size: int,
        mask_token_id: int | None,
        draw: dict | None = None,
        forwards: int = 1,
        whole: bool = False,
        step: int = 0,
    ):
        self.tokens, self.fillable, self.keys, self.positions = tokens, fillable, keys, positions
        self.trunk, self.head, self.schedule = trunk, head, schedule
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.draw, self.forwards, self.whole = draw or {}, forwards, whole
        self.masked = fillable.clone()
        self.when, self.which = self.noise(0)
        self.nfe = torch.zeros(len(tokens), dtype=torch.long)
        self.reveal_steps = torch.full(tokens.shape, -1)
        self.broken = torch.zeros_like(tokens, dtype=torch.bool)
        self.step, self.changed = step, False

    def noise(self, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two uniforms of each token, [B, L] float64 on the CPU. Draw 0 is the locked noise; step k has draw k + 1."""
        return uniforms(self.keys, self.positions, draw)

    def ask(self, where: torch.BoolTensor, time: float | torch.Tensor, sparing: bool = False) -> "Answer":
        """One forward of the rows that have a position in `where`; the head waits until it is known what for.

        Args:
            where: [B, L] bool, CPU; not empty.
            time: the time t of the forward, one for all or [B].
            sparing: the last layer runs on the positions in `where` alone. The last bits of an answer then depend on how
                many are asked for in other rows, which an order made of scores would feel where two are equal.
        """
        rows = torch.arange(len(where)) if self.whole else where.any(dim=1).nonzero()[:, 0]
        asked, wanted = where[rows], None
        if sparing and not self.whole:
            columns, counts = asked.nonzero()[:, 1], asked.sum(dim=1, keepdim=True)
            asked = torch.arange(int(counts.max())) < counts  # [b, R]: rows that want fewer ask for position 0 as well
            wanted = self.send(torch.zeros(asked.shape, dtype=torch.long).masked_scatter(asked, columns))
        index = asked.flatten().nonzero()[:, 0]
        self.nfe[rows] += self.forwards
        time = torch.as_tensor(time, dtype=torch.float64).expand(len(where))[rows]
        rows, index = self.send(rows), self.send(index)
        tokens = self.tokens[rows]
        hidden = self.trunk(tokens, rows, time, wanted).flatten(0, 1)[index]
        return Answer(self, where, hidden, tokens, index // asked.shape[1])

    def reveal(self, where: torch.BoolTensor, time: float | torch.Tensor, **how):
        """Asks for the positions [B, L] and fills them all; no position, no forward. `how`: see `Answer.reveal`."""
        if where.any():
            self.ask(where, time, sparing=True).reveal(where, **how)

    def write(self, where: torch.BoolTensor, tokens: torch.LongTensor):
        """Puts tokens [n] into the positions [B, L], in row-major order. A -1 marks logits that gave no token."""
        rows, columns = where.nonzero().unbind(dim=1)
        rows_there, columns_there = self.send(rows), self.send(columns)
        self.broken[rows_there, columns_there] = tokens < 0
        self.tokens[rows_there, columns_there] = tokens.clamp(min=0)
        self.reveal_steps[where] = self.step
        self.masked = self.masked & ~where  # a new tensor: `where` may be the old one
        self.changed = True

    def remask(self, where: torch.BoolTensor):
        """Takes tokens off the canvas again."""
        if where.any():
            self.tokens[tuple(map(self.send, where.nonzero().unbind(dim=1)))] = self.mask_token_id
            self.masked = self.masked | where
            self.reveal_steps[where] = -1
            self.changed = True

    def denoise(self, sampler: Iterator[None], on_step: Callable[[], None]):
        """The loop of every sampler: `sampler` does a step each time that it is asked for the next.

        Raises:
            ValueError: logits that are no numbers, with their row and step.
        """
        for _ in sampler:
            if self.tokens.device.type == "cpu":  # elsewhere a look at the flags would wait for the device
                self.check()
            if self.changed:
                on_step()
            self.changed = False
            self.step += 1
        self.check()

    def check(self):
        if self.broken.any():
            row, column = self.broken.nonzero()[0].tolist()
            raise not_a_number(row, self.reveal_steps[row, column].item())

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.tokens.device, non_blocking=True)


class Answer:
    """What the network says of some positions: their hidden states, which the head turns into logits a chunk at a time."""

    def __init__(self, canvas: Canvas, where: torch.BoolTensor, hidden, tokens, lines):
        self.canvas, self.where, self.hidden, self.tokens, self.lines = canvas, where, hidden, tokens, lines

    def map(self, function: Callable, *values: torch.Tensor) -> torch.Tensor:
        """`function(logits [m, V], *values [m])` of all positions asked for, m at a time: a tensor [n]."""
        values = [self.canvas.send(value) for value in values]
        size, results = max(1, CHUNK // self.canvas.vocab_size), []
        for start in range(0, len(self.hidden), size):
            part = slice(start, start + size)
            logits = self.canvas.head(self.hidden[part], self.tokens, self.lines[part])
            results.append(function(logits, *(value[part] for value in values)))
        return torch.cat(results)

    def score(self, measure: Callable) -> torch.Tensor:
        """`measure(logits, mask_token_id)` of every position asked for, [B, L] float32 on the CPU; -inf elsewhere.

        To four decimals: positions that the network cannot tell apart (all masked, far from the prompt) are then tied,
        whatever the last bits of their logits, which differ between batches.
        """
        found = self.map(functools.partial(measure, mask_token_id=self.canvas.mask_token_id)).round(decimals=4).cpu()
        if found.isnan().any():
            raise not_a_number(self.where.nonzero()[found.isnan(), 0][0].item(), self.canvas.step)
        return torch.full(self.where.shape, -torch.inf).masked_scatter(self.where, found)

    def reveal(self, chosen: torch.BoolTensor, which: torch.Tensor | None = None, greedy: bool = False):
        """Draws tokens for the chosen [B, L] among the positions asked for, and writes them.

        Args:
            which: [B, L], the uniforms of the draw; the locked noise by default.
            greedy: take the likeliest tokens.
        """
        canvas = self.canvas
        if chosen is not self.where:
            picked = canvas.send(chosen[self.where].nonzero()[:, 0])
            Answer(canvas, chosen, self.hidden[picked], self.tokens, self.lines[picked]).reveal(chosen, which, greedy)
            return
        how = canvas.draw | ({"temperature": 0} if greedy else {})
        draw = functools.partial(draw_tokens, mask_token_id=canvas.mask_token_id, **how)
        canvas.write(chosen, self.map(draw, (canvas.which if which is None else which)[chosen]))


def not_a_number(row: int, step: int) -> ValueError:
    return ValueError(f"the network gave logits that are no numbers (NaN or infinite) for row {row} in step {step}")
