"""The inputs of `generate`, checked and put into one `Request`: options, canvas and noise."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from .configuration_mdlm import MDLMConfig
from .forward_process_mdlm import process_of
from .generation_config_mdlm import DEFAULTS, LENGTHS, TOKENS, MDLMGenerationConfig
from .noise_mdlm import RowNoise, row_keys
from .reveal_grid_mdlm import shares_of
from .sampling_mdlm import PLANNED, SAMPLERS, legacy_ancestral, options_of


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
BLANK = -1  # no token at all: a position to fill, where there is no [MASK] to say so


@dataclass(frozen=True)
class Request:
    """One call of `generate`.

    Args:
        options: every option that the call, the configuration or the library gives; None for those that are not used.
        sampler: `canvas -> steps`, with its own options.
        steps_of_a_block: how many step numbers a block takes up.
        tokens: [B, L] int64, on the model's device: the canvas at the start.
        fillable: [B, L] bool, CPU: the positions to fill.
        seen: [B, L] bool, CPU: the positions that are not padding.
        noise: the uniforms of the rows.
        processors: of the logits, suppressed tokens included.
        early: [B, L] bool, CPU: the positions at which no end of sequence is drawn; None for no such rule.
        eos_token_ids: the ids that end a sequence.
        pad_token_id: what follows such an id.
    """

    options: MDLMGenerationConfig
    sampler: Callable
    steps_of_a_block: int
    tokens: torch.LongTensor
    fillable: torch.BoolTensor
    seen: torch.BoolTensor
    noise: RowNoise
    processors: LogitsProcessorList
    early: torch.BoolTensor | None
    eos_token_ids: list[int]
    pad_token_id: int | None


def prepare(
    config: MDLMConfig,
    device: torch.device,
    generation_config: MDLMGenerationConfig,
    given_config: MDLMGenerationConfig | None,
    given: dict,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    seed: int | Sequence[int] | None,
    generator: torch.Generator | None,
    logits_processor: LogitsProcessorList | None,
) -> Request:
    """Checks every argument of a call of `generate` and lays its canvas out.

    Args:
        config, device, generation_config: of the model.
        given_config: the call's own generation configuration.
        given: the call's options.
        The rest: see `generate`.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    options, asked = merge_options(generation_config, given_config, given)
    eos_token_ids, pad_token_id = end_of_sequence(options, config)
    check_options(options, asked, config)
    check_blocks_and_cache(options, asked, config)
    check_end_of_sequence(options, asked, config, eos_token_ids, pad_token_id)
    if not isinstance(logits_processor, list | None):
        raise ValueError(f"logits_processor must be a LogitsProcessorList, not {shown(logits_processor)}")
    processors = LogitsProcessorList(logits_processor or [])
    suppressed = suppressed_tokens(options, config)
    if suppressed:
        processors.append(SuppressTokensLogitsProcessor(sorted(suppressed), device=device))
    tokens, fillable, seen = lay_out(input_ids, attention_mask, options, config, device)
    keys = keys_of(seed, generator, len(tokens))
    if options.guidance_scale is not None and not (seen & ~fillable).any(dim=1).all():
        raise ValueError(f"guidance_scale ({options.guidance_scale}) needs a prompt in every row to guide by")
    early = None
    if options.eos_after:
        early = fillable & (fillable.cumsum(dim=1) <= (options.eos_after * fillable.sum(dim=1, keepdim=True)).ceil())
    noise = RowNoise(keys, seen.cumsum(dim=1) - 1)
    start = process_of(config).prior(noise.uniforms(0)[0])
    tokens = torch.where(fillable.to(tokens.device), start.to(tokens.device), tokens)
    sampler = sampler_of(options, config)
    its_own = {name: getattr(options, name) for name in options_of(sampler)}
    return Request(
        options=options,
        sampler=functools.partial(sampler, **{name: value for name, value in its_own.items() if value is not None}),
        # Room for a last step; without `steps`, each step of a row reveals something.
        steps_of_a_block=options.steps + 1 if "steps" in its_own else options.block_length or tokens.shape[1],
        tokens=tokens,
        fillable=fillable,
        seen=seen,
        noise=noise,
        processors=processors,
        early=early,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
    )


def merge_options(
    generation_config: MDLMGenerationConfig, given_config: MDLMGenerationConfig | None, given: dict
) -> tuple[MDLMGenerationConfig, set[str]]:
    """The call's options over its (or else the model's) configuration over the library's defaults, and the names asked for."""
    options = copy.deepcopy(generation_config if given_config is None else given_config)
    if not hasattr(options, "steps"):
        raise ValueError(f"generation_config must be an MDLMGenerationConfig, not a {type(options).__name__}")
    unknown = sorted(set(given) - set(DEFAULTS) - set(TOKENS))
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; generate() takes {sorted(DEFAULTS)}")
    if options.suppress_above is None:  # a fact of the model's vocabulary, which another configuration does not know
        options.suppress_above = getattr(generation_config, "suppress_above", None)
    asked = {name for name, value in given.items() if value is not None}
    if asked & set(LENGTHS):  # the call's length replaces the configuration's, whatever its name there
        for name in LENGTHS:
            setattr(options, name, None)
    if given_config is not None:
        asked |= {name for name in DEFAULTS if getattr(options, name, None) is not None}
    for name in (*DEFAULTS, *TOKENS):
        if given.get(name) is not None:
            setattr(options, name, given[name])
        elif getattr(options, name, None) is None:
            setattr(options, name, DEFAULTS.get(name))
    options.validate()
    return options, asked


def check_options(options: MDLMGenerationConfig, asked: set[str], config: MDLMConfig):
    """Raises ValueError for options that the model does not have, or that would have no effect; decides `coupling`."""
    samplers = SAMPLERS[config.diffusion_kind]
    if options.sampler not in samplers:
        raise ValueError(
            f"sampler {options.sampler!r} is for absorbing diffusion; this model is {config.diffusion_kind}: "
            f"{list(samplers)}"
        )
    used = options_of(samplers[options.sampler])
    of_samplers = {name for kind in SAMPLERS.values() for sampler in kind.values() for name in options_of(sampler)}
    for name in sorted(asked & of_samplers - set(used)):
        raise ValueError(
            f"{name} ({getattr(options, name)!r}) is not used by the sampler {options.sampler!r}, "
            f"which takes {list(used)}"
        )
    if options.locking == "interleaved" and "locking" in used:
        check_interleaved(options, config)
    options.coupling = is_coupled(options, asked, config)
    if {"last_step", "reveal_counts"} <= set(used) and "last_step" in asked:
        if shares_of(options.steps, options.locking, options.reveal_counts) is not None:
            raise ValueError(
                f"last_step ({options.last_step!r}) would find nothing left: locking='interleaved' and reveal_counts for "
                f"{options.steps} steps reveal every token in these"
            )
    if config.mask_token_id is None:
        for name, wrong in (
            ("precision", options.precision == "legacy_float32"),
            ("guidance_scale", options.guidance_scale is not None),
            ("eos_after", bool(options.eos_after)),
        ):
            if wrong:
                raise ValueError(f"{name} ({getattr(options, name)!r}) needs a [MASK]; this model is uniform")
    for token in set(options.suppress_tokens or ()) - set(range(config.vocab_size)):
        raise ValueError(f"suppress_tokens hold {token}, but the vocabulary is 0 .. {config.vocab_size - 1}")
    suppressed = suppressed_tokens(options, config)
    if suppressed and len(suppressed | {config.mask_token_id} - {None}) == config.vocab_size:
        names = [name for name in ("suppress_tokens", "suppress_above") if getattr(options, name)]
        raise ValueError(f"{' and '.join(names)} hold all {len(suppressed)} tokens, but must leave one to draw")
    if options.output_reveal_steps and not options.return_dict_in_generate:
        raise ValueError("output_reveal_steps needs return_dict_in_generate=True: the ids alone have no place for it")


def is_coupled(options: MDLMGenerationConfig, asked: set[str], config: MDLMConfig) -> bool:
    """Whether the tokens of a step are drawn jointly. Raises ValueError if that is asked for and cannot be."""
    has_one = getattr(config, "coupling", None) is not None
    fits = options.sampler in PLANNED and options.precision != "legacy_float32"
    if options.coupling and "coupling" in asked:
        if not has_one:
            raise ValueError(
                "coupling (True) needs a model that has one, and this has none: `trainer: coupling` trains it"
            )
        if not fits:
            raise ValueError(
                f"coupling (True) does not go with the sampler {options.sampler!r} in {options.precision}, which scores or "
                f"draws tokens one by one: take one of {list(PLANNED)}"
            )
    return has_one and fits and options.coupling is not False


def check_blocks_and_cache(options: MDLMGenerationConfig, asked: set[str], config: MDLMConfig):
    """Refuses blocks and caches that the model cannot have; a block model gets its own by default."""
    size = getattr(config, "block_size", None)
    if size is not None:
        if options.block_length not in (None, size):
            raise ValueError(
                f"block_length is {options.block_length}, but the model sees in blocks of {size}: leave it out, it is {size}"
            )
        options.block_length = size
    alone = options.guidance_scale is None and not options.compile
    if options.cache is None and size is not None and alone:
        options.cache = "exact"
    if options.cache in (None, "none"):
        return
    if not alone:
        raise ValueError(
            f"cache ({options.cache!r}) does not go with guidance_scale or compile: leave one of them out"
        )
    if config.mask_token_id is None:
        raise ValueError(
            f"cache ({options.cache!r}) needs a [MASK]; this model is uniform, and every step may change every token"
        )
    if (options.cache == "exact") != (size is not None):
        is_for = "a block model" if options.cache == "exact" else "a model in which every token sees every other"
        raise ValueError(f"cache ({options.cache!r}) is for {is_for}, and this one is not: leave it out")


def check_interleaved(options: MDLMGenerationConfig, config: MDLMConfig):
    """Refuses what locking='interleaved' does not go with: it needs N steps of equal size that reveal everything."""
    if options.sampler != "ancestral" or config.mask_token_id is None:
        raise ValueError(
            "locking 'interleaved' goes with the sampler 'ancestral' of masked diffusion alone, whose steps are fixed in "
            f"number and size, not with {options.sampler!r} of {config.diffusion_kind} diffusion: take locking='spread'"
        )


def suppressed_tokens(options: MDLMGenerationConfig, config: MDLMConfig) -> set[int]:
    """The tokens that are never drawn, by `suppress_tokens` and `suppress_above`."""
    first = config.vocab_size if options.suppress_above is None else options.suppress_above
    return {*(options.suppress_tokens or ()), *range(first, config.vocab_size)}


def end_of_sequence(options: MDLMGenerationConfig, config: MDLMConfig) -> tuple[list[int], int | None]:
    """The ids that end a sequence, and the one that pads it."""
    eos = config.eos_token_id if options.eos_token_id is None else options.eos_token_id
    eos = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    pads = (options.pad_token_id, config.pad_token_id, *eos)
    return eos, next((pad for pad in pads if pad is not None), None)


def check_end_of_sequence(
    options: MDLMGenerationConfig, asked: set[str], config: MDLMConfig, eos: list[int], pad: int | None
):
    for name in ("stop_at_eos", "eos_after"):
        if getattr(options, name) and not eos:
            raise ValueError(f"{name} needs an eos_token_id, in the call or in the model's configuration")
    if options.stop_at_eos or options.eos_after or asked & {"eos_token_id", "pad_token_id"}:
        for name, tokens in (("eos_token_id", eos), ("pad_token_id", [] if pad is None else [pad])):
            for token in tokens:
                if not is_index(token, config.vocab_size) or token == config.mask_token_id:
                    raise ValueError(
                        f"{name} is {token!r}, but must be a token other than the mask ({config.mask_token_id}) of the "
                        f"vocabulary 0 .. {config.vocab_size - 1}"
                    )


def sampler_of(options: MDLMGenerationConfig, config: MDLMConfig) -> Callable:
    if options.precision == "legacy_float32":
        return legacy_ancestral
    return SAMPLERS[config.diffusion_kind][options.sampler]


def lay_out(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    options: MDLMGenerationConfig,
    config: MDLMConfig,
    device: torch.device,
) -> tuple[torch.LongTensor, torch.BoolTensor, torch.BoolTensor]:
    """The canvas [B * n, length], and on the CPU: the positions to fill, and those that are not padding."""
    context = config.max_position_embeddings
    blank = BLANK if config.mask_token_id is None else config.mask_token_id
    if input_ids is None:
        input_ids = torch.empty(1, 0, dtype=torch.long, device=device)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in INTEGERS:
        raise ValueError(f"input_ids must be a tensor of integers, not {shown(input_ids)}")
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(
            f"input_ids must have the shape (batch_size, width) and at least one row, not {tuple(input_ids.shape)}"
        )
    if input_ids.numel() and not (0 <= input_ids.min() and input_ids.max() < config.vocab_size):
        raise ValueError(
            f"input_ids hold {input_ids.min().item()} .. {input_ids.max().item()}, but the vocabulary is "
            f"0 .. {config.vocab_size - 1}"
        )
    width = input_ids.shape[1]
    lengths = options.length, options.max_length, options.max_new_tokens and width + options.max_new_tokens
    default = width if (input_ids == blank).any() else context
    length = next((length for length in lengths if length is not None), default)
    if length > context and (options.block_length is None or getattr(config, "block_size", None)):
        way_out = "" if options.block_length else "; block_length goes beyond it"
        raise ValueError(f"length is {length}, but the model's context is {context} tokens{way_out}")
    if (options.block_length or 0) > context:
        raise ValueError(f"block_length is {options.block_length}, but the model's context is {context} tokens")
    if width > length:
        raise ValueError(f"input_ids are {width} tokens wide, but length is {length}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a tensor, not {shown(attention_mask)}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    tokens = torch.nn.functional.pad(input_ids.long(), (0, length - width), value=blank)
    seen = torch.nn.functional.pad(attention_mask.bool().cpu(), (0, length - width), value=True)
    fillable = (tokens == blank).cpu() & seen
    if not fillable.any(dim=1).all():
        if config.mask_token_id is None:
            raise ValueError(f"input_ids fill the whole length ({length}), and leave nothing to generate")
        raise ValueError(f"a row of input_ids holds no mask (id {blank}) to fill, and length ({length}) adds none")
    return tuple(x.repeat_interleave(options.num_return_sequences, dim=0) for x in (tokens, fillable, seen))


def keys_of(seed: int | Sequence[int] | None, generator: torch.Generator | None, rows: int) -> torch.LongTensor:
    """The keys of the rows' noise: all drawn from one seed or generator, or each from a seed of its own."""
    if seed is not None and generator is not None:
        raise ValueError("give a seed or a generator, not both")
    if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
        raise ValueError(f"generator must be a torch.Generator on the CPU, not {shown(generator)}")
    numbers = seed if isinstance(seed, Sequence) else [] if seed is None else [seed]
    if not all(is_index(number, 2**64) for number in numbers):
        raise ValueError(f"seed must be an integer in 0 .. 2**64 - 1 or a sequence of them, not {shown(seed)}")
    if not isinstance(seed, Sequence):
        return row_keys(rows, generator if seed is None else torch.Generator().manual_seed(seed))
    if len(seed) != rows:
        raise ValueError(f"seed holds {len(seed)} numbers, but there are {rows} rows")
    return torch.cat([row_keys(1, torch.Generator().manual_seed(number)) for number in seed])


def is_index(value, end: int) -> bool:
    """Whether `value` is an integer of 0 .. end - 1; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def shown(value) -> str:
    """A value for a message, shortened to one line."""
    words = " ".join(repr(value).split())
    return words if len(words) <= 100 else words[:100] + " ..."
