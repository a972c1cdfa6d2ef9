"""Scores of the lm-evaluation-harness for the Hub's leaderboards; from the harness itself: test_lm_eval.py."""

import copy
import json

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from evaluation.eval_results import eval_result_entries, main


# What lm-eval 0.4.13 writes, as far as it is read.
HARNESS = {
    "results": {
        "gsm8k": {"exact_match,strict-match": 0.41243, "exact_match,flexible-extract": 0.44},
        "mmlu_pro": {"exact_match,custom-extract": 0.3},
        "mmlu_pro_law": {"exact_match,custom-extract": 0.1},
        "mmlu_pro_math": {"exact_match,custom-extract": 0.5},
        "hellaswag": {"acc,none": 0.5},
    },
    "group_subtasks": {"mmlu_pro": ["mmlu_pro_law", "mmlu_pro_math"], "gsm8k": [], "hellaswag": []},
    "n-shot": {"gsm8k": 5, "mmlu_pro_law": 5, "mmlu_pro_math": 5, "hellaswag": 0},
    "n-samples": {
        "gsm8k": {"original": 1319, "effective": 1319},
        "mmlu_pro_law": {"original": 1101, "effective": 1101},
        "mmlu_pro_math": {"original": 1351, "effective": 1351},
    },
    "config": {"model_args": {"path": "/home/me/model", "steps": 64}, "gen_kwargs": {"block_length": 32}},
    "lm_eval_version": "0.4.13",
}


@pytest.mark.parametrize("config", ["config.json", "adapter_config.json"])
def test_the_hub_reads_what_is_written(config, tmp_path, capsys):
    file, model = tmp_path / "results.json", tmp_path / "my model"
    file.write_text(json.dumps(HARNESS))
    model.mkdir()
    (model / config).write_text("{}")
    main([str(file), str(model)])
    assert sorted(path.name for path in (model / ".eval_results").iterdir()) == ["gsm8k.yaml", "mmlu_pro.yaml"]
    read = {}
    for path in (model / ".eval_results").iterdir():
        assert "/home/me" not in path.read_text()
        (read[path.stem],) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    entry = read["gsm8k"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 41.24)
    how = "steps 64, block_length 32, lm-evaluation-harness 0.4.13"
    assert entry.notes == f"5-shot, exact_match (strict-match), {how}"
    entry = read["mmlu_pro"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 30.0)
    assert f"hf upload you/model '{model}/.eval_results' .eval_results" in capsys.readouterr().out


def test_a_part_of_the_questions_is_no_score():
    harness = copy.deepcopy(HARNESS)
    harness["n-samples"]["mmlu_pro_math"]["effective"] = 10
    with pytest.raises(ValueError, match="^mmlu_pro was run on 1111 of its 2452 questions.*without --limit"):
        eval_result_entries(harness)


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys):
    other = HARNESS | {"results": {"hellaswag": {"acc,none": 0.5}}}
    files = {"other": json.dumps(other), "list": "[1]", "text": "no JSON", "bytes": "\udcff", "empty": "{}"}
    (tmp_path / "config.json").write_text("{}")
    for name, content in files.items():
        file = tmp_path / f"{name}.json"
        file.write_text(content, errors="surrogateescape")
        expected = (
            "none of the tasks hellaswag is one whose leaderboard is known"
            if name == "other"
            else f"{file} is no file of results"
        )
        check(capsys, [str(file), str(tmp_path)], expected)
    check(capsys, [str(tmp_path / "none.json"), str(tmp_path)], "No such file")
    check(
        capsys,
        [str(file), str(tmp_path / "nowhere")],
        "holds no config.json and no adapter_config.json: give the folder of the model",
    )
    assert not (tmp_path / ".eval_results").exists()


def check(capsys, arguments: list[str], expected: str):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 1 and expected in line, line
