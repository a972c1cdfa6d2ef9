"""The masked diffusion language model: a bidirectional diffusion transformer (DiT) over a canvas of tokens and masks.

The architecture is that of the published MDLM, SDTT and Duo checkpoints (arXiv 2406.07524, 2410.21035, 2506.10892).
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_mdlm import Memory
from .checks_mdlm import check_canvas, check_integers, check_positions, check_shape
from .configuration_mdlm import MDLMConfig
from .coupling_mdlm import MDLMCoupling
from .generation_mdlm import MDLMGenerationMixin
from .head_mdlm import HeadRows


class MDLMLayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32 whatever the autocast."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(
            hidden_states.float(), hidden_states.shape[-1:], self.weight.float(), None, self.eps
        )


class MDLMNoiseEmbedding(nn.Module):
    """sigma [B] -> silu(MLP(sinusoids of sigma)) [B, conditioning_size], in float32 whatever the autocast."""

    frequencies = 128

    def __init__(self, conditioning_size: int):
        super().__init__()
        self.in_proj = nn.Linear(2 * self.frequencies, conditioning_size)
        self.out_proj = nn.Linear(conditioning_size, conditioning_size)

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.frequencies, dtype=torch.float32, device=sigma.device) / self.frequencies
        angles = sigma.float()[:, None] * torch.exp(-math.log(10000) * exponents)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        with torch.autocast(sigma.device.type, enabled=False):
            # the dtype of the bias: a quantised weight holds integers
            hidden = nn.functional.silu(self.in_proj(sinusoids.to(self.in_proj.bias.dtype)))
            return nn.functional.silu(self.out_proj(hidden))


def modulation_parts(modulation: nn.Module, conditioning: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Conditioning [B, c] -> `parts` tensors [B, 1, hidden_size].

    The modulations are plain linear layers, so that quantisation and adapters, which replace such layers, can.
    """
    return modulation(conditioning)[:, None].chunk(parts, dim=-1)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """normed * (1 + scale) + shift in float32, handed on in the dtype that the matrix products run in."""
    return (normed * (1 + scale) + shift).to(shift.dtype)


def take(states: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """Of [B, L, d]: at the positions [B, P] of each row, [B, P, d]; at the positions [R] of the flattened canvas, [R, d]."""
    if positions.ndim == 1:
        return states.flatten(0, 1)[positions]
    return torch.take_along_dim(states, positions[..., None], dim=1)


def parts_at(parts: tuple[torch.Tensor, ...], positions: torch.LongTensor, length: int) -> tuple[torch.Tensor, ...]:
    """Modulations of rows, [B or 1, 1, d], for what `take` has taken: for positions [R] in the flattened canvas, [R or 1, d]."""
    if positions.ndim > 1:
        return parts
    return tuple(part[0] if len(part) == 1 else part[positions // length, 0] for part in parts)


class MDLMRotaryEmbedding(nn.Module):
    """cos and sin [B, L, head_dim] of the rotary embedding, half-split (GPT-NeoX) convention, float32."""

    def __init__(self, config: MDLMConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # No buffer: `.to(bfloat16)` (DeepSpeed's bf16) would round it, and the meta device would lose it.
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=position_ids.device) / self.head_dim
        angles = position_ids[:, :, None].float() * (1.0 / self.theta**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies the rotary embedding to [B, heads, L, head_dim] in the dtype of cos and sin; the result has the input's."""
    first, second = states.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (states.to(cos.dtype) * cos[:, None] + rotated * sin[:, None]).to(states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class MDLMAttention(nn.Module):
    def __init__(self, config: MDLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        hidden_rows: torch.Tensor | None = None,
        past_key_values: Memory | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query, key, value = (
            self.qkv_proj(hidden_states).view(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        )
        if self.config.rotary_precision == "native":
            position_embeddings = tuple(angles.to(query.dtype) for angles in position_embeddings)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if hidden_rows is not None and hidden_rows.ndim == 2:
            query = torch.take_along_dim(query, hidden_rows[:, None, :, None], dim=2)
            if attention_mask is not None:
                attention_mask = torch.take_along_dim(attention_mask, hidden_rows[:, None, :, None], dim=2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        output = output.flatten(2)
        if hidden_rows is not None and hidden_rows.ndim == 1:  # of every row another number: the queries stay together
            output = take(output, hidden_rows)
        return self.o_proj(output), weights


class MDLMMLP(nn.Module):
    def __init__(self, config: MDLMConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.up_proj(hidden_states), approximate="tanh"))


class MDLMLayer(GradientCheckpointingLayer):
    """One DiT block: attention and MLP, each modulated, gated, and added to the float32 residual stream."""

    def __init__(self, config: MDLMConfig, layer_idx: int):
        super().__init__()
        self.modulation = nn.Linear(config.conditioning_size, 6 * config.hidden_size)
        self.modulation.starts_at_zero = True
        self.attention_norm = MDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = MDLMAttention(config, layer_idx)
        self.mlp_norm = MDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MDLMMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        hidden_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        parts = modulation_parts(self.modulation, conditioning, 6)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
        branch = modulate(self.attention_norm(hidden_states), shift_attention, scale_attention)
        branch, _ = self.attention(branch, position_embeddings, attention_mask, hidden_rows, **kwargs)
        if hidden_rows is not None:
            of_rows = gate_attention, shift_mlp, scale_mlp, gate_mlp
            of_rows = parts_at(of_rows, hidden_rows, hidden_states.shape[1])
            gate_attention, shift_mlp, scale_mlp, gate_mlp = of_rows
            hidden_states = take(hidden_states, hidden_rows)
        hidden_states = hidden_states + gate_attention * self.dropout(branch)
        branch = self.mlp(modulate(self.mlp_norm(hidden_states), shift_mlp, scale_mlp))
        return hidden_states + gate_mlp * self.dropout(branch)


@auto_docstring
class MDLMPreTrainedModel(PreTrainedModel):
    config: MDLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MDLMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MDLMLayer, "attentions": MDLMAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MDLMLayerNorm):
            init.ones_(module.weight)
        elif getattr(module, "starts_at_zero", False) or module is getattr(self, "lm_head", None):
            # Every block is the identity and every logit zero at the start (DiT, arXiv 2212.09748, "adaLN-Zero").
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MDLMCoupling):
            module.initialize()


@auto_docstring(custom_intro="The DiT trunk: tokens to normalised and modulated hidden states, without the head.")
class MDLMModel(MDLMPreTrainedModel):
    def __init__(self, config: MDLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.noise_embedding = MDLMNoiseEmbedding(config.conditioning_size)
        self.rotary_emb = MDLMRotaryEmbedding(config)
        self.layers = nn.ModuleList(MDLMLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)
        self.norm_modulation.starts_at_zero = True
        self.norm = MDLMLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        hidden_rows: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        timesteps (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
            Total noise sigma = -log gamma(t) of each row. Needed with `config.time_conditioning`, ignored without it.
        hidden_rows (`torch.LongTensor` of shape `(batch_size, positions)` or `(positions,)`, *optional*):
            The positions of each row whose hidden states are returned, in that order; or positions in the flattened canvas,
            and the result is `(positions, hidden_size)`. The last layer then computes its MLP for these alone, and, if each
            row has as many of them, its queries too (under SDPA and eager attention).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_canvas(self.config, input_ids, inputs_embeds, attention_mask, timesteps)
        batch, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if hidden_rows is not None and hidden_rows.ndim == 1:
            check_integers("hidden_rows", hidden_rows, batch * length)
        elif hidden_rows is not None:
            check_shape("hidden_rows", hidden_rows, (batch, hidden_rows.shape[-1]))
            check_integers("hidden_rows", hidden_rows, length)
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager': {self.config._attn_implementation!r} computes no "
                "attention weights; call model.set_attn_implementation('eager')"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not self.config.time_conditioning:
            timesteps = torch.zeros(1, device=inputs_embeds.device)  # one row: the modulation is the same for all
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
        )
        conditioning = self.noise_embedding(timesteps)
        position_embeddings = self.rotary_emb(position_ids)
        hidden_states = inputs_embeds.float()
        # The masks of other attention implementations are for as many queries as keys.
        narrow = self.config._attn_implementation in ("sdpa", "eager") or (
            hidden_rows is not None and hidden_rows.ndim == 1
        )
        for layer in self.layers:
            positions = hidden_rows if narrow and layer is self.layers[-1] else None
            hidden_states = layer(
                hidden_states, conditioning, position_embeddings, attention_mask, positions, **kwargs
            )
        if hidden_rows is not None and not narrow:
            hidden_states = take(hidden_states, hidden_rows)
        shift, scale = modulation_parts(self.norm_modulation, conditioning, 2)
        if hidden_rows is not None:
            shift, scale = parts_at((shift, scale), hidden_rows, length)
        return BaseModelOutput(last_hidden_state=modulate(self.norm(hidden_states), shift, scale))


@auto_docstring(custom_intro="The trunk with a head over the vocabulary, and `generate`.")
class MDLMForMaskedDiffusion(MDLMGenerationMixin, MDLMPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MDLMConfig):
        super().__init__(config)
        self.model = MDLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.coupling = None if config.coupling is None else MDLMCoupling(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def spares_last_layer(self) -> bool:
        """Whether the last layer computes its MLP for `hidden_rows` alone.

        Not in a compiled trunk, which would be compiled for other numbers of rows; and not under dropout, which would draw
        others of its numbers.
        """
        compiled = self.model._compiled_call_impl is not None or torch.compiler.is_compiling()
        return not (compiled or (self.training and self.config.hidden_dropout > 0))

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        hidden_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput | HeadRows:
        r"""
        timesteps (`torch.FloatTensor` of shape `(batch_size,)`, *optional*):
            Total noise sigma = -log gamma(t) of each row. Needed with `config.time_conditioning`, ignored without it.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token to predict at each position, -100 for none. The loss is the mean cross-entropy of the others, float32.
        hidden_rows (`torch.Tensor`, *optional*):
            Positions at which to stop before the head: a boolean mask of shape `(batch_size, sequence_length)`, or
            indices into the flattened canvas, shape `(rows,)`. The result is then a [`HeadRows`]: the hidden states of
            these positions, `(rows, hidden_size)`, with the head's parameters, from which losses and draws are computed
            in chunks. Not together with `labels`.
        """
        if hidden_rows is not None and labels is not None:
            raise ValueError(
                "labels and hidden_rows exclude each other: compute the loss from the rows that are returned"
            )
        canvas = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(canvas, torch.Tensor) and labels is not None:  # anything else is refused by the trunk
            check_shape("labels", labels, canvas.shape[:2])
            check_integers("labels", labels, self.config.vocab_size, ignored=-100)
        if isinstance(canvas, torch.Tensor) and hidden_rows is not None:
            check_positions("hidden_rows", hidden_rows, canvas.shape[:2])
        flat, spared = None, hidden_rows is not None and self.spares_last_layer()
        if hidden_rows is not None:
            flat = hidden_rows.flatten().nonzero()[:, 0] if hidden_rows.dtype == torch.bool else hidden_rows
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            timesteps=timesteps,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            hidden_rows=flat if spared else None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if hidden_rows is not None:
            weight, bias = self.lm_head.weight, self.lm_head.bias
            return HeadRows(
                hidden=hidden_states if spared else take(hidden_states, flat),
                weight=weight.view_as(weight),
                bias=bias.view_as(bias),
                mask_token_id=self.config.mask_token_id,
                coupling=None if self.coupling is None else self.coupling(self.model.embed_tokens.weight),
            )
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten().long())
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["MDLMForMaskedDiffusion", "MDLMModel", "MDLMPreTrainedModel"]
