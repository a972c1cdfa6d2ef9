"""Every page: its examples run, its commands run, its links lead somewhere, and its tables equal the code.

Commands run in this process, in a folder that looks like a checkout but holds small networks and short texts, and with the
few settings of `SMALL` added that keep a run to one step. A block that cannot run here says so on its page, in a comment
above it: `<!-- not run: needs ... -->`.
"""

import ast
import copy
import dataclasses
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from tiny_run import ROOT
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

import trainers
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.character_tokenizer import character_tokenizer


PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "examples" / "README.md",
        *(ROOT / "recipes").glob("*/README.md"),
        *(ROOT / "docs").glob("*.md"),
    )
)
TRAINING = (
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 2 --warmup_steps 0 --logging_steps 1 --save_steps 1"
)
TRAINING += " --max_validation_blocks 2 --disable_tqdm true"
SMALL = {
    "trainers.run_mcd": f"{TRAINING} --steps_per_round 1 --evaluation_samples 1 --evaluation_steps 2",
    "trainers.run_mdlm": f"{TRAINING} --max_steps 1 --eval_steps 1 --num_hidden_layers 1",
    "trainers.run_judge": f"{TRAINING} --max_steps 1 --num_layers 1",
    "evaluation.search_plan": "--steps 2 --blocks 4 --grid 4",
    "evaluation.run_eval": "--samples 2 --seeds 1 --batch_size 2 --steps 2",
    "evaluation.run_eval --bound": "--samples 2 --seeds 1 --batch_size 2 --steps 2 --bound 2",
    "evaluation.run_frontier": "--samples 2 --seeds 2 --batch_size 2 --steps 2 --bound 2",
    "evaluation.run_eval --perplexity": "--windows 2 --draws 2",
}


class Block(NamedTuple):
    language: str
    code: str
    needs: str | None  # why it is not run


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^(?:<!-- not run: needs (.*?) -->\n)?```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language, code, needs or None) for needs, language, code in found]


def commands_of(block: Block) -> list[str]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


RUNNABLE = [
    page for page in PAGES if any(b.needs is None and b.language in ("python", "bash") for b in blocks_of(page))
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The recipes as they ship, with teacher and judge of two narrow layers and with the first 20 kB of each text."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(
        ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "__pycache__")
    )
    tiny = folder / "recipes" / "tiny"
    for text in (ROOT / "recipes" / "tiny" / "text").rglob("*.txt"):
        (tiny / text.relative_to(ROOT / "recipes" / "tiny")).write_bytes(text.read_bytes()[:20_000])
    for name in ("tiny_sums", "bible"):  # fast enough to be taken as they are
        weights = f"recipes/{name}/teacher/model.safetensors"
        shutil.copy(ROOT / weights, folder / weights)
    set_seed(0)
    shapes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "conditioning_size": 8}
    config = MDLMConfig(vocab_size=48, max_position_embeddings=256, bos_token_id=46, eos_token_id=46, **shapes)
    teacher = MDLMForMaskedDiffusion(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    judge = GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=46, eos_token_id=46)
    )
    tokenizer = character_tokenizer(model_max_length=256)
    coupled = copy.deepcopy(teacher)
    coupled.add_coupling({"states": 256, "levels": 8})  # as tiny_coupling.yaml says
    for model, name in ((teacher, "teacher"), (coupled, "coupled"), (judge, "judge")):
        model.save_pretrained(tiny / name)
        tokenizer.save_pretrained(tiny / name)
    return folder


@pytest.fixture
def checkout(library, tmp_path, monkeypatch) -> Path:
    """The working folder of one page."""
    (tmp_path / "recipes").symlink_to(library / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE)
def test_examples_run(page, checkout, monkeypatch):
    """The commands of this library, which take seconds each, are left to a slow test."""
    run_page(page, checkout, monkeypatch, commands=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if any(b.language == "bash" for b in blocks_of(page))])
def test_commands_run(page, checkout, monkeypatch):
    run_page(page, checkout, monkeypatch, commands=True)


def run_page(page: str, checkout: Path, monkeypatch, commands: bool):
    """Every block in the order of the page, Python in one session."""
    session = {"__name__": "page"}
    for block in blocks_of(page):
        if block.needs is None and block.language == "python":
            exec(compile(block.code.replace("/tmp/", f"{checkout}/"), page, "exec"), session)
        elif block.needs is None and block.language == "bash":
            for command in commands_of(block):
                if commands or entry_point(shlex.split(command, comments=True))[0] is None:
                    run(command, monkeypatch)


def run(command: str, monkeypatch):
    """One of our commands in this process with the settings of `SMALL`; any other in a shell."""
    module, arguments = entry_point(shlex.split(command, comments=True))
    if module == "make":
        subprocess.run(["make", "-n", "-C", str(ROOT), *arguments], check=True, capture_output=True)
    elif module is None:
        subprocess.run(["bash", "-ec", command], check=True)
    else:
        jobs = [f"{module} {flag}" for flag in ("--perplexity", "--bound") if flag in arguments]
        small = next((SMALL[job] for job in [*jobs, module] if job in SMALL), "")
        monkeypatch.setattr(sys, "argv", [module, *arguments, *small.split()])
        main = getattr(importlib.import_module(module), "main", None)
        try:
            main() if main else runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{command}: {end.code}"


def entry_point(words: list[str]) -> tuple[str | None, list[str]]:
    """The module of ours that a command starts, and its arguments; ("make", targets); or None."""
    words = [word for i, word in enumerate(words) if not (re.fullmatch(r"[A-Z_]+=.*", word) and i == 0)]
    if words[0] == "make":
        return "make", words[1:]
    if words[0] in console_scripts():
        return console_scripts()[words[0]].split(":")[0], words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[1:]
        if words[1] == "--config_file":
            assert (ROOT / words[2]).is_file(), words[2]
            words = words[:1] + words[3:]
    elif words[0] != "python":
        return None, []
    if words[1] == "-m":
        module = ROOT / words[2].replace(".", "/")
        return (words[2], words[3:]) if module.with_suffix(".py").is_file() or module.is_dir() else (None, [])
    if words[1].endswith(".py") and (ROOT / words[1]).is_file():
        return words[1].removesuffix(".py").replace("/", "."), words[2:]
    return None, []


def console_scripts() -> dict[str, str]:
    return dict(re.findall(r'"(mcd-\w+)=([\w.]+:\w+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))


def test_what_is_not_run_says_why():
    reasons = [(page, block.needs) for page in PAGES for block in blocks_of(page) if block.needs]
    print("\n".join(f"{page}: needs {needs}" for page, needs in reasons))
    assert len(reasons) == NOT_RUN, reasons


NOT_RUN = 37


def test_console_scripts_start_functions_that_exist():
    scripts = console_scripts()
    names = ("distill", "pretrain", "judge", "evaluate", "frontier", "plan", "generate", "chat", "convert")
    assert {f"mcd-{name}" for name in names} == set(scripts)
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def options_of(module: str, capsys, *recipe: str) -> set[str]:
    """The options that a command lists in its longest help; those of `mcd-evaluate --perplexity` have a page of their own."""
    found = set()
    for words in (["--help-all"], ["--help"], ["--perplexity", "text", "--help"]):
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main([*recipe, *words])
        text = capsys.readouterr().out
        if end.value.code == 0:
            found |= set(re.findall(r"--[\w-]+", text))
    assert found, f"{module} has no help"
    return found


def test_every_option_on_a_page_is_one_of_its_command(capsys):
    modules = {target.split(":")[0] for target in console_scripts().values()}
    known, seen = {module: options_of(module, capsys) for module in modules}, 0
    for page in PAGES:
        for command in (c for block in blocks_of(page) if block.language == "bash" for c in commands_of(block)):
            module, arguments = entry_point(shlex.split(command, comments=True))
            if module in known:
                unknown = {word.split("=")[0] for word in arguments if word.startswith("--")} - known[module]
                if unknown and arguments[0].endswith(".yaml"):  # of another method
                    unknown -= options_of(module, capsys, arguments[0])
                assert not unknown, f"{page}: {command}: {unknown}"
                seen += 1
            assert all((ROOT / word).is_file() for word in arguments if re.fullmatch(r"recipes/\w+\.yaml", word)), (
                command
            )
    assert seen > 15


INDEX = "docs/README.md"  # lists every page; the README links to it


def test_links_lead_somewhere():
    linked = set()
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in anchors(target), f"{page}: {link}; there are {sorted(anchors(target))}"
            if page in ("README.md", INDEX):
                linked.add(str(target.resolve().relative_to(ROOT)))
    assert INDEX in linked and {page for page in PAGES if page != "README.md"} <= linked


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- docs/papers.md


def paper_tables() -> dict[str, dict[str, str]]:
    """Name of the arguments' class -> option -> our value, as the page writes them."""
    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    sections = re.split(r"^## `(\w+)`$", page, flags=re.MULTILINE)[1:]
    return {
        name: dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }


def value_of(text: str):
    return float(Fraction(text)) if re.fullmatch(r"\d+/\d+", text) else ast_or_yaml(text)


def ast_or_yaml(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return yaml.safe_load(text)


@pytest.mark.parametrize("name", [name for name in trainers.__all__ if name.endswith("Arguments")])
def test_hyper_parameters_are_those_of_the_code(name):
    arguments, table = getattr(trainers, name), paper_tables()[name]
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(arguments)
    }
    assert {option: value_of(text) for option, text in table.items()} == {option: defaults[option] for option in table}
    general = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(defaults) - general <= set(table), "an option without its row"


# --- docs/tests.md


def test_every_file_of_tests_is_in_the_list():
    listed = re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "tests.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))


# --- docs/choosing.md


def test_advice_quotes_figures_that_stand_on_the_pages_it_names():
    """Each figure of a row is on a page that the row links to, as it is written there."""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    seen = 0
    for row in re.findall(r"^\| (?!you have|---)(.*) \|$", page, re.MULTILINE):
        cells = row.split(" | ")
        linked = re.findall(r"\]\((\w+\.md)", cells[-1])
        sources = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in linked)
        for figure in re.findall(r"\d+\.\d+", cells[2]):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d])", sources), f"{figure}: {cells[0]}"
            seen += 1
    assert seen > 15
