"""`torch_compile`: one graph for each way in which the trunk runs, unbroken and never compiled again."""

import copy
import shutil

import pytest
import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch._dynamo.utils import counters
from toy_backbones import MASK, make_network
from toy_distillers import METHODS, ROWS, SEED, blocks, make_trainer
from transformers import TrainerCallback

from modeling_mcd import as_masked_diffusion
from trainers import MDLMTrainer, MDLMTrainingArguments
from trainers.compilation import take_compile_options


# Graphs of a run: of the student with a gradient; and of a trunk without one, the teacher's or the student's own.
GRAPHS = {"mdlm": 1, "coupling": 1} | dict.fromkeys(("mcd", "sdtt", "dcd", "dscd", "mpdc"), 2)
SETTINGS = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3}
SETTINGS |= {"steps_per_round": 3, "per_device_train_batch_size": ROWS, "save_strategy": "no"}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs(TrainerCallback):
    """The number of graphs that were compiled until the end of each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, *arguments, **options):
        self.after.append(counters["stats"]["unique_graphs"])


def pretraining(network, folder, **changes) -> MDLMTrainer:
    settings = {name: value for name, value in SETTINGS.items() if name != "steps_per_round"} | {
        "max_steps": 6,
        "seed": SEED,
    }
    return MDLMTrainer(network, MDLMTrainingArguments(output_dir=str(folder), **settings | changes))


def train(trainer, rows=None) -> tuple[list[float], list[int]]:
    """The loss of each step, and the graphs until then."""
    graphs = Graphs()
    trainer.add_callback(graphs)
    trainer.train_dataset = rows or [{"input_ids": row.tolist()} for row in blocks()] * 6
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], graphs.after


@pytest.fixture
def trainer_of(networks, tmp_path):
    """`trainer_of(method)`: always from the same weights."""

    def trainer_of(method: str, dtype=torch.float64, **changes):
        own = {kind: tuple(n.to(dtype) for n in copy.deepcopy(pair)) for kind, pair in networks.items()}
        if method == "mdlm":
            return pretraining(own["absorbing"][1], tmp_path, **changes)
        return make_trainer(method, own, tmp_path, **SETTINGS | changes)

    return trainer_of


@pytest.mark.parametrize(
    "method", ["mcd", *(pytest.param(name, marks=pytest.mark.slow) for name in GRAPHS if name != "mcd")]
)
def test_one_unbroken_graph_for_each_way_to_run_the_trunk(method, trainer_of):
    """Six steps in two rounds, at whose end the teacher changes; in each step other numbers of tokens are masked."""
    plain, none = train(trainer_of(method))
    assert none == [0] * 6
    losses, graphs = train(trainer_of(method, torch_compile_backend="eager"))
    assert graphs == [GRAPHS[method]] * 6 and not counters["graph_break"]
    assert losses == pytest.approx(plain, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["activation checkpointing", "accumulation", "evaluation", "bf16"])
def test_no_setting_breaks_the_graph(way, trainer_of):
    changes = {
        "activation checkpointing": {"activation_checkpointing": True},
        "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "evaluation": {"per_device_eval_batch_size": ROWS},
        "bf16": {"bf16": True, "dtype": torch.float32},
    }[way]
    trainer = trainer_of("mcd", torch_compile_backend="aot_eager", **changes)
    _, graphs = train(trainer)
    assert graphs == [2] * 6 and not counters["graph_break"]
    if way == "evaluation":
        trainer.evaluate([{"input_ids": row.tolist()} for row in blocks()])
        assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


@pytest.mark.slow
def test_the_trunk_of_a_wrapped_network_is_compiled(tmp_path):
    network = as_masked_diffusion(make_network("qwen3", dtype=torch.float64), MASK)
    _, graphs = train(pretraining(network, tmp_path, torch_compile_backend="eager"))
    assert graphs == [1] * 6 and not counters["graph_break"]


@pytest.mark.slow
def test_an_adapter_and_its_teacher_are_compiled(networks, tmp_path):
    """The teacher is the base at first, and has an adapter of its own from the second round on: one graph more."""
    peft = pytest.importorskip("peft")
    trainer_class, arguments_class, own = METHODS["mcd"]
    arguments = arguments_class(
        output_dir=str(tmp_path), num_rounds=2, ema_decay=None, torch_compile_backend="eager", **own | SETTINGS
    )
    student = copy.deepcopy(networks["absorbing"][0])
    trainer = trainer_class(student, arguments, peft_config=peft.LoraConfig(r=2))
    _, graphs = train(trainer)
    assert graphs == [2, 2, 2, 3, 3, 3] and not counters["graph_break"]


@pytest.mark.slow
def test_rows_of_many_lengths_are_compiled_twice(trainer_of):
    """For the first length, and then for all others."""
    rows = [{"input_ids": row[:width]} for width in (32, 20, 27, 12, 30, 17) for row in blocks().tolist()]
    trainer = trainer_of("mdlm", torch_compile_backend="eager", train_sampling_strategy="sequential")
    _, graphs = train(trainer, rows)
    assert graphs == [1, 2, 2, 2, 2, 2] and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler on a CPU")
@pytest.mark.parametrize("method", ["mdlm", "mcd"])
def test_compiled_kernels_have_the_same_losses(method, trainer_of):
    plain, _ = train(trainer_of(method, torch.float32))
    losses, graphs = train(trainer_of(method, torch.float32, torch_compile=True))
    assert graphs[-1] == GRAPHS[method] and losses == pytest.approx(plain, abs=1e-5)


def test_launches_that_gather_weights_within_the_trunk_are_refused(trainer_of, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("trainers.compilation.is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(ValueError, match="torch_compile is true, but ZeRO-3 gathers weights between the layers"):
            trainer_of("mdlm", torch_compile=True)
    accelerator = trainer_of("mdlm", torch_compile=True).accelerator
    accelerator.state.dynamo_plugin.backend = DynamoBackend.INDUCTOR
    monkeypatch.setattr(type(accelerator), "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="torch_compile is true, but FSDP2 gathers weights between the layers"):
        take_compile_options(accelerator)


def test_tf32_stays_off_unless_it_is_asked_for(tmp_path, monkeypatch):
    """TrainingArguments turns it on for a compiled network."""
    asked = []
    for module in ("transformers.training_args", "trainers.diffusion_trainer"):
        monkeypatch.setattr(f"{module}.is_torch_tf32_available", lambda: True)
        monkeypatch.setattr(f"{module}.enable_tf32", asked.append)
    for tf32, last in ((None, False), (False, False), (True, True)):
        MDLMTrainingArguments(output_dir=str(tmp_path), torch_compile=True, tf32=tf32)
        assert asked[-1] is last
