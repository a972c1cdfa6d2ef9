"""Configuration of the diffusion language model: absorbing (MDLM, arXiv 2406.07524) or uniform (Duo, arXiv 2506.10892)."""

from .requirements_mdlm import MINIMUM  # noqa: F401  (first: an old transformers lacks names that the others import)


# isort: split

import difflib
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .checks_mdlm import (
    BELOW_1,
    COUNT,
    INSIDE_0_1,
    NOT_NEGATIVE,
    POSITIVE,
    check_number,
    check_numbers,
    check_token_ids,
)
from .noise_schedule_mdlm import NOISE_SCHEDULES


COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NUMBERS = dict.fromkeys((*COUNTS, "conditioning_size", "max_position_embeddings"), COUNT) | {
    "hidden_dropout": BELOW_1,
    "layer_norm_eps": NOT_NEGATIVE,
    "rope_theta": POSITIVE,
    "initializer_range": NOT_NEGATIVE,
    "noise_epsilon": INSIDE_0_1,
}
COUPLING = {"states": 128, "levels": 4, "emission": "table", "window": None, "shared": True}
EMISSIONS = ("table", "embedding")
# Keywords of other models that look like ours and are none of our business.
FOREIGN = ("sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id")


@strict
class MDLMConfig(PreTrainedConfig):
    r"""
    Shapes and diffusion process of an [`MDLMForMaskedDiffusion`]. The defaults are the published 169M model
    (`kuleshov-group/mdlm-owt`). Sampling options live in [`MDLMGenerationConfig`].

    Args:
        vocab_size (`int`, *optional*, defaults to 50258): Tokens, `[MASK]` included.
        hidden_size (`int`, *optional*, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, *optional*): Width inside an MLP; `4 * hidden_size` when not given.
        num_hidden_layers (`int`, *optional*, defaults to 12): Blocks.
        num_attention_heads (`int`, *optional*, defaults to 12): Attention heads; must divide `hidden_size`.
        conditioning_size (`int`, *optional*, defaults to 128): Width of the noise embedding that drives the modulation.
        max_position_embeddings (`int`, *optional*, defaults to 1024): Context, and the default length of a canvas.
        hidden_dropout (`float`, *optional*, defaults to 0.1): Dropout on each branch before it joins the residual stream.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of the layer norms.
        rope_theta (`float`, *optional*, defaults to 10000.0): Base of the rotary position embedding.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the normal initialisation.
        rotary_precision (`str`, *optional*, defaults to `"float32"`): `"float32"` multiplies the rotary embedding in
            float32 and rounds once, whatever the dtype; `"native"` works in the dtype of the queries, as Duo's code does.
        diffusion_kind (`str`, *optional*, defaults to `"absorbing"`): What noise does to a token: `"absorbing"` turns
            it into `[MASK]`, `"uniform"` into any token of the vocabulary.
        time_conditioning (`bool`, *optional*): Whether the network sees the noise level; by default only under uniform
            noise. Off, it is given sigma = 0 and the modulation is a constant of the network.
        noise_schedule (`str`, *optional*, defaults to `"log_linear"`): Name of gamma(t), see `noise_schedule_mdlm.py`.
        noise_epsilon (`float`, *optional*, defaults to 1e-3): The schedule's epsilon, in (0, 1). Under `"log_linear"` it is
            gamma(1), the fraction still visible at full noise.
        mask_token_id (`int`, *optional*): Id of `[MASK]`; the last token when not given. Uniform noise has none.
        coupling (`dict`, *optional*): A chain that joins the tokens of a step, see `coupling_mdlm.py`; none by default.
            `states` (128 by default); `levels`, equal parts of the visible fraction, in each of which the chain is another (4);
            `shared`, one chain, which each level takes to powers of its own (true), or one for each level (false);
            `emission`, `"table"` or, for large vocabularies, `"embedding"`: of low rank, against the token embedding;
            `window`, positions after which the chain begins anew (null: never).

    Raises:
        ValueError: names the field, its value and the rule: for a number out of range, heads that do not divide the width,
            a token outside the vocabulary, a mask or a coupling under uniform noise, or a misspelt field.
    """

    model_type = "mdlm_mcd"

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    conditioning_size: int = 128
    max_position_embeddings: int = 1024
    hidden_dropout: float = 0.1
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    rotary_precision: Literal["float32", "native"] = "float32"
    diffusion_kind: Literal["absorbing", "uniform"] = "absorbing"
    time_conditioning: bool | None = None
    noise_schedule: str = "log_linear"
    noise_epsilon: float = 1e-3
    mask_token_id: int | None = None
    coupling: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        check_keywords(kwargs)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.time_conditioning is None:
            self.time_conditioning = self.diffusion_kind == "uniform"
        if self.mask_token_id is None and self.diffusion_kind == "absorbing":
            self.mask_token_id = self.vocab_size - 1
        check_numbers(self, **NUMBERS)
        if self.noise_schedule not in list(NOISE_SCHEDULES):
            raise ValueError(f"noise_schedule must be one of {list(NOISE_SCHEDULES)}, not {self.noise_schedule!r}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_attention_heads "
                f"({self.num_attention_heads}): every head has an even width, for the rotary embedding"
            )
        if self.mask_token_id is not None and self.diffusion_kind == "uniform":
            raise ValueError(
                f"mask_token_id ({self.mask_token_id}) must be null under uniform diffusion: nothing is masked"
            )
        check_token_ids(self)
        if self.coupling is not None:
            self.coupling = checked_coupling(self.coupling, self)
        # Replaced, never merged: an entry that names someone else's repository must not travel into what is saved.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_mdlm.MDLMConfig",
            "AutoModel": "modeling_mdlm.MDLMForMaskedDiffusion",
            "AutoModelForMaskedLM": "modeling_mdlm.MDLMForMaskedDiffusion",
        }
        super().__post_init__(**kwargs)


def checked_coupling(settings: dict, config: MDLMConfig) -> dict:
    """The settings of a coupling for a model, complete. Raises ValueError, naming the one at fault and its value."""
    unknown = sorted(set(settings) - set(COUPLING))
    if unknown:
        raise ValueError(f"coupling has no {unknown[0]!r}: it takes {list(COUPLING)}")
    settings = COUPLING | settings
    if config.diffusion_kind == "uniform":
        raise ValueError(f"coupling ({settings}) must be null under uniform diffusion: it joins masked tokens")
    if getattr(config, "attention", "full") == "block":
        raise ValueError(
            f"coupling ({settings}) must be null with attention='block': a chain is taught on complete texts"
        )
    for name in ("states", "levels", "window"):
        if settings[name] is not None or name != "window":
            check_number(f"coupling: {name}", settings[name], COUNT)
    if not isinstance(settings["shared"], bool):
        raise ValueError(f"coupling: shared must be true or false, not {settings['shared']!r}")
    if settings["emission"] not in EMISSIONS:
        raise ValueError(f"coupling: emission must be one of {list(EMISSIONS)}, not {settings['emission']!r}")
    if (settings["window"] or 0) > config.max_position_embeddings:
        raise ValueError(
            f"coupling: window ({settings['window']}) must not exceed the context, {config.max_position_embeddings} "
            "tokens; null is a chain along all of it"
        )
    return settings


def check_keywords(keywords: dict):
    """Raises ValueError for a keyword that is a field of ours misspelt.

    Other keywords are kept, as transformers keeps them: saved configurations hold many that are not ours.
    """
    for name, value in keywords.items():
        nearest = difflib.get_close_matches(name, MDLMConfig.__annotations__, 1, cutoff=0.7)
        if nearest and name not in FOREIGN and not hasattr(PreTrainedConfig, name):
            raise ValueError(f"unknown configuration field {name} ({value!r}): did you mean {nearest[0]}?")


__all__ = ["MDLMConfig"]
