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

from .checks_mdlm import check_canvas, check_integers, check_positions, check_shape
from .configuration_backbone_mdlm import WITHOUT_HEAD, MDLMBackboneConfig
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
        if network is None:  # by its class: under ZeRO-3, `from_config` would partition a teacher too
            network = language_model_class(config.backbone_config)(config.backbone_config)
        self.network = network
        self.takes_positions = "position_ids" in inspect.signature(network.base_model.forward).parameters
        self.post_init()

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

        Raises:
            ValueError: for inputs that do not fit each other, the vocabulary or the context.
        """
        if hidden_rows is not None and labels is not None:
            raise ValueError(
                "labels and hidden_rows exclude each other: compute the loss from the rows that are returned"
            )
        states = self.states(input_ids, attention_mask, timesteps, position_ids, inputs_embeds, **kwargs)
        sources = self.sources(states, attention_mask)
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
        **kwargs,
    ) -> torch.Tensor:
        """The trunk's hidden states of every position [B, L, d], not shifted and not transformed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_canvas(self.config, input_ids, inputs_embeds, attention_mask, timesteps)
        canvas = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, canvas.shape[:2])
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        if self.takes_positions:
            inputs["position_ids"] = self.positions(canvas, attention_mask) if position_ids is None else position_ids
        if self.config.head_transform == WITHOUT_HEAD:
            with without_forward(self.get_output_embeddings()):
                return self.network(**inputs, attention_mask=attention_mask, **kwargs).logits
        return self.network.base_model(**inputs, attention_mask=attention_mask, **kwargs)[0]

    def positions(self, canvas: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        """The number of each token in its row [B, L], padding not counted."""
        seen = torch.ones(canvas.shape[:2], device=canvas.device) if attention_mask is None else attention_mask
        return self.config.first_position + (seen.long().cumsum(dim=1) - 1).clamp(min=0)

    def sources(
        self, states: torch.Tensor, attention_mask: torch.Tensor | None, shift: int | None = None
    ) -> torch.LongTensor:
        """Which hidden state predicts each token, as indices into the flattened states: [B, L]. `shift`: another than ours.

        The token's own; or, under a shift, that of the token before it, if there is one. These are indices and not a mask
        that is moved, since the first two tokens of a row have one source.
        """
        batch, length = states.shape[:2]
        own = torch.arange(batch * length, device=states.device).view(batch, length)
        if not (self.config.logits_shift if shift is None else shift):
            return own
        follows = torch.ones_like(own, dtype=torch.bool)
        follows[:, 0] = False
        if attention_mask is not None:
            follows[:, 1:] = attention_mask[:, :-1].bool()  # padding predicts nothing
        return own - follows.long()

    def head_rows(self, states: torch.Tensor, sources: torch.LongTensor) -> HeadRows:
        """The rows that the head makes of the hidden states [B, L, d] at flat indices [R]."""
        head = self.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        return HeadRows(
            hidden=self.transform(states.flatten(0, 1)[sources]),
            weight=weight.view_as(weight),
            bias=weight.new_zeros(1).expand(len(weight)) if bias is None else bias.view_as(bias),
            mask_token_id=self.config.mask_token_id,
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
