"""Which checkpoint to trust: one that was written to the end, untouched since, and by this very run."""

import json
import os
import re
import shutil
from pathlib import Path


MANIFEST, TRAINER_STATE, RUN = "manifest.json", "trainer_state.json", "run.json"


def write_json(path: Path, content):
    """All or nothing: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def difference(output_dir: Path, settings: dict) -> str | None:
    """The first setting in which the run of a folder is not ours, in words; None when it is ours, or there is no run."""
    if not (output_dir / RUN).is_file():
        return None
    try:
        other = read_object(output_dir / RUN)
    except ValueError as error:
        return f"of which nothing is known, for {error}"
    for key in sorted(settings.keys() | other.keys()):
        if settings.get(key) != other.get(key):
            return f"{key} was {other.get(key)!r} there and is {settings.get(key)!r} here"
    return None


def check_checkpoint(folder: Path, settings: dict):
    """Raises ValueError unless a checkpoint is whole and, as far as its folder tells, of a run with these settings."""
    fault, other = fault_of(folder), difference(folder.parent, settings)
    if fault or other:
        raise ValueError(f"cannot resume from {folder}: " + (fault or f"it belongs to another run: {other}"))


def check_output_dir(output_dir: Path, settings: dict):
    """Raises ValueError when a folder cannot be this run's; for another run's it names the first setting that differs."""
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir {str(output_dir)!r}: {str(place)!r} is a file; choose another one")
    other = difference(output_dir, settings)
    if other is not None:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds another run: {other}; choose another output_dir, or remove that folder"
        )
    # A run that was killed in its very first write has left `run.json.tmp` alone.
    names = {path.name for path in output_dir.iterdir()} if place == output_dir else set()
    if RUN not in names and names - {f"{RUN}.tmp"}:
        raise ValueError(
            f"output_dir {str(output_dir)!r} is not empty and holds no run of ours ({RUN}); choose another one"
        )


def claim_output_dir(output_dir: Path, settings: dict):
    """Marks a folder as this run's. Raises ValueError when it cannot be."""
    check_output_dir(output_dir, settings)
    if not (output_dir / RUN).is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RUN, settings)
