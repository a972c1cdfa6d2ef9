"""The pages as a site: complete, and built strictly where mkdocs is installed."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys

import pytest
from tiny_run import ROOT


PATTERNS = runpy.run_path(str(ROOT / "docs" / "site" / "stage.py"))["PATTERNS"]
PAGES = [str(page.relative_to(ROOT)) for pattern in PATTERNS for page in ROOT.glob(pattern)]
API = re.findall(
    r"^::: ([\w.]+)$", "".join(p.read_text() for p in (ROOT / "docs" / "site" / "api").glob("*.md")), re.M
)


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^\s*- (\S+\.md)$", (ROOT / "docs" / "site" / "mkdocs.yml").read_text(), re.MULTILINE)
    api = {f"api/{page.name}" for page in (ROOT / "docs" / "site" / "api").glob("*.md")}
    assert sorted(menu) == sorted({*PAGES, *api})
    assert {"README.md", "docs/generation.md", "recipes/tiny/README.md", "examples/README.md"} <= set(PAGES)


@pytest.mark.parametrize("name", API)
def test_what_the_api_pages_name_exists_and_says_what_it_is(name):
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
    assert thing.__doc__


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="mkdocs is not installed")
def test_the_site_is_built_strictly(tmp_path):
    shutil.copytree(ROOT / "docs" / "site", tmp_path / "docs" / "site")
    subprocess.run([sys.executable, ROOT / "docs" / "site" / "stage.py", tmp_path / "build" / "pages"], check=True)
    for name in ("modeling_mcd", "trainers", "evaluation"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tmp_path / "docs" / "site" / "mkdocs.yml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "build" / "site" / "api" / "generation.html").read_text()
    assert "num_return_sequences" in page and "first_hitting" in page
    html = "".join(path.read_text() for path in (tmp_path / "build" / "site").rglob("*.html"))
    assert not re.findall(r'<(?:script|link)[^>]*(?:src|href)="https?://(?!127)[^"]*\\.(?:js|css)', html)
