"""The model: published numbers, padding, precision, chosen rows, saving and loading, and the tools of the house."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_to_fp32
from deepspeed.runtime.zero.utils import apply_to_tensors_only
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_model import MASK, assert_same_weights
from torch.nn.parallel.distributed import _find_tensors
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, pipeline

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion, MDLMModel
from modeling_mcd.checks_mdlm import check_integers
from modeling_mcd.head_mdlm import HeadRows


DATA = Path(__file__).parent / "data"
RENAMED = {
    "vocab_embed.embedding": "model.embed_tokens.weight",
    "sigma_map.mlp.0": "model.noise_embedding.in_proj",
    "sigma_map.mlp.2": "model.noise_embedding.out_proj",
    "output_layer.norm_final": "model.norm",
    "output_layer.adaLN_modulation": "model.norm_modulation",
    "output_layer.linear": "lm_head",
    "blocks.": "model.layers.",
    ".attn_qkv": ".attention.qkv_proj",
    ".attn_out": ".attention.o_proj",
    ".norm1": ".attention_norm",
    ".norm2": ".mlp_norm",
    ".mlp.0": ".mlp.up_proj",
    ".mlp.2": ".mlp.down_proj",
    ".adaLN_modulation": ".modulation",
}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 48, shape, generator=torch.Generator().manual_seed(seed))


def rotary_frequencies(model: MDLMForMaskedDiffusion) -> torch.Tensor:
    """The angles at position 1, all of them at most 1."""
    cos, sin = model.model.rotary_emb(torch.tensor([[1]]))
    return torch.atan2(sin, cos)[0, 0].chunk(2)[0]


def inverse_frequencies(head_dim: int) -> torch.Tensor:
    return torch.tensor([10000 ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def logits_of(model: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """From a copy: weights mapped from a file lie unaligned in memory, and matrix products then round otherwise."""
    with torch.no_grad():
        return copy.deepcopy(model)(ids, **inputs).logits


# --- The published architecture


@pytest.fixture(scope="module")
def published() -> MDLMForMaskedDiffusion:
    config = json.loads((DATA / "config.json").read_text())
    model = MDLMForMaskedDiffusion(
        MDLMConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_dim"],
            num_hidden_layers=config["n_blocks"],
            num_attention_heads=config["n_heads"],
            conditioning_size=config["cond_dim"],
            max_position_embeddings=config["model_length"],
        )
    ).eval()
    weights = {}
    for name, tensor in load_file(DATA / "model.safetensors").items():
        name = name.removeprefix("backbone.")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        weights[name] = tensor
    frequencies = weights.pop("rotary_emb.inv_freq")
    torch.testing.assert_close(rotary_frequencies(model), frequencies)
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_renamed_published_weights_give_the_published_logits(published, attention):
    reference = load_file(DATA / "reference.safetensors")
    published.set_attn_implementation(attention)
    with torch.no_grad():
        logits = published(reference["input_ids"]).logits
    assert reference["logits"].std() > 0.1
    torch.testing.assert_close(logits, reference["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "width, layers, heads, parameters",
    [(768, 12, 12, 169_627_218), (1024, 24, 16, 424_477_010), (1536, 24, 16, 863_158_098)],
)
def test_parameter_counts_are_the_published_ones(width, layers, heads, parameters):
    config = MDLMConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    with torch.device("meta"):
        model = MDLMForMaskedDiffusion(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (config.vocab_size, config.mask_token_id, config.max_position_embeddings) == (50258, 50257, 1024)


def test_a_fresh_model_starts_at_zero_logits_and_identity_blocks():
    torch.manual_seed(0)
    config = MDLMConfig(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = MDLMForMaskedDiffusion(config).eval()
    outputs = model(tokens(2, 8), output_hidden_states=True)
    assert (outputs.logits == 0).all()
    embedded = model.model.embed_tokens(tokens(2, 8))
    assert embedded.std() > 0.01
    assert torch.equal(outputs.hidden_states[0], embedded) and torch.equal(outputs.hidden_states[1], embedded)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, r"hidden_size \(30\).*num_attention_heads.*\(4\)"),
        ({"hidden_size": 12, "num_attention_heads": 4}, r"hidden_size \(12\).*even width"),
        ({"vocab_size": 10, "mask_token_id": 10}, r"mask_token_id \(10\).*vocab_size = 10"),
        ({"vocab_size": 10, "mask_token_id": -1}, r"mask_token_id \(-1\)"),
        ({"noise_schedule": "linear"}, "noise_schedule"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(wrong, named):
    with pytest.raises(Exception, match=f"(?s){named}"):
        MDLMConfig(**wrong)


# --- Attention and padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_no_real_position(model, side, attention):
    model.set_attn_implementation(attention)
    ids = tokens(3, 12)
    with torch.no_grad():
        alone = model(ids).logits
        for filler in (0, MASK):
            pad, ones = torch.full((3, 5), filler), torch.ones(3, 12, dtype=torch.long)
            padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
            mask = torch.cat([pad * 0, ones] if side == "left" else [ones, pad * 0], dim=1)
            logits = model(padded, attention_mask=mask).logits
            real = logits[:, 5:] if side == "left" else logits[:, :12]
            unmasked = model(padded).logits
            # Rotary angles of shifted positions round differently, in proportion to the logits.
            torch.testing.assert_close(real, alone, atol=1e-6, rtol=1e-6 if side == "right" else 1e-5)
            assert (unmasked[:, 5:] if side == "left" else unmasked[:, :12]).sub(alone).abs().max() > 1e-2


def test_padding_of_each_row_is_its_own(model):
    ids, lengths = tokens(3, 12), (12, 7, 1)
    mask = torch.stack([torch.arange(12) < length for length in lengths]).long()
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-6, rtol=1e-6)


def test_attention_is_bidirectional_and_position_ids_are_rotary(model):
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 48
    with torch.no_grad():
        logits = model(ids).logits
        assert (model(changed).logits[0, 0] - logits[0, 0]).abs().max() > 1e-3
        shifted = model(ids, position_ids=torch.arange(8)[None] + 9).logits
        stretched = model(ids, position_ids=torch.arange(8)[None] * 2).logits
    torch.testing.assert_close(shifted, logits, atol=1e-5, rtol=1e-5)
    assert (stretched - logits).abs().max() > 1e-3


def test_flex_attention_gives_the_same_logits(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        with torch.compiler.set_stance("force_eager"):  # the compiled kernel takes 15 s to build
            logits = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="(?i)flash"):
            model.set_attn_implementation("flash_attention_2")


# --- Precision


@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_residual_and_norms_are_float32_in_bfloat16_runs(model, half):
    seen = {}

    def note(name):
        def hook(module, args, output):
            seen.setdefault(f"{name} in", set()).add(args[0].dtype)
            seen.setdefault(f"{name} out", set()).add((output[0] if isinstance(output, tuple) else output).dtype)

        return hook

    for module in model.modules():
        kind = type(module).__name__
        if kind in ("MDLMLayer", "MDLMLayerNorm", "MDLMAttention", "MDLMMLP"):
            module.register_forward_hook(note(kind))
    if half == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"), torch.no_grad():
        outputs = model(tokens(2, 8), labels=tokens(2, 8))
    for name in ("MDLMLayer in", "MDLMLayer out", "MDLMLayerNorm in", "MDLMLayerNorm out"):
        assert seen[name] == {torch.float32}, name
    for name in ("MDLMAttention in", "MDLMAttention out", "MDLMMLP in", "MDLMMLP out"):
        assert seen[name] == {torch.bfloat16}, name
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32


def test_bfloat16_weights_keep_float32_rotary_angles(model):
    before = model.model.rotary_emb(torch.arange(1024)[None])
    model.to(torch.bfloat16)  # as DeepSpeed does; a rounded frequency turns the wrong angle at a far position
    after = model.model.rotary_emb(torch.arange(1024)[None])
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


# --- Outputs, labels, chosen rows


def test_hidden_states_and_attentions_come_on_request(model):
    model.set_attn_implementation("eager")
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[:, 6:] = 0
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
        plain = model(ids, attention_mask=mask)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(outputs.logits, model.lm_head(outputs.hidden_states[-1]), atol=0, rtol=0)
    for weights in outputs.attentions:
        assert weights.shape == (2, 2, 8, 8) and (weights[..., 6:] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 8))


def test_tuple_outputs_and_the_trunk_alone(model):
    ids = tokens(2, 8)
    with torch.no_grad():
        outputs = model(ids)
        assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)
        trunk = model.model(ids).last_hidden_state
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, outputs.logits)
    assert torch.equal(model.get_output_embeddings()(trunk), outputs.logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 8, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


def test_labels_of_minus_100_are_left_out_of_the_loss(model):
    ids, labels = tokens(2, 8), tokens(2, 8, seed=1)
    labels[0, :5] = labels[1, 3] = -100
    outputs = model(ids, labels=labels)
    logs = outputs.logits.double().log_softmax(-1)
    chosen = [-logs[b, i, labels[b, i]] for b in range(2) for i in range(8) if labels[b, i] != -100]
    assert len(chosen) == 10
    torch.testing.assert_close(outputs.loss.double(), torch.stack(chosen).mean(), atol=1e-6, rtol=0)


def test_hidden_rows_with_the_head_give_the_full_logits(model):
    ids = tokens(3, 8)
    mask = torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.4
    indices = mask.flatten().nonzero()[:, 0]
    with torch.no_grad():
        logits = model(ids).logits.flatten(0, 1)
        for rows in (mask, indices, indices.flip(0)):
            head = model(ids, hidden_rows=rows)
            assert isinstance(head, HeadRows) and head.mask_token_id == MASK and head.hidden.shape == (mask.sum(), 32)
            expected = logits[indices if rows is mask else rows]
            torch.testing.assert_close(head.hidden @ head.weight.T + head.bias, expected, atol=1e-5, rtol=0)
        none = model(ids, hidden_rows=torch.zeros(3, 8, dtype=torch.bool))
        assert none.hidden.shape == (0, 32)
    with pytest.raises(ValueError, match="labels and hidden_rows exclude each other"):
        model(ids, labels=ids, hidden_rows=mask)


def test_hidden_rows_never_run_the_head(model):
    model.lm_head.register_forward_hook(lambda *unused: pytest.fail("the head ran"))
    model(tokens(3, 8), hidden_rows=torch.tensor([0, 9, 23]))


def test_wrappers_find_every_tensor_of_head_rows(model):
    """What DDP, DeepSpeed, accelerate's autocast and torch's pytrees do with a forward's result."""
    head = model(tokens(3, 8), hidden_rows=torch.tensor([0, 9, 23]))
    tensors = [head.hidden, head.weight, head.bias]
    assert all(a is b for a, b in zip(_find_tensors(head), tensors, strict=True))
    leaves, tree = torch.utils._pytree.tree_flatten(head)
    again = torch.utils._pytree.tree_unflatten([leaf * 2 for leaf in leaves[:3]] + leaves[3:], tree)
    assert type(again) is HeadRows and again.mask_token_id == MASK and torch.equal(again.bias, head.bias * 2)
    rounded = convert_to_fp32(head.to(torch.bfloat16))
    assert type(rounded) is HeadRows and rounded.hidden.dtype == torch.float32 and rounded.mask_token_id == MASK
    touched = apply_to_tensors_only(lambda tensor: tensor.clone(), head)
    assert touched is head and head.weight is not tensors[1] and head["weight"] is head.weight


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("padded", [False, True])
def test_chosen_positions_are_those_of_the_full_canvas(model, attention, padded):
    """Flex attention without its compiled CPU kernel: with 8 tokens of width 16, that reads past the keys (torch 2.13)."""
    model.set_attn_implementation(attention)
    ids, positions = tokens(3, 8), torch.tensor([[1, 4, 0], [7, 2, 2], [5, 3, 6]])
    mask = torch.arange(8) < torch.tensor([[8], [5], [7]]) if padded else None
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        full = model.model(ids, attention_mask=mask).last_hidden_state
        chosen = model.model(ids, attention_mask=mask, hidden_rows=positions).last_hidden_state
    torch.testing.assert_close(chosen, torch.stack([full[b, positions[b]] for b in range(3)]), atol=1e-6, rtol=0)


def test_the_last_layer_runs_on_chosen_positions_only(model):
    shapes = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model.model(tokens(3, 8), hidden_rows=torch.tensor([[1, 4], [7, 2], [5, 3]]))
    assert shapes == [(3, 8, 32), (3, 2, 32)]


class Quantised(torch.nn.Module):
    """Stands where a quantiser puts its own layer: another class, whose weight holds bytes and whose bias does not."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.bias = [linear], linear.bias
        self.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden_states):
        return self.linear[0](hidden_states)


def test_every_linear_layer_of_the_trunk_can_be_replaced(build):
    """As bitsandbytes and quanto do, which leave the head alone."""
    model, ids, sigma = build(time_conditioning=True), tokens(2, 8), torch.tensor([0.1, 3.0])
    logits, replaced = logits_of(model, ids, timesteps=sigma), 0
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Quantised(child))
                replaced += 1
    assert replaced == 2 * 5 + 3
    with torch.no_grad():
        assert torch.equal(model(ids, timesteps=sigma).logits, logits)


def test_attentions_under_sdpa_are_refused_with_the_fix(model):
    for network in (model, model.model):
        with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager': 'sdpa'"):
            network(tokens(2, 8), output_attentions=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("noise_epsilon", 1.0, r"noise_epsilon must lie in \(0, 1\), not 1.0"),
        ("num_attention_heads", 0, "num_attention_heads must be an integer of at least 1, not 0"),
        ("pad_token_id", 48, r"pad_token_id \(48\) must lie in \[0, vocab_size = 48\)"),
        ("noise_eps", 0.1, r"unknown configuration field noise_eps \(0.1\): did you mean noise_epsilon\?"),
    ],
)
def test_a_configuration_refuses_by_field_value_and_rule(build, field, value, message):
    """All cases: `tests/bad_input.py`."""
    with pytest.raises(ValueError, match=message) as error:
        MDLMConfig(**build().config.to_dict() | {field: value})
    assert "\n" not in str(error.value)


def test_what_other_programs_write_into_a_configuration_is_kept(tmp_path):
    """Standard keys of transformers, those of other models, and files written before a field existed."""
    content = json.loads(Path("recipes/tiny/teacher/config.json").read_text())
    foreign = {
        "torch_dtype": "bfloat16",
        "sep_token_id": 3,
        "num_labels": 2,
        "use_cache": False,
        "attention_dropout": 0.1,
    }
    (tmp_path / "config.json").write_text(json.dumps(content | foreign | {"_name_or_path": "a/b", "top_k": 50}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MDLMConfig and config.sep_token_id == 3 and config.hidden_size == content["hidden_size"]


def test_values_are_looked_at_on_a_cpu_only(model):
    """An accelerator would be waited for; the meta device has no values, and a look at them would fail."""
    check_integers("input_ids", torch.full((2, 8), 48, device="meta"), 48)
    with pytest.raises(ValueError, match="input_ids must lie in 0 .. 47, not be 48"):
        model(torch.full((2, 8), 48))


# --- Time conditioning


def test_time_conditioning_needs_timesteps_and_depends_on_them(build):
    model, ids = build(time_conditioning=True), tokens(2, 8)
    with pytest.raises(ValueError, match="time_conditioning.*timesteps"):
        model(ids)
    with torch.no_grad():
        low, high = (model(ids, timesteps=torch.full((2,), sigma)).logits for sigma in (0.1, 3.0))
        mixed = model(ids, timesteps=torch.tensor([0.1, 3.0])).logits
    assert (low - high).abs().max() > 1e-2
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1]]), atol=1e-6, rtol=1e-6)


def test_without_time_conditioning_timesteps_change_nothing(build, model):
    ids = tokens(2, 8)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(ids, timesteps=torch.tensor([0.1, 3.0])).logits, logits)
        conditioned = build(time_conditioning=True)(ids, timesteps=torch.zeros(2)).logits
    torch.testing.assert_close(conditioned, logits, atol=1e-6, rtol=1e-6)


def test_the_constant_modulation_is_computed_once_a_forward_for_one_row(model):
    shapes = []
    for layer in model.model.layers:
        layer.modulation.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    model(tokens(3, 8))
    assert shapes == [(1, 16), (1, 16)]


# --- Training machinery


def test_activation_checkpointing_gives_the_same_gradients(build):
    gradients = []
    for checkpointing in (False, True):
        model, recomputed = build(hidden_dropout=0.0).train(), []
        model.model.layers[0].mlp.register_forward_hook(lambda *unused: recomputed.append(1))  # noqa: B023
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens(2, 8), labels=tokens(2, 8, seed=1)).loss.backward()
        assert len(recomputed) == 1 + checkpointing
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_layer_is_computed_for_few_rows_with_the_same_gradients(build, conditioned, attention):
    """Of the rows of a batch other numbers of positions, one row none: what the trunk gives for all of them, in float64."""
    model = build(time_conditioning=conditioned).double()
    model.set_attn_implementation(attention)
    ids, chosen = tokens(3, 8), torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    chosen[1] = False
    inputs = {"input_ids": ids, "timesteps": torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)}
    inputs["attention_mask"] = (torch.arange(24).view(3, 8) // 2 != 3).long()  # the first row ends with padding
    seen, found = [], []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    for full in (False, True):
        hidden = (
            model.model(**inputs).last_hidden_state[chosen] if full else model(**inputs, hidden_rows=chosen).hidden
        )
        hidden.sin().sum().backward()
        found.append([hidden.detach()] + [parameter.grad for parameter in model.model.parameters()])
        model.zero_grad()
    hook.remove()
    assert seen[0] == (chosen.sum(), 32) and seen[1] == (3, 8, 32)
    for few, all_of_them in zip(*found, strict=True):
        torch.testing.assert_close(few, all_of_them, atol=1e-12, rtol=1e-9)
    flat = model(**inputs, hidden_rows=chosen.flatten().nonzero()[:, 0]).hidden
    torch.testing.assert_close(flat, found[0][0])


def test_no_positions_leave_zero_gradients(build):
    model = build()
    hidden = model(tokens(2, 8), hidden_rows=torch.zeros(2, 8, dtype=torch.bool)).hidden
    hidden.sum().backward()
    assert hidden.shape == (0, 32) and all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_dropout_draws_the_same_numbers_whatever_the_rows(build):
    """Noise of a training never changes: the last layer is then computed in full."""
    model, ids, chosen = build(hidden_dropout=0.5).train(), tokens(2, 8), torch.arange(16).view(2, 8) % 3 == 0
    torch.manual_seed(0)
    expected = model.model(ids).last_hidden_state[chosen]
    torch.manual_seed(0)
    assert torch.equal(model(ids, hidden_rows=chosen).hidden, expected)


def test_dropout_acts_in_training_only(build):
    model, ids = build(hidden_dropout=0.5), tokens(2, 8)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_compiles_to_one_graph(build):
    model = build(num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": mask}):
            torch.testing.assert_close(compiled(ids, **arguments).logits, model(ids, **arguments).logits)
        rows = {"hidden_rows": torch.tensor([1, 4])}
        torch.testing.assert_close(compiled(ids, **rows).hidden, model(ids, **rows).hidden)


# --- Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_is_bitwise(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = MDLMForMaskedDiffusion.from_pretrained(tmp_path)  # built on the meta device
    assert loaded.dtype == dtype and not loaded.training
    assert_same_weights(model, loaded)
    assert loaded.model.rotary_emb(torch.zeros(1, 1, dtype=torch.long))[0].dtype == torch.float32
    torch.testing.assert_close(rotary_frequencies(loaded), inverse_frequencies(16))
    if dtype == torch.float32:
        assert torch.equal(logits_of(loaded, tokens(2, 8)), logits_of(model, tokens(2, 8)))
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()


def test_a_bfloat16_checkpoint_loads_as_float32_for_training(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.dtype == torch.float32
    assert_same_weights(loaded, model.float())


def test_sharded_saving_and_loading_is_bitwise(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    assert torch.equal(logits_of(loaded, tokens(2, 8)), logits_of(model, tokens(2, 8)))


def test_a_truncated_checkpoint_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|invalid|truncat|error while deserializing"):
        AutoModel.from_pretrained(tmp_path)


def test_a_model_built_on_the_meta_device_is_right_after_loading(build, model, tmp_path):
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = MDLMForMaskedDiffusion(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = MDLMForMaskedDiffusion.from_pretrained(tmp_path)
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    positions = torch.arange(1024)[None]
    angles = positions[0, :, None].double() * inverse_frequencies(16).double()
    cos, sin = loaded.model.rotary_emb(positions)
    torch.testing.assert_close(cos[0, :, :8].double(), angles.cos(), atol=2e-4, rtol=0)
    torch.testing.assert_close(sin[0, :, 8:].double(), angles.sin(), atol=2e-4, rtol=0)


def test_auto_classes_find_the_model_by_import(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MDLMConfig
    assert config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    for auto in (AutoModel, AutoModelForMaskedLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is MDLMForMaskedDiffusion
        assert_same_weights(model, loaded)
        assert type(auto.from_config(config)) is MDLMForMaskedDiffusion


def test_the_trunk_loads_from_a_full_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert_same_weights(model.model, MDLMModel.from_pretrained(tmp_path))


def test_generation_options_are_saved_with_the_model(model, tmp_path):
    model.generation_config.steps, model.generation_config.temperature = 5, 0.5
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["steps"] == 5
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (loaded.generation_config.steps, loaded.generation_config.temperature) == (5, 0.5)
    assert torch.equal(loaded.generate(seed=3), model.generate(seed=3, steps=5, temperature=0.5))
    assert loaded.generate(seed=3, return_dict_in_generate=True).nfe.item() <= 5
    assert loaded.generate(seed=3, steps=32, return_dict_in_generate=True).nfe.item() > 5
    assert loaded.generation_config.steps == 5, "an argument of one call stays in the model"
    (tmp_path / "generation_config.json").unlink()
    assert AutoModel.from_pretrained(tmp_path).generate(seed=3).shape == (1, 32)


def test_tied_embeddings_stay_tied_through_a_round_trip(build, tmp_path):
    torch.manual_seed(0)
    config = build().config.to_dict() | {"tie_word_embeddings": True}
    assert MDLMForMaskedDiffusion(MDLMConfig(**config)).lm_head.weight.std() > 0.01, (
        "the zero head wiped the embedding"
    )
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded, tokens(2, 8)), logits_of(model, tokens(2, 8)))


def test_resized_vocabulary_keeps_the_old_logits_and_the_mask(model, tmp_path):
    ids = tokens(2, 8)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(60)
        after = model(ids).logits
    assert (model.config.vocab_size, model.config.mask_token_id, after.shape) == (60, MASK, (2, 8, 60))
    torch.testing.assert_close(after[..., :48], before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModel.from_pretrained(tmp_path), ids), after)
    assert (model.generate(seed=0, steps=4) != MASK).all()


# --- The tools of the house


@pytest.mark.parametrize("targets, layers", [(["qkv_proj"], 2), ("all-linear", 13)])
def test_lora_generates_saves_and_loads(build, tmp_path, targets, layers):
    """Also with every linear layer inside the network, the modulations among them; the head stays as it is."""
    base = build().generate(seed=0, steps=8)
    adapted = get_peft_model(build(), LoraConfig(target_modules=targets, r=2))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * layers and all(".lora_" in name and "lm_head" not in name for name in names)
    assert torch.equal(adapted.generate(seed=0, steps=8), base), "a fresh adapter is the identity"
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(adapted.generate(seed=0, steps=8), base)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    adapted.eval()
    assert torch.equal(logits_of(loaded, tokens(2, 8)), logits_of(adapted, tokens(2, 8)))


def test_the_fill_mask_pipeline_ranks_the_tokens_as_the_model_does(model, tokenizer):
    text = "the c[MASK]t sat"
    answers = pipeline("fill-mask", model=model, tokenizer=tokenizer)(text, top_k=3)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids.shape == (1, 11) and ids[0, 5] == MASK == tokenizer.mask_token_id
    with torch.no_grad():
        likeliest = model(ids).logits[0, 5].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == likeliest.indices.tolist()
    assert math.isclose(answers[0]["score"], likeliest.values[0].item(), rel_tol=1e-5)
    assert answers[0]["sequence"] == tokenizer.decode(ids[0].index_fill(0, torch.tensor(5), answers[0]["token"]))
