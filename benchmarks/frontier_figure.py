"""The picture of README.md and docs/results.md: the page of `mcd-frontier` without seconds, which depend on what else a machine does.

python -m benchmarks.frontier_figure runs/frontier docs/images/frontier.svg
"""

import argparse
import io
from pathlib import Path

from matplotlib import rc_context

from evaluation.frontier import frontier_of
from evaluation.frontier_page import plot
from evaluation.results import load_report
from modeling_mcd.files import write_atomically


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Output folder of mcd-frontier.")
    parser.add_argument("picture", type=Path, help="The SVG that is written.")
    options = parser.parse_args(arguments)
    frontier = frontier_of(load_report(options.folder)["results"], options.folder)
    for point in frontier.points:
        point.seconds = None
    picture = io.StringIO()
    with rc_context({"svg.hashsalt": "frontier"}):  # the same figures give the same file
        plot(frontier).savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(options.picture, picture.getvalue())


if __name__ == "__main__":
    main()
