"""Rules for numbers and tensors, the same for configurations, options, recipes and the arguments of a forward."""

import math
from collections.abc import Callable
from typing import Literal, get_args, get_origin, get_type_hints

import torch


# What a number may be: in words, and as a condition, written so that NaN does not meet it.
COUNT = "be an integer of at least 1", lambda value: isinstance(value, int) and value >= 1
AT_LEAST_1 = "be at least 1", lambda value: value >= 1
NOT_NEGATIVE = "be at least 0 and finite", lambda value: 0 <= value < math.inf
POSITIVE = "be positive and finite", lambda value: 0 < value < math.inf
BELOW_1 = "lie in [0, 1)", lambda value: 0 <= value < 1
INSIDE_0_1 = "lie in (0, 1)", lambda value: 0 < value < 1
WITHIN_0_1 = "lie in [0, 1]", lambda value: 0 <= value <= 1
ABOVE_0_TO_1 = "lie in (0, 1]", lambda value: 0 < value <= 1


def check_numbers(settings, **rules: tuple[str, Callable]):
    """Raises ValueError, naming field and value, when a field of `settings` breaks its rule. None breaks no rule.

    Anything that is not a number (a string, True, False) breaks every rule.
    """
    for name, rule in rules.items():
        if getattr(settings, name) is not None:
            check_number(name, getattr(settings, name), rule)


def check_number(name: str, value: float, rule: tuple[str, Callable]):
    """Raises ValueError, naming the number and its value, when it breaks the rule."""
    words, allows = rule
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and allows(value)):
        raise ValueError(f"{name} must {words}, not {value!r}")


def check_token_ids(config):
    """Raises ValueError, naming field and value, when a special token of a model's configuration is none of its vocabulary."""
    for name in ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id"):
        tokens = getattr(config, name)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(f"{name} ({token}) must lie in [0, vocab_size = {config.vocab_size})")


def check_choices(settings):
    """Raises ValueError, naming field and value, when a field of a dataclass is not one of those that its `Literal` lists."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal and getattr(settings, name) not in get_args(hint):
            raise ValueError(f"{name} must be one of {get_args(hint)}, not {getattr(settings, name)!r}")


def may_look(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values may be checked: on an accelerator that would wait for the device, and it breaks a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
    """Raises ValueError for anything but a tensor of this shape."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor of the shape {tuple(shape)}, not {tensor!r}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")


def check_integers(name: str, tensor: torch.Tensor, end: int, ignored: int | None = None):
    """Raises ValueError for a tensor whose values are not integers of 0 .. end - 1, or `ignored`."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must hold integers (int64), not {tensor.dtype}")
    if may_look(tensor):
        wrong = (tensor < 0) | (tensor >= end)
        wrong = wrong if ignored is None else wrong & (tensor != ignored)
        if wrong.any():
            raise ValueError(f"{name} must lie in 0 .. {end - 1}, not be {tensor[wrong][0].item()}")


def check_positions(name: str, chosen: torch.Tensor, shape: tuple[int, ...]):
    """Raises ValueError unless `chosen` is a boolean mask of this shape, or a list of flat indices into it."""
    if not isinstance(chosen, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, a boolean mask or indices, not {chosen!r}")
    if chosen.dtype == torch.bool:
        check_shape(name, chosen, shape)
    elif chosen.ndim != 1:
        raise ValueError(f"{name} must be a mask or indices of one dimension, not of shape {tuple(chosen.shape)}")
    else:
        check_integers(name, chosen, math.prod(shape))


def check_canvas(
    config,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    timesteps: torch.Tensor | None,
):
    """Raises ValueError for inputs of a forward that do not fit each other, the vocabulary or the context."""
    name, canvas = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    dimensions = 2 if inputs_embeds is None else 3
    if not isinstance(canvas, torch.Tensor) or canvas.ndim != dimensions:
        shape = tuple(canvas.shape) if isinstance(canvas, torch.Tensor) else f"{canvas!r}"
        raise ValueError(f"{name} must be a tensor of {dimensions} dimensions, batch and length first, not {shape}")
    if inputs_embeds is None:
        check_integers(name, canvas, config.vocab_size)
    batch, length = canvas.shape[:2]
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{name} are {length} tokens long, but the context (max_position_embeddings) is "
            f"{config.max_position_embeddings}"
        )
    if (
        isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 4
    ):  # of 4 dimensions: prepared by the caller
        check_shape("attention_mask", attention_mask, (batch, length))
    if config.time_conditioning:
        if timesteps is None:
            raise ValueError("this model has time_conditioning: give timesteps, the total noise sigma of each row [B]")
        check_shape("timesteps", timesteps, (batch,))
