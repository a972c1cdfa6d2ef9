"""Sampling and `generate`: exact laws by chi-squared, reveal-first, locked noise, prompts, and refusals by name.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5: another stream of random numbers than this one
would fail a right sampler once in a hundred thousand times.
"""

import itertools

import numpy as np
import pytest
import torch
from laws import FALSE_ALARM, p_value, uniforms
from small_model import MASK, make_context_matter
from toy import counts_of, finish, index_of, sample, table_of_logits, toy_canvas
from transformers import GenerationConfig, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer

from modeling_mcd import MDLMConfig, MDLMGenerationConfig, MDLMGenerationOutput
from modeling_mcd.canvas_mdlm import Canvas
from modeling_mcd.draws_mdlm import draw_tokens
from modeling_mcd.forward_process_mdlm import AbsorbingProcess
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule, noise_schedule_of
from modeling_mcd.reveal_grid_mdlm import ancestral_reveal_steps
from modeling_mcd.sampling_mdlm import ancestral


SCHEDULES = [LogLinearSchedule(), CosineSchedule(), LogLinearSchedule(0.2), CosineSchedule(0.2)]


# --- The law of the sampler: three tokens and a mask (id 3) at three positions, 64 canvases


def exact_law(table: torch.Tensor, start: list[int], steps: int, schedule, temperature: float = 1.0) -> torch.Tensor:
    """Probability of each of the 64 canvases at the end, by enumeration of the textbook sampler.

    Between t and s < t every masked position stays masked with (1 - gamma_s) / (1 - gamma_t), and otherwise takes a
    token of the denoiser's distribution, all independently given the canvas.
    """
    law = torch.zeros(64, dtype=torch.float64)
    law[index_of(torch.tensor(start))] = 1
    gamma = schedule.gamma(1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
    tokens = (table.double()[:, :, :3] / temperature).softmax(-1)
    for k in range(steps):
        stay = (1 - gamma[k + 1]) / (1 - gamma[k]) if k + 1 < steps else 0.0
        after = torch.zeros_like(law)
        for canvas in itertools.product(range(4), repeat=3):
            here = index_of(torch.tensor(canvas))
            for target in itertools.product(range(4), repeat=3):
                probability = law[here].item()
                for i, (old, new) in enumerate(zip(canvas, target, strict=True)):
                    if old != 3:
                        probability *= old == new
                    else:
                        probability *= stay if new == 3 else (1 - stay) * tokens[here, i, new].item()
                after[index_of(torch.tensor(target))] += probability
        law = after
    return law


@pytest.mark.parametrize(
    "start, steps, schedule, temperature",
    [
        ([3, 3, 3], 3, LogLinearSchedule(), 1.0),
        ([3, 3, 3], 1, LogLinearSchedule(), 1.0),
        ([3, 3, 3], 3, CosineSchedule(), 1.0),
        ([3, 3, 3], 3, LogLinearSchedule(0.2), 1.0),
        ([3, 3, 3], 3, LogLinearSchedule(), 0.7),
        ([1, 3, 3], 3, LogLinearSchedule(), 1.0),
        ([3, 0, 3], 2, LogLinearSchedule(), 0.7),
    ],
)
def test_ancestral_sampling_has_the_exact_law(start, steps, schedule, temperature):
    law = exact_law(table_of_logits(), start, steps, schedule, temperature)
    counts = counts_of(
        sample(ancestral, table_of_logits(), start, schedule=schedule, temperature=temperature, steps=steps)
    )
    assert counts.sum() == 100_000
    assert p_value(counts, law) > FALSE_ALARM


def test_the_chi_squared_test_sees_a_wrong_law():
    """The test above has power: it tells neighbouring laws apart with certainty."""
    counts = counts_of(sample(ancestral, table_of_logits(), draws=200_000, steps=3))
    for steps, schedule, temperature in (
        (2, LogLinearSchedule(), 1.0),
        (3, CosineSchedule(), 1.0),
        (3, LogLinearSchedule(), 0.97),
    ):
        assert p_value(counts, exact_law(table_of_logits(), [3, 3, 3], steps, schedule, temperature)) < 1e-12


def test_generate_has_the_exact_law_of_its_network(build):
    model = build(vocab_size=4, hidden_size=16, max_position_embeddings=3, bos_token_id=None, eos_token_id=None)
    model.lm_head.weight.data *= 0.3
    make_context_matter(model)
    canvases = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.no_grad():
        table = model(canvases).logits
    sequences = model.generate(torch.tensor([[3, 2, 3]]), num_return_sequences=100_000, steps=2, seed=0)
    counts = index_of(sequences).bincount(minlength=64)
    assert p_value(counts, exact_law(table, [3, 2, 3], 2, LogLinearSchedule())) > FALSE_ALARM
    assert p_value(counts, exact_law(table, [3, 2, 3], 1, LogLinearSchedule())) < 1e-9, "the test has no power"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reveal_steps_have_the_law_of_the_posterior(schedule):
    steps = ancestral_reveal_steps(uniforms(300_000), 7, schedule)
    gamma = schedule.gamma(1 - torch.arange(8, dtype=torch.float64) / 7)
    assert p_value(steps.bincount(minlength=7), gamma.diff() / (1 - gamma[0])) > FALSE_ALARM


def test_reveal_steps_reach_both_ends():
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for schedule in SCHEDULES:
        assert ancestral_reveal_steps(u, 5, schedule).tolist() == [0, 4]
        assert ancestral_reveal_steps(u, 1, schedule).tolist() == [0, 0]


# --- One token from its distribution


def test_drawn_tokens_have_the_exact_law_and_never_probability_zero():
    probabilities = torch.tensor([0.0, 0.1, 0.0, 0.3, 0.05, 0.0, 0.55, 0.0], dtype=torch.float64)
    logits = probabilities.log()
    logits[2], logits[7] = 1000.0, -torch.inf  # the mask is the favourite
    for temperature in (1.0, 0.7, 2.0):
        counts = draw_tokens(logits.repeat(200_000, 1), uniforms(200_000), 2, temperature).bincount(minlength=8)
        law = probabilities ** (1 / temperature)
        assert p_value(counts, law / law.sum()) > FALSE_ALARM


def test_no_uniform_draws_the_mask_or_a_token_of_probability_zero():
    ends = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    for mask in range(4):
        logits = torch.zeros(4, 4)
        zero = (mask + 1) % 4
        logits[:, mask], logits[:, zero] = 50.0, -torch.inf
        drawn = draw_tokens(logits, ends, mask)
        assert not ((drawn == mask) | (drawn == zero)).any()


@pytest.mark.parametrize("rare", [1e-9, 1e-14])
def test_drawing_resolves_what_float32_cannot(rare):
    law = torch.tensor([0.6, rare, 0.4 - rare, 0.0], dtype=torch.float64)
    inside = torch.tensor([0.6 - rare / 2, 0.6 + rare / 2, 0.6 + 3 * rare / 2], dtype=torch.float64)
    assert draw_tokens(law.log().repeat(3, 1), inside, 3).tolist() == [0, 1, 2]
    assert (inside.float() == torch.tensor(0.6)).all(), "these uniforms are one number in float32"


def test_temperature_zero_and_tiny_temperatures_take_the_likeliest():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    likeliest = logits[:, :8].argmax(-1)
    for temperature in (0, 0.0, 1e-6, 1e-310):
        assert torch.equal(draw_tokens(logits, uniforms(50), 8, temperature), likeliest)


def test_drawing_leaves_the_logits_as_they_are():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
        before = logits.clone()
        draw_tokens(logits, uniforms(5), 8)
        assert torch.equal(logits, before)


# --- Noise schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_falls_from_one_with_a_right_inverse_and_derivative(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    gamma = schedule.gamma(t)
    assert abs(gamma[0].item() - 1) < 1e-12 and 0 < gamma[-1] < 1 and (gamma.diff() < 0).all()
    torch.testing.assert_close(schedule.inverse(gamma), t, atol=1e-9, rtol=0)
    (slope,) = torch.autograd.grad(gamma.sum(), t)
    torch.testing.assert_close(schedule.derivative(t.detach()), slope, atol=1e-12, rtol=1e-12)


def weights_at(schedule, t):
    return AbsorbingProcess(schedule, 48, 47).token_weights(schedule.gamma(t), schedule.derivative(t))


def test_the_nelbo_weight_is_one_over_t_under_log_linear():
    t = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
    for epsilon in (1e-3, 0.2):
        torch.testing.assert_close(weights_at(LogLinearSchedule(epsilon), t), 1 / t, atol=0, rtol=1e-11)
    assert (weights_at(CosineSchedule(), t) - 1 / t).abs().max() > 0.1


def test_a_configuration_names_its_schedule():
    assert LogLinearSchedule().gamma(torch.tensor(1.0, dtype=torch.float64)).item() == pytest.approx(1e-3)
    assert noise_schedule_of(MDLMConfig()) == LogLinearSchedule(1e-3)
    assert noise_schedule_of(MDLMConfig(noise_schedule="cosine", noise_epsilon=0.2)) == CosineSchedule(0.2)


# --- Locked noise


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 8, 50])
def test_the_visible_sets_of_n_and_2n_steps_agree_at_common_times(schedule, steps):
    u = uniforms(100_000)
    coarse, fine = ancestral_reveal_steps(u, steps, schedule), ancestral_reveal_steps(u, 2 * steps, schedule)
    assert torch.equal(fine // 2, coarse)


def run(table, steps, seed=0):
    """The final canvas of eight rows, the canvas at each reveal, and the number of forwards."""
    path = []

    class Recorder(Canvas):
        def ask(self, where, time, **how):
            rows = where.any(dim=1)
            path.append((rows.nonzero()[:, 0].tolist(), self.tokens[rows].tolist(), where[rows].tolist()))
            return super().ask(where, time, **how)

    canvas = toy_canvas(table, [3, 3, 3], draws=8, seed=seed)
    canvas.__class__ = Recorder
    finish(canvas, ancestral(canvas, steps=steps))
    return canvas.tokens, path, canvas.nfe


def test_what_is_revealed_when_does_not_depend_on_the_network():
    ones, others = run(table_of_logits(0), 6), run(table_of_logits(1), 6)
    assert [(rows, reveal) for rows, _, reveal in ones[1]] == [(rows, reveal) for rows, _, reveal in others[1]]
    assert not torch.equal(ones[0], others[0])
    assert torch.equal(ones[2], others[2])


def test_each_mask_is_revealed_once_and_seen_from_then_on():
    final, path, forwards = run(table_of_logits(), 6)
    revealed, taken = torch.zeros(8, 3, dtype=torch.long), torch.zeros(8, dtype=torch.long)
    for rows, canvas, reveal in path:
        canvas, reveal = torch.tensor(canvas), torch.tensor(reveal)
        assert torch.equal(canvas != 3, revealed[rows] > 0)
        assert torch.equal(canvas[canvas != 3], final[rows][canvas != 3])
        assert reveal.any(dim=1).all(), "a row that reveals nothing needs no forward"
        revealed[rows] += reveal
        taken[rows] += 1
    assert (revealed == 1).all() and torch.equal(taken, forwards)


def test_a_network_blind_to_its_canvas_gives_one_text_at_any_steps():
    table = table_of_logits()[:1].expand(64, 3, 4)
    texts = [run(table, steps)[0] for steps in (1, 2, 5, 64)]
    assert all(torch.equal(text, texts[0]) for text in texts[1:])
    assert not torch.equal(run(table, 5, seed=1)[0], texts[0])


# --- generate


@pytest.mark.parametrize("steps", [1, 3, 16, 200])
def test_head_and_last_layer_run_once_a_mask_and_nfe_is_true(model, steps):
    head, trunk, last_layer = [], [], []
    model.lm_head.register_forward_hook(lambda module, args, output: head.append(tuple(output.shape)))
    model.model.register_forward_hook(lambda module, args, output: trunk.append(len(output.last_hidden_state)))
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: last_layer.append(output.shape[1]))
    prompt = torch.arange(10).reshape(2, 5)
    arguments = {"return_dict_in_generate": True, "output_reveal_steps": True}
    output = model.generate(prompt, num_return_sequences=3, steps=steps, seed=0, **arguments)
    assert isinstance(output, MDLMGenerationOutput) and output.nfe.shape == (6,)
    masks = 6 * (32 - 5)
    assert all(len(shape) == 2 for shape in head) and sum(shape[0] for shape in head) == masks
    assert len(trunk) <= steps and sum(trunk) == output.nfe.sum()
    reveals = [(output.reveal_steps == step).sum(dim=1).max().item() for step in range(steps)]
    assert last_layer == [most for most in reveals if most]
    assert (1 <= output.nfe).all() and (output.nfe <= min(steps, 27)).all()
    if steps == 3:
        assert (output.nfe == 3).all()


def test_prompt_and_infill_tokens_stay_and_no_mask_is_left(model):
    ids = torch.randint(0, 47, (4, 20), generator=torch.Generator().manual_seed(0))
    holes = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) < 0.5
    infilled = model.generate(ids.masked_fill(holes, MASK), steps=4, seed=0)
    assert infilled.shape == (4, 20) and torch.equal(infilled[~holes], ids[~holes])
    assert (infilled != MASK).all() and not torch.equal(infilled, ids)
    continued = model.generate(ids, steps=4, seed=0, length=30)
    assert continued.shape == (4, 30) and torch.equal(continued[:, :20], ids) and (continued != MASK).all()
    both = model.generate(ids.masked_fill(holes, MASK), steps=4, seed=0, length=25)
    assert both.shape == (4, 25) and torch.equal(both[:, :20][~holes], ids[~holes]) and (both != MASK).all()


def test_the_default_length(model):
    assert model.generate(seed=0, steps=2).shape == (1, 32)
    assert model.generate(torch.tensor([[1, 2, 3]]), seed=0, steps=2).shape == (1, 32)
    assert model.generate(torch.tensor([[1, MASK, 3]]), seed=0, steps=2).shape == (1, 3)
    assert model.generate(length=9, seed=0, steps=2).shape == (1, 9)


def test_the_callers_tensors_and_the_training_mode_are_left_alone(model):
    ids = torch.tensor([[1, MASK, MASK, 2]])
    mask = torch.ones_like(ids)
    model.train()
    first = model.generate(ids, attention_mask=mask, seed=0, steps=2)
    assert ids.tolist() == [[1, MASK, MASK, 2]] and (mask == 1).all() and model.training
    model.eval()
    assert torch.equal(model.generate(ids, attention_mask=mask, seed=0, steps=2), first), "dropout was on"
    assert not model.training and not first.requires_grad


def test_padding_is_neither_seen_nor_filled(model):
    model.lm_head.weight.data *= 3
    alone = model.generate(torch.tensor([[5, MASK, MASK, 6]]), seed=4, steps=1)
    ids, mask = torch.tensor([[5, MASK, MASK, 6, MASK, 7]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    for filler in (7, 8):
        ids[0, 5] = filler
        padded = model.generate(ids, attention_mask=mask, seed=4, steps=1, temperature=0)
        assert padded[0, [0, 3, 4, 5]].tolist() == [5, 6, MASK, filler]
        assert torch.equal(padded[:, :4], model.generate(torch.tensor([[5, MASK, MASK, 6]]), steps=1, temperature=0))
    assert (alone != MASK).all()
    extended = model.generate(ids[:, :4], attention_mask=mask[:, :4].bool(), length=8, seed=4, steps=2)
    assert extended.shape == (1, 8) and (extended != MASK).all()


def test_each_row_of_a_padded_batch_is_what_it_is_alone(model):
    make_context_matter(model)
    ids = torch.randint(0, 47, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.4] = MASK
    mask = (torch.arange(12) < torch.tensor([12, 9, 12, 5])[:, None]).long()
    together = model.generate(ids, attention_mask=mask, seed=0, steps=16)
    generator = torch.Generator().manual_seed(0)  # each call takes up the noise where the one before left it
    for row in range(4):
        alone = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], generator=generator, steps=16)
        assert torch.equal(together[row : row + 1], alone)


def test_samples_of_one_prompt_are_adjacent_and_differ(model):
    prompts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    sequences = model.generate(prompts, num_return_sequences=4, seed=0, steps=4)
    assert sequences[:, :2].tolist() == prompts.repeat_interleave(4, dim=0).tolist()
    assert len({tuple(row) for row in sequences[:4].tolist()}) == 4


def test_a_seed_fixes_a_row_whatever_rows_follow_it(model):
    mask = torch.full((1, 32), MASK)
    alone = model.generate(mask, seed=7, steps=8)
    assert torch.equal(model.generate(mask, seed=7, steps=8), alone)
    assert torch.equal(model.generate(generator=torch.Generator().manual_seed(7), steps=8), alone)
    assert not torch.equal(model.generate(mask, seed=8, steps=8), alone)
    more = model.generate(mask, seed=7, steps=8, num_return_sequences=5)
    assert torch.equal(more[:1], alone)
    assert torch.equal(model.generate(mask.repeat(5, 1), seed=7, steps=8), more)


def test_the_global_random_state_counts_only_without_a_seed(model):
    torch.manual_seed(3)
    first = model.generate(steps=2)
    assert not torch.equal(model.generate(steps=2), first)
    torch.manual_seed(3)
    assert torch.equal(model.generate(steps=2), first)
    state = torch.get_rng_state()
    model.generate(steps=2, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_zero_in_one_step_is_the_argmax_of_the_network(model):
    ids = torch.tensor([[5, MASK, MASK, 6, MASK]])
    with torch.no_grad():
        logits = model(ids).logits
    logits[..., MASK] = -torch.inf
    expected = torch.where(ids == MASK, logits.argmax(-1), ids)
    for seed in range(3):
        assert torch.equal(model.generate(ids, seed=seed, steps=1, temperature=0), expected)


def test_bfloat16_models_and_integer_dtypes_generate(model):
    for dtype in (torch.int32, torch.int64):
        assert (model.generate(torch.full((2, 5), MASK, dtype=dtype), seed=0, steps=2) != MASK).all()
    assert (model.to(torch.bfloat16).generate(seed=0, steps=4) != MASK).all()


# --- Options


def test_a_call_wins_over_its_configuration_and_that_over_the_models(model):
    def steps(**arguments) -> int:
        trunk = []
        handle = model.model.register_forward_hook(lambda *unused: trunk.append(1))
        model.generate(seed=0, num_return_sequences=8, **arguments)
        handle.remove()
        return len(trunk)

    model.generation_config.steps = 3
    assert steps() == 3 and steps(steps=2) == 2
    given = MDLMGenerationConfig(steps=4)
    assert steps(generation_config=given) == 4 and steps(generation_config=given, steps=1) == 1
    assert given.steps == 4 and model.generation_config.steps == 3


def test_generation_configuration_round_trip(tmp_path):
    options = MDLMGenerationConfig(steps=5, length=7, temperature=0.5, sampler="ancestral", num_return_sequences=2)
    options.save_pretrained(tmp_path)
    loaded = MDLMGenerationConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.to_dict().items() if v is not None} == {
        k: v for k, v in options.to_dict().items() if v is not None
    }
    assert (loaded.steps, loaded.length, loaded.temperature, loaded.num_return_sequences) == (5, 7, 0.5, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"steps": -3}, "steps .* not -3"),
        ({"steps": 2.5}, "steps .* not 2.5"),
        ({"steps": True}, "steps .* not True"),
        ({"length": 0}, "length must be an integer of at least 1, not 0"),
        ({"length": 33}, "length is 33, but the model's context is 32"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, not 0"),
        ({"max_new_tokens": 33}, "length is 33, but the model's context is 32"),
        ({"length": 9, "max_new_tokens": 3}, r"give one length, not length \(9\) and max_new_tokens \(3\)"),
        ({"max_length": 9, "length": 8}, r"give one length, not length \(8\) and max_length \(9\)"),
        ({"max_length": 9, "max_new_tokens": 2}, r"one length, not max_length \(9\) and max_new_tokens \(2\)"),
        ({"streamer": print}, "streamer must have put and end, as a TextStreamer has, not <built-in function print>"),
        ({"callback": 5}, "callback must be a function of a step and a canvas, not 5"),
        ({"num_return_sequences": 0}, "num_return_sequences must be .* not 0"),
        ({"temperature": -0.1}, "temperature must be at least 0 and finite, not -0.1"),
        ({"temperature": float("nan")}, "temperature .* not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"temperature": "hot"}, "temperature .* not 'hot'"),
        ({"sampler": "euler"}, r"sampler must be one of \['ancestral'.*\], not 'euler'"),
        ({"stepz": 3}, r"unknown arguments \['stepz'\].*'steps'"),
        ({"max_new_token": 3}, r"unknown arguments \['max_new_token'\].*'max_new_tokens'"),
        ({"seed": 1, "generator": torch.Generator()}, "a seed or a generator, not both"),
        ({"seed": 1.5}, r"seed must be an integer in 0 .. 2\*\*64 - 1 or a sequence of them, not 1.5"),
        ({"seed": True}, "seed must be .* not True"),
        ({"seed": -1}, "seed must be .* not -1"),
        ({"seed": 2**70}, "seed must be .* not 1180591620717411303424"),
        ({"seed": "7"}, "seed must be .* not '7'"),
        ({"seed": [1.5]}, r"seed must be .* not \[1.5\]"),
        ({"seed": torch.tensor([1])}, r"seed must be .* not tensor\(\[1\]\)"),
        ({"seed": np.array([1])}, r"seed must be .* not array\(\[1\]\)"),
        ({"generator": 7}, "generator must be a torch.Generator on the CPU, not 7"),
        ({"input_ids": [[1, MASK]]}, r"input_ids must be a tensor of integers, not \[\[1, 47\]\]"),
        ({"input_ids": torch.tensor([[1.7, 47.0]])}, r"input_ids must be a tensor of integers, not tensor\(\[\[ 1.7"),
        ({"input_ids": torch.tensor([[True]])}, r"input_ids must be a tensor of integers, not tensor\(\[\[True"),
        ({"input_ids": torch.empty(0, 5, dtype=torch.long)}, r"input_ids .* at least one row, not \(0, 5\)"),
        (
            {"input_ids": torch.tensor([[1, MASK]]), "attention_mask": [[1, 1]]},
            r"attention_mask must be a tensor, not \[\[1, 1\]\]",
        ),
        ({"input_ids": torch.tensor([1, MASK])}, r"input_ids must have the shape .* not \(2,\)"),
        ({"input_ids": torch.tensor([[1, MASK, 48]])}, r"input_ids hold 1 .. 48, but the vocabulary is 0 .. 47"),
        ({"input_ids": torch.tensor([[-1, MASK]])}, r"input_ids hold -1 .. 47"),
        ({"input_ids": torch.ones(1, 40, dtype=torch.long)}, "input_ids are 40 tokens wide, but length is 32"),
        ({"input_ids": torch.full((1, 40), MASK)}, "length is 40, but the model's context is 32"),
        ({"input_ids": torch.full((1, 6), MASK), "length": 5}, "input_ids are 6 tokens wide, but length is 5"),
        (
            {"input_ids": torch.ones(1, 5, dtype=torch.long), "length": 5},
            r"no mask \(id 47\) to fill, and length \(5\)",
        ),
        ({"input_ids": torch.tensor([[1, MASK], [1, 2]])}, "a row of input_ids holds no mask"),
        (
            {"input_ids": torch.tensor([[1, MASK]]), "attention_mask": torch.ones(1, 3)},
            r"attention_mask has the shape \(1, 3\), input_ids \(1, 2\)",
        ),
        ({"input_ids": torch.tensor([[1, MASK]]), "attention_mask": torch.tensor([[1, 0]])}, "holds no mask"),
        ({"generation_config": GenerationConfig(max_new_tokens=5)}, "generation_config .*MDLMGenerationConfig"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_and_value(model, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.generate(**arguments)


def test_a_wrong_generation_configuration_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"unknown generation arguments \['num_beams'\].*'steps'"):
        MDLMGenerationConfig(num_beams=4)
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, not 0"):
        MDLMGenerationConfig(steps=0)
    model.generation_config.steps = 0
    with pytest.raises(ValueError, match="steps"):
        model.save_pretrained(tmp_path)


def test_a_refused_call_leaves_the_model_as_it_was(model):
    model.train()
    with pytest.raises(ValueError):
        model.generate(steps=0)

    class Stop(Exception):
        pass

    def stop(*unused):
        raise Stop

    handle = model.lm_head.register_forward_hook(stop)
    with pytest.raises(Stop):
        model.generate(steps=2)
    handle.remove()
    assert model.training and model.generation_config.steps is None


# --- Streaming


def test_the_streamer_of_transformers_prints_drafts_and_the_text(model, tokenizer, capsys):
    output = model.generate(
        torch.tensor([tokenizer("hello ")["input_ids"]]),
        steps=4,
        seed=0,
        length=20,
        streamer=TextDiffusionStreamer(tokenizer),
        return_dict_in_generate=True,
    )
    printed = capsys.readouterr().out
    text = tokenizer.decode(output.sequences[0])
    assert text.startswith("hello ") and "[MASK]" not in text
    drafts = printed.split("\0337")[1:]
    assert len(drafts) == output.nfe.item() == 4
    assert [draft.count("[MASK]") > 0 for draft in drafts] == [True, True, True, False]
    masks = [draft.count("[MASK]") for draft in drafts]
    assert masks == sorted(masks, reverse=True)
    assert printed.endswith(text + "\n")


def test_a_streamer_gets_the_first_canvas_of_a_batch(model):
    class Streamer:
        drafts, final, ended = [], None, False

        def put_draft(self, value):
            self.drafts.append(value.clone())

        def put(self, value):
            self.final = value.clone()

        def end(self):
            self.ended = True

    streamer = Streamer()
    sequences = model.generate(num_return_sequences=3, steps=5, seed=0, streamer=streamer)
    assert torch.equal(streamer.final, sequences[0]) and streamer.ended
    assert all(draft.shape == (1, 32) for draft in streamer.drafts)
    for before, after in itertools.pairwise(streamer.drafts):
        assert torch.equal(after[before != MASK], before[before != MASK])
    assert torch.equal(streamer.drafts[-1], sequences[:1])


@pytest.mark.parametrize("skip", [False, True])
def test_a_text_streamer_gets_the_prompt_and_the_rest(model, tokenizer, capsys, skip):
    prompt = torch.tensor([[9] * 3 + tokenizer("hello ", add_special_tokens=False)["input_ids"]])
    mask = (torch.arange(prompt.shape[1]) >= 3).long()[None]
    streamer = TextStreamer(tokenizer, skip_prompt=skip)
    sequence = model.generate(prompt, attention_mask=mask, length=20, steps=3, seed=0, streamer=streamer)[0, 3:]
    assert capsys.readouterr().out == tokenizer.decode(sequence[6 if skip else 0 :]) + "\n"


@pytest.mark.parametrize("streamer", [TextStreamer, TextIteratorStreamer, TextDiffusionStreamer])
def test_a_streamer_that_skips_the_prompt_shows_all_where_there_is_none(model, tokenizer, capsys, streamer):
    streamer = streamer(tokenizer, skip_prompt=True)
    sequence = model.generate(length=20, steps=3, seed=0, streamer=streamer)[0]
    shown = "".join(streamer) + "\n" if isinstance(streamer, TextIteratorStreamer) else capsys.readouterr().out
    assert shown.endswith(tokenizer.decode(sequence) + "\n")


# --- Lengths


def test_lengths_have_the_names_of_transformers(model):
    prompt, infill = torch.tensor([[1, 2, 3]]), torch.tensor([[1, MASK, 3]])
    expected = model.generate(prompt, length=9, seed=0, steps=2)
    for arguments in ({"max_length": 9}, {"max_new_tokens": 6}):
        assert torch.equal(model.generate(prompt, seed=0, steps=2, **arguments), expected)
    assert model.generate(max_new_tokens=5, steps=2).shape == (1, 5)
    filled = model.generate(infill, max_new_tokens=5, steps=2)
    assert filled.shape == (1, 8) and (filled != MASK).all()
    model.generation_config.max_new_tokens = 4
    assert model.generate(prompt, steps=2).shape == (1, 7)
    assert model.generate(prompt, steps=2, length=9).shape == (1, 9), "the call's length replaces the model's"
    given = MDLMGenerationConfig(max_length=8, steps=2)
    assert model.generate(prompt, generation_config=given).shape == (1, 8)
    assert model.generate(prompt, generation_config=given, max_new_tokens=2).shape == (1, 5)
