"""The adapter for the lm-evaluation-harness, on local tasks: likelihoods by hand, every network, shared draws, text, two processes."""

import itertools
import json
import math
import socket
from pathlib import Path

import pytest
import torch
from chat import chat_tokenizer, talk
from small_model import make_context_matter
from tiny_run import start_python
from toy_backbones import NETWORKS, SHIFT, make_network


pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

import lm_eval  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from evaluation import block_nelbo, sequence_nelbo  # noqa: E402
from evaluation.eval_results import write_eval_results  # noqa: E402
from evaluation.lm_eval_adapter import MaskedDiffusionLM, main  # noqa: E402
from evaluation.text import encode  # noqa: E402
from modeling_mcd import as_masked_diffusion  # noqa: E402


SIGMAS = 4.42  # a false alarm in 1e5
MASK = 47


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


def test_answers_to_a_question_share_their_draws(language_model):
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
    assert ((estimate.nats + torch.tensor(exact)).abs() < SIGMAS * estimate.errors).all() and estimate.errors.min() > 0


def test_long_texts_are_the_sum_of_windows(language_model):
    text = "it was a dark and stormy night; the rain fell in torrents"
    (found,) = language_model.loglikelihood_rolling([Request(text)])
    ids = language_model.tok_encode(text)
    parts = language_model.nats_of([([46], ids[:31]), ([46], ids[31:])])
    assert found == pytest.approx(-sum(parts), rel=1e-6)
    both = language_model.loglikelihood_rolling([Request(""), Request(text)])
    assert both == [0.0, pytest.approx(found)], "each text has its own sum"


# --- Every network


def exact_nats(model, context: list[int], rest: list[int]) -> float:
    """Over all sets of masked tokens, from the logits of each canvas. A block model's last block ends in masks."""
    text, width = [*context, *rest], len(context) + len(rest)
    end = width + -width % (getattr(model.config, "block_size", None) or 1)
    places, total = range(len(context), width), 0.0
    for size in range(1, len(rest) + 1):
        for hidden in itertools.combinations(places, size):
            canvas = torch.tensor([text + [MASK] * (end - width)])
            canvas[0, list(hidden)] = MASK
            given = {}
            if getattr(model.config, "time_conditioning", False):  # told the time at which as much is visible
                given["timesteps"] = torch.tensor([-math.log(1e-3 + (1 - 1e-3) * (1 - size / width))])
            logits = model(input_ids=canvas, **given).logits[0].double().detach()
            logits[:, MASK] = -torch.inf
            log_p = logits.log_softmax(-1)
            nats = -sum(log_p[i, text[i]].item() for i in hidden)
            total += nats / size / math.comb(len(rest), size)
    return total


def saved(model, tokenizer, folder) -> MaskedDiffusionLM:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return MaskedDiffusionLM(str(folder), draws=16, batch_size=16)


def check_network(adapter):
    """Three tokens: enumerated with 8 draws or more, estimated with 6, many times over."""
    context, rest = adapter.tok_encode("the cats"), adapter.tok_encode(" sa")
    expected = exact_nats(adapter.model, context, rest)
    adapter.draws = 8
    (enumerated,) = adapter.nats_of([(context, rest)])
    if getattr(adapter.model.config, "block_size", None) is None:
        assert enumerated == pytest.approx(expected, rel=1e-4)
    text = torch.tensor([[*context, *rest]]).expand(100, -1)
    prompt = (torch.arange(text.shape[1]) < len(context)).expand_as(text)
    many = sequence_nelbo(adapter.model, text, prompt, draws=6, seed=list(range(100)), batch_size=200)
    error = many.errors.square().sum().sqrt().item() / 100
    assert abs(many.nats.mean().item() - expected) < SIGMAS * error + 1e-4 and error > 0
    (score, greedy), *_ = adapter.loglikelihood([Request("the cats", " sa"), Request("a", " b")], disable_tqdm=True)
    assert score == pytest.approx(-enumerated, rel=1e-5) and greedy in (True, False)
    long = "the cat sat on the mat and then it ran"
    assert adapter.loglikelihood_rolling([Request(long)], disable_tqdm=True)[0] < 0
    short, other = adapter.generate_until([Request("the", {"max_gen_toks": 6}), Request("a cat", {"max_gen_toks": 6})])
    assert adapter.generate_until([Request("a cat", {"max_gen_toks": 6})]) == [other], "alone and padded in a batch"


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"gemma2", "openai-gpt"}))
def test_enumeration_equals_the_estimate_for_every_backbone(name, tokenizer, tmp_path):
    """LLaDA is a llama, Dream a qwen2 whose logits are shifted; ModernBERT has windows."""
    network = make_network(name, dtype=torch.float32)
    check_network(saved(as_masked_diffusion(network, MASK, SHIFT.get(name, 0)), tokenizer, tmp_path))


@pytest.mark.parametrize("name", ["qwen3", "qwen2"])
def test_enumeration_equals_the_estimate_for_block_models(name, tokenizer, tmp_path):
    """Eleven tokens in blocks of four: the last is not full, and holds the three that are scored."""
    network = make_network(name, dtype=torch.float32)
    model = as_masked_diffusion(network, MASK, SHIFT.get(name, 0), attention="block", block_size=4)
    check_network(saved(model, tokenizer, tmp_path))


@pytest.mark.parametrize("options", [{}, {"time_conditioning": True}])
def test_enumeration_equals_the_estimate_for_our_network(options, build, tokenizer, tmp_path):
    model = build(**options)
    make_context_matter(model)
    check_network(saved(model, tokenizer, tmp_path))


def test_a_model_of_uniform_noise_is_scored_by_its_own_nelbo(build, tokenizer, tmp_path):
    model = build(diffusion_kind="uniform", mask_token_id=None)
    make_context_matter(model)
    adapter = saved(model, tokenizer, tmp_path)
    requests = [Request("the cat", " sat"), Request("the cat", " ran")]
    found = [score for score, _ in adapter.loglikelihood(requests, disable_tqdm=True)]
    for request, score in zip(requests, found, strict=True):
        context, rest = map(adapter.tok_encode, request.args)
        text = torch.tensor([[*context, *rest]])
        prompt = torch.arange(text.shape[1]) < len(context)
        bound = block_nelbo(model, text.expand(400, -1), 1, 200, 3, prompt_mask=prompt.expand(400, -1))
        many = block_nelbo(model, text.expand(16, -1), 1, 16, 0, prompt_mask=prompt.expand(16, -1))
        assert -score == pytest.approx(many.nats.mean().item(), rel=1e-5)
        error = (many.nats.var() / 16 + bound.nats.var() / 400).sqrt().item()
        assert abs(-score - bound.nats.mean().item()) < SIGMAS * error
    assert len(adapter.generate_until([Request("the", {"max_gen_toks": 5, "until": []})])[0]) >= 1


# --- Text


def test_texts_end_at_a_stop_string(language_model):
    options = {"until": [], "max_gen_toks": 12}
    (full,) = language_model.generate_until([Request("the", options)])
    stop = full[4:6]
    requests = [
        Request("a", options),
        Request("the", options | {"until": [stop]}),
        Request("the", options | {"until": ["%", stop]}),
    ]
    _, cut, other = language_model.generate_until(requests)
    assert cut == other == full.split(stop)[0] and len(cut) < len(full)


def test_a_text_ends_with_its_sequence(language_model, monkeypatch):
    """At every end that the model's configuration names, not only the tokenizer's."""
    (full,) = language_model.generate_until([Request("the", {"max_gen_toks": 12})])
    language_model.model.generation_config.eos_token_id = [46, language_model.tok_encode(full[3])[0]]
    (cut,) = language_model.generate_until([Request("the", {"max_gen_toks": 12})])
    assert cut == full[: full.index(full[3])]


def test_options_of_generate_reach_it(language_model):
    options = {"max_gen_toks": 12, "sampler": "margin", "steps": 12, "block_length": 6}
    (text,) = language_model.generate_until([Request("the", options)])
    ids = torch.tensor([language_model.tok_encode("the")])
    how = {"sampler": "margin", "steps": 12, "block_length": 6, "temperature": 0.0, "seed": 0, "max_new_tokens": 12}
    drawn = language_model.model.generate(ids, **how)
    assert text == language_model.tokenizer.decode(drawn[0, 3:]).split(language_model.tokenizer.eos_token)[0]
    with pytest.raises(ValueError, match=r"unknown arguments \['num_beams'\]"):
        language_model.generate_until([Request("the", {"num_beams": 4})])
    one, same, other = language_model.generate_until(
        [Request("it was", {"max_gen_toks": 12, "temperature": 1.0})] * 2 + [Request("it was", {"max_gen_toks": 12})]
    )
    assert one != same, "a request that is repeated is another sample"


def test_a_context_may_begin_with_a_bos_and_is_cut_on_the_left(language_model):
    assert language_model.context_of([1, 2, 3], 2) == [2, 3] and language_model.context_of([1], 2) == [1]
    ((plain, _),) = language_model.loglikelihood([Request("the cat", " sat")], disable_tqdm=True)
    language_model.add_bos_token = True
    assert language_model.context_of([1, 2, 3], 3) == [46, 2, 3] and language_model.context_of([46, 1], 3) == [46, 1]
    ids = language_model.tok_encode("the cat sat")
    ((found, _),) = language_model.loglikelihood([Request("the cat", " sat")], disable_tqdm=True)
    (expected,) = language_model.nats_of([([46, *ids[:7]], ids[7:])])
    assert found == pytest.approx(-expected) and found != pytest.approx(plain, rel=1e-6)


# --- The harness


ROWS = [{"question": "it was", "choices": [" a dog", " a cat"], "answer": n % 2} for n in range(3)]
TASKS = {
    "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "text": """output_type: generate_until
doc_to_text: "{{question}} {{answer}}"
doc_to_target: "a"
generation_kwargs: {until: ["q"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def write_tasks(folder) -> TaskManager:
    (folder / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, words in TASKS.items():
        data = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.json'}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(data + words)
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_the_harness_runs_a_local_task(language_model, tmp_path):
    manager = write_tasks(tmp_path)
    results = simple_evaluate(language_model, tasks=["choices"], task_manager=manager, bootstrap_iters=0)
    one, other = language_model.loglikelihood([Request("it was", c) for c in ROWS[0]["choices"]], disable_tqdm=True)
    best = int(other[0] > one[0])
    assert results["results"]["choices"]["acc,none"] == pytest.approx(sum(row["answer"] == best for row in ROWS) / 3)


def test_a_score_on_a_registered_benchmark_is_read_from_what_the_harness_writes(language_model, tmp_path, monkeypatch):
    """The harness's own GSM8K, on questions of ours."""
    rows = [{"question": f"it was {n}", "answer": f"so it was\n#### {n}"} for n in range(7)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(tmp_path / "rows.json") for split in ("train", "test")}
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (tmp_path / "gsm8k.yaml").write_text(json.dumps(task))
    words = ["run", "--model", "mcd", "--model_args", f"path={language_model.name},draws=16,steps=2"]
    words += ["--tasks", str(tmp_path / "gsm8k.yaml"), "--gen_kwargs", "max_gen_toks=8", "--output_path"]
    for more, name in ([], "out"), (["--limit", "3"], "part"):
        monkeypatch.setattr("sys.argv", ["mcd-lm-eval", *words, str(tmp_path / name), *more])
        main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    ((path, entry),) = write_eval_results(file, language_model.name).items()
    assert path.name == "gsm8k.yaml" and entry.dataset_id == "openai/gsm8k"
    assert entry.value == 100 * json.loads(file.read_text())["results"]["gsm8k"]["exact_match,strict-match"]
    assert entry.notes.startswith("5-shot, exact_match (strict-match), draws 16, steps 2, max_gen_toks 8, lm-eval")
    (part,) = (tmp_path / "part").rglob("results_*.json")
    with pytest.raises(ValueError, match="gsm8k was run on 3 of its 7 questions"):
        write_eval_results(part, language_model.name)


def test_a_chat_template_writes_its_marks(build, tmp_path):
    """As `apply_chat_template` of the tokenizer gives their ids; [MASK] in a question stays letters."""
    tokenizer = chat_tokenizer()
    model = build(vocab_size=len(tokenizer), mask_token_id=MASK, max_position_embeddings=96)
    make_context_matter(model)
    adapter = saved(model, tokenizer, tmp_path / "model")
    history = talk("user: it was [MASK]")
    ids = adapter.tok_encode(adapter.apply_chat_template(history))
    expected = tokenizer.apply_chat_template(talk("user: it was "), add_generation_prompt=True, return_dict=False)
    letters = encode(["[MASK]"], tokenizer)[0]
    marks = [i for i in expected if i > MASK]
    assert len(marks) == 5 and [i for i in ids if i > MASK] == marks, "two turns, one of which has ended"
    assert MASK not in ids and len(ids) == len(expected) + len(letters)
    how = {"tasks": ["text"], "task_manager": write_tasks(tmp_path), "apply_chat_template": True, "bootstrap_iters": 0}
    results = simple_evaluate(adapter, **how)
    (sample, *_) = results["samples"]["text"]
    prompt = (
        sample["arguments"][0][0]
        if isinstance(sample["arguments"], list)
        else sample["arguments"]["gen_args_0"]["arg_0"]
    )
    assert prompt == tokenizer.apply_chat_template(talk("user: it was 0"), tokenize=False, add_generation_prompt=True)
    canvas = tokenizer.apply_chat_template(
        talk("user: it was 0"), add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    drawn = model.generate(canvas, max_new_tokens=8, steps=4, temperature=0.0, seed=0)
    text = tokenizer.decode(drawn[0, canvas.shape[1] :])
    for stop in ("q", tokenizer.eos_token):
        text = text.split(stop)[0]
    assert sample["resps"] == [[text]]


RANK = """
import os, sys
rank, port, *words = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
import torch
torch.set_num_threads(1)
from evaluation.lm_eval_adapter import main
sys.argv = ["mcd-lm-eval", *words]
main()
"""


@pytest.mark.slow
def test_two_processes_share_the_questions_and_agree_with_one(build, tokenizer, tmp_path):
    """Three questions for two: one of them is padded. Every figure and every answer is that of one process."""
    saved_model = saved(build(), tokenizer, tmp_path / "model")
    manager = write_tasks(tmp_path)
    alone = simple_evaluate(saved_model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    words = ["run", "--model", "mcd", "--model_args", f"path={tmp_path / 'model'},draws=16", "--tasks", *TASKS]
    words += [
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
        "--batch_size",
        "16",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_python(RANK, str(rank), str(port), *words) for rank in (0, 1)]
    results = [process.complete() for process in processes]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    together = json.loads(file.read_text())["results"]
    for task, figures in alone["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert together[task][name] == pytest.approx(value, rel=1e-5), (task, name)
    for task in TASKS:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        shared = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in shared] == [0, 1, 2], "each question once"
        if task == "text":
            texts = [[sample["filtered_resps"] for sample in some] for some in (shared, alone["samples"][task])]
            assert texts[0] == texts[1] and all(map(all, texts[0])), (
                "the answer to the padding is another one's, and is dropped"
            )


def test_processes_that_are_not_joined_are_refused(language_model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but the processes are not joined: start mcd-lm-eval"):
        MaskedDiffusionLM(language_model.name)
    with pytest.raises(ValueError, match="draws must be an even integer of at least 2, not 3"):
        MaskedDiffusionLM(language_model.name, draws=3)
