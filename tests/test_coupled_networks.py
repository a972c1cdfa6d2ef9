"""Networks with a chain: rows, blocks, infills and one text at every N; saving, loading, and what is refused."""

import itertools

import pytest
import torch
from small_model import MASK
from tiny_run import ROOT
from toy_backbones import SHIFT, make_network
from toy_backbones import tokens as some_tokens
from transformers import AutoModel, AutoTokenizer

from evaluation import read_texts, step_bound, text_blocks
from modeling_mcd import MDLMConfig, as_masked_diffusion
from modeling_mcd.convert_checkpoints import convert
from modeling_mcd.coupling_mdlm import Chain
from modeling_mcd.loading import load_model
from modeling_mcd.sampling_mdlm import PLANNED, SAMPLERS


TINY = ROOT / "recipes" / "tiny"


@pytest.fixture(params=[True, False], ids=["shared", "a chain a level"])
def coupled(build, request):
    """A small model with a strong chain of random weights."""
    model = build(coupling={"states": 5, "levels": 2, "shared": request.param})
    for parameter in model.coupling.parameters():
        parameter.data *= 3 if request.param else 8  # a shared one multiplies two of them
    return model


def test_one_state_is_the_factorised_draw(build):
    """Bitwise, whatever the weights: a state that every token is in says nothing."""
    model = build(coupling={"states": 1, "levels": 2})
    for options in ({"steps": 1}, {"steps": 4, "locking": "spread", "temperature": 0.7}, {"steps": 3, "top_k": 5}):
        both = [model.generate(seed=[0, 1], num_return_sequences=2, coupling=c, **options) for c in (True, False)]
        assert torch.equal(*both), options


def test_without_a_coupling_nothing_changes(build, coupled):
    plain = build()
    assert plain.config.coupling is None and not any("coupling" in key for key in plain.state_dict())
    kept = {name: value for name, value in coupled.state_dict().items() if not name.startswith("coupling")}
    plain.load_state_dict(kept)
    off = coupled.generate(seed=0, steps=4, coupling=False)
    assert torch.equal(plain.generate(seed=0, steps=4), off)
    assert not torch.equal(coupled.generate(seed=0, steps=4), off)
    for options in ({"sampler": "confidence", "steps": 4}, {"sampler": "remdm", "steps": 4}):
        assert torch.equal(coupled.generate(seed=0, **options), plain.generate(seed=0, **options))


def test_a_new_coupling_changes_no_likelihood(build):
    model = build()
    texts = torch.randint(0, 46, (3, 12), generator=torch.Generator().manual_seed(0))
    before = step_bound(model, texts, steps=2, locking="spread")
    model.add_coupling({"states": 7, "emission": "embedding"})
    after = step_bound(model, texts, steps=2, locking="spread")
    torch.testing.assert_close(before.nats, after.nats, rtol=1e-6, atol=0)
    model.coupling.transition.data.normal_()
    assert not torch.allclose(step_bound(model, texts, steps=2, locking="spread").nats, after.nats, rtol=1e-4)


@pytest.mark.parametrize("emission", ["table", "embedding"])
def test_a_shared_chain_and_its_separate_levels_are_one_law(build, emission):
    model = build(coupling={"states": 5, "levels": 4, "emission": emission})
    texts = torch.randint(0, 46, (3, 12), generator=torch.Generator().manual_seed(0))
    for number, parameter in enumerate(model.coupling.parameters()):
        parameter.data.normal_(generator=torch.Generator().manual_seed(number))
    before = [step_bound(model, texts, steps=n, locking="spread").nats for n in (1, 4)]
    assert model.coupling.powers.std() > 0.1, "the levels differ"
    model.coupling.separate()
    assert set(model.coupling.state_dict()) == {"start", "transition", "emission"} and len(model.coupling.start) == 4
    for n, nats in zip((1, 4), before, strict=True):
        torch.testing.assert_close(step_bound(model, texts, steps=n, locking="spread").nats, nats, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "coupling",
    [
        {"states": 5},
        {"states": 5, "window": 3},
        {"states": 5, "emission": "embedding"},
        {"states": 5, "shared": False},
    ],
)
def test_all_texts_under_one_plan_sum_to_one(build, coupling):
    model = build(vocab_size=4, mask_token_id=3, bos_token_id=0, eos_token_id=0, coupling=coupling)
    texts = torch.tensor(list(itertools.product(range(3), repeat=4)))
    given = torch.tensor([False, True, False, False]).expand(81, 4)
    for steps in (1, 2, 3):
        bound = step_bound(model, texts, steps=steps, locking="spread", seed=[7] * 81, batch_size=81)
        assert (-bound.nats).exp().sum().item() == pytest.approx(1, abs=1e-5)
    bound = step_bound(model, texts, steps=2, prompt_mask=given, seed=[7] * 81, batch_size=81)
    assert (-bound.nats).exp().sum().item() == pytest.approx(3, abs=3e-5), "one for each prompt"


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 2, "sampler": "random"}, {"sampler": "first_hitting"}])
def test_coupled_rows_do_not_depend_on_their_batch(coupled, options):
    """Prompts of different lengths, blocks, guidance; and forwards are counted as without a coupling."""
    prompt = torch.tensor([[46, 3, 4, 5], [46, 46, 46, 9]])
    attention = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])
    for more in ({}, {"block_length": 5}, {"guidance_scale": 1.5}, {"suppress_tokens": [1, 2, 3]}):
        call = {"return_dict_in_generate": True, "length": 12, **options, **more}
        both = coupled.generate(prompt, attention_mask=attention, seed=[1, 2], **call)
        assert torch.equal(both.sequences[:, :4], prompt)
        single = coupled.generate(prompt[1:, 3:], seed=2, **call | {"length": 9})
        assert torch.equal(both.sequences[1, 3:], single.sequences[0]), more
        plain = coupled.generate(prompt, attention_mask=attention, seed=[1, 2], coupling=False, **call)
        assert torch.equal(both.nfe, plain.nfe) and not (both.sequences == MASK).any()
        assert not torch.isin(both.sequences[:, 4:], torch.tensor(more.get("suppress_tokens", [-1]))).any()


def test_a_block_does_not_feel_the_masks_behind_it(coupled):
    """The first block of 8 of 16 masks is drawn from the chain of 8 that the network's answer at these gives."""
    seen = []
    original = Chain.draw
    call = {"length": 16, "steps": 1, "seed": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Chain, "draw", lambda self, e, present, *rest: (seen.append(present), original(self, e, present, *rest))[1]
        )
        coupled.generate(block_length=8, **call)
        coupled.generate(**call)
    assert [present.sum().item() for present in seen] == [8, 16, 16]


def test_infills_use_the_text_on_both_sides(coupled):
    hole = torch.tensor([[46, 5, MASK, MASK, 7, 8]])
    other = torch.tensor([[46, 5, MASK, MASK, 9, 8]])
    filled, again = (coupled.generate(x, steps=1, seed=[*range(64)], num_return_sequences=64) for x in (hole, other))
    assert torch.equal(filled[:, [0, 1, 4, 5]], hole[:, [0, 1, 4, 5]].expand(64, 4))
    assert not torch.equal(filled[:, 2:4], again[:, 2:4])


def test_one_seed_gives_related_texts_at_every_number_of_steps(build):
    model = build(coupling={"states": 5, "levels": 1})
    model.coupling.transition.data *= 5
    rows = {n: model.generate(seed=[*range(32)], num_return_sequences=32, steps=n) for n in (1, 2, 4)}
    same = [(rows[a] == rows[b]).double().mean().item() for a, b in ((1, 2), (1, 4), (2, 4))]
    strangers = (rows[1] == rows[2].roll(1, dims=0)).double().mean().item()
    assert min(same) > 2 * strangers


def test_temperature_0_is_one_text(coupled):
    many = coupled.generate(seed=[0, 1, 2], num_return_sequences=3, steps=1, temperature=0.0)
    assert (many == many[0]).all()
    greedy = coupled.generate(seed=0, steps=4, last_step="greedy")
    assert not (greedy == MASK).any()


def test_a_coupling_is_saved_and_loaded(coupled, tmp_path):
    coupled.generation_config.locking = "spread"
    coupled.save_pretrained(tmp_path)
    for again in (AutoModel.from_pretrained(tmp_path), load_model(tmp_path)):
        assert again.config.coupling == coupled.config.coupling and again.generation_config.locking == "spread"
        for name, value in coupled.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(again.generate(seed=3, steps=2), coupled.generate(seed=3, steps=2))


def test_the_shipped_chain_is_over_the_shipped_teacher_and_better():
    model, teacher = load_model(TINY / "coupled"), load_model(TINY / "teacher")
    for name, value in teacher.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert (model.generation_config.locking, model.generation_config.steps) == ("spread", 4)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "coupled")
    texts = text_blocks(read_texts(TINY / "text" / "validation"), tokenizer, 128, 4)
    alone, coupled = (step_bound(model, texts, steps=2, locking="spread", coupling=c) for c in (False, True))
    assert coupled.minus(alone)[0] < -0.2
    assert torch.equal(step_bound(teacher, texts, steps=2, locking="spread").nats, alone.nats)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"states": 0}, "coupling: states must be an integer of at least 1, not 0"),
        ({"levels": 2.5}, "coupling: levels must be an integer of at least 1, not 2.5"),
        ({"states": None}, "coupling: states must be an integer of at least 1, not None"),
        ({"window": 33}, r"coupling: window \(33\) must not exceed the context, 32 tokens"),
        ({"emission": "rank"}, "coupling: emission must be one of .*, not 'rank'"),
        ({"shared": 1}, "coupling: shared must be true or false, not 1"),
        ({"state": 4}, "coupling has no 'state': it takes"),
    ],
)
def test_a_wrong_coupling_is_refused_in_one_line(settings, says):
    with pytest.raises(ValueError, match=says) as error:
        MDLMConfig(vocab_size=48, hidden_size=32, num_attention_heads=2, max_position_embeddings=32, coupling=settings)
    assert "\n" not in str(error.value)


def test_couplings_that_do_not_fit_are_refused(build, coupled, tmp_path):
    with pytest.raises(ValueError, match="coupling .* must be null under uniform diffusion"):
        MDLMConfig(diffusion_kind="uniform", coupling={})
    with pytest.raises(ValueError, match=r"coupling \(True\) needs a model that has one"):
        build().generate(coupling=True)
    for name in set(SAMPLERS["absorbing"]) - set(PLANNED):
        with pytest.raises(ValueError, match=rf"coupling \(True\) does not go with the sampler '{name}'"):
            coupled.generate(coupling=True, sampler=name)
    with pytest.raises(ValueError, match="coupling must be True or False, not 'yes'"):
        coupled.generate(coupling="yes")
    with pytest.raises(ValueError, match="the model has a coupling already"):
        coupled.add_coupling({})
    coupled.save_pretrained(tmp_path / "x")
    other = build(coupling=coupled.config.coupling, vocab_size=40, mask_token_id=39, eos_token_id=1, bos_token_id=1)
    mixed = coupled.state_dict() | {"coupling.emission": other.state_dict()["coupling.emission"]}
    coupled.save_pretrained(tmp_path / "x", state_dict=mixed)
    with pytest.raises(ValueError, match=r"coupling.emission has the shape \(\d, 5, 40\), not \(\d, 5, 48\)"):
        load_model(tmp_path / "x")
    coupled.coupling.start.data[0, 0] = torch.nan
    coupled.save_pretrained(tmp_path / "x")
    with pytest.raises(ValueError, match="coupling.start holds NaN"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_a_network_of_transformers_has_a_chain(name, tmp_path):
    """Of the AR kin, whose logits are shifted, and of the BERT kin: a new chain changes nothing; then all texts sum to one."""
    model = as_masked_diffusion(make_network(name, dtype=torch.float32), MASK, SHIFT.get(name, 0))
    text = some_tokens(3, 12)
    before = step_bound(model, text, steps=2, locking="spread")
    model.add_coupling({"states": 4, "levels": 2, "emission": "embedding"})
    torch.testing.assert_close(step_bound(model, text, steps=2, locking="spread").nats, before.nats, rtol=1e-6, atol=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.coupling.parameters():
        parameter.data.normal_(generator=generator)
    pairs = torch.tensor([x for x in itertools.product(range(model.config.vocab_size), repeat=2) if MASK not in x])
    assert (-step_bound(model, pairs, steps=1, batch_size=len(pairs)).nats).exp().sum().item() == pytest.approx(
        1, abs=1e-5
    )
    assert not torch.allclose(step_bound(model, text, steps=2, locking="spread").nats, before.nats, rtol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    again, one = load_model(tmp_path / "saved"), {"seed": 1, "steps": 2, "length": 12}
    assert torch.equal(again.generate(**one), model.generate(**one))
    assert not torch.equal(again.generate(**one), again.generate(**one, coupling=False))
    with pytest.raises(ValueError, match="to is 'native', but that layout has no place for the model's coupling"):
        convert(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_block_models_and_other_layouts_refuse_a_chain(coupled, tmp_path):
    blocks = as_masked_diffusion(make_network("qwen3"), MASK, attention="block", block_size=4)
    with pytest.raises(ValueError, match="coupling .* must be null with attention='block'"):
        blocks.add_coupling({})
    assert blocks.config.coupling is None
    coupled.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        ValueError, match="to is 'mdlm', but that layout has no place for the model's coupling: give 'ours'"
    ):
        convert(tmp_path / "saved", tmp_path / "out", to="mdlm")
