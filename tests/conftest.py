"""Shared fixtures: an offline and empty Hugging Face home, a small model with random weights, its tokenizer."""

import atexit
import gc
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path


# Before anything of Hugging Face is imported: no network, and no cache of an earlier run behind a result.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mcd_tests_")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402
from toy_distillers import make_networks  # noqa: E402

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion  # noqa: E402
from trainers.character_tokenizer import character_tokenizer  # noqa: E402


torch.set_num_threads(1)

if importlib.util.find_spec("datasets") is None:  # a borrowed machine for `pytest -m gpu`: see docs/gpu_day.md
    collect_ignore = ["test_bad_input.py", "test_bad_input_table.py", "test_data.py", "test_text_blocks.py"]


# First, or one of several processes would be left with them at the end.
LONGEST_FILES = ("test_launch.py", "test_gpu_day.py", "test_fsdp.py")


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: LONGEST_FILES.index(item.path.name) if item.path.name in LONGEST_FILES else len(LONGEST_FILES)
    )


def pytest_collection_finish():
    """Takes everything that was imported out of the garbage collector: every training begins with a full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def build():
    """`build(**config)`: a small model in eval mode. Its weights are random: a fresh model's logits are all zero."""

    def build(**config) -> MDLMForMaskedDiffusion:
        shapes = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        shapes |= {"conditioning_size": 16, "max_position_embeddings": 32, "bos_token_id": 46, "eos_token_id": 46}
        model = MDLMForMaskedDiffusion(MDLMConfig(**shapes | config)).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
        return model

    return build


@pytest.fixture
def model(build) -> MDLMForMaskedDiffusion:
    return build()


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer(model_max_length=32)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return make_networks(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def hub_dataset(tmp_path, monkeypatch) -> str:
    """`acme/novels` in an empty cache: written there by `load_dataset` as a parquet file, then given its Hub name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    novels = {"text": ["hello world", "this is it."], "title": ["a", "b"], "n": [1, 2]}
    datasets.Dataset.from_dict(novels).to_parquet(tmp_path / "novels.parquet")
    loaded = datasets.load_dataset("parquet", data_files={"train": str(tmp_path / "novels.parquet")}, split="train")
    built = Path(loaded.cache_files[0]["filename"]).parent
    home = tmp_path / "cache" / "acme___novels" / "default" / "0.0.0" / built.name
    shutil.copytree(built, home)
    (home / "parquet-train.arrow").rename(home / "novels-train.arrow")
    info = json.loads((home / "dataset_info.json").read_text())
    (home / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "novels"}))
    return "acme/novels"
