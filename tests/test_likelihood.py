"""The bound on held-out text: what it scores, and that the logits of a batch are never built."""

import pytest
import torch
from small_model import MASK

from evaluation import validation_nelbo
from modeling_mcd import head_mdlm


def text(rows=4, length=32):
    return torch.randint(0, 46, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["absorbing", "uniform"])
def kind(request):
    uniform = {"diffusion_kind": "uniform", "mask_token_id": None}
    return uniform if request.param == "uniform" else {}


def test_the_bound_in_chunks_is_the_bound_at_once(build, kind, monkeypatch):
    model, largest = build(**kind), []
    at_once = validation_nelbo(model, text(), draws=2)
    log_probabilities = head_mdlm.HeadRows.log_probabilities

    def watched(rows, temperature=1.0):
        largest.append(len(rows.hidden) * len(rows.weight))
        return log_probabilities(rows, temperature)

    monkeypatch.setattr(head_mdlm.HeadRows, "log_probabilities", watched)
    monkeypatch.setitem(head_mdlm.CHUNK, "cpu", 480)
    model.lm_head.register_forward_hook(lambda *unused: pytest.fail("the head ran on a full canvas"))
    assert validation_nelbo(model, text(), draws=2, batch_size=3) == pytest.approx(at_once, rel=1e-6)
    assert max(largest) <= 480


def test_given_masks_are_neither_scored_nor_counted(build):
    """A mask that is scored would cost 1e6."""
    blocks = text()
    blocks[:, 3::7] = MASK
    assert 1 < validation_nelbo(build(), blocks) < 30
    with pytest.raises(ValueError, match=r"blocks \(2, 8\) hold no token to score"):
        validation_nelbo(build(), torch.full((2, 8), MASK))


def test_the_model_is_left_in_its_mode_after_a_failure(build):
    model = build().train()
    with pytest.raises(ValueError, match="input_ids must lie in"):
        validation_nelbo(model, torch.full((2, 8), 1000))
    assert model.training
