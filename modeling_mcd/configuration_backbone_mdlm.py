"""Configuration of a language model of transformers (Llama, Qwen, BERT, ...) that is used as a masked diffusion model."""

from .requirements_mdlm import MINIMUM  # noqa: F401  (first: an old transformers lacks names that the others import)


# isort: split

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig

from .checks_mdlm import COUNT, check_numbers, check_token_ids
from .configuration_mdlm import checked_coupling


# What lies between the trunk and the head of each kind of network, see `MDLMBackboneConfig.head_transform`.
HEAD_TRANSFORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "eurobert"), []),
    "bert": ["cls.predictions.transform"],
    "modernbert": ["head"],
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ["lm_head.dense", "gelu", "lm_head.layer_norm"]),
}
# Networks whose learned positions begin behind the padding token's id.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert")
WITHOUT_HEAD = "without_head"


@strict
class MDLMBackboneConfig(PreTrainedConfig):
    r"""
    A network of transformers and how it is read as a masked diffusion model: an [`MDLMBackboneForMaskedDiffusion`].

    Noise is absorbing, gamma(t) = 1 - t, and the network does not see the time: so LLaDA, Dream and the BERT kin are
    trained.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`): Of the network. Its attention is made bidirectional (`is_causal`
            is set to False) and its cache is turned off.
        mask_token_id (`int`): Id of `[MASK]`.
        logits_shift (`int`, *optional*, defaults to 0): 1 when the network predicts a token from the hidden state of the
            position before it, as autoregressive networks and Dream do. The first position is predicted from its own.
        head_transform (`list[str]` or `str`, *optional*): What is applied to the trunk's hidden states before the head,
            in order: paths of submodules, or names of activation functions; empty for nothing. `"without_head"`: the
            complete network is run with its head taken out. By default what the kind of the network is known to have.
        attention (`str`, *optional*, defaults to `"full"`): Who sees whom: every token every other; or, with `"block"`, every
            token its own block and those before it, as SDAR, Fast-dLLM v2 and BD3-LM are trained.
        block_size (`int`, *optional*): Tokens in a block, counted from the first token that is not padding; for `"block"`.
        max_position_embeddings (`int`, *optional*): Context, and the default length of a canvas; the network's by default.
        coupling (`dict`, *optional*): A chain that joins the tokens of a step, as in [`MDLMConfig`]; none by default.
        bos_token_id, eos_token_id, pad_token_id (*optional*): The network's by default.

    Raises:
        ValueError: names the field, its value and the rule: no network, one of an unknown kind without a
            `head_transform`, or a number out of range.
    """

    model_type = "mdlm_backbone"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    mask_token_id: int | None = None
    logits_shift: Literal[0, 1] = 0
    head_transform: list[str] | str | None = None
    attention: Literal["full", "block"] = "full"
    block_size: int | None = None
    diffusion_kind: Literal["absorbing"] = "absorbing"
    noise_schedule: Literal["linear"] = "linear"
    time_conditioning: bool = False
    max_position_embeddings: int | None = None
    coupling: dict | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        network = self.backbone_config
        if network is None:
            raise ValueError(
                "backbone_config is missing: give the configuration of the network, or use as_masked_diffusion"
            )
        if isinstance(network, dict):
            network = AutoConfig.for_model(**network)
        make_bidirectional(network)
        self.backbone_config = network
        for name in ("vocab_size", "hidden_size", "tie_word_embeddings"):
            setattr(self, name, getattr(network, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(network, name, None))
        self._check_context()
        self._check_blocks()
        if self.head_transform is None:
            self.head_transform = HEAD_TRANSFORMS.get(network.model_type)
        if self.head_transform is None:
            raise ValueError(
                f"head_transform is missing, and not known for model_type {network.model_type!r}: "
                "as_masked_diffusion(network, ...) finds it"
            )
        if isinstance(self.head_transform, str) and self.head_transform != WITHOUT_HEAD:
            raise ValueError(f"head_transform must be a list or {WITHOUT_HEAD!r}, not {self.head_transform!r}")
        if self.mask_token_id is None:
            raise ValueError("mask_token_id is missing: give the id of the network's mask token")
        check_token_ids(self)
        if self.coupling is not None:
            self.coupling = checked_coupling(self.coupling, self)
        # Replaced, never merged: an entry that names someone else's repository must not travel into what is saved.
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_backbone_mdlm.MDLMBackboneConfig",
            "AutoModel": "modeling_backbone_mdlm.MDLMBackboneForMaskedDiffusion",
            "AutoModelForMaskedLM": "modeling_backbone_mdlm.MDLMBackboneForMaskedDiffusion",
        }
        super().__post_init__(**kwargs)

    def _check_context(self):
        longest = getattr(self.backbone_config, "max_position_embeddings", None)
        if longest is not None:
            longest -= self.first_position
        if self.max_position_embeddings is None:
            self.max_position_embeddings = longest
        if self.max_position_embeddings is None:
            raise ValueError("max_position_embeddings is missing, and the network's configuration has none: give it")
        check_numbers(self, max_position_embeddings=COUNT)
        if longest is not None and self.max_position_embeddings > longest:
            raise ValueError(
                f"max_position_embeddings ({self.max_position_embeddings}) must not exceed the network's ({longest})"
            )

    def _check_blocks(self):
        check_numbers(self, block_size=COUNT)
        if (self.attention == "block") != (self.block_size is not None):
            raise ValueError(
                f"attention ({self.attention!r}) and block_size ({self.block_size}) do not fit: attention='block' needs a "
                "block_size, and no other has one"
            )
        if self.attention == "block" and "sliding_attention" in (
            getattr(self.backbone_config, "layer_types", None) or ()
        ):
            raise ValueError(
                f"attention is 'block', but the network ({self.backbone_config.model_type}) has layers with a sliding window, "
                "which blocks would take the place of"
            )

    @property
    def first_position(self) -> int:
        """The number that the network has for the first position."""
        network = self.backbone_config
        return network.pad_token_id + 1 if network.model_type in OFFSET_POSITIONS else 0


def make_bidirectional(config: PreTrainedConfig):
    """Sets a network's configuration, in place, to attention without a causal mask and to no cache.

    `is_causal = False` is transformers' own switch: its mask functions and attention kernels look at it in every forward.
    """
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        config.is_causal = False
    if getattr(config, "use_cache", None):
        config.use_cache = False


__all__ = ["MDLMBackboneConfig"]
