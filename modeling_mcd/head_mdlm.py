"""The head at chosen positions: hidden rows with the head's parameters, and the one loop that runs the head in chunks.

A loss, a draw or a likelihood needs logits at some positions only, and only for a moment. So a network returns its hidden
states at these positions (`HeadRows`), and `in_chunks` runs the head on as many rows at a time as the device's budget allows.
The logits [B, L, V] of a batch are never built. Any other network that is to be trained here must return the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.utils import ModelOutput

from .checks_mdlm import POSITIVE, check_number, check_positions


# Stands for log 0 in losses. It is finite, as in the published code, so that 0 * log 0 is 0 in a divergence and not NaN. Draws
# use -inf, since -1e6 divided by a high temperature could be drawn.
MASK_LOGIT = -1e6
# Numbers in a chunk of logits. On a CPU that is 16 MB in float32: above 32 MB, malloc asks the system for fresh pages every
# time, and these cost more than the arithmetic. An accelerator needs larger matrix products.
CHUNK = {"cpu": 2**22}
ACCELERATOR_CHUNK = 2**26
CPU_COLUMNS = 1024  # columns of logits per product on a CPU; products over all V columns take a third longer


def exclude_mask(scores: torch.Tensor, mask_token_id: int | None, value: float) -> torch.Tensor:
    """Sets the column of [MASK] in scores [rows, V] to `value`, in place: SUBS (arXiv 2406.07524, Sec. 3.2.3).

    Args:
        mask_token_id: None where the vocabulary has no [MASK] (uniform diffusion); nothing is changed then.
        value: -inf for draws, `MASK_LOGIT` for losses.
    """
    if mask_token_id is not None:
        scores[:, mask_token_id] = value
    return scores


def in_chunks(
    function: Callable[[slice], torch.Tensor], count: int, vocab_size: int, device: torch.device
) -> torch.Tensor:
    """Calls `function(rows)` for slices that together cover `range(count)`, and concatenates the results.

    Each slice holds as many rows as the device's budget for logits [rows, V] allows, at least one. For a count of zero the
    function is called once, with an empty slice, so that the result still has its dtype and shape.

    Args:
        function: takes a slice of m rows and returns a tensor [m, ...].

    Returns:
        [count, ...].
    """
    size = max(1, CHUNK.get(device.type, ACCELERATOR_CHUNK) // vocab_size)
    return torch.cat([function(slice(start, start + size)) for start in range(0, max(count, 1), size)])


@dataclass
class HeadRows(ModelOutput):
    """What `forward(hidden_rows=...)` returns: hidden rows, and the head that turns them into token distributions.

    The head's parameters are views made in the forward. The wrappers that train a network (DDP, DeepSpeed) then see that
    they are used, and ZeRO-3 keeps them gathered until their gradient has arrived. It is a `ModelOutput` because those
    wrappers look for tensors in such outputs.

    Args:
        hidden: [R, d].
        weight, bias: the head's, [V, d] and [V].
        mask_token_id: the token that gets no probability (SUBS, see `log_probabilities`); None under uniform diffusion,
            where every token may be the right one.
        coupling: the parameters of the network's chain, a `CouplingWeights`; None where it has none.
    """

    hidden: torch.FloatTensor | None = None
    weight: torch.FloatTensor | None = None
    bias: torch.FloatTensor | None = None
    mask_token_id: int | None = None
    coupling: tuple[torch.Tensor | None, ...] | None = None

    def at(self, chosen: torch.Tensor | slice) -> "HeadRows":
        """The rows that a boolean mask [R], indices or a slice select. Raises ValueError if one does not exist."""
        if not isinstance(chosen, slice):
            check_positions("rows", chosen, (len(self.hidden),))
        return replace(self, hidden=self.hidden[chosen])

    def put(self, chosen: torch.Tensor, rows: "HeadRows") -> "HeadRows":
        """A copy in which `rows` replace the rows that a boolean mask [R] or indices select.

        Raises:
            ValueError: when `rows` belong to another head, or are not as many as were selected.
        """
        check_positions("places", chosen, (len(self.hidden),))
        places = self.hidden[chosen]
        if places.shape != rows.hidden.shape:
            raise ValueError(f"put: {len(rows.hidden)} rows for {len(places)} places")
        if rows.weight.data_ptr() != self.weight.data_ptr():
            raise ValueError("put: the rows belong to another head, which would give them another meaning")
        hidden = self.hidden.clone()
        hidden[chosen] = rows.hidden
        return replace(self, hidden=hidden)

    def to(self, dtype: torch.dtype) -> "HeadRows":
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=self.bias.to(dtype))

    def matmul_dtype(self) -> torch.dtype:
        """The dtype of the head's products here: that of an active autocast, else that of the weights."""
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device) and self.hidden.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    @torch.no_grad()
    def log_probabilities(self, temperature: float = 1.0) -> torch.Tensor:
        """log softmax(logits / temperature) without [MASK], [R, V]; float32, or float64 for float64 rows. No gradient.

        SUBS (MDLM, arXiv 2406.07524, Sec. 3.2.3) has two rules. [MASK] gets no probability: that is applied here. A visible
        token is predicted with certainty: that needs no head, so nothing asks for rows at visible positions.

        Builds the logits of all rows at once; `map` works in chunks.

        Raises:
            ValueError: the temperature is not positive.
        """
        check_number("temperature", temperature, POSITIVE)
        vocab_size, scale = len(self.weight), 1 / temperature
        logits = self.hidden.new_empty(
            len(self.hidden), vocab_size, dtype=torch.promote_types(self.hidden.dtype, torch.float32)
        )
        columns = CPU_COLUMNS if logits.device.type == "cpu" else vocab_size
        for start in range(0, vocab_size, columns):
            part = slice(start, start + columns)
            logits[:, part] = torch.addmm(self.bias[part], self.hidden, self.weight[part].T, beta=scale, alpha=scale)
        exclude_mask(logits, self.mask_token_id, MASK_LOGIT)
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        # Once more after the normalisation: it is then the same under every network, and no divergence sees it.
        return exclude_mask(log_probabilities, self.mask_token_id, MASK_LOGIT)

    def map(self, function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        """Calls `function(log-probabilities [m, V], *values [m, ...])` for all rows, m at a time. No gradient.

        Args:
            values: tensors [R, ...], divided into chunks like the rows.

        Returns:
            The concatenated results, [R, ...].
        """
        own = self.to(self.matmul_dtype())

        def of_chunk(rows: slice) -> torch.Tensor:
            return function(own.at(rows).log_probabilities(), *(value[rows] for value in values))

        with torch.autocast(
            self.hidden.device.type, enabled=False
        ):  # the products have their dtype; the rest is float32
            return in_chunks(of_chunk, len(self.hidden), len(self.weight), self.hidden.device)
