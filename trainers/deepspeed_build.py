"""The extensions that DeepSpeed compiles on first use: says that this takes time, and detects a compile that was killed."""

import contextlib
import glob
import os
import sys
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


SECOND_LOOK = 1.0  # seconds


def check_build_cache(deepspeed: dict | str | None):
    """Under DeepSpeed, says that the first run on a machine compiles. Call it before DeepSpeed starts.

    Args:
        deepspeed: the setting of `TrainingArguments`; `accelerate launch` sets an environment variable instead.

    Raises:
        ValueError: a killed compile has left its lock, for which every later one would wait forever.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true" and deepspeed is None:
        return
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock"):
        if is_left(lock):
            raise ValueError(
                f"{lock} was left by a compile that was killed, and DeepSpeed would wait for it without end: "
                f"rm -r {lock.parent}"
            )
    if not any(root.glob("**/*.so")) and os.environ.get("RANK", "0") == "0":
        print(
            "DeepSpeed compiles an extension now: about two minutes, once on this machine", file=sys.stderr, flush=True
        )


def is_left(lock: Path) -> bool:
    """Whether a lock outlived its compile, which keeps it open as long as it lives. Only what we may inspect is known.

    A compile that ends closes its lock just before it removes it, perhaps while we look: so a closed lock is looked at again.
    """
    if not Path("/proc/self/fd").exists():
        return False
    try:
        first = lock.stat()
        if is_open(first):
            return False
        time.sleep(SECOND_LOOK)
        return lock.stat().st_ctime_ns == first.st_ctime_ns and not is_open(first)
    except FileNotFoundError:  # just released
        return False


def is_open(status: os.stat_result) -> bool:
    return any(os.path.samestat(status, other) for other in map(_stat, glob.iglob("/proc/[0-9]*/fd/*")) if other)


def _stat(path: str) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(path)
