"""Likelihood on held-out blocks: the NELBO, the likelihood of the sampler that is used, and the loss of an autoregressive model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from evaluation.generative_perplexity import sequence_nll
from modeling_mcd.canvas_mdlm import Answer, Canvas
from modeling_mcd.checks_mdlm import COUNT, check_number, check_shape
from modeling_mcd.draws_mdlm import substitute
from modeling_mcd.forward_process_mdlm import at_positions, posterior_weights, process_of, sigma_of
from modeling_mcd.generation_config_mdlm import DEFAULTS, LENGTHS, MDLMGenerationConfig
from modeling_mcd.generation_inputs_mdlm import Request, prepare
from modeling_mcd.generation_mdlm import blocks_of
from modeling_mcd.reveal_grid_mdlm import step_times, steps_of
from modeling_mcd.sampling_mdlm import ORDERED, PLANNED


# What changes the law of a draw, or the text after it, and the values under which it does not.
PLAIN = {
    "temperature": (1,),
    "order_temperature": (None, 0),
    "top_k": (None,),
    "top_p": (None,),
    "suppress_tokens": (None, [], ()),
    "suppress_above": (None,),
    "eos_after": (None, 0),
    "guidance_scale": (None,),
    "precision": ("float64", "float32"),
    "stop_at_eos": (False, None),
    "num_return_sequences": (1, None),
    "last_step": (None, "ancestral"),
}
# Why the other samplers have no likelihood.
UNLIKELY = {
    "remdm": "it masks tokens again, so many paths give one text",
    "psi": "it masks tokens again, so many paths give one text",
}


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p of some blocks: what `step_bound` and `block_nelbo` return.

    Args:
        nats: [n] float64, CPU: of each block.
        tokens: [n] int64, CPU: how many of its tokens were scored.
        exact: whether `nats` are -log p itself: the sampler has one path to each text.
    """

    nats: torch.DoubleTensor
    tokens: torch.LongTensor
    exact: bool = False

    @property
    def mean(self) -> float:
        """Nats per token, over all blocks."""
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def error(self) -> float | None:
        """Standard error of `mean` over blocks and their noise; None for a single block."""
        return _standard_error(self.nats - self.mean * self.tokens, self.tokens)

    def minus(self, other: "Bound") -> tuple[float, float | None]:
        """The difference of two means over the same blocks, and its standard error.

        The error is that of the pairs: what makes a text hard under both cancels.
        """
        if not torch.equal(self.tokens, other.tokens):
            raise ValueError("a paired difference needs two bounds of the same blocks with the same prompts")
        difference = self.mean - other.mean
        return difference, _standard_error(self.nats - other.nats - difference * self.tokens, self.tokens)


def _standard_error(residuals: torch.Tensor, tokens: torch.Tensor) -> float | None:
    """Of a ratio of sums over blocks (nats / tokens), from the blocks' residuals."""
    count = len(residuals)
    if count < 2:
        return None
    return (residuals.square().sum() / (count - 1)).sqrt().item() / (tokens.double().mean().item() * math.sqrt(count))


@torch.no_grad()
def block_nelbo(
    model,
    blocks: torch.Tensor,
    draws: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    prompt_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> Bound:
    """Continuous-time NELBO of a model (MDLM, Eq. 10; Duo, Eq. 17) for each block, in nats.

    All tokens of a block are scored but for any [MASK] that it holds: it is neither noised nor scored nor counted. A block
    model's own blocks are each noised by themselves, given the clean ones before them (BD3-LM, arXiv 2503.09573, Eq. 6).

    Each block is noised at `draws` times, one in each of as many equal parts of (0, 1]; over all blocks the times of a
    part are stratified too, in random order, so that the estimate is unbiased. The noise depends on the seed and the
    shape of the blocks alone: not on the batch size, the model or the device. Log-probabilities are float32, sums
    float64, and the head runs in chunks (`HeadRows.map`): the logits [B, L, V] are never built.

    Args:
        model: an `MDLMForMaskedDiffusion`.
        blocks: [n, L] token ids, with L a multiple of a block model's `block_size`.
        prompt_mask: [n, L], 1: given, so neither noised nor scored nor counted.
        attention_mask: [n, L], 0: padding, which is not seen either.

    Raises:
        ValueError: when the blocks or a mask have another shape, or leave nothing to score; when a number is below 1.
    """
    check_number("draws", draws, COUNT)
    check_number("batch_size", batch_size, COUNT)
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    if blocks.ndim != 2:
        raise ValueError(f"blocks must have the shape (n, L), not {tuple(blocks.shape)}")
    own = getattr(model.config, "block_size", None)
    if own is not None and blocks.shape[1] % own:
        raise ValueError(
            f"blocks are {blocks.shape[1]} tokens long, which must be a multiple of the model's block_size ({own})"
        )
    parts = 1 if own is None else blocks.shape[1] // own  # of each block, with a time of its own
    count, length = len(blocks) * parts, blocks.shape[1] // parts
    process, device = process_of(model.config), model.device
    maskable = process.maskable(blocks)
    for name, mask in (("prompt_mask", prompt_mask), ("attention_mask", attention_mask)):
        if mask is not None:
            check_shape(name, mask, blocks.shape)
            maskable &= mask.bool() == (name == "attention_mask")
    if not maskable.any():
        what = "nothing but [MASK], prompts and padding, or nothing at all"
        raise ValueError(f"blocks {tuple(blocks.shape)} hold no token to score: {what}")
    generator = torch.Generator().manual_seed(seed)
    total, was_training = torch.zeros(len(blocks), dtype=torch.float64), model.training
    model.eval()
    try:
        for draw in range(draws):
            # rand is in [0, 1), so 1 - rand keeps t away from 0, where the weight is infinite.
            order = torch.randperm(count, generator=generator)
            stratum = order + 1 - torch.rand(count, dtype=torch.float64, generator=generator)
            t = (draw + stratum / count) / draws
            gamma, slope = process.schedule.gamma(t), process.schedule.derivative(t)
            u = torch.rand(count, length, dtype=torch.float64, generator=generator)
            noised, scored = process.corrupt(blocks.reshape(count, length), gamma, u, maskable.reshape(count, length))
            noised, scored = noised.view(blocks.shape), scored.view(blocks.shape)
            gamma, slope = (values.view(-1, parts).repeat_interleave(length, dim=1) for values in (gamma, slope))
            for rows in torch.arange(len(blocks)).split(batch_size):
                z_t, x_0, positions = (tensor[rows].to(device) for tensor in (noised, blocks, scored))
                given = {"timesteps": sigma_of(gamma[rows, 0]).to(device)} if own is None else {"clean_ids": x_0}
                given |= {} if attention_mask is None else {"attention_mask": attention_mask[rows].to(device)}
                head = model(input_ids=z_t, hidden_rows=positions, **given)
                levels = (values[rows].to(device)[positions] for values in (gamma, slope))
                nats = head.map(process.nelbo, z_t[positions], x_0[positions], *levels)
                of_tokens = torch.zeros(positions.shape, dtype=torch.float64, device=device)
                of_tokens[positions] = nats.double()
                total[rows] += of_tokens.sum(dim=1).cpu()
    finally:
        model.train(was_training)
    return Bound(total / draws, maskable.sum(dim=1))


def validation_nelbo(
    model, blocks: torch.Tensor, draws: int = 4, batch_size: int = 32, seed: int = 0, **masks: torch.Tensor
) -> float:
    """The mean of `block_nelbo` over all tokens that it scores: nats per token."""
    return block_nelbo(model, blocks, draws, batch_size, seed, **masks).mean


def causal_loss(judge: PreTrainedModel, blocks: torch.Tensor, batch_size: int = 8) -> float:
    """Cross-entropy of a causal LM in nats per token: the mean over the L - 1 predictions of every block [n, L]."""
    nll, tokens = sequence_nll(torch.as_tensor(blocks).tolist(), judge, batch_size)
    if not tokens.sum():
        raise ValueError("there is no block of two tokens or more: nothing to score")
    return (nll.sum() / tokens.sum()).item()


# --- The likelihood of the sampler that is used


class TeacherForcedCanvas(Canvas):
    """A canvas on which a sampler reveals a given text: every reveal scores the text's tokens and writes them in.

    Any sampler that fills the canvas by `Canvas.reveal`, `Answer.reveal` or `Answer.write` runs on it as it is: its plan or
    order, its times and its forwards are its own.

    Args:
        text: [B, L] int64, on the network's device.
        canvas: what a `Canvas` takes.

    Attributes:
        nats: [B, L] float64, on the network's device: -log p(token | what was visible before its step); 0 elsewhere. Under a
            coupling a step's tokens share equally what it adds to their joint log-probability.
    """

    def __init__(self, text: torch.LongTensor, *canvas, **options):
        super().__init__(*canvas, **options)
        self.text, self.nats = text, torch.zeros(text.shape, dtype=torch.float64, device=text.device)

    def ask(self, *arguments, **options) -> Answer:
        answer = super().ask(*arguments, **options)
        return TeacherForcedAnswer(self, answer.where, answer.hidden, answer.tokens, answer.row_of)

    def reveal(self, where: torch.BoolTensor, time: float | torch.Tensor, greedy: bool = False):
        """Scores the text at the positions [B, L] and fills them with it; no position, no forward."""
        if greedy:
            raise ValueError("a greedy reveal has no likelihood: other texts than its own have probability zero")
        if not where.any():
            return
        if self.denoiser.chains is None:
            self.score(where, self.ask(where, time, sparing=True))
            return
        for answer, chain in self.ask_jointly(where, time):
            chosen = where & answer.where
            rows = chosen.any(dim=1)
            revealed, text = self.send(chosen[rows]), self.text[self.send(rows)]
            gain = chain.log_gain(*answer.evidence(chain), revealed, text)
            self.score(chosen, answer.at(chosen), at_positions(gain / revealed.sum(dim=1), revealed))

    def score(self, where: torch.BoolTensor, answer: Answer, gain: torch.Tensor | float = 0.0):
        """Scores the text at the positions of an answer, plus what a chain adds to each log-probability, and writes it."""
        places = self.send(where)
        truth = self.text[places]
        log_p = partial(log_probability_of, mask_token_id=self.mask_token_id)
        scores = answer.map(log_p, truth) + gain
        self.nats[places] = -scores
        self.write(where, truth.where(scores.isfinite(), -1))


class TeacherForcedAnswer(Answer):
    """An answer that scores and writes the text: for a sampler that looks at the scores, or draws, before it chooses."""

    def reveal(self, chosen: torch.BoolTensor, v: torch.Tensor | None = None, greedy: bool = False):
        self.canvas.score(chosen, self.at(chosen))

    def write(self, chosen: torch.BoolTensor, tokens: torch.LongTensor):
        self.reveal(chosen)


def step_bound(
    model,
    blocks: torch.Tensor,
    prompt_mask: torch.Tensor | None = None,
    generation_config: MDLMGenerationConfig | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    progress: bool = False,
    **options,
) -> Bound:
    """The likelihood of held-out blocks under the sampler that is used, with its N steps, in nats: exact, or an upper bound.

    A plan (G_1, ..., G_N) that is drawn independently of the text makes N steps a model of their own,
    p_N(x) = E_plan prod_k prod_{i in G_k} p(x_i | x revealed before k), and by Jensen's inequality

        -log p_N(x) <= E_plan sum_k sum_{i in G_k} -log p(x_i | x revealed before k).

    The right side is what this returns for the samplers of `PLANNED`, with one plan for each block. Those of `ORDERED` reveal
    what the visible tokens say, so one path alone gives a text, and -log p_N(x) is the sum over that path (DUEL, arXiv
    2603.01367): this returns it, and `exact` is True. The sampler itself runs, on a canvas that reveals the text. So it costs the
    sampler's own forwards, the head runs on the revealed rows alone, in chunks, and every option of `generate` that shapes a
    plan (`steps`, `sampler`, `locking`, `block_length`, `last_step`, ...) has its meaning here. So has `cache`: an approximate
    one makes another sampler, and the bound is that sampler's.
    Under the independent `ancestral` sampler the limit N -> infinity is the NELBO.

    For a uniform-state model the bound is the ELBO of its N-step chain: the divergences of the true posterior from the
    model's at every step, that of z_1 from the prior, and the last draw (Sohl-Dickstein et al., arXiv 1503.03585; the
    posterior of Duo, arXiv 2506.10892).

    No likelihood rewards a draw that is sharper than the model's law: temperature, top_k, top_p, guidance and the
    truncated draws of the original code are refused.

    Args:
        model: an `MDLMForMaskedDiffusion`.
        blocks: [n, L] token ids without padding and without [MASK], L within the context.
        prompt_mask: [n, L] bool, True at the tokens that are given. The bound is then on the rest given these: only the
            rest is scored and counted.
        generation_config: options of `generate`; the model's own are not used.
        seed: fixes the plans as in `generate`, and changes nothing where the likelihood is exact; a sequence gives each block
            its own seed, so that its plan does not depend on the blocks around it. The same seed under another locking or N is
            the paired plan.
        batch_size: blocks at a time. Changes no plan.
        progress: show a progress bar.
        options: of `MDLMGenerationConfig`, over those of `generation_config`.

    Raises:
        ValueError: for a sampler that has no likelihood, by name; for an option that changes a draw's law or makes an order
            random; for blocks or masks of another shape, with nothing to score, or with [MASK].
    """
    check_number("batch_size", batch_size, COUNT)
    blocks = torch.as_tensor(blocks, dtype=torch.long)
    scored = scored_tokens(model.config, blocks, prompt_mask)
    options = _options_of(generation_config, options, model.config.diffusion_kind, blocks.shape[1])
    uniform = model.config.diffusion_kind == "uniform"
    seeds = None if isinstance(seed, int) else list(seed)
    generator = torch.Generator().manual_seed(seed) if seeds is None else None
    nats, was_training = [], model.training
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(blocks), unit="block", desc="bound", disable=not progress) as bar:
            for rows in torch.arange(len(blocks)).split(batch_size):
                text, fillable = blocks[rows].to(model.device), scored[rows]
                masked = None if uniform else text.masked_fill(fillable.to(text.device), model.config.mask_token_id)
                request = prepare(
                    model.config,
                    model.device,
                    model.generation_config,
                    given_config=options,
                    given={},
                    input_ids=text[:, :0] if uniform else masked,
                    attention_mask=None,
                    seed=None if seeds is None else [seeds[row] for row in rows.tolist()],
                    generator=generator,
                    logits_processor=None,
                )
                score = _of_chain if uniform else _of_plan
                nats.append(score(model, request, text, fillable).sum(dim=1).cpu())
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return Bound(torch.cat(nats), scored.sum(dim=1), exact=options.sampler in ORDERED)


def scored_tokens(config, blocks: torch.LongTensor, prompt_mask: torch.Tensor | None) -> torch.BoolTensor:
    """The tokens that a sampler would fill, [n, L] on the CPU."""
    if blocks.ndim != 2 or not len(blocks):
        raise ValueError(f"blocks must have the shape (n, L), and n at least 1, not {tuple(blocks.shape)}")
    if blocks.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"blocks are {blocks.shape[1]} tokens long, but the model's context is {config.max_position_embeddings}"
        )
    holes = torch.zeros(len(blocks)) if config.mask_token_id is None else (blocks == config.mask_token_id).sum(dim=1)
    if holes.any():
        raise ValueError(
            f"block {holes.nonzero()[0].item()} holds a [MASK] (id {config.mask_token_id}), which has no likelihood: "
            "give text alone"
        )
    if prompt_mask is None:
        return torch.ones(blocks.shape, dtype=torch.bool)
    check_shape("prompt_mask", prompt_mask, blocks.shape)
    scored = ~prompt_mask.cpu().bool()
    if not scored.any(dim=1).all():
        raise ValueError(f"prompt_mask covers all of block {scored.any(dim=1).logical_not().nonzero()[0].item()}")
    return scored


def check_bound(options: MDLMGenerationConfig, kind: str):
    """Raises ValueError, naming it, for an option of a sampler that has no likelihood under this `diffusion_kind`."""
    if kind == "uniform" and options.locking not in (None, "independent"):
        raise ValueError(
            f"locking {options.locking!r} has no N-step bound under uniform diffusion, where it joins the tokens of a draw: "
            "take 'independent'"
        )
    for name, allowed in PLAIN.items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} is {value!r}, but the likelihood is of the model's own law: leave it out")
    sampler = options.sampler or DEFAULTS["sampler"]
    if sampler == "dream" and options.order == "confidence":
        raise ValueError(
            "sampler 'dream' has no likelihood with the order 'confidence': the tokens that it draws decide which positions it "
            "keeps, so many paths give one text; take the order 'entropy' or 'margin'"
        )
    if sampler in UNLIKELY:
        raise ValueError(
            f"sampler {sampler!r} has no likelihood: {UNLIKELY[sampler]}; {', '.join(PLANNED + ORDERED)} have one"
        )


def _options_of(
    generation_config: MDLMGenerationConfig | None, given: dict, kind: str, length: int
) -> MDLMGenerationConfig:
    """The options of the sampler, checked, with the length of the blocks."""
    named = {} if generation_config is None else {k: v for k, v in vars(generation_config).items() if k in DEFAULTS}
    options = MDLMGenerationConfig(**named | given)
    check_bound(options, kind)
    for name in LENGTHS:
        setattr(options, name, None)
    options.length = length
    return options


def log_probability_of(logits: torch.Tensor, tokens: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Log-probability of one token a row, [m, V] and [m] -> [m] float64, as it is drawn; [MASK] has none (SUBS)."""
    scores = substitute(logits, mask_token_id, torch.float64)
    return scores.gather(-1, tokens[:, None])[:, 0] - scores.logsumexp(dim=-1)


def _of_plan(model, request: Request, text: torch.LongTensor, fillable: torch.BoolTensor) -> torch.DoubleTensor:
    """Nats of each token [B, L] under one plan a row, or along the order that the text itself gives.

    Block after block, as `generate` fills them, and from its caches.
    """
    nats = torch.zeros(text.shape, dtype=torch.float64, device=text.device)
    cache = model.cached_trunk(request)
    denoiser = model.denoiser(coupling=request.options.coupling, cache=cache)
    for block in blocks_of(request, model.config):
        if cache is not None:
            cache.enter(block.first, block.end, block.seen.sum(dim=1))
        # The window of a row without padding, within the context, is the row, or what a block model sees of it.
        to_fill = block.members & fillable
        canvas = TeacherForcedCanvas(text, request.tokens, to_fill, request.noise, denoiser, block.first_step)
        for _ in canvas.denoise(request.sampler(canvas)):
            pass
        nats += canvas.nats
    return nats


def _of_chain(model, request: Request, text: torch.LongTensor, fillable: torch.BoolTensor) -> torch.DoubleTensor:
    """Nats of each token [B, L] in the ELBO of the chain that `uniform_ancestral` draws, on its own grid.

    z_t of each step is drawn from q(z_t | x) with noise of its own, which leaves the expectation as it is.
    """
    process = process_of(model.config)
    times = step_times(request.options.steps, "ancestral")
    times = torch.cat([times, times.new_zeros(1)])  # the last step draws x itself: its divergence is -log p(x | z)
    alphas, places = process.schedule.gamma(times), fillable.to(text.device)
    nats = torch.zeros(text.shape, dtype=torch.float64, device=text.device)
    nats[places] = prior_divergence(alphas[0].item(), process.vocab_size)
    for number, (_, alpha_t, alpha_s) in enumerate(steps_of(times, alphas)):
        rows = alphas.new_full((len(text),), alpha_t)
        z_t = process.corrupt(text.cpu(), rows, request.noise.uniforms(number + 1)[0], fillable)[0].to(text.device)
        head = model(input_ids=z_t, timesteps=sigma_of(rows).to(text.device), hidden_rows=places)
        divergence = partial(posterior_divergence, alpha_t=alpha_t, alpha_s=alpha_s)
        nats[places] += head.map(divergence, z_t[places], text[places])
    return nats


def prior_divergence(alpha: float, vocab_size: int) -> float:
    """KL(q(z_1 | x) || uniform) of one token, in nats, under uniform noise that keeps a token with probability alpha."""
    at_x, elsewhere = alpha + (1 - alpha) / vocab_size, (1 - alpha) / vocab_size
    return at_x * math.log(vocab_size * at_x) + (vocab_size - 1) * elsewhere * math.log(vocab_size * elsewhere)


def posterior_divergence(
    log_x_hat: torch.Tensor, z_t: torch.Tensor, x_0: torch.Tensor, alpha_t: float, alpha_s: float
) -> torch.DoubleTensor:
    """KL(q(z_s | z_t, x_0) || q(z_s | z_t, x_hat)) of uniform diffusion, in nats: [R, V], [R], [R] -> [R] float64.

    Both are mixtures (`posterior_weights`); at alpha_s = 1 the true one is a point mass on x_0.
    """
    vocab_size = log_x_hat.shape[-1]

    def posterior(x: torch.DoubleTensor) -> torch.DoubleTensor:
        at_z = x.gather(-1, z_t[:, None])
        stay, predict = posterior_weights(at_z, alpha_t, alpha_s, vocab_size)
        noise = (1 - alpha_t / alpha_s) * (1 - alpha_s) / (vocab_size * alpha_t * at_z + 1 - alpha_t)  # exactly 0 at 1
        return (predict * x + noise / vocab_size).scatter_add(-1, z_t[:, None], stay)

    q = posterior(torch.nn.functional.one_hot(x_0, vocab_size).double())
    p = posterior(log_x_hat.double().exp())
    return torch.special.xlogy(q, q / p).where(q > 0, 0).sum(dim=-1)
