"""Finds how a model should spend N steps: the locking, and how many tokens each step reveals. Nothing is trained.

    mcd-plan MODEL --text VALIDATION --steps 4 8 16

On one half of the text the loss is measured at every mask fraction, the best counts follow by dynamic programming, and the
N-step bound chooses among the lockings; the other half says what the choice is worth. The winner goes into the model's
`generation_config.json`, and `generate(steps=N)` uses it from then on.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from evaluation.likelihood import Bound
from evaluation.sampler_likelihood import step_bound
from evaluation.text import read_texts, text_blocks
from modeling_mcd.checks_mdlm import COUNT, check_number
from modeling_mcd.command_line import OneLineParser
from modeling_mcd.files import lock_folder, write_atomically, write_json
from modeling_mcd.forward_process_mdlm import process_of, sigma_of
from modeling_mcd.generation_config_mdlm import MDLMGenerationConfig
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer
from modeling_mcd.locking_mdlm import LOCKINGS, locked_uniforms
from modeling_mcd.noise_mdlm import RowNoise, row_keys


FIRST = LOCKINGS[0]  # what the published samplers do, and what a plan is compared with
GRID = 32  # mask fractions at which the loss is measured


@torch.no_grad()
def step_costs(
    model,
    blocks: torch.LongTensor,
    locking: str,
    steps: int,
    grid: int = GRID,
    seed: int = 0,
    batch_size: int = 16,
    on_batch: Callable[[int], object] = lambda count: None,
) -> tuple[torch.DoubleTensor, torch.DoubleTensor]:
    """What a step costs that reveals the tokens between two visible fractions, and the curve of loss against fraction.

    With h(r) the loss at visible fraction r, K steps cost about sum_k (r_{k+1} - r_k) h(r_k), the left Riemann sum of the
    curve (arXiv 2511.04647). Under a locking the tokens that come next are not any masked tokens, so each loss is kept by
    the fraction at which its token is revealed: sums of the costs are then exactly the bounds of `step_bound` with
    the same seed, for any counts on the grid.

    Args:
        blocks: [n, L] token ids.
        steps: N, which the uniforms of a locking may depend on.
        seed: of the plans, as in `step_bound`.

    Returns:
        costs [grid, grid + 1]: nats per token of a step from fraction a / grid to b / grid, 0 for b <= a.
        curve [grid]: mean loss in nats of a masked token at fraction a / grid.
    """
    process, length = process_of(model.config), blocks.shape[1]
    start = process.schedule.gamma(torch.ones((), dtype=torch.float64))
    keys = row_keys(len(blocks), torch.Generator().manual_seed(seed))
    totals, masked_tokens = torch.zeros(grid, grid + 1, dtype=torch.float64), torch.zeros(grid, dtype=torch.float64)
    for rows in torch.arange(len(blocks)).split(batch_size):
        everything = torch.ones(len(rows), length, dtype=torch.bool)
        u = RowNoise(keys[rows], torch.arange(length).expand(len(rows), length)).uniforms(0)[0]
        # Token i is revealed by the first step that ends at `arrival` or later.
        arrival = (locked_uniforms(locking, u, everything, steps) * grid).ceil().long().clamp(min=1)
        text = blocks[rows].to(model.device)
        for a in range(grid):
            masked = (arrival > a).to(text.device)
            sigma = sigma_of(start + (1 - start) * a / grid).expand(len(rows)).to(text.device)
            z = text.masked_fill(masked, process.mask_token_id)
            head = model(input_ids=z, timesteps=sigma, hidden_rows=masked)
            nats = -head.map(lambda log_p, x: log_p.gather(-1, x[:, None])[:, 0], text[masked]).double().cpu()
            totals[a].index_add_(0, arrival[arrival > a], nats)
            masked_tokens[a] += len(nats)
            on_batch(len(rows))
    return totals.cumsum(dim=1) / blocks.numel(), totals.sum(dim=1) / masked_tokens.clamp(min=1)


def best_counts(costs: torch.Tensor, steps: int) -> list[int]:
    """The grid points [steps] after each step, increasing to the last one, whose steps cost the least in all.

    Args:
        costs: [grid, grid + 1], as `step_costs` returns them.

    Raises:
        ValueError: for more steps than grid points.
    """
    grid = len(costs)
    if not 1 <= steps <= grid:
        raise ValueError(f"steps must be 1 .. {grid}, the points of the grid, not {steps}")
    allowed = torch.ones(grid, grid + 1).triu(1).bool()  # every step reveals something
    moves = costs.masked_fill(~allowed, torch.inf)
    least, sources = moves[0], []  # the least cost of reaching each point in one step; where from in each later step
    for _ in range(steps - 1):
        least, source = (least[:-1, None] + moves).min(dim=0)
        sources.append(source)
    points = [grid]
    for source in reversed(sources):
        points.append(int(source[points[-1]]))
    return points[::-1]


@dataclass(frozen=True)
class Plan:
    """A locking and, for some numbers of steps, the fractions of the tokens that are visible after each step."""

    locking: str
    reveal_counts: dict[str, list[float]]

    @property
    def name(self) -> str:
        return self.locking + (", counts" if self.reveal_counts else "")

    def options(self, steps: int) -> dict:
        counts = {n: shares for n, shares in self.reveal_counts.items() if n == str(steps)}
        return {"steps": steps, "locking": self.locking} | ({"reveal_counts": counts} if counts else {})


@dataclass(frozen=True)
class Search:
    """What `search_plan` found.

    Args:
        plan: the winner.
        chosen_on: (plan's name, steps) -> bound on the first half, of every candidate.
        reported: (plan's name, steps) -> bound on the second half, of the winner and of the independent sampler; of the
            winner's locking with equal steps too, if the winner has counts.
        curves: locking -> the loss of a masked token at each visible fraction.
    """

    plan: Plan
    chosen_on: dict[tuple[str, int], Bound]
    reported: dict[tuple[str, int], Bound]
    curves: dict[str, list[float]]


def search_plan(
    model,
    blocks: torch.LongTensor,
    steps: Sequence[int],
    lockings: Sequence[str] = LOCKINGS,
    sampler: str = "ancestral",
    grid: int = GRID,
    batch_size: int = 16,
    progress: bool = False,
) -> Search:
    """The plan with the least N-step bound, in the mean over some numbers of steps.

    Even blocks choose, odd ones report. One locking serves all numbers of steps; counts are kept for those at which they beat
    equal steps of time.

    Args:
        blocks: [n, L] held-out token ids, n at least 4.

    Raises:
        ValueError: for a uniform-state model, too few blocks, or more steps than grid points.
    """
    if process_of(model.config).mask_token_id is None:
        raise ValueError(
            "a plan says when masked tokens are revealed; this model is of uniform diffusion, and has none"
        )
    check_sizes(len(blocks), steps, grid)
    model.eval()
    first, second = blocks[::2], blocks[1::2]
    measured, curves, chosen_on, reported = {}, {}, {}, {}

    def bound(of: torch.LongTensor, plan: Plan, n: int) -> Bound:
        return step_bound(model, of, sampler=sampler, batch_size=batch_size, **plan.options(n))

    candidates = []
    with tqdm(desc="plan", unit="forward", disable=not progress) as bar:
        for locking in lockings:
            plain, counts = Plan(locking, {}), {}
            for n in steps:
                chosen_on[plain.name, n] = bound(first, plain, n)
                bar.update(n)
                if locking == "interleaved" or n == 1:  # equal groups; one step has one count
                    continue
                u = locked_uniforms(locking, torch.full((1, 8), 0.3).double(), torch.ones(1, 8, dtype=torch.bool), n)
                rule = locking, tuple(u[0].tolist())  # several numbers of steps may share their uniforms
                if rule not in measured:
                    measured[rule] = step_costs(
                        model, first, locking, n, grid, batch_size=batch_size, on_batch=lambda _: bar.update()
                    )
                    curves.setdefault(locking, measured[rule][1].tolist())
                shares = [point / grid for point in best_counts(measured[rule][0], n)]
                found = bound(first, Plan(locking, {str(n): shares}), n)
                bar.update(n)
                chosen_on[f"{locking}, counts", n] = found
                if found.mean < chosen_on[plain.name, n].mean:
                    counts[str(n)] = shares
            candidates.append(Plan(locking, counts))

        def total(plan: Plan) -> float:
            names = [(plan.name if str(n) in plan.reveal_counts else plan.locking, n) for n in steps]
            return sum(chosen_on[name].mean for name in names)

        winner = min(candidates, key=total)
        others = {FIRST, winner.locking} if winner.reveal_counts else {FIRST}
        for name, plan in [*((locking, Plan(locking, {})) for locking in sorted(others)), ("winner", winner)]:
            for n in steps:
                reported[name, n] = bound(second, plan, n)
                bar.update(n)
    return Search(winner, chosen_on, reported, curves)


def check_sizes(blocks: int, steps: Sequence[int], grid: int):
    """Raises ValueError for too few blocks, or for more steps than the grid has points."""
    if blocks < 4:
        raise ValueError(
            f"blocks must be at least 4, not {blocks}: one half chooses the plan, the other reports on it"
        )
    if max(steps) > grid:
        raise ValueError(f"steps must be at most grid ({grid}), not {max(steps)}")


def table(search: Search, steps: Sequence[int]) -> str:
    """The bounds of every candidate on the first half, and what the winner gains on the second."""
    names = list(dict.fromkeys(name for name, _ in search.chosen_on))
    lines = [
        "| nats per token | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "| --- |" + " ---: |" * len(steps),
    ]

    def cell(bound: Bound | None) -> str:
        return "-" if bound is None else f"{bound.mean:.3f} ± {bound.error:.3f}"

    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(search.chosen_on.get((name, n))) for n in steps) + " |")
    for name in dict.fromkeys(name for name, _ in search.reported):
        title = f"other half: {'the winner' if name == 'winner' else name}"
        lines.append(f"| {title} | " + " | ".join(cell(search.reported[name, n]) for n in steps) + " |")
    gains = [search.reported["winner", n].minus(search.reported[FIRST, n]) for n in steps]
    lines.append("| difference, paired | " + " | ".join(f"{d:+.3f} ± {error:.3f}" for d, error in gains) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(prog="mcd-plan", description=__doc__.split("\n")[0])
    result.add_argument("model", metavar="MODEL", help="Folder or Hub name (`@revision`).")
    result.add_argument("--text", required=True, help="Held-out text: a file, or a folder of them.")
    result.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="Numbers of steps to plan for.")
    result.add_argument("--lockings", nargs="+", choices=LOCKINGS, help="To choose from; all by default.")
    result.add_argument("--blocks", type=int, default=64, help="Blocks of text; half of them choose, half report.")
    result.add_argument("--length", type=int, help="Tokens of a block; the model's context by default.")
    result.add_argument("--grid", type=int, default=GRID, help="Mask fractions at which the loss is measured.")
    result.add_argument("--batch_size", type=int, default=16, help="Blocks at a time; changes no figure.")
    result.add_argument("--tokenizer", help="Folder or Hub name, for a model that comes without one.")
    result.add_argument("--output_dir", help="Whose generation_config.json is written; MODEL if that is a folder.")
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(options: argparse.Namespace):
    """Raises ValueError or OSError before anything is measured or written."""
    for name in ("blocks", "grid", "batch_size"):
        check_number(name, getattr(options, name), COUNT)
    for n in options.steps:
        check_number("steps", n, COUNT)
    check_sizes(options.blocks, options.steps, options.grid)
    if options.output_dir is None and not Path(options.model).is_dir():
        raise ValueError(f"{options.model!r} is not a folder: say with --output_dir where generation_config.json goes")
    folder = Path(options.output_dir or options.model)
    with lock_folder(folder, "planning"):  # a folder that cannot be written to is refused before minutes of work
        texts = read_texts(options.text)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(options.model).to(device).eval()
        tokenizer = load_tokenizer(options.tokenizer or options.model)
        check_tokens(tokenizer, model.config)
        saved = model.generation_config
        if saved.sampler not in (None, "ancestral", "random") or saved.last_step is not None:
            raise ValueError(
                f"the model's generation_config.json has sampler {saved.sampler!r} and last_step {saved.last_step!r}: counts are "
                "for ancestral and random without a last step"
            )
        sampler = saved.sampler or "ancestral"
        lockings = [locking for locking in LOCKINGS if locking != "interleaved" or sampler == "ancestral"]
        blocks = text_blocks(texts, tokenizer, options.length or model.config.max_position_embeddings, options.blocks)
        search = search_plan(
            model,
            blocks,
            options.steps,
            options.lockings or lockings,
            sampler,
            options.grid,
            options.batch_size,
            progress=True,
        )
        print(table(search, options.steps))
        write_plan(folder, saved, search)
        print(f"\nSaved in {folder}: generation_config.json ({search.plan.name}), plan.json")


def write_plan(folder: Path, generation_config: MDLMGenerationConfig, search: Search):
    """Writes the winner into `generation_config.json`, and all that was measured into `plan.json`."""
    changes = {"locking": search.plan.locking, "reveal_counts": search.plan.reveal_counts or None}
    planned = MDLMGenerationConfig(**generation_config.to_dict() | changes)

    def figures(bounds: dict[tuple[str, int], Bound]) -> list[dict]:
        return [
            {"plan": name, "steps": n, "bound": bound.mean, "bound_se": bound.error}
            for (name, n), bound in bounds.items()
        ]

    content = {
        "locking": search.plan.locking,
        "reveal_counts": search.plan.reveal_counts,
        "chosen_on_first_half": figures(search.chosen_on),
        "reported_on_second_half": figures(search.reported),
        "loss_by_visible_fraction": search.curves,
    }
    write_json(folder / "plan.json", content)
    write_atomically(folder / "generation_config.json", planned.to_json_string())


if __name__ == "__main__":
    main()
