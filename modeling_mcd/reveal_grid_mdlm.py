"""The grid of a sampler: its times, gamma at each, and the step that reveals a token. No network, no canvas."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from .noise_schedule_mdlm import NoiseSchedule


LAST_STEPS = ("ancestral", "greedy", "none")
TAIL = 1e-5  # the time at which the steps end when a last step follows, as in the code of MDLM and Duo


def step_times(steps: int, last_step: str | None) -> torch.Tensor:
    """The grid 1 = t_0 > t_1 > ... > t_steps, float64: down to 0, or to `TAIL` where a last step follows."""
    return torch.linspace(1, 0 if last_step is None else TAIL, steps + 1, dtype=torch.float64)


def reveal_grid(
    steps: int, schedule: NoiseSchedule, last_step: str | None, shares: Sequence[float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The times of a grid and gamma at each, float64 [steps + 1].

    Without `shares`, the grid of `step_times`. Otherwise `shares` are the fractions of the tokens that are visible after each
    step, [steps] and increasing to 1: gamma runs through them, and nothing is left for a last step.
    """
    if shares is None:
        times = step_times(steps, last_step)
        return times, schedule.gamma(times)
    start = schedule.gamma(torch.ones((), dtype=torch.float64))
    gammas = start + (1 - start) * torch.tensor([0, *shares], dtype=torch.float64)
    return schedule.inverse(gammas), gammas


def shares_of(steps: int, locking: str, reveal_counts: Mapping | None) -> list[float] | None:
    """The `shares` of `reveal_grid` that a locking or the option `reveal_counts` asks for; None for the linear times."""
    if locking == "interleaved":  # whose groups are of equal size, whatever the schedule
        return [k / steps for k in range(1, steps + 1)]
    return {int(number): shares for number, shares in (reveal_counts or {}).items()}.get(steps)


def steps_of(times: torch.Tensor, gammas: torch.Tensor) -> Iterator[tuple[float, float, float]]:
    """The steps t -> s between neighbouring times of a grid: (t, gamma_t, gamma_s) of each."""
    for t, (gamma_t, gamma_s) in zip(times[:-1].tolist(), pairwise(gammas.tolist()), strict=True):
        yield t, gamma_t, gamma_s


def ancestral_reveal_steps(
    uniforms: torch.Tensor,
    steps: int,
    schedule: NoiseSchedule,
    last_step: str | None = None,
    shares: Sequence[float] | None = None,
) -> torch.LongTensor:
    """The step (0 .. steps - 1) in which the ancestral sampler reveals each token. Costs no forward of the network.

    The posterior of MDLM (arXiv 2406.07524, Eq. 7) unmasks a token between t and s < t with probability
    (gamma_s - gamma_t) / (1 - gamma_t), whatever the other tokens and the network say. That is scalar trajectory
    locking read backwards (arXiv 2602.00792, Thm 3.3): with u ~ U(gamma_1, 1] fixed for each masked token, step k
    reveals those with gamma(t_k) < u <= gamma(t_{k+1}), on the grid t_k = 1 - k / steps or that of the `shares`. The last
    step reveals the rest; with a `last_step` and no `shares` the grid ends at `TAIL`, and tokens left for the last step get
    the value `steps`.

    Args:
        uniforms: float64, any shape, in [0, 1); see `locked_uniforms`.
        steps: number of steps, at least 1.
        schedule: the noise schedule.
        last_step: None, or what follows the steps, one of `LAST_STEPS`.
        shares: see `reveal_grid`.
    """
    grid = reveal_grid(steps, schedule, last_step, shares)[1].to(uniforms.device)
    u = grid[0] + (1 - grid[0]) * uniforms
    return torch.searchsorted(grid[1:-1] if last_step is None else grid[1:], u)
