"""Files written completely or not at all; a folder that one process at a time writes to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import ROOT

from modeling_mcd.files import LOCK, in_use, lock_folder, new_folder, write_atomically, write_json


HOLD = """
import sys, time
from files import lock_folder
with lock_folder(sys.argv[1], "training"):
    print("held", flush=True)
    time.sleep(60)
"""
TRY = """
import sys
from files import lock_folder
with lock_folder(sys.argv[1], "training"):
    print("held")
"""


# The processes import `files` alone, which takes no time, instead of the package with torch and transformers.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "modeling_mcd")}


def hold(folder, code=HOLD) -> subprocess.Popen:
    """A process that holds the lock of a folder when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("held")
    return process


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_permissions(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "text", "a")
        write_json(tmp_path / "json", {})
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "json")] == [mode] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_no_nan_and_no_infinity(value, tmp_path):
    write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"a": [value]})
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "taken", "a")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_second_holder_is_refused_by_name(tmp_path):
    holder = hold(tmp_path)
    try:
        with pytest.raises(ValueError) as refusal, lock_folder(tmp_path, "evaluation"):
            pass
        line = str(refusal.value)
        assert f"is in use by process {holder.pid} on host {os.uname().nodename} (training since 2" in line
        assert line.endswith(f"wait for it, or stop it with `kill {holder.pid}`") and "left behind" not in line
        assert in_use(tmp_path) == line
    finally:
        holder.kill()
        holder.wait()
    with lock_folder(tmp_path, "evaluation"):
        assert json.loads((tmp_path / LOCK).read_text())["purpose"] == "evaluation"
    assert in_use(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_killed_holder_leaves_nothing_stale(tmp_path):
    holder = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists() and in_use(tmp_path) is None
    output = subprocess.check_output([sys.executable, "-c", TRY, tmp_path], env=ENVIRONMENT, text=True)
    assert output == "held\n"


def test_a_worker_that_outlives_a_holder_does_not_hold(tmp_path):
    """A data loader's worker lives on for some seconds after a SIGKILL of its parent."""
    fork = HOLD.replace("    print", "    import os\n    if os.fork() == 0: time.sleep(20); os._exit(0)\n    print")
    holder = hold(tmp_path, fork)
    child = psutil.Process(holder.pid).children()[0].pid
    assert in_use(tmp_path) is not None
    holder.kill()
    holder.wait()
    try:
        os.kill(child, 0)
        for _ in range(100):  # on a busy machine the worker may not yet have run at all
            if in_use(tmp_path) is None:
                break
            time.sleep(0.05)
        assert in_use(tmp_path) is None
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_orphan_is_named_as_one(tmp_path):
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {HOLD!r}, sys.argv[1]])"
    process = hold(tmp_path, launcher)
    orphan = json.loads((tmp_path / LOCK).read_text())["pid"]
    process.kill()
    process.wait()
    try:
        for _ in range(100):
            if "left behind" in in_use(tmp_path):
                break
            time.sleep(0.05)
        assert f"left behind by its launcher, process {process.pid}, which is gone" in in_use(tmp_path)
        assert f"`kill {orphan}`" in in_use(tmp_path)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_of_many_at_once_one_holds(tmp_path):
    """Each process adds one to a number under the lock, or is refused and tries again. No addition is lost, or counts twice."""
    code = """
import sys, time
from pathlib import Path
from files import lock_folder
folder, added = Path(sys.argv[1]), 0
while added < 25:
    try:
        with lock_folder(folder / "run", "adding"):
            number = int((folder / "number").read_text())
            time.sleep(0.0005)
            (folder / "number").write_text(str(number + 1))
            added += 1
    except ValueError:
        time.sleep(0.001)
"""
    (tmp_path / "number").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0] * 3
    assert int((tmp_path / "number").read_text()) == 75


@pytest.mark.parametrize("moment", ["mkdir", "is_dir"])
def test_a_folder_that_is_removed_while_it_is_made_is_made_again(moment, tmp_path, monkeypatch):
    """The holder before us removes it within our `mkdir`: between a parent and its child, or between "exists" and "is a folder"."""
    folder, removals = tmp_path / "a" / "b", []
    kept = getattr(os if moment == "mkdir" else Path, moment)

    def late(path, *arguments):
        if Path(path) == folder and folder.parent.exists() and len(removals) < 3:
            removals.append(path)
            shutil.rmtree(folder.parent)
        return kept(path, *arguments)

    if moment == "is_dir":
        folder.mkdir(parents=True)
    monkeypatch.setattr(os if moment == "mkdir" else Path, moment, late)
    with lock_folder(folder, "training"):
        assert (folder / LOCK).exists()
    assert removals


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError):
        with lock_folder(tmp_path / "a", "training"):
            pass
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "link", tmp_path / "link" / "b"):
        with pytest.raises(FileExistsError):
            with lock_folder(path, "training"):
                pass


def test_a_lock_makes_and_removes_only_its_own_folder(tmp_path):
    with lock_folder(tmp_path / "a" / "b", "training"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    with lock_folder(tmp_path / "a" / "b", "training"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
