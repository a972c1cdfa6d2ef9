"""A recipe is one YAML file = one run. `parse_recipe` turns it, and the command line after it, into typed dataclasses."""

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser


RECIPE_FOLDER = Path(__file__).resolve().parents[2] / "recipes"


class RecipeLoader(yaml.SafeLoader):
    """YAML in which a key stands once: PyYAML silently takes the last of several."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class RecipeParser(HfArgumentParser):
    """One line for an error; and `null`, in the file and on the command line, is None where a field may be None."""

    elsewhere: dict[str, str] = {}  # keys that are not ours -> what they are

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        self.optional_keys = {
            name
            for dataclass_type in dataclass_types
            for name, hint in get_type_hints(dataclass_type).items()
            if type(None) in get_args(hint)
        }
        for key, action in _keys(self).items():
            if key in self.optional_keys and callable(action.type):
                action.type = _or_null(action.type)
                if action.choices is not None:
                    action.choices = [*action.choices, None]

    def error(self, message: str):
        if "arguments are required" in message:
            message += "; give a RECIPE.yaml that has them, or --key value"
        self.exit(2, f"error: {' '.join(message.split())}\n")


def parse_recipe(
    dataclass_types, arguments: list[str] | None = None, elsewhere: dict[str, str] | None = None
) -> tuple:
    """Reads `[RECIPE.yaml] [--key value ...]` into one instance of each dataclass; the command line wins over the file.

    The YAML is rewritten as command-line arguments in front of the real ones, so that both pass through the same type
    conversion: `6e-5` is a number here although PyYAML calls it a string. A string that starts with `./` or `../` in a
    recipe is a path relative to the recipe's own folder, so that a recipe works from any directory. A recipe that is
    not found under the given path is looked up by its name among the recipes that ship with the library.

    Exits with status 2 and one line on standard error when a file, a key or a value is wrong; `elsewhere` says of some
    keys that are not among the fields where they belong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = RecipeParser(dataclass_types, allow_abbrev=False, usage="%(prog)s [RECIPE.yaml] [--key value ...]")
    parser.elsewhere = elsewhere or {}
    if arguments and not arguments[0].startswith("-"):
        arguments = _recipe_arguments(parser, arguments[0]) + arguments[1:]
    *instances, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    for word in unknown:
        if word.startswith("--"):
            _refuse_key(parser, word[2:].split("=")[0], "the command line")
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r} on the command line")
    return tuple(instances)


def parse_recipe_of(key: str, choices: dict[str, type], dataclass_types, arguments: list[str] | None = None) -> tuple:
    """`parse_recipe` with one dataclass more, the last: that of `choices` which the recipe's `key` names, or the first.

    `key` is a field of one of `dataclass_types`. A key that belongs to another of the choices is refused as such.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, chosen = RecipeParser(dataclass_types, allow_abbrev=False), next(iter(choices))
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
    """The mapping that a recipe is, and its file."""
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
        if key not in known:
            _refuse_key(parser, str(key), f"recipe {name!r}")
        if value is None and key not in parser.optional_keys:
            continue
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
        return os.path.normpath(folder / value)
    return str(value)


def _as_number(value):
    """`6e-5` is a number here, although PyYAML calls it a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _keys(parser: HfArgumentParser) -> dict:
    """Key -> argparse action; `--help` is for the command line only."""
    options = {option: action for action in parser._actions for option in action.option_strings if option != "--help"}
    return {option[2:]: action for option, action in options.items() if option.startswith("--")}


def _refuse_key(parser: RecipeParser, key: str, place: str):
    if key in parser.elsewhere:
        parser.error(f"{key!r} in {place} {parser.elsewhere[key]}")
    nearest = difflib.get_close_matches(key, _keys(parser), n=1, cutoff=0.0)
    parser.error(f"unknown key {key!r} in {place}; the nearest valid key is {nearest[0]!r}")
