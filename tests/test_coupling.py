"""The coupled draw: normalisation and marginals by enumeration, its law by chi-squared, its gradient, toys that only it can do."""

import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
from laws import FALSE_ALARM, p_value
from tiny_run import ROOT
from toy import counts_of, finish, index_of, table_of_logits, toy_canvas

from evaluation.sampler_likelihood import TeacherForcedCanvas
from modeling_mcd.coupling_mdlm import Chain, Chains, CouplingWeights
from modeling_mcd.draws_mdlm import draw_tokens
from modeling_mcd.loading import load_model
from modeling_mcd.sampling_mdlm import SAMPLERS


TOKENS, STATES = 3, 3
TINY = ROOT / "recipes" / "tiny"


def weights(states=STATES, tokens=TOKENS, levels=1, strength=2.0, seed=0) -> CouplingWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = (levels, states), (levels, states, states), (levels, states, tokens)
    return CouplingWeights(
        *(strength * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    )


def chain_of(window=None, **options) -> Chain:
    return Chains(weights(**options), window).at(0)


def chain_weight(chain: Chain, text) -> float:
    """chain(x): the sum over all state paths, written out."""
    start, transition, emission = chain.start.tolist(), chain.transition.tolist(), chain.emission.tolist()
    total = 0.0
    for path in itertools.product(range(len(start)), repeat=len(text)):
        weight = 1.0
        for i, (token, state) in enumerate(zip(text, path, strict=True)):
            fresh = i == 0 or (chain.window is not None and i % chain.window == 0)
            weight *= (start[state] if fresh else transition[path[i - 1]][state]) * emission[token][state]
        total += weight
    return total


def law_of(chain: Chain, p: torch.Tensor, given: dict[int, int] | None = None) -> dict[tuple[int, ...], float]:
    """p(x) = chain(x) prod p_i(x_i) / Z by enumeration, for p [L, V]; `given` are the visible tokens."""
    weights, p = {}, p.tolist()
    for text in itertools.product(range(len(p[0])), repeat=len(p)):
        if all(text[i] == token for i, token in (given or {}).items()):
            alone = math.prod(p[i][token] for i, token in enumerate(text) if i not in (given or {}))
            weights[text] = alone * chain_weight(chain, text)
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def distributions(length=4, tokens=TOKENS, seed=3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, tokens, dtype=torch.float64, generator=generator).softmax(-1)


def evidence_of(chain: Chain, p: torch.Tensor, given: dict[int, int]) -> torch.Tensor:
    evidence = p @ chain.emission
    for i, token in given.items():
        evidence[i] = chain.emission[token]
    return evidence


def check_marginals(chain: Chain, given: dict[int, int]):
    """Every subset of the masked positions: its probabilities are those of the enumeration, and sum to one."""
    p = distributions()
    law, evidence = law_of(chain, p, given), evidence_of(chain, p, given)
    masked = [i for i in range(4) if i not in given]
    present = torch.ones(1, 4, dtype=torch.bool)
    for count in range(1, len(masked) + 1):
        for subset in itertools.combinations(masked, count):
            revealed = torch.zeros(1, 4, dtype=torch.bool)
            revealed[0, list(subset)] = True
            total = 0.0
            every = list(itertools.product(range(TOKENS), repeat=count))
            texts = torch.zeros(len(every), 4, dtype=torch.long)
            texts[:, list(subset)] = torch.tensor(every)
            rows = (x.expand(len(every), *x.shape[1:]) for x in (evidence[None], present, revealed))
            for values, found in zip(every, chain.log_gain(*rows, texts).exp().tolist(), strict=True):
                found *= math.prod(p[i, v].item() for i, v in zip(subset, values, strict=True))
                exact = sum(q for x, q in law.items() if all(x[i] == v for i, v in zip(subset, values, strict=True)))
                assert found == pytest.approx(exact, abs=1e-12)
                total += found
            assert abs(total - 1) < 1e-10


@pytest.mark.parametrize("window", [None, 2, 3])
@pytest.mark.parametrize("given", [{}, {1: 2}, {0: 1, 3: 0}])
def test_every_revealed_subset_has_its_marginal_law(given, window):
    check_marginals(chain_of(window), given)


def test_a_wrong_norm_is_seen(monkeypatch):
    right = Chain.log_sum
    monkeypatch.setattr(Chain, "log_sum", lambda self, evidence, present: right(self, evidence * 0.999, present))
    check_marginals(chain_of(), {1: 2})  # a factor of all evidence cancels
    monkeypatch.setattr(
        Chain, "log_sum", lambda self, evidence, present: right(self, evidence.clamp(min=0.05), present)
    )
    with pytest.raises(AssertionError):
        check_marginals(chain_of(), {1: 2})


def test_the_chain_passes_over_what_is_not_present():
    chain, evidence = chain_of(), torch.rand(2, 5, STATES, dtype=torch.float64)
    present = torch.tensor([[True, False, True, True, False], [False, False, True, True, True]])
    found = chain.log_sum(evidence, present)
    for row in range(2):
        kept = evidence[row, present[row]][None]
        alone = chain.log_sum(kept, torch.ones(1, 3, dtype=torch.bool))
        assert found[row].item() == pytest.approx(alone.item(), abs=1e-12)


def test_windows_are_chains_of_their_own():
    chain, evidence = chain_of(window=3), torch.rand(2, 8, STATES, dtype=torch.float64)
    parts = evidence.split(3, dim=1)
    alone = sum(chain_of().log_sum(part, torch.ones(part.shape[:2], dtype=torch.bool)) for part in parts)
    torch.testing.assert_close(chain.log_sum(evidence, torch.ones(2, 8, dtype=torch.bool)), alone)


def test_scaled_float32_is_right_to_1e_6():
    many = weights(states=64, tokens=48)
    wide, narrow = Chains(many, None).at(0), Chains(many, None, torch.float32).at(0)
    tokens = torch.randint(48, (4, 256), generator=torch.Generator().manual_seed(0))
    present = torch.ones(4, 256, dtype=torch.bool)
    exact = wide.log_sum(wide.emission[tokens], present)
    found = narrow.log_sum(narrow.emission[tokens], present).double()
    assert exact.abs().min() > 100 and ((found - exact) / exact).abs().max() < 1e-6


def test_gradients_are_those_of_finite_differences():
    p, text = distributions(), torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    present = torch.tensor([[True] * 4, [True, True, False, True]])
    revealed = torch.tensor([[True, False, True, False], [False, False, False, True]])

    def gain(*values):
        chain = Chains(CouplingWeights(*values), window=3).at(0)
        return chain.log_gain((p @ chain.emission).expand(2, 4, -1), present, revealed, text)

    assert torch.autograd.gradcheck(gain, tuple(value.requires_grad_() for value in weights()[:3]))


def test_low_rank_emission_is_against_the_standardised_embedding():
    embedding = torch.randn(TOKENS, 5, dtype=torch.float64) * 0.01 + 3
    own = CouplingWeights(*weights()[:2], torch.randn(1, STATES, 5, dtype=torch.float64), embedding)
    shown = (embedding - embedding.mean(0)) / embedding.std(0)
    logits = [[sum(own.emission[0, s] * shown[v]).item() for s in range(STATES)] for v in range(TOKENS)]
    torch.testing.assert_close(Chains(own, None).at(0).log_emission, torch.tensor(logits).double().log_softmax(-1))


# --- The draw


@pytest.mark.parametrize(("drawn", "given"), [((0, 1, 2, 3), {}), ((0, 3), {}), ((1, 2), {0: 2}), ((2,), {1: 0})])
@pytest.mark.parametrize("window", [None, 3])
def test_joint_draws_have_the_law(drawn, given, window):
    """States right to left, then tokens: what is not drawn is summed out, with one uniform a position."""
    chain, p, draws = chain_of(window), distributions(), 40_000
    generator = torch.Generator().manual_seed(5)
    wanted = torch.zeros(draws, 4, dtype=torch.bool)
    wanted[:, list(drawn)] = True
    w, v = torch.rand(2, draws, 4, dtype=torch.float64, generator=generator)
    evidence = evidence_of(chain, p, given).expand(draws, -1, -1)
    states = chain.draw(evidence, torch.ones(draws, 4, dtype=torch.bool), wanted, w)
    places = [draw_tokens(p[i].log() + chain.log_emission.T[states[:, i]], v[:, i], mask_token_id=None) for i in drawn]
    law, exact = law_of(chain, p, given), torch.zeros(TOKENS ** len(drawn), dtype=torch.float64)
    base = [TOKENS**k for k in range(len(drawn))]
    for text, q in law.items():
        exact[sum(text[i] * b for i, b in zip(drawn, base, strict=True))] += q
    counts = sum(tokens * b for tokens, b in zip(places, base, strict=True)).bincount(minlength=len(exact))
    assert p_value(counts, exact) > FALSE_ALARM
    alone = torch.ones((), dtype=torch.float64)  # and the marginals alone, without the coupling, are told apart
    for i in drawn:
        marginal = [sum(q for text, q in law.items() if text[i] == token) for token in range(TOKENS)]
        alone = (torch.tensor(marginal, dtype=torch.float64)[:, None] * alone).flatten()
    joined = len(drawn) > 1 and not (window == 3 and drawn == (0, 3))
    assert not joined or p_value(counts, alone / alone.sum()) < FALSE_ALARM


def texts_of(length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(TOKENS), repeat=length)))


def law_of_weights(start, transition, weights: torch.Tensor) -> torch.Tensor:
    """The law of all texts of a chain whose positions have the weights [L, V, S]."""
    texts = texts_of(len(weights))
    state = start * weights[0][texts[:, 0]]
    for i in range(1, len(weights)):
        state = state @ transition * weights[i][texts[:, i]]
    return state.sum(-1) / state.sum()


def law_of_sharpened_draws(start, transition, weights: torch.Tensor, power: float) -> torch.Tensor:
    """Every draw to a power by itself: states from right to left given those on their right, and tokens given their states."""
    texts, evidence, before = texts_of(len(weights)), weights.sum(1), [start]
    for i in range(len(weights) - 1):
        before.append(before[-1] * evidence[i] @ transition)
    paths = torch.tensor(list(itertools.product(range(len(start)), repeat=len(weights))))
    chances, drawn = torch.ones(len(paths), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for i, tokens in enumerate(x / x.sum(0) for x in weights**power):
        told = transition[:, paths[:, i + 1]].T if i + 1 < len(weights) else 1
        chance = (before[i] * evidence[i] * told).expand(len(paths), -1) ** power
        chances = chances * (chance / chance.sum(-1, keepdim=True)).gather(-1, paths[:, i, None])[:, 0]
        drawn = drawn * tokens[texts[:, i]][:, paths[:, i]]
    return drawn @ chances


def test_a_temperature_sharpens_each_draw_by_itself():
    chain, p, draws = chain_of(strength=1.0), distributions(), 40_000
    everything = torch.ones(draws, 4, dtype=torch.bool)
    w, v = torch.rand(2, draws, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    evidence = evidence_of(chain, p, {}).expand(draws, -1, -1)
    states = chain.draw(evidence, everything, everything, w, 0.6)
    index = torch.zeros(draws, dtype=torch.long)
    for i in range(4):
        logits = p[i].log() + chain.log_emission.T[states[:, i]]
        index = TOKENS * index + draw_tokens(logits, v[:, i], mask_token_id=None, temperature=0.6)
    arguments = chain.start, chain.transition, p[:, :, None] * chain.emission
    counts = index.bincount(minlength=TOKENS**4)
    assert p_value(counts, law_of_sharpened_draws(*arguments, 1 / 0.6)) > FALSE_ALARM
    assert p_value(counts, law_of_sharpened_draws(*arguments, 1 / 0.66)) < FALSE_ALARM, "the test has no power"


def test_meanings_of_a_temperature_at_equal_entropy():
    """How likely under the untempered law what each meaning draws is. None is better than p(x)^(1 / temperature), which no
    chain can draw from; the joint law of states and tokens comes close.
    """
    shares, excess, powers = (0.9, 0.8, 0.7), {}, torch.logspace(0, 1, 25).tolist()
    for seed in range(4):
        chain, p = chain_of(seed=seed, strength=1.5), distributions(seed=seed)
        a, transition, weights = chain.start, chain.transition, p[:, :, None] * chain.emission
        untempered = law_of_weights(a, transition, weights)
        best = curve_of([untempered**k / (untempered**k).sum() for k in powers], untempered)
        meanings = {
            "joint": [law_of_weights(a**k, transition**k, weights**k) for k in powers],
            "each draw": [law_of_sharpened_draws(a, transition, weights, k) for k in powers],
            "head and W": [law_of_weights(a, transition, weights**k) for k in powers],
            "head": [law_of_weights(a, transition, p[:, :, None] ** k * chain.emission) for k in powers],
        }
        for name, laws in meanings.items():
            curve = curve_of(laws, untempered)
            excess.setdefault(name, []).append([at_entropy(curve, s * best[0][0]) for s in shares])
            excess[name][-1] = [
                x - at_entropy(best, s * best[0][0]) for x, s in zip(excess[name][-1], shares, strict=True)
            ]
    mean = {name: torch.tensor(values).mean(dim=0).tolist() for name, values in excess.items()}
    assert min(map(min, mean.values())) > 0, "none beats the best"
    for i in range(2):
        assert mean["joint"][i] < 0.6 * min(values[i] for name, values in mean.items() if name != "joint"), mean


def curve_of(laws: list[torch.Tensor], untempered: torch.Tensor) -> list[tuple[float, float]]:
    """Of each law its entropy, and its cross-entropy under the untempered one, in nats."""
    return [(-torch.special.xlogy(q, q).sum().item(), -(q * untempered.log()).sum().item()) for q in laws]


def at_entropy(curve: list[tuple[float, float]], entropy: float) -> float:
    """The cross-entropy at an entropy between those of the curve, which fall; infinite where none is so low."""
    for (high, above), (low, below) in itertools.pairwise(curve):
        if low <= entropy <= high:
            return below + (above - below) * (entropy - low) / (high - low)
    return math.inf


def test_chains_go_with_the_step_that_made_them():
    """And not when garbage is collected: in training they hold the graph of their step."""
    chains = Chains(weights(), None)
    chain = weakref.ref(chains.at(0))
    gc.disable()
    try:
        del chains
        assert chain() is None
    finally:
        gc.enable()


def test_levels_are_equal_parts_of_the_visible_fraction():
    gamma = torch.tensor([0, 0.001, 0.2499, 0.25, 0.5005, 0.75025, 1.0], dtype=torch.float64)
    assert Chains(weights(levels=4), None).levels_of(gamma).tolist() == [0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("emission", ["table", "embedding"])
def test_a_shared_chain_is_taken_to_the_powers_of_its_level(build, emission, tmp_path):
    model = build()
    model.add_coupling({"states": 3, "levels": 2, "emission": emission})
    assert model.coupling.start.shape == (1, 3) and model.coupling.powers.eq(1).all()
    for weight in model.coupling.parameters():
        weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    coupling, loaded = model.coupling, load_model(str(tmp_path)).coupling
    chains = Chains(loaded(model.model.embed_tokens.weight), None)
    for level, (of_start, of_transition, of_emission) in enumerate(coupling.powers.double()):
        alone = CouplingWeights(
            coupling.start.double() * of_start,
            coupling.transition.double() * of_transition,
            coupling.emission.double() * of_emission,
            None if emission == "table" else model.model.embed_tokens.weight.double(),
        )
        for name in ("start", "transition", "log_emission"):
            expected = getattr(Chains(alone, None).at(0), name)
            torch.testing.assert_close(getattr(chains.at(level), name), expected, rtol=1e-5, atol=1e-5)
    coupling.powers.data[1] = 0  # the level joins nothing
    texts = torch.randint(0, 46, (3, 12), generator=torch.Generator().manual_seed(0))
    chain = Chains(coupling(model.model.embed_tokens.weight), None).at(1)
    gain = chain.log_gain(chain.emission[texts].roll(1, dims=1), *(torch.ones_like(texts).bool(),) * 2, texts)
    torch.testing.assert_close(gain, torch.zeros_like(gain), rtol=0, atol=1e-9)


TABLE = table_of_logits()


def coupled_toy(chains: Chains, draws: int, text=None, table=TABLE):
    plain = toy_canvas(table, [3, 3, 3], draws)
    denoiser = dataclasses.replace(plain.denoiser, chains=chains)
    if text is None:
        return type(plain)(plain.tokens, plain.fillable, plain.noise, denoiser)
    return TeacherForcedCanvas(text, plain.tokens, plain.fillable, plain.noise, denoiser)


def toy_chains(levels=1, **options) -> Chains:
    """Of four tokens, the last of which is the mask, which has no probability."""
    return Chains(weights(tokens=4, levels=levels, **options), None)


def step_law(chains: Chains, canvas, revealed, gamma: float) -> dict[tuple[int, ...], float]:
    """The law of the canvas after one step that reveals some positions, by enumeration."""
    p = TABLE[index_of(torch.tensor(canvas))].double()[:, :3].softmax(-1)
    given = {i: token for i, token in enumerate(canvas) if token != 3}
    after = {}
    for text, q in law_of(chains.at(int(chains.levels_of(torch.tensor(gamma)))), p, given).items():
        key = tuple(text[i] if i in revealed else canvas[i] for i in range(3))
        after[key] = after.get(key, 0) + q
    return after


@pytest.mark.parametrize("steps", [1, 2])
def test_a_coupled_sampler_has_its_law(steps):
    """All plans of one and two steps, each with its chain of the level: 64 canvases by chi-squared."""
    chains = toy_chains(levels=2, strength=4.0)
    exact, plans = torch.zeros(64, dtype=torch.float64), list(itertools.product(range(steps), repeat=3))
    for plan in plans:
        states = {(3, 3, 3): 1.0}
        for step in range(steps):
            revealed, after = {i for i in range(3) if plan[i] == step}, {}
            for canvas, q in states.items():
                for text, r in step_law(chains, canvas, revealed, step / steps).items() if revealed else [(canvas, 1)]:
                    after[text] = after.get(text, 0) + q * r
            states = after
        for text, q in states.items():
            exact[index_of(torch.tensor(text))] += q / len(plans)
    canvas = coupled_toy(chains, 40_000)
    finish(canvas, SAMPLERS["absorbing"]["ancestral"](canvas, steps=steps))
    assert p_value(counts_of(canvas), exact) > FALSE_ALARM
    plain = toy_canvas(TABLE, [3, 3, 3], 40_000)
    finish(plain, SAMPLERS["absorbing"]["ancestral"](plain, steps=steps))
    assert p_value(counts_of(plain), exact) < FALSE_ALARM
    assert torch.equal(plain.nfe, canvas.nfe) and torch.equal(plain.reveal_steps, canvas.reveal_steps)


@pytest.mark.parametrize("first", [(0,), (2,), (0, 1)])
def test_a_network_that_sees_nothing_draws_in_two_steps_as_in_one(first):
    """The locked noise of a token is used once: were a state drawn before its token is revealed, it would count twice."""
    chains, table = toy_chains(), TABLE[-1:].expand(64, 3, 4)
    exact = torch.zeros(64, dtype=torch.float64)
    for text, q in law_of(chains.at(0), table[0].double()[:, :3].softmax(-1)).items():
        exact[index_of(torch.tensor(text))] += q
    canvas = coupled_toy(chains, 40_000, table=table)
    where = torch.zeros(40_000, 3, dtype=torch.bool)
    where[:, list(first)] = True
    canvas.reveal(where, 1.0)
    canvas.reveal(~where, 0.5)
    assert p_value(counts_of(canvas), exact) > FALSE_ALARM


@pytest.mark.parametrize(
    ("sampler", "options"), [("ancestral", {"steps": 2}), ("random", {"steps": 2}), ("first_hitting", {})]
)
def test_the_bound_is_exact_given_the_plan(sampler, options):
    """All texts under one plan sum to one, and each has the likelihood of its steps written out."""
    chains, total = toy_chains(levels=3), 0.0
    schedule = toy_canvas(TABLE, [3, 3, 3]).schedule
    for text in itertools.product(range(3), repeat=3):
        canvas = coupled_toy(chains, 1, text=torch.tensor([text]))
        finish(canvas, SAMPLERS["absorbing"][sampler](canvas, **options))
        total += (-canvas.nats.sum()).exp().item()
        if text != (2, 0, 1):
            continue
        exact, plan = 0.0, canvas.reveal_steps[0].tolist()
        for step in sorted(set(plan)):
            before = tuple(text[i] if plan[i] < step else 3 for i in range(3))
            after = tuple(text[i] if plan[i] <= step else 3 for i in range(3))
            time = 1 - step / 2
            if sampler == "first_hitting":
                time = schedule.inverse(1e-3 + (1 - 1e-3) * canvas.u[0, plan.index(step)])
            gamma = schedule.gamma(torch.as_tensor(time, dtype=torch.float64)).item()
            exact -= math.log(step_law(chains, before, {i for i in range(3) if plan[i] == step}, gamma)[after])
        assert canvas.nats.sum().item() == pytest.approx(exact, rel=1e-6)
    assert total == pytest.approx(1, abs=1e-6)


def test_nan_logits_are_reported_wherever_they_are():
    """A masked token that is not revealed now has a NaN: its row must not be filled from it."""
    broken = TABLE.clone()
    broken[index_of(torch.tensor([3, 3, 3])), 2] = torch.nan
    canvas = coupled_toy(toy_chains(), 4)
    canvas.denoiser = dataclasses.replace(canvas.denoiser, trunk=toy_canvas(broken, [3, 3, 3]).denoiser.trunk)
    first = torch.tensor([[True, False, False]]).expand(4, 3)
    with pytest.raises(ValueError, match="NaN or infinite logits for row 0 in step 0"):
        canvas.reveal(first, 1.0)
        canvas.check()


# --- Toys


def trained(law: torch.Tensor, texts: torch.Tensor, states: int, iterations: int, rate: float) -> tuple[Chain, float]:
    """A chain fitted to a law over texts [n, L], all masked, over its exact marginals; and KL(law || fill)."""
    tokens = int(texts.max()) + 1
    p = torch.stack([torch.stack([law[texts[:, i] == v].sum() for v in range(tokens)]) for i in range(texts.shape[1])])
    values = [value.requires_grad_() for value in weights(states, tokens, strength=0.5)[:3]]
    optimizer = torch.optim.Adam(values, lr=rate)
    present = torch.ones(texts.shape, dtype=torch.bool)
    alone = p.log().gather(1, texts.T).T.sum(dim=1)
    for _ in range(iterations):
        chain = Chains(CouplingWeights(*values), None).at(0)
        gain = chain.log_gain((p @ chain.emission).expand(len(texts), -1, -1), present, present, texts)
        kl = (law * (law.log() - alone - gain)).sum()
        optimizer.zero_grad()
        kl.backward()
        optimizer.step()
    with torch.no_grad():
        return Chains(CouplingWeights(*(value.detach() for value in values)), None).at(0), kl.item()


def test_one_coupled_step_writes_one_of_two_sentences():
    """ABAB.. or BABA.., equally likely. Every marginal is a half, so one independent step is wrong 31 times in 32."""
    texts, draws = torch.tensor([[0, 1] * 3, [1, 0] * 3]), 2000
    chain, kl = trained(torch.full((2,), 0.5, dtype=torch.float64), texts, states=2, iterations=150, rate=0.3)
    assert kl < 1e-3
    half, everything = torch.full((draws, 6, 2), 0.5, dtype=torch.float64), torch.ones(draws, 6, dtype=torch.bool)
    w, v = torch.rand(2, draws, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = chain.draw(half @ chain.emission, everything, everything, w)
    logits = half.log() + chain.log_emission.T[states]
    coupled = draw_tokens(logits.flatten(0, 1), v.flatten(), None).view(draws, 6)
    alone = draw_tokens(half.log().flatten(0, 1), v.flatten(), None).view(draws, 6)
    right = [(tokens[:, None] == texts).all(dim=2).any(dim=1) for tokens in (coupled, alone)]
    assert right[0].double().mean() > 0.998 and right[1].double().mean() < 0.06
    assert abs((coupled[:, 0] == 0).double().mean() - 0.5) < 0.06


def test_a_chain_takes_two_thirds_of_the_cost_of_one_step():
    """Binary texts of an order-3 source: the law of a token depends on the three before it."""
    generator = torch.Generator().manual_seed(1)
    odds = (3 * torch.randn(8, dtype=torch.float64, generator=generator)).sigmoid()
    texts = torch.tensor(list(itertools.product(range(2), repeat=8)))
    law = torch.full((256,), 1 / 8, dtype=torch.float64)
    for i in range(3, 8):
        one = odds[texts[:, i - 3] * 4 + texts[:, i - 2] * 2 + texts[:, i - 1]]
        law = law * torch.where(texts[:, i] == 1, one, 1 - one)
    ones = (law[:, None] * texts).sum(dim=0)
    alone = (law * (law.log() - torch.where(texts == 1, ones, 1 - ones).log().sum(dim=1))).sum().item()
    _, coupled = trained(law, texts, states=8, iterations=100, rate=0.2)
    assert alone > 0.8 and coupled < alone / 3
