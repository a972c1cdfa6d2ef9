"""Locking: each token's uniform is uniform, and together they keep what is revealed at once apart.

Every statistical test has a fixed seed and a false-alarm rate of 1e-5.
"""

import itertools

import pytest
import torch
from laws import FALSE_ALARM, uniforms
from scipy import stats

from modeling_mcd.locking_mdlm import LOCKINGS, PHI, locked_uniforms


def locked(locking, rows=1, length=16, steps=None, seed=0, fillable=None) -> torch.Tensor:
    fillable = torch.ones(rows, length, dtype=torch.bool) if fillable is None else fillable
    return locked_uniforms(locking, uniforms(*fillable.shape, seed=seed), fillable, steps)


# --- The uniforms


@pytest.mark.parametrize("locking, steps", [("spread", None), ("interleaved", 3), ("interleaved", 8)])
def test_each_uniform_is_uniform(locking, steps):
    u = locked(locking, rows=20_000, length=21, steps=steps)
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    for place in range(21):
        assert stats.kstest(u[:, place].numpy(), "uniform").pvalue > FALSE_ALARM, place


def test_pairs_of_spread_tokens_have_their_exact_law():
    """P(both masked at gamma = 1 - m) = max(m - d', 2m - 1, 0), d' = the distance of |i - j| phi from an integer."""
    u, rows = locked("spread", rows=20_000, length=9), 20_000
    for distance, m in itertools.product(range(1, 9), (0.1, 0.3, 0.5, 0.8)):
        d = distance * PHI % 1
        law = max(m - min(d, 1 - d), 2 * m - 1, 0)
        both = ((u[:, 0] > 1 - m) & (u[:, distance] > 1 - m)).sum().item()
        if law < 1e-12:
            assert both == 0
        else:
            assert stats.binomtest(both, rows, law).pvalue > FALSE_ALARM, (distance, m)
            assert stats.binomtest(both, rows, m * m).pvalue < 1e-9 or abs(law - m * m) < 0.025, "no power"


def test_interleaved_reveals_every_nth_token_from_left_to_right():
    u = locked("interleaved", rows=200, length=20, steps=4)
    step = (u * 4).long()
    assert torch.equal(step[:, 4:], step[:, :-4]), "each step reveals every fourth token"
    assert torch.equal(step[:, 1:], (step[:, :-1] + 1) % 4), "the next step takes their right-hand neighbours"
    assert step[:, 0].unique().tolist() == [0, 1, 2, 3]


# --- Rows, and what is refused


@pytest.mark.parametrize("locking", LOCKINGS)
def test_a_locked_row_depends_on_itself_alone(locking):
    """Not on the batch, nor on padding or a prompt on its left; an infill is counted in fillable tokens."""
    fillable = uniforms(5, 30, seed=1) < 0.6
    u = uniforms(5, 30, seed=2)
    together = locked_uniforms(locking, u, fillable, steps=4)
    assert torch.equal(together[~fillable], u[~fillable])
    for row in range(5):
        only = fillable[row]
        alone = locked_uniforms(locking, u[row, only][None], torch.ones(1, int(only.sum()), dtype=torch.bool), steps=4)
        assert torch.equal(together[row, only], alone[0])


def test_independent_gives_the_uniforms_themselves_and_an_empty_row_is_left():
    u, nothing = uniforms(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    assert locked_uniforms("independent", u, ~nothing) is u
    for locking in LOCKINGS:
        assert torch.equal(locked_uniforms(locking, u, nothing, steps=2), u)


def test_unknown_lockings_and_missing_steps_are_refused():
    with pytest.raises(ValueError, match=r"locking must be one of \['independent', .*, not 'golden'"):
        locked("golden")
    with pytest.raises(ValueError, match="'interleaved' needs a number of steps"):
        locked("interleaved")
