"""The canvas of a generation: the one place where the network is run, tokens are written and forwards are counted.

`generate` fills canvases block by block; so can any code that wants samples without the argument parsing of `generate`:

    canvas = Canvas(tokens, fillable, RowNoise(keys, positions), model.denoiser())
    with torch.no_grad():
        for step in canvas.denoise(ancestral(canvas, steps=8)):
            ...  # canvas.tokens has changed
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .coupling_mdlm import Chain, Chains
from .draws_mdlm import draw_tokens, substitute
from .forward_process_mdlm import Process
from .head_mdlm import in_chunks
from .noise_mdlm import RowNoise
from .noise_schedule_mdlm import NoiseSchedule
from .transfer_mdlm import send


STATES = 2**32 - 1  # the draw of the uniforms that choose the states of a coupling; no step has this number


@dataclass(frozen=True)
class Denoiser:
    """p(x_0 | z_t): a network, the forward process that it inverts, and how tokens are drawn from its logits.

    Args:
        trunk: `(tokens [b, L], rows [b], time [b] float64 on the CPU, wanted [b, R]) -> hidden states [b, R, ...]` at the
            wanted positions, or [b, L, ...] at all of them if `wanted` is None. `rows` are the canvas's rows.
        head: `(hidden states [n, ...], tokens [b, L], the row in `tokens` of each state [n]) -> logits [n, V]`.
        process: its noise schedule, the vocabulary's size V, and [MASK], which is never drawn.
        draw: keyword arguments of every draw: temperature, top_k, top_p, dtype.
        forwards: forwards of the network that one call of the trunk costs; 2 with guidance.
        static_shapes: every row takes part in every forward, as a compiled trunk needs it.
        barred: positions of the canvas [B, L] bool, on the CPU, and the tokens [V] bool that are not drawn there.
        chains: of the coupling that joins the tokens of a reveal; None: they are drawn independently.
        seen: positions of the canvas [B, L] bool, on the CPU, that are not padding, for the chains; all by default.
    """

    trunk: Callable
    head: Callable
    process: Process
    draw: dict = field(default_factory=dict)
    forwards: int = 1
    static_shapes: bool = False
    barred: tuple[torch.BoolTensor, torch.BoolTensor] | None = None
    chains: Chains | None = None
    seen: torch.BoolTensor | None = None


class Canvas:
    """Tokens under denoising.

    The mask is kept on the CPU: a sampler whose reveals do not depend on the logits never waits for the device.

    Args:
        tokens: [B, L] int64, on the network's device; changed in place.
        fillable: [B, L] bool, CPU: the positions to fill. The others stay as they are.
        noise: the uniforms of the rows: draw 0 is the locked noise, the step with number k has draw k + 1.
        denoiser: the network, see `Denoiser`.
        first_step: the number of the first step.

    Attributes:
        masked: [B, L] bool, CPU: the fillable positions without a token.
        u: [B, L] float64, CPU: the locked uniform that decides when a token is revealed.
        v: [B, L] float64, CPU: the locked uniform that decides which token it becomes.
        step: the number of the current step.
        nfe: [B] int64, CPU: forwards that each row took part in.
        reveal_steps: [B, L] int64, CPU: the step that revealed each token, -1 for none.
    """

    def __init__(
        self,
        tokens: torch.LongTensor,
        fillable: torch.BoolTensor,
        noise: RowNoise,
        denoiser: Denoiser,
        first_step: int = 0,
    ):
        self.tokens, self.fillable, self.noise, self.denoiser = tokens, fillable, noise, denoiser
        self.masked = fillable.clone()
        self.u, self.v = noise.uniforms(0)
        self.nfe = torch.zeros(len(tokens), dtype=torch.long)
        self.reveal_steps = torch.full(tokens.shape, -1)
        self.broken = torch.zeros_like(tokens, dtype=torch.bool)
        self.step, self.changed = first_step, False

    @functools.cached_property
    def w(self) -> torch.Tensor:
        """[B, L] float64, CPU: the locked uniform that decides a token's state, where there is a coupling."""
        return self.noise.uniforms(STATES)[0]

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.process.schedule

    @property
    def mask_token_id(self) -> int | None:
        return self.denoiser.process.mask_token_id

    def fresh_noise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two uniforms for each token, for this step only: [B, L] float64 on the CPU."""
        return self.noise.uniforms(self.step + 1)

    def ask(self, where: torch.BoolTensor, time: float | torch.Tensor, sparing: bool = False) -> "Answer":
        """One forward of the rows that have a position in `where`. The head runs later, on the positions that are chosen.

        Args:
            where: [B, L] bool, CPU; not empty.
            time: the time t of the forward, one for all or [B].
            sparing: run the last layer on the positions in `where` alone. The last bits of an answer then depend on how
                many positions other rows ask for; score-based samplers must not use it, since near-ties would break
                differently between batches.
        """
        static = self.denoiser.static_shapes
        rows = torch.arange(len(where)) if static else where.any(dim=1).nonzero()[:, 0]
        asked, wanted = where[rows], None
        if sparing and not static:
            columns, counts = asked.nonzero()[:, 1], asked.sum(dim=1, keepdim=True)
            asked = torch.arange(int(counts.max())) < counts  # [b, R]: rows that want fewer ask for position 0 as well
            wanted = self.send(torch.zeros(asked.shape, dtype=torch.long).masked_scatter(asked, columns))
        index = asked.flatten().nonzero()[:, 0]
        self.nfe[rows] += self.denoiser.forwards
        time = torch.as_tensor(time, dtype=torch.float64).expand(len(where))[rows]
        rows, index = self.send(rows), self.send(index)
        tokens = self.tokens[rows]
        hidden = self.denoiser.trunk(tokens, rows, time, wanted).flatten(0, 1)[index]
        return Answer(self, where, hidden, tokens, index // asked.shape[1])

    def reveal(self, where: torch.BoolTensor, time: float | torch.Tensor, **options):
        """Asks for the positions [B, L] and fills them all; no position, no forward. `options`: see `Answer.reveal`."""
        if where.any() and self.denoiser.chains is None:
            self.ask(where, time, sparing=True).reveal(where, **options)
        elif where.any():
            for answer, chain in self.ask_jointly(where, time):
                answer.reveal_jointly(where & answer.where, chain, **options)

    def ask_jointly(self, where: torch.BoolTensor, time: float | torch.Tensor) -> Iterator[tuple["Answer", Chain]]:
        """One forward for a coupled draw at the positions `where` [B, L]: yields the rows of each noise level, with its chain.

        It asks for all that is masked in these rows, since what is not revealed has to be summed out.
        """
        answer = self.ask(self.masked & where.any(dim=1, keepdim=True), time, sparing=True)
        time = torch.as_tensor(time, dtype=torch.float64).expand(len(where))
        levels = self.denoiser.chains.levels_of(self.schedule.gamma(time))
        for level in levels[where.any(dim=1)].unique().tolist():
            yield answer.at(answer.where & (levels == level)[:, None]), self.denoiser.chains.at(level)

    def write(self, where: torch.BoolTensor, tokens: torch.LongTensor):
        """Writes tokens [n] into the positions [B, L], in row-major order. A -1 stands for logits from which no token could be drawn."""
        rows, columns = where.nonzero().unbind(dim=1)
        index = self.send(rows), self.send(columns)
        self.broken[index] = tokens < 0
        self.tokens[index] = tokens.clamp(min=0)
        self.reveal_steps[where] = self.step
        self.masked = self.masked & ~where  # a new tensor: `where` may be the old one
        self.changed = True

    def remask(self, where: torch.BoolTensor):
        """Masks tokens again."""
        if where.any():
            self.tokens[tuple(map(self.send, where.nonzero().unbind(dim=1)))] = self.mask_token_id
            self.masked = self.masked | where
            self.reveal_steps[where] = -1
            self.changed = True

    def denoise(self, sampler: Iterator[None]) -> Iterator[int]:
        """The loop of every sampler: `sampler` does one step whenever it is asked for the next.

        Yields:
            the number of each step that changed the canvas, while `tokens` are what it left.

        Raises:
            ValueError: for NaN or infinite logits; names their row and step.
        """
        for _ in sampler:
            if self.tokens.device.type == "cpu":  # elsewhere a look at the flags would wait for the device
                self.check()
            if self.changed:
                yield self.step
            self.changed = False
            self.step += 1
        self.check()

    def check(self):
        if self.broken.any():
            row, column = self.broken.nonzero()[0].tolist()
            raise bad_logits(row, self.reveal_steps[row, column].item())

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        return send(tensor, self.tokens.device)


class Answer:
    """The network's hidden states at some positions, which the head turns into logits a chunk at a time.

    Args:
        canvas: what was asked about.
        where: [B, L] bool, CPU: the n positions.
        hidden: [n, ...], in row-major order.
        tokens: [b, L]: the rows that took part in the forward, as the network saw them.
        row_of: [n]: the row in `tokens` of each position.
    """

    def __init__(
        self,
        canvas: Canvas,
        where: torch.BoolTensor,
        hidden: torch.Tensor,
        tokens: torch.LongTensor,
        row_of: torch.LongTensor,
    ):
        self.canvas, self.where, self.hidden, self.tokens, self.row_of = canvas, where, hidden, tokens, row_of

    def map(self, function: Callable, *values: torch.Tensor) -> torch.Tensor:
        """`function(logits [m, V], *values [m])` of all positions, m at a time: a tensor [n]."""
        denoiser, values = self.canvas.denoiser, [self.canvas.send(value) for value in values]
        barred = denoiser.barred and (self.canvas.send(denoiser.barred[0][self.where]), denoiser.barred[1])

        def of_chunk(part: slice) -> torch.Tensor:
            logits = denoiser.head(self.hidden[part], self.tokens, self.row_of[part])
            if barred is not None:
                logits = logits.masked_fill(barred[0][part, None] & barred[1], -torch.inf)
            return function(logits, *(value[part] for value in values))

        return in_chunks(of_chunk, len(self.hidden), denoiser.process.vocab_size, self.hidden.device)

    def score(self, measure: Callable) -> torch.Tensor:
        """`measure(logits, mask_token_id)` of every position asked for, [B, L] float32 on the CPU; -inf elsewhere.

        Rounded to four decimals: positions that the network cannot tell apart (all masked, far from the prompt) are then
        tied, whatever the last bits of their logits, which differ between batches.
        """
        found = self.map(functools.partial(measure, mask_token_id=self.canvas.mask_token_id)).round(decimals=4).cpu()
        if found.isnan().any():
            raise bad_logits(self.where.nonzero()[found.isnan(), 0][0].item(), self.canvas.step)
        return torch.full(self.where.shape, -torch.inf).masked_scatter(self.where, found)

    def reveal(self, chosen: torch.BoolTensor, v: torch.Tensor | None = None, greedy: bool = False):
        """Draws tokens for the chosen [B, L] among the positions asked for, and writes them.

        Args:
            v: [B, L], the uniforms of the draw; the locked ones by default.
            greedy: take the likeliest tokens.
        """
        canvas = self.canvas
        draw = functools.partial(draw_tokens, mask_token_id=canvas.mask_token_id, **self.options(greedy))
        canvas.write(chosen, self.at(chosen).map(draw, (canvas.v if v is None else v)[chosen]))

    def write(self, chosen: torch.BoolTensor, tokens: torch.LongTensor):
        """Writes tokens [n] that were drawn already for the chosen [B, L] among the positions asked for."""
        self.canvas.write(chosen, tokens)

    def options(self, greedy: bool) -> dict:
        """The keyword arguments of a draw."""
        return self.canvas.denoiser.draw | ({"temperature": 0} if greedy else {})

    def at(self, chosen: torch.BoolTensor) -> "Answer":
        """The answer at some [B, L] of the positions asked for."""
        if torch.equal(chosen, self.where):
            return self
        picked = self.canvas.send(chosen[self.where].nonzero()[:, 0])
        return Answer(self.canvas, chosen, self.hidden[picked], self.tokens, self.row_of[picked])

    def reveal_jointly(self, chosen: torch.BoolTensor, chain: Chain, greedy: bool = False):
        """Draws tokens for the chosen [B, L] from their joint law under a chain, and writes them.

        The states are drawn first, then each token from p_i(v) W[v, s]. The temperature sharpens each of these draws by
        itself, as that of an autoregressive model does; `top_k` and `top_p` are of a token's law given its state.
        """
        canvas, options = self.canvas, self.options(greedy)
        rows = self.where.any(dim=1).nonzero()[:, 0]
        places = tuple(map(canvas.send, chosen[rows].nonzero().unbind(dim=1)))
        evidence, present = self.evidence(chain)
        drawn, uniforms = canvas.send(chosen[rows]), canvas.send(canvas.w[rows])
        states = chain.draw(evidence, present, drawn, uniforms, options.get("temperature", 1.0))[places]

        def draw(logits: torch.Tensor, v: torch.Tensor, states: torch.LongTensor) -> torch.LongTensor:
            told = chain.log_emission.T[states.clamp(min=0)].masked_fill(states[:, None] < 0, torch.nan)
            return draw_tokens(logits + told, v, mask_token_id=canvas.mask_token_id, **options)

        canvas.write(chosen, self.at(chosen).map(draw, canvas.v[chosen], states))

    def evidence(self, chain: Chain) -> tuple[torch.Tensor, torch.BoolTensor]:
        """What each position of the b rows with a position asked for says about its state, and where the chain runs.

        It passes over padding, and over masks that were not asked for: those behind the block that is being filled.

        Returns:
            `evidence` [b, L, S] and `present` [b, L] of `Chain`.
        """
        canvas, rows = self.canvas, self.where.any(dim=1).nonzero()[:, 0]
        places = tuple(map(canvas.send, self.where[rows].nonzero().unbind(dim=1)))
        tokens = canvas.tokens[canvas.send(rows)]
        evidence, present = chain.emission[tokens], tokens != canvas.mask_token_id

        def summed_out(logits: torch.Tensor) -> torch.Tensor:
            return substitute(logits, canvas.mask_token_id, evidence.dtype).softmax(dim=-1) @ chain.emission

        evidence[places] = self.map(summed_out)
        present[places] = True
        if canvas.denoiser.seen is not None:
            present &= canvas.send(canvas.denoiser.seen[rows])
        return evidence, present


def bad_logits(row: int, step: int) -> ValueError:
    return ValueError(f"the network gave NaN or infinite logits for row {row} in step {step}")
