"""`generate` for masked diffusion language models: the canvas, the prompt, the noise, and what comes back."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput, logging

from .canvas_mdlm import Canvas
from .draws_mdlm import PRECISIONS
from .forward_process_mdlm import pick_uniformly
from .generation_config_mdlm import MDLMGenerationConfig, options_of
from .noise_mdlm import row_keys, uniforms
from .noise_schedule_mdlm import noise_schedule_of
from .sampling_mdlm import SAMPLERS, legacy_ancestral, uniform_ancestral


logger = logging.get_logger(__name__)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class MDLMGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`): The filled canvases.
        nfe (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`): Forwards of the network per sequence.
        reveal_steps (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, *optional*): With
            `output_reveal_steps`: the step, from 0, that revealed each token (the last one, if it was remasked); -1 for
            those that were given. A row's k-th block begins at step k (steps + 1), or, under a sampler without `steps`,
            k block_length: no other row changes the number.
    """

    sequences: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None
    reveal_steps: torch.LongTensor | None = None


class MDLMGenerationMixin:
    generation_config_class = MDLMGenerationConfig

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: MDLMGenerationConfig | None = None,
        attention_mask: torch.Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        logits_processor: LogitsProcessorList | None = None,
        streamer=None,
        callback: Callable[[int, torch.LongTensor], None] | None = None,
        progress: bool = False,
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
                neither seen, nor filled, nor counted in positions: prompts of different lengths are padded on the left.
            seed (`int` or a sequence of them, *optional*): Fixes the result; a sequence gives each row its own, and a
                row is then the same in any batch. By default the global random state of torch decides.
            generator (`torch.Generator`, *optional*): On the CPU; instead of a seed.
            logits_processor (`LogitsProcessorList`, *optional*): Called with the canvas of each position `(n, width)`
                and its logits `(n, vocab_size)` before anything else looks at them. The canvas is what the network sees
                of the row, without its padding; a row that is shorter than others ends in copies of its first token.
            streamer (*optional*): Receives the first canvas: `put_draft` after each step, `put` and `end` at the end.
            callback (*optional*): Called after each step that changed something with its number, from 0, and the canvas
                `(batch_size * num_return_sequences, length)`, which goes on changing; and once more after the last step
                of a block behind which `stop_at_eos` padded a row.
            progress (`bool`, *optional*): Show a progress bar.
            kwargs: Any option of [`MDLMGenerationConfig`], for this call only.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, samples of one canvas adjacent,
            or an [`MDLMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument, its value and what is allowed; or the row and the step of a NaN logit.
        """
        options = self._options(generation_config, kwargs)
        tokens, fillable, mask = self._canvas(input_ids, attention_mask, options)
        keys = self._keys(seed, generator, len(tokens))
        if self.config.diffusion_kind == "uniform":
            noise = pick_uniformly(uniforms(keys, mask.cumsum(dim=1) - 1, 0)[0], self.config.vocab_size)
            tokens = torch.where(fillable.to(tokens.device), noise.to(tokens.device), tokens)
        given = mask & ~fillable
        if options.guidance_scale is not None and not given.any(dim=1).all():
            raise ValueError(f"guidance_scale ({options.guidance_scale}) needs a prompt in every row to guide by")
        sampler, head = self._sampler(options), self._head(logits_processor, options)
        nfe, reveal_steps = torch.zeros(len(tokens), dtype=torch.long), torch.full(tokens.shape, -1)

        def show(step: int):
            if streamer is not None:
                streamer.put_draft(tokens[:1])
            if callback is not None:
                callback(step, tokens)

        def on_step():
            tokens.scatter_(1, there, torch.where(shown, canvas.tokens, window))
            show(canvas.step)

        was_training = self.training
        self.eval()
        try:
            for step, block, places, columns, seen in self._blocks(fillable, mask, options):
                inside = (block & fillable).gather(1, columns)
                if not inside.any():
                    continue
                trunk = self._trunk(seen, given.gather(1, columns), options)
                there, shown = columns.to(tokens.device), seen.to(tokens.device)
                window = tokens.gather(1, there)
                # Padding shows the row's first token once more: no logits processor finds a token that is padding's alone.
                canvas = Canvas(
                    torch.where(shown, window, window[:, :1]),
                    inside,
                    keys,
                    places,
                    trunk=trunk,
                    head=head,
                    schedule=noise_schedule_of(self.config),
                    vocab_size=self.config.vocab_size,
                    mask_token_id=self.config.mask_token_id,
                    draw={name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
                    | {"dtype": PRECISIONS.get(options.precision, torch.float64)},
                    forwards=1 if options.guidance_scale is None else 2,
                    whole=options.compile,
                    step=step,
                )
                label = f"from step {step}"
                canvas.denoise(logging.tqdm(sampler(canvas), desc=label, unit="step", disable=not progress), on_step)
                nfe += canvas.nfe
                reveal_steps.scatter_reduce_(1, columns, canvas.reveal_steps, "amax")
                if options.stop_at_eos and self._stop(tokens, fillable, reveal_steps, options):
                    show(canvas.step - 1)
        finally:
            self.train(was_training)
        if streamer is not None:
            streamer.put(tokens[0])
            streamer.end()
        if not options.return_dict_in_generate:
            return tokens
        return MDLMGenerationOutput(
            sequences=tokens,
            nfe=nfe.to(tokens.device),
            reveal_steps=reveal_steps.to(tokens.device) if options.output_reveal_steps else None,
        )

    def _options(self, generation_config: MDLMGenerationConfig | None, kwargs: dict) -> MDLMGenerationConfig:
        """The call's arguments over the given (or the model's) configuration over the library's defaults."""
        options = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        defaults = MDLMGenerationConfig._get_default_generation_params()
        if not hasattr(options, "steps"):
            raise ValueError(f"generation_config must be an MDLMGenerationConfig, not a {type(options).__name__}")
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        unknown = sorted(set(kwargs) - set(defaults) - set(ids))
        if unknown:
            raise ValueError(f"unknown arguments {unknown}; generate() takes {sorted(defaults)}")
        asked = {name for name, value in kwargs.items() if value is not None}
        if generation_config is not None:
            asked |= {name for name in defaults if getattr(options, name, None) is not None}
        for name in (*defaults, *ids):
            if kwargs.get(name) is not None:
                setattr(options, name, kwargs[name])
            elif getattr(options, name, None) is None:
                setattr(options, name, defaults.get(name))
        options.validate()
        self._check(options, asked)
        return options

    def _check(self, options: MDLMGenerationConfig, asked: set[str]):
        """Refuses what the model cannot do, and what was asked for but would not be used."""
        samplers = self._samplers()
        if options.sampler not in samplers:
            raise ValueError(
                f"sampler {options.sampler!r} is for absorbing diffusion; this model is uniform: {list(samplers)}"
            )
        used = options_of(samplers[options.sampler])
        for name in sorted(
            asked & {name for sampler in SAMPLERS.values() for name in options_of(sampler)} - set(used)
        ):
            raise ValueError(
                f"{name} ({getattr(options, name)!r}) is not used by the sampler {options.sampler!r}, "
                f"which takes {list(used)}"
            )
        if self.config.mask_token_id is None:
            for name, wrong in (
                ("precision", options.precision == "legacy_float32"),
                ("guidance_scale", options.guidance_scale is not None),
            ):
                if wrong:
                    raise ValueError(f"{name} ({getattr(options, name)!r}) needs a [MASK]; this model is uniform")
        suppressed = set(options.suppress_tokens or ())
        for token in suppressed - set(range(self.config.vocab_size)):
            raise ValueError(f"suppress_tokens hold {token}, but the vocabulary is 0 .. {self.config.vocab_size - 1}")
        if suppressed and len(suppressed | {self.config.mask_token_id} - {None}) == self.config.vocab_size:
            raise ValueError(f"suppress_tokens hold all {len(suppressed)} tokens, but must leave one to draw")
        if options.output_reveal_steps and not options.return_dict_in_generate:
            raise ValueError(
                "output_reveal_steps needs return_dict_in_generate=True, since ids alone have no place for it"
            )
        eos, pad = self._end_of_sequence(options)
        if options.stop_at_eos and not eos:
            raise ValueError("stop_at_eos needs an eos_token_id, in the call or in the model's configuration")
        if options.stop_at_eos or asked & {"eos_token_id", "pad_token_id"}:
            for name, tokens in (("eos_token_id", eos), ("pad_token_id", [] if pad is None else [pad])):
                for token in tokens:
                    if not whole(token, self.config.vocab_size) or token == self.config.mask_token_id:
                        raise ValueError(
                            f"{name} is {token!r}, but must be a token other than the mask "
                            f"({self.config.mask_token_id}) of the vocabulary 0 .. {self.config.vocab_size - 1}"
                        )

    def _samplers(self) -> dict[str, Callable]:
        return {"ancestral": uniform_ancestral} if self.config.diffusion_kind == "uniform" else SAMPLERS

    def _sampler(self, options: MDLMGenerationConfig) -> Callable:
        """`canvas -> steps`, with the options that the call, the configuration or the library gives."""
        sampler = self._samplers()[options.sampler]
        if options.precision == "legacy_float32":
            sampler = legacy_ancestral
        given = {name: getattr(options, name) for name in options_of(sampler)}
        return functools.partial(sampler, **{name: value for name, value in given.items() if value is not None})

    def _canvas(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, options: MDLMGenerationConfig
    ) -> tuple[torch.LongTensor, torch.BoolTensor, torch.BoolTensor]:
        """Canvas [B * n, length], and on the CPU: the positions to fill, and those that are no padding."""
        uniform, context = self.config.diffusion_kind == "uniform", self.config.max_position_embeddings
        mask_token_id = -1 if uniform else self.config.mask_token_id  # -1, no token at all, stands for noise to come
        if input_ids is None:
            input_ids = torch.empty(1, 0, dtype=torch.long, device=self.device)
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in INTEGERS:
            raise ValueError(f"input_ids must be a tensor of integers, not {input_ids!r}")
        if input_ids.ndim != 2 or not len(input_ids):
            raise ValueError(
                f"input_ids must have the shape (batch_size, width) and at least one row, not {tuple(input_ids.shape)}"
            )
        if input_ids.numel() and not (0 <= input_ids.min() and input_ids.max() < self.config.vocab_size):
            raise ValueError(
                f"input_ids hold {input_ids.min().item()} .. {input_ids.max().item()}, but the vocabulary is "
                f"0 .. {self.config.vocab_size - 1}"
            )
        width = input_ids.shape[1]
        length = options.length or (width if (input_ids == mask_token_id).any() else context)
        if length > context and options.block_length is None:
            raise ValueError(
                f"length is {length}, but the model's context is {context} tokens; block_length goes beyond it"
            )
        if (options.block_length or 0) > context:
            raise ValueError(f"block_length is {options.block_length}, but the model's context is {context} tokens")
        if width > length:
            raise ValueError(f"input_ids are {width} tokens wide, but length is {length}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"attention_mask must be a tensor, not {attention_mask!r}")
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
            )
        canvas = torch.nn.functional.pad(input_ids.long(), (0, length - width), value=mask_token_id)
        mask = torch.nn.functional.pad(attention_mask.bool().cpu(), (0, length - width), value=True)
        fillable = (canvas == mask_token_id).cpu() & mask
        if uniform and not fillable.any(dim=1).all():
            raise ValueError(f"input_ids fill the whole length ({length}), and leave nothing to generate")
        if not fillable.any(dim=1).all():
            raise ValueError(
                f"a row of input_ids holds no mask (id {mask_token_id}) to fill, and length ({length}) adds none"
            )
        return tuple(x.repeat_interleave(options.num_return_sequences, dim=0) for x in (canvas, fillable, mask))

    @staticmethod
    def _keys(seed: int | Sequence[int] | None, generator: torch.Generator | None, rows: int) -> torch.LongTensor:
        if seed is not None and generator is not None:
            raise ValueError("give a seed or a generator, not both")
        if generator is not None and not (isinstance(generator, torch.Generator) and generator.device.type == "cpu"):
            raise ValueError(f"generator must be a torch.Generator on the CPU, not {generator!r}")
        numbers = seed if isinstance(seed, Sequence) else [] if seed is None else [seed]
        if not all(whole(number, 2**64) for number in numbers):
            raise ValueError(f"seed must be an integer in 0 .. 2**64 - 1 or a sequence of them, not {seed!r}")
        if not isinstance(seed, Sequence):
            return row_keys(rows, generator if seed is None else torch.Generator().manual_seed(seed))
        if len(seed) != rows:
            raise ValueError(f"seed holds {len(seed)} numbers, but there are {rows} rows")
        return torch.cat([row_keys(1, torch.Generator().manual_seed(number)) for number in seed])

    def _blocks(
        self, fillable: torch.BoolTensor, mask: torch.BoolTensor, options: MDLMGenerationConfig
    ) -> Iterator[tuple[int, torch.BoolTensor, torch.LongTensor, torch.LongTensor, torch.BoolTensor]]:
        """Blocks to fill one after the other, and what the network sees meanwhile, for each row by itself.

        A row is cut from its first mask on, its padding left out: it has the same blocks in any batch. The network sees
        the whole canvas as far as the context goes (LLaDA, arXiv 2502.09992, Sec. 2.4); beyond that, the context's last
        tokens up to the block's end (MDLM's semi-autoregressive sampler).

        Yields, on the CPU:
            the number of the block's first step, whatever the blocks before took; the block [B, length]; the places of
            the tokens that the network sees, [B, W], in their row and in the canvas; and which of them are no padding.
        """
        length, context = fillable.shape[1], self.config.max_position_embeddings
        size = options.block_length or length
        # Room for a last step; without `steps`, each step of a row reveals something.
        stride = options.steps + 1 if "steps" in options_of(self._samplers()[options.sampler]) else size
        order = (~mask).long().argsort(dim=1, stable=True)  # the columns of a row's tokens, then those of its padding
        place, end = mask.cumsum(dim=1) - 1, mask.sum(dim=1, keepdim=True)
        first = place.gather(1, fillable.long().argmax(dim=1, keepdim=True))
        blocks = torch.where(fillable, (place - first) // size, -1)
        for number in range(int(blocks.max()) + 1):
            right = first + (number + 1) * size
            if self.config.diffusion_kind == "absorbing":  # uniform noise has no token for what is still to come
                right = right.clamp(min=context)
            right = right.minimum(end)
            left = (right - context).clamp(min=0)
            places = left + torch.arange(int((right - left).max()))
            yield number * stride, blocks == number, places, order.gather(1, places), places < right

    def _trunk(self, seen: torch.BoolTensor, given: torch.BoolTensor, options: MDLMGenerationConfig) -> Callable:
        """What a `Canvas` asks: the trunk on the tokens that each row sees, and with guidance on the masked prompt too."""
        schedule, guided, padded = noise_schedule_of(self.config), options.guidance_scale is not None, not seen.all()
        seen, given = seen.to(self.device), given.to(self.device)
        network = torch.compile(self.model, mode="reduce-overhead", dynamic=False) if options.compile else self.model

        def trunk(
            tokens: torch.Tensor, rows: torch.Tensor, time: torch.Tensor, wanted: torch.Tensor | None
        ) -> torch.Tensor:
            sigma = (-schedule.gamma(time).log().float()).to(tokens.device, non_blocking=True)
            if guided:
                without = tokens.masked_fill(given[rows], self.config.mask_token_id)
                tokens, rows, sigma = torch.cat([tokens, without]), rows.repeat(2), sigma.repeat(2)
                wanted = None if wanted is None else wanted.repeat(2, 1)
            attention_mask = None
            if padded:  # made here, since the model would ask the device whether there is padding at all
                attention_mask = create_bidirectional_mask(
                    config=self.config,
                    inputs_embeds=tokens.new_empty(*tokens.shape, 0, dtype=self.dtype),
                    attention_mask=seen[rows],
                    allow_is_bidirectional_skip=False,
                )
            inputs = {"input_ids": tokens, "timesteps": sigma, "attention_mask": attention_mask}
            hidden = network(**inputs, output_positions=wanted).last_hidden_state
            return hidden.unflatten(0, (2, -1)).movedim(0, 2) if guided else hidden

        return trunk

    def _head(self, logits_processor: LogitsProcessorList | None, options: MDLMGenerationConfig) -> Callable:
        if not isinstance(logits_processor, list | None):
            raise ValueError(f"logits_processor must be a LogitsProcessorList, not {logits_processor!r}")
        processors = LogitsProcessorList(logits_processor or [])
        if options.suppress_tokens:
            processors.append(SuppressTokensLogitsProcessor(list(options.suppress_tokens), device=self.device))

        def head(hidden_states: torch.Tensor, tokens: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
            logits = self.get_output_embeddings()(hidden_states)
            if options.guidance_scale is not None:
                conditional, without = logits.float().unbind(dim=1)
                logits = without + options.guidance_scale * (conditional - without)
            return processors(tokens[lines], logits.float()) if processors else logits

        return head

    def _end_of_sequence(self, options: MDLMGenerationConfig) -> tuple[list[int], int | None]:
        """The ids that end a sequence, and the one that pads it."""
        eos = self.config.eos_token_id if options.eos_token_id is None else options.eos_token_id
        eos = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
        pads = (options.pad_token_id, self.config.pad_token_id, *eos)
        return eos, next((pad for pad in pads if pad is not None), None)

    def _stop(self, tokens, fillable, reveal_steps, options: MDLMGenerationConfig) -> bool:
        """Pads the rows in which an end of sequence was revealed, and fills them no more. Whether there is such a row."""
        eos, pad = self._end_of_sequence(options)
        ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device)).cpu() & (reveal_steps >= 0)
        behind = (ends.cumsum(dim=1) - ends.long() > 0) & fillable
        tokens[behind.to(tokens.device)] = pad
        reveal_steps[behind] = -1
        fillable &= ~behind
        return bool(behind.any())

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


def whole(value, end: int) -> bool:
    """Whether `value` is an integer of 0 .. end - 1; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


__all__ = ["MDLMGenerationConfig", "MDLMGenerationMixin", "MDLMGenerationOutput"]
