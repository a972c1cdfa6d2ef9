"""The paper's tables: what is still to be done, several commands in one folder, and the table made of known figures."""

import json
from argparse import Namespace

import pytest
from report_rows import held_out, line, row

from benchmarks.paper_tables import LEGACY, RUNS, Network, Tables


RUN = {run.label: run for run in RUNS}


@pytest.fixture
def tables(tmp_path):
    def tables(*methods: str) -> Tables:
        options = Namespace(
            recipes="tiny",
            methods=list(methods),
            seeds=[1, 2],
            rounds=2,
            steps_per_round=5,
            steps=[4, 8],
            swept_steps=[8],
            temperatures=[0.5],
            samples=64,
            batch_size=8,
            spread=True,
            bound_blocks=16,
            minutes=1.0,
            output_dir=str(tmp_path / "run"),
            results=str(tmp_path / "results"),
            no_tables=False,
        )
        return Tables(options, [])

    return tables


def rows_of(network: Network, tables: Tables, gen_ppl: float, entropy: float) -> list[dict]:
    """Everything that a network is judged at. Its temperature moves the entropy along `line`."""
    rows = []
    for suffix in tables.variants(network):
        for temperature, steps in tables.grid(network, suffix).items():
            for n in steps:
                at = entropy - (1 - temperature)
                figures = {"gen_ppl": gen_ppl * line(at) / line(entropy), "entropy": at, "trigram_entropy": at}
                changes = {"precision": "legacy_float32"} if suffix == LEGACY else {"bound": 2 + network.seed / 10}
                rows.append(row(network.label + suffix, n, temperature, **figures, **changes))
    return rows


def test_what_is_judged_is_neither_trained_nor_judged_again(tables):
    mine = tables("MCD", "student-first only", "NELBO goes on")
    for label, number in (("MCD", 2), ("student-first only", 1), ("NELBO goes on", 1)):
        networks = mine.students(RUN[label], seed=1)
        assert len(networks) == number and not mine.is_done(RUN[label], 1)
        rows = [row for network in networks for row in rows_of(network, mine, 20.0, 4.0)]
        mine.save(rows[1:])
        assert not mine.is_done(RUN[label], 1), "one cell is missing"
        mine.save([{name: value for name, value in rows[0].items() if name != "bound"}])
        assert not mine.is_done(RUN[label], 1), "its bound is missing"
        mine.save(rows[:1])
        assert mine.is_done(RUN[label], 1) and not mine.is_done(RUN[label], 2)
    first, last = mine.students(RUN["MCD"], seed=1)
    assert mine.grid(first, "") == {1.0: [8], 0.5: [8]} and mine.grid(last, "") == {1.0: [4, 8], 0.5: [8]}
    assert mine.grid(last, ", legacy float32") == {1.0: [8]}


def test_commands_that_share_a_folder_keep_each_others_work(tables):
    one, other = tables("MCD"), tables("SDTT")
    one.save([row("MCD R1, seed 1")], trainings={"MCD-1": {"largest loss": 1.0}})
    other.save([row("SDTT R1, seed 1")], trainings={"SDTT-1": {}}, failures={"SDTT-2": "is nan"})
    one.save(trainings={"MCD-2": {}})
    assert {row["model"] for row in one.report["results"]} == {"MCD R1, seed 1", "SDTT R1, seed 1"}
    assert set(one.report["trainings"]) == {"MCD-1", "SDTT-1", "MCD-2"} and set(one.report["failures"]) == {"SDTT-2"}


def test_the_table_holds_means_spreads_and_the_matched_teacher(tables, tmp_path):
    mine = tables("MCD")
    teacher = Network(mine.teachers["teacher"], "teacher")
    mine.save([held_out(entropy=3.6, trigram_entropy=3.6), *rows_of(teacher, mine, line(4.0), 4.0)])
    for seed, gen_ppl in ((1, 10.0), (2, 14.0)):
        for network in mine.students(RUN["MCD"], seed):
            mine.save(rows_of(network, mine, gen_ppl, 3.8))
    mine.save(trainings={f"MCD-{seed}": {"loss at step 1": 1.0, "largest loss": 2.0} for seed in (1, 2)})
    mine.write([1, 2])

    text = (tmp_path / "results" / "paper_tables_tiny.md").read_text()
    cells = (line.split("|") for line in text.split("\n") if line.count("|") == 4)
    lines = {label.strip(): [cell.strip() for cell in row[:2]] for _, label, *row in cells}
    assert lines["MCD R2"] == ["12.00 ± 2.83 (3.80)"] * 2
    assert lines["MCD R1"] == ["-", "12.00 ± 2.83 (3.80)"], "no sweep, no cell"
    assert lines["MCD R2, bound"] == ["2.150"] * 2 and lines["teacher, spread, bound"] == ["-", "2.000"]
    assert "MCD R2, legacy float32, bound" not in lines
    assert lines["teacher like MCD R2 (trigrams)"] == ["-", f"{line(3.8):.2f} (3.80)"]
    assert lines["teacher, matched (trigrams)"] == ["-", f"{line(3.6):.2f} (3.60)"]
    content = json.loads((tmp_path / "results" / "paper_tables_tiny.json").read_text())
    assert str(tmp_path) not in json.dumps(content), "paths of this machine"
    assert content["explosions"]["MCD"] == {"loss at step 1": 1.0, "largest loss": 2.0}
    assert (tmp_path / "results" / "paper_tables_tiny.png").stat().st_size > 10_000
