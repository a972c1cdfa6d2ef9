"""The head over chosen positions: hidden rows, the head's parameters, and one chunked engine over the vocabulary."""

from dataclasses import dataclass, replace

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import ModelOutput


MASK_LOGIT = -1e6  # Finite, as in the published code: 0 * log(0) is then 0 and not NaN in a divergence.
# Numbers in a chunk of logits. On a CPU 16 MB in float32: above 32 MB malloc asks the system for fresh pages each time, and
# those cost more than the arithmetic. An accelerator wants larger matrix products.
CHUNK = {"cpu": 2**22}
ACCELERATOR_CHUNK = 2**26
CPU_COLUMNS = 1024  # of logits in one product on a CPU, where writing rows of a whole vocabulary takes a third longer


@dataclass
class HeadRows:
    """Hidden rows of one network and the head that makes token distributions of them.

    Args:
        hidden: [rows, d].
        weight, bias: of the head, [V, d] and [V].
        mask_token_id: the token that gets no probability; None for uniform-state diffusion, where every token may stand.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    mask_token_id: int | None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, which) -> "HeadRows":
        """The rows that a boolean mask [rows], indices or a slice choose."""
        return replace(self, hidden=self.hidden[which])

    def put(self, which: torch.Tensor, rows: "HeadRows") -> "HeadRows":
        """A copy in which `rows`, of the same head, stand at the places that a boolean mask [rows] or indices choose."""
        if rows.weight.data_ptr() != self.weight.data_ptr():
            raise ValueError("put: the rows belong to another head, under which they would mean something else")
        hidden = self.hidden.clone()
        hidden[which] = rows.hidden
        return replace(self, hidden=hidden)

    def to(self, dtype: torch.dtype) -> "HeadRows":
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=self.bias.to(dtype))

    def matmul_dtype(self) -> torch.dtype:
        """What the head's products run in here: the autocast's dtype if there is one, else that of the weights."""
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device) and self.hidden.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    @torch.no_grad()
    def log_probabilities(self, temperature: float = 1.0) -> torch.Tensor:
        """[rows, V] of softmax(logits / temperature) under SUBS; float32, or float64 for float64 rows. No gradient.

        All rows at once: for a few rows, where the log-probabilities themselves are wanted.
        """
        vocab_size, scale = len(self.weight), 1 / temperature
        logits = self.hidden.new_empty(
            len(self), vocab_size, dtype=torch.promote_types(self.hidden.dtype, torch.float32)
        )
        columns = CPU_COLUMNS if logits.device.type == "cpu" else vocab_size
        for start in range(0, vocab_size, columns):
            part = slice(start, start + columns)
            logits[:, part] = torch.addmm(self.bias[part], self.hidden, self.weight[part].T, beta=scale, alpha=scale)
        if self.mask_token_id is not None:
            logits[:, self.mask_token_id] = MASK_LOGIT
        log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)
        if self.mask_token_id is not None:
            log_probabilities[:, self.mask_token_id] = MASK_LOGIT  # under every network, so that they agree on it
        return log_probabilities


def head_rows(model: nn.Module, positions: torch.Tensor, **inputs) -> HeadRows:
    """Runs the trunk of `model`, wrapped for training (DDP, DeepSpeed) or not, and hands out rows of its output.

    Args:
        positions: a boolean mask [B, L], or indices into the flattened canvas, [rows].
        inputs: of the forward: input_ids, timesteps, attention_mask.
    """
    outputs = model(hidden_rows=positions, **inputs)
    config = extract_model_from_parallel(model).config
    mask_token_id = config.mask_token_id if config.diffusion_kind == "absorbing" else None
    return HeadRows(outputs.hidden_rows, outputs.head_weight, outputs.head_bias, mask_token_id)


@dataclass
class MDLMHiddenRowsOutput(ModelOutput):
    """What a loss needs to run the head itself, chunk by chunk.

    The head's parameters are views, made inside the forward: the wrappers that train the model (DDP, ZeRO-3) then see
    them used, and have them whole and ready for their gradient when the backward comes.

    Args:
        hidden_rows: [rows, hidden_size], the trunk's output at the positions asked for.
        head_weight: [vocab_size, hidden_size].
        head_bias: [vocab_size].
    """

    hidden_rows: torch.FloatTensor | None = None
    head_weight: torch.FloatTensor | None = None
    head_bias: torch.FloatTensor | None = None
