"""Judges models at several numbers of steps, and writes `eval.json`, `eval.md`, `eval.png` and the model card.

    python evaluation/run_eval.py MODEL [MODEL ...] --steps 4 8 16 --judge gpt2-large
    python evaluation/run_eval.py MODEL [MODEL ...] --steps 1 2 4 8 --answers questions.jsonl --temperatures 0
    python evaluation/run_eval.py MODEL [MODEL ...] --perplexity wikitext103 ptb --judge gpt2

Every finished row is saved at once. If it is killed, the same command continues where it was. Several of these commands
may write to one folder at a time.
"""

import argparse
import sys
from pathlib import Path

import torch

from evaluation.judge import check_same_ids, context_of, load_judge
from evaluation.judging import (
    add_evaluation_arguments,
    add_models,
    add_text_arguments,
    judge_models,
    judging_of,
    labelled_paths,
    read_models,
    report_folder,
)
from evaluation.model_card import BESIDE, is_ours
from evaluation.report import MODELS
from evaluation.sequence_nelbo import EVEN
from evaluation.team import launched_team
from evaluation.text import check_blocks
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
from modeling_mcd.checks_mdlm import COUNT, check_number
from modeling_mcd.command_line import OneLineParser
from modeling_mcd.loading import load_model


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
    add_text_arguments(result)
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


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    if "--perplexity" in (sys.argv[1:] if arguments is None else arguments):
        perplexity_parser().run(run_perplexity, arguments)
    else:
        parser().run(run, arguments)


def run(options: argparse.Namespace):
    """Raises ValueError or OSError before the first sample is drawn and the first byte written."""
    with launched_team() as team:
        report, own_label = judge_models(options, [judging_of(options)], team)
        table = report.write(label=own_label)
    if team.rank > 0:
        return
    print(table)
    folder = report.folder
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


if __name__ == "__main__":
    main()
