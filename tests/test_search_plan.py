"""Plans by search: counts by dynamic programming against brute force, costs against the sampler's bound, what is written."""

import itertools
import json

import pytest
import torch
from small_model import make_context_matter
from transformers import AutoModel

from evaluation import step_bound
from evaluation.search_plan import best_counts, main, search_plan, step_costs
from modeling_mcd import MDLMGenerationConfig


def text(rows=8, length=12) -> torch.Tensor:
    return torch.randint(0, 46, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network(build):
    model = build(time_conditioning=True)
    make_context_matter(model)
    return model


def cost_of(costs: torch.Tensor, points: list[int]) -> float:
    return sum(costs[a, b].item() for a, b in itertools.pairwise([0, *points]))


def riemann(loss, grid: int) -> torch.Tensor:
    """Costs of a curve of loss against visible fraction, whichever tokens come next."""
    return torch.tensor([[(b - a) / grid * loss(a / grid) for b in range(grid + 1)] for a in range(grid)])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_the_best_counts_are_those_of_brute_force(steps):
    costs = torch.rand(8, 9, generator=torch.Generator().manual_seed(steps)).double()
    every = [[*points, 8] for points in itertools.combinations(range(1, 8), steps - 1)]
    assert best_counts(costs, steps) == min(every, key=lambda points: cost_of(costs, points))


def test_known_curves_have_their_known_counts():
    """A linear curve wants equal steps; a cliff wants a step that ends on it; a steep start wants short steps first."""
    assert best_counts(riemann(lambda r: 3 - 2 * r, 32), 4) == [8, 16, 24, 32]
    assert best_counts(riemann(lambda r: 1.0 if r < 0.375 else 0.0, 32), 2) == [12, 32]
    steep = best_counts(riemann(lambda r: (1 - r) ** 3, 32), 4)
    assert [b - a for a, b in itertools.pairwise([0, *steep])] == sorted(
        b - a for a, b in itertools.pairwise([0, *steep])
    )
    assert steep[0] < 8


@pytest.mark.parametrize("steps", [0, 9])
def test_more_steps_than_the_grid_has_points_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be 1 .. 8, the points of the grid, not {steps}"):
        best_counts(torch.ones(8, 9), steps)


@pytest.mark.parametrize(("locking", "steps"), [("independent", 3), ("spread", 3), ("spread", 4)])
def test_costs_add_up_to_the_bound_of_the_sampler(network, locking, steps):
    """Under both rules of `spread`, with a network that is told the time."""
    costs, curve = step_costs(network, text(), locking, steps, grid=8, batch_size=3)
    points = [1, 2, 5, 8][-steps:]
    shares = [point / 8 for point in points]
    bound = step_bound(network, text(), steps=steps, locking=locking, reveal_counts={str(steps): shares})
    assert cost_of(costs, points) == pytest.approx(bound.mean, rel=1e-5)
    assert curve[0].item() == pytest.approx(costs[0, 8].item(), rel=1e-6), "at first every token is masked"
    assert len(curve) == 8 and costs.shape == (8, 9) and not costs.tril().any()


def test_the_winner_has_the_least_bound_and_is_reported_on_other_text(network):
    search = search_plan(network, text(), steps=[2, 3], grid=6)
    assert {name for name, _ in search.chosen_on} == {
        *("independent", "independent, counts", "spread", "spread, counts", "interleaved")
    }
    again = step_bound(network, text()[::2], **search.plan.options(2))
    assert min(bound.mean for (_, n), bound in search.chosen_on.items() if n == 2) <= again.mean
    assert search.reported["winner", 2].nats.tolist() == pytest.approx(
        step_bound(network, text()[1::2], **search.plan.options(2)).nats.tolist()
    )
    for n in (2, 3):
        plain = search.chosen_on[search.plan.locking, n].mean
        if str(n) in search.plan.reveal_counts:
            assert search.chosen_on[f"{search.plan.locking}, counts", n].mean < plain
            assert search.plan.reveal_counts[str(n)][-1] == 1 and len(search.plan.reveal_counts[str(n)]) == n


def test_a_network_that_needs_one_token_reveals_few_tokens_first(build):
    """Text of one letter a block, and a network that knows the letter once it sees any token.

    The loss is a cliff: log 47 for each token of the first step, nothing after it.
    """
    model = build(hidden_size=48)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.eye(48))
        model.lm_head.bias.zero_()
    trunk = model.model.forward

    def forward(input_ids=None, hidden_rows=None, **others):
        output = trunk(input_ids=input_ids, hidden_rows=hidden_rows, **others)
        seen = torch.nn.functional.one_hot(input_ids, 48).sum(dim=1) > 0
        states = torch.where(seen, 30.0, 0.0)[:, None].expand(*input_ids.shape, 48)
        if hidden_rows is not None:
            states = states.flatten(0, 1)[hidden_rows] if hidden_rows.ndim == 1 else states[:, : hidden_rows.shape[1]]
        output.last_hidden_state = states
        return output

    model.model.forward = forward
    blocks = torch.arange(8)[:, None].expand(8, 24).contiguous()
    search = search_plan(model, blocks, steps=[2], lockings=["independent", "spread"], grid=8)
    assert search.plan.reveal_counts["2"] == [0.125, 1.0], "one eighth of the tokens, and then the rest"
    assert search.reported["winner", 2].minus(search.reported["independent", 2])[0] < -1
    equal_steps = step_bound(model, blocks[1::2], steps=2, locking=search.plan.locking)
    assert search.reported[search.plan.locking, 2].mean == pytest.approx(equal_steps.mean), (
        "beside the winner's counts"
    )


# --- The command


@pytest.fixture
def folder(network, tokenizer, tmp_path):
    network.generation_config.temperature = 0.9
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the moon. " * 12)
    return tmp_path


def plan(folder, *words):
    main(
        [
            str(folder / "model"),
            "--text",
            str(folder / "text.txt"),
            "--blocks",
            "6",
            "--grid",
            "6",
            "--steps",
            "2",
            *words,
        ]
    )


def test_the_winner_is_written_and_generate_uses_it(folder, capsys):
    plan(folder, "--steps", "2", "4", "--lockings", "spread")
    written = json.loads((folder / "model" / "generation_config.json").read_text())
    assert written["locking"] == "spread" and written["temperature"] == 0.9, "other options stay"
    found = json.loads((folder / "model" / "plan.json").read_text())
    assert (
        found["reveal_counts"] == (written.get("reveal_counts") or {})
        and "spread" in found["loss_by_visible_fraction"]
    )
    model = AutoModel.from_pretrained(folder / "model")
    options = {"steps": 4, "seed": 0, "length": 24, "return_dict_in_generate": True, "output_reveal_steps": True}
    planned = model.generate(**options).reveal_steps
    told = {"locking": "spread", "reveal_counts": written.get("reveal_counts")}
    fresh = AutoModel.from_pretrained(folder / "model", generation_config=MDLMGenerationConfig())
    assert torch.equal(planned, fresh.generate(**options, **told).reveal_steps)
    assert not torch.equal(planned, fresh.generate(**options).reveal_steps)
    out = capsys.readouterr().out
    assert "other half: the winner" in out and "Saved in" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "7"], "steps must be at most grid (6), not 7"),
        (["--steps", "0"], "steps must be an integer of at least 1, not 0"),
        (["--blocks", "3"], "blocks must be at least 4, not 3"),
        (["--text", "nowhere.txt"], "text 'nowhere.txt': no such file or folder"),
        (["--lockings", "golden"], "invalid choice: 'golden'"),
        (["--output_dir", "/dev/null/plan"], "Not a directory"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(folder, capsys, words, message):
    before = (folder / "model" / "generation_config.json").read_text()
    with pytest.raises(SystemExit):
        plan(folder, *words)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mcd-plan: error:")]
    assert message in line
    assert (folder / "model" / "generation_config.json").read_text() == before
    assert not (folder / "model" / "plan.json").exists()


def test_a_saved_sampler_without_counts_is_refused(folder, network, capsys):
    network.generation_config = MDLMGenerationConfig(sampler="confidence")
    network.save_pretrained(folder / "model")
    with pytest.raises(SystemExit):
        plan(folder)
    assert "has sampler 'confidence' and last_step None" in capsys.readouterr().err


def test_a_saved_order_of_fixed_counts_is_planned_without_interleaving(folder, network, capsys):
    network.generation_config = MDLMGenerationConfig(sampler="random")
    network.save_pretrained(folder / "model")
    plan(folder, "--steps", "2")
    out = capsys.readouterr().out
    assert "| spread, counts |" in out and "interleaved" not in out
    assert json.loads((folder / "model" / "generation_config.json").read_text())["sampler"] == "random"


def test_a_uniform_model_has_no_plan(build):
    with pytest.raises(ValueError, match="this model is of uniform diffusion, and has none"):
        search_plan(build(diffusion_kind="uniform", mask_token_id=None), text(), steps=[2])
