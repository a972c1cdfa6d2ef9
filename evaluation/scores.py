"""The scores of single samples, kept beside a report: what intervals and paired comparisons are computed from."""

import hashlib
import json
from pathlib import Path

from evaluation.evaluate_model import KEY, SETTINGS
from modeling_mcd.files import read_object, write_atomically


FOLDER = "scores"
PER_SAMPLE = ("nll", "tokens", "entropy", "trigram_entropy")


def scores_path(folder: str | Path, row: dict) -> Path:
    """The file of a row's samples: other weights or settings, another file."""
    identity = json.dumps([row.get(name) for name in (*KEY, *SETTINGS, "weights")])
    return Path(folder) / FOLDER / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def save_scores(folder: str | Path, row: dict, seeds: list[dict]):
    """Writes the scores of a row, as `measure` gives them, all or nothing."""
    path = scores_path(folder, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"seeds": seeds}, allow_nan=False) + "\n")


def load_scores(folder: str | Path, row: dict) -> list[dict] | None:
    """The scores of each seed of a row, with the lists `PER_SAMPLE` and `seconds` per sample; None if none are kept.

    Raises:
        ValueError: the file is not what `save_scores` writes.
    """
    path = scores_path(folder, row)
    if not path.exists():
        return None
    seeds = read_object(path).get("seeds")
    if (
        not isinstance(seeds, list)
        or len(seeds) != row["seeds"]
        or not all(isinstance(seed, dict) and {*PER_SAMPLE, "seconds"} <= set(seed) for seed in seeds)
        or not all(len(seed[name]) == row["samples"] for seed in seeds for name in PER_SAMPLE)
    ):
        raise ValueError(f"{path} holds no scores of {row['samples']} samples x {row['seeds']} seeds: remove the file")
    return seeds
