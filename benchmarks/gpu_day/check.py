"""Stage `check`: tests/test_gpu.py, one test at a time; each is written down as soon as it has ended."""

import time
from collections.abc import Callable

from benchmarks.gpu_day.stage import ROOT, Day, Goal, Piece, Stage


TESTS = ROOT / "tests" / "test_gpu.py"


class Recorder:
    """A plugin of pytest: leaves out what has passed before, tells what runs, and reports each outcome.

    Args:
        passed: names of the tests that are not run again.
        on_result: called with a test's name, its outcome and what it recorded.
    """

    def __init__(self, day: Day, passed: set[str], on_result: Callable[[str, dict], None]):
        self.day, self.passed, self.on_result, self.failed = day, passed, on_result, 0

    def pytest_collection_modifyitems(self, config, items):
        items[:] = [item for item in items if item.name not in self.passed]

    def pytest_runtest_logstart(self, nodeid, location):
        self.day.check_time()
        self.day.detail = nodeid.split("::")[-1]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed" and report.when == "setup":
            outcome = {"outcome": report.outcome, "seconds": report.duration, **dict(report.user_properties)}
            if report.skipped:
                outcome["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            if report.failed:
                self.failed += 1
                outcome["why"] = report.longreprtext[-600:]
            self.on_result(report.nodeid.split("::")[-1], outcome)
            self.day.say(f"{report.nodeid.split('::')[-1]}: {report.outcome} {outcome.get('why', '')[:300]}")


def stage(day: Day) -> Stage:
    def work() -> dict:
        import pytest

        def passed() -> dict:
            return day.read("check").get("tests", {})

        def on_result(name: str, outcome: dict):
            result.write_more(tests=passed() | {name: outcome})

        kept = {name for name, test in passed().items() if test["outcome"] == "passed"}
        recorder, start = Recorder(day, kept, on_result), time.monotonic()
        pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore"], plugins=[recorder])
        day.detail = ""
        outcomes = [test["outcome"] for test in passed().values()]
        counts = {name: outcomes.count(name) for name in ("passed", "skipped", "failed")}
        if recorder.failed or not outcomes:
            raise RuntimeError(f"{counts}: the file holds the reasons")
        return counts | {"pytest_seconds": time.monotonic() - start}

    def goals(figures: dict) -> list[Goal]:
        counts = figures.get("tests")
        return [Goal("tests that failed", 0, counts and counts["failed"], most=True)]

    result = Stage(day, "check", [Piece("tests", 5, work)], goals, "python -m benchmarks.gpu_day speed")
    return result
