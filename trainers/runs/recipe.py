"""A recipe is one YAML file for one run. `parse_recipe` turns it, and the command line after it, into typed dataclasses."""

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from modeling_mcd.command_line import help_width, nearest, option_lines, words_of


RECIPE_FOLDER = Path(__file__).resolve().parents[2] / "recipes"


class RecipeLoader(yaml.SafeLoader):
    """A YAML loader that refuses a repeated key; PyYAML silently takes the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Of the Trainer's own settings, what a first run needs to know, in short. The others are listed by --help-all.
COMMON = {
    "output_dir": "Folder of the run: checkpoints, the model, its card.",
    "max_steps": "Optimizer steps; -1: as num_train_epochs says.",
    "num_train_epochs": "Passes over the text, if max_steps is -1.",
    "per_device_train_batch_size": "Blocks in a batch, for each process.",
    "gradient_accumulation_steps": "Batches in an optimizer step.",
    "learning_rate": "Peak learning rate of AdamW.",
    "warmup_steps": "Steps of linear warm-up; below 1: a share of all steps.",
    "bf16": "Compute in bfloat16; the weights stay float32.",
    "train_sampling_strategy": "random; group_by_length: batches of rows of similar length, with little padding.",
    "logging_steps": "Steps between two log lines.",
    "save_steps": "Steps between two checkpoints.",
    "eval_strategy": "When the validation loss is computed: no, steps or epoch.",
    "resume_from_checkpoint": "Begin at a checkpoint of another folder.",
    "report_to": "none, tensorboard, trackio, wandb, ...",
    "push_to_hub": "Push the finished model.",
    "hub_model_id": "Its name on the Hub: you/model.",
    "seed": "Seed of everything random.",
}
# Settings of the Trainer that a run has no use for, and why.
UNUSED = {
    **dict.fromkeys(("hub_strategy", "hub_always_push"), "has no effect here: the finished model is pushed once"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "has no effect here: the command says what is done"),
}
# On the command line, the first replaces what the recipe's second belongs to.
TOGETHER = (("train_text", "validation_text"),)


class RecipeParser(HfArgumentParser):
    """A parser with one-line errors, for which `null` is None where a field may be None, in the file or on the command line.

    `--help` lists our own settings and the Trainer's most common ones; `--help-all` lists every key.
    """

    elsewhere: dict[str, str] = {}  # keys that are refused -> why
    unused: dict[str, str] = {}  # those of them that are keys all the same

    def __init__(self, dataclass_types, **kwargs):
        kwargs = {"usage": "%(prog)s [RECIPE.yaml] [--key value ...]", "allow_abbrev": False, **kwargs}
        super().__init__(dataclass_types, add_help=False, **kwargs)
        hints = [(name, hint) for kind in dataclass_types for name, hint in get_type_hints(kind).items()]
        # Without output_dir the Trainer would choose one.
        self.optional_keys = {name for name, hint in hints if type(None) in get_args(hint)} - {"output_dir"}
        for key, action in _keys(self).items():
            action.required |= key == "output_dir"
            if key in self.optional_keys and callable(action.type):
                action.type = _or_null(action.type)
                if action.choices is not None:
                    action.choices = [*action.choices, None]
        self.add_argument("--help", "-h", action=_Help, help="Show our own settings and the Trainer's most used.")
        self.add_argument("--help-all", action=_Help, help="Show every key that a recipe may hold.")

    def error(self, message: str):
        if "arguments are required" in message:
            message += "; give a RECIPE.yaml that has them, or --key value"
        self.exit(2, f"error: {' '.join(message.split())}\n")

    def describe(self, everything: bool) -> str:
        """The text of `--help`, or of `--help-all`."""
        width = help_width()
        lines = self.format_usage().splitlines()
        lines += textwrap.wrap(
            "RECIPE.yaml is a file, or the name of a shipped recipe. Its keys are options of the command line too, which "
            "wins. Defaults stand in parentheses.",
            width,
        )
        trainers = {field.name: field for field in dataclasses.fields(TrainingArguments)}
        keys, seen = _keys(self), set()
        for kind in self.dataclass_types:
            own = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(kind) if f.init}
            if issubclass(kind, TrainingArguments):
                sections = {
                    kind.__name__: {key: text for key, text in own.items() if key not in trainers},
                    "TrainingArguments": {key: text for key, text in own.items() if key in trainers} | COMMON,
                }
                if not everything:
                    sections["TrainingArguments"] = COMMON
            else:
                sections = {kind.__name__: own}
            for title, helps in sections.items():
                helps = {key: text for key, text in helps.items() if key in keys and key not in seen}
                seen |= helps.keys()
                if helps:
                    title = title.removesuffix("Arguments").replace("Training", " training").strip()
                    lines += ["", f"{title[0].upper()}{title[1:]}:"]
                for key, text in helps.items():
                    text = text or "" if everything else " ".join((text or "").split()).split(". ")[0]
                    note = "required" if keys[key].required else words_of(keys[key].default)
                    lines += option_lines(f"--{key}", text, keys[key].choices, note, width)
        if not everything:
            lines += ["", "--help-all lists all other settings of transformers' TrainingArguments."]
        return "\n".join(lines) + "\n"


class _Help(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.describe(everything=option_string == "--help-all"), end="")
        parser.exit()


def parse_recipe(
    dataclass_types, arguments: list[str] | None = None, elsewhere: dict[str, str] | None = None
) -> tuple:
    """Reads `[RECIPE.yaml] [--key value ...]` into one instance of each dataclass; the command line wins over the file.

    The YAML is rewritten as command-line arguments in front of the real ones, so that both pass through the same type
    conversion: `6e-5` is a number here although PyYAML calls it a string. A string that starts with `./` or `../` in a
    recipe is a path relative to the recipe's own folder, so a recipe works from any directory. A file that is not found there
    but ships with the library (a recipe by its name, `./tiny/teacher` in a recipe) is taken from the library.

    Exits with status 2 and one line on standard error if a file, a key or a value is wrong.

    Args:
        dataclass_types: the dataclasses whose fields are the keys.
        arguments: the command line; that of this process by default.
        elsewhere: for each key that is refused, the rest of the sentence that says why.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = RecipeParser(dataclass_types)
    # Only a run with rounds has more to push than its finished model.
    pushes_more = any(len(getattr(kind, "hub_strategies", ())) > 1 for kind in dataclass_types)
    parser.unused = {key: why for key, why in UNUSED.items() if not (pushes_more and key == "hub_strategy")}
    parser.elsewhere = parser.unused | (elsewhere or {})
    recipe = {}
    words = arguments
    if arguments and not arguments[0].startswith("-"):
        recipe, words = _read_recipe(parser, arguments[0])[0], arguments[1:]
        arguments = _recipe_arguments(parser, arguments[0]) + words
    given = {word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    for key in sorted(given & parser.unused.keys()):
        _refuse_key(parser, key, "the command line")
    for first, second in TOGETHER:
        if first in given and second not in given and recipe.get(second) is not None:
            parser.error(
                f"{first} is given on the command line, but {second} would still be the recipe's {recipe[second]!r}: "
                f"give --{second} too, or --{second} null"
            )
    try:
        *instances, unknown = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:  # of a key that takes a dictionary
        pairs = zip_longest(arguments, arguments[1:])
        key = next(word.split("=")[0] for word, value in pairs if error.doc in (word.partition("=")[2], value))
        parser.error(f"{key[2:]} is {error.doc!r}, which is not JSON ({error}): write it as '{{\"name\": 1}}'")
    except ValueError as error:  # of a dataclass: a value that is out of its range, or that contradicts another one
        parser.error(str(error))
    for word in unknown:
        if word.startswith("--"):
            _refuse_key(parser, word[2:].split("=")[0], "the command line")
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r} on the command line")
    return tuple(instances)


def parse_recipe_of(key: str, choices: dict[str, type], dataclass_types, arguments: list[str] | None = None) -> tuple:
    """`parse_recipe` with one more dataclass at the end: the entry of `choices` that the recipe's `key` names.

    `key` is a field of one of `dataclass_types`. If it is not given, the first of the choices is taken. A key that belongs
    only to other choices is refused, with their names.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, chosen = RecipeParser(dataclass_types), next(iter(choices))
    if arguments and not arguments[0].startswith("-"):
        chosen = _read_recipe(parser, arguments[0])[0].get(key) or chosen
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if word.split("=")[0] == f"--{key}":
            chosen = word.split("=", 1)[1] if "=" in word else following
    if chosen not in choices:
        parser.error(f"{key} is {chosen!r}, but must be one of {', '.join(choices)}")
    elsewhere = {}
    for name in {f.name for choice in choices.values() for f in dataclasses.fields(choice)}:
        owners = [other for other, choice in choices.items() if name in {f.name for f in dataclasses.fields(choice)}]
        if chosen not in owners:
            elsewhere[name] = f"is no option of {key} {chosen!r}, but of {' and '.join(owners)}"
    return parse_recipe((*dataclass_types, choices[chosen]), arguments, elsewhere)


def _read_recipe(parser: HfArgumentParser, name: str) -> tuple[dict, Path]:
    """The content of a recipe, which is a mapping, and its file."""
    path = Path(name)
    if not path.is_file():
        path = RECIPE_FOLDER / path.name
    if not path.is_file():
        parser.error(
            f"recipe {name!r} does not exist; the library's own are {sorted(p.name for p in RECIPE_FOLDER.glob('*.yaml'))}"
        )
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"recipe {name!r} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"recipe {name!r} must be a mapping of keys to values, not a {type(recipe).__name__}")
    return recipe, path


def _recipe_arguments(parser: HfArgumentParser, name: str) -> list[str]:
    recipe, path = _read_recipe(parser, name)
    known = _keys(parser)
    arguments = []
    for key, value in recipe.items():
        if key not in known or key in parser.unused:
            _refuse_key(parser, str(key), f"recipe {name!r}")
        if value is None and key not in parser.optional_keys:
            parser.error(f"{key!r} in recipe {name!r} cannot be null: give a value, or leave the key out")
        words = [_as_word(item, path.parent) for item in (value if isinstance(value, list) else [value])]
        if len(words) == 1:
            arguments.append(f"--{key}={words[0]}")  # in one piece: a value may start with a dash
        elif known[key].nargs == "+":
            arguments += [f"--{key}", *words]
        else:
            parser.error(f"{key!r} in recipe {name!r} takes one value, not {len(words)}")
    return arguments


def _or_null(convert: Callable) -> Callable:
    def parse(word: str):
        return None if word == "null" else convert(word)

    parse.__name__ = getattr(convert, "__name__", "value")  # argparse names it when the word is ill-typed
    return parse


def _as_word(value, folder: Path) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return json.dumps({key: _as_number(item) for key, item in value.items()})
    if isinstance(value, str) and value.startswith(("./", "../")):
        path, shipped = folder / value, RECIPE_FOLDER / value
        # A shipped recipe that was copied elsewhere, or that a model card holds, still means what ships with the library.
        return os.path.normpath(shipped if shipped.exists() and not path.exists() else path)
    return str(value)


def _as_number(value):
    """`6e-5` is a number here, although PyYAML calls it a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _keys(parser: HfArgumentParser) -> dict:
    """Key -> argparse action. Without `--help`, which is not a key of recipes."""
    actions = [action for action in parser._actions if not isinstance(action, _Help)]
    options = {option: action for action in actions for option in action.option_strings}
    return {option[2:]: action for option, action in options.items() if option.startswith("--")}


def _refuse_key(parser: RecipeParser, key: str, place: str):
    if key in parser.elsewhere:
        parser.error(f"{key!r} in {place} {parser.elsewhere[key]}")
    parser.error(f"unknown key {key!r} in {place}; the nearest valid key is {nearest(key, _keys(parser))!r}")
