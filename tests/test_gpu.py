"""What only a GPU can show (`pytest -m gpu`); where it makes sense on a CPU too, at the same places of the code.

`python -m benchmarks.gpu_day check` runs this file on a borrowed card, a test at a time, and keeps the figures that the tests
record. What needs a card, or a package that is not there, is skipped by name.
"""

import copy
import importlib.util
import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT, mcd_arguments, run_python, write_inputs
from toy_distillers import BLOCK, METHODS, ROWS, blocks

from benchmarks import divergence, sampling
from evaluation.likelihood import validation_nelbo
from evaluation.sampler_likelihood import step_bound
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.loading import load_model
from modeling_mcd.transfer_mdlm import send
from trainers import MDLMTrainer, MDLMTrainingArguments


pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DATA = Path(__file__).parent / "data"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
# The tests run with one seed and small networks; trainers of every method, and pre-training.
TRAINERS = {**METHODS, "mdlm": (MDLMTrainer, MDLMTrainingArguments, {})}


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture
def published(tmp_path):
    """`published(layout)`: a network of the authors' weights, and the logits that their own code gives."""

    def published(config: str, reference: str):
        folder = tmp_path / config
        folder.mkdir()
        shutil.copy(DATA / "model.safetensors", folder)
        shutil.copy(DATA / config, folder / "config.json")
        return load_model(str(folder)), load_file(DATA / reference)

    return published


# --- The network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "reference"),
    [("config.json", "reference.safetensors"), ("duo_config.json", "duo_reference.safetensors")],
)
def test_golden_logits_on_the_device(published, record_property, config, reference, dtype):
    model, reference = published(config, reference)
    model = model.to(DEVICE, getattr(torch, dtype))
    with torch.no_grad():
        logits = model(reference["input_ids"].to(DEVICE), timesteps=reference["sigma"].to(DEVICE)).logits.cpu().float()
    error = (logits - reference["logits"]).abs().max().item()
    record_property("largest_error", error)
    assert error < (1e-4 if dtype == "float32" else 0.1 * reference["logits"].abs().max())


def test_float32_is_float32():
    """TF32 has ten bits: no import of ours turns it on. `--tf32 true` does, for who wants it."""
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "attention",
    [
        "sdpa",
        pytest.param("flex_attention", marks=needs_gpu),
        pytest.param("flash_attention_2", marks=needs("flash_attn")),
    ],
)
def test_attention_back_ends_agree(build, record_property, attention, dtype):
    if dtype == "float32" and attention == "flash_attention_2":
        pytest.skip("flash attention is for half precision")
    model = build(hidden_size=64).to(DEVICE, getattr(torch, dtype))
    tokens = blocks().to(DEVICE)
    outputs = []
    for name in ("eager", attention):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(tokens).logits.float())
    error = (outputs[0] - outputs[1]).abs().max().item()
    record_property("largest_error", error)
    assert error < (1e-4 if dtype == "float32" else 0.1) * max(1.0, outputs[0].abs().max().item())


@needs_gpu
def test_compiled_generation_with_cuda_graphs_for_several_batches(build):
    """A graph is captured for each batch size, and going back to an earlier one replays its own."""
    model = build(hidden_size=64).to(DEVICE)
    for batch in (1, 3, 1, 3):
        eager, compiled = (
            model.generate(steps=4, seed=0, num_return_sequences=batch, compile=flag) for flag in (False, True)
        )
        assert not (compiled == model.config.mask_token_id).any()
        assert (eager == compiled).double().mean() > 0.95, "other kernels may break a near-tie another way"


@needs_gpu
def test_the_published_shape_runs_in_bfloat16(record_property):
    model = MDLMForMaskedDiffusion(MDLMConfig()).to(DEVICE, torch.bfloat16)
    tokens = model.generate(steps=4, seed=0, num_return_sequences=2)
    record_property("peak_gb", torch.cuda.max_memory_allocated() / 1e9)
    assert tokens.shape == (2, 1024) and not (tokens == model.config.mask_token_id).any()


# --- Generation


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{"steps": 4}, {"steps": 4, "locking": "spread"}, {"steps": 4, "precision": "float32"}]
    + [
        {"steps": 4, "sampler": "random"},
        {"steps": 4, "top_k": 5},
        {"steps": 4, "top_p": 0.9},
        {"steps": 4, "sampler": "psi"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_generation_never_waits_for_the_device(build, options, dtype):
    """`torch.cuda.set_sync_debug_mode("error")` between the first step and the last."""
    model = build(hidden_size=64).to(DEVICE, getattr(torch, dtype))
    assert sampling.waits(model, {"seed": 0, "num_return_sequences": 3, **options}) is None


def test_the_device_changes_no_noise(build, record_property):
    """One seed gives one text on a CPU and on a card, but for draws that the last bits of a logit decide."""
    model, options = build(), {"steps": 8, "seed": 0, "num_return_sequences": 8}
    ours = model.to(DEVICE).generate(**options).cpu()
    same = (ours == model.to("cpu").generate(**options)).double().mean().item()
    record_property("equal_tokens", same)
    assert same > 0.98


def test_a_copy_is_pinned_and_arrives(build):
    values = torch.arange(10, dtype=torch.float64)
    assert torch.equal(send(values, DEVICE).cpu(), values) and send(values, DEVICE).device.type == DEVICE.type
    assert torch.equal(send(values[::2], DEVICE).cpu(), values[::2]) and len(send(values[:0], DEVICE)) == 0


# --- Likelihood


def test_bounds_on_the_device_equal_those_on_a_cpu(build):
    model, text = build(), blocks()
    on_cpu = validation_nelbo(model, text), step_bound(model, text, steps=4).mean
    model = model.to(DEVICE)
    on_device = validation_nelbo(model, text), step_bound(model, text, steps=4).mean
    assert on_device == pytest.approx(on_cpu, rel=1e-4)


# --- Teaching


@pytest.fixture
def trainer_of(networks, tmp_path):
    """`trainer_of(method, **settings)`: a trainer of four steps with data of its own, always from the same weights."""

    def trainer_of(method: str, folder: Path = tmp_path, **settings):
        trainer_class, arguments_class, own = TRAINERS[method]
        kind = getattr(trainer_class, "diffusion_kind", "absorbing")
        teacher, student = (network.float() for network in copy.deepcopy(networks[kind]))
        if method != "mdlm":
            own = {"num_rounds": 2, "steps_per_round": 2, **own}
        settings = {
            **{"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
            **{"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.9, "seed": 11},
            **own,
            **settings,
        }
        arguments = arguments_class(output_dir=str(folder), per_device_train_batch_size=ROWS, **settings)
        rows = [{"input_ids": row.tolist()} for row in blocks()] * 8
        given = {"teacher": teacher} if getattr(trainer_class, "has_teacher", False) else {}
        return trainer_class(student, arguments, train_dataset=rows, **given)

    return trainer_of


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=needs_gpu)])
@pytest.mark.parametrize("method", TRAINERS)
def test_every_trainer_makes_steps_in_half_precision(trainer_of, record_property, method, precision):
    trainer = trainer_of(method, max_steps=3, **{precision: True})
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record_property("losses", losses)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    after = trainer.model.state_dict()
    assert all(value.dtype == torch.float32 and value.device.type == DEVICE.type for value in after.values())
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    moved = sum(not torch.equal(after[name], before[name].to(DEVICE)) for name in trained)
    assert moved > len(trained) / 2


@pytest.fixture
def any_algorithm():
    """`full_determinism` changes settings of the process: the other tests get theirs back."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize("precision", [None, "bf16", pytest.param("fp16", marks=needs_gpu)])
def test_resume_is_bitwise_on_the_device(trainer_of, tmp_path, any_algorithm, precision):
    """With `full_determinism`: the backward of fused attention adds up in any order otherwise."""
    settings = {"save_strategy": "steps", "save_steps": 2, "full_determinism": ON_GPU}
    settings |= {} if precision is None else {precision: True}
    straight = trainer_of("mcd", tmp_path / "a", **settings)
    straight.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = trainer_of("mcd", tmp_path / "b", **settings)
    resumed.train(True)
    assert resumed.state.global_step == 4
    for ours, theirs in ((straight.model, resumed.model), (straight.whole_student(), resumed.whole_student())):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@needs_gpu
def test_a_nan_stops_a_run_on_the_device_before_a_save(trainer_of, tmp_path):
    trainer = trainer_of("mcd", save_strategy="steps", save_steps=2, bf16=True)
    assert trainer.checks_later
    trainer.model.lm_head.bias.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan at step 0"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@needs_gpu
def test_the_divergence_needs_a_fraction_of_the_memory(record_property):
    options = Namespace(rows=8192, hidden_size=768, vocab_size=50258, kind="student_first")
    peaks = {}
    for side in ("plain", "chunked"):
        peaks[side] = divergence.measure(side, options)["peak_gb"]
        torch.cuda.empty_cache()
    record_property("peak_gb", peaks)
    assert peaks["chunked"] < 0.3 * peaks["plain"]


# --- Packages that a borrowed machine may lack


def launched_losses(inputs: Path, run: Path, launcher: tuple[str, ...]) -> list[float]:
    """Those of `accelerate launch` with these words."""
    words = mcd_arguments(inputs, run, save_steps=12, max_steps=12)
    script = str(ROOT / "trainers" / "run_mcd.py")
    result = run_python("accelerate.commands.launch", *launcher, script, *words, launcher=("-m",))
    assert result.returncode == 0, result.stderr[-2000:]
    history = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@needs_gpu
@needs("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_with_one_process(tmp_path, stage):
    inputs = write_inputs(tmp_path)
    config = (ROOT / "recipes" / "accelerate" / f"zero{stage}_cpu.yaml").read_text()
    (tmp_path / "one.yaml").write_text(config.replace("num_processes: 2", "num_processes: 1"))
    launcher = ("--config_file", str(tmp_path / "one.yaml"))
    losses = [launched_losses(inputs, tmp_path / f"run{k}", words) for k, words in enumerate(((), launcher))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@needs_gpu
def test_fsdp_with_one_process(tmp_path):
    """The division itself is tested on a CPU, in two processes: tests/test_fsdp.py."""
    inputs = write_inputs(tmp_path)
    config = (
        (ROOT / "recipes" / "accelerate" / "fsdp2.yaml").read_text().replace("num_processes: 8", "num_processes: 1")
    )
    (tmp_path / "one.yaml").write_text(config.replace("mixed_precision: bf16", "mixed_precision: 'no'"))
    launcher = ("--config_file", str(tmp_path / "one.yaml"))
    losses = [launched_losses(inputs, tmp_path / f"run{k}", words) for k, words in enumerate(((), launcher))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@needs_gpu
@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_network_generates(build, tmp_path, bits):
    from transformers import AutoModel, BitsAndBytesConfig

    build(hidden_size=64).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModel.from_pretrained(tmp_path, quantization_config=quantised, device_map={"": 0})
    tokens = model.generate(steps=4, seed=0, num_return_sequences=2)
    assert tokens.shape == (2, BLOCK) and not (tokens == model.config.mask_token_id).any()


def test_no_code_asks_for_a_compute_capability():
    """The library runs on any generation of cards: nothing in it is for one of them."""
    words = ("compute_capability", "get_device_capability", "sm_80", "sm_90")
    for package in ("modeling_mcd", "trainers", "evaluation"):
        for file in (ROOT / package).rglob("*.py"):
            assert not any(word in file.read_text(encoding="utf-8") for word in words), file
