"""What a step costs: operations against a counter of torch, and the figures of log lines and of `eval.json`."""

import json
import time

import pytest
import torch
from tiny_run import mdlm_arguments, write_inputs
from torch.utils.flop_counter import FlopCounterMode
from toy_backbones import MASK, make_network
from toy_distillers import ROWS, blocks, make_trainer
from transformers import TrainerCallback

from modeling_mcd import MDLMForMaskedDiffusion, as_masked_diffusion
from trainers import run_mdlm
from trainers.adapters import with_adapter
from trainers.step_meter import PEAKS, Operations, StepMeter, known_peak


CPU = torch.device("cpu")


class Seen(TrainerCallback):
    """Keeps the lines that trackers are given."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.lines.append(dict(logs))


@pytest.mark.parametrize("method", ["mcd", "sdtt", "dcd", "dscd"])
def test_operations_are_those_that_torch_counts(method, networks, tmp_path, monkeypatch):
    """But for DSCD's second look at the head, and for the noise embedding and the modulations, which see no tokens. The last
    layer is computed in full.
    """
    monkeypatch.setattr(MDLMForMaskedDiffusion, "spares_last_layer", lambda self: False)
    trainer = make_trainer(method, networks, tmp_path)
    for network in (trainer.model, getattr(trainer, "teacher", trainer.model)):
        network.set_attn_implementation("eager")  # the others have kernels of their own, which compute more
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, {"input_ids": blocks()}).backward()
    trainer.model.zero_grad()
    again = 6 * 48 * 32 * trainer._recorded["masked_fraction_student"][0].item() * ROWS * 32 if method == "dscd" else 0
    assert trainer.floating_point_ops({}) == pytest.approx(counter.get_total_flops() - again, rel=0.02)
    assert trainer.floating_point_ops({}) == 0


def test_a_step_of_mcd_by_the_formula(networks, tmp_path):
    trainer, width, vocabulary, length = make_trainer("mcd", networks, tmp_path), 32, 48, 32
    trainer.compute_loss(trainer.model, {"input_ids": blocks()})
    share_t, share_s = (trainer._recorded[f"masked_fraction_{name}"][0].item() for name in "ts")
    trunk = 2 * (12 * width**2 + 2 * length * width)
    head = width * vocabulary * (3 * share_t + share_s)
    assert trainer.floating_point_ops({}) == pytest.approx(2 * ROWS * length * (4 * trunk + head))


def test_an_adapter_needs_no_gradients_of_the_base():
    network = as_masked_diffusion(make_network("llama"), MASK)
    full = Operations.of(network)
    layers = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # queries and output, keys and values of two heads, MLP
    assert full == Operations(layers, 2 * 32, 48 * 32, trained=2, head_trained=True)
    peft = pytest.importorskip("peft")
    adapted = Operations.of(with_adapter(network, peft.LoraConfig(r=1, target_modules=["q_proj"])))
    assert (adapted.trained, adapted.head_trained) == (1, False) and adapted.weights == layers + 2 * (32 + 32)
    assert adapted.count(10, 4, 5, trains=True) == 2 * (2 * 10 * (adapted.weights + 2 * 4 * 64) + 2 * 5 * 48 * 32)
    assert adapted.count(10, 4, 5, trains=False) == 2 * (10 * (adapted.weights + 2 * 4 * 64) + 5 * 48 * 32)


def test_figures_of_two_processes():
    meter = StepMeter(CPU, peak_tflops=1e-9)  # 1000 operations a second
    lines = [torch.tensor([[100.0, 2.0, 1.0, 600.0, 5e9], [60.0, 4.0, 1.0, 1000.0, 7e9]], dtype=torch.float64)]
    expected = {"tokens_per_second": 40, "data_wait": 1 / 3, "peak_memory_gb": 7, "mfu": 800 / 4 / 1000}
    assert meter.figures(lines) == pytest.approx(expected) and meter.figures(lines * 2) == pytest.approx(expected)
    meter.lines = [torch.zeros(2, 5, dtype=torch.float64), *lines]  # the first line is left out
    assert meter.total() == pytest.approx(expected | {"device": "cpu", "processes": 2})
    assert StepMeter(CPU).total() is None and "mfu" not in StepMeter(CPU).figures(lines)


def test_the_peak_of_a_gpu_goes_by_its_name(monkeypatch):
    assert known_peak(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in (
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40S", 362),
        ("Quadro", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert known_peak(torch.device("cuda")) == peak
    assert list(PEAKS).index("H100 PCIe") < list(PEAKS).index("H100")


def test_lines_have_figures_and_checkpoints_have_none(networks, tmp_path):
    """Waiting for data counts; a checkpoint, an evaluation and other callbacks between two steps do not."""
    pause, wait = 0.3, 0.1

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8 * ROWS

        def __getitem__(self, i):
            time.sleep(wait / ROWS)
            return {"input_ids": blocks()[i % ROWS].tolist()}

    class Slow(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            time.sleep(pause)

        on_save = on_step_begin

    settings = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 2, "peak_tflops": 1e-3, "max_steps": 4}
    trainer = make_trainer("mcd", networks, tmp_path, disable_tqdm=True, report_to="none", **settings)
    trainer.train_dataset, seen = Rows(), Seen()
    trainer.add_callback(seen)
    trainer.add_callback(Slow())
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    lines, names = (
        [line for line in seen.lines if "loss" in line],
        {"tokens_per_second", "data_wait", "peak_memory_gb", "mfu"},
    )
    assert len(lines) == 2 and all(names <= line.keys() for line in lines)
    assert not any(names & entry.keys() for entry in trainer.state.log_history)
    seconds = [2 * ROWS * 32 / line["tokens_per_second"] for line in lines]
    assert sum(seconds) < elapsed - 6 * pause
    for line, took in zip(lines, seconds, strict=True):
        assert 2 * wait * 0.9 < line["data_wait"] * took < 2 * wait + pause and 0 < line["data_wait"] < 1
        assert 0.01 < line["peak_memory_gb"] < 100
    operations = sum(line["mfu"] * took for line, took in zip(lines, seconds, strict=True)) * 1e9
    assert operations == pytest.approx(trainer.state.total_flos)
    assert trainer.meter.total()["tokens_per_second"] == pytest.approx(lines[1]["tokens_per_second"])
    trainer.evaluate([{"input_ids": row.tolist()} for row in blocks()] * 2)
    assert trainer.floating_point_ops({}) == 0 and trainer.meter.operations == 0


def test_padding_is_no_token():
    meter = StepMeter(CPU)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    meter.count({"input_ids": torch.zeros(2, 3), "attention_mask": mask})
    meter.count({"input_ids": torch.zeros(2, 3)})
    assert isinstance(meter.tokens[0], torch.Tensor), "a number would have made a GPU wait"
    meter.seconds = 2.0
    assert meter.line(lambda values: values)["tokens_per_second"] == 4.5


def test_a_run_writes_its_figures(tmp_path):
    words = ["--logging_steps", "1", "--peak_tflops", "1", "--report_to", "none", "--disable_tqdm", "true"]
    command = [*mdlm_arguments(write_inputs(tmp_path), tmp_path / "run"), *words]
    run_mdlm.main(command)
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())["training"]
    assert figures.keys() == {"tokens_per_second", "data_wait", "peak_memory_gb", "mfu", "device", "processes"}
    assert figures["device"] == "cpu" and figures["processes"] == 1 and figures["tokens_per_second"] > 0
    run_mdlm.main(
        [*command, "--peak_tflops", "2"]
    )  # says how a run is measured, not what it computes; nothing is left to do
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["training"] == figures
