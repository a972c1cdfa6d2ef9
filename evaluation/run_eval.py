"""Judges models at several numbers of steps, and writes `eval.json`, `eval.md`, `eval.png` and the model card.

    python evaluation/run_eval.py MODEL [MODEL ...] --steps 4 8 16 --judge gpt2-large

Every finished row is saved at once. Killed and started again with the same command, it goes on where it was.
"""

import argparse
import difflib
from pathlib import Path

import torch
from transformers import AutoTokenizer

from evaluation.diversity import ENTROPY_UNITS, vocabulary_of
from evaluation.evaluate_model import EvaluationProtocol, evaluate_held_out_text, evaluate_model
from evaluation.generative_perplexity import CONVENTIONS
from evaluation.judge import _load, load_judge
from evaluation.reference_text import read_texts, text_blocks
from evaluation.report import write_report
from evaluation.results import load_report, save_results
from modeling_mcd import MDLMConfig
from modeling_mcd.generation_config_mdlm import options_of
from modeling_mcd.loading import check_tokens, load_model, read_checkpoint
from modeling_mcd.sampling_mdlm import LAST_STEPS, SAMPLERS


class OneLineParser(argparse.ArgumentParser):
    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        options, unknown = super().parse_known_args(arguments)
        for word in unknown:
            key = word.split("=")[0]
            nearest = difflib.get_close_matches(key, self._option_string_actions, n=1, cutoff=0.0)
            self.error(f"unknown argument {key!r}; the nearest valid one is {nearest[0]!r}")
        return options

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser() -> argparse.ArgumentParser:
    samplers = [name for name, sampler in SAMPLERS.items() if "steps" in options_of(sampler)]
    result = OneLineParser(prog="run_eval.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    result.add_argument(
        "models", nargs="+", metavar="MODEL", help="Folder or Hub name (`@revision`); `label=MODEL` names its rows."
    )
    result.add_argument(
        "--rounds", action="store_true", help="MODEL is a run's output folder: judge its teacher and every round."
    )
    result.add_argument("--steps", type=_at_least(int, 1), nargs="+", required=True, help="Numbers of sampling steps.")
    result.add_argument(
        "--temperatures", type=_at_least(float, 0), nargs="+", default=[1.0], help="Several make a sweep."
    )
    result.add_argument(
        "--tokenizer", help="Folder or Hub name, for models that come without: gpt2 for published ones."
    )
    result.add_argument("--judge", required=True, help="Folder or Hub name of any causal language model.")
    result.add_argument("--judge_dtype", choices=("float32", "bfloat16"), default="float32", help="Of its weights.")
    result.add_argument("--samples", type=_at_least(int, 1), default=64, help="Samples for each seed.")
    result.add_argument("--seeds", type=_at_least(int, 1), default=3, help="How many seeds: 0, 1, ...")
    result.add_argument("--length", type=_at_least(int, 2), help="Tokens in a sample; the model's context by default.")
    result.add_argument(
        "--sampler", choices=samplers, default="ancestral", help="Of those that take a number of steps."
    )
    result.add_argument("--last_step", choices=LAST_STEPS, help="What follows the steps, see docs/generation.md.")
    result.add_argument("--convention", choices=CONVENTIONS, default="retokenized", help="What the judge reads.")
    result.add_argument("--entropy_unit", choices=ENTROPY_UNITS, default="tokens", help="Words for a character model.")
    result.add_argument(
        "--reference_text", help="Held-out text (file, or folder of .txt): its row, and the entropy to match."
    )
    result.add_argument("--vocabulary_text", help="Training text: the words that count as known.")
    result.add_argument("--batch_size", type=_at_least(int, 1), default=32)
    result.add_argument("--output_dir", help="Where the report goes; the first MODEL by default, if that is a folder.")
    return result


def _at_least(kind: type, least: int):
    def parse(word: str):
        value = kind(word)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{word} is not a finite number of at least {least}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the word is no number at all
    return parse


def main(arguments: list[str] | None = None):
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (OSError, ValueError) as error:
        parser().error(str(error))


def run(options: argparse.Namespace):
    paths = labelled_paths(options.models, options.rounds)
    _, first = split_label(options.models[0])
    if options.output_dir is None and not Path(first).is_dir():
        raise ValueError(f"{first!r} is not a folder: say with --output_dir where the report goes")
    folder = Path(options.output_dir or first)
    # Everything that can be wrong is looked at before the first sample is drawn and the first byte written.
    known_rows = load_report(folder)["results"]
    lengths, tokenizers = {}, {}
    for label, path in paths.items():
        config = read_checkpoint(path).config
        lengths[label] = _length(path, config, options.length)
        name = options.tokenizer or path
        tokenizers[label] = _load(AutoTokenizer, "tokenizer" if options.tokenizer else "model", name)
        check_tokens(tokenizers[label], config)
    vocabulary = options.vocabulary_text and vocabulary_of(read_texts(options.vocabulary_text))
    reference = options.reference_text and read_texts(options.reference_text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    protocol = EvaluationProtocol(
        *load_judge(options.judge, options.judge_dtype, device),
        vocabulary=vocabulary,
        **{
            name: getattr(options, name)
            for name in ("samples", "seeds", "length", "sampler", "last_step", "convention")
        },
        **{name: getattr(options, name) for name in ("entropy_unit", "batch_size")},
    )
    # The rows of the folder's own model go into its card; a run's output folder holds the last round's student.
    own = folder.resolve() == Path(first).resolve()
    label = list(labelled_paths(options.models[:1], options.rounds))[-1] if own else None
    report = None
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        tokenizer, model = tokenizers[name], load_model(path).to(device)
        if reference and report is None:
            blocks = text_blocks(reference, tokenizer, lengths[name], options.samples)
            report = save_results(folder, [evaluate_held_out_text(blocks, tokenizer, protocol)], label=label)
        for row in evaluate_model(name, model, tokenizer, protocol, options.steps, options.temperatures, known_rows):
            report = save_results(folder, [row], label=label)
    print(write_report(folder, report or save_results(folder, label=label)))
    print(f"\nSaved in {folder}: eval.json, eval.md, eval.png")


def labelled_paths(models: list[str], rounds: bool) -> dict[str, str]:
    """Row label -> folder or Hub name, in the order of the table.

    Raises:
        ValueError: a label twice, or a folder without rounds where they are asked for.
    """
    paths = {}
    for label, path in map(split_label, models):
        if rounds:
            students = sorted(Path(path).glob("round-*"), key=lambda student: (len(student.name), student.name))
            if not students:
                raise ValueError(f"{path!r} holds no round-* folder, so --rounds has nothing to judge")
            folders = [folder for folder in (Path(path, "teacher"), *students) if folder.is_dir()]
            entries = {f"{label} {folder.name}".strip(): str(folder) for folder in folders}
        else:
            entries = {label or Path(path).resolve().name: path}
        for name, entry in entries.items():
            if name in paths:
                raise ValueError(f"two models would have the row label {name!r}: name them, as in label={entry}")
            paths[name] = entry
    return paths


def split_label(model: str) -> tuple[str, str]:
    """`label=MODEL` -> (label, MODEL); the label is empty when there is none."""
    label, equals, path = model.partition("=")
    return (label, path) if equals else ("", model)


def _length(path: str, config: MDLMConfig, length: int | None) -> int:
    """Tokens in a sample of a model."""
    if length is not None and length > config.max_position_embeddings:
        raise ValueError(f"length is {length}, but the context of {path!r} is {config.max_position_embeddings} tokens")
    return length or config.max_position_embeddings


if __name__ == "__main__":
    main()
