"""The distillers' options, resume, recipes, and a whole run with its judge."""

import contextlib
import copy
import io
import json
import math
import re

import pytest
import torch
from tiny_run import BLOCK, mcd_arguments, run_python, save_judge, write_inputs
from toy_distillers import METHODS, K, blocks, make_trainer
from transformers import AutoModel

from evaluation.evaluate_model import KEY, SETTINGS
from evaluation.judge import fingerprint
from trainers import run_mcd
from trainers.batches import collate_blocks, maskable_tokens
from trainers.dcd_trainer import DCDTrainingArguments
from trainers.dscd_trainer import DSCDTrainingArguments
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.mpdc_trainer import MPDCTrainer, MPDCTrainingArguments
from trainers.runs.recipe import RECIPE_FOLDER, parse_recipe_of
from trainers.sdtt_trainer import SDTTTrainingArguments


# --- Options


@pytest.mark.parametrize(
    ("arguments_class", "changes", "message"),
    [
        (SDTTTrainingArguments, {"teacher_steps": 0}, "teacher_steps must be at least 1, not 0"),
        (SDTTTrainingArguments, {"delta": 0.5}, r"delta \(0.5\) grows to 32 in 7 rounds"),
        (SDTTTrainingArguments, {"teacher_steps": 40}, r"teacher_steps \(40\) of up to 0.0625 are 2.5 in time"),
        (MCDTrainingArguments, {"tau": [0.9, 0.8], "num_rounds": 1}, "tau has 2 temperatures, but num_rounds is 1"),
        (DCDTrainingArguments, {"log_snr": [1.0, 4.0]}, r"log_snr must be two falling numbers.*not \[1.0, 4.0\]"),
        (DSCDTrainingArguments, {"student_ratio": [0.9, 0.4]}, "student_ratio must be two rising numbers"),
        (DSCDTrainingArguments, {"lambda_end": 1.5}, r"lambda_end must lie in \[0, 1\], not 1.5"),
        (DCDTrainingArguments, {"log_snr": [float("nan"), 1.0]}, "log_snr must be two falling numbers"),
        (DSCDTrainingArguments, {"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        (MPDCTrainingArguments, {"delta_end": 0.0}, r"delta_end must lie in \(0, 1\), not 0.0"),
        (MPDCTrainingArguments, {"anchor_fraction": 2.0}, r"anchor_fraction must lie in \[0, 1\], not 2.0"),
        (SDTTTrainingArguments, {"sampling_epsilon": 1.0}, r"sampling_epsilon must lie in \(0, 1\), not 1.0"),
        (DSCDTrainingArguments, {"clamp": -5.0}, "clamp must be positive and finite, not -5.0"),
        (MPDCTrainingArguments, {"num_rounds": 0}, "num_rounds must be at least 1, not 0"),
    ],
)
def test_wrong_settings_name_the_field_and_the_value(arguments_class, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments_class(output_dir="unused", **changes)


def test_networks_of_the_wrong_kind_are_refused(networks, tmp_path):
    for method, kind in (("dcd", "absorbing"), ("sdtt", "uniform")):
        trainer_class, arguments_class, _ = METHODS[method]
        arguments = arguments_class(output_dir=str(tmp_path), ema_decay=None)
        with pytest.raises(ValueError, match=f"diffusion_kind is '{kind}', but this trainer is for"):
            trainer_class(networks[kind][1], arguments)


def test_mpdc_refuses_another_teacher(networks, tmp_path):
    teacher, student = networks["absorbing"]
    with pytest.raises(ValueError, match="has no teacher but the student itself"):
        MPDCTrainer(student, MPDCTrainingArguments(output_dir=str(tmp_path), ema_decay=None), teacher=teacher)


def test_dscd_clamp_zeroes_the_gradient(networks, tmp_path):
    """Outside the clamp the gradient is zero: that is why the option is off by default."""
    trainer = make_trainer("dscd", networks, tmp_path, clamp=0.01)
    loss = trainer.compute_loss(trainer.model, {"input_ids": blocks()})
    assert loss.item() == pytest.approx(0.01)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(trainer.model.parameters())))


def test_collating_pads_only_what_is_shorter():
    assert list(collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])) == ["input_ids"]
    batch = collate_blocks([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert maskable_tokens(batch).tolist() == [[False, True, True], [True, False, False]]
    assert maskable_tokens(collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3]}])).tolist() == [
        [True] * 2,
        [True, False],
    ]


def test_eos_padding_is_seen_noised_and_scored():
    rows = [{"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}, {"input_ids": [4], "completion_mask": [0]}]
    batch = collate_blocks(rows, eos_token_id=9)
    assert list(batch) == ["input_ids", "labels"] and batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert maskable_tokens(batch).tolist() == [[False, True, True], [False, True, True]]
    given = collate_blocks([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows], eos_token_id=9)
    assert given["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert maskable_tokens(collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [3]}], 9)).all()


def test_the_trainer_pads_as_its_arguments_say(networks, tmp_path):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}]
    for padding, row in (("unseen", [4, 0, 0]), ("eos", [4, 46, 46])):
        trainer = make_trainer("mcd", networks, tmp_path, padding=padding)
        assert trainer.data_collator(rows)["input_ids"][1].tolist() == row
    trainer.model.config.eos_token_id, known = None, trainer.model.config.eos_token_id
    with pytest.raises(ValueError, match="padding is 'eos', but the model's configuration has no eos_token_id"):
        make_trainer("mcd", networks, tmp_path, padding="eos")
    trainer.model.config.eos_token_id = known
    with pytest.raises(ValueError, match="padding must be one of .*, not 'zeros'"):
        make_trainer("mcd", networks, tmp_path, padding="zeros")
    with pytest.raises(ValueError, match="loss_norm must be one of .*, not 'batch'"):
        make_trainer("mcd", networks, tmp_path, loss_norm="batch")
    with pytest.raises(ValueError, match="padding .'eos'. is of our own data_collator: leave one of them out"):
        MCDTrainer(trainer.model, trainer.args, data_collator=collate_blocks)


def test_columns_with_a_value_for_each_token_are_used_or_refused():
    row = {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "text": "abc", "n": 3}
    assert maskable_tokens(collate_blocks([row, row | {"input_ids": [4], "completion_mask": [1]}])).tolist() == [
        [False, True, True],
        [True, False, False],
    ]
    both = collate_blocks([row | {"labels": [1, 2, -100]}])
    assert both["labels"].tolist() == [[-100, 2, -100]]
    for name in ("position_ids", "assistant_masks", "token_type_ids"):
        with pytest.raises(ValueError, match=f"a column '{name}' with a value for each token, which has no meaning"):
            collate_blocks([row | {name: [0, 1, 2]}])


# --- Resume


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_bitwise_as_one_that_never_stopped(method, networks, tmp_path):
    """The run resumes from before and from after the end of a round, with networks that start at zero. Compared are the
    losses, the student, the teacher and the EMA.
    """

    def run(folder, checkpoint=None):
        trainer_class = METHODS[method][0]
        kept = copy.deepcopy(networks)
        changes = {
            "ema_decay": 0.9,
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 3,
            "logging_steps": 1,
        }
        changes |= {"learning_rate": 1e-2, "warmup_steps": 2, "disable_tqdm": True, "report_to": "none"}
        if checkpoint is not None:
            for network in kept[trainer_class.diffusion_kind]:
                for parameter in network.parameters():
                    parameter.data.zero_()
        trainer = make_trainer(method, kept, folder, **changes)
        trainer.train_dataset = [{"input_ids": row.tolist()} for row in blocks()] * 8
        trainer.train(checkpoint)
        measured = [{k: v for k, v in entry.items() if "runtime" not in k} for entry in trainer.state.log_history]
        followers = {name: follower.model.state_dict() for name, follower in trainer.companions.items()}
        return measured[:8], {"student": trainer.model.state_dict()} | followers

    logs, weights = run(tmp_path / "whole")
    assert ("teacher" in weights) == METHODS[method][0].has_teacher
    for stopped_at in (3, 6):
        again, restored = run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{stopped_at}"))
        assert len(logs) == 8 and logs == again
        for name, state in weights.items():
            for key in state:
                assert torch.equal(state[key], restored[name][key]), (stopped_at, name, key)
    start_of_teacher, start = (
        network.state_dict()["lm_head.weight"] for network in networks[METHODS[method][0].diffusion_kind]
    )
    assert torch.equal(start, weights["student"]["lm_head.weight"]) == (
        method == "coupling"
    )  # which trains its chain alone
    if method == "dscd":  # frozen
        assert torch.equal(weights["teacher"]["lm_head.weight"], start_of_teacher)
    elif "teacher" in weights:  # the second round has ended
        assert all(torch.equal(weights["teacher"][key], weights["student"][key]) for key in weights["student"])


# --- The entry point


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_of_each_method_runs(method, networks, tmp_path, capsys):
    """`recipes/tiny_*.yaml` on toy networks for two steps: the student, its rounds, and a card that names the method."""
    inputs = write_inputs(tmp_path)
    networks[METHODS[method][0].diffusion_kind][0].float().save_pretrained(tmp_path / "teacher")
    networks[METHODS[method][0].diffusion_kind][0].double()
    settings = {"teacher": inputs / "teacher", "tokenizer": inputs / "tokenizer", "train_text": inputs / "text.txt"}
    settings |= {"validation_text": inputs / "text.txt", "block_length": BLOCK, "steps_per_round": 1, "num_rounds": 2}
    settings |= {"judge": "null", "output_dir": tmp_path / "run", "disable_tqdm": True, "save_steps": 1}
    settings |= {"logging_steps": 1}
    recipe = RECIPE_FOLDER / ("tiny.yaml" if method == "mcd" else f"tiny_{method}.yaml")
    tau = ["--tau", "0.96", "0.93"] if method == "mcd" else []  # the recipe has one for each of its three rounds
    run_mcd.main([str(recipe), *(f"--{key}={value}" for key, value in settings.items()), *tau])
    assert run_mcd.METHODS[method][2] in (tmp_path / "run" / "README.md").read_text()
    for folder in ("run", "run/round-1", "run/round-2", "run/teacher"):
        assert AutoModel.from_pretrained(tmp_path / folder).config.vocab_size == K


@pytest.fixture(scope="module")
def judged_run(tmp_path_factory):
    """The folder of a run of two rounds with a judge, and what the run printed."""
    home = tmp_path_factory.mktemp("judged")
    inputs, judge = write_inputs(home), save_judge(home / "judge")
    settings = {"num_rounds": 2, "steps_per_round": 2, "judge": judge, "evaluation_samples": 3}
    settings |= {"validation_text": inputs / "text.txt", "convention": "raw_ids"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_mcd.main([*mcd_arguments(inputs, home / "run", **settings), "--evaluation_steps", "2", "4"])
    return home / "run", out.getvalue()


def test_a_run_judges_its_teacher_and_every_round(judged_run):
    folder, _ = judged_run
    rows = json.loads((folder / "eval.json").read_text())["results"]
    assert [(row["model"], row["steps"]) for row in rows] == [
        ("held-out text", None),
        *[(name, steps) for name in ("teacher", "round-1", "round-2") for steps in (2, 4)],
    ]
    for row in rows:
        assert {*KEY, *SETTINGS, "gen_ppl", "entropy", "trigram_entropy", "distinct_3", "nfe", "example"} <= row.keys()
        assert row["gen_ppl"] > 1 and 0 < row["entropy"] < math.log(BLOCK)
        assert (row["samples"], row["seeds"], row["length"]) == (66 if row["steps"] is None else 3, 1, BLOCK)
        assert row["nfe"] is None if row["steps"] is None else 0 < row["nfe"] <= row["steps"]
    weights = {
        name: {row["weights"] for row in rows if row["model"] == name} for name in ("teacher", "round-1", "round-2")
    }
    for name, digests in weights.items():
        assert digests == {fingerprint(AutoModel.from_pretrained(folder / name))}
    assert (
        weights["round-2"] == {fingerprint(AutoModel.from_pretrained(folder))}
        and len(set.union(*weights.values())) == 3
    )
    assert (folder / "eval.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert "Masked Consistency Distillation" in card and (folder / "eval.md").read_text().strip() in card


def test_a_run_prints_its_table_at_the_end_of_each_round(judged_run):
    _, printed = judged_run
    lines = printed.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("| Gen-PPL (entropy) |")]
    tables = [[line for line in lines[i + 2 : i + 5] if line.startswith("| ")] for i in heads]
    names = [[line.split("|")[1].strip() for line in table] for table in tables]
    assert names == [["teacher"], ["teacher", "round-1"], *[["teacher", "round-1", "round-2"]] * 2]
    for cell in (cell.strip() for table in tables for line in table for cell in line.split("|")[2:-1]):
        assert re.fullmatch(r"[\d.,]+ \(\d\.\d\d\)", cell), cell


def test_what_a_run_says_it_saved_is_there_and_its_last_line_works(judged_run, tmp_path, capsys):
    folder, printed = judged_run
    *_, saved, line = printed.strip().splitlines()
    assert saved.endswith("(README.md), eval.json, eval.md, eval.png, writing.gif, teacher, round-1, round-2.")
    result = run_python(f"from transformers import AutoModel; print({line.strip()}.shape)", plain=True)
    assert f"torch.Size([1, {BLOCK}])" in result.stdout, result.stderr
    run_mcd.main(mcd_arguments(write_inputs(tmp_path), tmp_path / "run", max_steps=2))
    assert "(README.md), eval.json, eval.md, teacher.\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--trainer", "sdtt", "--tau", "0.9"],
            "'tau' in the command line is no option of trainer 'sdtt', but of mcd",
        ),
        (["--trainer=mpdc", "--delta_growth=2"], "'delta_growth' in the command line is no option of trainer 'mpdc'"),
        (["--trainer", "dscd", "--teacher_steps", "2"], "is no option of trainer 'dscd', but of sdtt"),
        (["--trainer", "sdttt"], "trainer is 'sdttt', but must be one of mcd, sdtt, dcd, dscd, mpdc"),
        (["--trainer", "dcd", "--reveals", "x"], "unknown key 'reveals' in the command line"),
        (["{recipe}"], "'anchor_fraction' in recipe '{recipe}' is no option of trainer 'dcd', but of mpdc"),
    ],
)
def test_an_option_of_another_method_is_refused_by_name(words, says, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: dcd\nanchor_fraction: 0.1\n")
    required = [f"--{name}=x" for name in ("teacher", "tokenizer", "train_text", "output_dir")]
    with pytest.raises(SystemExit) as stop:
        run_mcd.main([*(word.format(recipe=recipe) for word in words), *required])
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert says.format(recipe=recipe) in line and "\n" not in line


@pytest.mark.parametrize(
    "recipe",
    [path for path in sorted(RECIPE_FOLDER.glob("*.yaml")) if "\nteacher:" in path.read_text()],
    ids=lambda path: path.name,
)
def test_every_distillation_recipe_is_of_its_method(recipe):
    arguments = {name: method[1] for name, method in run_mcd.METHODS.items()}
    shared = (run_mcd.MethodArguments, run_mcd.NetworkArguments, run_mcd.AdapterArguments, run_mcd.TokenizerArguments)
    method, *_, training = parse_recipe_of(
        "trainer",
        arguments,
        (*shared, run_mcd.TextArguments, run_mcd.EvaluationArguments),
        [str(recipe), "--bf16=false"],
    )
    assert type(training) is run_mcd.METHODS[method.trainer][1]
    assert method.trainer == (recipe.stem.split("_")[-1] if recipe.stem.split("_")[-1] in run_mcd.METHODS else "mcd")
    assert training.max_steps == training.num_rounds * training.steps_per_round
