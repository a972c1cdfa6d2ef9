"""The end of a round: a checkpoint first, then the judging, whatever becomes of it; trackers; several processes."""

import contextlib
import io
import json
import math
import resource
import signal

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import mcd_arguments, run_python, save_judge, start_python, write_inputs

from evaluation import load_report, results
from trainers import MCDTrainingArguments, run_judge, run_mcd, run_mdlm
from trainers.runs.hub import CardArguments
from trainers.runs.rounds import TrainingReport, write_round_card


RUN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"
SETTINGS = {"num_rounds": 2, "evaluation_samples": 3, "evaluation_batch_size": 2, "save_total_limit": 10}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    save_judge(folder / "judge")
    return folder


def arguments_for(inputs, output, **changes) -> list[str]:
    changes = {"judge": inputs / "judge", "validation_text": inputs / "text.txt"} | SETTINGS | changes
    return [*mcd_arguments(inputs, output, **changes), "--evaluation_steps", "2", "4"]


def run(inputs, output, **changes) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_mcd.main(arguments_for(inputs, output, **changes))
    return out.getvalue()


def points(folder) -> dict:
    return {(row["model"], row["steps"]): row for row in load_report(folder)["results"]}


ALL = {("held-out text", None), *((name, n) for name in ("teacher", "round-1", "round-2") for n in (2, 4))}


@pytest.mark.slow
def test_trackers_hear_of_every_round(inputs, tmp_path):
    """TensorBoard's files hold figures and a sample of the teacher at step 0 and of each round at its last step."""
    output = tmp_path / "run"
    run(inputs, output, report_to="tensorboard", steps_per_round=2, evaluation_bound=3)
    events = EventAccumulator(str(next(output.glob("runs/*")))).Reload()
    rows = points(output)
    for name in ("gen_ppl", "entropy", "rep_4", "bound"):
        for n in (2, 4):
            logged = [(event.step, event.value) for event in events.Scalars(f"eval/{name}_{n}_steps")]
            expected = [rows[model, n][name] for model in ("teacher", "round-1", "round-2")]
            assert logged == [(step, pytest.approx(value)) for step, value in zip((0, 2, 4), expected, strict=True)]
    texts = events.Tensors("eval/sample/text_summary")
    assert [event.step for event in texts] == [0, 2, 4]
    assert texts[1].tensor_proto.string_val[0].decode() == rows["round-1", 4]["example"]
    tables, plots = events.Tensors("eval/table/text_summary"), events.Images("eval/plot")
    assert [event.step for event in tables] == [event.step for event in plots] == [0, 2, 4]
    assert tables[2].tensor_proto.string_val[0].decode() == (output / "eval.md").read_text()
    assert "round-2" not in tables[1].tensor_proto.string_val[0].decode() and plots[2].width > 500


@pytest.mark.slow
def test_the_folder_of_a_round_is_a_repository_with_its_card(inputs, tmp_path):
    """Its figures are those of its own rows, its plot is there, and a resumed run leaves it as it is."""
    output = tmp_path / "run"
    run(inputs, output, steps_per_round=2)
    rows = points(output)
    for name, other in (("round-1", "round-2"), ("round-2", "round-3")):
        card = ModelCard.load(output / name / "README.md")
        figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
        assert figures["Gen-PPL, 4 steps, temperature 1, ancestral"] == round(rows[name, 4]["gen_ppl"], 4)
        assert "](eval.png)" in card.text and (output / name / "eval.png").stat().st_size > 1000
        assert f"](writing.gif)\n\n{name}, 4 steps" in card.text
        assert other not in card.text and 'from_pretrained(".", trust' in card.text
        assert {row["model"] for row in load_report(output / name)["results"]} > {name} and "revision" not in card.text
    pictures = [(folder / "writing.gif").read_bytes() for folder in (output / "round-1", output / "round-2", output)]
    assert pictures[0] != pictures[1] == pictures[2]
    before = {path: path.stat().st_mtime_ns for path in output.glob("round-*/*")}
    run(inputs, output, steps_per_round=2)
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("round-*/*")}


def test_a_round_that_is_pushed_is_loaded_by_its_branch(inputs, tmp_path):
    """And without a judge there is a card too."""
    folder = tmp_path / "run" / "round-2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    training = MCDTrainingArguments(output_dir=str(folder.parent), hub_strategy="every_save", hub_model_id="user/tiny")
    write_round_card(folder, training)
    card = (folder / "README.md").read_text()
    assert card.count('from_pretrained("user/tiny", revision="round-2", trust_remote_code=True)') == 2
    assert "# tiny, round-2" in card and "No results yet." in card
    (folder / "README.md").write_text("my own words")
    write_round_card(folder, training)
    assert (folder / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("entry", ["run_mcd", "run_mdlm", "run_judge"])
def test_every_run_writes_a_card_with_what_it_printed_and_no_local_path(inputs, tmp_path, entry, capsys):
    output = tmp_path / "run"
    if entry == "run_mcd":
        words = arguments_for(inputs, output, steps_per_round=1)
    else:
        settings = {"tokenizer": inputs / "tokenizer", "train_text": inputs / "text.txt", "output_dir": output}
        settings |= {"validation_text": inputs / "text.txt", "block_length": 32, "hidden_size": 16, "max_steps": 1}
        settings |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "report_to": "none"}
        heads = {"num_heads": 2, "num_layers": 1}
        if entry == "run_mdlm":
            heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "logging_steps": 1, "save_steps": 1}
        words = [f"--{name}={value}" for name, value in (settings | heads).items()]
    {"run_mcd": run_mcd, "run_mdlm": run_mdlm, "run_judge": run_judge}[entry].main(words)
    card, printed = (output / "README.md").read_text(), capsys.readouterr().out
    if entry == "run_mcd":
        assert (output / "eval.md").read_text().strip() in printed and (output / "eval.md").read_text().strip() in card
    else:
        (line,) = [line for line in printed.splitlines() if line.endswith(" nats per token")]
        assert f"{line}." in card and line in (output / "eval.md").read_text()
    assert ("AutoModelForCausalLM" in card) == (entry == "run_judge")
    for text in (card, (output / "eval.json").read_text()):
        assert not any(part in text for part in (str(tmp_path), str(inputs), inputs.parent.name))


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"save_steps": 3, "logging_steps": 3, "steps_per_round": 4}, {"3", "4", "6", "8"}),
        ({"save_strategy": "no", "steps_per_round": 2}, set()),
    ],
)
def test_a_round_ends_with_a_checkpoint_unless_there_are_none(inputs, tmp_path, changes, checkpoints):
    run(inputs, tmp_path / "run", **changes)
    assert {folder.name.split("-")[1] for folder in (tmp_path / "run").glob("checkpoint-*")} == checkpoints
    assert points(tmp_path / "run").keys() == ALL
    if "4" in checkpoints:
        state = json.loads((tmp_path / "run" / "checkpoint-8" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [3, 4, 6]


def test_trouble_of_the_judging_does_not_end_a_training(inputs, tmp_path):
    """With a judge whose perplexity overflows, the rows say why the figure is missing, the JSON is valid, and the
    student is saved.
    """
    judge = save_judge(tmp_path / "judge")
    weights = load_file(judge / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1e6
    save_file(weights, judge / "model.safetensors", metadata={"format": "pt"})
    printed = run(inputs, tmp_path / "run", judge=judge, steps_per_round=2)
    rows = points(tmp_path / "run")
    assert rows.keys() == ALL
    for row in rows.values():
        assert row["gen_ppl"] is None and row["note"] == "gen_ppl is inf" and math.isfinite(row["entropy"])
    for file in (tmp_path / "run").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert "n/a: could not be measured (" in printed
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_teacher_is_judged_by_the_published_sampler_too(inputs, tmp_path):
    """So that what a table credits to a round is not the sampler's. All rows have the bound that was asked for."""
    changes = {"num_rounds": 1, "steps_per_round": 2, "evaluation_lockings": "spread", "evaluation_bound": 3}
    printed = run(inputs, tmp_path / "run", **changes)
    rows = [row for row in load_report(tmp_path / "run")["results"] if row["steps"] is not None]
    lockings = {(row["model"], row["locking"]) for row in rows}
    assert lockings == {("teacher", "independent"), ("teacher", "spread"), ("round-1", "spread")} and len(rows) == 6
    assert all(row["bound"] > 0 and row["bound_blocks"] == 3 for row in rows) and "spread" in printed


@pytest.mark.parametrize(("until", "saved"), [("round-2", {"round-1", "round-2"}), (None, set())])
def test_a_report_that_cannot_be_written_ends_no_training(inputs, tmp_path, monkeypatch, until, saved):
    """No file may grow (as on a full disk) while round 1 is reported, or from there to the end. Its rows are not lost."""
    said, save_results, limits = [], results.save_results, resource.getrlimit(resource.RLIMIT_FSIZE)
    full = []

    def saved_on_a_full_disk(folder, rows=(), **about):
        names = [row["model"] for row in rows]
        full.extend(["full"] * ("round-1" in names and not full))
        if until in names:
            full[:] = ["no longer full"]
        if full != ["full"]:
            return save_results(folder, rows, **about)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            return save_results(folder, rows, **about)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("evaluation.report.save_results", saved_on_a_full_disk)
    monkeypatch.setattr("trainers.runs.rounds.logger.warning", said.append)
    output = tmp_path / "run"
    printed = run(inputs, output, steps_per_round=2)
    assert {name for name, _ in points(output)} == {"held-out text", "teacher"} | saved
    assert said and all("training goes on" in line and "File too large" in line for line in said)
    assert (output / "model.safetensors").exists() and "Saved in" in printed and "\nround-2, " in printed
    assert not list(output.glob(".*.tmp"))


def test_a_report_that_cannot_be_read_ends_no_training(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("trainers.runs.rounds.logger.warning", said.append)
    (tmp_path / "eval.json").write_text("{")
    report = TrainingReport(tmp_path, None, [2])
    assert report.known_rows() == [] and report.write() == "" and (tmp_path / "eval.json").read_text() == "{"
    assert said and all("eval.json is not a report of this library" in line for line in said)


KILL_WHILE_JUDGING = """
import os, signal
from evaluation import report
judge = report.evaluate_model
def killed_at_the_second_row(name, *a, **k):
    for number, row in enumerate(judge(name, *a, **k)):
        if name == "round-1" and number == 1: os.kill(os.getpid(), signal.SIGKILL)
        yield row
report.evaluate_model = killed_at_the_second_row
"""


@pytest.mark.slow
def test_a_killed_judging_is_completed_and_nothing_else_changes(inputs, tmp_path):
    run(inputs, tmp_path / "whole")
    output = tmp_path / "run"
    killed = run_python(KILL_WHILE_JUDGING + RUN, *arguments_for(inputs, output))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / "checkpoint-4" / "trainer_state.json").exists(), "the checkpoint of that step is safe"
    assert ("round-1", 2) in points(output) and ("round-1", 4) not in points(output)
    run(inputs, output)
    assert points(output) == points(tmp_path / "whole")
    for name in ("model.safetensors", "round-1/model.safetensors", "checkpoint-8/ema/model.safetensors"):
        one, other = load_file(output / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(one[key], other[key]) for key in one), name
    histories = [
        json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        for folder in (output, tmp_path / "whole")
    ]
    measured = [[{k: v for k, v in line.items() if "runtime" not in k} for line in history] for history in histories]
    assert measured[0] == measured[1] and any("eval_gen_ppl_4_steps" in line for line in measured[0])


TWO_RANKS = """
import sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
rank, size, home = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if size > 1:
    dist.init_process_group("gloo", f"file://{home}/rendezvous", timeout=timedelta(seconds=2), rank=rank, world_size=size)
from evaluation import RunReport, load_judge
from evaluation.options import EvaluationArguments
from evaluation.team import ALONE, Ranks
from modeling_mcd.command_line import wait_for_gloo_threads
from modeling_mcd.loading import load_model
judge, tokenizer = load_judge(f"{home}/judge")
protocol = EvaluationArguments(evaluation_samples=5, evaluation_seeds=2, evaluation_batch_size=2).protocol(judge, tokenizer)
report = RunReport(f"{home}/report-{size}", protocol, [2, 3], (1.0, 0.5), Ranks() if size > 1 else ALONE)
blocks = torch.arange(5 * 32).view(5, 32) % 40
report.judge_text(blocks, tokenizer)
model = load_model(f"{home}/teacher")
if size > 1 and rank == 0:
    generate, calls = model.generate, []
    def slow(*a, **k):
        calls.append(len(calls))
        if len(calls) == 1: time.sleep(5)  # longer than any collective of the default group may take
        return generate(*a, **k)
    model.generate = slow
report.judge("m", model, tokenizer)
if rank == size - 1:
    model.lm_head.bias.data[0] = float("nan")  # trouble of one process is that of all
report.judge("bad", model, tokenizer)
report.write()
wait_for_gloo_threads()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_outlive_any_timeout(inputs, tmp_path):
    """The rows are those of one process, although the first is slower than the group's timeout."""
    for name in ("judge", "teacher"):
        (tmp_path / name).symlink_to(inputs / name)
    result = run_python(TWO_RANKS, "0", "1", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for process in [start_python(TWO_RANKS, str(rank), "2", str(tmp_path)) for rank in (0, 1)]:
        assert process.wait() == 0, process.read("err")
    one, two = (points_by_temperature(tmp_path / f"report-{size}") for size in (1, 2))
    assert one.keys() == two.keys() and len(one) == 9
    for key, row in one.items():
        for name in row.keys() - ({"weights"} if key[0] == "bad" else set()):  # only one process has the bad ones
            expected = pytest.approx(row[name], rel=1e-6) if isinstance(row[name], float) else row[name]
            assert two[key][name] == expected, (key, name)
    assert one["bad", 2, 1.0]["gen_ppl"] is None and one["bad", 2, 1.0]["note"]


def points_by_temperature(folder) -> dict:
    return {(row["model"], row["steps"], row["temperature"]): row for row in load_report(folder)["results"]}


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ({"card_license": "Apache 2.0"}, "card_license is 'Apache 2.0', but the Hub names licences in small letters"),
        ({"card_license": ""}, "card_license is ''"),
        ({"card_language": ["english"]}, "card_language holds 'english': give codes of two or three small letters"),
        ({"card_language": ["en", "DE"]}, "card_language holds 'DE'"),
    ],
)
def test_what_no_card_can_say_is_refused(setting, fault):
    with pytest.raises(ValueError) as error:
        CardArguments(**setting)
    assert fault in str(error.value) and "\n" not in str(error.value)
    assert CardArguments("apache-2.0", ["en", "deu"]).about() == {"license": "apache-2.0", "language": ["en", "deu"]}
