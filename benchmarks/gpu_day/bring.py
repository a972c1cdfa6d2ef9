"""The way home: a folder with few and small files, since a borrowed machine may give back no others.

Networks are packed as one stream of tar, cut into parts; results travel as they are. What has been put into a folder once is
noted, so that the next command goes on with the rest.
"""

import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from benchmarks.gpu_day.stage import Day
from modeling_mcd.files import write_json


def parts_of(folder: Path, target: Path, size: int) -> list[Path]:
    """Packs a folder as NAME.tar.00, NAME.tar.01, ... of at most `size` bytes. Unless they are there already."""
    known = sorted(target.glob(f"{folder.name}.tar.[0-9][0-9]"))
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    if known and min(part.stat().st_mtime for part in known) >= newest:
        return known
    for part in known:
        part.unlink()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target) as stream:
        with tarfile.open(fileobj=stream, mode="w") as packed:
            packed.add(folder, arcname=folder.name)
        stream.seek(0)
        parts = []
        while piece := stream.read(size):
            parts.append(target / f"{folder.name}.tar.{len(parts):02d}")
            parts[-1].write_bytes(piece)
    return parts


def bring(day: Day, out: Path) -> list[str]:
    """Copies into `out` what has not been brought yet, within the limits of one command. Returns what is left.

    Results are always brought: they change. Of networks a part is brought once.
    """
    options, noted = day.options, day.runs / "brought.json"
    limit, total = int(options.file_mb * 1e6), int(options.total_mb * 1e6)
    results = [day.file(stage) for stage in ("check", "speed", "teacher", "students", "tables")]
    results += sorted(day.results.glob("paper_tables_gpu_novels.*")) if not day.small else []
    results.append(day.runs / "tables" / "eval.json")
    known = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    wanted = [(file, file.name) for file in results if file.exists()]
    # All results in one file: eight would leave no room for a network.
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "results.tar.xz", "w:xz") as packed:
        for file, name in wanted:
            packed.add(file, arcname=name)
    files, size = 1, (out / "results.tar.xz").stat().st_size
    left = []
    shipped = day.runs / "shipped"
    for folder in sorted(path for path in shipped.glob("*") if path.suffix != ".part"):
        for part in parts_of(folder, day.runs / "parts", limit):
            stamp = [part.stat().st_size, part.stat().st_mtime_ns]
            if known.get(part.name) == stamp:
                continue
            if files < options.files and size + part.stat().st_size <= total:
                shutil.copy(part, out / part.name)
                files, size = files + 1, size + part.stat().st_size
                known[part.name] = stamp
            else:
                left.append(part.name)
    write_json(noted, known)
    day.say(
        f"{files} files, {size / 1e6:.1f} MB in {out}; {f'left for the next command: {left}' if left else 'nothing is left'}"
    )
    return left


def unpack(source: Path, target: Path) -> list[str]:
    """Puts what was brought home, in any number of commands, into one folder: NAME/ for each network, and the results.

    Raises:
        ValueError: a part in the middle is missing.
    """
    names = sorted({file.name.split(".tar.")[0] for file in source.rglob("*.tar.[0-9][0-9]")})
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        parts = sorted(source.rglob(f"{name}.tar.[0-9][0-9]"), key=lambda part: part.name)
        numbers = [int(part.name[-2:]) for part in parts]
        if numbers != list(range(len(parts))):
            raise ValueError(f"{name}: parts {numbers} are there, and one between them is missing: bring it too")
        with tempfile.TemporaryFile(dir=target) as stream:
            for part in parts:
                stream.write(part.read_bytes())
            stream.seek(0)
            with tarfile.open(fileobj=stream) as packed:
                packed.extractall(target, filter="data")
    for packed in sorted(source.rglob("results.tar.xz")):
        with tarfile.open(packed) as content:
            content.extractall(target, filter="data")
    return [path.name for path in sorted(target.iterdir())]
