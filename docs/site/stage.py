"""Lays out the pages of the repository for mkdocs, where they are and as they are, with every file that they link to.

python docs/site/stage.py build/pages
"""

import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"\]\(([^)\s#]+)")
PATTERNS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "recipes/*/README.md", "examples/README.md")


def stage(out: Path):
    """Replaces the folder `out`."""
    shutil.rmtree(out, ignore_errors=True)
    pages = [page for pattern in PATTERNS for page in sorted(ROOT.glob(pattern))]
    files = set(pages)
    for page in pages:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if not link.startswith("http") and target.is_file():
                files.add(target)
    for file in files:
        place = out / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    shutil.copytree(Path(__file__).parent / "api", out / "api")


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
