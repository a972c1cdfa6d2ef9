"""W&B (offline) and Trackio, each with its own package and read back by it: what a run sends them of every round."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from test_rounds import RUN, arguments_for, points
from tiny_run import run_python, save_judge, write_inputs


ROUNDS = ((0, "teacher"), (2, "round-1"), (4, "round-2"))
TOKEN = "hf_never_to_be_seen"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    save_judge(folder / "judge")
    return folder


def track(inputs: Path, folder: Path, tracker: str, **changes):
    """A run that is told the Hub's token, and where no Hub is; it is a warning that the push fails."""
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,
        "TRACKIO_DIR": folder,
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    changes |= {"steps_per_round": 2, "evaluation_bound": 3, "report_to": tracker, "project": "tiny"}
    changes |= {"push_to_hub": True, "hub_model_id": "user/tiny", "hub_token": TOKEN}
    code = f"import os; os.environ |= { {name: str(value) for name, value in settings.items()} }; {RUN}"
    result = run_python(code, *arguments_for(inputs, folder / "run", **changes))
    assert result.returncode == 0 and "did not take" not in result.stderr, result.stderr
    return points(folder / "run")


def check_figures(found: dict[int, dict], rows: dict):
    """Figures and a sample arrive at the step that they are of."""
    for step, name in ROUNDS:
        for n in (2, 4):
            for figure in ("gen_ppl", "entropy", "bound"):
                assert found[step][f"eval/{figure}_{n}_steps"] == pytest.approx(rows[name, n][figure]), (step, figure)
        assert found[step]["eval/sample"] == rows[name, 4]["example"]


def check_table(table: list[dict], step: int, rows: dict):
    """One row for each of the report so far, with its figures and its text; nothing of a later round."""
    known = [name for at, name in ROUNDS if at <= step]
    assert [(row["model"], row["steps"]) for row in table] == [
        ("held-out text", None),
        *((name, n) for name in known for n in (2, 4)),
    ]
    for row in table[1:]:
        of_report = rows[row["model"], row["steps"]]
        assert all(row[name] == pytest.approx(of_report[name]) for name in ("gen_ppl", "entropy", "bound", "nfe"))
        assert (row["example"], row["locking"]) == (of_report["example"], "independent")


def check_no_token(folder: Path):
    for place, _, files in os.walk(folder):
        for file in files:
            assert TOKEN.encode() not in Path(place, file).read_bytes(), file


def wandb_records(path: Path) -> Iterator:
    """The records of W&B's file: a LevelDB log behind a head of 7 bytes. Blocks of 32 KiB; a record may be in pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, record, place = path.read_bytes(), b"", 7
    assert content.startswith(b":W&B")
    while place < len(content):
        left = 2**15 - place % 2**15
        if left < 7:  # too little for the head of a piece
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield Record.FromString(record)
            record = b""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["steps", "no"])
def test_wandb_offline_has_every_round_and_no_token(inputs, tmp_path, checkpoints):
    pytest.importorskip("wandb", reason="needs the extra tracking")
    rows = track(inputs, tmp_path, "wandb", save_strategy=checkpoints)
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for record_of in wandb_records(record):
        if record_of.HasField("history"):
            items = {".".join(item.nested_key): json.loads(item.value_json) for item in record_of.history.item}
            found.setdefault(items["train/global_step"], {}).update(items)
    check_figures(found, rows)
    for step, _ in ROUNDS:
        content = json.loads((record.parent / "files" / found[step]["eval/table.path"]).read_text())
        check_table([dict(zip(content["columns"], row, strict=True)) for row in content["data"]], step, rows)
        assert Image.open(record.parent / "files" / found[step]["eval/plot.path"]).width > 500
    check_no_token(tmp_path)


READ = """
import os
os.environ["TRACKIO_DIR"] = "{folder}"
import json
from trackio.sqlite_storage import SQLiteStorage
runs = SQLiteStorage.get_runs("tiny")
print(json.dumps([SQLiteStorage.get_logs("tiny", run) for run in runs], default=str))
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["steps", "no"])
def test_trackio_has_every_round_in_one_run_and_no_token(inputs, tmp_path, checkpoints):
    pytest.importorskip("trackio", reason="needs the extra tracking")
    rows = track(inputs, tmp_path, "trackio", save_strategy=checkpoints)
    read = run_python(READ.format(folder=tmp_path), plain=True)
    assert read.returncode == 0, read.stderr
    (logs,) = json.loads(read.stdout.splitlines()[-1])
    found = {}
    for log in logs:
        found.setdefault(log["train/global_step"], {}).update(log)
    check_figures(found, rows)
    for step, _ in ROUNDS:
        check_table(found[step]["eval/table"]["_value"], step, rows)
        assert Image.open(tmp_path / "media" / found[step]["eval/plot"]["file_path"]).width > 500
    check_no_token(tmp_path)
