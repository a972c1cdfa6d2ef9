"""What may not be drawn where, and when a generation has to end: suppressed ids, the guard of the end, the cap on steps."""

import pytest
import torch
from small_model import MASK, make_context_matter


END = 46


def test_tokens_above_an_id_are_never_drawn(model):
    """As if each had been named, and together with those that are."""
    named = model.generate(seed=0, steps=4, num_return_sequences=8, suppress_tokens=list(range(20, 47)))
    above = model.generate(seed=0, steps=4, num_return_sequences=8, suppress_above=20)
    assert torch.equal(named, above) and above.max() < 20
    both = model.generate(seed=0, steps=4, num_return_sequences=8, suppress_above=20, suppress_tokens=[3, 30])
    assert both.max() < 20 and not (both == 3).any()
    with pytest.raises(ValueError, match="suppress_tokens and suppress_above hold all 48 tokens"):
        model.generate(suppress_above=1, suppress_tokens=[0])


@pytest.mark.parametrize("options", [{"sampler": "ancestral"}, {"sampler": "confidence"}, {"sampler": "remdm"}])
@pytest.mark.parametrize("blocks", [{}, {"block_length": 4}])
def test_no_end_is_drawn_in_the_first_share_of_a_row(build, options, blocks):
    """A network that wants nothing but ends: from the share on it gets them, in rows of two lengths."""
    model = build()
    model.lm_head.bias.data[END] = 50.0
    ids = torch.tensor([[1, 2, 3, 4], [9, 9, 5, 6]])
    given = {"attention_mask": torch.tensor([[1] * 4, [0, 0, 1, 1]]), "max_new_tokens": 9, "steps": 4, "seed": [1, 2]}
    texts = model.generate(ids, eos_after=0.3, **given, **options, **blocks)[:, 4:]
    assert not (texts[:, :3] == END).any() and (texts[:, 3:] == END).all() and MASK not in texts
    assert (model.generate(ids, **given, **options, **blocks)[:, 4:] == END).all()
    alone = model.generate(
        ids[1:, 2:], eos_after=0.3, **given | {"attention_mask": None, "seed": [2]}, **options, **blocks
    )
    assert torch.equal(alone[0, 2:], texts[1])


def test_the_guard_leaves_the_law_of_the_other_tokens(model):
    """The likeliest token of every early position among those that do not end, from the network itself."""
    make_context_matter(model)
    ids = torch.tensor([[1, 2, 3] + [MASK] * 6])
    ends = [5, 7, END]
    text = model.generate(ids, steps=1, temperature=0, eos_token_id=ends, eos_after=0.5, seed=0)[0, 3:]
    with torch.no_grad():
        logits = model(ids).logits[0, 3:, :MASK]
    barred = torch.isin(torch.arange(MASK), torch.tensor(ends))
    expected = torch.where(torch.arange(6) < 3, logits.masked_fill(barred, -torch.inf).argmax(-1), logits.argmax(-1))
    assert torch.equal(text, expected)


def test_the_guard_needs_an_end_and_a_mask(build):
    with pytest.raises(ValueError, match="eos_after needs an eos_token_id"):
        build(bos_token_id=None, eos_token_id=None).generate(eos_after=0.5)
    with pytest.raises(ValueError, match=r"eos_after \(0.5\) needs a \[MASK\]; this model is uniform"):
        build(diffusion_kind="uniform").generate(eos_after=0.5)


def test_adaptive_decoding_ends_at_its_cap(model):
    """No token is certain enough, so one is revealed a step, and all that is left in the last of each block."""
    options = {"sampler": "adaptive", "threshold": 1.0, "length": 12, "seed": 0}
    options |= {"return_dict_in_generate": True, "output_reveal_steps": True}
    output = model.generate(max_steps=3, block_length=6, **options)
    assert output.nfe.item() == 6 and MASK not in output.sequences
    assert output.reveal_steps.flatten().bincount().tolist() == [1, 1, 4, 0, 0, 0, 1, 1, 4]
    assert model.generate(max_steps=30, **options).nfe.item() == model.generate(**options).nfe.item() == 12
