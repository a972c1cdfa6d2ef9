"""A coupled draw: a hidden Markov chain over the factorised head, so that the tokens of one step know of each other.

The network gives every masked position a distribution p_i(v) of its own. With hidden states s = 1 .. S,

    p(x) = 1/Z  chain(x)  prod_i p_i(x_i)          chain(x) = sum over state paths of  a[s_1]  prod_i T[s_i-1, s_i]  prod_i W[x_i, s_i]

W[v, s] > 0 says what token v tells about the state, sum_s W[v, s] = 1; a and T are positive and need no norm, since Z has
it. Where a, T are all ones, or S = 1, chain(x) is constant and the draw is the factorised one. What a position says about
its state is its evidence e_i[s]:

    masked, not revealed now     sum_v p_i(v) W[v, s]      (the token is summed out)
    visible                      W[x_i, s]

Z is the forward algorithm over e; a set G of tokens has the probability prod_G p_i(x_i) Z(e with W[x_i] in G) / Z(e); and
states drawn from right to left, then each token from p_i(v) W[v, s_i], are an exact joint draw. All from one forward of the
network. The idea of a chain over the head is that of CoDD (arXiv 2603.00045), for masks of a block; see docs/coupling.md.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init


class CouplingWeights(NamedTuple):
    """The parameters of a coupling with K levels, S states and a vocabulary of V: logarithms of a, T, and W before its softmax.

    Args:
        start: [K, S].
        transition: [K, S, S], from the state of a position to that of the next.
        emission: [K, S, V], or with an `embedding` [K, S, d].
        embedding: [V, d], the network's token embedding, or None.
        powers: [K, 3] of a chain that all levels share, or None. The first three have one level then, and each level
            multiplies start, transition and emission by numbers of its own: zeros for the first two switch the chain off.
    """

    start: torch.Tensor
    transition: torch.Tensor
    emission: torch.Tensor
    embedding: torch.Tensor | None = None
    powers: torch.Tensor | None = None

    @property
    def levels(self) -> int:
        return len(self.start if self.powers is None else self.powers)

    def at(self, level: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """log a [S], log T [S, S], and log W before its softmax [S, V or d], of one level."""
        parts = (self.start, self.transition, self.emission)
        if self.powers is None:
            return [part[level].to(dtype) for part in parts]
        return [part[0].to(dtype) * power for part, power in zip(parts, self.powers[level].to(dtype), strict=True)]


class MDLMCoupling(nn.Module):
    """The parameters of a chain for each of some levels of noise. At the start the draw is the factorised one."""

    def __init__(self, config):
        super().__init__()
        levels, states, shared = (config.coupling[name] for name in ("levels", "states", "shared"))
        self.powers = nn.Parameter(torch.empty(levels, 3)) if shared else None
        chains = 1 if shared else levels
        self.low_rank = config.coupling["emission"] == "embedding"
        self.width = width = config.hidden_size if self.low_rank else config.vocab_size
        self.start = nn.Parameter(torch.empty(chains, states))
        self.transition = nn.Parameter(torch.empty(chains, states, states))
        self.emission = nn.Parameter(torch.empty(chains, states, width))

    def initialize(self):
        init.zeros_(self.start)
        init.zeros_(self.transition)  # T is all ones: the draw is the factorised one, whatever the emission
        init.normal_(self.emission, std=self.width**-0.5 if self.low_rank else 1.0)
        if self.powers is not None:
            init.ones_(self.powers)

    @torch.no_grad()
    def separate(self):
        """Gives each level a chain of its own in place of the shared one: the shared one at its powers, so no law changes."""
        shared = CouplingWeights(self.start, self.transition, self.emission, powers=self.powers)
        levels = [shared.at(level, self.start.dtype) for level in range(shared.levels)]
        self.start, self.transition, self.emission = (nn.Parameter(torch.stack(x)) for x in zip(*levels, strict=True))
        self.powers = None

    def forward(self, embedding: torch.Tensor) -> CouplingWeights:
        """Views of the parameters, made in the network's forward for the wrappers that train it, as in `HeadRows`."""
        own = (weight.view_as(weight) for weight in (self.start, self.transition, self.emission))
        powers = None if self.powers is None else self.powers.view_as(self.powers)
        return CouplingWeights(*own, embedding.detach() if self.low_rank else None, powers)


class Chains:
    """The chain of each level of noise.

    Args:
        weights: of the coupling.
        window: positions after which a chain begins anew; None: never.
        dtype: of the arithmetic; float64, or float32, whose log Z is exact to about 1e-6 of itself.
    """

    def __init__(self, weights: CouplingWeights, window: int | None, dtype: torch.dtype = torch.float64):
        self.weights, self.window, self.dtype = weights, window, dtype
        self._chains: dict[int, Chain] = {}

    def levels_of(self, gamma: torch.Tensor) -> torch.LongTensor:
        """Numbers of the levels of rows whose tokens are visible with probability gamma: K equal parts of [0, 1]."""
        levels = self.weights.levels
        return (gamma * levels).long().clamp(max=levels - 1)

    def at(self, level: int) -> "Chain":
        """The chain of a level, made when it is first asked for."""
        if level not in self._chains:
            self._chains[level] = self._make(level)
        return self._chains[level]

    def _make(self, level: int) -> "Chain":
        start, transition, emission = self.weights.at(level, self.dtype)
        if self.weights.embedding is not None:
            # Standardised over the vocabulary: an embedding's numbers may be small, and have a mean that says nothing.
            vectors = self.weights.embedding.to(self.dtype)
            vectors = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0).clamp(min=1e-6)
            emission = emission @ vectors.T
        return Chain(start.exp(), transition.exp(), emission.T.log_softmax(dim=-1), self.window)


@dataclass(frozen=True)
class Chain:
    """One chain: a, T, log W, and the law of what it joins.

    Below, `evidence` is [B, L, S]; `present` [B, L] bool are the positions that the chain runs through: it passes over the
    others (padding, say) as if they were not there.

    Args:
        start: a, [S].
        transition: T, [S, S].
        log_emission: log W, [V, S].
        window: see `Chains`.
    """

    start: torch.Tensor
    transition: torch.Tensor
    log_emission: torch.Tensor
    window: int | None = None

    @functools.cached_property
    def emission(self) -> torch.Tensor:
        """W, [V, S]."""
        return self.log_emission.exp()

    def log_gain(
        self,
        evidence: torch.Tensor,
        present: torch.BoolTensor,
        revealed: torch.BoolTensor,
        tokens: torch.LongTensor,
    ) -> torch.Tensor:
        """log p(x_G) less sum_G log p_i(x_i), [B]: what the chain adds to the log-probability of the revealed tokens.

        Args:
            evidence: with the revealed positions summed out, as all masked ones.
            revealed: G, [B, L] bool.
            tokens: x, [B, L]; those outside G are not looked at.
        """
        known = torch.where(revealed[..., None], self.emission[tokens], evidence)
        joint, total = self.log_sum(torch.cat([known, evidence]), present.repeat(2, 1)).chunk(2)
        return joint - total

    def log_sum(self, evidence: torch.Tensor, present: torch.BoolTensor) -> torch.Tensor:
        """log Z, [B]: of the sum over all state paths of a, T and the evidence, by the forward algorithm."""
        log_z, _ = self._forward(self._cut(evidence, 1), self._cut(present, False))
        return log_z.view(len(evidence), -1).sum(dim=1)

    def draw(
        self,
        evidence: torch.Tensor,
        present: torch.BoolTensor,
        drawn: torch.BoolTensor,
        uniforms: torch.Tensor,
        temperature: float = 1.0,
    ) -> torch.LongTensor:
        """The states [B, L] of the `drawn` positions from their joint law, every other position summed out.

        Forward filtering, backward sampling: from right to left, a state is drawn given the states already drawn on its
        right and all evidence. A position uses its own uniform, and only if it is drawn.

        Args:
            drawn: [B, L] bool, within `present`; the states elsewhere mean nothing.
            uniforms: [B, L] float64, in [0, 1).
            temperature: sharpens the law of each state given those on its right; 0 takes the likeliest.

        Returns:
            int64; -1 in windows whose evidence holds a NaN.
        """
        shape, (evidence, present, drawn, uniforms) = (
            drawn.shape,
            (self._cut(x, fill) for x, fill in ((evidence, 1), (present, False), (drawn, False), (uniforms, 0))),
        )
        log_z, joints = self._forward(evidence, present)
        some, every, passed_over = (x.tolist() for x in (drawn.any(dim=0), drawn.all(dim=0), ~present.all(dim=0)))
        back, here, uniforms = self.transition.T.contiguous(), evidence.unbind(dim=1), uniforms.unbind(dim=1)
        behind = torch.ones_like(joints[0])  # what the positions on the right say about this one's state
        states = [drawn.new_zeros(len(drawn), dtype=torch.long)] * len(joints)
        for i in reversed(range(len(states))):
            if some[i]:
                states[i] = _pick(joints[i] * behind, uniforms[i], temperature)
                passed = back[states[i]]
            if not every[i]:
                known = here[i] * behind
                summed_out = known / known.sum(dim=-1, keepdim=True) @ back
                passed = torch.where(drawn[:, i, None], passed, summed_out) if some[i] else summed_out
            behind = torch.where(present[:, i, None], passed, behind) if passed_over[i] else passed
        states = torch.stack(states, dim=1).where(log_z.isfinite()[:, None], -1)
        return states.view(shape[0], -1)[:, : shape[1]]

    def _forward(self, evidence: torch.Tensor, present: torch.BoolTensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The forward algorithm, scaled at each position: log Z [B], and the weights of each state with its evidence."""
        state, joints, scales = self.start.expand(len(evidence), -1), [], []
        passed_over = (~present.all(dim=0)).tolist()
        for i, here in enumerate(evidence.unbind(dim=1)):
            joints.append(state * here)
            scales.append(joints[i].sum(dim=-1, keepdim=True))
            passed = joints[i] / scales[i] @ self.transition
            state = torch.where(present[:, i, None], passed, state) if passed_over[i] else passed
        return torch.cat(scales, dim=1).log().where(present, 0).sum(dim=1), joints

    def _cut(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """Values [B, L, ...] as windows [B * n, w, ...], the last one filled up."""
        if self.window is None:
            return values
        missing = -values.shape[1] % self.window
        values = torch.cat([values, values.new_full((len(values), missing, *values.shape[2:]), fill)], dim=1)
        return values.reshape(-1, self.window, *values.shape[2:])


def _pick(weights: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> torch.LongTensor:
    """One index a row from weights [B, S], to the power 1 / temperature, by inversion: [B]."""
    if temperature == 0:
        return weights.argmax(dim=-1)
    if temperature != 1:
        weights = (weights / weights.amax(dim=-1, keepdim=True)) ** (1 / temperature)
    cumulative = weights.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return found[:, 0].clamp(max=weights.shape[-1] - 1)
