"""A very small run of the real entry points, for tests: a text, a tokenizer, a random teacher, and the arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from fork_server import Process, server
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.character_tokenizer import character_tokenizer


ROOT = Path(__file__).resolve().parent.parent
BLOCK = 32


def write_inputs(folder: Path) -> Path:
    """Tokenizer, 64 blocks of text and a teacher of 30,000 random weights under `folder`."""
    tokenizer = character_tokenizer(model_max_length=BLOCK)
    tokenizer.save_pretrained(folder / "tokenizer")
    sentence = "the way of the data is one line, with no walking back. "
    (folder / "text.txt").write_text(sentence * 36, encoding="utf-8")
    save_teacher(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def save_teacher(folder: Path, vocab_size: int = 48):
    set_seed(0)
    config = MDLMConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        conditioning_size=8,
        max_position_embeddings=BLOCK,
        hidden_dropout=0.0,
        bos_token_id=46,
        eos_token_id=46,
    )
    model = MDLMForMaskedDiffusion(config)
    # Away from the zero initialisation, under which every logit is zero and there is nothing to distil.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def save_judge(folder: Path) -> Path:
    """A causal language model of random weights that reads the same characters."""
    set_seed(0)
    config = GPT2Config(vocab_size=48, n_positions=BLOCK, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    character_tokenizer(model_max_length=BLOCK).save_pretrained(folder)
    return folder


def reverse_letters(tokenizer: Path):
    """The same letters in the opposite order: a tokenizer of the same size that reads every text otherwise."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))


def mcd_arguments(inputs: Path, output_dir: Path, **changes) -> list[str]:
    settings = {
        "teacher": inputs / "teacher",
        "tokenizer": inputs / "tokenizer",
        "train_text": inputs / "text.txt",
        "block_length": BLOCK,
        "num_rounds": 3,
        "steps_per_round": 4,
        "delta": 0.125,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 3,
        "disable_tqdm": True,
        "seed": 5,
        "output_dir": output_dir,
        **changes,  # None leaves a setting out
    }
    return [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]


SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def mdlm_arguments(inputs: Path, output: Path, model: Path | None = None) -> list[str]:
    """The arguments for a new network, or for one to go on from."""
    settings = {
        "tokenizer": inputs / "tokenizer",
        "train_text": inputs / "text.txt",
        "block_length": BLOCK,
        **(SHAPE if model is None else {"model": model}),
        "max_steps": 2,
        "output_dir": output,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def judge_arguments(inputs: Path, output: Path) -> list[str]:
    settings = {
        "tokenizer": inputs / "tokenizer",
        "train_text": inputs / "text.txt",
        "block_length": BLOCK,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "max_steps": 1,
        "use_cpu": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": output,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def environment() -> dict[str, str]:
    """This checkout on the path, one thread, and nothing from the network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def start_python(code: str, *arguments: str, plain: bool = False, cwd: Path | None = None) -> Process:
    """Starts `python -c CODE ARGUMENTS`, as a fork of a process that has imported the entry points.

    Args:
        plain: of a process that has imported torch and transformers, and nothing of this library.
    """
    without_test = {name: value for name, value in environment().items() if name != "PYTEST_CURRENT_TEST"}
    return server(tuple(sorted(without_test.items()))).start(code, *arguments, plain=plain, cwd=cwd)


def run_python(code: str, *arguments: str, launcher: tuple[str, ...] | None = None, **options):
    """Runs code in a process of its own.

    Args:
        code: as for `start_python`; or what `launcher` takes.
        launcher: words between the interpreter and `code`: a new interpreter is started with them, which takes longer.
        options: of `start_python`; under a launcher those of `subprocess.run`.

    Returns:
        `subprocess.CompletedProcess` with the output as text.
    """
    if launcher is None:
        return start_python(code, *arguments, **options).complete()
    command = [sys.executable, *launcher, code, *arguments]
    options = {"capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run(command, env=environment(), **options)
