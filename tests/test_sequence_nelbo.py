"""The NELBO of single texts: every order of the chain rule by hand, the estimate and its error without bias, pairs."""

import itertools
import math

import pytest
import torch
from small_model import MASK, make_context_matter
from toy_backbones import MASK as BACKBONE_MASK
from toy_backbones import make_network, tokens

from evaluation import block_nelbo, sequence_nelbo
from modeling_mcd import as_masked_diffusion


SIGMAS = 4.42  # a false alarm in 1e5


@pytest.fixture
def network(build):
    model = build()
    make_context_matter(model)
    return model


def texts(rows=1, length=5, seed=0) -> torch.Tensor:
    return torch.randint(0, 46, (rows, length), generator=torch.Generator().manual_seed(seed))


def over_all_orders(model, text, places) -> float:
    """The mean of the chain rule over all orders of the places, the rest of the text [L] being visible."""
    sets = [set(s) for k in range(len(places)) for s in itertools.combinations(places, k)]  # what is visible of them
    canvases = torch.stack([text.clone().index_fill_(0, torch.tensor(sorted(set(places) - s)), MASK) for s in sets])
    logits = model(input_ids=canvases).logits.double()
    logits[..., MASK] = -torch.inf
    log_p = logits.log_softmax(-1)
    of_set = {frozenset(s): log_p[i] for i, s in enumerate(sets)}
    totals = [
        -sum(of_set[frozenset(order[:k])][i, text[i]].item() for k, i in enumerate(order))
        for order in itertools.permutations(places)
    ]
    return sum(totals) / len(totals)


@pytest.mark.parametrize("places", [[0, 1, 2, 3], [1, 4], [2]])
def test_a_short_text_is_the_mean_over_all_orders(network, places):
    """Given the rest: 2^T - 1 forwards, and no error."""
    text = texts()
    prompt = torch.ones(1, 5, dtype=torch.bool).index_fill(1, torch.tensor(places), False)
    forwards = []
    network.model.register_forward_hook(lambda *unused: forwards.append(1))
    found = sequence_nelbo(network, text, prompt, draws=16, batch_size=1)
    assert len(forwards) == 2 ** len(places) - 1
    assert found.nats.item() == pytest.approx(over_all_orders(network, text[0], places), rel=1e-5)
    assert found.errors.tolist() == [0] and found.tokens.tolist() == [len(places)]


@pytest.mark.parametrize("given", [[], [1]])
def test_the_estimate_and_its_error_have_no_bias(network, given):
    """1000 estimates of one text with draws of their own, against all sets; the mean of the squared errors is the variance."""
    text = texts(length=6)
    prompt = torch.zeros(1, 6, dtype=torch.bool).index_fill(1, torch.tensor(given, dtype=torch.long), True)
    exact = sequence_nelbo(network, text, prompt, draws=64)
    assert exact.errors.item() == 0
    many = sequence_nelbo(network, text.expand(1000, 6), prompt.expand(1000, 6), draws=4, batch_size=1000)
    error = many.nats.std().item() / 1000**0.5
    assert abs(many.nats.mean().item() - exact.nats.item()) < SIGMAS * error and error < 0.02 * exact.nats.item()
    squares = many.errors.square()
    spread = (squares.std().item() ** 2 / 1000 + 2 * many.nats.var().item() ** 2 / 1000) ** 0.5
    assert abs(squares.mean().item() - many.nats.var().item()) < SIGMAS * spread


@torch.no_grad()
def test_two_draws_in_each_part_of_the_numbers_of_masks(network):
    counts = []
    network.model.register_forward_pre_hook(
        lambda module, inputs, options: counts.append(int((options["input_ids"] == MASK).sum())), with_kwargs=True
    )
    for seed in range(10):
        sequence_nelbo(network, texts(1, 12), draws=8, batch_size=1, seed=seed)
    counts = torch.tensor(counts).view(10, 4, 2)
    parts = torch.arange(4)[:, None] * 3
    assert ((counts > parts) & (counts <= parts + 3)).all() and (counts[..., 0] != counts[..., 1]).any()
    assert counts.unique().tolist() == list(range(1, 13))


def test_it_is_the_nelbo_of_the_corpus(network):
    """The expectation of `block_nelbo`, whose weight is 1/t: here at far less variance."""
    blocks = texts(100, 10)
    fixed = sequence_nelbo(network, blocks, draws=4, batch_size=200)
    timed = block_nelbo(network, blocks, draws=16, batch_size=100)
    difference, error = fixed.minus(timed)
    assert abs(difference) < SIGMAS * error and error < 0.03 * timed.mean


def test_the_draws_are_those_of_seed_and_rank(network):
    blocks = texts(3, 12)
    found = sequence_nelbo(network, blocks, draws=4, seed=[5, 6, 7])
    assert found.draws.shape == (3, 4) and torch.equal(found.nats, found.draws.mean(dim=1))
    alone = sequence_nelbo(network, blocks[1:2], draws=4, seed=[6], batch_size=3)
    assert torch.allclose(alone.draws, found.draws[1:2], rtol=1e-5)
    assert not torch.allclose(sequence_nelbo(network, blocks, draws=4, seed=1).draws, found.draws)


def test_endings_of_one_prompt_and_two_models_are_paired(network, build):
    """The same places are masked in both, so what they share cancels."""
    one, other = texts(1, 20), texts(1, 20)
    other[0, -1] = (one[0, -1] + 1) % 46
    prompt = torch.zeros(1, 20, dtype=torch.bool)
    prompt[:, :6] = True
    first, second = (sequence_nelbo(network, text, prompt, draws=32, seed=3) for text in (one, other))
    difference, error = first.differences(second)
    assert difference.item() == pytest.approx((first.nats - second.nats).item())
    assert 0 < error.item() < 0.5 * math.hypot(first.errors.item(), second.errors.item())
    assert first.differences(sequence_nelbo(network, one, prompt, draws=32, seed=3))[1].item() == 0
    with pytest.raises(ValueError, match=r"as many texts and draws: \(1, 32\), not \(1, 30\)"):
        first.differences(sequence_nelbo(network, other, prompt, draws=30, seed=3))


def test_a_models_own_blocks_are_given_the_clean_ones_before():
    """By hand, with one token to score in each of two blocks: each has one set, and sees nothing behind its block."""
    model = as_masked_diffusion(make_network("qwen3"), BACKBONE_MASK, 0, attention="block", block_size=4)
    text, prompt = tokens(1, 12), torch.ones(1, 12, dtype=torch.bool)
    prompt[0, [1, 10]] = False
    total = 0.0
    for place in (1, 10):
        canvas = text.clone()
        canvas[0, place] = BACKBONE_MASK
        logits = model(input_ids=canvas).logits[0, place].double().detach()
        logits[BACKBONE_MASK] = -torch.inf
        total -= logits.log_softmax(-1)[text[0, place]].item()
    found = sequence_nelbo(model, text, prompt, draws=2)
    assert found.nats.item() == pytest.approx(total, rel=1e-5) and found.errors.item() == pytest.approx(0, abs=1e-5)


def test_the_rest_of_a_models_last_block_stays_masked():
    """As its sampler fills it: a text of 10 tokens leaves two masks, which are neither scored nor counted."""
    model = as_masked_diffusion(make_network("qwen3"), BACKBONE_MASK, 0, attention="block", block_size=4)
    text, prompt = tokens(1, 10), (torch.arange(10) < 9)[None]
    canvas = torch.full((1, 12), BACKBONE_MASK)
    canvas[0, :9] = text[0, :9]
    logits = model(input_ids=canvas).logits[0, 9].double().detach()
    logits[BACKBONE_MASK] = -torch.inf
    found = sequence_nelbo(model, text, prompt, draws=2)
    assert found.tokens.item() == 1 and found.errors.item() == pytest.approx(0, abs=1e-5)
    assert found.nats.item() == pytest.approx(-logits.log_softmax(-1)[text[0, 9]].item(), rel=1e-5)
    assert sequence_nelbo(model, text, draws=2).tokens.item() == 10


def test_a_time_conditioned_network_is_told_the_visible_share(build):
    model = build(time_conditioning=True)
    text = texts(1, 4)
    prompt = torch.tensor([[True, True, True, False]])
    found = sequence_nelbo(model, text, prompt, draws=2)
    canvas = text.clone()
    canvas[0, 3] = MASK
    start = 1e-3  # what the log-linear schedule leaves visible
    sigma = -math.log(start + (1 - start) * 0.75)
    logits = model(input_ids=canvas, timesteps=torch.tensor([sigma])).logits[0, 3].double()
    logits[MASK] = -torch.inf
    assert found.nats.item() == pytest.approx(-logits.log_softmax(-1)[text[0, 3]].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 3}, "draws must be an even integer of at least 2, not 3"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"prompt_mask": torch.ones(1, 5, dtype=torch.bool)}, "prompt_mask covers all of block 0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        sequence_nelbo(network.train(), texts(), **options)
    assert network.training


def test_uniform_noise_has_no_masks_to_count(build):
    model = build(diffusion_kind="uniform", mask_token_id=None)
    with pytest.raises(ValueError, match="this model is uniform: take block_nelbo"):
        sequence_nelbo(model, texts())
