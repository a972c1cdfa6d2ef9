"""Options of `generate`, saved beside the model as `generation_config.json`: what each means and the values it takes."""

from itertools import pairwise

import torch
from transformers import GenerationConfig

from .cache_mdlm import CACHES
from .checks_mdlm import ABOVE_0_TO_1, BELOW_1, COUNT, INSIDE_0_1, NOT_NEGATIVE, WITHIN_0_1, check_numbers
from .draws_mdlm import PRECISIONS
from .locking_mdlm import LOCKINGS
from .reveal_grid_mdlm import LAST_STEPS
from .sampling_mdlm import LOOP_FROM, LOOP_TO, ORDERS, REMASKING, SAMPLERS


CHOICES = {
    "sampler": SAMPLERS[
        "absorbing"
    ].keys(),  # those of uniform-state models are among them; a view, so that more may come
    "locking": LOCKINGS,
    "last_step": LAST_STEPS,
    "remasking": REMASKING,
    "order": ORDERS,
    "precision": (*PRECISIONS, "legacy_float32"),
    "cache": CACHES,
}
LENGTHS = ("length", "max_length", "max_new_tokens")
LOOP = ("t_on", "t_off", "alpha_on")
COUNTS = ("steps", *LENGTHS, "block_length", "num_return_sequences", "top_k", "suppress_above")
COUNTS += ("min_tokens", "max_tokens", "max_steps")
NUMBERS = (
    dict.fromkeys(COUNTS, COUNT)
    | dict.fromkeys(("temperature", "order_temperature", "entropy_bound", "guidance_scale"), NOT_NEGATIVE)
    | dict.fromkeys(("threshold", "eta", "kappa"), WITHIN_0_1)
    | dict.fromkeys(LOOP, INSIDE_0_1)
    | {"top_p": ABOVE_0_TO_1, "eos_after": BELOW_1}
)
SWITCHES = ("stop_at_eos", "return_dict_in_generate", "output_reveal_steps", "compile", "coupling")
DEFAULTS = {"sampler": "ancestral", "steps": 64, "temperature": 1.0, "precision": "float64", "num_return_sequences": 1}
DEFAULTS |= {"coupling": None}  # on where it can be
DEFAULTS = (
    dict.fromkeys((*CHOICES, *NUMBERS, "suppress_tokens", "reveal_counts")) | dict.fromkeys(SWITCHES, False) | DEFAULTS
)
DREAM_LENGTH = {"steps": 256, "max_new_tokens": 256}  # a step for each token, as on GSM8K
# Published settings by name, see `MDLMGenerationConfig.preset`.
PRESETS = {
    # LLaDA's generate.py (arXiv 2502.09992): low-confidence remasking without randomness, in one block.
    "llada_low_confidence": {
        **{"sampler": "confidence", "temperature": 0.0},
        **{"steps": 128, "max_new_tokens": 128, "block_length": 128},
    },
    # CD4LM's evaluation of it: all tokens above a threshold, no early end, a capped number of steps.
    "cd4lm_adaptive": {
        **{"sampler": "adaptive", "temperature": 0.0, "threshold": 0.95, "max_tokens": 32},
        **{"block_length": 32, "max_steps": 32, "eos_after": 0.3},
    },
    # Fast-dLLM's decoding of LLaDA and Dream (arXiv 2505.22618): all tokens above a threshold, and an approximate cache.
    "fast_dllm": {
        **{"sampler": "adaptive", "temperature": 0.0, "threshold": 0.9},
        **{"max_new_tokens": 256, "block_length": 32, "cache": "dual"},
    },
    # Dream's evaluation of its instruction model (arXiv 2508.15487), and the two other orders of its code.
    **{
        f"dream_{name}": {"sampler": "dream", "order": order, "temperature": 0.1, "top_p": 0.9} | DREAM_LENGTH
        for name, order in (("entropy", "entropy"), ("maskgit_plus", "confidence"), ("topk_margin", "margin"))
    },
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class MDLMGenerationConfig(GenerationConfig):
    r"""
    Options of [`MDLMForMaskedDiffusion.generate`]. Those of one sampler are the keyword arguments of its function in
    `sampling_mdlm.py`, which has their defaults; a sampler refuses an option that it does not use.

    Args:
        sampler (`str`, *optional*): One of `SAMPLERS`; `"ancestral"` by default.
        steps (`int`, *optional*): Denoising steps of each block, at least 1; 64 when neither the model nor the call says
            otherwise.
        locking (`str`, *optional*): How the uniforms that decide when each token is revealed hang together, one of
            `LOCKINGS`; `"independent"` by default. Samplers whose order comes from the network make no use of it, and
            `"interleaved"` goes with `"ancestral"` of masked diffusion alone.
        reveal_counts (`dict`, *optional*): For some numbers of steps, the fractions of the tokens that are visible after
            each step, such as `{"4": [0.1, 0.3, 0.6, 1.0]}`; `ancestral` and `random` take them in place of linear times.
            Other numbers of steps stay as they are, and `{}` stands for none.
        last_step (`str`, *optional*): What follows the steps, at t = 1e-5: a draw (`"ancestral"`), the likeliest tokens
            (`"greedy"`) or `"none"`. By default masked diffusion has no last step, since its steps end at t = 0, and
            uniform diffusion has an `"ancestral"` one.
        order_temperature (`float`, *optional*): Randomness of an order that comes from the network.
        order (`str`, *optional*): See `dream`.
        threshold, min_tokens, max_tokens, max_steps (*optional*): See `adaptive`.
        entropy_bound (`float`, *optional*): See `entropy_bound`; nats.
        remasking, eta, t_on, t_off, alpha_on (*optional*): See `remdm`.
        kappa (`float`, *optional*): See `psi`.
        temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest token. Default 1.
        top_k (`int`, *optional*): Draw among this many likeliest tokens.
        top_p (`float`, *optional*): Draw among the likeliest tokens that together have this probability, in (0, 1].
        suppress_tokens (`list[int]`, *optional*): Tokens that are never drawn.
        suppress_above (`int`, *optional*): The tokens from this id on are never drawn: those of a vocabulary that is
            larger than its tokenizer.
        eos_after (`float`, *optional*): No end-of-sequence token is drawn in the first part of a row's tokens to fill, which
            is this share of them, in [0, 1), rounded up (CD4LM's guard).
        precision (`str`, *optional*): Of the draws: `"float64"` by default; `"float32"`; or `"legacy_float32"`, the
            truncated draw of the original code, with the sampler `"ancestral"` alone.
        guidance_scale (`float`, *optional*): Classifier-free guidance against the masked prompt: logits are
            `without + scale * (with - without)`. Costs two forwards a step. None by default.
        length (`int`, *optional*): Tokens in a canvas, prompt included; see `generate` for the default.
        max_length (`int`, *optional*): The name that transformers has for `length`.
        max_new_tokens (`int`, *optional*): Masks to append to `input_ids`, instead of a `length`.
        block_length (`int`, *optional*): Fill the canvas in blocks of this many tokens, from left to right. Needed for
            a length beyond the model's context; a block then sees the last part of the row. Each row is cut from its own
            first mask on. A block model's own blocks, which are counted from the first token, by default and no others.
        cache (`str`, *optional*): Keys and values that are kept between forwards, see `cache_mdlm.py`. `"exact"` for a block
            model, and its default; `"none"`; or, approximate and never the default, `"prefix"` and `"dual"` of Fast-dLLM.
        stop_at_eos (`bool`, *optional*): After each block, a row that holds an end-of-sequence token is done, and what
            follows that token becomes padding. The ids are `eos_token_id` and `pad_token_id` here, or those of the model.
        coupling (`bool`, *optional*): Draw the tokens of a step jointly, through the model's chain. By default where the model
            has one and the sampler is one of `PLANNED`. The temperature sharpens the draw of each state and of each token
            given its state; `top_k` and `top_p` are of the latter.
        compile (`bool`, *optional*): Run the trunk through `torch.compile`, with CUDA graphs on a GPU. Every row then
            takes part in every forward.
        num_return_sequences (`int`, *optional*): Samples for each canvas; 1 by default.
        return_dict_in_generate (`bool`, *optional*): Return an [`MDLMGenerationOutput`] instead of the ids alone.
        output_reveal_steps (`bool`, *optional*): Include in it the step that revealed each token.

    Raises:
        ValueError: for an unknown argument or a value out of range.
    """

    def __init__(self, **kwargs):
        # The parent's own constructor is left out on purpose: its attributes are those of autoregressive decoding.
        for name in (*DEFAULTS, *TOKENS, "_commit_hash", "_from_model_config", "transformers_version"):
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            raise ValueError(f"unknown generation arguments {sorted(kwargs)}; generate() takes {sorted(DEFAULTS)}")
        self.validate()

    @classmethod
    def preset(cls, name: str, **changes) -> "MDLMGenerationConfig":
        """The settings that a paper's code publishes, see `preset_options`.

        Raises:
            ValueError: for an unknown name, or a change that is refused.
        """
        return cls(**preset_options(name, changes))

    def validate(self, **unused_kwargs):
        check_numbers(self, **NUMBERS)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in list(choices):
                raise ValueError(f"{name} must be one of {list(choices)}, not {value!r}")
        for name in SWITCHES:
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_reveal_counts(self.reveal_counts)
        tokens = self.suppress_tokens
        if tokens is not None and not (
            isinstance(tokens, list | tuple) and all(isinstance(x, int) and not isinstance(x, bool) for x in tokens)
        ):
            raise ValueError(f"suppress_tokens must be a list of token ids, not {tokens!r}")
        self._validate_together()

    def _validate_together(self):
        lengths = [f"{name} ({getattr(self, name)})" for name in LENGTHS if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"give one length, not {' and '.join(lengths)}")
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.remasking == "confidence" and self.eta is not None:
            raise ValueError(f"eta ({self.eta}) is not used by remasking='confidence'")
        for name in LOOP:
            if getattr(self, name) is not None and self.remasking != "loop":
                raise ValueError(f"{name} ({getattr(self, name)}) is used by remasking='loop' alone")
        if self.locking == "interleaved" and self.reveal_counts:
            raise ValueError(
                "reveal_counts do not go with locking='interleaved', whose steps reveal equal numbers: give reveal_counts={}"
            )
        t_on, t_off = self.t_on or LOOP_FROM, self.t_off or LOOP_TO
        if t_off >= t_on:
            raise ValueError(f"t_off ({t_off}) must be below t_on ({t_on})")
        if self.precision == "legacy_float32":
            for name, wrong in (
                ("sampler", self.sampler not in (None, "ancestral")),
                ("temperature", self.temperature == 0),
                ("locking", self.locking not in (None, "independent")),
                ("reveal_counts", bool(self.reveal_counts)),
                ("top_k", self.top_k is not None),
                ("top_p", self.top_p is not None),
            ):
                if wrong:
                    raise ValueError(
                        f"{name} ({getattr(self, name)!r}) does not go with precision='legacy_float32', which is the "
                        "ancestral sampler of the original code at a temperature above 0"
                    )

    def draw_options(self) -> dict:
        """The keyword arguments of every draw: temperature, top_k, top_p and dtype."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p")} | {
            "dtype": PRECISIONS.get(self.precision, torch.float64)
        }

    @staticmethod
    def _get_default_generation_params() -> dict:
        return dict(DEFAULTS)

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        try:
            content = super()._dict_from_json_file(json_file)
        except ValueError as error:
            raise ValueError(f"{json_file} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{json_file} must hold a JSON object, not a {type(content).__name__}")
        return content

    @classmethod
    def from_model_config(cls, model_config):
        raise NotImplementedError("the options of masked diffusion are not part of a model configuration")


def preset_options(name: str, changes: dict) -> dict:
    """The options of one of `PRESETS`, with those changed that are not None. A length replaces the preset's, whatever its name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, not {name!r}")
    changes = {option: value for option, value in changes.items() if value is not None}
    dropped = LENGTHS if changes.keys() & set(LENGTHS) else ()
    return {option: value for option, value in PRESETS[name].items() if option not in dropped} | changes


def check_reveal_counts(counts: dict | None):
    """Raises ValueError unless every number of steps has as many fractions, increasing from above 0 to exactly 1."""

    def is_right(steps, shares) -> bool:
        return (
            str(steps).isdecimal()
            and isinstance(shares, list | tuple)
            and len(shares) == int(steps) > 0
            and all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
            and all(earlier < later for earlier, later in pairwise([0, *shares]))
            and shares[-1] == 1
        )

    if counts is not None and not (isinstance(counts, dict) and all(is_right(*item) for item in counts.items())):
        raise ValueError(
            "reveal_counts must give each number of steps as many fractions, increasing to 1, such as "
            f"{{'2': [0.4, 1.0]}}, not {counts!r}"
        )


__all__ = ["MDLMGenerationConfig"]
