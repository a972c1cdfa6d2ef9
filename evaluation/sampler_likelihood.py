"""The likelihood of the sampler that is used, with its N steps: the sampler runs on a canvas that reveals a given text."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from tqdm.auto import tqdm

from evaluation.likelihood import Bound, scored_tokens
from modeling_mcd.canvas_mdlm import Answer, Canvas
from modeling_mcd.checks_mdlm import COUNT, check_number
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
