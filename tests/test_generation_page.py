"""The examples of docs/generation.md run as they stand, in one session."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def test_the_examples_of_the_generation_page_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 10
    session = {}
    for block in blocks:
        exec(compile(block.replace("/tmp/", f"{tmp_path}/"), "docs/generation.md", "exec"), session)
    printed = capsys.readouterr().out
    assert "it was a dark and stormy night" in printed and "True" in printed
    assert (tmp_path / "replay.html").is_file()
