"""Block models: who sees whom, training in one forward, the exact cache of finished blocks, noise of each block."""

import itertools

import pytest
import torch
from laws import p_value
from small_model import assert_same_weights
from toy_backbones import LENGTH, MASK, SHIFT, K, make_network, shifted, tokens
from toy_distillers import METHODS, assert_same_step, blocks, make_trainer, prompted
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from evaluation.likelihood import block_nelbo
from modeling_mcd import as_masked_diffusion
from modeling_mcd.head_mdlm import HeadRows
from modeling_mcd.loading import load_model
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.inputs import check_block_length
from trainers.trajectories import step_noise


SIZE = 4
BLOCK_MODELS = ("qwen3", "qwen2")  # as SDAR, and with a shift as Fast-dLLM v2


def block_model(name: str, size: int = SIZE, **options):
    network = make_network(name, **options)
    return as_masked_diffusion(network, MASK, SHIFT.get(name, 0), attention="block", block_size=size)


@pytest.fixture(scope="module")
def models():
    """In float64, none of which a test may change."""
    return {name: block_model(name) for name in BLOCK_MODELS}


@torch.no_grad()
def logits_of(model, ids, mask=None):
    return model(ids, attention_mask=mask).logits


@torch.no_grad()
def by_hand(model, ids, clean=None) -> torch.Tensor:
    """The logits [B, L, V], block by block: each in a forward of its own behind the clean blocks before it, all of them
    seen by the network's own causal mask between blocks, written out as zeros and ones.
    """
    clean, result, length = ids if clean is None else clean, [], ids.shape[1]
    for start in range(0, length, SIZE):
        end = min(start + SIZE, length)
        canvas = torch.cat([clean[:, :start], ids[:, start:end]], dim=1)
        number = torch.arange(end) // SIZE
        sees = (number[None, :] <= number[:, None])[None, None]
        logits = shifted(model.network(input_ids=canvas, attention_mask=sees).logits, model.config.logits_shift)
        result.append(logits[:, start:end])
    return torch.cat(result, dim=1)


# --- Who sees whom


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_a_token_sees_its_block_and_those_before(name, attention):
    """Changing a token changes the states of its own block and of later ones alone; with padding on either side too."""
    network = make_network(name)
    network.set_attn_implementation(attention)
    model, ids = as_masked_diffusion(network, MASK, 0, attention="block", block_size=SIZE), tokens(1, 10)
    number = torch.arange(10) // SIZE
    for left, right in ((0, 0), (3, 0), (0, 2)):
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        canvas = torch.nn.functional.pad(ids, (left, right), value=3)
        before = logits_of(model, canvas, mask)[0, left : left + 10]
        for changed in range(10):
            other = canvas.clone()
            other[0, left + changed] = 4 + (ids[0, changed] - 3) % 40
            difference = (logits_of(model, other, mask)[0, left : left + 10] - before).abs().amax(dim=-1)
            assert (difference[number < number[changed]] == 0).all()
            assert (difference[number >= number[changed]] > 1e-4).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_padding_moves_no_block(name, attention):
    network = make_network(name)
    network.set_attn_implementation(attention)
    model = as_masked_diffusion(network, MASK, SHIFT.get(name, 0), attention="block", block_size=SIZE)
    ids = tokens(2, 7)
    alone, tolerance = logits_of(model, ids), 1e-9 if attention == "sdpa" else 1e-5
    if attention == "sdpa":
        torch.testing.assert_close(alone, by_hand(model, ids), rtol=0, atol=1e-10)
    for left, right in ((5, 0), (0, 5), (2, 3)):
        canvas = torch.nn.functional.pad(ids, (left, right), value=MASK)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        padded = logits_of(model, canvas, mask)[:, left : left + 7]
        torch.testing.assert_close(padded, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("qwen3", {"attention": "block"}, r"attention \('block'\) and block_size \(None\) do not fit"),
        ("qwen3", {"block_size": 4}, r"attention \('full'\) and block_size \(4\) do not fit"),
        ("qwen3", {"attention": "block", "block_size": 0}, "block_size must be an integer of at least 1, not 0"),
        ("modernbert", {"attention": "block", "block_size": 4}, "modernbert.* has layers with a sliding window"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        as_masked_diffusion(make_network(name), MASK, **options)


def test_an_attention_without_masks_is_refused(models):
    network = make_network("qwen3")
    network.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention', but block attention and caches need one of"):
        as_masked_diffusion(network, MASK, attention="block", block_size=SIZE)


def test_a_block_model_is_saved_and_loaded(tmp_path):
    model, ids = block_model("qwen2", dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.config.attention, loaded.config.block_size) == ("block", SIZE)
    assert_same_weights(loaded, model)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids), rtol=0, atol=1e-5)


# --- Training sees what sampling will see


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_one_forward_holds_every_block_behind_clean_ones(name, models):
    """Rows of the forward on noisy and clean tokens against one forward for each block."""
    model, clean = models[name], tokens(2, 10)
    noisy = clean.masked_fill(tokens(2, 10, seed=1) % 2 == 0, MASK)
    expected = by_hand(model, noisy, clean)
    torch.testing.assert_close(model(noisy, clean_ids=clean).logits, expected, rtol=0, atol=1e-10)
    assert (logits_of(model, noisy) - expected).abs().max() > 1e-3  # noisy blocks are no clean ones
    positions = noisy == MASK
    rows = model(noisy, clean_ids=clean, hidden_rows=positions)
    logits = rows.hidden @ rows.weight.T + rows.bias
    torch.testing.assert_close(logits, expected[positions], rtol=0, atol=1e-10)
    mask = torch.nn.functional.pad(torch.ones_like(clean), (0, 3))
    padded = (torch.nn.functional.pad(x, (0, 3), value=5) for x in (noisy, clean))
    logits = model(next(padded), clean_ids=next(padded), attention_mask=mask).logits[:, :10]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_clean_tokens_are_for_block_models(models):
    full = as_masked_diffusion(make_network("qwen3"), MASK)
    with pytest.raises(ValueError, match="clean_ids are for models with attention='block'"):
        full(tokens(1, 4), clean_ids=tokens(1, 4))
    with pytest.raises(ValueError, match=r"clean_ids must have the shape \(1, 4\), not \(1, 5\)"):
        models["qwen3"](tokens(1, 4), clean_ids=tokens(1, 5))


# --- Generation, with and without the cache


class Recorder(LogitsProcessor):
    def __init__(self):
        self.logits = []

    def __call__(self, input_ids, scores):
        self.logits.append(scores.clone())
        return scores


PROMPTS = torch.tensor([[0, 0, 0, 7, 8], [9, 10, 11, 12, 13]])
SEEN = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
ORDERS = [
    {"sampler": "ancestral", "steps": 3},
    {"sampler": "confidence", "steps": 2},
    {"sampler": "adaptive", "threshold": 0.3},
    {"sampler": "remdm", "steps": 5, "eta": 0.3},
]


@pytest.mark.parametrize("name, options", [("qwen3", ORDERS[0]), *(("qwen2", options) for options in ORDERS)])
def test_the_cache_changes_no_logit_and_no_token(name, options, models):
    """Prompts of two lengths in a batch: same tokens, steps and forwards, and fewer tokens computed."""
    model, found = models[name], {}
    shared = {"return_dict_in_generate": True, "output_reveal_steps": True, "seed": [1, 2], "max_new_tokens": 14}
    for cache in ("none", "exact"):
        recorder = Recorder()
        output = model.generate(
            PROMPTS,
            attention_mask=SEEN,
            cache=cache,
            logits_processor=LogitsProcessorList([recorder]),
            **shared,
            **options,
        )
        found[cache] = output, recorder.logits
    (plain, logits), (cached, same) = found["none"], found["exact"]
    assert torch.equal(plain.sequences, cached.sequences) and MASK not in cached.sequences
    assert torch.equal(plain.reveal_steps, cached.reveal_steps) and torch.equal(plain.nfe, cached.nfe)
    for ours, theirs in zip(same, logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (cached.computed < 0.7 * plain.computed).all()
    default = model.generate(PROMPTS, attention_mask=SEEN, **shared, **options)
    assert torch.equal(default.computed, cached.computed), "the cache of finished blocks is the default"
    alone = model.generate(PROMPTS[:1, 3:], **shared | {"seed": [1]}, **options)
    assert torch.equal(alone.sequences[0], cached.sequences[0, 3:])
    assert (alone.nfe, alone.computed) == (cached.nfe[0], cached.computed[0])


@pytest.mark.parametrize("shift", [0, 1])
def test_the_cache_runs_on_a_block_and_the_one_before(shift):
    """Five blocks of 4, two forwards in each: the first of a block also takes up the block before it."""
    model = as_masked_diffusion(make_network("qwen2"), MASK, shift, attention="block", block_size=SIZE)
    shared = {"sampler": "random", "steps": 2, "length": 20, "seed": 0, "return_dict_in_generate": True}
    plain, cached = (model.generate(cache=cache, **shared) for cache in ("none", "exact"))
    assert plain.nfe.item() == cached.nfe.item() == 10
    assert plain.computed.item() == 2 * (4 + 8 + 12 + 16 + 20)
    extra = 2 * 4 - 1  # under a shift, the token from which a block's first one is predicted, where there is one
    assert cached.computed.item() == 4 + 4 + 4 * (8 + 4) + shift * extra


def test_an_infill_leaves_given_blocks_alone(models):
    """A block without a mask is not filled, but seen: the row with it, and one without it beside it."""
    canvas = tokens(2, 16)
    canvas[0, 2:4] = canvas[0, 13] = canvas[1, 5:14] = MASK
    outputs = [
        models["qwen3"].generate(canvas, cache=cache, steps=2, seed=[3, 4], return_dict_in_generate=True)
        for cache in ("none", "exact")
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(outputs[1].sequences[canvas != MASK], canvas[canvas != MASK])
    assert outputs[1].computed.tolist() < outputs[0].computed.tolist()


def test_ended_rows_cost_nothing_more(models):
    model = models["qwen3"]
    options = {
        "steps": 2,
        "length": 24,
        "seed": list(range(6)),
        "num_return_sequences": 6,
        "eos_token_id": list(range(9)),
    }
    options |= {"stop_at_eos": True, "return_dict_in_generate": True}
    plain, cached = (model.generate(cache=cache, **options) for cache in ("none", "exact"))
    assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.nfe, cached.nfe)
    assert cached.nfe.min() < cached.nfe.max()


def test_blocks_of_one_token_have_the_law_of_the_causal_network():
    """Three tokens of three letters, one a block: p(x) is the product of the causal network's own probabilities."""
    shape = {"vocab_size": 4, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 3}
    network, generator = Qwen3ForCausalLM(Qwen3Config(**shape)), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.7, generator=generator)
    network = network.double().eval()
    law = torch.ones(27, dtype=torch.float64)
    with torch.no_grad():
        for number, text in enumerate(itertools.product(range(3), repeat=3)):
            for i in range(3):
                logits = network(input_ids=torch.tensor([[*text[:i], 3]])).logits[0, -1, :3]  # causal still
                law[number] *= logits.softmax(-1)[text[i]]
    model = as_masked_diffusion(network, 3, attention="block", block_size=1)
    output = model.generate(steps=1, num_return_sequences=8_000, seed=0, return_dict_in_generate=True)
    counts = (output.sequences @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert p_value(counts, law) > 1e-5 and p_value(counts, law.roll(1)) < 1e-5
    assert output.computed.unique().tolist() == [1 + 2 + 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_length": 8}, "block_length is 8, but the model sees in blocks of 4: leave it out, it is 4"),
        ({"cache": "dual"}, r"cache \('dual'\) is for a model in which every token sees every other"),
        (
            {"cache": "exact", "guidance_scale": 2.0, "input_ids": tokens(1, 3)},
            "does not go with guidance_scale or compile",
        ),
        ({"length": LENGTH + 1}, f"length is {LENGTH + 1}, but the model's context is {LENGTH} tokens$"),
    ],
)
def test_what_a_block_model_cannot_do_is_refused(options, message, models):
    with pytest.raises(ValueError, match=message):
        models["qwen3"].generate(**options)


def test_guidance_does_without_the_cache(models):
    options = {"guidance_scale": 2.0, "length": 12, "steps": 2, "seed": 0, "return_dict_in_generate": True}
    output = models["qwen3"].generate(tokens(1, 4), **options)
    assert output.nfe.item() == 8 and output.computed.item() == 4 * 8 + 4 * 12


# --- Noise of each block


def trainer_of(method, networks, folder):
    if method == "mdlm":
        settings = {"ema_decay": None, "save_strategy": "no", "per_device_train_batch_size": 4}
        trainer = MDLMTrainer(networks[1], MDLMTrainingArguments(output_dir=str(folder), seed=11, **settings))
        trainer.model.train()
        return trainer
    return make_trainer(method, {"absorbing": networks}, folder)


@pytest.fixture(scope="module")
def pairs():
    return {name: (block_model(name), block_model(name, seed=1)) for name in BLOCK_MODELS}


EYE = torch.eye(K, dtype=torch.float64)


def logits_of_blocks(network, ids, clean, mask):
    """As `by_hand`, with a gradient and with padding on the right."""
    result, length = [], ids.shape[1]
    for start in range(0, length, SIZE):
        end = min(start + SIZE, length)
        canvas, number = torch.cat([clean[:, :start], ids[:, start:end]], dim=1), torch.arange(end) // SIZE
        sees = (number[None, :] <= number[:, None])[None] & mask[:, None, :end] | torch.eye(end, dtype=torch.bool)
        logits = network.network(input_ids=canvas, attention_mask=sees[:, None]).logits
        result.append(shifted(logits, network.config.logits_shift)[:, start:end])
    return torch.cat(result, dim=1)


def rows_by_hand(network, positions, z, gamma, inputs):
    """Rows whose head is the identity: the logits of one forward a block."""
    clean = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(clean)).bool()
    z, positions = (x.reshape(len(clean), -1)[:, : clean.shape[1]] for x in (z, positions))
    return HeadRows(logits_of_blocks(network, z, clean, mask)[positions], EYE, EYE.new_zeros(K), MASK)


TRAINED = [("qwen3", method) for method in ("mdlm", *METHODS) if method not in ("dcd", "coupling")] + [
    ("qwen2", "mdlm"),
    ("qwen2", "mcd"),
]


@pytest.mark.parametrize("name, method", TRAINED)
def test_a_step_has_the_gradients_of_one_forward_a_block(name, method, pairs, tmp_path):
    """On rows of several lengths, with prompts, padding and blocks that are cut short."""
    inputs = {key: values[:, :30] for key, values in prompted().items()}
    trainer = trainer_of(method, pairs[name], tmp_path)
    assert_same_step(trainer, inputs, rows_by_hand, rtol=1e-3, atol=1e-7)


def test_the_loss_is_the_sum_of_the_blocks_own_nelbos(pairs, tmp_path):
    """BD3-LM, Eq. 6, written out: 1/t times the cross-entropy of the block's masked tokens, a time for each block."""
    network, x_0 = pairs["qwen3"][1], blocks()
    trainer = trainer_of("mdlm", pairs["qwen3"], tmp_path)
    loss = trainer.compute_loss(trainer.model, {"input_ids": x_0})
    times, u = step_noise(11, 0, range(4), 4, x_0.shape[1])
    golden, epsilon, total = (5**0.5 - 1) / 2, 1e-3, 0.0
    for start in range(0, x_0.shape[1], SIZE):
        t = epsilon + (1 - epsilon) * ((times + start // SIZE * golden) % 1)
        block = slice(start, start + SIZE)
        masked = u[:, block] > 1 - t[:, None]
        canvas = torch.cat([x_0[:, :start], x_0[:, block].masked_fill(masked, MASK)], dim=1)
        with torch.no_grad():
            log_p = by_hand(network, canvas)[:, block].index_fill(-1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
        nats = -log_p.gather(-1, x_0[:, block, None])[..., 0]
        total += (nats * masked / t[:, None]).sum()
    torch.testing.assert_close(loss.detach(), total / x_0.numel(), rtol=1e-6, atol=0)


def test_every_block_has_a_time_of_its_own(pairs, tmp_path):
    """Uniform over the batch for every block, spread along a row; the noise of other models stays what it was."""
    trainer, inputs = trainer_of("mdlm", pairs["qwen3"], tmp_path), {"input_ids": blocks()}
    length = blocks().shape[1]
    x_0, maskable, times, u = trainer.noise_rows(inputs)
    assert torch.equal(x_0.view(4, -1), blocks()) and maskable.all() and u.shape == x_0.shape
    of_rows, along = step_noise(11, 0, range(4), 4, length)[0], times.view(4, -1)
    assert torch.equal(along[:, 0], of_rows) and torch.equal(u.view(4, -1), step_noise(11, 0, range(4), 4, length)[1])
    for column in along.T:
        gaps = column.sort().values
        assert (gaps.roll(-1) - gaps).remainder(1).max() < 0.5 + 1e-9  # four strata, turned round the circle
    trainer.block_size = None
    trainer.reset_noise()
    x_0, _, times, u = trainer.noise_rows(inputs)
    assert x_0.shape == (4, length) and torch.equal(times, of_rows)


def test_the_nelbo_of_one_block_is_that_of_full_attention():
    """A block as long as the text sees all of it; with shorter ones, the bound is by hand."""
    full = as_masked_diffusion(make_network("qwen3"), MASK)
    text = tokens(3, 8)
    expected = block_nelbo(full, text, draws=2)
    torch.testing.assert_close(block_nelbo(block_model("qwen3", 8), text, draws=2).nats, expected.nats)

    class ByHand(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.device = model, model.config, torch.device("cpu")

        def forward(self, input_ids, hidden_rows, clean_ids):
            return HeadRows(by_hand(self.model, input_ids, clean_ids)[hidden_rows], EYE, EYE.new_zeros(K), MASK)

    model = block_model("qwen3")
    found = block_nelbo(model, text, draws=2)
    torch.testing.assert_close(found.nats, block_nelbo(ByHand(model), text, draws=2).nats, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"block_length is 30, but must be a multiple of the teacher's own block_size \(4\)"
    ):
        check_block_length(30, "teacher", model.config)  # before anything is trained
    with pytest.raises(ValueError, match=r"blocks are 7 tokens long, which must be a multiple of .* block_size \(4\)"):
        block_nelbo(model, text[:, :7])
