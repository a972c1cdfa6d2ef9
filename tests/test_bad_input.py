"""Bad input to the entry points: one clear line, a failing exit status, and nothing left half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from safetensors.torch import load_file
from small_disk import NO_NAMESPACE
from tiny_run import (
    BLOCK,
    ROOT,
    judge_arguments,
    mcd_arguments,
    mdlm_arguments,
    reverse_letters,
    run_python,
    save_judge,
    save_teacher,
    write_inputs,
)
from transformers import AutoModelForCausalLM

from modeling_mcd import MDLMForMaskedDiffusion
from trainers import run_judge, run_mcd, run_mdlm
from trainers.character_tokenizer import character_tokenizer
from trainers.checkpoints import last_complete_checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "run"


ENTRIES = {
    "run_mcd": (run_mcd.main, mcd_arguments),
    "run_mdlm": (run_mdlm.main, mdlm_arguments),
    "run_judge": (run_judge.main, judge_arguments),
}
every = pytest.mark.parametrize("entry", ENTRIES)
both = pytest.mark.parametrize("entry", ["run_mcd", "run_mdlm"])


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder. Empty sub-folders, which the Trainer makes, do not count."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refusal(inputs, output, capsys):
    """`refusal(entry, *words, **changes)`: the one line with which a run ends that must not have written anything."""

    def refusal(entry: str, *words: str, **changes) -> str:
        main, arguments_of = ENTRIES[entry]
        before = contents(output)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            base = {"model": changes["model"]} if entry == "run_mdlm" and "model" in changes else {}
            main(
                [
                    *arguments_of(inputs, output, **base),
                    *(f"--{key}={value}" for key, value in changes.items()),
                    *words,
                ]
            )
        assert contents(output) == before, "the output folder must be as it was"
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]  # no progress bars
        if isinstance(stop.value.code, str):  # Python itself prints it on standard error, and exits with status 1
            lines += stop.value.code.splitlines()
        else:
            assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return refusal


# --- Text


@every
@pytest.mark.parametrize("field", ["train_text", "validation_text"])
def test_the_name_of_a_text_that_is_empty_is_not_the_current_folder(refusal, tmp_path, monkeypatch, entry, field):
    (tmp_path / "a.txt").write_text("a text that was not asked for. " * 99)
    monkeypatch.chdir(tmp_path)
    assert f"{field} is empty: give a text file" in refusal(entry, **{field: ""})


@both
@pytest.mark.parametrize("field", ["train_text", "validation_text"])
@pytest.mark.parametrize(
    "content, says",
    [
        (None, "text '{text}': no such file or folder"),
        (
            b"",
            "'{text}' holds 1 tokens, less text than one block of 32 tokens: give more text, or ask for shorter blocks",
        ),
        (b"\n \n", "less text than one block of 32 tokens"),
        (b"one short line", "less text than one block of 32 tokens"),
        (b"plain until here \xe9 and on" * 9, "{text} is not UTF-8: byte 0xe9 at offset 17"),
        ("utf-16".encode("utf-16"), "{text} is not UTF-8: byte 0xff at offset 0"),
    ],
    ids=["missing", "empty", "only space", "shorter than a block", "Latin-1", "UTF-16"],
)
def test_text(refusal, tmp_path, entry, field, content, says):
    text = tmp_path / "novel.txt"
    if content is not None:
        text.write_bytes(content)
    assert says.format(text=text) in refusal(entry, **{field: text})


@both
def test_text_that_is_streamed(refusal, tmp_path, entry):
    text = tmp_path / "novels"
    text.mkdir()
    (text / "00.txt").write_text("one short line")
    line = refusal(entry, train_text=text, streaming=True)
    assert "less text than one block of 32 tokens" in line
    for number in range(99):  # more files than are read for the first block
        (text / f"{number:02}.txt").write_text("plain for many blocks, " * 9)
    (text / "99.txt").write_bytes(b"plain until here \xe9")
    line = refusal(entry, train_text=text, streaming=True)
    assert f"{text / '99.txt'} is not UTF-8: byte 0xe9 at offset 17" in line


def test_a_stream_has_no_epochs(refusal):
    assert "streaming text has no known length" in refusal("run_mdlm", streaming=True, max_steps=-1)


@both
def test_of_a_folder_the_bad_file_is_named(refusal, tmp_path, entry):
    folder = tmp_path / "novels"
    folder.mkdir()
    assert f"text '{folder}': no text file in this folder" in refusal(entry, train_text=folder)
    (folder / "a.txt").write_text("a good one. " * 20)
    (folder / "b.txt").write_bytes(b"cut off in the middle of a character: \xc3")
    assert f"{folder / 'b.txt'} is not UTF-8: byte 0xc3 at offset 38" in refusal(entry, train_text=folder)


@both
def test_a_dataset_that_cannot_be_had(refusal, entry):
    assert "text 'acme/nowhere' " in refusal(entry, train_text="acme/nowhere")


@both
@pytest.mark.usefixtures("hub_dataset")
def test_an_unknown_column_or_split_of_a_dataset(refusal, entry):
    line = refusal(entry, train_text="acme/novels", text_column="txet")
    assert "'acme/novels' has no column 'txet' for text_column; it has ['n', 'text', 'title']" in line
    assert "nowhere" in refusal(entry, train_text="acme/novels", train_split="nowhere")


@both
def test_a_block_that_holds_nothing(refusal, entry):
    assert "block_length is 2" in refusal(entry, block_length=2)


def test_a_block_longer_than_the_teachers_context(refusal):
    line = refusal("run_mcd", block_length=2 * BLOCK)
    assert f"block_length is {2 * BLOCK}, but the teacher's context is {BLOCK} tokens" in line


def test_a_block_longer_than_the_context_of_a_model_to_go_on_from(refusal, inputs):
    line = refusal("run_mdlm", model=inputs / "teacher", block_length=2 * BLOCK)
    assert f"block_length is {2 * BLOCK}, but the model's context is {BLOCK} tokens" in line


def test_the_training_of_a_judge_refuses_as_the_others_do(inputs, output):
    words = [f"--output_dir={output}", f"--train_text={inputs / 'nowhere.txt'}", "--block_length=32"]
    for tokenizer, says in (
        ("nowhere", "tokenizer 'nowhere' is not a local file or folder"),
        (inputs / "tokenizer", "nowhere.txt"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_judge.main([*words, f"--tokenizer={tokenizer}"])
        assert says in stop.value.code and "\n" not in stop.value.code and not output.exists()


# --- Tokenizer and networks


@both
def test_a_tokenizer_without_a_mask_token(refusal, tmp_path, entry):
    tokenizer = character_tokenizer(BLOCK)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    line = refusal(entry, tokenizer=tmp_path / "tokenizer")
    assert "the tokenizer has no mask token: set add_mask_token to true, or give another tokenizer" in line


@pytest.mark.parametrize("entry, network", [("run_mcd", {}), ("run_mdlm", {"model": "teacher"})])
def test_a_tokenizer_that_does_not_fit_the_model(refusal, inputs, tmp_path, entry, network):
    network = {key: inputs / name for key, name in network.items()}
    tokenizer = character_tokenizer(BLOCK)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    line = refusal(entry, tokenizer=tmp_path / "tokenizer", **network)
    assert "the tokenizer has 49 tokens, more than the model's vocab_size 48" in line
    save_teacher(tmp_path / "larger", vocab_size=50)
    line = refusal(entry, **{"teacher" if entry == "run_mcd" else "model": tmp_path / "larger"})
    assert "the tokenizer's mask token has the id 47, but the model's mask_token_id is 49" in line


@pytest.mark.parametrize("entry, network", [("run_mcd", {}), ("run_mdlm", {"model": "teacher"})])
def test_a_tokenizer_of_the_same_size_with_other_letters(refusal, inputs, tmp_path, entry, network):
    reverse_letters(shutil.copytree(inputs / "tokenizer", tmp_path / "tokenizer"))
    network = {key: inputs / name for key, name in network.items()}
    line = refusal(entry, tokenizer=tmp_path / "tokenizer", **network)
    assert "reads the id 0 as '-', and the one saved with" in line and "as ' ': a model needs the tokenizer" in line


@pytest.mark.parametrize("field", ["teacher", "student", "model"])
def test_weights_that_are_not_finite(refusal, inputs, tmp_path, field):
    network = MDLMForMaskedDiffusion.from_pretrained(inputs / "teacher")
    network.lm_head.weight.data[3, 3] = float("nan")
    network.save_pretrained(tmp_path / "network")
    line = refusal("run_mdlm" if field == "model" else "run_mcd", **{field: tmp_path / "network"})
    assert f"model '{tmp_path / 'network'}' cannot be loaded: lm_head.weight holds NaN or infinite numbers" in line


def test_a_broken_tokenizer_file(refusal, inputs, tmp_path):
    shutil.copytree(inputs / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"version": 3}')
    assert f"tokenizer '{tmp_path / 'tokenizer'}' cannot be loaded: " in refusal(
        "run_mcd", tokenizer=tmp_path / "tokenizer"
    )


def test_a_teacher_and_a_student_of_different_vocabularies(refusal, tmp_path):
    save_teacher(tmp_path / "student", vocab_size=64)
    line = refusal("run_mcd", student=tmp_path / "student")
    assert "teacher and student differ in vocab_size: 48 and 64" in line


def test_a_student_of_another_shape_than_the_teacher(refusal, inputs, tmp_path):
    student = MDLMForMaskedDiffusion.from_pretrained(inputs / "teacher").config
    student.num_hidden_layers, student.num_attention_heads = 1, 2
    MDLMForMaskedDiffusion(student).save_pretrained(tmp_path / "student")
    line = refusal("run_mcd", student=tmp_path / "student")
    assert "teacher and student differ in num_hidden_layers (2 and 1), num_attention_heads (4 and 2)" in line


def test_a_kind_of_noise_that_is_not_that_of_the_model(refusal, inputs):
    line = refusal("run_mdlm", model=inputs / "teacher", diffusion_kind="uniform")
    assert "its config.json says 'absorbing' diffusion, not 'uniform'" in line


@pytest.mark.parametrize("entry, field", [(e, "tokenizer") for e in ENTRIES] + [("run_mdlm", "model")])
@pytest.mark.parametrize("place", ["no such folder", "a folder without it", "not a name of the Hub either"])
def test_a_tokenizer_or_model_that_is_not_there(refusal, tmp_path, entry, field, place):
    assert_named_when_absent(refusal, tmp_path, entry, field, place)


@pytest.mark.parametrize("field", ["teacher", "student"])
@pytest.mark.parametrize("place", ["no such folder", "a folder without it", "not a name of the Hub either"])
def test_a_teacher_or_student_that_is_not_there(refusal, tmp_path, field, place):
    assert_named_when_absent(refusal, tmp_path, "run_mcd", field, place)


@pytest.mark.parametrize("place", ["no such folder", "a folder without it", "not a name of the Hub either"])
def test_a_judge_that_is_not_there(refusal, tmp_path, place):
    assert_named_when_absent(refusal, tmp_path, "run_mcd", "judge", place)


@pytest.mark.parametrize(
    "change, says",
    [
        ("no tokenizer", "the tokenizer's files are missing"),
        ("a smaller vocabulary", "its tokenizer has 48 tokens, more than its vocabulary of 40"),
        ("NaN", "holds a number that is not finite"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_anything(refusal, inputs, tmp_path, change, says):
    judge = save_judge(tmp_path / "judge")
    network = AutoModelForCausalLM.from_pretrained(judge)
    if change == "no tokenizer":
        for file in judge.glob("token*"):
            file.unlink()
    elif change == "a smaller vocabulary":
        network.resize_token_embeddings(40)
        network.save_pretrained(judge)
    else:
        network.transformer.ln_f.bias.data[3] = float("nan")
        network.save_pretrained(judge)
    assert says in refusal("run_mcd", judge=judge, validation_text=inputs / "text.txt")


def assert_named_when_absent(refusal, tmp_path, entry, field, place):
    (tmp_path / "empty").mkdir()
    path = {"no such folder": tmp_path / "nowhere", "a folder without it": tmp_path / "empty"}.get(
        place, "acme/nothing"
    )
    line = refusal(entry, **{field: path})
    kind = "model" if field in ("teacher", "student") else field
    assert f"{kind} '{path}'" in line


# --- Numbers. They are refused before anything is loaded, or the teacher, which does not exist, would be the complaint.


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"delta": 0.125, "num_rounds": 4}, "delta (0.125) grows to 1 in 4 rounds, but t - s must stay below 1"),
        ({"delta": 1.0, "num_rounds": 1}, "delta (1.0) grows to 1 in 1 rounds"),
        ({"delta": 0.3, "num_rounds": 3, "delta_growth": 3}, "delta (0.3) grows to 2.7 in 3 rounds"),
        ({"delta": 0}, "delta (0.0) and delta_growth (2.0) must be positive"),
        ({"num_rounds": 0}, "num_rounds must be at least 1, not 0"),
        ({"steps_per_round": 0}, "steps_per_round must be at least 1, not 0"),
        ({"evaluation_steps": 0}, "evaluation_steps must be one or more numbers of at least 1, not [0]"),
        ({"evaluation_steps": -4}, "evaluation_steps must be one or more numbers of at least 1, not [-4]"),
        ({"tau": 0}, "tau must be one or more positive temperatures, not [0.0]"),
        ({"ema_decay": 1}, "ema_decay must lie in [0, 1) or be null, not 1.0"),
        ({"delta": "nan"}, "delta (nan) and delta_growth (2.0) must be positive"),
        ({"delta_growth": "nan"}, "delta (0.125) and delta_growth (nan) must be positive"),
        ({"tau": "nan"}, "tau must be one or more positive temperatures, not [nan]"),
        ({"learning_rate": "nan"}, "learning_rate must be positive and finite, not nan"),
        ({"learning_rate": -1}, "learning_rate must be positive and finite, not -1.0"),
        ({"adam_beta1": 2}, "adam_beta1 must lie in [0, 1), not 2.0"),
        ({"weight_decay": "inf"}, "weight_decay must be at least 0 and finite, not inf"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, not 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0 and finite, not -1"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 to count epochs, not 0"),
        ({"max_steps": 13}, "max_steps (13) goes beyond the last round, which ends at num_rounds * steps_per_round"),
        ({"seed": -1}, "seed must lie in [0, 2^32), not -1"),
        ({"validation_text": "/nowhere", "max_validation_blocks": 0}, "max_validation_blocks must be at least 1"),
        ({"save_steps": 3, "logging_steps": 2}, "save_steps (3) must be a multiple of logging_steps (2)"),
        ({"learning_rate": "fast"}, "learning-rate: invalid float value: 'fast'"),
        ({"divergence": "jeffreys"}, "argument --divergence: invalid choice: 'jeffreys'"),
        (
            {"stepz_per_round": 4},
            "unknown key 'stepz_per_round' in the command line; the nearest valid key is 'steps_",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(f"{key}={word}" for key, word in value.items()),
)
def test_numbers_and_keys(refusal, changes, says):
    assert says in refusal("run_mcd", **{"teacher": "/nowhere", "tokenizer": "/nowhere", **changes})


@pytest.mark.parametrize(
    "entry, changes, says",
    [
        ("run_mdlm", {"num_hidden_layers": -1}, "num_hidden_layers must be at least 1, not -1"),
        ("run_mdlm", {"num_attention_heads": 0}, "num_attention_heads must be at least 1, not 0"),
        ("run_mdlm", {"hidden_size": 0}, "hidden_size must be at least 1, not 0"),
        ("run_mdlm", {"conditioning_size": -1}, "conditioning_size must be at least 1, not -1"),
        ("run_mdlm", {"hidden_dropout": "nan"}, "hidden_dropout must lie in [0, 1), not nan"),
        ("run_mdlm", {"noise_schedule": "sigmoid"}, "noise-schedule: invalid choice: 'sigmoid'"),
        ("run_mdlm", {"sampling_epsilon": 0}, "sampling_epsilon must lie in (0, 1), not 0.0"),
        ("run_judge", {"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ("run_judge", {"num_heads": 3}, "hidden_size (16) must be a multiple of num_heads (3)"),
        ("run_judge", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, not 0"),
    ],
)
def test_shapes(refusal, entry, changes, says):
    assert says in refusal(entry, tokenizer="/nowhere", **changes)


def test_one_bad_number_of_steps_among_good_ones(refusal):
    assert "not [8, 0]" in refusal("run_mcd", "--evaluation_steps", "8", "0", teacher="/nowhere")


def test_the_widest_delta_that_is_allowed_is(refusal):
    """Just below the bound, the error is about the missing tokenizer instead."""
    assert "tokenizer" in refusal("run_mcd", delta=0.1249, num_rounds=4, tokenizer="/nowhere")


@both
@pytest.mark.parametrize(
    "recipe, says",
    [
        (
            "learning_rat: 1",
            "unknown key 'learning_rat' in recipe '{recipe}'; the nearest valid key is 'learning_rate'",
        ),
        ("learning_rate: quick", "learning-rate: invalid float value: 'quick'"),
        ("max_steps: 2.5", "max-steps: invalid int value: '2.5'"),
        ("max_steps: [1, 2]", "'max_steps' in recipe '{recipe}' takes one value, not 2"),
        ("- max_steps", "recipe '{recipe}' must be a mapping of keys to values, not a list"),
    ],
)
def test_recipes(inputs, output, tmp_path, capsys, entry, recipe, says):
    main, arguments_of = ENTRIES[entry]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(SystemExit) as stop:
        main([str(path), *arguments_of(inputs, output), "--tokenizer=/nowhere"])
    assert stop.value.code == 2 and not output.exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says.format(recipe=path) in lines[0]


# --- What a run needs together. The folder is not claimed yet: the right command may have it.


def judge_of_other_ids(folder: Path) -> Path:
    reverse_letters(save_judge(folder))
    return folder


@pytest.mark.parametrize(
    "entry, changes, says",
    [
        *[
            (
                entry,
                {"per_device_train_batch_size": 20, "gradient_accumulation_steps": 4},
                "per_device_train_batch_size is 20, a global batch of 80 (processes: 1, accumulated: 4), but the training "
                "text has only 66 blocks",
            )
            for entry in ENTRIES
        ],
        ("run_mcd", {"per_device_train_batch_size": 99, "streaming": True}, "the training text has only 66 blocks"),
        ("run_mcd", {"eval_strategy": "steps"}, "eval_strategy"),
        ("run_mdlm", {"optim_args": "foo"}, "optim_args foo"),
        ("run_mcd", {"teacher_ema_decay": 0.9}, "teacher_ema_decay (0.9) is for teacher_update 'ema', not for 'snapshot'"),
        ("run_mcd", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": '{"foo": 1}'}, "lr_scheduler_kwargs {'foo': 1}"),
        ("run_mcd", {"judge": judge_of_other_ids, "convention": "raw_ids"}, "raw_ids needs a judge with the model's own"),
    ],
)  # fmt: skip
def test_a_refusal_leaves_the_folder_to_the_right_command(refusal, inputs, output, tmp_path, entry, changes, says):
    if "judge" in changes:
        changes = {**changes, "judge": changes["judge"](tmp_path / "judge"), "validation_text": inputs / "text.txt"}
    assert says in refusal(entry, **changes)
    main, arguments_of = ENTRIES[entry]
    main([*arguments_of(inputs, output), "--disable_tqdm=true", "--max_steps=2"])
    assert (output / "model.safetensors").is_file()


# --- Where a run reports to


@both
def test_a_tracker_that_is_unknown_or_not_installed(refusal, monkeypatch, entry):
    assert "tensorbord is not supported, only " in refusal(entry, report_to="tensorbord", tokenizer="/nowhere")
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    line = refusal(entry, report_to="tensorboard", tokenizer="/nowhere")
    assert "report_to ['tensorboard']: TensorBoardCallback requires tensorboard" in line


@both
@pytest.mark.parametrize("name", [{"hub_model_id": "tiny"}, {}])
def test_a_repository_without_a_namespace_when_the_hub_cannot_be_asked(refusal, entry, output, name):
    line = refusal(entry, push_to_hub=True, hub_token="hf_secret", tokenizer="/nowhere", **name)
    name = name.get("hub_model_id", output.name)
    assert f"hub_model_id '{name}' has no namespace" in line and f"as in 'you/{name}'" in line
    assert "hf_secret" not in line


# --- Output folders and checkpoints


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """The output folder of another run."""
    folder = tmp_path_factory.mktemp("another") / "run"
    run_mcd.main(mcd_arguments(inputs, folder, num_rounds=1))
    return folder


@every
def test_an_output_folder_with_another_run(refusal, finished, output, entry):
    shutil.copytree(finished, output)
    line = refusal(entry, **({"learning_rate": 2e-2, "num_rounds": 1} if entry == "run_mcd" else {}))
    assert f"output_dir '{output}' holds another run: " in line and "choose another output_dir" in line
    if entry == "run_mcd":
        assert "learning_rate was 0.01 there and is 0.02 here" in line


@every
def test_an_output_folder_with_foreign_files(refusal, output, entry):
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    assert f"output_dir '{output}' is not empty and holds no run of ours" in refusal(entry)


@every
def test_an_output_folder_that_cannot_be_made(refusal, tmp_path, entry):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "run"):
        assert f"output_dir '{folder}': '{file}' is a file" in refusal(entry, output_dir=folder)
    if Path("/sys").is_dir():  # where nobody may make a folder
        assert refusal(entry, output_dir="/sys/run").startswith("error: /sys/run: ")


def test_a_folder_in_which_a_run_was_killed_at_its_first_write(inputs, output):
    output.mkdir()
    (output / ".run.json.0123abcd.tmp").write_text('{"adam_be')
    run_mdlm.main([*mdlm_arguments(inputs, output), "--disable_tqdm=true"])
    assert (output / "model.safetensors").is_file() and not list(output.glob(".run.json*"))


UNREADABLE = pytest.mark.parametrize(
    ("content", "fault"),
    [(b"{", "is not valid JSON"), (b"[]", "must hold an object, not a list"), (b"\xff", "is not valid JSON")],
    ids=["cut off", "a list", "not UTF-8"],
)


@every
@UNREADABLE
def test_an_output_folder_whose_run_cannot_be_read(refusal, output, entry, content, fault):
    output.mkdir()
    (output / "run.json").write_bytes(content)
    line = refusal(entry)
    assert f"output_dir '{output}' holds another run" in line and f"run.json {fault}" in line
    assert "choose another output_dir, or remove that folder" in line


@UNREADABLE
@pytest.mark.parametrize("file", ["manifest.json", "trainer_state.json"])
def test_a_checkpoint_whose_manifest_cannot_be_read(refusal, finished, output, file, content, fault):
    shutil.copytree(finished, output)
    (output / "checkpoint-4" / file).write_bytes(content)
    line = refusal("run_mcd", num_rounds=1, resume_from_checkpoint=output / "checkpoint-4")
    assert f"cannot resume from {output / 'checkpoint-4'}: {file} {fault}" in line
    assert last_complete_checkpoint(output).name == "checkpoint-2"


def test_the_training_of_a_judge_stores_no_token(inputs, output):
    run_judge.main([*judge_arguments(inputs, output), "--hub_token=hf_secret"])
    assert {"model.safetensors", "run.json"} <= contents(output).keys()
    assert not [name for name, content in contents(output).items() if b"hf_secret" in content]


def test_a_checkpoint_of_another_run(refusal, finished):
    line = refusal("run_mcd", num_rounds=1, seed=6, resume_from_checkpoint=finished / "checkpoint-4")
    assert f"cannot resume from {finished / 'checkpoint-4'}: " in line
    assert "seed was 5 there and is 6 here (only learning_rate and" in line


def test_a_checkpoint_that_is_not_there(refusal, tmp_path):
    line = refusal("run_mcd", resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert f"cannot resume from {tmp_path / 'checkpoint-4'}: " in line


@pytest.mark.parametrize("moment", ["before it is written", "while it is written"])
def test_no_room_for_a_dataset(refusal, tmp_path, monkeypatch, moment):
    """`datasets` reports a full disk in two ways: without an errno before it starts, and inside an error of its own later."""

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Dataset.from_dict({"text": ["hello world"]}).to_parquet(tmp_path / "novels.parquet")
    options = {"data_files": {"train": str(tmp_path / "novels.parquet")}, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split, **__: load_dataset("parquet", **options))
    if moment == "before it is written":
        monkeypatch.setattr("datasets.builder.has_sufficient_disk_space", lambda *_, **__: False)
    else:
        monkeypatch.setattr("datasets.arrow_writer.ArrowWriter._build_writer", full)
    line = refusal("run_mcd", train_text="acme/novels")
    says = "Not enough disk space. Needed: " if moment == "before it is written" else "No space left on device"
    assert line.startswith("error: no space left on the disk while writing ") and says in line


# --- A disk that is really full: a small tmpfs, in a mount namespace that ends with the process

FULL_DISKS = """
import json, os, shutil, subprocess, sys
from tests.small_disk import NO_NAMESPACE, enter_namespace, mount_tmpfs, unmount
from trainers.run_mcd import main
disk, copies, words, sizes, resumed = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
try:
    enter_namespace(disk)
except (OSError, AttributeError, subprocess.CalledProcessError):
    sys.exit(NO_NAMESPACE)
report = {}
for size in sizes:
    # The run's last save is that of the student, over 200 kB; the card and the table come after it, and are smaller.
    mount_tmpfs(disk, "size=" + (str(needed - 100_000) if size == "almost enough" else size))
    with open(f"{disk}/ballast", "wb") as file:
        file.write(bytes(4096))
    try:
        main(words)
        report[size] = "no complaint"
    except SystemExit as stop:
        report[size] = stop.code
    except Exception as error:
        report[size] = f"a traceback: {error!r}"
    shutil.copytree(disk, f"{copies}/{size}/full")
    if size in resumed:
        mount_tmpfs(disk, "remount,size=64m")
        main(words)
        needed = shutil.disk_usage(disk).used
        shutil.copytree(disk, f"{copies}/{size}/freed")
    unmount(disk)
json.dump(report, open(f"{copies}/report.json", "w"))
"""
SIZES = ["4k", "20k", "600k", "1200k", "1600k", "almost enough"]  # of the first nothing is left for the run
RESUMED = ["20k", "1200k", "almost enough"]  # before, in and after the first checkpoint


@pytest.fixture(scope="module")
def full_disks(inputs, tmp_path_factory):
    """The same run on disks that are too small, and again once there is room: what it printed, and what was on the disk."""
    home = tmp_path_factory.mktemp("disks")
    (home / "disk").mkdir()
    words = mcd_arguments(inputs, home / "disk" / "run", num_rounds=2, save_total_limit=9)
    arguments = [str(home / "disk"), str(home), *map(json.dumps, (words, SIZES, RESUMED))]
    result = run_python(FULL_DISKS, *arguments)
    if result.returncode == NO_NAMESPACE:
        pytest.skip("a small disk cannot be mounted here: this needs the right to a mount namespace")
    assert result.returncode == 0, result.stderr
    return home, json.loads((home / "report.json").read_text())


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_written_model(full_disks, size):
    home, report = full_disks
    assert report[size].startswith("error: no space left on the disk while writing ")
    assert "free some and start again" in report[size] and len(report[size].splitlines()) == 1
    assert str(ROOT) not in report[size], "it is not one of the package's own files that could not be written"
    run = home / size / "full" / "run"
    for weights in run.rglob("*.safetensors"):
        load_file(weights)  # a cut file does not load
    for checkpoint in run.glob("checkpoint-*"):
        assert (checkpoint / "manifest.json").is_file(), f"{checkpoint.name} was not written to the end"
    assert not [path.name for path in run.rglob("*") if ".tmp" in path.name]


def test_earlier_checkpoints_on_a_full_disk_are_intact(full_disks):
    """The disks fill up at different moments of the run, which is checked here too."""
    home, _ = full_disks
    last = [last_complete_checkpoint(home / size / "full" / "run") for size in SIZES]
    assert last[0] is None and last[-1].name == "checkpoint-8" and len(set(last)) >= 3


def test_with_room_again_the_run_ends_as_on_a_large_disk(full_disks, inputs, tmp_path):
    home, _ = full_disks
    run_mcd.main(mcd_arguments(inputs, tmp_path / "run", num_rounds=2))
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    for size in RESUMED:
        assert (home / size / "freed" / "run" / "model.safetensors").read_bytes() == expected, size
