"""LoRA under DDP, ZeRO-2 and ZeRO-3 on a CPU: the losses and adapters of one process, also resumed; judged and merged."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from tiny_run import ROOT, mcd_arguments, run_python, save_judge, write_inputs

from evaluation import load_report


pytestmark = pytest.mark.slow
RUN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None,
    reason="DeepSpeed builds its gloo extension with g++ and ninja",
)
CONFIGS = [
    "ddp_cpu.yaml",
    pytest.param("zero2_cpu.yaml", marks=needs_compiler),
    pytest.param("zero3_cpu.yaml", marks=needs_compiler),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def launch(inputs, output, config, **changes):
    """Three rounds of four steps, each judged, with merged networks beside the adapters."""
    changes = {"lora_r": 4, "merge_adapters": True, "save_steps": 6, "validation_text": inputs / "text.txt", **changes}
    changes |= {"judge": inputs.parent / "judge", "evaluation_steps": 2, "evaluation_samples": 5}
    arguments = mcd_arguments(inputs, output, **changes, **({"per_device_train_batch_size": 4} if config else {}))
    if config is None:
        result = run_python(RUN, *arguments)
    else:
        launcher = ["--config_file", str(ROOT / "recipes/accelerate" / config), str(ROOT / "trainers/run_mcd.py")]
        result = run_python("accelerate.commands.launch", *launcher, *arguments, launcher=("-m",))
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    save_judge(inputs.parent / "judge")
    output = tmp_path_factory.mktemp("reference") / "run"
    launch(inputs, output, None)
    return output


def losses(output):
    history = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if "loss" in entry for key in ("loss", "divergence", "reveal")]


def difference(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("config", CONFIGS)
def test_same_losses_adapters_and_figures(config, inputs, reference, tmp_path):
    output = tmp_path / "run"
    launch(inputs, output, config)
    assert losses(output) == pytest.approx(losses(reference), abs=1e-5)
    for name in ("teacher", "ema"):  # frozen: ZeRO's own checkpoints leave them out
        file = f"checkpoint-12/{name}/model.safetensors"
        assert difference(output / file, reference / file) < 1e-4
    for name in ("adapter/adapter_model.safetensors", "model.safetensors", "round-1/model.safetensors"):
        assert difference(output / name, reference / name) < 1e-4, name
    rows, expected = ({row["model"]: row for row in load_report(run)["results"]} for run in (output, reference))
    assert rows.keys() == expected.keys() == {"held-out text", "teacher", "round-1", "round-2", "round-3"}
    for name in rows.keys() - {"held-out text"}:
        assert rows[name]["gen_ppl"] == pytest.approx(expected[name]["gen_ppl"], rel=1e-3), name

    halves = tmp_path / "halves"  # resumed inside the second round
    shutil.copytree(output, halves)
    for step in (8, 12):
        shutil.rmtree(halves / f"checkpoint-{step}", ignore_errors=True)
    result = launch(inputs, halves, config)
    assert "resuming from" in result.stderr and "checkpoint-6" in result.stderr
    assert losses(halves) == losses(output)
    for name in ("checkpoint-12/teacher/model.safetensors", "adapter/adapter_model.safetensors"):
        assert difference(halves / name, output / name) == 0, name
