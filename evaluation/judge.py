"""The judge of generative perplexity: how it is loaded, described and identified."""

import hashlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_mcd.loading import reason_of, split_revision


def load_judge(name: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = _load(AutoTokenizer, "judge", name)
    return _load(AutoModelForCausalLM, "judge", name, dtype=getattr(torch, dtype)).to(device).eval(), tokenizer


def _load(auto_class, what: str, name: str, **options):
    try:
        repository, revision = split_revision(name)
        return auto_class.from_pretrained(repository, revision=revision or "main", **options)
    except Exception as error:  # a broken folder raises what its broken file happens to raise
        place = "cannot be loaded" if Path(name).is_dir() else "is no folder here, and cannot be had from the Hub"
        raise ValueError(f"{what} {name!r} {place}: {reason_of(error)}") from None


def fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that change with any weight: a label or a path does not say which weights it stood for."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe_judge(judge: PreTrainedModel) -> str:
    """Name, class, size and weights of a judge in one line. A folder gives its last part only."""
    name = judge.name_or_path
    if Path(name).is_dir():
        name = Path(name).resolve().name
    millions = judge.num_parameters() / 1e6
    return f"{name or 'judge'} ({type(judge).__name__}, {millions:.3g}M parameters in {str(judge.dtype).removeprefix('torch.')}, weights {fingerprint(judge)[:8]})"
