"""The figures of one row: its samples are drawn, read by the judges and counted. All processes share the work."""

import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.diversity import sample_entropies
from evaluation.figures import Samples, figures_of, over_seeds
from evaluation.generative_perplexity import perplexity_of, score
from evaluation.team import Team
from modeling_mcd.loading import reason_of
from modeling_mcd.noise_mdlm import row_keys


# Errors of one evaluation (no finite logits, no memory, ...), as opposed to mistakes in its settings.
TROUBLE = (ValueError, ArithmeticError, RuntimeError)


def draw_samples(
    model: PreTrainedModel,
    protocol,
    length: int,
    steps: int,
    temperature: float,
    locking: str,
    seed: int,
    share: range,
    on_batch: Callable[[int], object] = lambda count: None,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """The samples of a seed whose numbers are in `share`, on the CPU: ids [n, L] and forwards [n] of the network.

    `protocol` is an `EvaluationProtocol`, here and below.

    A sample depends only on its seed and number, not on the process that draws it or on the samples drawn with it.
    """
    generator = torch.Generator().manual_seed(seed)
    row_keys(share.start, generator)  # those of the samples before
    sequences, forwards = [torch.empty(0, length, dtype=torch.long)], [torch.empty(0)]
    for start in range(share.start, share.stop, protocol.batch_size):
        count = min(protocol.batch_size, share.stop - start)
        options = protocol.generation_config(steps, temperature, length, count, locking)
        output = model.generate(generation_config=options, generator=generator)
        sequences.append(output.sequences.cpu())
        forwards.append(output.nfe.cpu())
        on_batch(count)
    return torch.cat(sequences), torch.cat(forwards)


def measure(
    draw: Callable[[int, range], tuple[torch.Tensor, torch.Tensor]],
    seeds: int,
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    protocol,
    team: Team,
    scores: list[dict] | None = None,
) -> dict:
    """The figures, `nfe`, `example` and `note` of a row.

    Args:
        draw: (seed, the numbers of some of its `count` samples) -> ids [n, L] and forwards [n].
        scores: a list that gets the scores of each seed's samples: nats, tokens, entropy and trigram entropy of each, and
            the seconds that it took to draw one. A seed without a judge's scores gets none.
    """
    by_seed, notes, nfe, example = [], [], [], None
    for seed in range(seeds):
        samples, forwards, trouble = _samples(draw, seed, count, tokenizer, protocol, team)
        if samples is None:
            by_seed.append(over_seeds([]))
            notes.append(trouble)
            continue
        figures, why = figures_of(samples, protocol)
        by_seed.append(figures)
        notes += why
        nfe.append(forwards)
        if scores is not None and samples.judge is not None and samples.judge.nll.isfinite().all():
            scores.append(_scores_of(samples, protocol))
        if seed == 0:
            example = samples.text[0].strip()
    mean_nfe = statistics.fmean(nfe) if len(nfe) == seeds else None
    note = "; ".join(dict.fromkeys(notes)) or None
    return {"nfe": mean_nfe} | over_seeds(by_seed) | {"example": example, "note": note}


def _scores_of(samples: Samples, protocol) -> dict:
    return {
        "nll": samples.judge.nll.tolist(),
        "tokens": samples.judge.tokens.tolist(),
        "entropy": sample_entropies(samples.units, protocol.entropy_unit),
        "trigram_entropy": sample_entropies(samples.text, "trigrams"),
        "seconds": samples.seconds,
    }


def _samples(draw, seed, count, tokenizer, protocol, team) -> tuple[Samples | None, float | None, str | None]:
    """The samples of one seed with their scores, and the mean number of forwards; or None, None and what went wrong.

    An error in one process counts for all: whatever happens, every process takes part in every exchange.
    """
    ids = forwards = features = gradients = trouble = None
    seconds = 0.0
    judges = [(protocol.judge, protocol.judge_tokenizer, protocol.convention)]
    judges += [(*protocol.second_judge, "retokenized")] if protocol.second_judge is not None else []
    scores = []
    try:
        start = time.perf_counter()
        ids, forwards = draw(seed, team.share(count))
        seconds = time.perf_counter() - start
        for judge, judge_tokenizer, convention in judges:
            read = judged_form(ids, tokenizer, judge_tokenizer, convention)
            scores.append(score(read, judge, judge_tokenizer, convention, protocol.batch_size))
        if protocol.mauve_reference is not None and len(ids):
            features = protocol.mauve_reference.features_of(plain_texts(ids, tokenizer))
        if protocol.gradient_reference is not None:
            reader = protocol.gradient_reference
            gradients = reader.gradients_of(judged_form(ids, tokenizer, reader.tokenizer, "retokenized"))
    except TROUBLE as error:
        trouble = reason_of(error)
    parts = team.gather((ids, forwards, scores, features, seconds, trouble))
    troubles = [part[-1] for part in parts if part[-1] is not None]
    if any(part[0] is None for part in parts):
        return None, None, troubles[0]
    judged = [None] * len(judges)
    try:
        if not troubles:
            for i, (_, _, convention) in enumerate(judges):
                nll, tokens = (torch.cat(of_all) for of_all in zip(*(part[2][i] for part in parts), strict=True))
                judged[i] = perplexity_of(nll, tokens, convention)
    except TROUBLE as error:
        troubles.append(reason_of(error))
    if gradients is not None and not troubles:
        gradients = gradients.over(team)
    ids, of_all = torch.cat([part[0] for part in parts]), [part[3] for part in parts if part[3] is not None]
    text = plain_texts(ids, tokenizer)
    samples = Samples(
        ids.tolist(),
        text,
        units=ids.tolist() if protocol.entropy_unit == "tokens" else text,
        judge=judged[0],
        trouble=troubles[0] if troubles else None,
        second=judged[1] if len(judged) > 1 else None,
        features=torch.cat(of_all) if of_all and not troubles else None,
        gradients=None if troubles else gradients,
        seconds=sum(part[4] for part in parts) / count,
    )
    return samples, torch.cat([part[1] for part in parts]).double().mean().item(), None


def plain_texts(ids: torch.LongTensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Samples [n, L] as texts, with a space in place of BOS and EOS."""
    specials = special_strings(tokenizer)
    return [_replace(text, specials, " ") for text in tokenizer.batch_decode(ids)]


def judged_form(
    ids: torch.LongTensor,
    tokenizer: PreTrainedTokenizerBase,
    judge_tokenizer: PreTrainedTokenizerBase,
    convention: str,
) -> list[str] | torch.LongTensor:
    """Samples [n, L] as the judge reads them: ids, or texts with the judge's EOS in place of the model's BOS and EOS.

    If the judge's tokenizer adds a BOS by itself, the mark at the start of a text is left out.
    """
    if convention == "raw_ids":
        return ids
    end_of_text = judge_tokenizer.eos_token or " "
    specials = special_strings(tokenizer)
    texts = [_replace(text, specials, end_of_text) for text in tokenizer.batch_decode(ids)]
    if judge_tokenizer("")["input_ids"]:
        return [text.removeprefix(end_of_text) for text in texts]
    return texts


def special_strings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}


def _replace(text: str, specials: set[str], replacement: str) -> str:
    for special in specials:
        text = text.replace(special, replacement)
    return text
