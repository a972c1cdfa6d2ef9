"""`generate` for masked diffusion language models: the canvas, the prompt, the noise, and what comes back."""

import copy
import functools
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from .noise_schedule_mdlm import noise_schedule_of
from .sampling_mdlm import SAMPLERS
from .uniform_diffusion_mdlm import LAST_STEPS, uniform_ancestral, uniforms_per_token


logger = logging.get_logger(__name__)


class MDLMGenerationConfig(GenerationConfig):
    r"""
    Options of [`MDLMForMaskedDiffusion.generate`], saved beside the model as `generation_config.json`.

    Args:
        steps (`int`, *optional*): Denoising steps, at least 1; 64 when neither the model nor the call says otherwise.
        length (`int`, *optional*): Tokens in a canvas; see `generate` for the default.
        temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest token. Default 1.
        sampler (`str`, *optional*): One of `SAMPLERS`; `"ancestral"` by default.
        last_step (`str`, *optional*): Uniform diffusion only: what follows the `steps`, see `uniform_ancestral`. One of
            `LAST_STEPS`; `"ancestral"` by default.
        num_return_sequences (`int`, *optional*): Samples for each canvas; 1 by default.
        return_dict_in_generate (`bool`, *optional*): Return an [`MDLMGenerationOutput`] instead of the ids alone.

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
        for name in ("steps", "length", "num_return_sequences"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.temperature is not None and not (
            isinstance(self.temperature, int | float) and 0 <= self.temperature < torch.inf
        ):
            raise ValueError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, not {self.sampler!r}")
        if self.last_step is not None and self.last_step not in LAST_STEPS:
            raise ValueError(f"last_step must be one of {LAST_STEPS}, not {self.last_step!r}")

    @staticmethod
    def _get_default_generation_params() -> dict:
        return {
            "steps": 64,
            "length": None,
            "temperature": 1.0,
            "sampler": "ancestral",
            "last_step": None,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
        }

    @classmethod
    def from_model_config(cls, model_config):
        raise NotImplementedError("the options of masked diffusion are not part of a model configuration")


@dataclass
class MDLMGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`): The filled canvases.
        nfe (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`): Forwards of the network per sequence.
    """

    sequences: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None


class MDLMGenerationMixin:
    generation_config_class = MDLMGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: MDLMGenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        streamer=None,
        **kwargs,
    ) -> torch.LongTensor | MDLMGenerationOutput:
        r"""
        Fills the `[MASK]` tokens of a canvas; every other token stays as it is.

        Without `input_ids` the canvas is `length` masks. With `input_ids` it is those, followed by masks up to `length`
        if that is longer; so a prompt goes on the left, and an infill has masks anywhere. `length` defaults to the width
        of `input_ids` when they hold a mask, and to the model's context otherwise. A model of uniform diffusion has no
        mask: its canvas starts as noise, and `input_ids` are a prompt, held fixed.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, width)`, *optional*): Prompt or canvas.
            generation_config ([`MDLMGenerationConfig`], *optional*): The model's own by default.
            attention_mask (`torch.Tensor` of shape `(batch_size, width)`, *optional*): 0 marks padding, which is
                neither seen nor filled.
            seed (`int`, *optional*): Fixes the result. By default the global random state of torch decides.
            generator (`torch.Generator`, *optional*): On the CPU; instead of a seed.
            streamer (*optional*): Receives the first canvas: `put_draft` after each step, `put` and `end` at the end.
            kwargs: Any option of [`MDLMGenerationConfig`], for this call only.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, samples of one canvas adjacent,
            or an [`MDLMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        options = self._options(generation_config, kwargs)
        canvas, maskable, attention_mask = self._canvas(input_ids, attention_mask, options)
        if seed is not None and generator is not None:
            raise ValueError("give a seed or a generator, not both")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        if self.config.diffusion_kind == "uniform":
            own = {"vocab_size": self.config.vocab_size, "last_step": options.last_step or "ancestral"}
            sampler, draws = functools.partial(uniform_ancestral, **own), uniforms_per_token(options.steps)
        else:
            sampler, draws = functools.partial(SAMPLERS[options.sampler], mask_token_id=self.config.mask_token_id), 2
        # Row by row on the CPU, so that neither the device nor the number of rows behind it changes a row's noise.
        noise = torch.rand(len(canvas), draws, canvas.shape[1], dtype=torch.float64, generator=generator)

        schedule = noise_schedule_of(self.config)

        def predict(tokens: torch.Tensor, reveal: torch.Tensor, rows: torch.Tensor, t: float) -> torch.Tensor:
            mask = None if attention_mask is None else attention_mask[rows]
            sigma = -schedule.gamma(torch.tensor(t, dtype=torch.float64)).log().float().to(tokens.device)
            sigma = sigma.expand(len(rows))
            return self(input_ids=tokens, attention_mask=mask, timesteps=sigma, logits_rows=reveal).logits

        def on_step(tokens: torch.Tensor):
            if streamer is not None:
                streamer.put_draft(tokens[:1])

        was_training = self.training
        self.eval()
        try:
            nfe = sampler(
                predict,
                canvas,
                maskable,
                noise.to(canvas.device).transpose(0, 1),
                steps=options.steps,
                schedule=schedule,
                temperature=options.temperature,
                on_step=on_step,
            )
        finally:
            self.train(was_training)
        if streamer is not None:
            streamer.put(canvas[0])
            streamer.end()
        return MDLMGenerationOutput(sequences=canvas, nfe=nfe) if options.return_dict_in_generate else canvas

    def _options(self, generation_config: MDLMGenerationConfig | None, kwargs: dict) -> MDLMGenerationConfig:
        """The call's arguments over the given (or the model's) configuration over the library's defaults."""
        options = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if "steps" not in options._get_default_generation_params():
            raise ValueError(f"generation_config must be an MDLMGenerationConfig, not a {type(options).__name__}")
        unknown = sorted(set(kwargs) - set(options._get_default_generation_params()))
        if unknown:
            raise ValueError(
                f"unknown arguments {unknown}; generate() takes {sorted(options._get_default_generation_params())}"
            )
        for name, default in options._get_default_generation_params().items():
            if kwargs.get(name) is not None:
                setattr(options, name, kwargs[name])
            elif getattr(options, name, None) is None:
                setattr(options, name, default)
        options.validate()
        if self.config.diffusion_kind == "uniform" and options.sampler != "ancestral":
            raise ValueError(
                f"sampler {options.sampler!r} is for absorbing diffusion; this model is uniform: 'ancestral'"
            )
        if self.config.diffusion_kind == "absorbing" and options.last_step is not None:
            raise ValueError(f"last_step ({options.last_step!r}) is for uniform diffusion; this model is absorbing")
        return options

    def _canvas(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, options: MDLMGenerationConfig
    ):
        """Canvas [B * n, length], the positions to fill, and the attention mask of the same shape or None."""
        uniform, context = self.config.diffusion_kind == "uniform", self.config.max_position_embeddings
        mask_token_id = -1 if uniform else self.config.mask_token_id  # -1, no token at all, stands for noise to come
        if input_ids is None:
            input_ids = torch.empty(1, 0, dtype=torch.long, device=self.device)
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must have the shape (batch_size, width), not {tuple(input_ids.shape)}")
        if input_ids.numel() and not (0 <= input_ids.min() and input_ids.max() < self.config.vocab_size):
            raise ValueError(
                f"input_ids hold {input_ids.min().item()} .. {input_ids.max().item()}, but the vocabulary is "
                f"0 .. {self.config.vocab_size - 1}"
            )
        width = input_ids.shape[1]
        length = options.length or (width if (input_ids == mask_token_id).any() else context)
        if length > context:
            raise ValueError(f"length is {length}, but the model's context is {context} tokens")
        if width > length:
            raise ValueError(f"input_ids are {width} tokens wide, but length is {length}")
        canvas = torch.nn.functional.pad(input_ids.long(), (0, length - width), value=mask_token_id)
        maskable = canvas == mask_token_id
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
                )
            attention_mask = torch.nn.functional.pad(attention_mask, (0, length - width), value=1)
            maskable &= attention_mask.bool()
            attention_mask = attention_mask.repeat_interleave(options.num_return_sequences, dim=0)
        if uniform and not maskable.any(dim=1).all():
            raise ValueError(f"input_ids fill the whole length ({length}), and leave nothing to generate")
        if not maskable.any(dim=1).all():
            raise ValueError(
                f"a row of input_ids holds no mask (id {mask_token_id}) to fill, and length ({length}) adds none"
            )
        repeat = options.num_return_sequences
        return canvas.repeat_interleave(repeat, dim=0), maskable.repeat_interleave(repeat, dim=0), attention_mask

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: takes over the given generation config, or the one saved with the model."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        if generation_config is not None or pretrained_model_name_or_path is None:
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
                _from_auto=from_auto_class,
                _from_pipeline=from_pipeline,
                **kwargs,
            )
        except OSError:
            logger.info("no generation_config.json beside the model: the library's defaults hold")


__all__ = ["MDLMGenerationConfig", "MDLMGenerationMixin", "MDLMGenerationOutput"]
