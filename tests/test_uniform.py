"""Uniform-state diffusion: its posterior, its sampler and its bound, each against an exact enumeration.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5.
"""

import copy
import itertools
import math

import pytest
import torch
from laws import FALSE_ALARM, p_value, uniforms
from safetensors.torch import load_file
from tiny_run import BLOCK, write_inputs
from toy import at, finish
from toy_distillers import ROWS, SEED, prompted
from transformers import AutoModel, TextDiffusionStreamer

from evaluation import validation_nelbo
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.canvas_mdlm import Canvas, Denoiser
from modeling_mcd.draws_mdlm import draw_posterior
from modeling_mcd.forward_process_mdlm import UniformProcess, pick_uniformly, posterior_weights, uniform_nelbo
from modeling_mcd.noise_mdlm import RowNoise, row_keys
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule
from modeling_mcd.replay import Replay
from modeling_mcd.reveal_grid_mdlm import TAIL
from modeling_mcd.sampling_mdlm import uniform_ancestral
from trainers import run_mcd, run_mdlm
from trainers.batches import maskable_tokens
from trainers.character_tokenizer import character_tokenizer
from trainers.dcd_trainer import DCDTrainer, DCDTrainingArguments
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.trajectories import step_noise


K = 4
CANVASES = torch.tensor(list(itertools.product(range(K), repeat=2)))


def bayes(x_hat: torch.Tensor, z_t: int, alpha_t: float, alpha_s: float) -> torch.Tensor:
    """q(z_s | z_t) over the vocabulary, by Bayes' rule: z_s ~ alpha_s x_hat + (1 - alpha_s) / K, then noise up to t."""
    size = len(x_hat)
    step = alpha_t / alpha_s
    likelihood = torch.full((size,), (1 - step) / size, dtype=torch.float64)
    likelihood[z_t] += step
    joint = likelihood * (alpha_s * x_hat.double() + (1 - alpha_s) / size)
    return joint / joint.sum()


# --- The posterior


@pytest.mark.parametrize("alpha_t, alpha_s", [(1e-3, 0.3), (0.2, 0.7), (0.69, 0.7), (0.9, 1.0), (0.5, 0.999)])
def test_uniform_posterior_equals_the_enumeration(alpha_t, alpha_s):
    x_hats = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for x_hat in [*x_hats, torch.eye(K, dtype=torch.float64)[1]]:
        for z_t in range(K):
            stay, predict = posterior_weights(x_hat[z_t], alpha_t, alpha_s, K)
            mixture = predict * x_hat + (1 - stay - predict) / K
            mixture[z_t] += stay
            torch.testing.assert_close(mixture, bayes(x_hat, z_t, alpha_t, alpha_s), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_uniform_posterior_draws_have_the_exact_law(temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.1])
    x_hat = (logits.double() / temperature).softmax(-1)
    for z_t in range(K):
        z = torch.full((200_000,), z_t)
        drawn = draw_posterior(logits.expand(200_000, K), z, *uniforms(2, 200_000), 0.2, 0.6, temperature)
        counts = drawn.bincount(minlength=K)
        assert p_value(counts, bayes(x_hat, z_t, 0.2, 0.6)) > FALSE_ALARM
        assert p_value(counts, bayes(x_hat, z_t, 0.2, 0.66)) < 1e-9, "the test has no power"


def test_uniform_posterior_at_temperature_zero_is_greedy():
    logits, certain = torch.tensor([0.3, -1.0, 1.2, 0.1]).expand(1000, K), torch.tensor([0.0, 0.0, 900.0, 0.0])
    z, noise = torch.arange(1000) % K, uniforms(2, 1000)
    expected = draw_posterior(certain.expand(1000, K), z, *noise, 0.2, 0.6)
    for temperature in (0, 1e-310):
        assert torch.equal(draw_posterior(logits, z, *noise, 0.2, 0.6, temperature), expected)


def test_uniform_noise_has_its_law_and_clean_tokens_come_first():
    x_0, gamma = torch.full((1, 300_000), 2), torch.tensor([0.3], dtype=torch.float64)
    process, everywhere = UniformProcess(LogLinearSchedule(), K), torch.ones_like(x_0, dtype=torch.bool)
    z_t, scored = process.corrupt(x_0, gamma, uniforms(1, 300_000), everywhere)
    assert scored.all(), "clean tokens are scored too"
    law = torch.full((K,), 0.7 / K, dtype=torch.float64)
    law[2] += 0.3
    assert p_value(z_t[0].bincount(minlength=K), law) > FALSE_ALARM
    u = torch.tensor([[0.0, 0.3, 0.3 + 1e-12, 1 - 2**-53]], dtype=torch.float64)
    assert process.corrupt(x_0[:, :4], gamma, u, everywhere[:, :4])[0].tolist() == [[2, 2, 0, K - 1]]
    kept = torch.tensor([[True, True, False, True]])
    assert process.corrupt(x_0[:, :4], gamma, u, kept)[0].tolist() == [[2, 2, 2, K - 1]], "a prompt stays"


# --- The sampler: four tokens at two positions, 16 canvases


def index_of(canvas: torch.Tensor) -> torch.Tensor:
    return canvas @ torch.tensor([K, 1])


def exact_law(tables: dict[float, torch.Tensor], schedule, last_step: str, prompt: int | None = None) -> torch.Tensor:
    """Law of the 16 canvases at the end of the chain; `tables` holds the denoiser's logits [16, 2, K] at each time."""
    law = torch.full((16,), 1 / 16, dtype=torch.float64)
    if prompt is not None:
        law = (CANVASES[:, 0] == prompt).double() / K
    times = sorted(tables, reverse=True)[: -1 if last_step == "none" else None]
    grid = [*times, 0.0 if last_step == "ancestral" else TAIL][: None if last_step != "greedy" else -1]
    for t, s in itertools.pairwise(grid):
        alpha_t, alpha_s = schedule.gamma(torch.tensor([t, s], dtype=torch.float64)).tolist()
        law = push(law, lambda x, z, a=alpha_t, b=alpha_s: bayes(x.double().softmax(-1), z, a, b), tables[t], prompt)
    if last_step == "greedy":
        law = push(law, lambda x, z: torch.eye(K, dtype=torch.float64)[x.argmax()], tables[TAIL], prompt)
    return law


def push(law, transition, table, prompt):
    after = torch.zeros_like(law)
    for canvas in CANVASES:
        here = index_of(canvas)
        rows = [transition(table[here, i], canvas[i].item()) for i in range(2)]
        if prompt is not None:
            rows[0] = torch.eye(K, dtype=torch.float64)[canvas[0]]
        after += law[here] * torch.outer(*rows).flatten()
    return after


def times_of(steps: int) -> list[float]:
    return torch.linspace(1, TAIL, steps + 1, dtype=torch.float64).tolist()


def sample(tables, schedule, last_step, prompt=None, draws=100_000):
    tokens = torch.full((draws, 2), 0 if prompt is None else prompt)
    denoiser = Denoiser(
        trunk=lambda tokens, rows, time, wanted: at(tables[time[0].item()][index_of(tokens)], wanted),
        head=lambda hidden, *unused: hidden,
        process=UniformProcess(schedule, K),
    )
    keys = row_keys(draws, torch.Generator().manual_seed(0))
    fillable = torch.tensor([[prompt is None, True]]).expand(draws, 2)
    canvas = Canvas(tokens, fillable, RowNoise(keys, torch.arange(2).expand(draws, 2)), denoiser)
    canvas.write(canvas.fillable, pick_uniformly(canvas.u, K)[canvas.fillable])
    finish(canvas, uniform_ancestral(canvas, steps=3, last_step=last_step))
    assert canvas.nfe.shape == (draws,) and (canvas.nfe == (3 if last_step == "none" else 4)).all()
    return index_of(tokens).bincount(minlength=16)


@pytest.fixture(scope="module")
def tables() -> dict[float, torch.Tensor]:
    """A denoiser that looks at the canvas and at the time."""
    generator = torch.Generator().manual_seed(0)
    return {t: 1.5 * torch.randn(16, 2, K, generator=generator) for t in times_of(3)}


@pytest.mark.parametrize("schedule", [LogLinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("last_step", ["ancestral", "greedy", "none"])
def test_uniform_sampling_has_the_exact_law_of_the_chain(tables, schedule, last_step):
    counts = sample(tables, schedule, last_step)
    assert counts.sum() == 100_000
    assert p_value(counts, exact_law(tables, schedule, last_step)) > FALSE_ALARM


def test_uniform_sampling_of_a_prompt_has_the_exact_law_of_the_chain(tables):
    counts = sample(tables, LogLinearSchedule(), "ancestral", prompt=1)
    assert p_value(counts, exact_law(tables, LogLinearSchedule(), "ancestral", prompt=1)) > FALSE_ALARM


def test_the_uniform_chi_squared_test_sees_a_wrong_law(tables):
    counts = sample(tables, LogLinearSchedule(), "ancestral")
    assert p_value(counts, exact_law(tables, CosineSchedule(), "ancestral")) < 1e-12
    first = dict.fromkeys(tables, tables[1.0])
    assert p_value(counts, exact_law(first, LogLinearSchedule(), "ancestral")) < 1e-12


def test_generate_has_the_exact_law_of_its_uniform_network(build):
    model = build(
        vocab_size=K, max_position_embeddings=2, bos_token_id=None, eos_token_id=None, diffusion_kind="uniform"
    )
    with torch.no_grad():
        tables = {
            t: model(CANVASES, timesteps=-LogLinearSchedule().gamma(torch.tensor([t])).log().expand(16)).logits
            for t in times_of(3)
        }
    assert (tables[1.0] - tables[TAIL]).abs().max() > 0.1, "the network does not look at the time"
    counts = index_of(model.generate(num_return_sequences=20_000, steps=3, seed=0)).bincount(minlength=16)
    assert p_value(counts, exact_law(tables, LogLinearSchedule(), "ancestral")) > FALSE_ALARM
    for wrong in (dict.fromkeys(tables, tables[1.0]), dict.fromkeys(tables, tables[TAIL])):
        assert p_value(counts, exact_law(wrong, LogLinearSchedule(), "ancestral")) < 1e-9, "the test has no power"


# --- generate


@pytest.fixture
def uniform(build) -> MDLMForMaskedDiffusion:
    return build(diffusion_kind="uniform")


def test_uniform_generate_is_the_same_call(uniform, tmp_path):
    output = uniform.generate(steps=4, num_return_sequences=3, seed=0, return_dict_in_generate=True)
    assert output.sequences.shape == (3, 32) and output.nfe.tolist() == [5, 5, 5]
    assert uniform.generate(steps=4, last_step="none", return_dict_in_generate=True).nfe.tolist() == [4]
    assert torch.equal(uniform.generate(steps=4, seed=0), output.sequences[:1])
    assert not torch.equal(uniform.generate(steps=4, seed=1), output.sequences[:1])
    prompt = torch.arange(10).reshape(2, 5)
    assert torch.equal(uniform.generate(prompt, steps=2, length=9)[:, :5], prompt)
    uniform.generation_config.last_step = "greedy"
    uniform.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (loaded.config.diffusion_kind, loaded.config.time_conditioning) == ("uniform", True)
    assert loaded.config.mask_token_id is None
    greedy = loaded.generate(steps=4, seed=0)
    assert torch.equal(greedy, uniform.generate(steps=4, seed=0)) and not torch.equal(greedy, output.sequences[:1])
    assert (tmp_path / "forward_process_mdlm.py").is_file() and not list(tmp_path.glob("*checkpoint*"))


def test_blocks_to_come_hold_noise_which_whoever_watches_can_read(uniform, tmp_path):
    tokenizer = character_tokenizer(model_max_length=32)
    replay, seen = Replay(tokenizer), []

    def callback(step, canvas):
        replay(step, canvas)
        seen.append(canvas.clone())

    arguments = {"block_length": 16, "steps": 2, "seed": 0, "streamer": TextDiffusionStreamer(tokenizer)}
    sequence = uniform.generate(length=48, callback=callback, **arguments)
    assert all(0 <= canvas.min() and canvas.max() < 48 for canvas in seen)
    assert (
        all(torch.equal(canvas[:, 32:], seen[0][:, 32:]) for canvas in seen[:6]) and len(seen[0][0, 32:].unique()) > 5
    )
    assert torch.equal(seen[-1], sequence) and (sequence != seen[0])[:, 32:].any()
    assert replay.save(tmp_path / "replay.html").is_file()


def test_uniform_padding_is_not_filled(uniform):
    ids, mask = torch.tensor([[5, 6, 9, 9]]), torch.tensor([[1, 1, 0, 0]])
    assert uniform.generate(ids, attention_mask=mask, length=8, steps=2, seed=0)[0, :4].tolist() == [5, 6, 9, 9]


def law_behind(model: MDLMForMaskedDiffusion, prompt: list[int], new: int, steps: int) -> torch.Tensor:
    """The law of `new` tokens behind a prompt after the chain of `steps` steps and a last one, by enumeration: [K^new]."""
    after = torch.tensor(list(itertools.product(range(K), repeat=new)))
    canvases, law = torch.cat([torch.tensor([prompt]).expand(len(after), -1), after], dim=1), torch.ones(1).double()
    law = law.expand(len(after)) / len(after)
    for t, s in itertools.pairwise([*times_of(steps), 0.0]):
        alpha_t, alpha_s = LogLinearSchedule().gamma(torch.tensor([t, s], dtype=torch.float64)).tolist()
        noise = -torch.tensor([alpha_t]).log().float().expand(len(after))
        x_hat = model(canvases, timesteps=noise).logits[:, len(prompt) :].double().softmax(-1)
        moved = torch.zeros_like(law)
        for here, row in enumerate(after.tolist()):
            each = torch.ones(1, dtype=torch.float64)
            for i, z in enumerate(row):
                each = (each[:, None] * bayes(x_hat[here, i], z, alpha_t, alpha_s)).flatten()
            moved += law[here] * each
        law = moved
    return law


@torch.no_grad()
def test_answers_to_prompts_of_a_padded_batch_have_the_exact_law(build):
    """Prompts of two lengths, padded on the left: each is answered as if it were alone, and never noised."""
    model = build(
        vocab_size=K, max_position_embeddings=4, bos_token_id=None, eos_token_id=None, diffusion_kind="uniform"
    )
    prompts, rows = ([3], [1, 2]), 4_000
    ids = torch.tensor([[0, 3], [1, 2]]).repeat(rows, 1)
    seen, kept = (torch.tensor([[0, 1], [1, 1]]).repeat(rows, 1), [])
    call = {"attention_mask": seen, "max_new_tokens": 2, "steps": 2, "seed": 0}
    answers = model.generate(
        ids, callback=lambda step, canvas: kept.append(torch.equal(canvas[:, 1], ids[:, 1])), **call
    )
    assert kept == [True] * 3 and torch.equal(answers[1::2, :2], ids[1::2])
    laws = [law_behind(model, prompt, 2, steps=2) for prompt in prompts]
    for first in (0, 1):
        counts = index_of(answers[first::2, 2:]).bincount(minlength=16)
        assert p_value(counts, laws[first]) > FALSE_ALARM
        assert p_value(counts, laws[1 - first]) < 1e-9, "the test has no power"


@pytest.mark.parametrize("options", [{}, {"last_step": "greedy"}, {"last_step": "none"}, {"locking": "spread"}])
@pytest.mark.parametrize("more", [{}, {"block_length": 3}, {"temperature": 0.0}])
def test_a_prompt_of_a_uniform_model_is_kept_in_every_step(uniform, options, more):
    """In a batch, padded on the left, a row is what it is alone."""
    ids, seen = torch.tensor([[9, 9, 5, 6], [1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call = {"max_new_tokens": 7, "steps": 3} | options | more
    canvases = []
    both = uniform.generate(
        ids, attention_mask=seen, seed=[5, 6], callback=lambda step, x: canvases.append(x.clone()), **call
    )
    assert len(canvases) > 2 and all(torch.equal(canvas[:, 2:4], ids[:, 2:]) for canvas in canvases)
    assert torch.equal(both[0, 2:], uniform.generate(ids[:1, 2:], seed=5, **call)[0])
    assert torch.equal(both[1], uniform.generate(ids[1:], seed=6, **call)[0])


def test_what_makes_no_sense_for_a_kind_is_refused_by_name(uniform, model):
    for arguments, message in (
        ({"last_step": "lucky"}, r"last_step must be one of .*'greedy'.*not 'lucky'"),
        ({"input_ids": torch.ones(1, 5, dtype=torch.long), "length": 5}, r"fill the whole length \(5\)"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "input_ids hold -1 .. 3"),
        (
            {"sampler": "random"},
            r"sampler 'random' is for absorbing diffusion; this model is uniform: \['ancestral'\]",
        ),
        ({"precision": "legacy_float32"}, r"precision \('legacy_float32'\) needs a \[MASK\]; this model is uniform"),
        ({"guidance_scale": 2.0}, r"guidance_scale \(2.0\) needs a \[MASK\]; this model is uniform"),
    ):
        with pytest.raises(ValueError, match=message):
            uniform.generate(**arguments)
    with pytest.raises(Exception, match=r"(?s)mask_token_id \(3\) must be null under uniform"):
        MDLMConfig(vocab_size=10, mask_token_id=3, diffusion_kind="uniform")
    with pytest.raises(Exception, match="(?s)diffusion_kind"):
        MDLMConfig(diffusion_kind="gaussian")


# --- The bound


def literal_nelbo(x_hat, z_t: int, x_0: int, alpha: float, slope: float) -> float:
    """The path-wise KL of the two reverse processes, written out: jump rates beta / K * r_j, one token at a time."""
    size = len(x_hat)
    bar = [size * alpha * (j == x_0) + 1 - alpha for j in range(size)]
    bar_hat = [size * alpha * x_hat[j] + 1 - alpha for j in range(size)]
    total = 0.0
    for j in range(size):
        r, r_hat = bar[j] / bar[z_t], bar_hat[j] / bar_hat[z_t]
        total += r * math.log(r / r_hat) - r + r_hat
    return -slope / alpha / size * total


def test_uniform_nelbo_equals_its_definition():
    x_hat = torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for alpha, slope in ((0.999, -1.0), (0.4, -0.7), (1e-3, -0.999)):
        for z_t, x_0 in itertools.product(range(K), repeat=2):
            ours = uniform_nelbo(
                x_hat.log()[None],
                torch.tensor([z_t]),
                torch.tensor([x_0]),
                torch.tensor([alpha], dtype=torch.float64),
                torch.tensor([slope], dtype=torch.float64),
            )
            assert ours.item() == pytest.approx(literal_nelbo(x_hat.tolist(), z_t, x_0, alpha, slope), rel=1e-9)


@pytest.mark.parametrize("schedule", [LogLinearSchedule(), CosineSchedule(), LogLinearSchedule(0.2)])
def test_uniform_nelbo_of_a_known_distribution_is_its_entropy_bound(schedule):
    """Two dependent tokens of three. With the exact denoiser the bound is H(x_0) - I(x_0; z_1), what noise leaves at t = 1.

    The exact x_hat of a position is the law of its token given the *other* noisy one.
    """
    size = 3
    p = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).softmax(-1) / size
    y, weights = legendre(200)
    t, weights = y**4, weights * 4 * y**3  # the integrand is logarithmic at 0
    alpha, slope = schedule.gamma(t), schedule.derivative(t)
    kernel = torch.eye(size, dtype=torch.float64) * alpha[:, None, None] + ((1 - alpha) / size)[:, None, None]
    bound = 0.0
    for joint in (p, p.T):  # [x_own, x_other]
        cavity = torch.einsum("xo,toz->tzx", joint, kernel)
        log_x_hat = (cavity / cavity.sum(-1, keepdim=True)).log()  # [t, z_other, x_own]
        for x, z, z_other in itertools.product(range(size), repeat=3):
            probability = torch.einsum("o,to->t", joint[x], kernel[:, :, z_other]) * kernel[:, x, z]
            tokens = torch.full((len(t),), z), torch.full((len(t),), x)
            bound += (weights * probability * uniform_nelbo(log_x_hat[:, z_other], *tokens, alpha, slope)).sum().item()
    end = schedule.gamma(torch.ones(1, dtype=torch.float64)).item()
    last = torch.eye(size, dtype=torch.float64) * end + (1 - end) / size
    given = torch.einsum("xz,yw->xyzw", last, last)
    marginal = torch.einsum("xy,xyzw->zw", p, given)
    information = (p[:, :, None, None] * given * (given / marginal).log()).sum().item()
    entropy = -(p * p.log()).sum().item()
    assert bound == pytest.approx(entropy - information, abs=1e-6)
    assert entropy < 2 * math.log(size) - 0.1


def legendre(points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    off = torch.arange(1, points, dtype=torch.float64)
    off = off / (4 * off**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2


def constant_model(build, p: torch.Tensor) -> MDLMForMaskedDiffusion:
    """A network that ignores its input: softmax p everywhere."""
    model = build(vocab_size=len(p), diffusion_kind="uniform", bos_token_id=None, eos_token_id=None)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.copy_(p.log())
    return model


def test_the_likelihood_of_a_known_uniform_model_is_exact_up_to_noise(build):
    p = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03], dtype=torch.float64)
    blocks = torch.multinomial(p, 256 * 32, replacement=True, generator=torch.Generator().manual_seed(0)).view(256, 32)
    nelbo = validation_nelbo(constant_model(build, p), blocks, draws=16)
    # The bound of a token whose law the model knows is -log p; the estimate has a standard error of 0.02.
    assert nelbo == pytest.approx(-p.log()[blocks].mean().item(), abs=0.1)
    assert math.log(5) > -p.log()[blocks].mean().item() + 0.3


def test_the_uniform_training_loss_equals_the_bound_by_hand(build, tmp_path):
    model = build(diffusion_kind="uniform", hidden_dropout=0.0)
    x_0 = torch.randint(0, 48, (4, 8), generator=torch.Generator().manual_seed(2))
    arguments = MDLMTrainingArguments(
        output_dir=str(tmp_path), ema_decay=None, per_device_train_batch_size=4, save_strategy="no", seed=11
    )
    trainer = MDLMTrainer(model, arguments)
    model.train()
    loss = trainer.compute_loss(model, {"input_ids": x_0})
    times, u = step_noise(11, 0, range(4), 4, 8)
    t = 1e-3 + (1 - 1e-3) * times
    gamma = 1 - (1 - 1e-3) * t
    model.eval()
    total, noised = 0.0, 0
    z_t = x_0.clone()
    for b, i in itertools.product(range(4), range(8)):
        if u[b, i] > gamma[b]:
            z_t[b, i] = int((u[b, i] - gamma[b]) / (1 - gamma[b]) * 48)
            noised += 1
    with torch.no_grad():
        x_hat = model(z_t, timesteps=-gamma.log().float()).logits.double().softmax(-1)
    for b, i in itertools.product(range(4), range(8)):
        total += literal_nelbo(x_hat[b, i].tolist(), z_t[b, i].item(), x_0[b, i].item(), gamma[b].item(), -(1 - 1e-3))
    assert 4 < noised < 32
    assert loss.item() == pytest.approx(total / 32, rel=1e-4)


def nelbo_by_hand(x_hat, z_t, x_0, alpha, slope) -> torch.Tensor:
    """`literal_nelbo` of one token with a gradient for x_hat [K]."""
    size = len(x_hat)
    bar = torch.full((size,), 1 - alpha, dtype=torch.float64)
    bar[x_0] += size * alpha
    bar_hat = size * alpha * x_hat + 1 - alpha
    r, r_hat = bar / bar[z_t], bar_hat / bar_hat[z_t]
    return -slope / (size * alpha) * (r * (r / r_hat).log() - r + r_hat).sum()


@pytest.mark.parametrize("method", ["nelbo", "dcd"])
@pytest.mark.parametrize("norm", ["tokens", "sequence"])
def test_prompts_are_neither_noised_nor_scored_and_gradients_are_plain(method, norm, networks, tmp_path):
    """Rows of different lengths with prompts: the loss and its gradient for every parameter, token by token."""
    teacher, student = (copy.deepcopy(network) for network in networks["uniform"])
    settings = {"output_dir": str(tmp_path), "seed": SEED, "ema_decay": None, "save_strategy": "no", "loss_norm": norm}
    settings["per_device_train_batch_size"] = ROWS
    if method == "nelbo":
        trainer = MDLMTrainer(student, MDLMTrainingArguments(**settings))
    else:
        arguments = DCDTrainingArguments(**settings, delta=0.125, num_rounds=2, steps_per_round=4)
        trainer = DCDTrainer(student, arguments, teacher=teacher)
    inputs, canvases = prompted(), []
    x_0, maskable = inputs["input_ids"], maskable_tokens(inputs)
    compute_rows = trainer.compute_rows
    trainer.compute_rows = lambda network, where, z, *rest: (
        canvases.append((where, z)),
        compute_rows(network, where, z, *rest),
    )[1]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    found = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    for where, z in canvases:
        assert torch.equal(where, maskable) and torch.equal(z[~maskable], x_0[~maskable]), "a prompt was touched"
        assert (z != x_0).any()

    times = step_noise(SEED, 0, range(ROWS), ROWS, x_0.shape[1], 1 + (method == "dcd"))[0]
    t = 1e-3 + (1 - 1e-3) * times if method == "nelbo" else times
    levels = [1 - (1 - 1e-3) * t, 1 - (1 - 1e-3) * (t - 0.125).clamp(min=0)]
    (z_t, *z_s) = (z for _, z in canvases)
    seen = inputs["attention_mask"]
    student.eval()
    p = student(z_t, timesteps=-levels[0].log().float(), attention_mask=seen).logits.log_softmax(-1)
    if method == "dcd":
        with torch.no_grad():
            q = teacher(z_s[0], timesteps=-levels[1].log().float(), attention_mask=seen).logits.log_softmax(-1)
    total = 0.0
    for b, i in maskable.nonzero().tolist():
        if method == "nelbo":
            at = z_t[b, i].item(), x_0[b, i].item(), levels[0][b].item(), -(1 - 1e-3)
            value = nelbo_by_hand(p[b, i].exp(), *at)
            assert value.item() == pytest.approx(literal_nelbo(p[b, i].exp().tolist(), *at), rel=1e-9)
        else:
            value = (p[b, i].exp() * (p[b, i] - q[b, i])).sum()
        total = total + value / (maskable.sum() if norm == "tokens" else ROWS * maskable[b].sum())
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    expected = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)


# --- From text to a uniform teacher


def test_a_uniform_teacher_is_trained_by_its_recipe_and_mcd_refuses_it(tmp_path, capsys):
    inputs = write_inputs(tmp_path)
    settings = {
        "train_text": inputs / "text.txt",
        "validation_text": inputs / "text.txt",
        "tokenizer": inputs / "tokenizer",
        "block_length": BLOCK,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "warmup_steps": 2,
        "logging_steps": 5,
        "save_steps": 30,
        "eval_strategy": "no",
        "disable_tqdm": True,
        "output_dir": tmp_path / "run",
    }
    run_mdlm.main(["recipes/tiny_uniform_teacher.yaml", *(f"--{key}={value}" for key, value in settings.items())])
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert (model.config.diffusion_kind, model.config.mask_token_id) == ("uniform", None)
    assert model.generate(steps=2, seed=0).shape == (1, BLOCK)
    assert model.lm_head.bias.abs().max() > 0
    assert load_file(tmp_path / "run" / "model.safetensors").keys() == dict(model.named_parameters()).keys()
    nelbo = float(capsys.readouterr().out.split("NELBO on the validation text: ")[1].split()[0])
    assert nelbo < math.log(48) - 0.2, "thirty steps must beat a network that knows nothing"
    with pytest.raises(SystemExit) as stop:
        run_mcd.main(
            [f"--{k}={v}" for k, v in {"teacher": tmp_path / "run", "tokenizer": inputs / "tokenizer"}.items()]
            + [f"--train_text={inputs / 'text.txt'}", f"--block_length={BLOCK}", f"--output_dir={tmp_path / 'mcd'}"]
        )
    assert "the teacher's diffusion_kind is 'uniform', but this trainer is for absorbing diffusion" in stop.value.code
    assert not (tmp_path / "mcd").exists()
