"""Judges models at several numbers of steps, and writes `eval.json`, `eval.md`, `eval.png` and the model card.

    python evaluation/run_eval.py MODEL [MODEL ...] --steps 4 8 16 --judge gpt2-large
    python evaluation/run_eval.py MODEL [MODEL ...] --steps 1 2 4 8 --answers questions.jsonl --temperatures 0
    python evaluation/run_eval.py MODEL [MODEL ...] --perplexity wikitext103 ptb --judge gpt2

Every finished row is saved at once. If it is killed, the same command continues where it was. Several of these commands
may write to one folder at a time.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase

from evaluation.diversity import vocabulary_of
from evaluation.judge import check_same_ids, context_of, load_judge
from evaluation.model_card import BESIDE, is_ours
from evaluation.options import PREFIX, EvaluationArguments
from evaluation.report import MODELS, RunReport
from evaluation.results import load_report
from evaluation.sequence_nelbo import EVEN
from evaluation.text import check_blocks, read_texts, text_blocks
from evaluation.zero_shot import (
    HELP,
    Windows,
    corpus_of,
    key_of,
    load_rows,
    perplexity_table,
    row_of,
    save_row,
    score_windows,
    windows_of,
    with_figures,
)
from modeling_mcd import MDLMConfig
from modeling_mcd.checks_mdlm import COUNT, check_number
from modeling_mcd.command_line import OneLineParser
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer, read_checkpoint


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(prog="mcd-evaluate", description=__doc__.split("\n")[0])
    add_models(result)
    result.add_argument(
        "--perplexity",
        nargs="+",
        metavar="TEXT",
        help="Perplexity of texts instead of samples, with options of its own: mcd-evaluate --perplexity --help.",
    )
    add_evaluation_arguments(result, required=("evaluation_steps",), evaluation_seeds=3)
    result.add_argument(
        "--reference_text",
        help="Held-out text (a file, or a folder of them): its row, the entropy to match, the text of --bound.",
    )
    result.add_argument("--vocabulary_text", help="Training text: the words that count as known.")
    result.add_argument("--output_dir", help="Where the report goes; the first MODEL by default, if that is a folder.")
    return result


def perplexity_parser() -> argparse.ArgumentParser:
    """The options of `mcd-evaluate` with --perplexity."""
    result = OneLineParser(
        prog="mcd-evaluate",
        description="Likelihood of texts: perplexity and bits per byte, in perplexity.json and perplexity.md.",
    )
    add_models(result)
    result.add_argument("--perplexity", nargs="*", required=True, metavar="TEXT", help=HELP)
    result.add_argument(
        "--judge",
        nargs="+",
        default=[],
        help="Autoregressive models with the same token ids, scored on the same windows.",
    )
    result.add_argument("--length", type=int, help="Tokens in a window; the model's context by default.")
    result.add_argument(
        "--windows", type=int, default=512, help="At most so many of each text, spread evenly; 0: all."
    )
    result.add_argument(
        "--draws", type=int, default=4, help="Draws of the masked tokens of each window; an even number."
    )
    result.add_argument("--batch_size", type=int, default=8, help="Windows at a time; changes no figure.")
    result.add_argument("--output_dir", help="Where the report goes; the first MODEL by default, if that is a folder.")
    return result


def add_models(parser: argparse.ArgumentParser):
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="Folder or Hub name (`@revision`); `label=MODEL` names its rows."
    )
    parser.add_argument(
        "--rounds", action="store_true", help="MODEL is a run's output folder: judge its teacher and every round."
    )
    parser.add_argument(
        "--tokenizer", help="Folder or Hub name, for models that come without one: gpt2 for published ones."
    )


def add_evaluation_arguments(parser: argparse.ArgumentParser, required: tuple[str, ...], **defaults):
    """The options of `EvaluationArguments`: by their names in a recipe, and without the prefix."""
    hints = get_type_hints(EvaluationArguments)
    for option in dataclasses.fields(EvaluationArguments):
        hint = next((kind for kind in get_args(hints[option.name]) if get_origin(kind) is Literal), hints[option.name])
        settings = {}
        if get_origin(hint) is Literal:
            settings["choices"] = get_args(hint)
        elif get_origin(hint) is list:
            settings |= {"nargs": "+", "type": get_args(hint)[0]}
        else:
            settings["type"] = (*get_args(hint), hint)[0]
        settings |= {name: option.metadata[name] for name in ("nargs", "const") if name in option.metadata}
        default = option.default if option.default is not dataclasses.MISSING else option.default_factory()
        names = dict.fromkeys((f"--{option.name.removeprefix(PREFIX)}", f"--{option.name}"))
        parser.add_argument(
            *names,
            dest=option.name,
            required=option.name in required,
            default=defaults.get(option.name, default),
            help=option.metadata["help"],
            **settings,
        )


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    if "--perplexity" in (sys.argv[1:] if arguments is None else arguments):
        perplexity_parser().run(run_perplexity, arguments)
    else:
        parser().run(run, arguments)


def run(options: argparse.Namespace):
    """Raises ValueError or OSError before the first sample is drawn and the first byte written."""
    names = [option.name for option in dataclasses.fields(EvaluationArguments)]
    judging = EvaluationArguments(**{name: getattr(options, name) for name in names})
    steps, temperatures, lockings = (getattr(judging, PREFIX + name) for name in ("steps", "temperatures", "lockings"))
    if judging.judge is None and judging.evaluation_answers is None:
        raise ValueError("nothing to judge by: give --judge, --answers, or both")
    if judging.evaluation_bound and not options.reference_text:
        raise ValueError("--bound needs held-out text: give --reference_text")
    for option in ("reference_text", "vocabulary_text"):
        if judging.judge is None and getattr(options, option):
            raise ValueError(
                f"--{option} ({getattr(options, option)!r}) is for samples that a judge reads: give --judge"
            )
    paths = labelled_paths(options.models, options.rounds)
    folder, first = report_folder(options)
    load_report(folder)
    configs, tokenizers = read_models(paths, options.tokenizer, judging.evaluation_length)
    vocabulary = options.vocabulary_text and vocabulary_of(read_texts(options.vocabulary_text))
    reference = options.reference_text and read_texts(options.reference_text)
    answers, protocol = judging.answer_protocol(), None
    for label, config in configs.items():
        if answers is not None:
            answers.check(tokenizers[label], config, steps, temperatures, lockings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if judging.judge is not None:
        protocol = judging.protocol(*load_judge(judging.judge, judging.judge_dtype, device), vocabulary)
        for label, config in configs.items():
            protocol.check(
                tokenizers[label], config, steps, temperatures, lockings, bound=judging.evaluation_bound > 0
            )

    def blocks_for(label: str, count: int) -> torch.LongTensor:
        length = judging.evaluation_length or configs[label].max_position_embeddings
        return text_blocks(reference, tokenizers[label], length, count)

    if reference:
        label = next(iter(configs))
        blocks = blocks_for(label, judging.evaluation_samples)
    folder.mkdir(parents=True, exist_ok=True)

    report = RunReport(folder, protocol, steps, temperatures, lockings=lockings, answers=answers)
    # The rows of the folder's own model go into its card; a run's output folder holds the last round's student.
    own = folder.resolve() == Path(first).resolve()
    own_label = list(labelled_paths(options.models[:1], options.rounds))[-1] if own else None
    if reference:
        report.judge_text(blocks, tokenizers[label])
    for label, path in paths.items():
        if judging.evaluation_bound:
            report.bound_blocks = blocks_for(label, judging.evaluation_bound)
        report.judge(label, load_model(path).to(device), tokenizers[label], own_label)
    print(report.write(label=own_label))
    plots = [name for name in ("eval.png", "answers.png") if (folder / name).exists()]
    print(f"\nSaved in {folder}: {', '.join(['eval.json', 'eval.md', *plots])}")
    if any((folder / name).exists() for name in MODELS) and not is_ours(folder / "README.md"):
        print(f"The model card is {BESIDE}: README.md was written or changed by hand and is left as it is.")


def run_perplexity(options: argparse.Namespace):
    """Scores every model, then every judge, on every text. A row that `perplexity.json` holds is not measured again.

    Raises ValueError or OSError before the first forward and the first byte written.
    """
    check_number("--draws", options.draws, EVEN)
    check_number("--batch_size", options.batch_size, COUNT)
    check_number("--windows", options.windows, ("be an integer of at least 0", lambda value: value >= 0))
    corpora = [corpus_of(words) for words in options.perplexity]
    if not corpora:
        raise ValueError("--perplexity names no text: give a corpus, a file or a dataset")
    for corpus in corpora:
        if sum(other.name == corpus.name for other in corpora) > 1:
            raise ValueError(
                f"two texts would have the column {corpus.name!r}: name them, as in {corpus.source},name=other"
            )
    paths = labelled_paths(options.models, options.rounds)
    folder, _ = report_folder(options)
    known = {key_of(row) for row in load_rows(folder)}
    configs, tokenizers = read_models(paths, options.tokenizer, options.length)
    lengths = {label: options.length or config.max_position_embeddings for label, config in configs.items()}
    for label, tokenizer in tokenizers.items():
        check_blocks(tokenizer, lengths[label])
    device, judges, first = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}, next(iter(paths))
    for name in options.judge:
        label = f"{Path(name).name} (autoregressive)"
        judges[label], judge_tokenizer = load_judge(name, "float32", device)
        try:
            check_same_ids(tokenizers[first], judge_tokenizer)
        except ValueError:
            raise ValueError(
                f"judge {name!r} has other token ids than {first!r}, so it cannot read the same windows: leave it out"
            ) from None
        context = context_of(judges[label])
        if context is not None and context < lengths[first]:
            raise ValueError(
                f"judge {name!r} sees {context} tokens, but a window has {lengths[first]}: give --length {context}"
            )
    cut: dict[tuple, Windows] = {}

    def windows(corpus, label: str) -> Windows:
        tokenizer = tokenizers[label]  # models mostly share one
        place = corpus.name, lengths[label], tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else label
        if place not in cut:
            cut[place] = windows_of(
                corpus.documents(), tokenizer, lengths[label], options.windows or None, corpus.name
            )
        return cut[place]

    for corpus in corpora:
        windows(corpus, first)
    for label in (*paths, *judges):
        network = judges[label] if label in judges else load_model(paths[label]).to(device)
        for corpus in corpora:
            text = windows(corpus, first if label in judges else label)
            row = row_of(label, network, corpus, text, options.draws)
            if key_of(row) in known:
                continue
            try:
                bound = score_windows(network, text, options.draws, options.batch_size, progress=sys.stderr.isatty())
            except ValueError as error:
                raise ValueError(f"{label} on {corpus.name}: {error}") from None
            save_row(folder, with_figures(row, bound))
    print(perplexity_table(load_rows(folder)))
    print(f"\nSaved in {folder}: perplexity.json, perplexity.md")


def report_folder(options: argparse.Namespace) -> tuple[Path, str]:
    """Where the report goes, and the path of the first model."""
    _, first = split_label(options.models[0])
    if options.output_dir is None and not Path(first).is_dir():
        raise ValueError(f"{first!r} is not a folder: say with --output_dir where the report goes")
    return Path(options.output_dir or first), first


def read_models(
    paths: dict[str, str], tokenizer: str | None, length: int | None
) -> tuple[dict[str, MDLMConfig], dict[str, PreTrainedTokenizerBase]]:
    """The configurations and tokenizers of models by label; refuses a tokenizer or a length that does not fit."""
    configs, tokenizers = {}, {}
    for label, path in paths.items():
        configs[label] = read_checkpoint(path).config
        check_length(path, configs[label], length)
        tokenizers[label] = load_tokenizer(tokenizer or path, "tokenizer" if tokenizer else "model")
        check_tokens(tokenizers[label], configs[label])
    return configs, tokenizers


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
    """`label=MODEL` -> (label, MODEL); without a label the first is empty."""
    label, equals, path = model.partition("=")
    return (label, path) if equals else ("", model)


def check_length(path: str, config: MDLMConfig, length: int | None):
    """Raises ValueError for samples longer than the context of a model."""
    if length is not None and length > config.max_position_embeddings:
        raise ValueError(f"length is {length}, but the context of {path!r} is {config.max_position_embeddings} tokens")


if __name__ == "__main__":
    main()
