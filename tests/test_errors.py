"""What a user reads when something goes wrong, whoever raised it."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_run import run_python

from evaluation import eval_results, run_eval, run_frontier, search_plan
from modeling_mcd import chat, convert_checkpoints, generate_text
from modeling_mcd.command_line import line_of, one_line_errors


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full here")
@pytest.mark.parametrize("size", [10, 10**6], ids=["while closing", "while writing"])
def test_a_disk_that_is_full_inside_torch_save(size):
    """torch reports a full disk without an errno, and in different words each time."""
    with pytest.raises(RuntimeError) as error:
        torch.save({"weights": torch.zeros(size)}, "/dev/full")
    assert line_of(error.value).startswith("no space left on the disk while writing a file (")


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.bin"), "no space left on the disk while writing a.bin: "),
        (OSError(errno.ENOSPC, "No space left on device", "from", None, "to"), "while writing to: free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), "/data/a: Permission denied"),
        (ConnectionError("the Hub does\n not answer"), "the Hub does not answer"),
        (ConnectionError(), "ConnectionError"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
    ],
)
def test_what_is_said_is_one_line(error, says):
    assert says in line_of(error) and "\n" not in line_of(error)


def test_a_cut_file_of_weights_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(SafetensorError) as error:
        load_file(tmp_path / "a.safetensors")
    assert line_of(error.value) and "\n" not in line_of(error.value)


def test_a_fault_of_ours_keeps_its_traceback():
    @one_line_errors
    def main(arguments):
        raise error

    for error in (KeyError("a"), RuntimeError("shapes differ"), TypeError("no"), AssertionError()):
        with pytest.raises(type(error)):
            main([])
    error = ValueError("a\nb")
    with pytest.raises(SystemExit, match="^error: a b$"):
        main([])


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="pipes that keep writes apart are Linux's")
def test_a_line_of_error_is_one_write():
    """Two processes of a launch that fail together would mix their lines otherwise; PYTHONUNBUFFERED makes each part a write."""
    reader, writer = os.pipe2(os.O_DIRECT)  # each write is one read
    code = "from modeling_mcd.command_line import one_line_errors as o; o(lambda a: int('x'))()"
    with os.fdopen(writer, "wb", 0) as stderr:
        subprocess.run([sys.executable, "-u", "-c", code], stderr=stderr, stdin=subprocess.DEVNULL, check=False)
    assert os.read(reader, 1 << 16) == b"error: invalid literal for int() with base 10: 'x'\n"
    os.close(reader)


@pytest.mark.parametrize(
    ("parser", "required"),
    [
        (generate_text.parser, ["MODEL"]),
        (chat.parser, ["MODEL"]),
        (convert_checkpoints.parser, ["SOURCE", "OUT"]),
        (run_eval.parser, ["MODEL", "--steps"]),
        (run_frontier.parser, []),
        (search_plan.parser, ["MODEL", "--text"]),
        (eval_results.parser, ["RESULTS", "MODEL"]),
    ],
    ids=["mcd-generate", "mcd-chat", "mcd-convert", "mcd-evaluate", "mcd-frontier", "mcd-plan", "mcd-eval-results"],
)
def test_help_is_short_and_says_what_is_required(parser, required, capsys, monkeypatch):
    """A line or two for each option; those of the recipes' commands: test_recipe.py."""
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) < 120
    assert all(name in lines[0] for name in required)
    text = re.sub(r"\n {30,}", " ", "\n".join(lines))  # an option is one line again
    marked = [line.split()[0] for line in text.splitlines() if line.endswith("(required)")]
    assert marked == required and "EVALUATION_" not in text


@pytest.mark.parametrize("name", ["evaluation", "modeling_mcd"])
def test_a_users_own_file_of_the_name_of_a_package_is_named(tmp_path, name):
    """`python -m` puts the folder in which it is called before everything else."""
    (tmp_path / f"{name}.py").write_text("print('mine')")
    result = run_python("trainers.run_mcd", "--help", launcher=("-m",), cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and result.stdout == ""
    assert f"error: {tmp_path / f'{name}.py'} hides the package {name!r} of this library" in line
    assert "call the command in another folder" in line


@pytest.mark.slow
def test_a_users_own_evaluation_does_not_disturb_the_methods(tmp_path):
    (tmp_path / "evaluation.py").write_text("FIGURE = 3")
    (tmp_path / "mine.py").write_text("from trainers import MCDTrainer; import evaluation; print(evaluation.FIGURE)")
    result = run_python("import runpy; runpy.run_path('mine.py')", plain=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == "3\n", result.stderr
