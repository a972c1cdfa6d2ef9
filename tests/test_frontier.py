"""The frontier: intervals, ties and paired differences; a grid that is killed and goes on, shared by processes; its page."""

import math
import random
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from report_rows import held_out, line, row
from tiny_run import save_judge, save_teacher, start_python

from evaluation import load_report, markdown_table
from evaluation.evaluate_model import HELD_OUT_TEXT
from evaluation.frontier import frontier_of, matched_table, tables_of, time_table
from evaluation.frontier_page import plot, write_page
from evaluation.intervals import Interval, places, row_replicates
from evaluation.run_frontier import main
from evaluation.scores import load_scores, save_scores, scores_path
from modeling_mcd import MDLMForMaskedDiffusion
from trainers.character_tokenizer import character_tokenizer


ROOT = Path(__file__).parents[1]
SAMPLES, SEEDS = 200, 2


def scores_of(gen_ppl: float, entropy: float, noise: np.ndarray) -> list[dict]:
    """Samples of 10 tokens whose loss and entropy lie around those of a row; equal noise makes rows a pair."""
    seeds = []
    for one in noise:
        seed = {"nll": (10 * (math.log(gen_ppl) + one)).tolist(), "tokens": [10] * len(one), "seconds": 0.5}
        seeds.append(seed | {name: (entropy + 0.1 * one).tolist() for name in ("entropy", "trigram_entropy")})
    return seeds


NOISE = 0.3 * np.random.default_rng(1).standard_normal((SEEDS, SAMPLES))
OTHER_NOISE = 0.3 * np.random.default_rng(2).standard_normal((SEEDS, SAMPLES))


def sampled(**changes) -> dict:
    return row(**{"samples": SAMPLES, "seeds": SEEDS, "entropy_unit": "tokens"} | changes)


# --- Intervals


def test_the_bootstrap_error_is_that_of_a_mean():
    replicates, _ = row_replicates(sampled(gen_ppl=20.0), scores_of(20.0, 4.0, NOISE), "entropy")
    expected = NOISE.std() / math.sqrt(NOISE.size)
    assert replicates.again.std() == pytest.approx(expected, rel=0.1)
    interval = replicates.interval
    assert interval.value == pytest.approx(20)
    assert math.log(interval.high / interval.low) == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_paired_samples_give_a_surer_difference():
    one, _ = row_replicates(sampled(gen_ppl=20.0), scores_of(20.0, 4.0, NOISE), "entropy")
    two, _ = row_replicates(sampled(gen_ppl=19.0), scores_of(19.0, 4.0, NOISE), "entropy")
    other, _ = row_replicates(sampled(gen_ppl=19.0), scores_of(19.0, 4.0, OTHER_NOISE), "entropy")
    paired, apart = two.less(one), other.less(one)
    assert one.is_paired_with(two) and paired.value == pytest.approx(math.log(19 / 20))
    assert paired.high - paired.low < 0.01 * (apart.high - apart.low)
    assert apart.high - apart.low == pytest.approx(2 * 1.96 * math.sqrt(2) * NOISE.std() / 20, rel=0.2)
    fewer, _ = row_replicates(sampled(samples=100), scores_of(20.0, 4.0, NOISE[:, :100]), "entropy")
    assert not fewer.is_paired_with(one)


def test_without_single_samples_the_seeds_decide():
    """Student's t with two degrees of freedom: 4.30 standard errors."""
    replicates, entropies = row_replicates(row(gen_ppl=20.0, gen_ppl_std=0.5, seeds=3), None, "entropy")
    half = math.log(replicates.interval.high / replicates.interval.low) / 2
    assert half == pytest.approx(4.30 * 0.5 / 20 / math.sqrt(3), rel=0.25)
    assert set(entropies) == {4.0}
    twin, _ = row_replicates(row(gen_ppl=20.0, gen_ppl_std=0.5, seeds=3), None, "entropy")
    less = replicates.less(twin)
    assert not replicates.is_paired_with(twin) and less.high - less.low > 2 * half, "equal figures are not a pair"
    assert row_replicates(row(seeds=1, gen_ppl_std=None), None, "entropy") is None


def test_figures_whose_intervals_overlap_share_a_place():
    def interval(low, high):
        return Interval((low + high) / 2, low, high)

    assert places([interval(5, 6), interval(1, 2), None, interval(1.5, 3)]) == ["3", "1-2", "-", "1-2"]
    assert places([interval(1, 2), interval(1.9, 4), interval(3.9, 5)]) == ["1-3"] * 3, "a chain of ties is one tie"
    generator = random.Random(0)
    for _ in range(300):
        starts = [generator.uniform(0, 10) for _ in range(8)]
        intervals = [interval(start, start + generator.uniform(0, 2)) for start in starts]
        found = places(intervals)
        for i, one in enumerate(intervals):
            for j, other in enumerate(intervals):
                assert found[i] == found[j] or not one.overlaps(other)


# --- From rows to tables


def test_no_table_ranks_rows_whose_intervals_overlap(tmp_path):
    """Of twelve models, some of which are hard to tell apart: their places, and the order of the lines."""
    generator = np.random.default_rng(4)
    rows, names = [held_out(3.6, entropy_unit="tokens")], [f"model {n}" for n in range(12)]
    for name in names:
        noise, gain = 0.3 * generator.standard_normal((SEEDS, SAMPLES)), generator.uniform(0, 0.8)
        for temperature, entropy in ((1.0, 4.0), (0.8, 3.7), (0.6, 3.4)):
            figure = line(entropy) * math.exp(-gain)
            rows.append(sampled(model=name, temperature=temperature, gen_ppl=figure, entropy=entropy))
            save_scores(tmp_path, rows[-1], scores_of(figure, entropy, noise))
    frontier = frontier_of(rows, tmp_path)
    intervals = {point.name: point.matched.interval for point in frontier.points}
    lines = [(entry[1], entry[2]) for entry in matched_table(frontier).lines]
    ties = 0
    for i, (place, name) in enumerate(lines):
        for other_place, other in lines[i + 1 :]:
            if intervals[name].overlaps(intervals[other]):
                assert place == other_place, (name, other)
            if place == other_place:
                assert names.index(name) < names.index(other), "those of one place stand in the order of the report"
                ties += 1
            else:
                assert intervals[name].high < intervals[other].low
    assert ties >= 3 and len({place for place, _ in lines}) > 3
    table = markdown_table([one for one in rows if one["model"] == HELD_OUT_TEXT or one["temperature"] == 1])
    labels = re.findall(r"^\| (model \d+) \|", table, re.MULTILINE)
    assert labels[:12] == names and "**" not in table and "place" not in table, "mcd-evaluate's own ranks nothing"


@pytest.fixture
def swept(tmp_path):
    """Two models on one line of Gen-PPL over entropy, the student 0.1 nats below it, at 4 and 8 steps; single samples are kept."""
    rows = [held_out(3.6, entropy_unit="tokens")]
    for model, gain in (("teacher", 0.0), ("student", 0.1)):
        for steps in (4, 8):
            for temperature, entropy in ((1.0, 4.0), (0.8, 3.7), (0.6, 3.4)):
                figure = line(entropy) * math.exp(-gain) * 8 / steps
                rows.append(
                    sampled(model=model, steps=steps, temperature=temperature, gen_ppl=figure, entropy=entropy)
                )
                save_scores(tmp_path, rows[-1], scores_of(figure, entropy, NOISE))
    return rows, tmp_path


def test_matched_figures_and_paired_differences_are_those_of_the_line(swept):
    rows, folder = swept
    frontier = frontier_of(rows, folder)
    assert frontier.by == "entropy" and [point.steps for point in frontier.reference] == [4, 8]
    teacher, student = frontier.series["teacher"][1], frontier.series["student"][1]
    assert teacher.matched.interval.value == pytest.approx(line(3.6))
    less = student.matched.less(teacher.matched)
    assert (less.value, less.low, less.high) == pytest.approx((-0.1, -0.1, -0.1)), "one noise on both sides"
    assert teacher.matched.interval.low < line(3.6) < teacher.matched.interval.high
    lines = matched_table(frontier).lines
    assert [entry[:3] for entry in lines] == [["4", "1", "student"], ["4", "2", "teacher"]] + [
        ["8", "1", "student"],
        ["8", "2", "teacher"],
    ]
    assert lines[0][4] == "-0.100 [-0.100, -0.100]" and lines[1][4] == "0" and lines[0][-1] == "0.5"


def test_no_place_without_an_entropy_to_match(swept):
    rows, folder = swept
    for kept in (rows[1:], [one for one in rows if one["temperature"] in (None, 1.0)]):
        table = matched_table(frontier_of(kept, folder))
        assert {entry[1] for entry in table.lines} == {"-"} and {entry[3] for entry in table.lines} == {"-"}


def test_time_to_quality_is_the_first_step_that_reaches_it(swept):
    rows, folder = swept
    for model in ("teacher", "student"):
        for temperature, entropy in ((1.0, 4.0), (0.6, 3.4)):
            figure = line(entropy) * (0.99 if model == "student" else 1.5)
            rows.append(sampled(model=model, steps=6, temperature=temperature, gen_ppl=figure, entropy=entropy))
            save_scores(folder, rows[-1], scores_of(figure, entropy, OTHER_NOISE))
    teacher, student = time_table(frontier_of(rows, folder)).lines
    assert teacher[:4] == ["teacher", "8", "8.0", "0.5"] and "tie" not in teacher[4]
    assert student[:2] == ["student", "6"] and student[4].endswith("(tie)"), "0.01 nats are less than the error"


def test_rows_that_cannot_be_compared_are_refused(swept):
    rows, folder = swept
    with pytest.raises(ValueError, match="rows with judge .*, which cannot be compared"):
        frontier_of([*rows, sampled(judge="another")], folder)
    with pytest.raises(ValueError, match="holds no row of samples"):
        frontier_of(rows[:1], folder)


def test_scores_belong_to_weights_and_settings(swept):
    rows, folder = swept
    assert load_scores(folder, rows[1])[0]["tokens"] == [10] * SAMPLES
    for changes in ({"weights": "cd"}, {"precision": "float32"}, {"steps": 2}, {"samples": 100}):
        assert load_scores(folder, rows[1] | changes) is None, changes
    scores_path(folder, rows[1]).write_text('{"seeds": [{}]}')
    with pytest.raises(ValueError, match="holds no scores of 200 samples x 2 seeds: remove the file"):
        load_scores(folder, rows[1])


def test_the_rows_of_an_earlier_report_make_a_page(tmp_path):
    """Those of the shipped teacher, which have no single samples: 8 spread steps are surely better at equal entropy."""
    shutil.copy(ROOT / "benchmarks" / "results" / "spread_goals.json", tmp_path / "eval.json")
    frontier = frontier_of(load_report(tmp_path)["results"], tmp_path)
    assert frontier.by == "trigram_entropy"
    table = matched_table(frontier)
    eight = [entry for entry in table.lines if entry[0] == "8"]
    assert [entry[1:3] for entry in eight] == [["1", "teacher / spread"], ["2", "teacher / independent"]]
    assert "unpaired" in eight[0][4] and "Student's t" in " ".join(table.notes)
    assert [entry[3] for entry in table.lines if entry[0] != "8"] == ["-"] * 5, "their sweeps reach no entropy of text"


def test_the_page_needs_nothing_from_elsewhere(swept):
    rows, folder = swept
    rows = [
        row | {"model": row["model"].replace("student", "<b>student&"), "bound": 2.0, "bound_se": 0.1} for row in rows
    ]
    files = {path.name: path for path in write_page(folder, frontier_of(rows, folder))}
    page = files["frontier.html"].read_text()
    assert "&lt;b&gt;student&amp;" in page and "<b>student" not in page
    assert "<script" not in page and "@import" not in page and not re.findall(r'(?:src|href)="(?!#)', page)
    assert page.count("<svg") == 1 and page.count("<table>") == 3 and "2.000 ± 0.196" in page
    assert files["frontier.png"].read_bytes().startswith(b"\x89PNG")
    assert files["frontier.svg"].read_text().rstrip().endswith("</svg>")


def test_the_axes_have_the_measured_steps_and_plain_numbers(swept):
    rows, folder = swept
    rows = [row | {"bound": 2.0, "bound_se": 0.1} for row in rows]
    frontier = frontier_of(rows, folder)
    for point in frontier.points:
        point.seconds = 0.05 * point.steps
    figure = plot(frontier)
    figure.canvas.draw()

    def ticks(panel) -> list[str]:
        labels = panel.get_xticklabels() + panel.get_xticklabels(minor=True)
        return [label.get_text() for label in labels if label.get_text()]

    _, forwards, seconds, bound = figure.axes
    assert ticks(forwards) == ticks(bound) == ["4", "8"]
    assert ticks(seconds) and all(re.fullmatch(r"[\d.]+", text) for text in ticks(seconds)), "0.3, not 3 x 10^-1"
    for point in frontier.points:
        point.seconds = None
    assert len(plot(frontier).axes) == 3, "no empty place"


# --- The command


GRID = ["--steps", "2", "--temperatures", "1.0", "0.7", "--lockings", "independent", "spread", "--seeds", "2"]
GRID += ["--samples", "3", "--batch_size", "2", "--bound", "2", "--precisions", "float64", "legacy_float32"]
POINTS = 4 + 2  # legacy draws have no locking but independent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("frontier")
    save_teacher(home / "teacher")
    character_tokenizer(model_max_length=32).save_pretrained(home / "teacher")
    save_judge(home / "judge")
    (home / "text.txt").write_text("the way of the data is one line, with no walking back. " * 20)
    return home


def words_for(inputs: Path, output: Path) -> list[str]:
    words = [str(inputs / "teacher"), "--judge", str(inputs / "judge"), "--output_dir", str(output)]
    return [*words, "--reference_text", str(inputs / "text.txt"), *GRID]


@pytest.fixture(scope="module")
def complete(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("complete")
    main(words_for(inputs, output))
    return output


def figures(folder: Path) -> list[dict]:
    return load_report(folder)["results"]


def test_the_grid_is_complete_and_keeps_its_samples(complete):
    rows = figures(complete)
    assert len(rows) == POINTS + 1 and len(list((complete / "scores").iterdir())) == POINTS
    for entry in rows[1:]:
        scores = load_scores(complete, entry)
        means = [math.exp(sum(seed["nll"]) / sum(seed["tokens"])) for seed in scores]
        assert entry["gen_ppl"] == pytest.approx(sum(means) / 2)
        assert entry["entropy"] == pytest.approx(sum(sum(seed["entropy"]) for seed in scores) / 6)
        assert all(seed["seconds"] > 0 for seed in scores)
        assert ("bound" in entry) == (entry["precision"] == "float64" and entry["temperature"] == 1)
    page = (complete / "frontier.md").read_text()
    assert "teacher / spread / float64" in page and "teacher / independent / legacy_float32" in page
    assert tables_of(frontier_of(rows, complete))[-1].title == "N-step bound"


def test_a_killed_grid_goes_on_and_ends_the_same(inputs, complete, tmp_path, monkeypatch):
    generate, calls = MDLMForMaskedDiffusion.generate, []

    def killed(model, *arguments, **options):
        calls.append(None)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return generate(model, *arguments, **options)

    monkeypatch.setattr(MDLMForMaskedDiffusion, "generate", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(words_for(inputs, tmp_path))
    done = len(figures(tmp_path)) - 1
    assert 0 < done < POINTS and not (tmp_path / "frontier.html").exists()
    main(words_for(inputs, tmp_path))
    assert len(calls) == 10 + (POINTS - done) * 4, "no row is sampled again"
    assert figures(tmp_path) == figures(complete)


def test_the_page_alone_needs_no_model(complete, capsys, monkeypatch):
    monkeypatch.setattr(MDLMForMaskedDiffusion, "generate", lambda *a, **k: pytest.fail("a sample was drawn"))
    (complete / "frontier.svg").unlink()
    main(["--output_dir", str(complete), "--match", "trigram_entropy"])
    assert (complete / "frontier.svg").exists() and "place" in capsys.readouterr().out


RANK = """
import os, sys
rank, port, *words = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
import torch
torch.set_num_threads(1)
from evaluation.run_frontier import main
main(words)
"""


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(inputs, complete, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_python(RANK, str(rank), str(port), *words_for(inputs, tmp_path)) for rank in (0, 1)]
    results = [process.complete() for process in processes]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "Saved in" in results[0].stdout and results[1].stdout == ""
    for shared, alone in zip(figures(tmp_path), figures(complete), strict=True):
        for name, value in alone.items():
            assert shared[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    assert (tmp_path / "frontier.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to show: name models to judge, or a folder with an eval.json by --output_dir"),
        (["m", "--output_dir", "out"], "nothing to judge by: give --judge"),
        (["--output_dir", "out"], "out holds no row of samples: name models to judge"),
        (
            ["m", "--judge", "j", "--precisions", "legacy_float32", "--lockings", "spread"],
            "precision legacy_float32 has independent locking alone, but --lockings are ['spread']",
        ),
        (["m", "--precisions", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(words)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())
