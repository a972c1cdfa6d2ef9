"""`push_to_hub`: what of a run's folder lands on the Hub, that others can use it, and what happens when it cannot land."""

import json
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from fork_server import ForkServer
from hub_server import TOKEN, HubServer, environment_of
from safetensors.torch import load_file
from tiny_run import mcd_arguments, write_inputs

from modeling_mcd import MDLMForMaskedDiffusion


TRAIN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"
# A stranger, without the package, who has only the name of the repository.
VISIT = """
import json, re, sys
sys.modules["modeling_mcd"] = None
from huggingface_hub import hf_hub_download, model_info
from transformers import AutoModel
model = AutoModel.from_pretrained("user/tiny", trust_remote_code=True)
info = model_info("user/tiny")
report = {
    "sequences": model.generate(steps=4, seed=0).tolist(),
    "files": sorted(file.rfilename for file in info.siblings),
    "library": info.card_data.library_name,
}
card = open(hf_hub_download("user/tiny", "README.md"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1])
print(json.dumps(report))
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def retry_command(result: subprocess.CompletedProcess) -> list[str]:
    """The words of the command that a failed push recommends, as a shell would read them."""
    (line,) = (line.strip() for line in result.stderr.splitlines() if line.strip().startswith("hf upload"))
    return shlex.split(line)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def story(inputs, tmp_path_factory):
    """One command, run three times: the server is broken, then it takes no large files, then it is well."""
    home = tmp_path_factory.mktemp("story")
    output = home / "a run"  # the space is deliberate
    arguments = mcd_arguments(
        inputs, output, num_rounds=2, push_to_hub=True, hub_model_id="user/tiny", hub_private_repo=True
    )
    results, after, requests = [], [], []
    with HubServer(TOKEN) as hub, closing(ForkServer(environment_of(hub.endpoint, home / "hf"))) as python:
        for broken in ({r".*": 500}, {r"PUT .*": 403}, {}):
            hub.broken = broken
            results.append(python.run(TRAIN, *arguments))
            after.append({path: (output / path).stat().st_mtime_ns for path in contents(output)})
            requests.append(len(hub.requests))
        yield SimpleNamespace(
            home=home, output=output, hub=hub, python=python, results=results, after=after, requests=requests
        )


@pytest.mark.parametrize("attempt", [0, 1], ids=["the server is broken", "large files are refused"])
def test_a_failed_push_loses_nothing(story, attempt):
    result = story.results[attempt]
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "pushed to" not in result.stdout
    assert "The push to 'user/tiny' failed" in result.stderr and str(story.output) in result.stderr
    folders = {Path(path).parts[0] for path in story.after[attempt] if "/" in path}
    assert {"round-1", "round-2", "teacher", "checkpoint-8"} <= folders
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= story.after[attempt].keys()


def test_the_server_was_asked_each_time(story):
    first, second, third = story.requests
    assert 0 < first < second < third
    statuses = [{status for _, status in story.hub.requests[a:b]} for a, b in ((0, first), (first, second))]
    assert statuses[0] == {500} and 403 in statuses[1] and 500 not in statuses[1]


def test_the_same_command_pushes_without_training_again(story):
    result = story.results[2]
    assert result.returncode == 0, result.stderr
    assert f"pushed to {story.hub.endpoint}/user/tiny" in result.stdout and "failed" not in result.stderr
    trained = [path for path in story.after[0] if path.startswith(("checkpoint-", "round-", "teacher/"))]
    assert len(trained) > 20
    for path in trained:
        assert story.after[0][path] == story.after[1][path] == story.after[2][path], f"{path} was written again"


def test_what_lands_is_the_student_and_its_card_and_nothing_of_the_run(story):
    pushed, here = story.hub.files("user/tiny"), contents(story.output)
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "modeling_mdlm.py"} <= pushed.keys()
    assert not [path for path in pushed if "/" in path or path.startswith(".") or path == "run.json"]
    assert all(content == here[path] for path, content in pushed.items())
    assert story.hub.private["user/tiny"] is True


def test_a_stranger_loads_it_generates_and_runs_the_card_s_snippet(story):
    result = story.python.run(VISIT, plain=True)
    assert result.returncode == 0, result.stderr
    *snippet, report = result.stdout.strip("\n").split("\n")
    report = json.loads(report)
    ours = MDLMForMaskedDiffusion.from_pretrained(story.output).generate(steps=4, seed=0)
    assert report["sequences"] == ours.tolist()
    assert report["files"] == sorted(story.hub.files("user/tiny")) and report["library"] == "transformers"
    assert "".join(snippet).strip(), "the snippet printed no text"


def test_the_card_names_the_repository_and_no_folder_of_this_machine(story):
    card = story.hub.files("user/tiny")["README.md"].decode()
    assert re.findall(r"from_pretrained\((.*?)[,)]", card) == ['"user/tiny"'] * 2


def test_a_repository_without_a_namespace_is_the_users_own(story, inputs, tmp_path):
    arguments = mcd_arguments(inputs, tmp_path / "small", num_rounds=1, steps_per_round=1, push_to_hub=True)
    result = story.python.run(TRAIN, *arguments)
    assert result.returncode == 0, result.stderr
    card = story.hub.files("user/small")["README.md"].decode()
    assert re.findall(r"from_pretrained\((.*?)[,)]", card) == ['"user/small"'] * 2


@pytest.mark.parametrize("attempt", [0, 1], ids=["the server is broken", "large files are refused"])
def test_the_recommended_command_makes_the_same_repository(story, attempt):
    program, *words = retry_command(story.results[attempt])
    assert program == "hf" and words[:4] == ["upload", "user/tiny", str(story.output), "."]
    hf = f"import runpy; runpy.run_path({str(Path(sys.executable).with_name(program))!r}, run_name='__main__')"
    hub = story.hub
    pushed, commits, private = hub.files("user/tiny"), dict(hub.commits), dict(hub.private)
    hub.commits.clear(), hub.private.clear()  # as before the run
    try:
        result = story.python.run(hf, *words, plain=True)
        assert result.returncode == 0, result.stderr
        assert hub.files("user/tiny") == pushed
        assert hub.private == {"user/tiny": True}, "a private run must not become public by the retry"
    finally:
        hub.commits.update(commits), hub.private.update(private)


def test_nobody_listens_and_the_token_is_on_the_command_line(story, inputs, tmp_path):
    with HubServer(TOKEN) as hub:
        pass  # from here on its port is closed
    output, given = tmp_path / "run", "hf_given_secret"
    arguments = mcd_arguments(
        inputs, output, num_rounds=1, push_to_hub=True, hub_model_id="user/tiny", hub_token=given
    )
    elsewhere = f"from huggingface_hub import constants; constants.ENDPOINT = {hub.endpoint!r}\n"
    result = story.python.run(elsewhere + TRAIN, *arguments)
    assert result.returncode == 0, result.stderr
    assert "The push to 'user/tiny' failed" in result.stderr and "Traceback" not in result.stderr
    assert retry_command(result)[:5] == ["hf", "upload", "user/tiny", str(output), "."]
    assert load_file(output / "model.safetensors") and (output / "checkpoint-4" / "manifest.json").is_file()
    assert_absent(given, output, result)


def test_the_token_is_nowhere(story):
    assert_absent(TOKEN, story.output, *story.results)
    assert not [path for path, content in story.hub.files("user/tiny").items() if TOKEN.encode() in content]


def assert_absent(token: str, output: Path, *results: subprocess.CompletedProcess):
    for result in results:
        assert token not in result.stdout and token not in result.stderr
    assert [path for path, content in contents(output).items() if token.encode() in content] == []
