"""Checkpoints on the disk: writing their manifest, finding what is wrong with one, and choosing the one to resume from.

A checkpoint is complete when it has a manifest, which is written last and holds the digest of every file.
"""

import hashlib
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from transformers.utils import logging

from modeling_mcd.files import read_object, write_json


logger = logging.get_logger(__name__)

MANIFEST, TRAINER_STATE = "manifest.json", "trainer_state.json"


def digest_of(path: Path) -> str:
    """The BLAKE2b digest of a file, in hexadecimal. A file that has not changed since the last call is not read again."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, *version: int) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def write_manifest(folder: Path, **facts):
    """Completes a checkpoint: records the size and digest of every file, and `facts` that resuming needs."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_of, files)
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": digest}
            for path, digest in zip(files, digests, strict=True)
        }
    content = {"files": entries, **facts}
    write_json(folder / MANIFEST, {**content, "digest": _digest_of_manifest(content)})


def _digest_of_manifest(content: dict) -> str:
    """Of a manifest without its own digest: a flipped bit of a fact would otherwise be believed."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is there and is what was saved."""
    try:
        manifest = read_object(folder / MANIFEST)
        files = manifest.get("files")
        read_object(folder / TRAINER_STATE)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: it was never written to the end"
    except ValueError as error:
        return str(error)
    if not isinstance(files, dict):
        return f"{MANIFEST} has no digests: it is of an earlier version of this library"
    digest = manifest.pop("digest", None)  # earlier versions wrote none
    if digest is not None and digest != _digest_of_manifest(manifest):
        return f"{MANIFEST} is damaged: its digest is not that of what it says"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes and should have {entry['bytes']}"
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest_of, [folder / name for name in files])
        for (name, entry), digest in zip(files.items(), digests, strict=True):
            if digest != entry["blake2b"]:
                return f"{name} is damaged: its digest is not that of the file that was saved"
    return None


def step_of(folder: Path) -> int:
    """The step N of a folder `checkpoint-N`."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-N`, complete or not, newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of, reverse=True)


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; None if there is none. Warns about each newer one, with the reason.

    Raises:
        ValueError: checkpoints were completed there, but none of them can be used. A run that began again at step 0 would
            sooner or later overwrite them.
    """
    damaged = []
    for folder in checkpoints_in(output_dir):
        fault = fault_of(folder)
        if fault is None:
            return folder
        logger.warning(f"{folder} is passed over: {fault}")
        if (folder / MANIFEST).exists():
            damaged.append(f"{folder.name}: {fault}")
    if damaged:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds checkpoints, but none to resume from ({'; '.join(damaged)}). Nothing "
            "was removed: choose another output_dir, or move them away to begin again"
        )
    return None


def clear_later_checkpoints(output_dir: Path, keep: Path | None):
    """Clears the way for a run that resumes from `keep`, or that begins if it is None.

    If it resumes, later checkpoints are removed, with a warning for each. If it begins, nothing is removed: what interrupted
    saves have left is renamed to `incomplete-checkpoint-N`.
    """
    for folder in checkpoints_in(output_dir):
        if keep is None:
            aside = output_dir / f"incomplete-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning(f"{folder} was never completed, and there is nothing to resume from: it is now {aside}")
        elif step_of(folder) > step_of(keep):
            logger.warning(f"removing {folder} ({fault_of(folder) or 'it is later'}): the run goes on from {keep}")
            shutil.rmtree(folder)
