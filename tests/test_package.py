"""What a package says of itself in several places is the same in all of them, and true."""

import re
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from tiny_run import ROOT

import modeling_mcd


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def oldest_python() -> str:
    return re.search(r'python_requires=">=([\d.]+)"', read("setup.py"))[1]


def test_the_version_is_the_same_everywhere():
    version = modeling_mcd.__version__
    assert re.search(r"^## ([\d.]+)", read("CHANGELOG.md"), re.MULTILINE)[1] == version
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version


def test_the_citation_has_what_its_format_demands():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    assert re.search(rf'license="{citation["license"]}"', read("setup.py"))


def test_type_hints_are_shipped():
    code = re.findall(r"include=\[(.*?)\]", read("setup.py"))[0]
    packages = [name for name in re.findall(r'"(\w+)\*"', code) if list((ROOT / name).glob("*.py"))]
    assert {"modeling_mcd", "evaluation", "trainers"} <= set(packages)
    assert all((ROOT / name / "py.typed").is_file() for name in packages) and '"py.typed"' in read("setup.py")


def test_every_pin_installs_on_the_oldest_python():
    oldest = oldest_python()
    for line in read("constraints.txt").splitlines():
        try:
            found = metadata.metadata(Requirement(line).name).get("Requires-Python")
        except metadata.PackageNotFoundError:
            continue  # of another system
        assert found is None or SpecifierSet(found).contains(f"{oldest}.99"), f"{line} needs Python {found}"


def test_ci_runs_the_pythons_that_are_supported():
    jobs = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]
    pythons = jobs["fast"]["strategy"]["matrix"]["python"]
    assert pythons[0] == oldest_python() and len(pythons) == 3
    assert "({}, {})".format(*oldest_python().split(".")) in read(".ci/run")
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for step in steps:
        assert set(step.removeprefix("make ").replace(" PYTHON=python", "").split()) <= targets, step


def test_pre_commit_takes_the_pinned_ruff_and_every_folder():
    (pin,) = re.findall(r"^ruff==.*$", read("constraints.txt"), re.MULTILINE)
    sources = re.search(r"^SOURCES := (.*)$", read("Makefile"), re.MULTILINE)[1].split()
    for hook in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]:
        assert hook["additional_dependencies"] == [pin]
        for name in sources:
            file = name if Path(name).suffix else f"{name}/x.py"
            assert re.search(hook["files"], file), file
