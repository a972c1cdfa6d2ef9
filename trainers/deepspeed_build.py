"""The extensions that DeepSpeed compiles on first use: says that this takes time, and detects a compile that was killed."""

import contextlib
import glob
import os
import sys
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root


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
        if not is_open(lock):
            raise ValueError(
                f"{lock} was left by a compile that was killed, and DeepSpeed would wait for it without end: "
                f"rm -r {lock.parent}"
            )
    if not any(root.glob("**/*.so")) and os.environ.get("RANK", "0") == "0":
        print(
            "DeepSpeed compiles an extension now: about two minutes, once on this machine", file=sys.stderr, flush=True
        )


def is_open(path: Path) -> bool:
    """Whether any process that we may inspect has a file open. A compile keeps its lock open for as long as it lives."""
    if not Path("/proc/self/fd").exists():
        return True
    try:
        status = path.stat()
        return any(os.path.samestat(status, other) for other in map(_stat, glob.iglob("/proc/[0-9]*/fd/*")) if other)
    except FileNotFoundError:  # just released
        return True


def _stat(path: str) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(path)
