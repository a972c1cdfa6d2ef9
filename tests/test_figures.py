"""The table of figures: each by hand, over seeds, in old reports; and what becomes of one that cannot be measured."""

import json
import math
import shutil
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from report_rows import row
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation import (
    EvaluationProtocol,
    evaluate_model,
    load_report,
    markdown_table,
    save_results,
    step_bound,
    write_report,
)
from evaluation import figures as figures_room
from evaluation.evaluate_model import KEY, SETTINGS, evaluate_held_out_text
from evaluation.figures import FIGURES, Figure, over_seeds
from evaluation.gradient_moment import GradientReference
from evaluation.team import ALONE, Team
from modeling_mcd import MDLMForMaskedDiffusion, MDLMGenerationConfig


ROOT = Path(__file__).parents[1]
NUMBERS = [figure.name for figure in FIGURES]


@pytest.fixture
def judge() -> GPT2LMHeadModel:
    shapes = {"vocab_size": 48, "n_positions": 32, "n_embd": 16, "n_head": 2, "n_layer": 1}
    judge = GPT2LMHeadModel(GPT2Config(bos_token_id=46, eos_token_id=46, **shapes)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in judge.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return judge


@pytest.fixture
def rows(judge, tokenizer):
    """`rows(model, **changes)`: the rows of a small evaluation."""

    def rows(
        model, steps=(2,), temperatures=(1.0,), known_rows=(), lockings=("independent",), bound_blocks=None, **changes
    ) -> list[dict]:
        protocol = EvaluationProtocol(judge, tokenizer, **{"samples": 4, "seeds": 2, "length": 12} | changes)
        grid = {"steps": steps, "temperatures": temperatures, "lockings": lockings}
        found = evaluate_model(
            "m", model, tokenizer, protocol, known_rows=known_rows, bound_blocks=bound_blocks, **grid
        )
        return list(found)

    return rows


# --- The protocol decides


HIDDEN = (
    {"top_p": 0.5},
    {"top_k": 2},
    {"stop_at_eos": True, "block_length": 4},
    {"suppress_tokens": [1, 2, 3, 4, 5]},
    {"block_length": 4},
    {"guidance_scale": 2.0},
    {"temperature": 0.3, "steps": 1, "length": 5, "num_return_sequences": 2, "precision": "float32"},
    {"sampler": "confidence", "order_temperature": 1.0},
)


def test_a_models_own_generation_config_changes_no_figure(model, tokenizer, rows, tmp_path):
    (plain,) = rows(model)
    for number, options in enumerate(HIDDEN):
        model.generation_config = MDLMGenerationConfig(**options)
        model.save_pretrained(tmp_path / str(number))
        loaded = MDLMForMaskedDiffusion.from_pretrained(tmp_path / str(number))
        name = next(iter(options))
        assert getattr(loaded.generation_config, name) == options[name], "the option is there"
        assert rows(loaded) == [plain], options


def test_the_options_of_the_test_above_do_change_samples(model):
    plain = model.generate(steps=2, seed=0, length=12, num_return_sequences=4)
    for options in ({"top_p": 0.5}, {"suppress_tokens": [1, 2, 3, 4, 5]}, {"temperature": 0.3}):
        assert not torch.equal(
            model.generate(**{"steps": 2, "seed": 0, "length": 12, "num_return_sequences": 4} | options), plain
        )


CHANGES = (
    {"sampler": "confidence"},
    {"last_step": "greedy"},
    {"precision": "float32"},
    {"length": 8},
    {"samples": 3},
    {"seeds": 1},
    {"convention": "raw_ids"},
    {"entropy_unit": "words"},
    {"vocabulary": {"a"}},
)


def test_a_row_of_another_protocol_is_another_row(model, rows, tmp_path):
    saved = rows(model, temperatures=(1.0, 0.5))
    for changes in CHANGES:
        saved += rows(model, known_rows=saved, **changes)
    assert len(saved) == 2 + len(CHANGES)
    report = save_results(tmp_path, saved)
    assert len({tuple(row[name] for name in (*KEY, *SETTINGS)) for row in report["results"]}) == len(saved)
    assert len(save_results(tmp_path, saved)["results"]) == len(saved), "the same rows again replace themselves"


def test_a_locking_is_part_of_a_rows_point(model, rows, tmp_path):
    saved = rows(model, temperatures=(1.0, 0.5))
    saved += rows(model, lockings=("independent", "spread"), known_rows=saved)
    assert [row["locking"] for row in saved] == ["independent", "independent", "spread"]
    assert saved[0]["gen_ppl"] != saved[2]["gen_ppl"], "it reached the sampler"
    assert len(save_results(tmp_path, saved)["results"]) == 3


def test_a_chain_is_switched_on_by_the_table_alone(model, build, rows):
    """Coupled lockings are of models with a chain; without the word such a model draws as if it had none."""
    coupled = build()
    coupled.add_coupling({"states": 3})
    for parameter in coupled.coupling.parameters():
        parameter.data.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    plain, without, chained = (
        *rows(model, lockings=("spread", "spread+coupling"), bound_blocks=BLOCKS),
        *rows(coupled, lockings=("spread", "spread+coupling"), bound_blocks=BLOCKS),
    )
    assert [row["locking"] for row in (plain, without, chained)] == ["spread", "spread", "spread+coupling"]
    same = ("gen_ppl", "entropy", "bound", "example")
    assert all(plain[name] == without[name] and chained[name] != plain[name] for name in same)
    bound = step_bound(coupled, BLOCKS, steps=2, locking="spread", coupling=True, seed=range(5))
    assert chained["bound"] == pytest.approx(bound.mean)
    with pytest.raises(ValueError, match="'spread.coupling' needs a model with a chain, and this one has none"):
        rows(model, lockings=("spread+coupling",))
    with pytest.raises(ValueError, match="coupling .True. does not go with the sampler 'confidence'"):
        rows(coupled, lockings=("independent+coupling",), sampler="confidence")


# --- The bound


BLOCKS = torch.arange(5 * 12).view(5, 12) % 40


def test_the_bound_of_a_row_is_that_of_its_sampler(model, rows):
    plain, cooler, spread, _ = rows(
        model, temperatures=(1.0, 0.5), lockings=("independent", "spread"), bound_blocks=BLOCKS, batch_size=2
    )
    for found, locking in ((plain, "independent"), (spread, "spread")):
        bound = step_bound(model, BLOCKS, steps=2, locking=locking, seed=range(5))
        assert found["bound"] == pytest.approx(bound.mean) and found["bound_se"] == pytest.approx(bound.error)
    assert plain["bound"] != spread["bound"] and plain["bound_blocks"] == 5
    assert "bound" not in cooler, "another law has another likelihood"


def test_a_bound_is_added_to_a_known_row_without_new_samples(model, rows, monkeypatch):
    known = rows(model)
    assert "bound" not in known[0]
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **k: pytest.fail("a sample was drawn"))
    added = rows(model, known_rows=known, bound_blocks=BLOCKS)
    assert added == [known[0] | {name: added[0][name] for name in ("bound", "bound_se", "bound_blocks", "bound_text")}]
    assert rows(model, known_rows=added) == rows(model, known_rows=added, bound_blocks=BLOCKS) == []
    other = rows(model, known_rows=added, bound_blocks=BLOCKS[:4])
    assert other[0]["bound"] != added[0]["bound"], "other text, another bound"
    monkeypatch.setattr(model, "generate", generate)


def test_a_bound_that_cannot_be_measured_says_why(model, rows, tmp_path):
    (found,) = rows(model, bound_blocks=BLOCKS.where(BLOCKS != 3, 47))
    assert found["bound"] is None and found["gen_ppl"] is not None
    assert found["note"] == "bound: block 0 holds a [MASK] (id 47), which has no likelihood: give text alone"
    assert "n/a: could not be measured (m, 2 steps: bound: block 0 holds" in markdown_table([found])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "remdm"}, "sampler 'remdm' has no likelihood"),
        ({"sampler": "psi"}, "sampler 'psi' has no likelihood"),
        ({"precision": "legacy_float32"}, "precision is 'legacy_float32'"),
        ({"last_step": "greedy"}, "last_step is 'greedy'"),
        (
            {"sampler": "confidence", "lockings": ["spread"]},
            "locking .'spread'. is not used by the sampler 'confidence'",
        ),
    ],
)
def test_a_bound_or_locking_that_cannot_be_is_refused(model, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        rows(model, bound_blocks=BLOCKS, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "first_hitting"}, "sampler must be one of"),
        ({"sampler": "confidence", "last_step": "greedy"}, "last_step .'greedy'. is not used by the sampler"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"length": 64}, "length is 64, but the model's context is 32 tokens"),
        ({"precision": "legacy_float32", "sampler": "confidence"}, "does not go with precision='legacy_float32'"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(model, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        rows(model, **changes)


# --- The table


def test_every_figure_is_in_a_row_with_its_spread(model, rows):
    (result,) = rows(model, vocabulary={"a"})
    asked_for = {"memorised_8", "memorised_13", "mauve", "second_gen_ppl", "gradient_moment"}
    for figure in FIGURES:
        measured = figure.name not in asked_for
        assert math.isfinite(result[figure.name]) if measured else result[figure.name] is None, figure.name
        assert (f"{figure.name}_std" in result) == figure.spread
    assert result["judge_nll"] == pytest.approx(math.log(result["gen_ppl"]), rel=0.1)
    assert result["note"] is None


def test_means_and_spreads_over_seeds_are_those_of_the_numbers():
    seeds = [dict.fromkeys(NUMBERS, 1.0) | {"gen_ppl": value} for value in (2.0, 4.0, 9.0)]
    row = over_seeds(seeds)
    assert row["gen_ppl"] == 5 and row["gen_ppl_std"] == statistics.stdev([2, 4, 9]) and row["entropy"] == 1
    assert over_seeds(seeds[:1])["gen_ppl_std"] is None
    missing = over_seeds([*seeds, seeds[0] | {"gen_ppl": None}])
    assert (missing["gen_ppl"], missing["gen_ppl_std"], missing["entropy"]) == (None, None, 1)


def test_a_new_metric_is_one_line(model, rows, tmp_path, monkeypatch):
    """The new metric is measured, saved and printed, and rows that lack it show a dash."""
    old = rows(model)
    metric = Figure("mean_length", "text", lambda text, _: statistics.fmean(map(len, text)), "{:.1f}".format, "length")
    for room in ("figures", "table"):
        monkeypatch.setattr(f"evaluation.{room}.FIGURES", (*FIGURES, metric))
    new = rows(model, steps=(4,))
    assert new[0]["mean_length"] == pytest.approx(12, abs=4)
    save_results(tmp_path, old + new)
    table = write_report(tmp_path, load_report(tmp_path))
    assert "distinct-3; rep-4; self-BLEU; length |" in table
    assert f"; - | {figures_room.FIGURES[3].show(new[0])}" in table
    assert f"; {new[0]['mean_length']:.1f} |" in table


def test_trigram_entropy_is_in_the_table():
    table = markdown_table([row(trigram_entropy=5.25)])
    assert "| Trigram entropy (nats); distinct-3 |" in table and "| teacher | 5.25; 0.900 |" in table


def test_a_report_of_an_earlier_version_stays_readable(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "results" / "paper_tables_tiny_eval.json", tmp_path / "eval.json")
    before = load_report(tmp_path)["results"]
    assert len(before) > 700 and not any("note" in row for row in before)
    after = save_results(tmp_path, [row()])["results"]
    assert len(after) == len(before) + 1
    assert [row["gen_ppl"] for row in after[:-1]] == [row["gen_ppl"] for row in before]


def test_a_row_needs_its_key_and_settings_only(tmp_path):
    """A figure that did not exist when the row was written is a dash, everywhere."""
    bare = {name: value for name, value in row().items() if name in (*KEY, *SETTINGS)}
    save_results(tmp_path, [bare, row(steps=4)])
    (tmp_path / "config.json").write_text("{}")
    assert "| teacher | 20.00 ± 0.50 (4.00) | - (-) |" in write_report(tmp_path, load_report(tmp_path))
    old = {key: value for key, value in bare.items() if key != "locking"}
    (tmp_path / "eval.json").write_text(json.dumps({"results": [old]}))
    assert load_report(tmp_path)["results"] == [bare], "before there was a choice, every locking was independent"
    for name in {*KEY, *SETTINGS} - {"locking"}:
        (tmp_path / "eval.json").write_text(
            json.dumps({"results": [{key: value for key, value in bare.items() if key != name}]})
        )
        with pytest.raises(ValueError, match="is not a report of this library"):
            load_report(tmp_path)


# --- Trouble


def eos_only(model):
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()[46] = 1e4
    return model


def nan_student(model):
    model.lm_head.bias.data[0] = torch.nan
    return model


def test_a_student_that_writes_eos_only_gives_a_row(model, rows):
    (result,) = rows(eos_only(model))
    assert result["gen_ppl"] is result["gen_ppl_std"] is result["judge_nll"] is None
    assert result["entropy"] == 0 and result["nfe"] > 0
    assert result["example"] == ""
    assert result["note"].startswith("nothing to score: ")


def test_a_student_without_finite_logits_gives_a_row(model, rows):
    (result,) = rows(nan_student(model))
    assert {result[name] for name in (*NUMBERS, "nfe", "example")} == {None}
    assert "NaN" in result["note"] or "nan" in result["note"]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_judge_without_finite_scores_gives_a_row(model, judge, rows, value):
    judge.lm_head.weight = torch.nn.Parameter(judge.lm_head.weight.detach().clone())
    judge.lm_head.weight.data[5] = value
    (result,) = rows(model)
    assert result["gen_ppl"] is None and result["judge_nll"] is None and result["entropy"] > 0
    assert "gen_ppl is " in result["note"] and "judge_nll is " in result["note"]


def test_a_perplexity_that_overflows_keeps_its_logarithm(model, judge, rows):
    judge.lm_head.weight = torch.nn.Parameter(1e5 * judge.lm_head.weight.detach())
    (result,) = rows(model)
    assert result["gen_ppl"] is None and result["note"] == "gen_ppl is inf"
    assert result["judge_nll"] > 709


def test_rows_of_trouble_are_valid_json_and_say_so_everywhere(model, rows, tmp_path):
    good = rows(model)
    bad = rows(eos_only(model), steps=(4,))
    save_results(tmp_path, good + bad, label="m")
    content = (tmp_path / "eval.json").read_text()
    json.loads(content, parse_constant=lambda name: pytest.fail(name))
    (tmp_path / "config.json").write_text("{}")
    table = write_report(tmp_path, load_report(tmp_path))
    assert "| n/a (0.00) |" in table
    assert "n/a: could not be measured (m, 4 steps: nothing to score: " in table
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    assert "nothing to score" in card and "nan" not in card.lower().split()


def test_a_row_of_trouble_is_measured_again(model, rows):
    good = rows(model)
    assert rows(model, known_rows=good) == []
    bad = rows(eos_only(model))
    assert rows(model, known_rows=bad) == bad


# --- Shared work


class Thread(Team):
    """One of several processes, as a thread."""

    def __init__(self, rank: int, parts: list, barrier: threading.Barrier):
        self.rank, self.size, self.parts, self.barrier = rank, len(parts), parts, barrier

    def gather(self, part) -> list:
        self.parts[self.rank] = part
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts

    def sum(self, tensor) -> torch.Tensor:
        return sum(self.gather(tensor))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_shared_work_gives_the_rows_of_one_process(size, model, judge, tokenizer):
    """This also holds for more processes than samples, and every process gets every row."""
    reference = GradientReference(["it was a dark night", "the rain fell"], judge, tokenizer)
    sizes = {"samples": 5, "seeds": 2, "length": 12, "batch_size": 2}
    protocol = EvaluationProtocol(judge, tokenizer, **sizes, gradient_reference=reference)
    blocks = torch.arange(5 * 12).view(5, 12) % 40

    def rows_of(team) -> list[dict]:
        held_out = evaluate_held_out_text(blocks, tokenizer, protocol, team=team)
        options = {"team": team, "bound_blocks": blocks}
        return [held_out, *evaluate_model("m", model, tokenizer, protocol, [2, 3], **options)]

    parts, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        of_all = list(pool.map(lambda rank: rows_of(Thread(rank, parts, barrier)), range(size)))
    for rows in of_all:
        for shared, alone in zip(rows, rows_of(ALONE), strict=True):
            for name, value in alone.items():
                rel = 1e-3 if name.startswith("gradient_moment") else 1e-6  # sums of float32, whose mean cancels
                assert shared[name] == (pytest.approx(value, rel=rel) if isinstance(value, float) else value), name


def test_every_sample_falls_to_one_process():
    for size in (1, 2, 3, 8):
        shares = [Thread(rank, [None] * size, None).share(5) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(5))
