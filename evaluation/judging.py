"""From the words of a command to the report of a folder: the options that the commands share, the checks, the judging."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase

from evaluation.diversity import vocabulary_of
from evaluation.gradient_moment import GradientReference
from evaluation.judge import load_judge
from evaluation.mauve import MauveReference
from evaluation.measure import judged_form, plain_texts
from evaluation.memorisation import TrainingNgrams
from evaluation.options import PREFIX, EvaluationArguments
from evaluation.report import RunReport
from evaluation.results import load_report
from evaluation.team import ALONE, Team
from evaluation.text import read_texts, text_blocks
from modeling_mcd import MDLMConfig
from modeling_mcd.loading import check_tokens, load_model, load_tokenizer, read_checkpoint


EVERY = sys.maxsize  # blocks
THE_JUDGE = "the judge"  # what MAUVE's features come from where no other model is named


def add_models(parser: argparse.ArgumentParser, nargs: str = "+"):
    parser.add_argument(
        "models",
        nargs=nargs,
        default=None,  # without it, argparse calls even `*` required
        metavar="MODEL",
        help="Folder or Hub name (`@revision`); `label=MODEL` names its rows.",
    )
    parser.add_argument(
        "--rounds", action="store_true", help="MODEL is a run's output folder: judge its teacher and every round."
    )
    parser.add_argument(
        "--tokenizer", help="Folder or Hub name, for models that come without one: gpt2 for published ones."
    )


def add_evaluation_arguments(
    parser: argparse.ArgumentParser, required: tuple[str, ...], leave_out: tuple[str, ...] = (), **defaults
):
    """The options of `EvaluationArguments`: by their names in a recipe, and without the prefix; `leave_out` some."""
    hints = get_type_hints(EvaluationArguments)
    for option in dataclasses.fields(EvaluationArguments):
        if option.name in leave_out:
            continue
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


def add_text_arguments(parser: argparse.ArgumentParser):
    """The texts that samples are compared with, and the figures that take longer."""
    parser.add_argument(
        "--reference_text",
        help="Held-out text (a file, or a folder of them): its row, the entropy to match, the text of --bound and --mauve.",
    )
    parser.add_argument("--vocabulary_text", help="Training text: the words that count as known.")
    parser.add_argument(
        "--memorised", action="store_true", help="Share of the 8-grams of samples that --vocabulary_text holds."
    )
    parser.add_argument(
        "--mauve",
        nargs="?",
        const=THE_JUDGE,
        metavar="MODEL",
        help="MAUVE against --reference_text, by the hidden states of a causal language model; the judge by default.",
    )
    parser.add_argument(
        "--second_judge", metavar="MODEL", help="Another causal language model that reads the samples."
    )
    parser.add_argument(
        "--gradient_moment",
        action="store_true",
        help="Whether samples pull the second judge's weights as --reference_text does; a backward for each.",
    )
    parser.add_argument("--output_dir", help="Where the report goes; the first MODEL by default, if that is a folder.")


def judging_of(options: argparse.Namespace) -> EvaluationArguments:
    names = [option.name for option in dataclasses.fields(EvaluationArguments)]
    return EvaluationArguments(**{name: getattr(options, name) for name in names if hasattr(options, name)})


def judge_models(
    options: argparse.Namespace, protocols: Sequence[EvaluationArguments], team: Team = ALONE
) -> tuple[RunReport, str | None]:
    """Judges every model of a command under each of its protocols; every finished row is saved at once.

    Args:
        options: what `add_models`, `add_evaluation_arguments` and `add_text_arguments` read.
        protocols: at least one; they differ in what a row names, such as the precision.
        team: the processes that share the samples.

    Returns:
        The report, and the row label of the folder's own model, if it is one of those that were judged.

    Raises:
        ValueError, OSError: before the first sample is drawn and the first byte written.
    """
    first_protocol = protocols[0]
    check_texts(options, first_protocol)
    paths = labelled_paths(options.models, options.rounds)
    folder, first = report_folder(options)
    load_report(folder)
    configs, tokenizers = read_models(paths, options.tokenizer, first_protocol.evaluation_length)
    training = options.vocabulary_text and read_texts(options.vocabulary_text)
    vocabulary = training and vocabulary_of(training)
    reference = options.reference_text and read_texts(options.reference_text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    label = next(iter(configs))

    def blocks_for(label: str, count: int) -> torch.LongTensor:
        length = first_protocol.evaluation_length or configs[label].max_position_embeddings
        return text_blocks(reference, tokenizers[label], length, count)

    reports, blocks = [], None
    if reference:
        blocks = blocks_for(label, first_protocol.evaluation_samples)
    judge, beside = None, {}
    if first_protocol.judge is not None:
        judge = load_judge(first_protocol.judge, first_protocol.judge_dtype, device)
        if options.second_judge is not None:
            beside["second_judge"] = load_judge(options.second_judge, first_protocol.judge_dtype, device)
        if options.mauve is not None or options.gradient_moment:
            others = other_blocks(blocks_for(label, EVERY), len(blocks))
        if options.mauve is not None:
            reader = judge if options.mauve == THE_JUDGE else load_judge(options.mauve, "float32", device)
            texts = plain_texts(others, tokenizers[label])
            beside["mauve_reference"] = MauveReference(texts, *reader, first_protocol.evaluation_batch_size)
        if options.gradient_moment:
            reader = beside["second_judge"]
            texts = judged_form(others, tokenizers[label], reader[1], "retokenized")
            beside["gradient_reference"] = GradientReference(texts, *reader)
        if options.memorised:
            beside["training_ngrams"] = TrainingNgrams(training)
    for arguments in protocols:
        grid = {"steps": arguments.evaluation_steps, "temperatures": arguments.evaluation_temperatures}
        grid["lockings"] = arguments.evaluation_lockings
        answers, protocol = arguments.answer_protocol(), None
        if judge is not None:
            protocol = arguments.protocol(*judge, vocabulary, **beside)
        for name, config in configs.items():
            if answers is not None:
                answers.check(tokenizers[name], config, **grid)
            if protocol is not None:
                protocol.check(tokenizers[name], config, **grid, bound=arguments.evaluation_bound > 0)
        grid["coupled_up_to"] = arguments.evaluation_coupled_up_to
        reports.append(RunReport(folder, protocol, **grid, team=team, answers=answers, keep_scores=True))
    folder.mkdir(parents=True, exist_ok=True)

    # The rows of the folder's own model go into its card; a run's output folder holds the last round's student.
    own = folder.resolve() == Path(first).resolve()
    own_label = list(labelled_paths(options.models[:1], options.rounds))[-1] if own else None
    if reference and judge is not None:
        reports[0].judge_text(blocks, tokenizers[label])
    for name, path in paths.items():
        model = load_model(path).to(device)
        for report, arguments in zip(reports, protocols, strict=True):
            if arguments.evaluation_bound:
                report.bound_blocks = blocks_for(name, arguments.evaluation_bound)
            report.judge(name, model, tokenizers[name], own_label)
    return reports[-1], own_label


def check_texts(options: argparse.Namespace, arguments: EvaluationArguments):
    """Raises ValueError for a figure without what it needs."""
    if arguments.judge is None and arguments.evaluation_answers is None:
        raise ValueError("nothing to judge by: give --judge, --answers, or both")
    if arguments.judge is None:
        for option in ("reference_text", "vocabulary_text", "second_judge", "mauve"):
            if getattr(options, option):
                raise ValueError(
                    f"--{option} ({getattr(options, option)!r}) is for samples that a judge reads: give --judge"
                )
    for option, asked, text in (
        ("bound", arguments.evaluation_bound, "reference_text"),
        ("mauve", options.mauve is not None, "reference_text"),
        ("gradient_moment", options.gradient_moment, "reference_text"),
        ("memorised", options.memorised, "vocabulary_text"),
    ):
        if asked and not getattr(options, text):
            kind = "held-out" if text == "reference_text" else "training"
            raise ValueError(f"--{option} needs {kind} text: give --{text}")
    if options.gradient_moment and options.second_judge is None:
        raise ValueError(
            "--gradient_moment is of a model that neither wrote the samples nor judges them: give --second_judge"
        )


def other_blocks(every: torch.LongTensor, count: int) -> torch.LongTensor:
    """At most `count` blocks, evenly spread over those that `text_blocks` does not choose when asked for `count`.

    Raises:
        ValueError: fewer than 2 are left.
    """
    chosen = torch.linspace(0, len(every) - 1, count).round().long()
    left = torch.ones(len(every), dtype=torch.bool)
    left[chosen] = False
    others = every[left]
    if len(others) < 2:
        raise ValueError(
            f"samples are compared with held-out text beyond the {count} blocks of its own row, but --reference_text "
            f"has {len(every)} blocks: give more text, or ask for fewer --samples"
        )
    return others[torch.linspace(0, len(others) - 1, min(count, len(others))).round().long()]


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
