"""MAUVE: how far the law of samples is from that of text, measured in the hidden states of a language model.

Pillutla et al., arXiv 2102.01454 and 2212.14578. The steps are those of the package `mauve-text`: features of unit length,
principal components that keep 90% of the variance, k-means, and the divergence curve of the two histograms. This is a
computation of our own, with a k-means of our own: it differs from the package by what another start of k-means changes.

A figure depends on the number of texts, their length, the model of the features, the scale c and the seed. So it is
compared only with figures of the same settings, and with the ceiling: what held-out text itself reaches.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.judge import context_of, describe_judge
from modeling_mcd.checks_mdlm import AT_LEAST_1, COUNT, check_number


SEED = 25
RESTARTS = 5
ITERATIONS = 500  # of k-means, at most
EXPLAINED = 0.9  # share of the variance that the principal components keep
SCALE, POINTS = 5.0, 25  # c, and the mixtures on the curve


@dataclass(frozen=True)
class Mauve:
    """
    Args:
        mauve: area under the divergence curve, in [0, 1]; 1 is best.
        smoothed: the same of histograms with 1/2 added to each count (Krichevsky-Trofimov), better for few texts.
        frontier_integral: in [0, 1]; 0 is best. It does not depend on c.
        buckets: clusters of k-means.
    """

    mauve: float
    smoothed: float
    frontier_integral: float
    buckets: int


@dataclass
class MauveReference:
    """Held-out text, with which samples are compared.

    Args:
        texts: at least 2.
        model: any causal language model; its hidden states are the features.
        tokenizer: its tokenizer.
        batch_size: texts at a time; changes no figure beyond rounding.
    """

    texts: Sequence[str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8

    def __post_init__(self):
        if len(self.texts) < 2:
            raise ValueError(
                f"MAUVE compares two sets of texts: the reference needs at least 2, not {len(self.texts)}"
            )

    @cached_property
    def features(self) -> torch.Tensor:
        return self.features_of(self.texts)

    @cached_property
    def description(self) -> str:
        return f"{describe_judge(self.model)} on {len(self.texts)} held-out texts"

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the texts. Not of the features, whose last bits depend on the machine."""
        return hashlib.sha256("\0".join(self.texts).encode(errors="surrogatepass")).hexdigest()[:16]

    def features_of(self, texts: Sequence[str]) -> torch.Tensor:
        return text_features(texts, self.model, self.tokenizer, self.batch_size)

    def compare(self, features: torch.Tensor) -> Mauve:
        return mauve(features, self.features)


@torch.inference_mode()
def text_features(
    texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> torch.Tensor:
    """The last layer's hidden state at the last token of each text, [n, d] float32 on the CPU. Puts the model in eval mode.

    A text longer than the model's context is cut at its end. A text without tokens is read as an end of text.

    Raises:
        ValueError: batch_size is below 1, or there is an empty text and the tokenizer has no EOS.
    """
    check_number("batch_size", batch_size, COUNT)
    model.eval()
    context, rows = context_of(model), []
    for text in texts:
        ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"] or [tokenizer.eos_token_id]
        if ids == [None]:
            raise ValueError("a text is empty, and the tokenizer has no EOS that could stand for it")
        rows.append(torch.tensor(ids[:context]))
    features = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # Padding is on the right, where a causal model cannot see it.
        input_ids = pad_sequence(batch, batch_first=True).to(model.device)
        hidden = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
        last = torch.tensor([len(row) - 1 for row in batch], device=hidden.device)
        features.append(hidden[torch.arange(len(batch), device=hidden.device), last].float().cpu())
    return torch.cat(features) if features else torch.empty(0, 0)


def mauve(p: torch.Tensor, q: torch.Tensor, buckets: int | None = None, seed: int = SEED) -> Mauve:
    """MAUVE of the features of two sets of texts, [n, d] and [m, d].

    Args:
        buckets: clusters; a tenth of the smaller set by default, and at least 2.
        seed: of k-means.

    Raises:
        ValueError: fewer than 2 rows in a set, features that are not finite, other widths, or more buckets than rows.
    """
    if min(len(p), len(q)) < 2 or p.shape[1:] != q.shape[1:]:
        raise ValueError(
            f"MAUVE needs two matrices of at least 2 rows and one width, not {list(p.shape)} and {list(q.shape)}"
        )
    if not (p.isfinite().all() and q.isfinite().all()):
        raise ValueError("MAUVE: a feature is not finite")
    buckets = max(2, round(min(len(p), len(q)) / 10)) if buckets is None else buckets
    check_number("buckets", buckets, AT_LEAST_1)
    if buckets > len(p) + len(q):
        raise ValueError(f"buckets is {buckets}, more than the {len(p) + len(q)} texts")
    rows = principal_components(torch.nn.functional.normalize(torch.cat([p, q]).double(), dim=1))
    cluster = k_means(rows, buckets, torch.Generator().manual_seed(seed))
    counts = [torch.bincount(part, minlength=buckets).double() for part in (cluster[: len(p)], cluster[len(p) :])]
    one, other = (count / count.sum() for count in counts)
    smooth = ((count + 0.5) / (count + 0.5).sum() for count in counts)
    return Mauve(curve_area(one, other), curve_area(*smooth), frontier_integral(one, other), buckets)


def principal_components(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, d] in the coordinates of the fewest principal components that hold `EXPLAINED` of their variance."""
    centred = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    kept = int((variances.cumsum(0) < EXPLAINED * variances.sum()).sum()) + 1
    return centred @ directions[:, :kept]


def k_means(rows: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """The cluster [n] of each row: the best of `RESTARTS` runs of Lloyd's algorithm from k-means++ starts."""
    best, least = None, float("inf")
    for _ in range(RESTARTS):
        centres = _spread_start(rows, clusters, generator)
        labels = None
        for _ in range(ITERATIONS):
            distances = torch.cdist(rows, centres)
            nearest, new = distances.min(dim=1)
            if labels is not None and torch.equal(new, labels):
                break
            labels = new
            sizes = torch.bincount(labels, minlength=clusters)
            sums = torch.zeros_like(centres).index_add_(0, labels, rows)
            centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
            empty = (sizes == 0).nonzero().flatten()
            centres[empty] = rows[nearest.topk(len(empty)).indices]  # where they help most
        cost = nearest.square().sum().item()
        if cost < least:
            best, least = labels, cost
    return best


def _spread_start(rows: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Centres as k-means++ chooses them: each in proportion to the squared distance from those before."""
    chosen = [torch.randint(len(rows), (1,), generator=generator)]
    distances = (rows - rows[chosen[0]]).square().sum(dim=1)
    for _ in range(1, clusters):
        weights = distances if distances.sum() > 0 else torch.ones_like(distances)
        chosen.append(torch.multinomial(weights, 1, generator=generator))
        distances = torch.minimum(distances, (rows - rows[chosen[-1]]).square().sum(dim=1))
    return rows[torch.cat(chosen)]


def curve_area(p: torch.Tensor, q: torch.Tensor, scale: float = SCALE, points: int = POINTS) -> float:
    """Area under the divergence curve of two histograms [k] that add up to 1.

    The curve goes through (exp(-c KL(q | r)), exp(-c KL(p | r))) for r = w p + (1 - w) q, w from 0 to 1.
    """
    weights = torch.linspace(1e-6, 1 - 1e-6, points, dtype=torch.float64)[:, None]
    mixture = weights * p + (1 - weights) * q
    x, y = ((-scale * _divergence(one, mixture)).exp() for one in (q, p))
    # From (1, 0), where the mixture is q, to (0, 1).
    x = torch.cat([torch.tensor([1.0]), x, torch.tensor([0.0])])
    y = torch.cat([torch.tensor([0.0]), y, torch.tensor([1.0])])
    return torch.trapezoid(x, y).item()


def _divergence(p: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
    """KL(p | r) for each r of a mixture [points, k], nats."""
    return (torch.xlogy(p, p) - torch.xlogy(p, mixture)).sum(dim=1)


def frontier_integral(p: torch.Tensor, q: torch.Tensor) -> float:
    """The integral over w of 2 (w KL(p | r) + (1 - w) KL(q | r)), r = w p + (1 - w) q, in closed form (arXiv 2106.07898)."""
    same = (p - q).abs() < 1e-8
    gap = torch.where(same, torch.ones_like(p), p - q)
    both = torch.where((p > 0) & (q > 0), p * q * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()) / gap, 0.0)
    return torch.where(same, torch.zeros_like(p), (p + q) / 2 - both).sum().item()
