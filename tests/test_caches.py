"""The approximate caches of Fast-dLLM: off by default, refreshed with each block, and what they compute, by hand."""

import pytest
import torch
from toy_backbones import MASK, SHIFT, make_network, shifted, tokens
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from evaluation.sampler_likelihood import step_bound
from modeling_mcd import MDLMGenerationConfig, as_masked_diffusion
from modeling_mcd.cache_mdlm import CachedTrunk


CACHES = ("prefix", "dual")
KINDS = ("llama", "qwen2", "qwen3", "gemma", "bert", "roberta", "gpt2")


def wrapped(name: str):
    return as_masked_diffusion(make_network(name), MASK, SHIFT.get(name, 0))


@pytest.fixture(scope="module")
def models():
    return {name: wrapped(name) for name in KINDS}


class Recorder(LogitsProcessor):
    """Keeps the canvas and the logits of everything that the sampler asks for."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores):
        self.asked.append((input_ids.clone(), scores.clone()))
        return scores


def watched(model, prompt=None, **options):
    recorder = Recorder()
    options = {
        "seed": 0,
        "return_dict_in_generate": True,
        "logits_processor": LogitsProcessorList([recorder]),
    } | options
    return model.generate(prompt, **options), recorder.asked


@pytest.mark.parametrize("name, cache", [("qwen2", "prefix"), *((name, "dual") for name in KINDS)])
def test_one_forward_a_block_loses_nothing(name, cache, models):
    """The forward that fills the cache is the complete one: the same logits, and as many tokens computed."""
    options = {"steps": 1, "max_new_tokens": 8, "block_length": 4}
    (plain, logits), (cached, same) = (
        watched(models[name], tokens(2, 5), cache=c, **options) for c in ("none", cache)
    )
    assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.computed, cached.computed)
    for (_, ours), (_, theirs) in zip(same, logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, cache", [("qwen2", "dual"), *((name, "prefix") for name in KINDS)])
def test_the_second_forward_of_an_unchanged_canvas_is_the_first(name, cache, models):
    """Keys and values are put back where they were: every position asked for, twice, without a token written."""
    model = models[name]
    ids = tokens(2, 12)
    trunk = CachedTrunk(model, cache, 2, 12)
    first, end, lengths = (torch.tensor(x) for x in ([4, 3], [8, 7], [12, 10]))
    trunk.enter(first, end, lengths)
    rows, sigma = torch.arange(2), torch.zeros(2)
    with torch.no_grad():
        before, after = trunk(ids, rows, sigma, None), trunk(ids, rows, sigma, None)
    for row in range(2):
        stop = lengths[row] if cache == "prefix" else end[row]
        inside = slice(int(first[row]), int(stop))
        torch.testing.assert_close(after[row, inside], before[row, inside], rtol=0, atol=1e-5)
        assert (after[row, : int(first[row]) - 1] == 0).all()
    start = first - model.config.logits_shift
    assert torch.equal(trunk.computed, lengths + (lengths if cache == "prefix" else end) - start)


@torch.no_grad()
def prefix_logits(network, before: torch.Tensor, now: torch.Tensor, start: int, shift: int) -> torch.Tensor:
    """Logits from `start` on, of `now` behind what `before` made of the tokens on the left: with transformers' own cache."""
    cache = DynamicCache()
    network(input_ids=before, past_key_values=cache, use_cache=True)
    start -= shift
    cache.crop(start - before.shape[1])
    rest = now[:, start:]
    sees = torch.ones(1, 1, rest.shape[1], now.shape[1], dtype=torch.bool)
    logits = network(input_ids=rest, past_key_values=cache, attention_mask=sees, use_cache=True).logits
    return logits[:, :-1] if shift else logits


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_the_prefix_cache_is_that_of_transformers(name, models):
    """Two blocks of two forwards: the second forward of each sees the prompt as it was in the first."""
    model = models[name]
    output, asked = watched(
        model, tokens(1, 6), sampler="random", steps=2, max_new_tokens=8, block_length=4, cache="prefix"
    )
    assert len(asked) == 4 and output.nfe.item() == 4
    exact = 0
    for block, start in enumerate((6, 10)):
        now, logits = asked[2 * block + 1]
        masked = (now[0, start : start + 4] == MASK).nonzero()[:, 0]
        expected = prefix_logits(model.network, asked[2 * block][0][:1], now[:1], start, SHIFT.get(name, 0))
        torch.testing.assert_close(logits, expected[0, masked].float(), rtol=0, atol=1e-5)
        with torch.no_grad():
            complete = shifted(model.network(input_ids=now[:1]).logits, SHIFT.get(name, 0))[0, start + masked]
        exact += (logits - complete).abs().max()
    assert exact > 1e-3, "this canvas shows no difference from the complete forward"


@pytest.mark.parametrize("cache", CACHES)
def test_one_layer_needs_no_refresh(cache):
    """Its keys and values depend on their own token alone, so the caches are exact as long as only the block changes."""
    network = make_network("qwen3")
    network.model.layers = network.model.layers[:1]
    network.config.num_hidden_layers = 1
    model = as_masked_diffusion(network, MASK)
    options = {"sampler": "confidence", "steps": 3, "length": 18, "block_length": 6}
    (plain, logits), (cached, same) = (watched(model, cache=c, **options) for c in ("none", cache))
    assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.nfe, cached.nfe)
    for (_, ours), (_, theirs) in zip(same, logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert plain.computed.item() == 9 * 18
    assert cached.computed.item() == 3 * 18 + 2 * (6 * 3 if cache == "dual" else 18 + 12 + 6)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [{"sampler": "ancestral", "steps": 3}, {"sampler": "confidence", "steps": 2}])
def test_our_own_network_takes_the_caches(cache, options, model):
    """A row is the same alone and padded in a batch, and within and beyond the context."""
    ids = torch.tensor([[0, 0, 0, 7, 8], [9, 10, 11, 12, 13]])
    seen = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    options = options | {"block_length": 6, "cache": cache, "return_dict_in_generate": True}
    for length in (20, 44):  # the context is 32
        batch = model.generate(ids, attention_mask=seen, length=length, seed=[1, 2], **options)
        plain = model.generate(ids, attention_mask=seen, length=length, seed=[1, 2], **options | {"cache": "none"})
        assert MASK not in batch.sequences and (batch.computed < plain.computed).all()
        alone = model.generate(ids[:1, 3:], length=length - 3, seed=[1], **options)
        assert torch.equal(alone.sequences[0], batch.sequences[0, 3:])
        assert (alone.nfe, alone.computed) == (batch.nfe[0], batch.computed[0])


def test_nothing_approximate_happens_unasked(models, model):
    for network in (model, models["qwen3"]):
        output = network.generate(length=12, block_length=4, steps=2, seed=0, return_dict_in_generate=True)
        assert output.computed.item() == 12 * output.nfe.item()
    settings = MDLMGenerationConfig.preset("fast_dllm", max_new_tokens=16)
    output = models["llama"].generate(tokens(1, 8), settings, seed=0, return_dict_in_generate=True)
    assert output.computed.item() < 24 * output.nfe.item()


def test_a_cache_is_refused_where_there_is_none(build, models):
    for network, options, message in (
        (wrapped("modernbert"), {"cache": "dual"}, "a ModernBertForMaskedLM takes no keys and values from outside"),
        (wrapped("eurobert"), {"cache": "dual"}, "a EuroBertForMaskedLM takes no keys and values"),
        (models["qwen3"], {"cache": "exact"}, r"cache \('exact'\) is for a block model"),
        (models["qwen3"], {"cache": "prefix", "compile": True}, "does not go with guidance_scale or compile"),
        (
            build(diffusion_kind="uniform"),
            {"cache": "dual"},
            r"cache \('dual'\) needs a \[MASK\]; this model is uniform",
        ),
        (models["qwen3"], {"cache": "all"}, "cache must be one of .'none', 'exact', 'prefix', 'dual'., not 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            network.generate(length=8, **options)
    network = build()
    network.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention', but block attention and caches need one of"):
        network.generate(length=8, cache="dual")


def test_the_bound_is_that_of_the_cached_sampler(models):
    """Exact caches and single steps change no nat; an approximate cache makes another sampler."""
    text, plan = tokens(3, 16), {"seed": 0, "locking": "spread"}
    blocks = as_masked_diffusion(make_network("qwen3"), MASK, attention="block", block_size=4)
    exact, plain = (step_bound(blocks, text, cache=cache, steps=3, **plan).nats for cache in ("exact", "none"))
    torch.testing.assert_close(exact, plain, rtol=0, atol=1e-4)
    for cache in CACHES:
        for steps in (1, 3):
            cached, plain = (
                step_bound(models["qwen3"], text, cache=c, steps=steps, block_length=4, **plan).nats
                for c in (cache, "none")
            )
            assert ((cached - plain).abs() > 1e-3).all() == (steps > 1)
