"""`generate` for diffusion language models: fills a canvas block by block and returns the result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput, logging

from .block_attention_mdlm import attention_bias, check_attention
from .cache_mdlm import CachedTrunk, Memory
from .canvas_mdlm import Canvas, Denoiser
from .configuration_mdlm import MDLMConfig, checked_coupling
from .coupling_mdlm import Chains, MDLMCoupling
from .forward_process_mdlm import process_of
from .generation_config_mdlm import MDLMGenerationConfig
from .generation_inputs_mdlm import Request, prepare
from .noise_mdlm import RowNoise
from .transfer_mdlm import send


logger = logging.get_logger(__name__)


@dataclass
class MDLMGenerationOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`): The filled canvases.
        nfe (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`): Forwards of the network per sequence.
        reveal_steps (`torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, *optional*): With
            `output_reveal_steps`: the step, from 0, that revealed each token (the last one, if it was remasked); -1 for
            given tokens. A row's k-th block begins at step k (steps + 1), or, under a sampler without `steps`, at
            k block_length, whatever the other rows do. A block model's blocks are counted from the first token.
        computed (`torch.LongTensor` of shape `(batch_size * num_return_sequences,)`): Tokens that the trunk ran on per
            sequence, over all forwards, padding not counted: what a `cache` saves.
    """

    sequences: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None
    reveal_steps: torch.LongTensor | None = None
    computed: torch.LongTensor | None = None


class MDLMGenerationMixin:
    """What every network of the library inherits: `generate`, and what a sampler asks of the network."""

    generation_config_class = MDLMGenerationConfig

    def add_coupling(self, settings: dict):
        """Gives the model a new chain over its head, see `MDLMConfig`: `settings` is its `coupling`.

        Raises:
            ValueError: the model has one, cannot have one, or a setting is wrong.
        """
        if self.coupling is not None:
            raise ValueError(f"the model has a coupling already: {self.config.coupling}")
        self.config.coupling = checked_coupling(settings, self.config)
        self.coupling = MDLMCoupling(self.config).to(self.device, self.dtype)
        self.coupling.initialize()

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
        if that is longer: a prompt goes on the left, and an infill has masks anywhere. `length` defaults to the width of
        `input_ids` when they hold a mask, and to the model's context otherwise. A model of uniform diffusion has no
        mask: its canvas starts as noise, and `input_ids` are a prompt, held fixed.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, width)`, *optional*): Prompt or canvas.
            generation_config ([`MDLMGenerationConfig`], *optional*): The model's own by default.
            attention_mask (`torch.Tensor` of shape `(batch_size, width)`, *optional*): 0 marks padding, which is
                neither seen, nor filled, nor counted in positions: prompts of different lengths are padded on the left.
            seed (`int` or a sequence of them, *optional*): Fixes the result; a sequence gives each row its own seed, and
                a row is then the same in any batch. By default the global random state of torch decides.
            generator (`torch.Generator`, *optional*): On the CPU; instead of a seed.
            logits_processor (`LogitsProcessorList`, *optional*): Called with the canvas of each position `(n, width)`
                and its logits `(n, vocab_size)` before anything else looks at them. The canvas is what the network sees
                of the row, without its padding; a row that is shorter than others ends in copies of its first token.
            streamer (*optional*): Follows the first row. At the end it receives the row by `put`, first the prompt (which
                may be empty), then the rest, and `end`. A streamer with a `put_draft`, such as `TextDiffusionStreamer`,
                receives the canvas after each step as well.
            callback (*optional*): Called with a step's number, from 0, and the canvas `(batch_size *
                num_return_sequences, length)`, which goes on changing: after each step that changed something, and once
                more after a block in which `stop_at_eos` ended a row.
            progress (`bool`, *optional*): Show a progress bar.
            kwargs: Any option of [`MDLMGenerationConfig`], for this call only.

        Returns:
            `torch.LongTensor` of shape `(batch_size * num_return_sequences, length)`, samples of one canvas adjacent,
            or an [`MDLMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument, its value and what is allowed; or the row and the step of a NaN logit.
        """
        request = prepare(
            self.config,
            self.device,
            self.generation_config,
            generation_config,
            kwargs,
            input_ids,
            attention_mask,
            seed,
            generator,
            logits_processor,
        )
        options, tokens, fillable = request.options, request.tokens, request.fillable.clone()
        prompt, watchers = request.seen & ~fillable, Watchers(streamer, callback)
        nfe, reveal_steps = torch.zeros(len(tokens), dtype=torch.long), torch.full(tokens.shape, -1)
        cache, computed = self.cached_trunk(request), torch.zeros_like(nfe)
        was_training = self.training
        self.eval()
        try:
            for block in blocks_of(request, self.config):
                to_fill = (block.members & fillable).gather(1, block.columns)
                if not to_fill.any():
                    continue
                columns, seen = send(block.columns, tokens.device), send(block.seen, tokens.device)
                window = tokens.gather(1, columns)
                if cache is not None:
                    cache.enter(block.first, block.end, block.seen.sum(dim=1))
                canvas = Canvas(
                    # Padding shows the row's first token, so that logits processors never see a padding-only token.
                    torch.where(seen, window, window[:, :1]),
                    to_fill,
                    RowNoise(request.noise.keys, block.positions),
                    self.denoiser(
                        seen=block.seen,
                        prompt=prompt.gather(1, block.columns),
                        guidance_scale=options.guidance_scale,
                        processors=request.processors,
                        early=None if request.early is None else request.early.gather(1, block.columns),
                        eos_token_ids=request.eos_token_ids,
                        compile=options.compile,
                        coupling=options.coupling,
                        cache=cache,
                        **options.draw_options(),
                    ),
                    block.first_step,
                )
                label = f"from step {block.first_step}"
                steps = logging.tqdm(request.sampler(canvas), desc=label, unit="step", disable=not progress)
                for step in canvas.denoise(steps):
                    tokens.scatter_(1, columns, torch.where(seen, canvas.tokens, window))
                    watchers.draft(step, tokens)
                nfe += canvas.nfe
                computed += canvas.nfe * block.seen.sum(dim=1)
                reveal_steps.scatter_reduce_(1, block.columns, canvas.reveal_steps, "amax")
                if options.stop_at_eos and end_rows(tokens, fillable, reveal_steps, request):
                    watchers.draft(canvas.step - 1, tokens)
        finally:
            self.train(was_training)
        watchers.end(tokens[0], request)
        if not options.return_dict_in_generate:
            return tokens
        return MDLMGenerationOutput(
            sequences=tokens,
            nfe=nfe.to(tokens.device),
            reveal_steps=reveal_steps.to(tokens.device) if options.output_reveal_steps else None,
            computed=(computed if cache is None else cache.computed).to(tokens.device),
        )

    def trunk(self) -> Callable:
        """`(input_ids, timesteps, attention_mask, hidden_rows) -> last_hidden_state` at those rows, which the head takes."""
        return self.model

    def cached_trunk(self, request: Request) -> CachedTrunk | None:
        """What keeps keys and values from one forward to the next, as the request's `cache` says."""
        if request.options.cache in (None, "none"):
            return None
        self.check_cache(request.options.cache)
        return CachedTrunk(self, request.options.cache, *request.tokens.shape)

    def check_cache(self, cache: str):
        """Raises ValueError when the network cannot run on a part of the canvas."""
        check_attention(self.config._attn_implementation)

    def states_at(
        self,
        input_ids: torch.LongTensor,
        timesteps: torch.Tensor,
        columns: torch.LongTensor,
        mask: torch.BoolTensor,
        memory: Memory,
    ) -> torch.Tensor:
        """What the head is given to predict a part of the canvas, the other tokens being in a memory: [b, m, d].

        Args:
            input_ids, columns: [b, m]: the tokens, and the column of each in its row, which has no padding on the left.
            timesteps: [b].
            mask: [b, m, past + m]: who sees whom, of the tokens in the memory and of these.
            memory: see `Memory.look`.
        """
        bias = attention_bias(mask, self.config._attn_implementation, self.dtype)
        inputs = {"input_ids": input_ids, "timesteps": timesteps, "position_ids": columns, "attention_mask": bias}
        return self.model(**inputs, past_key_values=memory).last_hidden_state

    def padding_mask(self, seen: torch.BoolTensor) -> torch.Tensor:
        """The trunk's `attention_mask` for the positions [b, L] that are not padding.

        Made here, since the model would ask the device whether there is padding at all.
        """
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=torch.empty(*seen.shape, 0, dtype=self.dtype, device=seen.device),
            attention_mask=seen,
            allow_is_bidirectional_skip=False,
        )

    def denoiser(
        self,
        seen: torch.BoolTensor | None = None,
        prompt: torch.BoolTensor | None = None,
        guidance_scale: float | None = None,
        processors: LogitsProcessorList | None = None,
        early: torch.BoolTensor | None = None,
        eos_token_ids: Sequence[int] = (),
        compile: bool = False,
        coupling: bool = False,
        cache: CachedTrunk | None = None,
        **draw,
    ) -> Denoiser:
        """What a `Canvas` asks of this model.

        Args:
            seen: [B, L] bool, CPU: the positions of the canvas that are not padding; all by default.
            prompt: [B, L] bool, CPU: the tokens to guide by; with `guidance_scale` alone.
            guidance_scale: of classifier-free guidance against the masked prompt: two forwards instead of one.
            processors: of the logits.
            early: [B, L] bool, CPU: the positions of the canvas at which none of `eos_token_ids` is drawn.
            compile: run the trunk through `torch.compile`.
            coupling: draw through the model's chain, see `coupling_mdlm.py`.
            cache: runs the trunk, on a part of the canvas; without guidance and `compile`.
            draw: temperature, top_k, top_p, dtype; see `draw_tokens`.
        """
        guided, padded = guidance_scale is not None, seen is not None and not seen.all()
        chains = None
        if coupling:
            weights = self.coupling(self.get_input_embeddings().weight)
            chains = Chains(weights, self.config.coupling["window"], draw.get("dtype", torch.float64))
        shown, prompt = (None if mask is None else send(mask, self.device) for mask in (seen, prompt))
        process, head = process_of(self.config), self.get_output_embeddings()
        network = self.trunk()
        if compile:
            network = torch.compile(network, mode="reduce-overhead", dynamic=False)

        def trunk(
            tokens: torch.Tensor, rows: torch.Tensor, time: torch.Tensor, wanted: torch.Tensor | None
        ) -> torch.Tensor:
            sigma = send(process.sigma(time), tokens.device)
            if cache is not None:
                return cache(tokens, rows, sigma, wanted)
            if guided:
                without = tokens.masked_fill(prompt[rows], process.mask_token_id)
                tokens, rows, sigma = torch.cat([tokens, without]), rows.repeat(2), sigma.repeat(2)
                wanted = None if wanted is None else wanted.repeat(2, 1)
            attention_mask = self.padding_mask(shown[rows]) if padded else None
            inputs = {"input_ids": tokens, "timesteps": sigma, "attention_mask": attention_mask}
            hidden = network(**inputs, hidden_rows=wanted).last_hidden_state
            return hidden.unflatten(0, (2, -1)).movedim(0, 2) if guided else hidden

        def logits_of(hidden: torch.Tensor, tokens: torch.Tensor, row_of: torch.Tensor) -> torch.Tensor:
            logits = head(hidden)
            if guided:
                conditional, without = logits.float().unbind(dim=1)
                logits = without + guidance_scale * (conditional - without)
            return processors(tokens[row_of], logits.float()) if processors else logits

        barred = None
        if early is not None:
            ends = torch.zeros(process.vocab_size, dtype=torch.bool)
            ends[list(eos_token_ids)] = True
            barred = early, ends.to(self.device)
        return Denoiser(
            trunk=trunk,
            head=logits_of,
            process=process,
            draw=draw,
            forwards=2 if guided else 1,
            static_shapes=compile,
            barred=barred,
            chains=chains,
            seen=seen,
        )

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, **kwargs
    ):
        """Called by `from_pretrained`: takes over the given generation config, or the one saved with the model."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        if generation_config is not None or pretrained_model_name_or_path is None:
            return
        kwargs.pop("trust_remote_code", None)
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            logger.info("no generation_config.json beside the model: the library's defaults hold")


@dataclass(frozen=True)
class Watchers:
    """What follows a generation: a streamer of transformers and a callback."""

    streamer: object | None
    callback: Callable[[int, torch.LongTensor], None] | None

    def __post_init__(self):
        if self.streamer is not None and not (hasattr(self.streamer, "put") and hasattr(self.streamer, "end")):
            raise ValueError(f"streamer must have put and end, as a TextStreamer has, not {self.streamer!r}")
        if self.callback is not None and not callable(self.callback):
            raise ValueError(f"callback must be a function of a step and a canvas, not {self.callback!r}")

    def draft(self, step: int, tokens: torch.LongTensor):
        if hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(tokens[:1])
        if self.callback is not None:
            self.callback(step, tokens)

    def end(self, row: torch.LongTensor, request: Request):
        """The first row, once it is final: its prompt, then the rest, since a streamer may be told to skip the prompt."""
        if self.streamer is None:
            return
        row = row[request.seen[0].to(row.device)]
        prompt = int(request.fillable[0][request.seen[0]].long().argmax())
        self.streamer.put(row[:prompt])
        self.streamer.put(row[prompt:])
        self.streamer.end()


@dataclass(frozen=True)
class Block:
    """A part of each row that is filled at once, and the window that the network sees meanwhile. All on the CPU.

    Args:
        first_step: the number of its first step, whatever the blocks before took.
        members: [B, length] bool: the positions of the block.
        columns: [B, W]: the columns of the canvas that the window shows, row by row.
        positions: [B, W]: the positions of these tokens in their row, padding not counted.
        seen: [B, W] bool: those that are not padding.
        first, end: [B]: the first column of the window that is in the block, and the first one behind it.
    """

    first_step: int
    members: torch.BoolTensor
    columns: torch.LongTensor
    positions: torch.LongTensor
    seen: torch.BoolTensor
    first: torch.LongTensor
    end: torch.LongTensor


def blocks_of(request: Request, config: MDLMConfig) -> Iterator[Block]:
    """The blocks to fill one after the other.

    A row is cut from its first mask on, its padding left out: it has the same blocks in any batch. The network sees the
    canvas as far as the context goes (LLaDA, arXiv 2502.09992, Sec. 2.4); beyond that, the context's last tokens up to the
    block's end (MDLM's semi-autoregressive sampler). A block model's blocks are its own, counted from the first token, and
    it is shown nothing behind them, which they would not see.
    """
    own_blocks = getattr(config, "block_size", None) is not None
    fillable, seen, context = request.fillable, request.seen, config.max_position_embeddings
    size = request.options.block_length or fillable.shape[1]
    order = (~seen).long().argsort(dim=1, stable=True)  # the columns of a row's tokens, then those of its padding
    position, end = seen.cumsum(dim=1) - 1, seen.sum(dim=1, keepdim=True)
    first = position.gather(1, fillable.long().argmax(dim=1, keepdim=True)) * (not own_blocks)
    numbers = torch.where(fillable, (position - first) // size, -1)
    for number in range(int(numbers.max()) + 1):
        begin = first + number * size
        right = block_end = (begin + size).minimum(end)
        if config.mask_token_id is not None and not own_blocks:  # uniform noise has no token for what is still to come
            right = right.clamp(min=context)
        right = right.minimum(end)
        left = (right - context).clamp(min=0)
        positions = left + torch.arange(int((right - left).max()))
        yield Block(
            first_step=number * request.steps_of_a_block,
            members=numbers == number,
            columns=order.gather(1, positions),
            positions=positions,
            seen=positions < right,
            first=(begin - left)[:, 0],
            end=(block_end - left)[:, 0],
        )


def end_rows(
    tokens: torch.LongTensor, fillable: torch.BoolTensor, reveal_steps: torch.LongTensor, request: Request
) -> bool:
    """Ends the rows in which an end-of-sequence token was revealed: what follows it becomes padding.

    All three tensors are changed in place. Returns whether there is such a row.
    """
    ends = torch.isin(tokens, torch.tensor(request.eos_token_ids, device=tokens.device)).cpu() & (reveal_steps >= 0)
    behind = (ends.cumsum(dim=1) - ends.long() > 0) & fillable
    tokens[behind.to(tokens.device)] = request.pad_token_id
    reveal_steps[behind] = -1
    fillable &= ~behind
    return bool(behind.any())


__all__ = ["MDLMGenerationConfig", "MDLMGenerationMixin", "MDLMGenerationOutput"]
