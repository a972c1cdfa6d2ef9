"""The likelihood of samplers by enumeration: all texts together have probability 1, and the sampler draws each as often."""

import itertools
from pathlib import Path

import pytest
import torch
from laws import FALSE_ALARM, p_value
from small_model import MASK, make_context_matter
from toy import MASK as TOY_MASK
from toy import finish, index_of, sample, table_of_logits, toy_canvas

from evaluation import step_bound
from evaluation.sampler_likelihood import UNLIKELY, TeacherForcedCanvas
from modeling_mcd.sampling_mdlm import ORDERED, PLANNED, SAMPLERS


TABLE = table_of_logits()
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=3)))
BY_ORDER = [
    ("confidence", {"steps": 2}),
    ("entropy", {"steps": 2}),
    ("margin", {"steps": 3}),
    ("dream", {"steps": 2}),
    ("dream", {"steps": 2, "order": "margin"}),
    ("entropy_bound", {"entropy_bound": 0.8}),
    ("adaptive", {"threshold": 0.9}),
    ("adaptive", {"threshold": 0.95, "max_steps": 2}),
]
BY_PLAN = [
    ("ancestral", {"steps": 2}),
    ("ancestral", {"steps": 2, "locking": "spread"}),
    ("random", {"steps": 2}),
    ("first_hitting", {}),
]


def probabilities(sampler: str, texts, start=(3, 3, 3), **options) -> torch.Tensor:
    """p(text) of each text, all with the noise of one row."""
    keys = torch.full((len(texts),), 12345)
    plain = toy_canvas(TABLE, list(start), len(texts), keys=keys)
    canvas = TeacherForcedCanvas(texts, plain.tokens, plain.fillable, plain.noise, plain.denoiser)
    finish(canvas, SAMPLERS["absorbing"][sampler](canvas, **options))
    assert torch.equal(canvas.tokens, texts) and not canvas.masked.any()
    return (-canvas.nats.sum(dim=1)).exp()


# Every sampler of `generate`, and what its likelihood is.
EVERY = [(kind, name) for kind, samplers in SAMPLERS.items() for name in samplers]


@pytest.mark.parametrize(("kind", "sampler"), EVERY)
def test_every_sampler_has_a_figure_or_a_refusal_by_name(kind, sampler, build):
    """And the page names it."""
    model = build(**({"diffusion_kind": "uniform", "mask_token_id": None} if kind == "uniform" else {}))
    text = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(0))
    if sampler in UNLIKELY:
        with pytest.raises(
            ValueError, match=f"sampler '{sampler}' has no likelihood: {UNLIKELY[sampler]}; ancestral, "
        ):
            step_bound(model, text, sampler=sampler)
    else:
        bound = step_bound(model, text, sampler=sampler)
        assert bound.nats.isfinite().all() and bound.nats.min() > 0 and bound.tokens.tolist() == [6, 6]
        assert bound.exact == (sampler in ORDERED) and (sampler in PLANNED) != bound.exact
    page = (Path(__file__).parents[1] / "docs" / "likelihood.md").read_text()
    assert f"`{sampler}`" in page


def test_every_ordered_sampler_is_enumerated_here():
    assert {name for name, _ in BY_ORDER} == set(ORDERED) and {name for name, _ in BY_PLAN} == set(PLANNED)


@pytest.mark.parametrize("start", [(3, 3, 3), (3, 0, 3), (3, 1, 2)])
@pytest.mark.parametrize(("sampler", "options"), [*BY_ORDER, *BY_PLAN])
def test_the_probabilities_of_all_texts_add_up_to_one(sampler, options, start):
    """Under each sampler; given a prompt, those of all texts with that prompt."""
    given = torch.tensor(start)
    texts = TEXTS[((TEXTS == given) | (given == TOY_MASK)).all(dim=1)]
    p = probabilities(sampler, texts, start, **options)
    assert abs(p.sum().item() - 1) < 1e-10
    assert len(p) == 3 ** int((given == TOY_MASK).sum()) and p.min() > 0


@pytest.mark.parametrize(("sampler", "options"), BY_ORDER)
def test_an_ordered_sampler_draws_each_text_as_often_as_its_likelihood_says(sampler, options):
    p = torch.zeros(64, dtype=torch.float64)
    p[index_of(TEXTS)] = probabilities(sampler, TEXTS, **options)
    drawn = sample(SAMPLERS["absorbing"][sampler], TABLE, draws=20_000, **options)
    counts = index_of(drawn.tokens).bincount(minlength=64)
    assert p_value(counts, p) > FALSE_ALARM
    other = torch.zeros(64, dtype=torch.float64)
    other[index_of(TEXTS)] = probabilities("random", TEXTS, steps=1)
    assert p_value(counts, other) < FALSE_ALARM, "and another sampler's likelihood is told apart"


# --- On a network


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "margin", "steps": 2},
        {"sampler": "confidence", "steps": 1, "block_length": 2},
        {"sampler": "entropy_bound", "entropy_bound": 0.3, "block_length": 2, "cache": "dual"},
        {"sampler": "adaptive", "threshold": 0.4},
        {"sampler": "dream", "steps": 2, "order": "margin"},
    ],
)
def test_a_networks_texts_add_up_to_one_given_a_prompt(build, options):
    """Two prompts, and all 27 endings of each: p(rest | prompt) is normalised, the order being the network's."""
    model = build(vocab_size=4, mask_token_id=3, bos_token_id=0, eos_token_id=0)
    make_context_matter(model)
    prompt = torch.tensor([[0, 1], [2, 2]]).repeat_interleave(27, dim=0)
    texts = torch.cat([prompt, TEXTS.repeat(2, 1)], dim=1)
    given = torch.tensor([True, True, False, False, False]).expand_as(texts)
    bound = step_bound(model, texts, given, **options)
    assert bound.exact and bound.tokens.tolist() == [3] * 54
    sums = (-bound.nats).exp().view(2, 27).sum(dim=1)
    assert sums.tolist() == pytest.approx([1, 1], abs=1e-5)
    again = step_bound(model, texts, given, seed=9, batch_size=7, **options)
    assert again.nats.tolist() == pytest.approx(bound.nats.tolist(), abs=1e-5), "and no seed changes it"


def test_only_an_order_that_the_text_gives_is_exact(build):
    model = build()
    text = torch.randint(0, 46, (2, 6), generator=torch.Generator().manual_seed(0))
    assert step_bound(model, text, sampler="margin", steps=3).exact and not step_bound(model, text, steps=3).exact
    # One token a step, the surest first: the chain rule along the order that generate reports for a prompt of the text.
    model.generation_config.temperature = 0.5
    bound, total, left = step_bound(model, text[:1], sampler="confidence", steps=6), 0.0, list(range(6))
    while left:
        canvas = text[:1].clone()
        canvas[0, left] = MASK
        logits = model(input_ids=canvas).logits[0].double()
        logits[:, MASK] = -torch.inf
        log_p = logits.log_softmax(-1)
        place = max(left, key=lambda i: round(log_p[i].max().item(), 4))
        total -= log_p[place, text[0, place]].item()
        left.remove(place)
    assert bound.nats.item() == pytest.approx(total, rel=1e-5)
