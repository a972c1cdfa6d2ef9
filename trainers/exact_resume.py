"""Exact resume: what a checkpoint needs beyond the Trainer's own files, and which checkpoint to trust."""

import json
import re
import shutil
from pathlib import Path

import torch

from modeling_mcd.files import write_json


def register_head(model: torch.nn.Module):
    """Tells ZeRO-3 that the model itself reads the head's parameters (`hidden_rows`), beside the head's own forward.

    Left to itself it learns this when it finds them partitioned, which on a resumed run is only after it has recorded the
    order of all parameters: the next step then fails on that record.
    """
    import deepspeed

    for parameter in model.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model, parameter)


MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"


def write_manifest(folder: Path):
    """Lists every file of a checkpoint with its size. Written when all are there but the trainer's state, which is last."""
    files = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    files.pop(MANIFEST, None)
    files.pop(TRAINER_STATE, None)
    write_json(folder / MANIFEST, files)


def read_object(path: Path) -> dict:
    """Raises ValueError, which names the file, unless it holds a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or not even UTF-8
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is cut off, or no JSON object")
    return content


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when it is whole."""
    try:
        files = read_object(folder / MANIFEST)
        read_object(folder / TRAINER_STATE)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: it was never written to the end"
    except ValueError as error:
        return str(error)
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes and should have {size}"
    return None


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint to resume from."""
    folders = [f for f in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    for folder in sorted(folders, key=lambda f: int(f.name.split("-")[1]), reverse=True):
        if fault_of(folder) is None:
            return folder
    return None


def remove_later_checkpoints(output_dir: Path, keep: Path | None):
    """Removes the remains of interrupted saves: everything after the checkpoint that the run goes on from."""
    last = int(keep.name.split("-")[1]) if keep else -1
    for folder in output_dir.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", folder.name) and int(folder.name.split("-")[1]) > last:
            shutil.rmtree(folder)
