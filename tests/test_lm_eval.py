"""The adapter for the lm-evaluation-harness, on a local task: likelihoods by hand, shared draws, rolling, stop strings."""

import json

import pytest
import torch
from small_model import make_context_matter


pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from evaluation import sequence_nelbo  # noqa: E402
from evaluation.lm_eval_adapter import MaskedDiffusionLM  # noqa: E402


@pytest.fixture
def language_model(build, tokenizer, tmp_path):
    model = build()
    make_context_matter(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return MaskedDiffusionLM(str(tmp_path / "model"), draws=16, batch_size=4)


class Request:
    def __init__(self, *args):
        self.args = args


def test_a_continuation_is_scored_given_its_context(language_model, tokenizer):
    requests = [Request("the cat", " sat"), Request("a", "t"), Request("", "dog ran"), Request("the cat", " ran far")]
    found = language_model.loglikelihood(requests, disable_tqdm=True)
    for request, (score, greedy) in zip(requests, found, strict=True):
        context, rest = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in request.args)
        context = context or [tokenizer.bos_token_id]
        text = torch.tensor([[*context, *rest]])
        prompt = (torch.arange(text.shape[1]) < len(context))[None]
        exact = sequence_nelbo(language_model.model, text, prompt, draws=16, seed=[0])
        assert score == pytest.approx(-exact.nats.item(), rel=1e-5) and greedy in (True, False)


def test_enumeration_equals_the_estimate_and_ranks_agree(language_model):
    """Six tokens have 63 sets: 64 draws enumerate them, 62 estimate, with the same draws for all answers."""
    answers = (" a dog", " a cat", " the x", " night")
    exact, estimated = [], []
    for found, draws in ((exact, 64), (estimated, 62)):
        language_model.draws = draws
        requests = [Request("it was", answer) for answer in answers]
        found += [score for score, _ in language_model.loglikelihood(requests, disable_tqdm=True)]
    assert exact != estimated
    assert sorted(range(4), key=lambda i: exact[i]) == sorted(range(4), key=lambda i: estimated[i])
    texts = torch.tensor([language_model.tok_encode("it was" + answer) for answer in answers])
    prompt = (torch.arange(texts.shape[1]) < 6).expand_as(texts)
    estimate = sequence_nelbo(language_model.model, texts, prompt, draws=62, seed=[0] * 4)
    assert estimate.nats.tolist() == pytest.approx([-score for score in estimated], rel=1e-5)
    assert ((estimate.nats + torch.tensor(exact)).abs() < 4.42 * estimate.errors).all() and estimate.errors.min() > 0


def test_long_texts_are_the_sum_of_windows(language_model):
    text = "it was a dark and stormy night; the rain fell in torrents"
    (found,) = language_model.loglikelihood_rolling([Request(text)])
    ids = language_model.tok_encode(text)
    parts = language_model.scores([([46], ids[:31]), ([46], ids[31:])])
    assert found == pytest.approx(sum(score for score, _ in parts), rel=1e-6)


def test_texts_end_at_a_stop_string(language_model):
    options = {"until": [], "max_gen_toks": 12}
    (full,) = language_model.generate_until([Request("the", options)])
    stop = full[4:6]
    (cut,) = language_model.generate_until([Request("the", options | {"until": [stop]})])
    assert cut == full.split(stop)[0] and len(cut) < len(full)


def test_the_harness_runs_a_local_task(language_model, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"question": "it was", "choices": [" a dog", " a cat"], "answer": n % 2} for n in range(3)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"""task: mine
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.json"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(language_model, tasks=["mine"], task_manager=manager, bootstrap_iters=0)
    one, other = language_model.loglikelihood([Request("it was", c) for c in rows[0]["choices"]], disable_tqdm=True)
    best = int(other[0] > one[0])
    assert results["results"]["mine"]["acc,none"] == pytest.approx(sum(row["answer"] == best for row in rows) / 3)
