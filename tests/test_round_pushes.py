"""Rounds on the Hub: each is a branch, pushed while the next one trains; what fails is tried again, nothing is pushed twice."""

import json
import threading
from contextlib import closing
from pathlib import Path

import pytest
from fork_server import ForkServer
from hub_server import CUT, HubServer, environment_of
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file
from tiny_run import mcd_arguments, save_judge, write_inputs

from trainers.runs.round_pushes import PUSHED, RoundPushes


TOKEN = "hf_test_secret"
COMMIT = "POST /api/models/user/tiny/commit/"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(TOKEN) as hub:
        yield hub


def write_round(folder: Path, number: int, content: str = ""):
    (folder / f"round-{number}").mkdir(parents=True, exist_ok=True)
    (folder / f"round-{number}" / "config.json").write_text(content or f'{{"round": {number}}}')


def pushes(hub, folder: Path, private: bool | None = None) -> RoundPushes:
    return RoundPushes(HfApi(endpoint=hub.endpoint, token=TOKEN), "user/tiny", private, folder)


def commits(hub) -> list[str]:
    return [
        request.removeprefix(COMMIT)
        for request, status in hub.requests
        if request.startswith(COMMIT) and status == 200
    ]


def test_each_round_is_a_branch_and_nothing_is_pushed_twice(hub, tmp_path):
    write_round(tmp_path, 1)
    first = pushes(hub, tmp_path, private=True)
    first.start()
    first.finish()
    write_round(tmp_path, 2)
    resumed = pushes(hub, tmp_path, private=True)
    resumed.start()
    resumed.finish()
    assert commits(hub) == ["round-1", "round-2"] and hub.private == {"user/tiny": True}
    for number in (1, 2):
        assert hub.files("user/tiny", f"round-{number}") == {"config.json": f'{{"round": {number}}}'.encode()}
    assert "config.json" not in hub.files("user/tiny"), "the main branch is for the finished model"
    write_round(tmp_path, 2, '{"round": "trained again, otherwise"}')
    pushes(hub, tmp_path).finish()
    assert commits(hub) == ["round-1", "round-2", "round-2"]


@pytest.mark.parametrize("fault", [401, 403, 429, 503, CUT])
def test_a_failed_push_is_tried_again_at_the_next_round(hub, tmp_path, fault, caplog):
    hub.broken = {f"{COMMIT}round-1": fault}
    write_round(tmp_path, 1)
    running = pushes(hub, tmp_path)
    running.start()
    running._last.result()
    assert commits(hub) == [] and not (tmp_path / PUSHED).exists()
    hub.broken = {}
    write_round(tmp_path, 2)
    running.start()
    running.finish()
    assert commits(hub) == ["round-1", "round-2"]
    assert set(json.loads((tmp_path / PUSHED).read_text())["rounds"]) == {"round-1", "round-2"}


def test_one_round_that_fails_does_not_keep_back_the_others(hub, tmp_path, capsys):
    hub.broken = {f"{COMMIT}round-1": 503}
    for number in (1, 2):
        write_round(tmp_path, number)
    running = pushes(hub, tmp_path, private=True)
    running.start()
    running.finish()
    assert commits(hub) == ["round-2"]
    told = capsys.readouterr().err
    assert f"hf upload user/tiny {tmp_path / 'round-1'} . --revision round-1 --private" in told
    assert "round-2 is not" not in told and TOKEN not in told


def test_training_does_not_wait_for_a_push(hub, tmp_path):
    asked, answer = threading.Event(), threading.Event()
    add = hub.add_commit

    def slow(name, files, branch="main"):
        if branch != "main":
            asked.set()
            assert answer.wait(20)
        return add(name, files, branch)

    hub.add_commit = slow
    write_round(tmp_path, 1)
    running = pushes(hub, tmp_path)
    running.start()  # returns, although the Hub does not answer yet
    assert asked.wait(20) and not (tmp_path / PUSHED).exists()
    answer.set()
    running.finish()
    assert (tmp_path / PUSHED).exists()


def test_another_repository_gets_every_round(hub, tmp_path):
    write_round(tmp_path, 1)
    pushes(hub, tmp_path).finish()
    RoundPushes(HfApi(endpoint=hub.endpoint, token=TOKEN), "user/other", None, tmp_path).finish()
    assert hub.files("user/other", "round-1") == hub.files("user/tiny", "round-1")


# --- A run


TRAIN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"
EVALUATE = "import sys; from evaluation.run_eval import main; main(sys.argv[1:])"
VISIT = """
import sys
sys.modules["modeling_mcd"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained("user/tiny", revision="round-1", trust_remote_code=True)
model.save_pretrained(sys.argv[1])
import re
from huggingface_hub import hf_hub_download
card = open(hf_hub_download("user/tiny", "README.md", revision="round-1"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One command, run twice: first no commit to the branch of round 1 lands, then all is well."""
    home = tmp_path_factory.mktemp("story")
    inputs = write_inputs(home / "inputs")
    save_judge(inputs / "judge")
    output = home / "run"
    arguments = mcd_arguments(
        inputs, output, num_rounds=2, push_to_hub=True, hub_model_id="user/tiny", hub_strategy="every_save"
    )
    with HubServer(TOKEN) as hub, closing(ForkServer(environment_of(hub.endpoint, home / "hf"))) as python:
        hub.broken = {f"{COMMIT}round-1": 401}
        first = python.run(TRAIN, *arguments)
        landed = commits(hub)
        hub.broken = {}
        second = python.run(TRAIN, *arguments)
        yield hub, python, inputs, output, (first, landed), (second, commits(hub)[len(landed) :])


@pytest.mark.slow
def test_a_run_ends_although_a_round_cannot_be_pushed(story):
    _, _, _, output, (first, landed), _ = story
    assert first.returncode == 0, first.stderr
    assert landed == ["round-2", "main"] and "Traceback" not in first.stderr
    assert "the push of round-1 to 'user/tiny' failed, and the run goes on" in first.stderr
    assert "round-1 is not on the Hub. Try again with" in first.stderr and TOKEN not in first.stderr + first.stdout


@pytest.mark.slow
def test_the_same_command_pushes_what_is_missing_and_nothing_twice(story):
    hub, _, _, output, _, (second, landed) = story
    assert second.returncode == 0, second.stderr
    assert landed == ["round-1", "main"] and "failed" not in second.stderr
    for number in (1, 2):
        here = {path.name: path.read_bytes() for path in (output / f"round-{number}").iterdir() if path.is_file()}
        assert hub.files("user/tiny", f"round-{number}") == here
    assert PUSHED not in hub.files("user/tiny")


@pytest.mark.slow
def test_a_stranger_loads_a_round_by_its_revision_as_its_card_says(story, tmp_path):
    _, python, _, output, *_ = story
    result = python.run(VISIT, str(tmp_path), plain=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    loaded, ours = load_file(tmp_path / "model.safetensors"), load_file(output / "round-1" / "model.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in ours.items())
    assert not all(loaded[name].equal(tensor) for name, tensor in load_file(output / "model.safetensors").items())


@pytest.mark.slow
def test_run_eval_takes_a_round_by_its_revision(story, tmp_path):
    _, python, inputs, output, *_ = story
    words = ["hub=user/tiny@round-1", f"here={output / 'round-1'}", "--judge", str(inputs / "judge"), "--steps", "2"]
    result = python.run(EVALUATE, *words, "--samples", "2", "--seeds", "1", "--output_dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    hub, here = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert hub["weights"] == here["weights"] and hub["gen_ppl"] == here["gen_ppl"]
