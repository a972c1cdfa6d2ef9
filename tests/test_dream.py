"""Dream's decoding: its exact law by enumeration, the published loop step by step, and its presets."""

import itertools

import pytest
import torch
from laws import p_value
from toy import CANVASES, MASK, counts_of, index_of, sample, table_of_logits
from toy_backbones import MASK as LAST
from toy_backbones import K, make_network, shifted, tokens

from modeling_mcd import MDLMGenerationConfig, as_masked_diffusion
from modeling_mcd.sampling_mdlm import ORDERS, dream


TABLE = table_of_logits()
HEAT = 0.8


def law_of_two_steps(order: str) -> torch.Tensor:
    """Of three masks the surest of three draws stays, floor(3 (1 - 0.5005)) = 1; then the other two are drawn."""
    p = torch.zeros(64, 3, 4, dtype=torch.float64)
    p[..., :MASK] = (TABLE[..., :MASK].double() / HEAT).softmax(-1)
    law = torch.zeros(64, dtype=torch.float64)
    first = p[63]
    for drawn in itertools.product(range(3), repeat=3):
        certain = {
            "confidence": [first[i, drawn[i]] for i in range(3)],
            "margin": [first[i].sort().values[-1] - first[i].sort().values[-2] for i in range(3)],
            "entropy": [-torch.special.entr(first[i]).sum() for i in range(3)],
        }[order]
        kept = int(torch.stack(certain).argmax())
        canvas = torch.full((3,), MASK)
        canvas[kept] = drawn[kept]
        then = p[index_of(canvas)]
        others = [i for i in range(3) if i != kept]
        for pair in itertools.product(range(3), repeat=2):
            text = canvas.clone()
            text[others] = torch.tensor(pair)
            chance = torch.stack([first[i, drawn[i]] for i in range(3)]).prod()
            law[index_of(text)] += chance * then[others[0], pair[0]] * then[others[1], pair[1]]
    return law


@pytest.mark.parametrize("order", ORDERS)
def test_dream_has_its_law(order):
    law = law_of_two_steps(order)
    canvas = sample(dream, TABLE, draws=30_000, temperature=HEAT, steps=2, order=order)
    assert p_value(counts_of(canvas), law) > 1e-5
    others = [law_of_two_steps(other) for other in ORDERS if other != order]
    assert all((law - other).abs().max() > 1e-3 for other in others), "a table that tells the orders apart"
    assert (canvas.nfe == 2).all() and (CANVASES[index_of(canvas.tokens)] != MASK).all()


@torch.no_grad()
def diffusion_generate(network, prompt, steps: int, length: int, order: str, top_p: float) -> torch.LongTensor:
    """The loop of Dream's code at temperature 0, for one row: [MASK] is never predicted."""
    canvas = torch.nn.functional.pad(prompt, (0, length), value=LAST)
    times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
    for step in range(steps):
        masked = (canvas[0] == LAST).nonzero()[:, 0]
        logits = shifted(network(input_ids=canvas).logits, 1)[0, masked, :LAST]
        p = logits.softmax(-1)
        nucleus, kept = p.sort(descending=True), torch.zeros_like(p, dtype=torch.bool)
        kept.scatter_(1, nucleus.indices, nucleus.values.cumsum(-1) - nucleus.values < top_p)
        p = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        highest = p.sort(descending=True).values
        certain = {
            "confidence": highest[:, 0],
            "margin": highest[:, 0] - highest[:, 1],
            "entropy": (p * (p + 1e-10).log()).sum(-1),
        }[order]
        ratio = times[step + 1] / times[step]
        count = len(masked) if step == steps - 1 else int(len(masked) * (1 - ratio))
        surest = certain.round(decimals=4).sort(descending=True, stable=True).indices[:count]  # ties as ours
        canvas[0, masked[surest]] = p.argmax(-1)[surest]
    return canvas


@pytest.mark.parametrize("order", ORDERS)
def test_dream_decodes_as_its_authors_do(order):
    """A shifted network, a nucleus, and fewer steps than tokens."""
    network, prompt = make_network("qwen2"), tokens(1, 6)
    model = as_masked_diffusion(network, LAST, logits_shift=1)
    options = {"steps": 7, "max_new_tokens": 20, "temperature": 0, "top_p": 0.9, "order": order}
    text = model.generate(prompt, sampler="dream", seed=0, **options)
    assert torch.equal(text, diffusion_generate(network, prompt, 7, 20, order, 0.9)) and text.max() < K - 1


def test_dreams_presets_are_its_three_orders():
    names = {"dream_entropy": "entropy", "dream_maskgit_plus": "confidence", "dream_topk_margin": "margin"}
    for name, order in names.items():
        options = MDLMGenerationConfig.preset(name, steps=8)
        assert (options.sampler, options.order, options.temperature, options.top_p) == ("dream", order, 0.1, 0.9)
        assert (options.steps, options.max_new_tokens) == (8, 256)
