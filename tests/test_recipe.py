"""Recipes: YAML and command line into typed dataclasses, and one clear line for everything that is wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from transformers import TrainingArguments

from trainers import run_judge, run_mcd, run_mdlm
from trainers.resume_arguments import ExactResumeArguments
from trainers.runs.output_folder import recipe_text, run_settings
from trainers.runs.recipe import RECIPE_FOLDER, parse_recipe, parse_recipe_of
from trainers.runs.text_arguments import TextArguments


@dataclass
class Model:
    width: int = 8
    kind: Literal["absorbing", "uniform"] = "absorbing"
    teacher: str | None = None
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    decay: float | None = 0.9
    order: Literal["left", "right"] | None = "left"


@dataclass
class Teaching:
    rate: float = 0.1
    shuffle: bool = False
    keep: bool = True


@pytest.fixture
def parse(tmp_path):
    def parse(text: str | None, *words: str):
        if text is None:
            return parse_recipe((Model, Teaching), list(words))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text, encoding="utf-8")
        return parse_recipe((Model, Teaching), [str(recipe), *words])

    return parse


def refusal(capsys, call) -> str:
    """The one line of the complaint; the exit status must be 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# --- Values and their types


@pytest.mark.parametrize(
    "written, rate",
    [("6e-5", 6e-5), ("6.0e-5", 6e-5), ("6E-5", 6e-5), ("1", 1.0), ("0.5", 0.5), ("'0.5'", 0.5), ("-2.5", -2.5)],
)
def test_numbers_are_numbers_however_yaml_reads_them(parse, written, rate):
    _, teaching = parse(f"rate: {written}")
    assert type(teaching.rate) is float and teaching.rate == rate
    _, teaching = parse(None, f"--rate={written.strip(chr(39))}")
    assert type(teaching.rate) is float and teaching.rate == rate


def test_negative_exponents_and_leading_dashes_are_values(parse):
    model, teaching = parse("rate: -6e-5\nteacher: '--odd-name'")
    assert teaching.rate == -6e-5 and model.teacher == "--odd-name"


@pytest.mark.parametrize("written, value", [("true", True), ("yes", True), ("false", False), ("no", False)])
def test_truth_values(parse, written, value):
    _, teaching = parse(f"shuffle: {written}\nkeep: {written}")
    assert teaching.shuffle is value and teaching.keep is value


def test_every_type_arrives(parse):
    model, _ = parse("width: 16\nkind: uniform\nteacher: some/model\nsizes: [3, -4, 5]\n")
    assert model == Model(16, "uniform", "some/model", [3, -4, 5])


def test_null_is_none_where_a_field_may_be_none(parse):
    """This holds where the default is something else, and it wins over the recipe."""
    assert parse("decay: null\n")[0].decay is None
    assert parse("decay: 0.5\nteacher: ./there\n", "--decay", "null", "--teacher=null")[0] == Model(decay=None)
    assert parse("decay: null\n", "--decay", "0.25")[0].decay == 0.25
    assert parse("order: null\n")[0].order is None and parse("order: right\n")[0].order == "right"


def test_what_is_missing_keeps_its_default(parse):
    for text in ("", "# only a comment\n", "teacher: null\n"):
        assert parse(text) == (Model(), Teaching())
    assert parse(None) == (Model(), Teaching())


def test_a_list_of_one(parse):
    assert parse("sizes: [7]")[0].sizes == [7] == parse("sizes: 7")[0].sizes


def test_text_with_spaces_and_other_letters(parse):
    for teacher in ("two words", "œuvre été", "a=b", "6e-5", ""):
        assert parse(yaml.safe_dump({"teacher": teacher}, allow_unicode=True))[0].teacher == teacher


def test_the_command_line_wins(parse):
    text = "width: 16\nrate: 6e-5\nsizes: [3, 4]\nshuffle: true\nteacher: a"
    model, teaching = parse(text, "--width", "32", "--rate=1e-3", "--sizes", "9", "--shuffle", "false")
    assert model == Model(32, "absorbing", "a", [9])
    assert teaching.rate == 1e-3 and teaching.shuffle is False


# --- Paths


def test_a_relative_path_is_relative_to_its_recipe(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    for written, expected in (
        ("./text/a.txt", folder / "text" / "a.txt"),
        ("../runs/x", tmp_path / "runs" / "x"),
        ("name/of-hub", "name/of-hub"),
        ("/abs/a.txt", "/abs/a.txt"),
        (".hidden", ".hidden"),
    ):
        (folder / "r.yaml").write_text(f"teacher: {written}")
        for where, name in ((elsewhere, "../recipes/r.yaml"), (folder, "r.yaml"), (tmp_path, str(folder / "r.yaml"))):
            monkeypatch.chdir(where)
            (model, _) = parse_recipe((Model, Teaching), [name])
            if isinstance(expected, Path):
                assert Path(model.teacher).resolve() == expected
            else:
                assert model.teacher == expected
    (model, _) = parse_recipe(
        (Model, Teaching), ["r.yaml" if Path("r.yaml").exists() else name, "--teacher", "./here"]
    )
    assert model.teacher == "./here", "a path on the command line belongs to the shell's folder"


def test_a_recipe_of_the_library_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = sorted(path.name for path in RECIPE_FOLDER.glob("*.yaml"))
    assert "tiny_judge.yaml" in shipped
    line = refusal(capsys, lambda: parse_recipe((Model,), ["recipes/tiny_judge.yaml"]))
    assert "unknown key" in line and "'recipes/tiny_judge.yaml'" in line, "the file was read"


def entry_of(recipe: dict):
    return run_mcd if "teacher" in recipe else run_judge if "num_heads" in recipe else run_mdlm


@pytest.mark.parametrize("recipe", sorted(RECIPE_FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_library_is_read_by_its_entry_point(recipe, tmp_path):
    """The entry point reads the complete recipe: its error is about the tokenizer, which it looks for next."""
    entry = entry_of(yaml.safe_load(recipe.read_text()))
    with pytest.raises(SystemExit) as stop:
        entry.main([str(recipe), "--tokenizer=/nowhere", f"--output_dir={tmp_path / 'run'}", "--bf16=false"])
    assert str(stop.value.code).startswith("error: tokenizer '/nowhere' is not a local file or folder")


# --- Refusals


@pytest.mark.parametrize(
    "text, words, says",
    [
        ("widht: 3", (), "unknown key 'widht' in recipe '{recipe}'; the nearest valid key is 'width'"),
        ("width: 3", ("--raet", "3"), "unknown key 'raet' in the command line; the nearest valid key is 'rate'"),
        ("", ("--raet=3",), "unknown key 'raet' in the command line; the nearest valid key is 'rate'"),
        ("", ("--wid", "3"), "unknown key 'wid' in the command line; the nearest valid key is 'width'"),
        ("3: 4", (), "unknown key '3' in recipe"),
        ("help: true", (), "unknown key 'help' in recipe"),
        ("width: wide", (), "argument --width: invalid int value: 'wide'"),
        ("width: 2.5", (), "argument --width: invalid int value: '2.5'"),
        ("width: [1, 2]", (), "'width'"),
        ("sizes: []", (), "argument --sizes: expected at least one argument"),
        ("rate: fast", (), "argument --rate: invalid float value: 'fast'"),
        ("rate: {a: 1}", (), "argument --rate: invalid float value"),
        ("shuffle: maybe", (), "argument --shuffle: "),
        ("kind: gaussian", (), "argument --kind: invalid choice: 'gaussian' (choose from"),
        ("sizes: [1, two]", (), "argument --sizes: invalid int value: 'two'"),
        ("", ("--width", "wide"), "argument --width: invalid int value: 'wide'"),
        ("", ("stray",), "unexpected argument 'stray' on the command line"),
        ("width: [1, 2", (), "recipe '{recipe}' is not valid YAML: "),
        ("width: 3\nrate: 1\nwidth: 4", (), "recipe '{recipe}' is not valid YAML: key 'width' appears twice"),
        ("width: 3\n\tkind: x", (), "recipe '{recipe}' is not valid YAML: "),
        ("width:", (), "'width' in recipe '{recipe}' cannot be null: give a value, or leave the key out"),
        ("rate: ~", (), "'rate' in recipe '{recipe}' cannot be null"),
        ("- width\n- 3", (), "recipe '{recipe}' must be a mapping of keys to values, not a list"),
        ("just words", (), "recipe '{recipe}' must be a mapping of keys to values, not a str"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(parse, tmp_path, capsys, text, words, says):
    line = refusal(capsys, lambda: parse(text, *words))
    assert says.format(recipe=tmp_path / "recipe.yaml") in line


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"teacher: \xff\xfe")
    assert f"recipe '{recipe}' is not valid YAML" in refusal(capsys, lambda: parse_recipe((Model,), [str(recipe)]))


def test_a_missing_recipe_is_refused_with_the_ones_there_are(tmp_path, capsys):
    for name in (str(tmp_path / "nowhere.yaml"), str(tmp_path)):
        line = refusal(capsys, lambda: parse_recipe((Model,), [name]))  # noqa: B023
        assert f"recipe '{name}' does not exist" in line and "'tiny_judge.yaml'" in line


def test_a_missing_required_value_is_named(tmp_path, capsys):
    for call in (
        lambda: parse_recipe((TextArguments,), []),
        lambda: parse_recipe_of("kind", {"absorbing": Teaching}, (Model, TextArguments), []),
    ):
        line = refusal(capsys, call)
        assert "train_text" in line and "give a RECIPE.yaml that has them, or --key value" in line


def test_a_value_that_its_dataclass_refuses_is_a_mistake_of_usage(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("train_text: a\nmax_validation_blocks: 0\nvalidation_text: b")
    line = refusal(capsys, lambda: parse_recipe((TextArguments,), [str(tmp_path / "r.yaml")]))
    assert line == "error: max_validation_blocks must be at least 1, not 0"


def test_a_dictionary_that_is_not_json_is_named(tmp_path, capsys):
    for words in (["--lr_scheduler_kwargs", "{num"], ["--lr_scheduler_kwargs={num"]):
        line = refusal(
            capsys, lambda words=words: parse_recipe((ExactResumeArguments,), ["--output_dir", str(tmp_path), *words])
        )
        assert "lr_scheduler_kwargs is '{num', which is not JSON" in line


@pytest.mark.parametrize("name", ["tiny", "tiny_sums", "bible"])
def test_a_copied_recipe_finds_what_ships(name, tmp_path):
    @dataclass
    class Paths:
        teacher: str = ""
        judge: str = ""

    (tmp_path / "copy.yaml").write_text(f"teacher: ./{name}/teacher\njudge: ./mine/judge\n")
    (paths,) = parse_recipe((Paths,), [str(tmp_path / "copy.yaml")])
    assert paths == Paths(str(RECIPE_FOLDER / name / "teacher"), str(tmp_path / "mine" / "judge"))


def test_a_new_training_text_never_keeps_the_recipes_validation_text(tmp_path, capsys):
    """Otherwise a run on somebody's own text would be validated on the novels that ship with the recipe."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train_text: ./novels\nvalidation_text: ./held_out\n")
    for words in (["--train_text", "mine.txt"], ["--train-text=mine.txt"]):
        line = refusal(capsys, lambda: parse_recipe((TextArguments,), [str(recipe), *words]))  # noqa: B023
        assert "train_text is given on the command line, but validation_text would still be the recipe's" in line
        assert "'./held_out': give --validation_text too, or --validation_text null" in line
    for more, expected in (("null", None), ("mine_too.txt", "mine_too.txt")):
        (text,) = parse_recipe((TextArguments,), [str(recipe), "--train_text", "mine.txt", "--validation_text", more])
        assert text.validation_text == expected
    recipe.write_text("train_text: ./novels\n")
    assert parse_recipe((TextArguments,), [str(recipe), "--train_text", "mine.txt"])[0].validation_text is None


# --- With the arguments of transformers' Trainer


def test_training_arguments(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "train_text: ./a.txt\noutput_dir: ../runs/x\nlearning_rate: 6e-5\nmax_steps: -1\nreport_to: [tensorboard]\n"
        "lr_scheduler_kwargs: {min_lr: 1e-6}\nuse_cpu: true\nsave_strategy: steps\nblock_length: 64\nadam_beta2: 0.99\n"
    )
    text, training = parse_recipe((TextArguments, TrainingArguments), [str(recipe), "--per_device_train_batch_size=3"])
    assert (text.train_text, text.block_length) == (str(tmp_path / "a.txt"), 64)
    assert training.output_dir == str(tmp_path.parent / "runs" / "x")
    assert (training.learning_rate, training.max_steps, training.adam_beta2) == (6e-5, -1, 0.99)
    assert training.report_to == ["tensorboard"] and training.per_device_train_batch_size == 3
    assert training.use_cpu is True and training.save_strategy == "steps"
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-6}
    recipe.write_text("train_text: a\nlearning_rat: 1")
    line = refusal(capsys, lambda: parse_recipe((TextArguments, TrainingArguments), [str(recipe)]))
    assert line.endswith("the nearest valid key is 'learning_rate'")


@pytest.mark.parametrize("key", ["hub_strategy", "do_eval"])
def test_settings_of_the_trainer_without_effect_are_refused(tmp_path, capsys, key):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"{key}: true\noutput_dir: run")
    line = refusal(capsys, lambda: parse_recipe((TrainingArguments,), [str(recipe)]))
    assert f"'{key}' in recipe '{recipe}' has no effect here: " in line
    line = refusal(capsys, lambda: parse_recipe((TrainingArguments,), ["--output_dir=run", f"--{key}=true"]))
    assert f"'{key}' in the command line has no effect here: " in line


def test_only_a_run_with_rounds_may_push_each_round(tmp_path, capsys):
    words = ["--output_dir=run", "--hub_strategy=every_save", "--push_to_hub=true"]
    (training,) = parse_recipe((run_mcd.MCDTrainingArguments,), words)
    assert training.hub_strategy == "every_save"
    with pytest.raises(
        ValueError, match="hub_strategy is 'checkpoint', but a run is pushed once.* 'end' or 'every_save'"
    ):
        run_mcd.MCDTrainingArguments(output_dir="run", hub_strategy="checkpoint")
    line = refusal(capsys, lambda: parse_recipe((ExactResumeArguments,), words[:2]))
    assert "'hub_strategy' in the command line has no effect here: the finished model is pushed once" in line


def test_a_folder_for_the_run_is_required(tmp_path, capsys):
    assert "--output_dir" in refusal(capsys, lambda: parse_recipe((TrainingArguments,), []))
    (tmp_path / "r.yaml").write_text("output_dir: null")
    line = refusal(capsys, lambda: parse_recipe((TrainingArguments,), [str(tmp_path / "r.yaml")]))
    assert "'output_dir' in recipe" in line and "cannot be null" in line


# --- Help


def help_of(entry, capsys, word: str, columns: int = 120) -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setenv("COLUMNS", str(columns))
        entry.main([word])
    assert stop.value.code == 0
    return capsys.readouterr().out


ENTRIES = pytest.mark.parametrize("entry", [run_mcd, run_mdlm, run_judge], ids=lambda entry: entry.__name__)


@ENTRIES
def test_help_is_short_and_begins_with_our_own_keys(entry, capsys):
    text = help_of(entry, capsys, "--help")
    assert len(text.splitlines()) < 125 and max(map(len, text.splitlines())) < 120
    assert text.index("--tokenizer") < text.index("--train_text") < text.index("--learning_rate")
    required = [line.split()[0] for line in text.splitlines() if line.endswith("(required)")]
    own = ["--teacher", "--tokenizer"] if entry is run_mcd else ["--tokenizer"]
    assert required[: len(own)] == own and required[-1] == "--output_dir"
    assert "--evaluation_seeds" not in text or "(1)" in text, "1 is not true"
    assert "--adam_beta1" not in text and "--help-all" in text


@ENTRIES
def test_every_key_of_every_recipe_is_in_the_long_help(entry, capsys):
    text, short = help_of(entry, capsys, "--help-all"), help_of(entry, capsys, "--help")
    keys = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) and set(re.findall(r"^  --(\w+)", short, re.MULTILINE)) <= set(keys)
    assert {"adam_beta1", "ddp_timeout", "output_dir", "train_text"} <= set(keys)
    for recipe in RECIPE_FOLDER.glob("*.yaml"):
        content = yaml.safe_load(recipe.read_text())
        if content.get("trainer", "mcd") == "mcd" and entry_of(content) is entry:
            assert content.keys() <= set(keys), recipe.name


def test_the_help_is_that_of_the_method(capsys):
    with pytest.raises(SystemExit):
        run_mcd.main(["small_sdtt.yaml", "--help"])
    text = capsys.readouterr().out
    assert "--teacher_steps" in text and "--tau " not in text


# --- The recipe on the card of a finished run


@pytest.mark.parametrize("name", ["tiny.yaml", "tiny_sdtt.yaml", "tiny_teacher.yaml", "tiny_judge.yaml"])
def test_the_recipe_on_a_card_makes_the_same_run(name, tmp_path, monkeypatch):
    """It is read as it stands, in another folder, and holds no path of this machine."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    mine = tmp_path / "private" / "mine"
    changes = ["--judge", str(mine / "judge"), "--ema_decay", "null"] if name == "tiny.yaml" else []

    def parse(recipe: str, *words: str):
        if "judge" in name:
            classes = (run_judge.ShapeArguments, run_judge.TokenizerArguments, TextArguments)
            return parse_recipe((*classes, run_judge.JudgeTrainingArguments), [recipe, *words])
        if "teacher" in name:
            classes = (run_mdlm.ModelArguments, run_mdlm.TokenizerArguments, TextArguments)
            return parse_recipe((*classes, run_mdlm.MDLMTrainingArguments), [recipe, *words])
        classes = (run_mcd.MethodArguments, run_mcd.NetworkArguments, run_mcd.TokenizerArguments, TextArguments)
        methods = {method: arguments for method, (_, arguments, _) in run_mcd.METHODS.items()}
        return parse_recipe_of("trainer", methods, (*classes, run_mcd.EvaluationArguments), [recipe, *words])

    *arguments, training = parse(name, "--bf16=false", f"--output_dir={mine / 'run'}", *changes)
    text = recipe_text(training, *arguments)
    assert str(tmp_path) not in text and str(RECIPE_FOLDER) not in text
    (tmp_path / "card.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    *again, training_again = parse("card.yaml")
    theirs, ours = run_settings(training_again, *again), run_settings(training, *arguments)
    assert {key for key in ours if ours[key] != theirs[key]} <= {"judge"}
    if name == "tiny.yaml":
        assert (theirs["judge"], theirs["ema_decay"]) == ("judge", None)
        assert text.startswith("# Local files of the author, put yours: judge\n")
