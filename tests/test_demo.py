"""The demo: what it shows and refuses (without gradio), what is to be had over HTTP, and what a browser shows."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import closing

import pytest
import torch
import yaml
from tiny_run import ROOT, save_judge, write_inputs
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from demo.studio import BLANK, STEPPED, Settings, Writer, Writing, compare, load_judge_of, trouble, write


@pytest.fixture
def writers(build, tokenizer) -> list[Writer]:
    """Two networks with one tokenizer, and no more than 32 tokens of context."""
    ids = {"mask_token_id": tokenizer.mask_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    teacher, student = (build(**ids) for _ in range(2))
    with torch.no_grad():
        student.lm_head.bias.add_(0.3)
        student.lm_head.weight.mul_(0.5)
    return [Writer("teacher", teacher, tokenizer), Writer("student", student, tokenizer)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher with its tokenizer, and a judge."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    save_judge(folder / "judge")
    return folder


def shown(page: str) -> str:
    return re.sub(r"<[^>]*>", "", page)


def test_every_step_is_kept_and_is_what_generate_writes(writers):
    settings = Settings("hello ", steps=4, length=20, seed=7)
    *_, writing = write(writers[0], settings)
    model, tokenizer = writers[0].model, writers[0].tokenizer
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("hello ", add_special_tokens=False)["input_ids"]]])
    output = model.generate(ids, steps=4, length=20, seed=7, return_dict_in_generate=True)
    assert writing.frames[-1] == output.sequences[0].tolist() and writing.nfe == output.nfe.item()
    masks = [frame.count(tokenizer.mask_token_id) for frame in writing.frames]
    assert len(masks) == 5 and masks[0] == 13 and masks == sorted(masks, reverse=True) and masks[-1] == 0
    assert shown(writing.html(0)).count(BLANK) == 13 and BLANK not in writing.html()
    assert writing.html(99) == writing.html() and writing.html(-3) == writing.html(0)
    assert "4 forwards" in writing.facts() and writing.seconds > 0


def test_a_colour_is_the_step_that_wrote_the_token(writers):
    *_, writing = write(writers[0], Settings("he___", steps=3))
    page = writing.html()
    for i, text in enumerate(writing.tokenizer.convert_ids_to_tokens(writing.frames[-1])):
        found = [frame[i] for frame in writing.frames]
        step = next(k for k, token in enumerate(found) if token == found[-1])
        assert writing.given[i] == (step == 0), text
    assert page.count('class="given"') == 3 and page.count('title="step') == 3
    newest = re.findall(r'class="new" title="step (\d)"', page)
    assert newest and set(newest) == {str(len(writing.frames) - 1)}


def test_both_start_from_the_same_noise(writers):
    *_, (left, right) = compare([writers[0], writers[0]], Settings(steps=3, length=16, seed=5))
    assert left.frames == right.frames
    *_, (left, right) = compare(writers, Settings(steps=3, length=16, seed=5))
    mask = writers[0].tokenizer.mask_token_id
    hidden = [[token == mask for token in frame] for frame in left.frames]
    assert hidden == [[token == mask for token in frame] for frame in right.frames], "one plan of reveals"
    assert left.frames != right.frames


def test_what_is_chosen_wins_over_the_models_own(writers):
    settings = Settings(steps=3, length=16, seed=5)
    *_, before = write(writers[0], settings)
    writers[0].model.generation_config.locking = "spread"
    *_, after = write(writers[0], settings)
    assert before.frames == after.frames
    *_, spread = write(writers[0], Settings(steps=3, length=16, seed=5, locking="spread"))
    assert spread.frames != after.frames


def test_what_a_visitor_writes_is_never_markup():
    words = models.WordLevel({"<b>&": 0, "[MASK]": 1}, unk_token="[MASK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), mask_token="[MASK]")
    for given in (True, False):
        page = Writing("x", tokenizer, frames=[[1], [0]], given=[given]).html()
        assert "&lt;b&gt;&amp;" in page and "<b>" not in page
    assert trouble(ValueError("<script>\nx")) == '<div class="trouble">&lt;script&gt; x</div>'
    assert "/etc" not in trouble(RuntimeError("/etc/secret")) and "/etc" not in trouble(
        OSError(2, "no", "/etc/secret")
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "x" * 401}, "has 401 characters, but at most 400"),
        ({"prompt": None}, "the prompt must be text"),
        ({"steps": 0}, "steps must be an integer from 1 to 128"),
        ({"steps": 10**9}, "steps must be an integer from 1 to 128"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"temperature": float("nan")}, "temperature must be a number from 0.0 to 2.0"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"length": 1e9}, "length must be an integer from 8 to 256"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"sampler": "__class__"}, "sampler must be one of ancestral"),
        ({"locking": ["spread"]}, "locking must be one of independent"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_what_a_model_refuses_is_an_error_and_nothing_hangs(writers):
    for settings, message in (
        (Settings("x" * 40), r"the prompt takes 41 tokens of teacher, which must be fewer than 32"),
        (Settings("___" * 20), r"the prompt takes 61 tokens of teacher"),
        (Settings(sampler="confidence", locking="spread"), "locking .* is not used by the sampler 'confidence'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(compare(writers, settings))


def test_a_visitor_who_leaves_stops_the_writing(writers):
    seen, others = [], threading.enumerate()
    model = writers[0].model
    hook = model.model.register_forward_hook(lambda *_: seen.append(None))
    writing = write(writers[0], Settings(steps=20, length=32))
    next(writing)
    writing.close()
    for thread in set(threading.enumerate()).difference(others):
        if type(thread) is threading.Thread:  # not the one of a progress bar
            thread.join(10)
            assert not thread.is_alive()
    hook.remove()
    assert len(seen) < 20


def test_every_sampler_of_the_list_writes(writers):
    for sampler in STEPPED:
        *_, writing = write(writers[0], Settings(sampler=sampler, steps=3, length=12))
        assert writing.nfe <= 4, sampler


def test_the_judge_gives_its_figure_with_the_entropy(writers, folder):
    *_, writing = write(writers[0], Settings(steps=2, length=20), load_judge_of(str(folder / "judge")))
    assert re.search(r"Gen-PPL \d+\.\d \(trigram entropy \d\.\d\d\)", writing.facts())


def test_the_space_asks_for_what_the_library_needs():
    front = yaml.safe_load((ROOT / "demo" / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert front["sdk"] == "gradio" and (ROOT / "demo" / front["app_file"]).is_file()
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    needs = re.findall(r'"(.+?)"', re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1])
    assert sorted((ROOT / "demo" / "requirements.txt").read_text().split()) == sorted(needs)
    assert front["python_version"] in setup and len(front["short_description"]) <= 60


# --- With gradio: over HTTP, and in a browser

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def address(folder):
    """The page, served on this machine with small networks."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    from demo import app

    writers = [app.load_writer(name, str(folder / "teacher")) for name in ("teacher", "student")]
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = app.build(writers, app.load_judge_of(str(folder / "judge")))
    app.serve(page, port, wait=False, host="127.0.0.1")
    yield f"http://127.0.0.1:{port}"
    page.close()


def fetch(url: str, data: dict | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, None if data is None else json.dumps(data).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def ask(address: str, **changes) -> list:
    """What `/write` answers last: both canvases and facts, the slider, and the trouble."""
    values = {"left": "teacher", "right": "student", "prompt": "hello ", "steps": 3, "sampler": "ancestral"}
    values |= {"locking": "independent", "temperature": 1.0, "length": 20, "seed": 1} | changes
    status, answer = fetch(f"{address}/gradio_api/call/write", {"data": list(values.values())})
    assert status == 200, answer
    _, stream = fetch(f"{address}/gradio_api/call/write/{json.loads(answer)['event_id']}")
    *_, (event, data) = re.findall(r"event: (\w+)\ndata: (.*)", stream)
    return [event, json.loads(data)]


@needs_gradio
def test_the_endpoint_writes_and_refuses(address):
    event, data = ask(address)
    pages = [x for x in data if isinstance(x, str) and 'class="canvas"' in x]
    assert event == "complete" and len(pages) == 2
    assert pages[0] == pages[1] and "hello " in shown(pages[0]) and BLANK not in pages[0]
    assert any("3 forwards" in str(x) and "Gen-PPL" in str(x) for x in data)
    for change, message in (
        ({"prompt": "x" * 300}, "the prompt takes 301 tokens of teacher"),
        ({"sampler": "confidence", "locking": "spread"}, "is not used by the sampler"),
    ):
        _, data = ask(address, **change)
        assert any(message in str(x) for x in data), data
    for change in (
        {"left": "/etc/passwd"},
        {"steps": 10**6},
        {"temperature": -1},
        {"prompt": {"path": "/etc/passwd"}},
    ):
        _, data = ask(address, **change)
        assert "root:" not in str(data) and not any('title="step' in str(x) for x in data or [])


@needs_gradio
@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/proc/self/environ",
        str(ROOT / "setup.py"),
        str(ROOT / "demo" / "app.py"),
        "setup.py",
        "demo/app.py",
        "../setup.py",
        "..%2f..%2fetc%2fpasswd",
    ],
)
def test_no_file_of_this_machine_is_to_be_had(address, path):
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/"):
        status, answer = fetch(address + route + path)
        assert status in (400, 401, 403, 404, 405), (route, status)
        said = answer.replace(path, "")  # it may repeat what it was asked for
        assert not any(secret in said for secret in ("root:", "PATH=", "find_namespace_packages", str(ROOT)))


@needs_gradio
def test_nothing_is_asked_from_elsewhere(address):
    status, page = fetch(address)
    assert status == 200 and str(ROOT) not in page
    hosts = set(re.findall(r'(?:src|href)="https?://([^/"]+)', page))
    assert hosts <= {"cdnjs.cloudflare.com"}, hosts  # gradio's own resizer of frames, which a lone page does not need
    _, info = fetch(f"{address}/gradio_api/info")
    assert list(json.loads(info)["named_endpoints"]) == ["/write"]


@needs_gradio
@pytest.mark.parametrize(("kind", "usual"), [("absorbing", "spread"), ("uniform", "independent")])
def test_the_page_begins_with_a_locking_that_every_model_takes(writers, build, tokenizer, kind, usual):
    from demo import app

    page = app.build([*writers, Writer("another", build(diffusion_kind=kind), tokenizer)], None)
    components = page.get_config_file()["components"]
    (locking,) = [part["props"]["value"] for part in components if part["props"].get("label") == "Locking"]
    assert locking == usual


@pytest.mark.slow
@needs_gradio
def test_a_browser_shows_both_texts_and_their_history(address, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(address)
        page.get_by_role("button", name="Write").click()
        page.wait_for_function(
            "document.querySelectorAll('.facts').length == 2 && [...document.querySelectorAll('.facts')].every(x => x.innerText.includes('forwards'))"
        )
        final = page.locator(".canvas").first.inner_text()
        assert BLANK not in final and "it was a" in final
        slider = page.get_by_label("History").last
        slider.focus()
        slider.press("Home")
        page.wait_for_function(f"document.querySelector('.canvas').innerText.includes('{BLANK}')")
        assert page.locator(".canvas .given").count() > 0
        locking = page.get_by_label("Locking")
        assert locking.input_value() == "spread"
        page.get_by_label("Sampler").click()
        page.get_by_role("option", name="confidence").click()
        page.wait_for_function("document.querySelector('[aria-label=Locking]').value == 'independent'")
        assert locking.is_disabled(), "a sampler that chooses by itself what to reveal"
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
@needs_gradio
def test_the_space_is_complete(tmp_path):
    subprocess.run(["make", "-C", str(ROOT), "space", f"SPACE={tmp_path}"], check=True, capture_output=True)
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert (tmp_path / "recipes" / "tiny" / "teacher" / "model.safetensors").is_file()
    code = (
        "import sys; sys.path[:0] = ['.']; import app; app.serve = lambda page, port: print(app.ROOT, len(page.fns));"
        "app.main([])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1"},
    )
    assert result.stdout.startswith(str(tmp_path.resolve())) and front["app_file"] == "app.py", result.stderr
