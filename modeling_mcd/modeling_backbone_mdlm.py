"""A language model of transformers as a masked diffusion model: its trunk, transform and head behind our interface."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.utils import can_return_tuple

from .block_attention_mdlm import attention_bias, check_attention, sees_blocks, sees_clean_blocks
from .cache_mdlm import Memory
from .checks_mdlm import check_canvas, check_integers, check_positions, check_shape
from .configuration_backbone_mdlm import WITHOUT_HEAD, MDLMBackboneConfig
from .coupling_mdlm import MDLMCoupling
from .generation_mdlm import MDLMGenerationMixin
from .head_mdlm import HeadRows


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers with a head over the vocabulary: the masked language model of this kind, or the causal one.

    Raises:
        ValueError: transformers has none.
    """
    for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"transformers has no language model for the model_type {config.model_type!r}")


class MDLMBackboneForMaskedDiffusion(MDLMGenerationMixin, PreTrainedModel):
    """p(x_0 | z_t) of a network that was not made for this library, see `as_masked_diffusion`.

    Args:
        config: of the network and of how it is read.
        network: of `config.backbone_config`, used as it is and not copied; a new one when not given.
    """

    config: MDLMBackboneConfig
    config_class = MDLMBackboneConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MDLMBackboneConfig, network: PreTrainedModel | None = None):
        super().__init__(config)
        if network is None:  # by its class: under ZeRO-3, `from_config` would partition it, wanted or not
            network = language_model_class(config.backbone_config)(config.backbone_config)
        self.network = network
        self.takes_positions = "position_ids" in inspect.signature(network.base_model.forward).parameters
        self.coupling = None if config.coupling is None else MDLMCoupling(config)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        if isinstance(module, MDLMCoupling):
            module.initialize()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.network.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.network.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.network.set_output_embeddings(new_embeddings)

    def trunk(self):
        return self.hidden_at

    def padding_mask(self, seen: torch.BoolTensor) -> torch.Tensor:
        """As it is: layers with a sliding window need to make a mask of their own from it."""
        return seen

    def hidden_at(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        hidden_rows: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """What the head is given to predict the tokens at `hidden_rows` [B, R], or at all positions: [B, R or L, d]."""
        states = self.states(input_ids, attention_mask, timesteps, position_ids, inputs_embeds, **kwargs)
        sources = self.sources(states, attention_mask)
        if hidden_rows is not None:
            check_shape("hidden_rows", hidden_rows, (len(states), hidden_rows.shape[-1]))
            check_integers("hidden_rows", hidden_rows, states.shape[1])
            sources = sources.gather(1, hidden_rows)
        return BaseModelOutput(last_hidden_state=self.transform(states.flatten(0, 1)[sources]))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        hidden_rows: torch.Tensor | None = None,
        clean_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput | HeadRows:
        """As `MDLMForMaskedDiffusion.forward`. The logits at a position are those of its token, whatever the network's shift.

        Args:
            input_ids: [B, L] int64; or `inputs_embeds` [B, L, d].
            attention_mask: [B, L], 0 for padding, which is neither seen nor counted in positions.
            timesteps: [B], ignored: the network does not see the time.
            position_ids: [B, L]; by default the positions of the tokens that are not padding.
            labels: [B, L] int64, -100 for none; the loss is the mean cross-entropy of the others, float32.
            hidden_rows: positions at which to stop before the head, a mask [B, L] or indices [R] into the flattened
                canvas: the result is then a `HeadRows`. Not together with `labels`.
            clean_ids: [B, L] int64, of a block model in training: what each token sees of the blocks before its own, instead
                of `input_ids` themselves. The network then runs on both, 2 L tokens.

        Raises:
            ValueError: for inputs that do not fit each other, the vocabulary or the context.
        """
        if hidden_rows is not None and labels is not None:
            raise ValueError(
                "labels and hidden_rows exclude each other: compute the loss from the rows that are returned"
            )
        states = self.states(input_ids, attention_mask, timesteps, position_ids, inputs_embeds, clean_ids, **kwargs)
        sources = self.sources(states, attention_mask, clean=clean_ids is not None)
        if hidden_rows is not None:
            check_positions("hidden_rows", hidden_rows, sources.shape)
            return self.head_rows(states, sources.flatten()[hidden_rows.flatten()])
        if labels is not None:
            check_shape("labels", labels, sources.shape)
            check_integers("labels", labels, self.config.vocab_size, ignored=-100)
        logits = self.get_output_embeddings()(self.transform(states.flatten(0, 1)[sources]))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long())
        return MaskedLMOutput(loss=loss, logits=logits)

    def states(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        timesteps: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        clean_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The trunk's hidden states of every position [B, L, d], not shifted and not transformed.

        With `clean_ids` those of the clean tokens follow: [B, 2 L, d].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_canvas(self.config, input_ids, inputs_embeds, attention_mask, timesteps)
        canvas = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, canvas.shape[:2])
        positions = self.positions(canvas, attention_mask) if position_ids is None else position_ids
        if clean_ids is not None:
            if self.config.attention != "block" or inputs_embeds is not None:
                raise ValueError("clean_ids are for models with attention='block', together with input_ids")
            check_shape("clean_ids", clean_ids, input_ids.shape)
            check_integers("clean_ids", clean_ids, self.config.vocab_size)
            input_ids = torch.cat([input_ids, clean_ids], dim=1)
        attention_mask = self.who_sees_whom(positions, attention_mask, clean_ids is not None)
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if self.takes_positions:
            inputs["position_ids"] = positions if clean_ids is None else positions.repeat(1, 2)
        return self.run_network(**inputs, attention_mask=attention_mask, **kwargs)

    def run_network(self, **inputs) -> torch.Tensor:
        """The trunk's hidden states, not transformed."""
        if self.config.head_transform == WITHOUT_HEAD:
            with without_forward(self.get_output_embeddings()):
                return self.network(**inputs).logits
        return self.network.base_model(**inputs)[0]

    def check_cache(self, cache: str):
        network = self.config.backbone_config
        check_attention(network._attn_implementation)
        parameters = inspect.signature(self.network.base_model.forward).parameters
        if not {"past_key_values", "position_ids"} <= parameters.keys():
            raise ValueError(
                f"cache is {cache!r}, but a {type(self.network).__name__} takes no keys and values from outside"
            )
        if "sliding_attention" in (getattr(network, "layer_types", None) or ()):
            raise ValueError(
                f"cache is {cache!r}, but {type(self.network).__name__} has layers with a sliding window, for which there is none"
            )

    def states_at(
        self,
        input_ids: torch.LongTensor,
        timesteps: torch.Tensor,
        columns: torch.LongTensor,
        mask: torch.BoolTensor,
        memory: Memory,
    ) -> torch.Tensor:
        """As in the mixin. Under a shift the first of these tokens is predicted from its own state, the others are not."""
        states = self.run_network(
            input_ids=input_ids,
            position_ids=columns + self.config.first_position,
            attention_mask=attention_bias(mask, self.config.backbone_config._attn_implementation, self.dtype),
            past_key_values=memory,
        )
        if self.config.logits_shift:
            states = torch.cat([states[:, :1], states[:, :-1]], dim=1)
        return self.transform(states)

    def positions(self, canvas: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        """The number of each token in its row [B, L], padding not counted."""
        seen = torch.ones(canvas.shape[:2], device=canvas.device) if attention_mask is None else attention_mask
        return self.config.first_position + (seen.long().cumsum(dim=1) - 1).clamp(min=0)

    def who_sees_whom(
        self, positions: torch.LongTensor, attention_mask: torch.Tensor | None, clean: bool = False
    ) -> torch.Tensor | None:
        """The network's `attention_mask` for tokens at these positions [B, L]: their padding, or a mask of blocks."""
        if self.config.attention == "full":
            return attention_mask
        seen = None if attention_mask is None else attention_mask.bool()
        mask = (sees_clean_blocks if clean else sees_blocks)(self.blocks_at(positions), seen)
        return attention_bias(mask, self.config.backbone_config._attn_implementation, self.dtype)

    def blocks_at(self, positions: torch.LongTensor) -> torch.LongTensor:
        """The number of the block that each position is in."""
        return (positions - self.config.first_position) // self.config.block_size

    def sources(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, shift: int | None = None, clean: bool = False
    ) -> torch.LongTensor:
        """Which hidden state predicts each token, as indices into the flattened states: [B, L]. `shift`: another than ours.

        The token's own; or, under a shift, that of the token before it, if there is one. These are indices and not a mask
        that is moved, since the first two tokens of a row have one source. With `clean`, where the states of L clean tokens
        follow those of L noisy ones, the first token of a block is predicted from the clean one before it: the last token
        of a block that is finished, as in sampling.
        """
        batch, width = states.shape[:2]
        length = width // 2 if clean else width
        own = torch.arange(batch * width, device=states.device).view(batch, width)[:, :length]
        if not (self.config.logits_shift if shift is None else shift):
            return own
        follows = torch.ones_like(own, dtype=torch.bool)
        follows[:, 0] = False
        if attention_mask is not None:
            follows[:, 1:] = attention_mask[:, :-1].bool()  # padding predicts nothing
        sources = own - follows.long()
        if clean:
            blocks = self.blocks_at(self.positions(own, attention_mask))
            sources = sources + length * (follows & (blocks != blocks.roll(1, dims=1))).long()
        return sources

    def head_rows(self, states: torch.Tensor, sources: torch.LongTensor) -> HeadRows:
        """The rows that the head makes of the hidden states [B, L, d] at flat indices [R]."""
        head = self.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        return HeadRows(
            hidden=self.transform(states.flatten(0, 1)[sources]),
            weight=weight.view_as(weight),
            bias=weight.new_zeros(1).expand(len(weight)) if bias is None else bias.view_as(bias),
            mask_token_id=self.config.mask_token_id,
            coupling=None if self.coupling is None else self.coupling(self.get_input_embeddings().weight),
        )

    def transform(self, hidden: torch.Tensor) -> torch.Tensor:
        """From the trunk's hidden states [..., d] to what the head is given."""
        if self.config.head_transform == WITHOUT_HEAD:
            return hidden
        for name in self.config.head_transform:
            hidden = ACT2FN[name](hidden) if name in ACT2FN else self.network.get_submodule(name)(hidden)
        return hidden


@contextlib.contextmanager
def without_forward(module: nn.Module) -> Iterator[None]:
    """A context in which a module hands on its input. Its hooks run, so that whoever shards its weights sees it used."""
    module.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del module.forward


__all__ = ["MDLMBackboneForMaskedDiffusion"]
