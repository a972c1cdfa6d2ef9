"""Statistical tests of the tests: random numbers from a seed, and Pearson's chi-squared against an exact law."""

import torch
from scipy.stats import chi2


FALSE_ALARM = 1e-5


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's chi-squared, rare outcomes in one cell. An outcome of probability zero must not occur at all."""
    assert counts.shape == law.shape and abs(law.sum() - 1) < 1e-9
    assert (counts[law == 0] == 0).all()
    order = law.argsort()
    counts, expected = counts[order].double(), law[order] * counts.sum()
    rare = int((expected.cumsum(0) < 10).sum()) + 1
    counts, expected = (torch.cat([x[:rare].sum()[None], x[rare:]]) for x in (counts, expected))
    assert len(expected) > 1
    return chi2.sf(((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1)
