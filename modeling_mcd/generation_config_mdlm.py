"""Options of `generate`, saved beside the model as `generation_config.json`: what each means and which values it takes."""

import inspect

import torch
from transformers import GenerationConfig

from .draws_mdlm import PRECISIONS
from .sampling_mdlm import LAST_STEPS, REMASKING, SAMPLERS


CHOICES = {
    "sampler": tuple(SAMPLERS),
    "last_step": LAST_STEPS,
    "remasking": REMASKING,
    "precision": (*PRECISIONS, "legacy_float32"),
}
COUNTS = ("steps", "length", "block_length", "num_return_sequences", "top_k", "min_tokens", "max_tokens")
AT_LEAST_ZERO = ("temperature", "order_temperature", "entropy_bound", "guidance_scale")
PROBABILITIES = ("threshold", "eta", "kappa")
BETWEEN = ("t_on", "t_off", "alpha_on")
SWITCHES = ("stop_at_eos", "return_dict_in_generate", "output_reveal_steps", "compile")


class MDLMGenerationConfig(GenerationConfig):
    r"""
    Options of [`MDLMForMaskedDiffusion.generate`]. Those of one sampler are the keyword arguments of its function in
    `sampling_mdlm.py`, where their defaults stand; a sampler that does not use an option refuses it.

    Args:
        sampler (`str`, *optional*): One of `SAMPLERS`; `"ancestral"` by default.
        steps (`int`, *optional*): Denoising steps of each block, at least 1; 64 when neither the model nor the call says
            otherwise.
        last_step (`str`, *optional*): What follows the steps at t = 1e-5: a draw (`"ancestral"`), the likeliest tokens
            (`"greedy"`) or `"none"`. Masked diffusion needs none and does none by default, its steps end at t = 0;
            uniform diffusion does an `"ancestral"` one.
        order_temperature (`float`, *optional*): Randomness of an order that comes from the network.
        threshold, min_tokens, max_tokens (*optional*): See `adaptive`.
        entropy_bound (`float`, *optional*): See `entropy_bound`; nats.
        remasking, eta, t_on, t_off, alpha_on (*optional*): See `remdm`.
        kappa (`float`, *optional*): See `psi`.
        temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest token. Default 1.
        top_k (`int`, *optional*): Draw among that many likeliest tokens.
        top_p (`float`, *optional*): Draw among the likeliest tokens that have this probability together, in (0, 1].
        suppress_tokens (`list[int]`, *optional*): Tokens that are never drawn.
        precision (`str`, *optional*): Of the draws. `"float64"` by default; `"float32"`; or `"legacy_float32"`, the
            truncated draw of the original code, with the sampler `"ancestral"` alone.
        guidance_scale (`float`, *optional*): Classifier-free guidance against the masked prompt: logits are
            `without + scale * (with - without)`. Two forwards a step. None by default.
        length (`int`, *optional*): Tokens in a canvas; see `generate` for the default.
        block_length (`int`, *optional*): Fill the canvas in blocks of this many tokens, from left to right. Needed for
            a length beyond the model's context, of which a block then sees the last part. Each row is cut from its own
            first mask on.
        stop_at_eos (`bool`, *optional*): After each block, a row that holds an end-of-sequence token is done, and what
            follows it becomes padding. The ids are `eos_token_id` and `pad_token_id` here, or those of the model.
        compile (`bool`, *optional*): Run the trunk through `torch.compile`, with CUDA graphs on a GPU. Every row then
            takes part in every forward.
        num_return_sequences (`int`, *optional*): Samples for each canvas; 1 by default.
        return_dict_in_generate (`bool`, *optional*): Return an [`MDLMGenerationOutput`] instead of the ids alone.
        output_reveal_steps (`bool`, *optional*): With it, the step that revealed each token.

    Raises:
        ValueError: for an unknown argument or a value out of range.
    """

    def __init__(self, **kwargs):
        # The parent's own constructor is left out on purpose: its attributes are those of autoregressive decoding.
        for name in (*self._get_default_generation_params(), "bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, kwargs.pop(name, None))
        for name in ("_commit_hash", "_from_model_config", "transformers_version"):
            setattr(self, name, kwargs.pop(name, None))
        if kwargs:
            known = sorted(self._get_default_generation_params())
            raise ValueError(f"unknown generation arguments {sorted(kwargs)}; generate() takes {known}")
        self.validate()

    def validate(self, **unused_kwargs):
        def number(value) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        for names, allowed, fits in (
            (COUNTS, "an integer of at least 1", lambda x: isinstance(x, int) and x >= 1),
            (AT_LEAST_ZERO, "a finite number of at least 0", lambda x: 0 <= x < torch.inf),
            (PROBABILITIES, "a number in [0, 1]", lambda x: 0 <= x <= 1),
            (BETWEEN, "a number between 0 and 1", lambda x: 0 < x < 1),
            (("top_p",), "a number in (0, 1]", lambda x: 0 < x <= 1),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not (number(value) and fits(value)):
                    raise ValueError(f"{name} must be {allowed}, not {value!r}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, not {value!r}")
        for name in SWITCHES:
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        tokens = self.suppress_tokens
        if tokens is not None and not (
            isinstance(tokens, list | tuple) and all(isinstance(x, int) and number(x) for x in tokens)
        ):
            raise ValueError(f"suppress_tokens must be a list of token ids, not {tokens!r}")
        self._validate_together()

    def _validate_together(self):
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.remasking == "confidence" and self.eta is not None:
            raise ValueError(f"eta ({self.eta}) is not used by remasking='confidence'")
        for name in BETWEEN:
            if getattr(self, name) is not None and self.remasking != "loop":
                raise ValueError(f"{name} ({getattr(self, name)}) is used by remasking='loop' alone")
        if (self.t_off or 0.05) >= (self.t_on or 0.55):
            raise ValueError(f"t_off ({self.t_off or 0.05}) must be below t_on ({self.t_on or 0.55})")
        if self.precision == "legacy_float32":
            for name, wrong in (
                ("sampler", self.sampler not in (None, "ancestral")),
                ("temperature", self.temperature == 0),
                ("top_k", self.top_k is not None),
                ("top_p", self.top_p is not None),
            ):
                if wrong:
                    raise ValueError(
                        f"{name} ({getattr(self, name)!r}) does not go with precision='legacy_float32', which is the "
                        "ancestral sampler of the original code at a temperature above 0"
                    )

    @staticmethod
    def _get_default_generation_params() -> dict:
        names = (*CHOICES, *COUNTS, *AT_LEAST_ZERO, *PROBABILITIES, *BETWEEN, "top_p", "suppress_tokens", *SWITCHES)
        defaults = {"sampler": "ancestral", "steps": 64, "temperature": 1.0, "precision": "float64"}
        defaults |= {"num_return_sequences": 1} | dict.fromkeys(SWITCHES, False)
        return dict.fromkeys(names) | defaults

    @classmethod
    def from_model_config(cls, model_config):
        raise NotImplementedError("the options of masked diffusion are not part of a model configuration")


def options_of(sampler) -> tuple[str, ...]:
    """The options that a sampler uses: its keyword arguments."""
    return tuple(inspect.signature(sampler).parameters)[1:]


__all__ = ["MDLMGenerationConfig", "options_of"]
