"""Loads every model of the family: ours or a published one, from a folder, a file or the Hub."""

import argparse
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .adapters import ADAPTER, base_of, merged_weights
from .backbone_layouts import is_backbone, read_backbone
from .backbones import check_backbone
from .checkpoint_layouts import ROTARY_BUFFER, WRAPPERS, count_blocks, parameter_names, published_config
from .configuration_backbone_mdlm import MDLMBackboneConfig
from .configuration_mdlm import MDLMConfig
from .files import read_object
from .generation_mdlm import MDLMGenerationConfig
from .modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion
from .modeling_mdlm import MDLMForMaskedDiffusion


INDEX = "model.safetensors.index.json"
PICKLES = ("*.ckpt", "*.pt", "*.pth", "*.bin")
# Classes in Lightning files besides tensors and plain containers, which torch always allows. Unpickling these runs no code.
ALLOWED_GLOBALS = [argparse.Namespace, defaultdict]
# Tokenizers that are published with code of their own, over the files of a class that transformers has.
NATIVE_TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Checkpoint:
    """A checkpoint that has been checked. `state` holds its weights under our names, mapped from the file but not read yet."""

    config: MDLMConfig | MDLMBackboneConfig
    state: dict[str, torch.Tensor]
    generation_config: MDLMGenerationConfig | None = None


def load_model(
    source: str, dtype: torch.dtype = torch.float32, quantization_config=None, **options
) -> MDLMForMaskedDiffusion | MDLMBackboneForMaskedDiffusion:
    """Loads one of our models, a published one, or a wrapped backbone: a Hub id (also `id@revision`), a folder, or a file.

    Args:
        source: where the checkpoint is. A LoRA adapter's folder is loaded with its base, as one plain network: the adapter
            is multiplied out into the weights.
        dtype: the dtype that the weights are loaded in, whatever that of the file.
        quantization_config: of `from_pretrained`.
        options: `revision`, `ema`, `trust_pickle`, `diffusion_kind`, `block_size`, see `read_checkpoint`.

    Raises:
        ValueError: the checkpoint is missing, does not fit, or holds a number that is not finite; names the first wrong
            file, key or shape.
    """
    checkpoint = read_checkpoint(source, **options)
    for name, tensor in checkpoint.state.items():  # not in the model, which ZeRO-3 may partition
        if not all(bound.isfinite() for bound in tensor.to(dtype).aminmax()):
            raise cannot_load("model", source, f"{name} holds NaN or infinite numbers in {dtype}")
    model = model_class(checkpoint.config).from_pretrained(
        None,
        config=checkpoint.config,
        state_dict=checkpoint.state,
        dtype=dtype,
        quantization_config=quantization_config,
    )
    model.name_or_path = ""  # transformers writes "None", which an adapter would take for the name of its base
    if isinstance(model, MDLMBackboneForMaskedDiffusion):
        try:
            check_backbone(model)
        except ValueError as error:
            raise cannot_load("model", source, str(error)) from None
    if checkpoint.generation_config is not None:
        model.generation_config = checkpoint.generation_config
    return model


def load_tokenizer(source: str | Path, what: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Loads a tokenizer: a folder or a Hub id (also `id@revision`). Never runs code that comes with it.

    Args:
        source: the folder or the id.
        what: what the error calls it.

    Raises:
        ValueError: it is missing or broken; one line.
    """
    try:
        tokenizer = load_pretrained(AutoTokenizer, what, source)
    except ValueError:
        name, revision = split_revision(str(source))
        try:
            native = NATIVE_TOKENIZERS[get_tokenizer_config(name, revision=revision).get("tokenizer_class")]
        except (OSError, ValueError, KeyError, AttributeError):  # missing, or no JSON object
            native = None
        if native is None:
            raise
        tokenizer = load_pretrained(native, what, source)
    tokenizer.init_kwargs.pop("auto_map", None)  # or a saved copy would name someone else's code
    return tokenizer


def load_pretrained(auto_class, what: str, source: str | Path, **options):
    """Calls `auto_class.from_pretrained` on a folder or a Hub id (also `id@revision`), never running code from there.

    Raises:
        ValueError: it cannot be loaded; one line that calls it `what` and says why.
    """
    name, revision = split_revision(str(source))
    try:
        return auto_class.from_pretrained(name, revision=revision or "main", trust_remote_code=False, **options)
    except Exception as error:  # a broken folder raises whatever its broken file makes the reader raise
        raise cannot_load(what, source, reason_of(error)) from None


def cannot_load(what: str, source: str, reason: str) -> ValueError:
    problem = "cannot be loaded"
    if not os.path.lexists(source):
        problem = "is not a local file or folder and could not be downloaded from the Hub"
    return ValueError(f"{what} {str(source)!r} {problem}: {' '.join(reason.split())}")


def read_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    ema: bool = False,
    trust_pickle: bool = False,
    diffusion_kind: str | None = None,
    block_size: int | None = None,
) -> Checkpoint:
    """Finds a checkpoint and checks each of its keys and shapes. The weights themselves are mapped, not read.

    Args:
        source: Hub id, `id@revision`, folder, or file (.safetensors, or a torch pickle such as Lightning's .ckpt). For the
            folder of an adapter, all but `revision` are about its base.
        revision: branch, tag or commit on the Hub.
        ema: take the moving average of a Lightning file instead of its raw weights.
        trust_pickle: unpickle any class that the file names, which can run any code.
        diffusion_kind: "absorbing" or "uniform"; the configuration says it by default.
        block_size: of SDAR and BD3-LM's A2D, whose attention is causal between blocks; the configuration says it by default.

    Raises:
        ValueError: as in `load_model`.
    """
    try:
        files, weight_map = find_weights(str(source), revision)
        folder = files[0].parent
        if files[0].name == ADAPTER:
            base, at = base_of(folder)
            options = {"ema": ema, "trust_pickle": trust_pickle}
            options |= {"diffusion_kind": diffusion_kind, "block_size": block_size}
            checkpoint = read_checkpoint(base, revision=at, **options)
            checkpoint.state = merged_weights(folder, checkpoint.state)
            if (folder / "generation_config.json").is_file():
                checkpoint.generation_config = MDLMGenerationConfig.from_pretrained(folder)
            return checkpoint
        state, settings = read_files(files, weight_map, ema, trust_pickle)
        config_file = folder / "config.json"
        if not settings and config_file.is_file():
            settings = read_object(config_file)
        generation_config = None
        if block_size is not None and not is_backbone(settings):
            raise ValueError(f"block_size is {block_size}, but it is no network of transformers: leave it out")
        if settings.get("model_type") == MDLMConfig.model_type:
            config = MDLMConfig.from_dict(settings)
            if diffusion_kind not in (None, config.diffusion_kind):
                raise ValueError(f"its config.json says {config.diffusion_kind!r} diffusion, not {diffusion_kind!r}")
            ours_of = {name: name for name in parameter_shapes(config)}
            check_keys(state, ours_of, "")
        elif is_backbone(settings):
            if diffusion_kind == "uniform":
                raise ValueError("it is a network of absorbing diffusion, not of 'uniform'")
            config, ours_of, generation_config = read_backbone(settings, state, folder, block_size)
        else:
            frequencies = state.pop(ROTARY_BUFFER, None)
            ours_of = parameter_names(count_blocks(state))
            kind = settings.get("model_type")
            check_keys(state, ours_of, f"its model_type is {kind!r}, and " if kind else "")
            config = published_config(settings, state, frequencies, diffusion_kind)
        own = settings.get("model_type") == config.model_type
        if own and (folder / "generation_config.json").is_file():
            generation_config = MDLMGenerationConfig.from_pretrained(folder)
        shapes = parameter_shapes(config)
        for name, ours in ours_of.items():
            if state[name].shape != shapes[ours]:
                raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, not {tuple(shapes[ours])}")
            if state[name].dtype not in DTYPES:
                raise ValueError(
                    f"{name} holds {state[name].dtype} numbers, not floating-point ones of 16 bits or more"
                )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise cannot_load("model", source, str(error)) from None
    return Checkpoint(config, {ours: state[name] for name, ours in ours_of.items()}, generation_config)


def model_class(config: MDLMConfig | MDLMBackboneConfig) -> type:
    return MDLMForMaskedDiffusion if isinstance(config, MDLMConfig) else MDLMBackboneForMaskedDiffusion


def parameter_shapes(config: MDLMConfig | MDLMBackboneConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_keys(state: Mapping, expected: Mapping, prefix: str):
    for name in expected:
        if name not in state:
            raise ValueError(f"{prefix}{name} is missing")
    for name in state:
        if name not in expected:
            raise ValueError(f"{prefix}{name} is not a parameter of this network")


def find_weights(source: str, revision: str | None) -> tuple[list[Path], dict[str, str]]:
    """The files with the weights and, if they are shards, the map tensor -> file name. Downloads them for a Hub id."""
    if not source:
        raise ValueError("its name is empty")
    path = Path(source)
    if os.path.lexists(path) and revision is not None:
        raise ValueError(f"revision {revision!r} is for a Hub id, and this is a local file or folder")
    if os.path.isfile(path):
        return [path], {}
    if not os.path.isdir(path):
        if os.path.lexists(path):
            raise ValueError("it is neither a file nor a folder")
        path = download(source, revision)
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], {}
    if (path / INDEX).is_file():
        weight_map = read_index(path)
        return [path / name for name in sorted(set(weight_map.values()))], weight_map
    if (path / ADAPTER).is_file():
        return [path / ADAPTER], {}
    files = [file for pattern in ("*.safetensors", *PICKLES) for file in sorted(path.glob(pattern)) if file.is_file()]
    if len(files) != 1:
        found = f"one of {[file.name for file in files]} must be chosen" if files else "there are no weights in it"
        raise ValueError(f"{found}: give a folder with a model.safetensors, or the path of one file")
    return files, {}


def read_index(folder: Path) -> dict[str, str]:
    """The map tensor -> file name of a sharded checkpoint. Raises ValueError for a file outside the folder."""
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX} names no file (weight_map)")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{INDEX} says that {tensor} is in {name!r}, which is not a .safetensors file in its folder"
            )
    return weight_map


def split_revision(source: str) -> tuple[str, str | None]:
    """Splits `name@revision` into (name, revision). The revision is None for the Hub's default and for a local path."""
    name, _, revision = source.partition("@")
    return (source, None) if os.path.lexists(source) else (name, revision or None)


def download(source: str, revision: str | None) -> Path:
    """Downloads a repository's snapshot and returns its folder. Pickles are downloaded only if there are no safetensors."""
    name, at = split_revision(source)
    if at and revision is not None:
        raise ValueError(f"it names the revision {at!r} already: leave out revision {revision!r}")
    revision = revision or at
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", *PICKLES]))
        return folder
    except (OSError, ValueError) as error:
        raise ValueError(f"revision {revision!r}: {reason_of(error)}" if revision else reason_of(error)) from None


def reason_of(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_files(
    files: list[Path], weight_map: Mapping[str, str], ema: bool, trust_pickle: bool
) -> tuple[dict[str, torch.Tensor], Mapping]:
    """Tensors by name, without the wrappers' prefixes, and the settings of the run if a Lightning file holds them."""
    state, settings = {}, {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file.name} is missing, so the weights are not complete")
        with file.open("rb") as opened:
            if opened.read(30).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file.name} is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
                )
        content = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, trust_pickle)
        if "state_dict" in content:
            settings = hyper_parameters(content)
        elif ema:
            raise ValueError(f"{file.name} holds no EMA: only a Lightning checkpoint does")
        tensors = content.get("state_dict", content)
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{file.name} holds no state dict but a {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{file.name} holds no state dict: {name!r} is a {type(tensor).__name__}")
            if weight_map.get(name, file.name) != file.name:
                raise ValueError(f"{file.name} holds {name}, which {INDEX} says is in {weight_map[name]}")
            unwrapped = name
            while unwrapped.startswith(WRAPPERS):
                unwrapped = unwrapped.partition(".")[2]
            if unwrapped in state:
                raise ValueError(f"{file.name} holds {unwrapped!r} twice, under different prefixes or in two files")
            state[unwrapped] = tensor
        for name in weight_map:
            if weight_map[name] == file.name and name not in tensors:
                raise ValueError(f"{file.name} does not hold {name}, which {INDEX} says is in it")
        if ema:
            state |= ema_tensors(content, parameter_names(count_blocks(state)), file)
    return state, settings


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except OSError:
        raise
    except Exception as error:  # besides SafetensorError, whatever damaged bytes make of a header
        raise ValueError(f"{file.name} is cut off, or not a safetensors file ({reason_of(error)})") from None


def read_pickle(file: Path, trust: bool) -> Mapping:
    """The content of a torch checkpoint. Unless trusted, only tensors, plain containers and `ALLOWED_GLOBALS` are unpickled."""
    cut_off = f"{file.name} is cut off, or not a torch checkpoint (a zip archive since torch 1.6)"
    if not zipfile.is_zipfile(file):
        raise ValueError(cut_off)
    try:
        with torch.serialization.safe_globals(ALLOWED_GLOBALS):
            found = [] if trust else torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
            if found:
                raise pickle.UnpicklingError(", ".join(sorted(found)))
            content = torch.load(str(file), map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"unpickling {file.name} needs more than tensors and plain containers, and that can run any code "
            f"(found: {reason_of(error)}); if you trust its author, convert it with --trust-pickle"
        ) from None
    except ModuleNotFoundError as error:
        raise ValueError(f"unpickling {file.name} needs the package {error.name!r}: install it first") from None
    except OSError:
        raise
    except Exception as error:  # whatever damaged bytes make of a pickle
        raise ValueError(f"{cut_off}: {reason_of(error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file.name} holds no state dict but a {type(content).__name__}")
    return content


def hyper_parameters(lightning: Mapping) -> Mapping:
    """The settings of the run that wrote a Lightning file; empty if it holds none."""
    found = lightning.get("hyper_parameters")
    found = found.get("config") if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def ema_tensors(lightning: Mapping, names: Mapping, file: Path) -> dict[str, torch.Tensor]:
    """The moving average by published name. Lightning files hold it as a list in the order of `parameters()`."""
    ema = lightning.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if not isinstance(shadow, list | tuple):
        raise ValueError(f"{file.name} holds no EMA: leave out --ema for its raw weights")
    shadow = [tensor for tensor in shadow if isinstance(tensor, torch.Tensor)]
    if len(shadow) != len(names):
        raise ValueError(f"the EMA of {file.name} has {len(shadow)} tensors, and the network {len(names)} parameters")
    return dict(zip(names, shadow, strict=True))


def check_tokens(tokenizer: PreTrainedTokenizerBase, config: MDLMConfig):
    """Raises ValueError if a token is outside the model's vocabulary, or if tokenizer and model have different mask ids."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {config.vocab_size}"
        )
    if None not in (tokenizer.mask_token_id, config.mask_token_id) and tokenizer.mask_token_id != config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask token has the id {tokenizer.mask_token_id}, but the model's mask_token_id is "
            f"{config.mask_token_id}"
        )
