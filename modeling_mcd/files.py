"""Files that are written completely or not at all, and locks that let one process at a time write to a folder."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


LOCK = ".lock"


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `out` at the end, or removed if anything fails."""
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes):
    """Writes to a temporary file and renames it, so that a reader finds either the old content or the new, never part of it.

    The umask decides the file's permissions, as for any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content):
    """Writes JSON with sorted keys, completely or not at all.

    Raises:
        ValueError: the content holds infinity or NaN, which JSON does not have; the file is left as it was.
    """
    write_atomically(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_object(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the file: it is not JSON in UTF-8, or holds something other than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object, not a {type(content).__name__}")
    return content


_held: set[int] = set()  # file descriptors of the locks that this process holds


def _leave_locks_to_the_parent():
    """Runs in a forked child: a lock must end with the process that took it, not live on in a data loader's worker."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


@contextlib.contextmanager
def lock_folder(folder: Path, purpose: str) -> Iterator[None]:
    """Locks a folder for this process: `with lock_folder(output_dir, "training"):`. Creates the folder if it does not exist.

    The lock is the operating system's (flock on `.lock` in the folder), so a killed process leaves nothing that has to be
    removed by hand. It is not reentrant.

    Raises:
        ValueError: another process holds the folder; names the process, its host, its purpose and since when.
    """
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    handle = _open_and_lock(folder)
    if handle is None:
        raise ValueError(in_use(folder) or f"output_dir {str(folder)!r} was in use a moment ago: start again")
    try:
        if handle >= 0:
            _held.add(handle)
            holder = {"pid": os.getpid(), "parent": os.getppid(), "host": socket.gethostname(), "purpose": purpose}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode(), 0)
        yield
    finally:
        if handle in _held:  # not in a forked child
            (folder / LOCK).unlink(missing_ok=True)
            _held.remove(handle)
            os.close(handle)
            with contextlib.suppress(OSError):  # the folder is kept as soon as anything was written to it
                for parent in made:
                    parent.rmdir()


def _open_and_lock(folder: Path) -> int | None:
    """A file descriptor that holds the lock; None if another process has it, -1 if the file system has no locks."""
    attempts = 100
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except (
            FileExistsError,
            FileNotFoundError,
        ):  # the holder before us removed a folder that it had made, in between
            attempts -= 1
            if attempts == 0:
                raise
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have removed the file between our two calls: then our lock is on nothing.
            if os.path.exists(folder / LOCK) and os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
            os.close(handle)
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            print(
                f"warning: no lock on {folder} ({error.strerror}): nothing keeps a second process from writing there",
                file=sys.stderr,
            )
            return -1


def in_use(folder: Path) -> str | None:
    """An error message about the process that holds a folder; None if the folder is free. Writes nothing."""
    try:
        handle = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        content = os.pread(handle, 4096, 0)
    finally:
        os.close(handle)
    try:
        holder = json.loads(content)
    except ValueError:  # it is being written
        return (
            f"output_dir {str(folder)!r} is in use by another process that has just started: wait for it, or stop it"
        )
    pid, place = holder["pid"], "" if holder["host"] == socket.gethostname() else " there"
    orphan = ""
    if not place:
        with contextlib.suppress(psutil.Error):
            if psutil.Process(pid).ppid() != holder["parent"]:
                orphan = f" and left behind by its launcher, process {holder['parent']}, which is gone"
    return (
        f"output_dir {str(folder)!r} is in use by process {pid} on host {holder['host']} ({holder['purpose']} since "
        f"{holder['since']}{orphan}): wait for it, or stop it with `kill {pid}`{place}"
    )
