"""The mean of a loss over a batch: over its tokens, or first over the tokens of each sequence."""

import torch

from modeling_mcd.forward_process_mdlm import at_positions


LOSS_NORMS = ("tokens", "sequence")


class BatchMean:
    """A loss is `total(values, positions) / count`, with v_i the value of token i and A_b the tokens of row b that count:

        tokens      sum_b sum_i v_i / sum_b |A_b|
        sequence    (1 / B) sum_b sum_i v_i / |A_b|       B rows with |A_b| > 0; a short answer weighs as much as a long one

    Args:
        counted: [B, L] bool: the tokens A.
        norm: one of `LOSS_NORMS`.
    """

    def __init__(self, counted: torch.BoolTensor, norm: str):
        if norm == "tokens":
            self.lengths, count = None, counted.sum()
        else:
            self.lengths = counted.sum(dim=1)
            count = (self.lengths > 0).sum()
        self.count = count.clamp(min=1)

    def total(self, values: torch.Tensor, positions: torch.BoolTensor) -> torch.Tensor:
        """The numerator, of the values [R] at some positions [B, L]."""
        return (values if self.lengths is None else values / at_positions(self.lengths, positions)).sum()
