"""The gradient moment: whether samples pull a language model's weights as text does.

For a language model that neither wrote the samples nor judges them, g(x) is the gradient of its loss on a text x (mean nats per
token) by its weights. The figure is an unbiased estimate of

    | E_samples g - E_text g |^2

(Hoogeboom et al., arXiv 2603.20155): 0 where the samples have the law of the text, whatever the model. It sees what Gen-PPL and
the entropy within a sample cannot: samples that are alike, or that fit the model too well. The scale depends on the model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.generative_perplexity import read_as_judge
from evaluation.judge import context_of
from evaluation.team import Team


PART = 2**22  # numbers that are multiplied at a time in float64


@dataclass(frozen=True)
class Gradients:
    """What a set of texts says about the mean of its gradients.

    Args:
        total: [P] float32, CPU: the sum of g over the texts.
        squares: the sum of |g|^2.
        count: the texts with a token to predict; others have no gradient.
    """

    total: torch.Tensor
    squares: float
    count: int

    def over(self, team: Team) -> "Gradients":
        """Those of all processes of a team together."""
        parts = team.gather((self.squares, self.count))
        return Gradients(team.sum(self.total), sum(square for square, _ in parts), sum(count for _, count in parts))


@dataclass
class GradientReference:
    """Held-out text, with which samples are compared.

    Args:
        texts: as the model reads them, at least 2.
        model: any causal language model.
        tokenizer: its tokenizer.
    """

    texts: Sequence[str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def gradients(self) -> Gradients:
        return self.gradients_of(self.texts)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of the texts."""
        return hashlib.sha256("\0".join(self.texts).encode(errors="surrogatepass")).hexdigest()[:16]

    def gradients_of(self, texts: Sequence[str]) -> Gradients:
        return text_gradients(texts, self.model, self.tokenizer)

    def compare(self, gradients: Gradients) -> float:
        return gradient_moment(gradients, self.gradients)


def text_gradients(texts: Sequence[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Gradients:
    """The gradients of a model's loss on texts, one at a time. Puts the model in eval mode; its weights keep no gradient.

    A text longer than the model's context is cut at its end.
    """
    model.eval()
    weights = list(model.parameters())
    total = torch.zeros(sum(weight.numel() for weight in weights))
    squares, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([read_as_judge(text, tokenizer)[: context_of(model)]], device=model.device)
        if ids.shape[1] < 2:
            continue
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = cross_entropy(logits.float(), ids[0, 1:])
            gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        gradient = torch.cat([part.flatten().float().cpu() for part in gradients])
        total += gradient
        squares += dot(gradient, gradient)
        count += 1
    return Gradients(total, squares, count)


def gradient_moment(p: Gradients, q: Gradients) -> float:
    """|E_p g - E_q g|^2 without bias, for the gradients of one model: it may be negative where the two laws are near.

    Of n texts, (|sum g|^2 - sum |g|^2) / (n (n - 1)) is the mean of g_i g_j over i != j, and so has the expectation |E g|^2.

    Raises:
        ValueError: a set has fewer than 2 texts with a token to predict.
    """
    if min(p.count, q.count) < 2:
        raise ValueError(f"it needs at least 2 texts of 2 tokens on either side, not {p.count} and {q.count}")
    own = sum((dot(g.total, g.total) - g.squares) / (g.count * (g.count - 1)) for g in (p, q))
    return own - 2 * dot(p.total, q.total) / (p.count * q.count)


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """The scalar product of two vectors, added up in float64."""
    parts = zip(one.split(PART), other.split(PART), strict=True)
    return sum((a.double() @ b.double()).item() for a, b in parts)
