"""Keys and values that `generate` keeps between the forwards of a block, so that the network runs on fewer tokens.

    exact    of a block model: those of the finished blocks, which no later token changes. The same logits as without
    prefix   approximate (Fast-dLLM, arXiv 2505.22618, Sec. 3.2): those of all tokens before the block
    dual     approximate: those of all tokens before and after the block

`prefix` and `dual` are for networks in which every token sees every other. What they keep comes from the block's first
forward, which runs on the canvas as it is then, and is used as it is until the next block begins.
"""

from collections.abc import Iterator

import torch


APPROXIMATE = ("prefix", "dual")
CACHES = ("none", "exact", *APPROXIMATE)


class Memory:
    """Keys and values of each layer at the columns of a canvas, [B, heads, columns, d].

    It takes the place of a cache of transformers (`past_key_values`) in a network's forward.
    """

    def __init__(self, rows: int, columns: int):
        self.shape = rows, columns
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.rows, self.past, self.new, self.kept = None, 0, 0, 0

    def look(self, rows: torch.LongTensor, past: int, new: int, kept: int):
        """Says what the next forward, of these rows [b], is to be given and what is to be kept of it.

        Args:
            past: the columns that it sees.
            new: the first of its tokens that is kept, at column `past`.
            kept: how many are.
        """
        self.rows, self.past, self.new, self.kept = rows, past, new, kept

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args, **kwargs) -> tuple[torch.Tensor, ...]:
        """The keys and values [b, heads, past + m, d] that a layer attends to, of its own [b, heads, m, d]."""
        if layer not in self.layers:
            rows, columns = self.shape
            empty = key.new_zeros(rows, key.shape[1], columns, key.shape[3])
            self.layers[layer] = empty, torch.zeros_like(empty)
        result = []
        for stored, own in zip(self.layers[layer], (key, value), strict=True):
            if self.kept:
                new = own[:, :, self.new : self.new + self.kept]
                stored[self.rows, :, self.past : self.past + self.kept] = new.to(stored.dtype)
            if self.past:
                of_rows = stored if len(self.rows) == len(stored) else stored[self.rows]
                own = torch.cat([of_rows[:, :, : self.past], own], dim=2)
            result.append(own)
        return tuple(result)

    def get_seq_length(self, *args) -> int:
        """For networks that count positions from it; ours are given theirs."""
        return 0


class CachedTrunk:
    """The trunk of a model, for one block after the other, on the tokens that it has to run on.

    Args:
        model: `states_at` is what runs it.
        kind: one of `CACHES` but "none".
        rows, columns: of the canvas, or as many columns as a row has without its padding.

    Attributes:
        computed: [rows] int64, CPU: the tokens that the trunk ran on, padding not counted.
    """

    def __init__(self, model, kind: str, rows: int, columns: int):
        self.model, self.kind = model, kind
        self.exact, self.shift = kind == "exact", getattr(model.config, "logits_shift", 0)
        self.memory = Memory(rows, columns)
        self.known = torch.zeros(rows, dtype=torch.long)  # the columns of each row whose keys and values are kept
        self.computed = torch.zeros(rows, dtype=torch.long)

    def enter(self, first: torch.LongTensor, end: torch.LongTensor, lengths: torch.LongTensor):
        """A new block begins.

        Args:
            first, end: [rows]: the block's first column in the window of each row, and the first one behind it.
            lengths: [rows]: the columns of the window that are not padding.
        """
        self.first, self.end, self.lengths = first, end, lengths
        if not self.exact:
            self.memory = Memory(*self.memory.shape)
            self.known.zero_()

    def __call__(
        self, tokens: torch.LongTensor, rows: torch.LongTensor, sigma: torch.Tensor, wanted: torch.LongTensor | None
    ) -> torch.Tensor:
        """As the trunk of a `Denoiser`. Hidden states of columns that it did not run on are zeros."""
        result = None
        for group, past in self.groups(rows.cpu()):
            index = group.to(tokens.device)
            columns, hidden = self.run(tokens[index], rows[index], sigma[index], past)
            if result is None:
                result = hidden.new_zeros(*tokens.shape, hidden.shape[-1])
            result[index[:, None], columns] = hidden
        if wanted is not None:
            result = torch.take_along_dim(result, wanted[..., None], dim=1)
        return result

    def groups(self, rows: torch.LongTensor) -> Iterator[tuple[torch.LongTensor, int]]:
        """The indices of the rows [b] of which as many columns are kept, and how many these are."""
        known = self.known[rows]
        for past in known.unique().tolist():
            yield (known == past).nonzero()[:, 0], past

    def run(self, tokens: torch.LongTensor, rows: torch.LongTensor, sigma: torch.Tensor, past: int):
        """One forward of rows [b] of which `past` columns are kept: the columns [b, m] that it ran on, and their states."""
        here, device = rows.cpu(), tokens.device
        first, stop = self.first[here], self.lengths[here] if self.kind == "prefix" else self.end[here]
        if self.exact:
            start, kept = torch.full_like(first, past), int(first[0]) - past
        elif past:
            start, kept = first, 0
        else:
            start, stop = torch.zeros_like(first), self.lengths[here]
            kept = int(stop.max())
        if past and self.shift:
            start = (start - 1).clamp(min=0)  # the token from which the first one is predicted
        self.computed[here] += stop - start
        columns = start[:, None] + torch.arange(int((stop - start).max()))
        ran = columns < stop[:, None]
        columns = torch.where(ran, columns, start[:, None])
        mask = self.mask(columns, ran, start, stop, past, self.lengths[here]).to(device)
        self.memory.look(rows, past, past - int(start[0]) if self.exact else 0, kept)
        if kept:
            self.known[here] += kept
        columns = columns.to(device)
        states = self.model.states_at(tokens.gather(1, columns), sigma, columns, mask, self.memory)
        return columns, states

    def mask(self, columns, ran, start, stop, past: int, lengths: torch.LongTensor) -> torch.BoolTensor:
        """Who sees whom, [b, m, past + m]: of the columns that are kept, and of those [b, m] that the forward runs on."""
        kept = torch.arange(past)
        if self.exact:
            block = columns // self.model.config.block_size
            own = ran[:, None] & (columns >= past)[:, None] & (block[:, None, :] <= block[:, :, None])
            seen = torch.ones(len(columns), past, dtype=torch.bool)
        else:
            own = ran[:, None].expand(-1, columns.shape[1], -1)
            seen = (kept < lengths[:, None]) & ~((kept >= start[:, None]) & (kept < stop[:, None]))
        return torch.cat([seen[:, None].expand(-1, columns.shape[1], -1), own], dim=2)
