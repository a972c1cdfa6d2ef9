"""The head over chosen positions: hidden rows with the head's parameters, and the one loop over chunks of the vocabulary.

A loss, a draw or a likelihood needs logits at some positions only, and needs them only for a moment. So a network hands
out its hidden states there (`HeadRows`), and `in_chunks` runs the head on as many rows at a time as the device's budget
allows: the logits [B, L, V] of a batch are never built. This is also what another network must offer to be trained here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.utils import ModelOutput

from .checks_mdlm import POSITIVE, check_number, check_positions


MASK_LOGIT = -1e6  # Finite, as in the published code: 0 * log(0) is then 0 and not NaN in a divergence.
# Numbers in a chunk of logits. On a CPU 16 MB in float32: above 32 MB malloc asks the system for fresh pages each time, and
# those cost more than the arithmetic. An accelerator wants larger matrix products.
CHUNK = {"cpu": 2**22}
ACCELERATOR_CHUNK = 2**26
CPU_COLUMNS = 1024  # of logits in one product on a CPU, where writing rows of a whole vocabulary takes a third longer


def in_chunks(
    function: Callable[[slice], torch.Tensor], count: int, vocab_size: int, device: torch.device
) -> torch.Tensor:
    """The results of `function(rows)`, joined, for slices that together cover `range(count)`.

    Every slice holds as many rows as the device's budget for logits [rows, V] allows, at least one. For a count of zero
    the function is called once, with an empty slice, so that dtype and shape of the result are still its own.

    Args:
        function: takes a slice of m rows, and returns a tensor [m, ...].
    """
    size = max(1, CHUNK.get(device.type, ACCELERATOR_CHUNK) // vocab_size)
    return torch.cat([function(slice(start, start + size)) for start in range(0, max(count, 1), size)])


@dataclass
class HeadRows(ModelOutput):
    """Hidden rows of one network, and the head that turns them into token distributions: `forward(hidden_rows=...)`.

    The head's parameters are views that the forward makes: the wrappers that train a network (DDP, DeepSpeed) then see
    them used, and ZeRO-3 holds them complete until their gradient has arrived. A `ModelOutput`, since those wrappers look
    for tensors in such outputs.

    Args:
        hidden: [R, d].
        weight, bias: of the head, [V, d] and [V].
        mask_token_id: the token that gets no probability (SUBS, see `log_probabilities`); None under uniform diffusion,
            where any token may be the right one.
    """

    hidden: torch.FloatTensor | None = None
    weight: torch.FloatTensor | None = None
    bias: torch.FloatTensor | None = None
    mask_token_id: int | None = None

    def at(self, chosen: torch.Tensor | slice) -> "HeadRows":
        """The rows that a boolean mask [R], indices or a slice choose. ValueError for any that are not there."""
        if not isinstance(chosen, slice):
            check_positions("rows", chosen, (len(self.hidden),))
        return replace(self, hidden=self.hidden[chosen])

    def put(self, chosen: torch.Tensor, rows: "HeadRows") -> "HeadRows":
        """A copy in which `rows`, of the same head, replace those that a boolean mask [R] or indices choose.

        Raises:
            ValueError: when `rows` come from another head, or are not as many as the places.
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
        """[R, V] of softmax(logits / temperature) without [MASK]; float32, or float64 for float64 rows. No gradient.

        SUBS (MDLM, arXiv 2406.07524, Sec. 3.2.3) has two rules. [MASK] gets no probability: that is done here. A visible
        token is predicted with certainty: that needs no head, so these rows are never asked for at visible positions.

        Builds the logits of all rows at once; `map` goes through them in chunks.
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
        if self.mask_token_id is not None:
            logits[:, self.mask_token_id] = MASK_LOGIT
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        if self.mask_token_id is not None:
            log_probabilities[:, self.mask_token_id] = MASK_LOGIT  # the same under every network: no divergence there
        return log_probabilities

    def map(self, function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        """`function(log-probabilities [m, V], *values [m])` for all rows, m at a time: [R, ...]. No gradient.

        Args:
            values: tensors [R, ...], cut as the rows are.
        """
        own = self.to(self.matmul_dtype())

        def of_chunk(rows: slice) -> torch.Tensor:
            return function(own.at(rows).log_probabilities(), *(value[rows] for value in values))

        with torch.autocast(
            self.hidden.device.type, enabled=False
        ):  # the products have their dtype; the rest is float32
            return in_chunks(of_chunk, len(self.hidden), len(self.weight), self.hidden.device)
