"""The kit for a borrowed GPU: pieces are done once, whatever cuts the command off; what comes home fits; a rehearsal of all."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
from tiny_run import ROOT

from benchmarks.gpu_day import bring, command
from benchmarks.gpu_day.stage import Day, Goal, OutOfTimeError, Piece, Stage


@pytest.fixture
def day(tmp_path):
    options = command.parser().parse_args(["check", "--scale", "cpu", "--results", str(tmp_path / "results")])
    options.runs, options.words = str(tmp_path / "runs"), ["check"]
    return Day(options)


def stage_of(day: Day, *pieces: Piece, goals=lambda figures: []) -> Stage:
    return Stage(day, "check", pieces, goals, "nothing")


def test_a_piece_is_done_once_and_a_failed_one_again(day):
    calls, broken = [], [True]

    def second():
        if broken:
            raise ValueError("no\nmemory")
        return {"seconds_a_step": 2.0}

    pieces = Piece("a", 1, lambda: calls.append("a") or {"x": 1.0}), Piece("b", 1, second), Piece("c", 1, dict)
    assert not stage_of(day, *pieces).run()
    content = day.read("check")
    assert content["pieces"]["b"]["failed"] == "ValueError: no memory" and content["next"] == "the same command: b"
    assert content["pieces"]["c"]["figures"] == {} and "rehearsal" in content["scale"]
    broken.clear()
    assert stage_of(day, *pieces).run() and calls == ["a"]
    assert day.read("check")["next"] == "nothing" and day.read("check")["pieces"]["b"]["figures"] == {
        "seconds_a_step": 2.0
    }


def test_time_that_is_over_leaves_the_rest_for_the_next_command(day):
    def late():
        raise OutOfTimeError

    assert not stage_of(day, Piece("a", 1, lambda: {"x": 1}), Piece("b", 1, late), Piece("c", 1, dict)).run()
    assert set(day.read("check")["pieces"]) == {"a"} and day.read("check")["next"] == "the same command: b, c"


def test_a_goal_says_by_how_much_it_is_missed():
    assert Goal("speed", 5, 4.0).verdict() | {"goal": ""} == {
        "goal": "",
        "aim": 5,
        "value": 4.0,
        "reached": False,
        "missed_by": pytest.approx(-0.2),
    }
    assert (
        Goal("memory", 0.6, 0.5, most=True).verdict()["reached"]
        and not Goal("memory", 0.6, 0.9, most=True).verdict()["reached"]
    )
    assert Goal("speed", 5, None).verdict()["reached"] is None


def test_a_process_is_stopped_when_time_is_over_and_says_why_it_failed(day, tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text(
        "import sys, time\nprint('working', flush=True)\ntime.sleep(60 if len(sys.argv) == 1 else 0)\nsys.exit('no disk')"
    )
    with pytest.raises(RuntimeError, match="made ended with status 1: no disk"):
        day.run(script, "fail", name="made")
    day.deadline, start = time.monotonic() + 1, time.monotonic()
    with pytest.raises(OutOfTimeError):
        day.run(script, name="made")
    assert time.monotonic() - start < 10


def test_what_comes_home_is_cut_to_the_limits_and_put_together_again(day, tmp_path):
    folder = day.runs / "shipped" / "teacher"
    (folder / "deep").mkdir(parents=True)
    content = {"model.safetensors": os.urandom(250_000), "config.json": b"{}", "deep/tokenizer.json": b"[]"}
    for name, text in content.items():
        (folder / name).write_bytes(text)
    stage_of(day, Piece("a", 1, lambda: {"x": 1})).run()
    day.options = Namespace(**vars(day.options) | {"file_mb": 0.1, "files": 3, "total_mb": 1.0})
    first, second = tmp_path / "first", tmp_path / "second"
    assert bring.bring(day, first) == ["teacher.tar.02"]
    assert len(list(first.iterdir())) == 3 and all(f.stat().st_size <= 100_000 for f in first.iterdir())
    with pytest.raises(ValueError, match="teacher: parts"):
        (first / "teacher.tar.00").rename(tmp_path / "kept")
        bring.unpack(first, tmp_path / "home")
    (tmp_path / "kept").rename(first / "teacher.tar.00")
    assert bring.bring(day, second) == []
    (second / "results.tar.xz").rename(first / "results.tar.xz")
    (second / "teacher.tar.02").rename(first / "teacher.tar.02")
    assert bring.unpack(first, tmp_path / "home") == ["rehearsal_gpu_check.json", "teacher"]
    assert all((tmp_path / "home" / "teacher" / name).read_bytes() == text for name, text in content.items())


def test_the_plan_is_printed_and_nothing_done(tmp_path, capsys):
    command.main(["--dry-run", "--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")])
    text = capsys.readouterr().out
    assert all(f"{stage}: " in text for stage in command.STAGES) and "min  MCD, seed 1" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rehearsal_of_all_stages_that_is_killed_goes_on(tmp_path):
    """Everything at the scale of a CPU: killed in the middle of a training, then from where it was to the end."""
    words = ["-m", "benchmarks.gpu_day", "all", "--scale", "cpu", "--minutes", "40"]
    words += [
        "--results",
        str(tmp_path / "results"),
        "--runs",
        str(tmp_path / "runs"),
        "--bring",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *words], env=environment, cwd=ROOT, start_new_session=True)
    while process.poll() is None and not list((tmp_path / "runs").glob("teacher/checkpoint-*/manifest.json")):
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = json.loads((tmp_path / "results" / "rehearsal_gpu_speed.json").read_text())["pieces"]
    result = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    for stage in command.STAGES:
        content = json.loads((tmp_path / "results" / f"rehearsal_gpu_{stage}.json").read_text())
        assert all("figures" in piece for piece in content["pieces"].values()), stage
        assert "same command" not in content["next"]
        if stage == "speed":
            assert content["pieces"] == before, "nothing was measured twice"
    files = list((tmp_path / "out").iterdir())
    assert 0 < len(files) <= 8 and sum(file.stat().st_size for file in files) < 64e6
