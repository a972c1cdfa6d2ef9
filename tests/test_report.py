"""What is made of the figures: eval.json, matched entropy, the table, the plot, the model card."""

import itertools
import json
import math
import multiprocessing
import os
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from report_rows import held_out, line, row
from tiny_run import run_python, save_judge

from evaluation import load_report, markdown_table, matched_gen_ppl, save_results, write_model_card, write_report
from modeling_mcd.files import write_atomically


def test_interpolation_is_exact_on_a_line():
    sweep = [row(gen_ppl=line(entropy), entropy=entropy) for entropy in (3.1, 4.2, 3.5, 2.9)]
    for entropy in (2.9, 3.3, 3.9, 4.2):
        assert matched_gen_ppl(sweep, entropy) == (pytest.approx(line(entropy)), entropy)


def test_a_sweep_that_does_not_reach_the_entropy_gives_its_nearest_point():
    sweep = [row(gen_ppl=line(entropy), entropy=entropy) for entropy in (3.1, 3.5)]
    assert matched_gen_ppl(sweep, 5.0) == (pytest.approx(line(3.5)), 3.5)
    assert matched_gen_ppl(sweep, 1.0) == (pytest.approx(line(3.1)), 3.1)


def test_a_single_temperature_is_matched_only_within_the_tolerance():
    assert matched_gen_ppl([row(entropy=4.0)], 3.9) is None
    assert matched_gen_ppl([row(entropy=4.0)], 4.005) == (pytest.approx(20.0), 4.0)
    assert matched_gen_ppl([], 4.0) is None


def test_matched_figures_are_of_one_model_steps_and_protocol(tmp_path):
    rows = [row(temperature=t, gen_ppl=line(h), entropy=h) for t, h in ((1.0, 4.0), (0.8, 3.2))]
    strangers = [row("round-1", gen_ppl=1.0, entropy=3.6), row(steps=4, gen_ppl=1.0, entropy=3.6)]
    strangers += [row(temperature=0.9, gen_ppl=1.0, entropy=3.6, samples=8)]
    results = save_results(tmp_path, [held_out(3.6), *rows, *strangers])["results"]
    assert [r["matched_gen_ppl"] for r in results[1:3]] == [pytest.approx(line(3.6))] * 2
    assert [r["matched_entropy"] for r in results[1:3]] == [3.6, 3.6]
    assert results[0]["matched_gen_ppl"] is None


def test_trigrams_are_matched_on_their_own_and_can_turn_the_ranking(tmp_path):
    """Word entropies are equal throughout; the trigrams tell that round-1 is better only where it is less diverse."""
    rows = [held_out(4.0, trigram_entropy=5.0)]
    for model, factor, shift in (("teacher", 1.0, 0.0), ("round-1", 0.8, -1.0)):
        for temperature, trigrams in ((1.0, 5.5), (0.8, 4.5)):
            figures = {"gen_ppl": factor * line(trigrams), "trigram_entropy": trigrams + shift}
            rows.append(row(model, 8, temperature, **figures))
    results = save_results(tmp_path, rows)["results"]
    assert results[1]["trigram_matched_gen_ppl"] == pytest.approx(line(5.0))
    assert (results[3]["trigram_matched_gen_ppl"], results[3]["trigram_matched_entropy"]) == (
        pytest.approx(0.8 * line(5.5)),
        4.5,
    )
    table = markdown_table(results)
    assert f"| teacher, matched in trigrams | {line(5.0):.2f} (5.00) |" in table
    assert f"| round-1, matched in trigrams | ({0.8 * line(5.5):.2f} (4.50)) |" in table


def test_held_out_text_under_another_judge_is_no_target(tmp_path):
    results = save_results(tmp_path, [held_out(4.0, judge="another"), row(entropy=4.0)])["results"]
    assert results[1]["matched_gen_ppl"] is None


def test_eval_json_comes_back_as_it_was_written_and_merges(tmp_path):
    assert load_report(tmp_path) == {"results": []}
    written = save_results(tmp_path, [row(), row(steps=4)], data="novels", label="teacher")
    assert load_report(tmp_path) == written
    merged = save_results(tmp_path, [row(gen_ppl=10.0), row(temperature=0.9)], recipe="seed: 1", data=None)
    points = [(r["steps"], r["temperature"], r["gen_ppl"]) for r in merged["results"]]
    assert points == [(8, 1.0, 10.0), (4, 1.0, 20.0), (8, 0.9, 20.0)]  # replaced in its place, the new one at the end
    assert (merged["data"], merged["label"], merged["recipe"]) == ("novels", "teacher", "seed: 1")


def save_twenty(folder, model):
    for steps in range(1, 21):
        save_results(folder, [row(model, steps)], trainings={f"{model}-{steps}": {}})


def test_two_processes_that_save_at_once_lose_no_row(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_twenty, args=(tmp_path, model)) for model in ("one", "other")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    report = load_report(tmp_path)
    assert {(row["model"], row["steps"]) for row in report["results"]} == {
        (model, steps) for model in ("one", "other") for steps in range(1, 21)
    }
    assert len(report["trainings"]) == 40 and sorted(os.listdir(tmp_path)) == ["eval.json"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    before = save_results(tmp_path, [row()])
    with pytest.raises(ValueError, match="JSON"):
        save_results(tmp_path, [row(steps=4, nfe=math.nan)])
    with pytest.raises(OSError):  # the rename fails: a folder is in the way
        (tmp_path / "taken").mkdir()
        write_atomically(tmp_path / "taken", "text")
    assert load_report(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["eval.json", "taken"]


@pytest.mark.parametrize("content", ["{", "[]", '{"results": 3}', '{"results": [{"model": "x"}]}'])
def test_a_foreign_eval_json_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(ValueError, match="eval.json is not a report of this library"):
        save_results(tmp_path, [row()])
    assert (tmp_path / "eval.json").read_text() == content


def sweep_of_two_models() -> list[dict]:
    rows = [held_out(3.6)]
    for (model, shift), steps, (temperature, entropy) in itertools.product(
        (("teacher", 0.3), ("round-1", 0.0)), (8, 16), ((0.8, 3.3), (1.0, 4.0))
    ):
        rows.append(row(model, steps, temperature, line(entropy) * math.exp(shift), entropy))
    return rows


def test_no_gen_ppl_stands_in_the_table_without_its_entropy(tmp_path):
    table = markdown_table(save_results(tmp_path, sweep_of_two_models())["results"])
    lines = [text for text in table.splitlines() if re.match(r"\| (teacher|round-1)(, matched)? \|", text)][:4]
    assert [text.split(" | ")[0] for text in lines] == [
        "| teacher",
        "| round-1",
        "| teacher, matched",
        "| round-1, matched",
    ]
    for text in lines:
        cells = text.strip("| ").split(" | ")[1:]
        assert len(cells) == 2 and all(re.fullmatch(r"[\d.]+( ± [\d.]+)? \(\d\.\d\d\)", cell) for cell in cells), text
    assert f"{line(3.6):.2f} (3.60)" in lines[3]
    assert f"{line(4.0):.2f} ± 0.50 (4.00)" in lines[1]  # temperature 1, not the sweep's 0.8
    assert "| 8 steps (NFE 8.0) | 16 steps (NFE 16.0) |" in table
    for fact in (
        "64 samples of 256 tokens",
        "3 seeds",
        "judge (2.7M)",
        "ancestral",
        "float64",
        "words",
        "4.26 (3.60)",
    ):
        assert fact in table


def test_an_entropy_that_the_sweep_does_not_reach_stands_in_brackets(tmp_path):
    rows = [held_out(3.0), row(entropy=4.0, gen_ppl=line(4.0)), row(temperature=0.9, entropy=3.5, gen_ppl=line(3.5))]
    table = markdown_table(save_results(tmp_path, rows)["results"])
    assert f"| teacher, matched | ({line(3.5):.2f} (3.50)) |" in table


def test_lockings_stand_in_one_table_under_their_names():
    rows = [row(), row(locking="spread", gen_ppl=15.0), row("round-1", locking="spread", gen_ppl=14.0)]
    table = markdown_table(rows)
    for name, figure in (("teacher / independent", "20"), ("teacher / spread", "15"), ("round-1 / spread", "14")):
        assert f"| {name} | {figure}.00 ± 0.50 (4.00) |" in table
    assert "locking independent or spread." in table and "locking independent." in markdown_table([row()])
    assert "| teacher | 20.00" in markdown_table([row()])


def test_a_sweep_is_matched_under_its_own_locking(tmp_path):
    rows = [held_out(3.6), *(row(temperature=t, gen_ppl=line(h), entropy=h) for t, h in ((1.0, 4.0), (0.8, 3.2)))]
    results = save_results(tmp_path, [*rows, row(locking="spread", gen_ppl=1.0, entropy=3.6, temperature=0.9)])[
        "results"
    ]
    assert [r["matched_gen_ppl"] for r in results[1:]] == [pytest.approx(line(3.6))] * 2 + [1.0]


def test_the_bound_stands_in_table_plot_and_card(tmp_path):
    bound = {"bound": 2.0661, "bound_se": 0.0123, "bound_blocks": 96, "bound_text": "ab"}
    rows = [row(**bound), row(steps=4, locking="spread", **bound | {"bound_se": None}), row("round-1", steps=4)]
    (tmp_path / "config.json").write_text("{}")
    report = save_results(tmp_path, rows, label="teacher")
    table = write_report(tmp_path, report)
    assert "| teacher / independent, bound | - | 2.066 ± 0.012 |" in table
    assert (
        "| teacher / spread, bound | 2.066 | - |" in table and "Bound: nats per token of 96 held-out blocks" in table
    )
    assert "bound" not in markdown_table([row()]).lower()
    plain = save_results(tmp_path / "plain", [row()])
    write_report(tmp_path / "plain", plain)
    width, narrow = (
        int.from_bytes((folder / "eval.png").read_bytes()[16:20]) for folder in (tmp_path, tmp_path / "plain")
    )
    assert width == 1.5 * narrow, "a panel of its own"
    card = ModelCard.load(tmp_path / "README.md")
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures["N-step bound (nats per token), 8 steps, temperature 1, ancestral"] == 2.0661
    assert figures["N-step bound (nats per token), 4 steps, temperature 1, ancestral, locking spread"] == 2.0661
    assert "cannot reward text that is sharper" in card.text


def test_rows_of_different_protocols_stand_in_different_tables():
    table = markdown_table([row(), row(steps=4, samples=512)])
    assert "of 64 samples" in table and "of 512 samples" in table
    assert all("- |" not in text for text in table.splitlines() if text.startswith("| teacher"))


def test_a_table_of_nothing_says_so():
    assert markdown_table([]) == markdown_table([held_out()]) == "No results yet."


def test_the_plot_is_a_png_also_for_one_point_and_two_protocols(tmp_path):
    write_report(tmp_path, save_results(tmp_path, [*sweep_of_two_models(), row(steps=4, samples=8)]))
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "README.md").exists()  # no model lies in this folder


def test_the_card_holds_table_recipe_and_an_index_of_its_model(tmp_path):
    about = {"label": "round-1", "recipe": "delta: 0.002\nseed: 1\n", "data": "Public-domain novels."}
    about |= {"repository": "someone/tiny-mcd"}
    report = save_results(tmp_path, sweep_of_two_models(), **about)
    (tmp_path / "config.json").write_text("{}")
    table = write_report(tmp_path, report, name="tiny-mcd")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "tiny-mcd"
    assert len(card.data.eval_results) == 4  # none of the teacher's
    figures = {(result.metric_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert figures == {
        (kind, f"{title}, {steps} steps, temperature 1, ancestral"): pytest.approx(value, abs=1e-4)
        for kind, title, value in (("gen_ppl", "Gen-PPL", line(4.0)), ("entropy", "Unigram entropy (nats)", 4.0))
        for steps in (8, 16)
    }
    for part in (
        table,
        "delta: 0.002\nseed: 1\n```",
        "novels",
        "(eval.png)",
        'AutoModel.from_pretrained("someone/tiny-mcd", trust_remote_code=True)',
        'AutoTokenizer.from_pretrained("someone/tiny-mcd", trust_remote_code=True)',
        "Needs transformers 5.17 or newer.",
        "arxiv.org/abs/2602.00792",
        "teacher wrote this",
    ):
        assert part in card.text
    assert "round-1 wrote this" in card.text


def test_the_card_shows_its_own_model_writing_and_no_other(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "writing.gif").write_bytes(b"GIF89a")
    about = {"writing": {"model": "round-1", "steps": 8, "temperature": 1.0, "locking": "spread"}}
    shown = {}
    for label in ("round-1", "round-2"):
        write_report(tmp_path, save_results(tmp_path, sweep_of_two_models(), label=label, **about))
        shown[label] = ModelCard.load(tmp_path / "README.md").text
    assert "](writing.gif)\n\nround-1, 8 steps, spread, temperature 1, seed 0" in shown["round-1"]
    assert shown["round-1"].index("Gen-PPL (entropy)") < shown["round-1"].index("writing.gif")
    assert "writing.gif" not in shown["round-2"]
    (tmp_path / "writing.gif").unlink()
    write_report(tmp_path, save_results(tmp_path, label="round-1"))
    assert "writing.gif" not in ModelCard.load(tmp_path / "README.md").text


def test_the_card_s_metadata_is_what_the_hub_reads(tmp_path):
    """Read back by huggingface_hub: what a model comes from, its data, language, licence, metrics and tags."""
    about = {"label": "round-1", "base_model": "someone/teacher", "base_model_relation": "finetune", "license": "mit"}
    about |= {"datasets": ["Skylion007/openwebtext"], "language": ["en"]}
    (tmp_path / "config.json").write_text("{}")
    write_report(tmp_path, save_results(tmp_path, sweep_of_two_models(), **about))
    metadata = metadata_load(tmp_path / "README.md")
    index = metadata.pop("model-index")
    name, results = model_index_to_eval_results(index)
    data = ModelCardData(**metadata, model_name=name, eval_results=results)
    read = ModelCard.load(tmp_path / "README.md").data
    assert (
        data.to_dict() == read.to_dict() and [result.metric_type for result in results] == ["gen_ppl", "entropy"] * 2
    )
    for key, value in {key: value for key, value in about.items() if key != "label"}.items():
        assert metadata[key] == value, key
    assert metadata["metrics"] == ["perplexity"] and metadata["library_name"] == "transformers"
    assert "arxiv:2602.00792" in metadata["tags"] and metadata["pipeline_tag"]


def test_a_card_without_results_is_whole(tmp_path):
    write_model_card(tmp_path, {"results": []})
    card = ModelCard.load(tmp_path / "README.md")
    assert "No results yet." in card.text and "eval.png" not in card.text
    assert card.data.eval_results is None


def snippet_of(card) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]


def test_the_snippet_of_the_card_runs_and_never_asks(tmp_path, model, tokenizer):
    """It runs inside the folder, in a process without the package and without a terminal to ask on, and continues its
    prompt.
    """
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    write_model_card(tmp_path / "out", {"results": []})
    code = "import torch; torch.manual_seed(0)\n" + snippet_of(tmp_path / "out" / "README.md")
    result = run_python(code, plain=True, cwd=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "modeling_mcd" not in code
    free, continued = result.stdout.splitlines()[-2:]
    assert 20 < len(free) <= 32 and continued.startswith("the ") and "<|endoftext|>" not in free + continued


def test_the_card_of_a_judge_is_of_its_kind_and_runs(tmp_path, capsys, monkeypatch):
    folder = save_judge(tmp_path / "judge")
    report = save_results(folder, kind="causal", figures=["Loss on held-out text: 1.529 nats per token"])
    write_report(folder, report)
    card = (folder / "README.md").read_text()
    assert "Loss on held-out text: 1.529 nats per token." in card and "autoregressive" in card
    assert "No results yet." not in card and "masked" not in card.lower() and "pipeline_tag: text-generation" in card
    monkeypatch.chdir(folder)
    exec(snippet_of(folder / "README.md"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("the ")


def test_a_readme_of_the_users_is_never_touched(tmp_path):
    """A README.md that was there is kept, and so is ours once it was changed by hand. Ours, unchanged, is written again."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("my own words\n")
    write_report(tmp_path, save_results(tmp_path, [row()]))
    assert (tmp_path / "README.md").read_text() == "my own words\n"
    beside = (tmp_path / "eval_card.md").read_text()
    assert "README.md in this folder was written or changed by hand" in beside and "20.00 ± 0.50 (4.00)" in beside

    (tmp_path / "README.md").unlink()
    write_report(tmp_path, load_report(tmp_path))
    write_report(tmp_path, save_results(tmp_path, [row(gen_ppl=30.0)]))
    ours = (tmp_path / "README.md").read_text()
    assert "30.00 ± 0.50 (4.00)" in ours and "by hand, and is left" not in ours

    changed = ours.replace("# ", "# My ", 1)
    (tmp_path / "README.md").write_text(changed)
    write_report(tmp_path, save_results(tmp_path, [row(gen_ppl=40.0)]))
    assert (tmp_path / "README.md").read_text() == changed
    assert "40.00 ± 0.50 (4.00)" in (tmp_path / "eval_card.md").read_text()


def test_eval_json_has_the_fields_that_others_read(tmp_path):
    save_results(tmp_path, [row()])
    (result,) = json.loads((tmp_path / "eval.json").read_text())["results"]
    fields = {"model": str, "steps": int, "nfe": int | float, "gen_ppl": float, "gen_ppl_std": float, "entropy": float}
    fields |= {"precision": str, "samples": int, "seeds": int, "sampler": str}
    assert all(isinstance(result[name], kind) for name, kind in fields.items())
