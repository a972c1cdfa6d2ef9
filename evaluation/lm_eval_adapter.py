"""Models of this library in the lm-evaluation-harness (the extra `lm-eval`): `mcd-lm-eval run --model mcd --model_args path=MODEL`.

`loglikelihood` is minus the NELBO of the continuation given its context, with a fixed number of masked tokens (`sequence_nelbo`;
LLaDA, arXiv 2502.09992): exact by enumeration for as many as 7 tokens at 128 draws. The answers to one question share their
draws, so their order is far more certain than each figure. The processes of a launch share the questions.
"""

import json
import os
from collections import Counter

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm.auto import tqdm

from evaluation.likelihood import block_nelbo
from evaluation.sequence_nelbo import EVEN, sequence_nelbo
from evaluation.team import joined_team, launched_team
from evaluation.text import encode
from modeling_mcd.checks_mdlm import check_number
from modeling_mcd.generation_config_mdlm import DEFAULTS
from modeling_mcd.generation_inputs_mdlm import end_of_sequence
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer
from modeling_mcd.sampling_mdlm import SAMPLERS, options_of


@register_model("mcd")
class MaskedDiffusionLM(TemplateLM):
    """
    Args:
        path: of the model, as `load_model` takes it.
        tokenizer: folder or Hub name; that of the model by default.
        draws: of the masked tokens of each continuation, an even number.
        steps: of `generate_until`, for each block; one for every second token by default.
        batch_size: rows of a forward.
        device: where the model runs. The harness's own default, `cuda:0`, is the GPU of each process, or the CPU where there is none.
        seed: of the draws and of the samples.
        add_bos_token: whether every context begins with a BOS, as the windows of our training do.

    Raises:
        ValueError: an odd number of draws, a tokenizer that does not fit, or several processes that are not joined.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        draws: int = 128,
        steps: int | None = None,
        batch_size: int | str = 32,
        device: str | None = None,
        seed: int = 0,
        add_bos_token: bool = False,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        check_number("draws", draws, EVEN)
        self.team = joined_team()
        if self.team.size == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes are not joined: start mcd-lm-eval, or call "
                "torch.distributed.init_process_group first"
            )
        self._rank, self._world_size = self.team.rank, self.team.size
        if device in (None, "cuda:0"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self.model = load_model(path).to(self._device).eval()
        self.tokenizer = load_tokenizer(tokenizer or path)
        check_tokens(self.tokenizer, self.model.config)
        self.name, self.draws, self.steps, self.seed = path, draws, steps, int(seed)
        self.add_bos_token = add_bos_token
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 32

    # --- What the harness asks of the processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.reshape(-1) for part in self.team.gather(tensor.cpu())])

    def gather_object(self, obj, dst: int = 0) -> list | None:
        parts = self.team.gather(obj)
        return parts if self.rank == dst else None

    def barrier(self):
        self.team.gather(None)

    # --- Tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused) -> list[int]:
        """The ids of a text. The names of special tokens, which a chat template writes, stand for them; `[MASK]` is letters."""
        mask = self.tokenizer.mask_token
        ids = []
        for number, part in enumerate(string.split(mask) if mask else [string]):
            ids += encode([mask], self.tokenizer)[0] if number else []
            ids += self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] if part else []
        return ids

    def context_of(self, ids: list[int], room: int) -> list[int]:
        """A context that fits into so many tokens: what is too long is cut on the left."""
        start = [self.prefix_token_id] if self.add_bos_token and ids[:1] != [self.prefix_token_id] else []
        return [*start, *ids[max(len(ids) + len(start) - room, 0) :]]

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # --- Likelihood

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **unused) -> list[tuple[float, bool]]:
        pairs = [(context, rest) for _, context, rest in requests]
        nats = self.nats_of(pairs, disable_tqdm)
        found = list(zip([-value for value in nats], self.likeliest(pairs), strict=True))
        for (texts, _, _), score in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of complete texts, in disjoint windows of the model's length, each given one BOS: a bidirectional model gains nothing from overlaps."""
        pairs, owners, size = [], [], self.max_length - 1
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs += [([self.prefix_token_id], ids[start : start + size]) for start in range(0, len(ids), size)]
            owners += [number] * (len(pairs) - len(owners))
        found = [0.0] * len(requests)
        for owner, nats in zip(owners, self.nats_of(pairs, disable_tqdm), strict=True):
            found[owner] -= nats
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def nats_of(self, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool = True) -> list[float]:
        """The NELBO of each continuation given its context, in nats. Every question has the same draws, so its answers share theirs.

        Raises:
            ValueError: a continuation alone is longer than the model's context.
        """
        nats = [0.0] * len(pairs)
        with tqdm(total=len(pairs), unit="text", desc="likelihood", disable=disable_tqdm or self.rank > 0) as bar:
            for given, places, texts in self.batches(pairs):
                prompt = (torch.arange(texts.shape[1]) < given).expand_as(texts)
                if self.model.config.mask_token_id is None:
                    found = [self.uniform_nats(text, given) for text in texts]
                else:
                    seeds = [self.seed] * len(texts)
                    found = sequence_nelbo(self.model, texts, prompt, self.draws, seeds, self.batch_size).nats.tolist()
                for place, value in zip(places, found, strict=True):
                    nats[place] = value
                bar.update(len(places))
        return nats

    def uniform_nats(self, text: torch.LongTensor, given: int) -> float:
        """The NELBO under uniform noise, at `draws` stratified times: copies of the text [L], so that they share forwards."""
        copies = text.expand(self.draws, -1)
        prompt = (torch.arange(len(text)) < given).expand_as(copies)
        return block_nelbo(self.model, copies, 1, self.batch_size, self.seed, prompt_mask=prompt).nats.mean().item()

    @torch.no_grad()
    def likeliest(self, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy decoding, one token at a time and the surest first, writes each continuation."""
        found, uniform = [True] * len(pairs), self.model.config.mask_token_id is None
        for given, places, texts in self.batches(pairs):
            count = texts.shape[1] - given
            how = {"sampler": "ancestral", "last_step": "greedy"} if uniform else {"sampler": "confidence"}
            drawn = self.model.generate(
                texts[:, :given].to(self.model.device),
                max_new_tokens=count,
                steps=count,
                temperature=0.0,
                seed=[self.seed] * len(texts),
                return_dict_in_generate=False,
                **how,
            )
            for place, same in zip(places, (drawn.cpu() == texts).all(dim=1).tolist(), strict=True):
                found[place] = same
        return found

    def batches(self, pairs: list[tuple[list[int], list[int]]]):
        """Yields pairs of one shape: the length of the context, the places of the pairs, and their texts [n, L]."""
        by_shape = {}
        for place, (context, rest) in enumerate(pairs):
            if len(rest) >= self.max_length:
                raise ValueError(
                    f"a continuation has {len(rest)} tokens, but the context of {self.name!r} is {self.max_length}"
                )
            if rest:
                context = self.context_of(context, self.max_length - len(rest))
                by_shape.setdefault((len(context), len(rest)), []).append((place, [*context, *rest]))
        for (given, _), rows in by_shape.items():
            for start in range(0, len(rows), self.batch_size):
                places, texts = zip(*rows[start : start + self.batch_size], strict=True)
                yield given, places, torch.tensor(texts)

    # --- Text

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """All `max_gen_toks` tokens are written at once, and cut at the first stop string or end of sequence.

        `generation_kwargs` may hold any option of `generate`. A request that is repeated gets the next seed each time.
        """
        texts, by_options, turns = [""] * len(requests), {}, Counter()
        for place, request in enumerate(requests):
            context, given = request.args
            name = json.dumps(given, sort_keys=True, default=str)
            by_options.setdefault(name, []).append((place, context, self.seed + turns[context, name]))
            turns[context, name] += 1
        with tqdm(total=len(requests), unit="text", desc="text", disable=disable_tqdm or self.rank > 0) as bar:
            for rows in by_options.values():
                until, count, options = self.generation_options(requests[rows[0][0]].args[1])
                for start in range(0, len(rows), self.batch_size):
                    places, contexts, seeds = zip(*rows[start : start + self.batch_size], strict=True)
                    for place, text in zip(places, self.write(contexts, count, seeds, options), strict=True):
                        for stop in until:
                            text = text.split(stop)[0] if stop else text
                        texts[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update(len(places))
        return texts

    def generation_options(self, given: dict) -> tuple[list[str], int, dict]:
        """Where a text ends, how many tokens are written, and the options of `generate`, from `generation_kwargs`."""
        options, config = dict(normalize_gen_kwargs(given)), self.model.config
        until = handle_stop_sequences(options.pop("until"), self.tokenizer.eos_token)
        until += [self.tokenizer.decode([token]) for token in end_of_sequence(self.model.generation_config, config)[0]]
        count = min(options.pop("max_gen_toks"), self.max_length - 1)
        options.pop("do_sample", None)
        options.setdefault("temperature", 0.0)
        sampler = options.get("sampler") or self.model.generation_config.sampler or DEFAULTS["sampler"]
        samplers = SAMPLERS[config.diffusion_kind]
        if sampler in samplers and "steps" in options_of(samplers[sampler]):
            block = min(options.get("block_length") or getattr(config, "block_size", None) or count, count)
            options.setdefault("steps", self.steps or max(1, block // 2))
        return until, count, options

    def write(self, contexts: tuple[str, ...], count: int, seeds: tuple[int, ...], options: dict) -> list[str]:
        """The `count` tokens that follow each context, as text."""
        rows = [self.context_of(self.tok_encode(text), self.max_length - count) for text in contexts]
        rows = [torch.tensor(ids or [self.prefix_token_id]) for ids in rows]
        width = max(map(len, rows))
        shape = {"batch_first": True, "padding_side": "left"}
        canvas = torch.nn.utils.rnn.pad_sequence(rows, padding_value=self.prefix_token_id, **shape)
        seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rows], **shape)
        drawn = self.model.generate(
            canvas.to(self.model.device),
            attention_mask=seen.to(self.model.device),
            max_new_tokens=count,
            seed=list(seeds),
            return_dict_in_generate=False,
            **options,
        )
        return [self.tokenizer.decode(ids[width:], skip_special_tokens=False) for ids in drawn]


def main():
    """The harness's own command line, which knows the model `mcd`; the processes of a launch share the work."""
    from lm_eval.__main__ import cli_evaluate

    with launched_team():
        cli_evaluate()


if __name__ == "__main__":
    main()
