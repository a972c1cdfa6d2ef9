"""The N-step bound: the sampler's own plan scored by hand, Jensen's gap by enumeration, the chain rule, the NELBO as
limit.
"""

import itertools
import math

import pytest
import torch
from small_model import MASK, make_context_matter
from toy import MASK as TOY_MASK
from toy import finish, index_of, table_of_logits, toy_canvas

from evaluation import Bound, step_bound, validation_nelbo
from evaluation.sampler_likelihood import TeacherForcedCanvas, posterior_divergence, prior_divergence
from modeling_mcd import head_mdlm
from modeling_mcd.forward_process_mdlm import process_of, uniform_nelbo
from modeling_mcd.reveal_grid_mdlm import TAIL
from modeling_mcd.sampling_mdlm import SAMPLERS


TABLE = table_of_logits()
LOG_P = TABLE.double()[:, :, :3].log_softmax(-1)  # of the denoiser, [canvas, position, token]
TEXT = torch.tensor([2, 0, 1])
CASES = [
    ("ancestral", {"steps": 2}),
    ("ancestral", {"steps": 2, "locking": "spread"}),
    ("ancestral", {"steps": 3, "locking": "spread", "reveal_counts": {"3": [0.2, 0.5, 1.0]}}),
    ("ancestral", {"steps": 2, "locking": "interleaved"}),
    ("random", {"steps": 2, "locking": "spread"}),
    ("first_hitting", {"locking": "spread"}),
    ("ancestral", {"steps": 2, "last_step": "ancestral"}),
    ("random", {"steps": 2}),
    ("random", {"steps": 3}),
    ("first_hitting", {}),
]


def forced(sampler: str, start=(3, 3, 3), draws=1, seed=1, **options) -> TeacherForcedCanvas:
    """`draws` rows of the canvas `start` after a sampler has revealed TEXT in each by a plan of its own."""
    plain = toy_canvas(TABLE, list(start), draws, seed)
    canvas = TeacherForcedCanvas(TEXT.expand(draws, 3), plain.tokens, plain.fillable, plain.noise, plain.denoiser)
    return finish(canvas, SAMPLERS["absorbing"][sampler](canvas, **options))


def nats_of_plan(plan, start=(3, 3, 3)) -> float:
    """-log prod_k prod_{i in G_k} p(x_i | revealed before): `plan` is the step of each position, -1 for a given one."""
    total = 0.0
    for step in sorted(set(plan) - {-1}):
        before = torch.tensor([int(TEXT[i]) if plan[i] < step else start[i] for i in range(3)])
        total -= sum(LOG_P[index_of(before), i, TEXT[i]].item() for i in range(3) if plan[i] == step)
    return total


@pytest.mark.parametrize("start", [(3, 3, 3), (3, 0, 3)])
@pytest.mark.parametrize(("sampler", "options"), CASES)
def test_each_row_scores_the_samplers_own_plan(sampler, options, start, monkeypatch):
    monkeypatch.setattr("modeling_mcd.reveal_grid_mdlm.TAIL", 0.3)
    canvas = forced(sampler, start, draws=64, **options)
    plain = toy_canvas(TABLE, list(start), draws=64)
    sampled = finish(plain, SAMPLERS["absorbing"][sampler](plain, **options))
    assert torch.equal(canvas.reveal_steps, sampled.reveal_steps) and torch.equal(canvas.nfe, sampled.nfe)
    assert torch.equal(canvas.tokens, TEXT.where(torch.tensor(start) == TOY_MASK, torch.tensor(start)).expand(64, 3))
    by_hand = [nats_of_plan(plan, start) for plan in canvas.reveal_steps.tolist()]
    assert len(set(by_hand)) > 1 and canvas.nats.sum(dim=1).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert not canvas.nats[:, torch.tensor(start) != TOY_MASK].any()


def plans_of(sampler: str, steps: int) -> dict[tuple[int, ...], float]:
    """Plan -> probability, three masks and equal steps of the schedule."""
    if sampler == "ancestral":
        return dict.fromkeys(itertools.product(range(steps), repeat=3), steps ** (-3))
    assert (sampler, steps) == ("random", 2)
    return dict.fromkeys(((0, 0, 1), (0, 1, 0), (1, 0, 0)), 1 / 3)  # round(3 / 2) = 2 tokens in the first step


def mean_and_error(nats: torch.Tensor) -> tuple[float, float]:
    return nats.mean().item(), nats.std().item() / len(nats) ** 0.5


@pytest.mark.parametrize(("sampler", "steps"), [("ancestral", 2), ("ancestral", 3), ("random", 2)])
def test_the_mean_is_the_bound_and_lies_above_the_likelihood(sampler, steps):
    plans = plans_of(sampler, steps)
    bound = sum(p * nats_of_plan(plan) for plan, p in plans.items())
    exact = -math.log(sum(p * math.exp(-nats_of_plan(plan)) for plan, p in plans.items()))
    mean, error = mean_and_error(forced(sampler, draws=20_000, steps=steps).nats.sum(dim=1))
    assert abs(mean - bound) < 4.5 * error and error < 0.02
    assert bound > exact + 0.02, "plans differ here, so Jensen's gap is not zero"


def test_the_bound_of_another_law_is_seen():
    plans = plans_of("ancestral", 2)
    mean, error = mean_and_error(forced("ancestral", draws=100_000, steps=3).nats.sum(dim=1))
    assert abs(mean - sum(p * nats_of_plan(plan) for plan, p in plans.items())) > 5 * error


@pytest.mark.parametrize(("start", "steps"), [((3, 3, 3), 1), ((2, 3, 1), 4)])
def test_where_the_plan_is_fixed_the_bound_is_the_likelihood(start, steps):
    """One step for all, or one mask: no plan differs from another in what it scores."""
    nats = forced("ancestral", start, draws=100, steps=steps).nats.sum(dim=1)
    exact = -sum(LOG_P[index_of(torch.tensor(start)), i, TEXT[i]].item() for i in range(3) if start[i] == TOY_MASK)
    assert nats.tolist() == pytest.approx([exact] * 100, rel=1e-5)


# --- On a network


def text(rows=5, length=12) -> torch.Tensor:
    return torch.randint(0, 46, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network(build):
    model = build()
    make_context_matter(model)
    return model


def test_one_token_a_step_is_the_chain_rule_along_the_order(network):
    blocks = text(3)
    bound = step_bound(network, blocks, sampler="first_hitting", seed=[4, 5, 6])
    for row, seed in enumerate((4, 5, 6)):
        steps = network.generate(
            length=12, sampler="first_hitting", seed=[seed], return_dict_in_generate=True, output_reveal_steps=True
        ).reveal_steps[0]
        total = 0.0
        for place in steps.argsort():
            canvas = blocks[row].masked_fill(steps >= steps[place], MASK)
            logits = network(input_ids=canvas[None]).logits[0, place].double()
            logits[MASK] = -torch.inf
            total -= logits.log_softmax(-1)[blocks[row, place]].item()
        assert bound.nats[row].item() == pytest.approx(total, rel=1e-5)


def test_many_independent_steps_are_the_nelbo(network):
    """Up to the 1e-3 of noise that the schedule leaves out, and the errors of both estimates."""
    blocks = text(rows=200, length=4)
    bound = step_bound(network, blocks, steps=100, batch_size=200)
    few = step_bound(network, blocks, steps=1, batch_size=200)
    nelbo = [validation_nelbo(network, blocks, draws=16, batch_size=200, seed=seed) for seed in range(4)]
    spread = torch.tensor(nelbo).std().item() / 2
    assert abs(bound.mean - sum(nelbo) / 4) < 4.5 * (bound.error**2 + spread**2) ** 0.5
    assert abs(few.minus(bound)[0]) > 4.5 * few.minus(bound)[1], "and one step is told apart from it"


def test_it_costs_the_samplers_own_forwards(network, monkeypatch):
    forwards, rows = [], []
    network.model.register_forward_hook(lambda *unused: forwards.append(1))
    network.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    monkeypatch.setitem(head_mdlm.CHUNK, "cpu", 10 * 48)
    step_bound(network, text(), steps=4)
    assert len(forwards) == 4 and sum(rows) == text().numel(), "N forwards, and the head once for each token"
    assert max(rows) <= 10, "in chunks: no logits of a batch"


def test_a_blocks_figure_depends_on_nothing_but_block_and_seed(network):
    bound = step_bound(network, text(), steps=3, seed=[0, 1, 2, 3, 4])
    assert bound.tokens.tolist() == [12] * 5
    again = step_bound(network, text()[2:4], steps=3, seed=[2, 3], batch_size=1)
    assert again.nats.tolist() == pytest.approx(bound.nats[2:4].tolist(), rel=1e-6)
    assert step_bound(network, text(), steps=3, seed=[5, 1, 2, 3, 4]).nats[0] != bound.nats[0]
    one = step_bound(network, text(), steps=3, batch_size=2)
    assert one.nats.tolist() == pytest.approx(step_bound(network, text(), steps=3).nats.tolist(), rel=1e-6)
    network.generation_config.temperature = 0.1
    assert torch.equal(step_bound(network, text(), steps=3, seed=[0, 1, 2, 3, 4]).nats, bound.nats)


def test_a_prompt_is_given_and_neither_scored_nor_counted(network):
    """p(rest | prompt): with a single token to fill, one forward by hand."""
    prompt = torch.ones(5, 12, dtype=torch.bool)
    prompt[:, 7] = False
    bound = step_bound(network, text(), prompt, steps=4)
    logits = network(input_ids=text().masked_fill(~prompt, MASK)).logits[:, 7].double()
    logits[:, MASK] = -torch.inf
    by_hand = -logits.log_softmax(-1).gather(-1, text()[:, 7:8])[:, 0]
    assert bound.nats.tolist() == pytest.approx(by_hand.tolist(), rel=1e-5) and bound.tokens.tolist() == [1] * 5
    assert bound.mean == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_blocks_from_left_to_right_see_what_is_before_them(network):
    """Blocks of one token: left to right, whatever the steps; the later ones are masked."""
    bound, total = step_bound(network, text(2), steps=2, block_length=1), torch.zeros(2, dtype=torch.float64)
    for place in range(12):
        canvas = text(2).clone()
        canvas[:, place:] = MASK
        logits = network(input_ids=canvas).logits[:, place].double()
        logits[:, MASK] = -torch.inf
        total -= logits.log_softmax(-1).gather(-1, text(2)[:, place : place + 1])[:, 0]
    assert bound.nats.tolist() == pytest.approx(total.tolist(), rel=1e-5)


def test_means_and_errors_are_those_of_a_ratio_and_of_pairs():
    one = Bound(torch.tensor([20.0, 30.0, 46.0]).double(), torch.tensor([10, 10, 10]))
    other = Bound(torch.tensor([19.0, 28.0, 45.0]).double(), torch.tensor([10, 10, 10]))
    assert one.mean == pytest.approx(3.2) and one.error == pytest.approx(torch.tensor([2.0, 3, 4.6]).std() / 3**0.5)
    difference, error = one.minus(other)
    assert difference == pytest.approx(4 / 30) and error == pytest.approx(torch.tensor([0.1, 0.2, 0.1]).std() / 3**0.5)
    assert error < one.error / 10
    assert Bound(torch.tensor([20.0, 5.0]).double(), torch.tensor([10, 2])).mean == pytest.approx(25 / 12)
    assert Bound(torch.tensor([20.0]).double(), torch.tensor([10])).error is None
    with pytest.raises(ValueError, match="the same blocks"):
        one.minus(Bound(one.nats, torch.tensor([10, 10, 9])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": "dream", "order": "confidence"},
            "sampler 'dream' has no likelihood with the order 'confidence': the tokens that it draws decide",
        ),
        ({"sampler": "remdm"}, "sampler 'remdm' has no likelihood: it masks tokens again"),
        ({"sampler": "psi"}, "sampler 'psi' has no likelihood: it masks tokens again"),
        ({"sampler": "margin", "order_temperature": 0.5}, "order_temperature is 0.5"),
        ({"sampler": "adaptive", "top_p": 0.9}, "top_p is 0.9"),
        ({"temperature": 0.9}, "temperature is 0.9"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"top_k": 4}, "top_k is 4"),
        ({"suppress_tokens": [3]}, r"suppress_tokens is \[3\]"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0"),
        ({"precision": "legacy_float32"}, "precision is 'legacy_float32'"),
        ({"last_step": "greedy"}, "last_step is 'greedy'"),
        ({"last_step": "none"}, "last_step is 'none'"),
        ({"stop_at_eos": True}, "stop_at_eos is True"),
        ({"steps": 0}, "steps must"),
    ],
)
def test_what_has_no_bound_is_refused_by_name(network, options, message):
    with pytest.raises(ValueError, match=message):
        step_bound(network, text(), **options)


@pytest.mark.parametrize(
    ("blocks", "prompt", "message"),
    [
        (torch.zeros(4, dtype=torch.long), None, r"blocks must have the shape \(n, L\)"),
        (torch.zeros(2, 33, dtype=torch.long), None, "blocks are 33 tokens long, but the model's context is 32"),
        (torch.tensor([[1, 2], [3, MASK]]), None, r"block 1 holds a \[MASK\]"),
        (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 3), "prompt_mask must have the shape"),
        (torch.ones(2, 4, dtype=torch.long), torch.ones(2, 4), "prompt_mask covers all of block 0"),
    ],
)
def test_text_without_a_bound_is_refused(network, blocks, prompt, message):
    with pytest.raises(ValueError, match=message):
        step_bound(network, blocks, prompt, steps=2)


def test_a_network_without_finite_logits_is_named_and_left_in_its_mode(network):
    network.train().lm_head.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite logits for row 0 in step 0"):
        step_bound(network, text(), steps=2)
    assert network.training


# --- Uniform-state diffusion


@pytest.fixture
def uniform(build):
    model = build(
        vocab_size=3,
        diffusion_kind="uniform",
        mask_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        time_conditioning=True,
    )
    make_context_matter(model)
    return model


def law_of_chain(model, steps: int) -> torch.Tensor:
    """The law [9] of two tokens under `uniform_ancestral` with its last step, by enumeration."""
    states = torch.tensor(list(itertools.product(range(3), repeat=2)))
    times = [*torch.linspace(1, TAIL, steps + 1, dtype=torch.float64).tolist(), 0.0]
    gamma = process_of(model.config).schedule.gamma
    law = torch.full((9,), 1 / 9, dtype=torch.float64)
    for t, s in itertools.pairwise(times):
        alpha_t, alpha_s = (gamma(torch.tensor(time, dtype=torch.float64)) for time in (t, s))
        with torch.no_grad():
            sigma = -alpha_t.log().float().expand(9)
            x_hat = model(input_ids=states, timesteps=sigma).logits.double().softmax(-1)
        at_s = alpha_s * x_hat + (1 - alpha_s) / 3  # [state, position, value at s]
        onto_z = alpha_t / alpha_s * torch.eye(3) + (1 - alpha_t / alpha_s) / 3  # q(z_t | z_s)
        # Duo's posterior of x_hat: q(z_t | z_s) q(z_s | x_hat) / q(z_t | x_hat).
        moves = at_s * onto_z[:, states].permute(1, 2, 0)
        moves = moves / moves.sum(-1, keepdim=True)
        law = torch.einsum("s,sa,sb->ab", law, moves[:, 0], moves[:, 1]).flatten()
    return law


def test_the_uniform_chains_bound_lies_above_its_likelihood(uniform):
    blocks = torch.tensor(list(itertools.product(range(3), repeat=2)))
    exact = -law_of_chain(uniform, steps=2).log()
    for block, likelihood in zip(blocks, exact, strict=True):
        bound = step_bound(uniform, block.expand(1000, 2), steps=2, batch_size=1000)
        assert 2 * bound.mean + 9 * bound.error > likelihood.item(), block
    assert 2 * bound.mean < likelihood.item() + 3, "and not far above it"


def test_a_short_step_of_the_uniform_chain_is_the_nelbos_integrand():
    """KL of the posteriors between t and t - dt, per dt: Duo's Eq. 17 as dt goes to zero."""
    log_p = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    z_t, x_0 = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 0, 1, 4, 2])
    alpha, slope, dt = 0.4, -0.7, 1e-6
    level = torch.full((6,), alpha, dtype=torch.float64)
    integrand = uniform_nelbo(log_p, z_t, x_0, level, torch.full_like(level, slope))
    rate = posterior_divergence(log_p, z_t, x_0, alpha, alpha - slope * dt) / dt
    assert rate.tolist() == pytest.approx(integrand.tolist(), rel=1e-4)


def test_the_last_step_of_the_uniform_chain_is_a_draw_of_the_text():
    """alpha_s = 1: -log of the posterior at x_0, which the mixture's parts give by hand."""
    log_p, z_t, x_0 = torch.tensor([[0.2, 0.3, 0.5]]).double().log(), torch.tensor([1]), torch.tensor([2])
    at_x = (1 - 0.4) * 0.5 / (3 * 0.4 * 0.3 + 1 - 0.4)
    assert posterior_divergence(log_p, z_t, x_0, 0.4, 1.0).item() == pytest.approx(-math.log(at_x))


def test_the_first_noise_of_the_uniform_chain_is_compared_with_its_prior():
    law = torch.full((5,), 0.7 / 5, dtype=torch.float64)
    law[2] += 0.3
    assert prior_divergence(0.3, 5) == pytest.approx((law * (law / 0.2).log()).sum().item())


def test_a_locked_uniform_chain_is_refused_by_name(uniform):
    with pytest.raises(ValueError, match="locking 'spread' has no N-step bound under uniform diffusion"):
        step_bound(uniform, torch.ones(3, 4, dtype=torch.long), steps=5, locking="spread")


def test_the_uniform_chain_costs_the_samplers_forwards(uniform):
    forwards = []
    uniform.model.register_forward_hook(lambda *unused: forwards.append(1))
    step_bound(uniform, torch.ones(3, 4, dtype=torch.long), steps=5)
    count = len(forwards)
    assert count == uniform.generate(length=4, steps=5, seed=0, return_dict_in_generate=True).nfe[0].item() == 6
