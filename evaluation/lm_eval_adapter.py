"""Models of this library in the lm-evaluation-harness (the extra `lm-eval`): `mcd-lm-eval run --model mcd --model_args path=MODEL`.

`loglikelihood` is minus the NELBO of the continuation given its context, with a fixed number of masked tokens (`sequence_nelbo`;
LLaDA, arXiv 2502.09992): exact by enumeration for as many as 7 tokens at 128 draws. The answers to one question share their
draws, so their order is far more certain than each figure.
"""

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from evaluation.sequence_nelbo import sequence_nelbo
from evaluation.text import encode
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer


@register_model("mcd")
class MaskedDiffusionLM(TemplateLM):
    """
    Args:
        path: of the model, as `load_model` takes it.
        tokenizer: folder or Hub name; that of the model by default.
        draws: of the masked tokens of each continuation, an even number.
        steps: of `generate_until`; one for every second token by default.
        batch_size: rows of a forward.
        device: where the model runs.
        seed: of the draws and of the samples.
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
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = load_model(path).to(self._device).eval()
        self.tokenizer = load_tokenizer(tokenizer or path)
        check_tokens(self.tokenizer, self.model.config)
        if self.model.config.mask_token_id is None:
            raise ValueError(
                f"{path!r} is of uniform diffusion, which has no fixed number of masked tokens: no task reads it"
            )
        self.name, self.draws, self.steps, self.seed = path, int(draws), steps, int(seed)
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else 32

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
        return encode([string], self.tokenizer)[0]

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **unused) -> list[tuple[float, bool]]:
        found = self.scores([(context, rest) for _, context, rest in requests])
        for (texts, _, _), score in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, score)
        return found

    def scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is what all tokens at once would be) of each continuation given its context.

        A context that does not fit is cut on the left. Every question has the same draws, so its answers share theirs.
        """
        found, by_shape = [(0.0, True)] * len(pairs), {}
        for place, (context, rest) in enumerate(pairs):
            if len(rest) >= self.max_length:
                raise ValueError(
                    f"a continuation has {len(rest)} tokens, but the context of {self.name!r} is {self.max_length}"
                )
            if rest:
                context = context[-(self.max_length - len(rest)) :]
                by_shape.setdefault((len(context), len(rest)), []).append((place, [*context, *rest]))
        for (given, count), rows in by_shape.items():
            for start in range(0, len(rows), self.batch_size):
                places, texts = zip(*rows[start : start + self.batch_size], strict=True)
                texts = torch.tensor(texts)
                prompt = (torch.arange(given + count) < given).expand_as(texts)
                seeds = [self.seed] * len(texts)
                nelbo = sequence_nelbo(self.model, texts, prompt, self.draws, seeds, self.batch_size)
                likeliest = self.likeliest(texts, given)
                for place, nats, greedy in zip(places, nelbo.nats.tolist(), likeliest, strict=True):
                    found[place] = -nats, greedy
        return found

    @torch.no_grad()
    def likeliest(self, texts: torch.LongTensor, given: int) -> list[bool]:
        """Whether greedy decoding, one token at a time and the surest first, writes each continuation."""
        canvas = texts.clone()
        canvas[:, given:] = self.model.config.mask_token_id
        options = {"sampler": "confidence", "steps": texts.shape[1] - given, "temperature": 0.0, "seed": self.seed}
        drawn = self.model.generate(canvas.to(self.model.device), **options).cpu()
        return (drawn == texts).all(dim=1).tolist()

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of complete texts, in disjoint windows of the model's length, each given one BOS: a bidirectional model gains nothing from overlaps."""
        found = []
        for request in requests:
            (text,) = request.args
            ids, size = self.tok_encode(text), self.max_length - 1
            pairs = [([self.prefix_token_id], ids[start : start + size]) for start in range(0, len(ids), size)]
            found.append(sum(score for score, _ in self.scores(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """All `max_gen_toks` tokens are written at once, and cut at the first stop string."""
        texts = []
        for request in requests:
            context, options = request.args
            options = normalize_gen_kwargs(options)
            count = min(options["max_gen_toks"], self.max_length - 1)
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - count) :]
            canvas = torch.tensor([ids], device=self.model.device)
            drawn = self.model.generate(
                canvas,
                max_new_tokens=count,
                steps=self.steps or max(1, count // 2),
                temperature=options.get("temperature", 0.0),
                seed=self.seed,
            )
            text = self.tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=False)
            for stop in handle_stop_sequences(options["until"], self.tokenizer.eos_token):
                text = text.split(stop)[0] if stop else text
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def main():
    """The harness's own command line, which knows the model `mcd`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
