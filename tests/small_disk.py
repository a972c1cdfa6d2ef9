"""A small disk that a process mounts for itself: a tmpfs in a mount namespace, which ends with the process."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


NO_NAMESPACE = 77  # exit status of `run_on_small_disk` where nothing can be mounted


def mount(*words: str):
    subprocess.run(["mount", *words], check=True)


def mount_tmpfs(folder: str | Path, options: str):
    mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))


def unmount(folder: str | Path):
    subprocess.run(["umount", str(folder)], check=True)


def enter_namespace(folder: str | Path, mounts: int = 0x20000, users: int = 0x10000000):
    """As `unshare --mount` does, with `--map-root-user` if not root.

    Raises:
        OSError, AttributeError, subprocess.CalledProcessError: this process may not do so, or may not mount over the folder.
    """
    uid, gid = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(mounts | (users if uid else 0)):
        raise OSError("no namespace")
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")) if uid else ():
        Path(f"/proc/self/{file}").write_text(text)
    mount("--make-rprivate", "/")
    mount_tmpfs(folder, "size=4k")
    unmount(folder)


def run_on_small_disk(folder: Path, free: int, run: Callable[[], None]):
    """Calls `run` while `folder` is a disk with so many free bytes; what is on it then comes back into the folder.

    Exits with status 77 where nothing can be mounted.
    """
    aside = folder.with_name(f"{folder.name}-aside")
    try:
        enter_namespace(folder)
    except (OSError, AttributeError, subprocess.CalledProcessError):
        sys.exit(NO_NAMESPACE)
    used = sum(1 + path.stat().st_size // 4096 for path in folder.rglob("*")) * 4096
    shutil.copytree(folder, aside)
    mount_tmpfs(folder, f"size={used + free}")
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)
    try:
        run()
    finally:
        shutil.copytree(folder, aside)
        unmount(folder)
        shutil.rmtree(folder)
        aside.rename(folder)
