"""The mean of a loss over a batch: over its tokens, or first over the tokens of each sequence."""

import torch

from modeling_mcd.forward_process_mdlm import at_positions


LOSS_NORMS = ("tokens", "sequence")


class BatchMean:
    """A loss is `total(values, positions) / count`, with v_i the value of token i and A_b the tokens of row b that count:

        tokens      sum_b sum_i v_i / sum_b |A_b|
        sequence    (1 / B) sum_b sum_i v_i / |A_b|       B rows with |A_b| > 0; a short answer weighs as much as a long one

    Args:
        counted: [R, n] bool: the tokens A, of whole rows or of their blocks, one after the other.
        norm: one of `LOSS_NORMS`.
        rows: B.
    """

    def __init__(self, counted: torch.BoolTensor, norm: str, rows: int):
        self.lengths, self.count = None, counted.sum().clamp(min=1)
        if norm == "sequence":
            lengths = counted.reshape(rows, -1).sum(dim=1)
            self.count = (lengths > 0).sum().clamp(min=1)
            self.lengths = lengths.clamp(min=1).repeat_interleave(len(counted) // rows)

    def total(self, values: torch.Tensor, positions: torch.BoolTensor) -> torch.Tensor:
        """The numerator, of the values at some positions [R, n]."""
        return (values if self.lengths is None else values / at_positions(self.lengths, positions)).sum()

    def total_of_rows(self, values: torch.Tensor) -> torch.Tensor:
        """The numerator, of the values [R] of complete rows or blocks."""
        return (values if self.lengths is None else values / self.lengths).sum()
