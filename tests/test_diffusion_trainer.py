"""One network is judged, saved and pushed; settings that would do nothing are refused; weights are trained in float32."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from toy_distillers import ROWS, blocks
from transformers import AutoModel, EarlyStoppingCallback

from trainers.diffusion_trainer import DiffusionTrainingArguments
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.output_folder import run_settings


ROW = [{"input_ids": row.tolist()} for row in blocks()]


@pytest.fixture
def trainer_of(networks, tmp_path):
    """`trainer_of(**settings)`: an MDLM trainer with an EMA that differs from its student."""

    def trainer_of(eval_dataset=ROW * 2, **settings):
        settings = {"ema_decay": 0.9, "save_strategy": "no", "seed": 11, "warmup_steps": 0} | settings
        settings |= {"report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": ROWS}
        arguments = MDLMTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=ROWS, **settings)
        student = copy.deepcopy(networks["absorbing"][1]).float()
        trainer = MDLMTrainer(student, arguments, train_dataset=ROW * 8, eval_dataset=eval_dataset)
        if "ema" in trainer.companions:
            for parameter in trainer.companions["ema"].model.parameters():
                parameter.mul_(0.5)
        return trainer

    return trainer_of


# --- The network that is handed on


def test_evaluate_and_predict_run_the_ema(trainer_of):
    trainer = trainer_of()
    alone = trainer_of(ema_decay=None)
    student_s = alone.evaluate()["eval_loss"]
    alone.model.load_state_dict(trainer.whole_student().state_dict())
    losses = [trainer.evaluate()["eval_loss"], *(trainer.predict(ROW * 2).metrics["test_loss"] for _ in range(3))]
    assert losses == [alone.evaluate()["eval_loss"]] * 4 and losses[0] != student_s


def test_sets_of_validation_data_have_a_loss_each(trainer_of):
    trainer = trainer_of({"a": ROW, "b": ROW * 2}, eval_strategy="steps", eval_steps=1)
    metrics = trainer.evaluate()
    assert metrics["eval_a_loss"] > 0 and metrics["eval_b_loss"] > 0
    assert metrics["eval_a_loss"] == trainer_of().evaluate(ROW)["eval_loss"]
    with pytest.raises(ValueError, match="the validation set has only 3 blocks"):
        trainer_of({"a": ROW, "b": ROW[:3]}, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="the validation set has only 3 blocks"):
        trainer_of().predict(ROW[:3])


def test_what_is_saved_and_pushed_is_the_ema(trainer_of, tmp_path):
    trainer = trainer_of()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.save_model(_internal_call=True)  # what `push_to_hub` calls before it sends `output_dir`
    for folder in (tmp_path / "saved", tmp_path):
        saved = AutoModel.from_pretrained(folder)
        for name, value in trainer.whole_student().named_parameters():
            assert torch.equal(saved.get_parameter(name), value), name
    assert not torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
    without = trainer_of(ema_decay=None)
    without.save_model(str(tmp_path / "student"))
    assert torch.equal(
        load_file(tmp_path / "student" / "model.safetensors")["lm_head.weight"], without.model.lm_head.weight
    )


def test_the_best_model_is_that_of_the_best_step(trainer_of, tmp_path):
    """The loss of the EMA falls and rises again at a learning rate of 0.3: its best step is handed on, not its last."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    trainer = trainer_of(learning_rate=0.3, max_steps=6, load_best_model_at_end=True, save_total_limit=9, **steps)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best < 6 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == losses[best]


def test_early_stopping_counts_the_handed_on_network(trainer_of):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "logging_steps": 1}
    trainer = trainer_of(learning_rate=1.0, max_steps=8, **steps)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    trainer.train()
    assert trainer.state.global_step < 8


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("compute_metrics", lambda prediction: {}),
        ("preprocess_logits_for_metrics", lambda logits, labels: logits),
        ("compute_loss_func", lambda *a, **k: 0),
        ("model_init", lambda: None),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(argument, value, networks, tmp_path):
    arguments = MDLMTrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"{argument} would do nothing"):
        MDLMTrainer(networks["absorbing"][1], arguments, **{argument: value})


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1}, {"bf16_full_eval": True}, {"include_for_metrics": ["loss"]}]
)
def test_settings_that_would_do_nothing_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} is .*, but would do nothing"):
        DiffusionTrainingArguments(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("kind", ["linear", "constant_with_warmup", "cosine_with_min_lr"])
def test_options_that_a_scheduler_has_not_are_refused(kind, trainer_of):
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs \{'foo': 1\} cannot be built"):
        trainer_of(lr_scheduler_type=kind, lr_scheduler_kwargs={"foo": 1})


# --- The optimizer, the order of rows


def test_the_optimizer_is_the_fused_adamw(trainer_of):
    trainer = trainer_of()
    assert trainer.args.optim == "adamw_torch_fused"
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)


def test_an_order_that_could_not_be_kept_is_refused(networks, tmp_path):
    with pytest.raises(
        ValueError, match="train_sampling_strategy is 'batch_rebalance', but its batches have other numbers"
    ):
        MDLMTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="batch_rebalance")

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ROW * 8

    arguments = MDLMTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=ROWS,
    )
    with pytest.raises(ValueError, match="group_by_length', but the training data is a stream"):
        MDLMTrainer(networks["absorbing"][1], arguments, train_dataset=Endless())


# --- Precision


def test_half_precision_weights_are_trained_in_float32(networks, tmp_path):
    """`from_pretrained` loads a bfloat16 file in bfloat16; only a quarter of such weights would move in these steps."""
    teacher = copy.deepcopy(networks["absorbing"][0]).bfloat16()
    arguments = MCDTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=ROWS, num_rounds=1, steps_per_round=8, save_strategy="no",
        delta=0.125, warmup_steps=0, learning_rate=1e-5, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = MCDTrainer(copy.deepcopy(teacher), arguments, teacher=teacher, train_dataset=ROW * 8)
    assert {p.dtype for p in (*trainer.model.parameters(), *trainer.teacher.parameters())} == {torch.float32}
    before = copy.deepcopy(trainer.model)
    trainer.train()
    layers = [(name, weights) for name, weights in trainer.model.named_parameters() if "layers." in name]
    moved = sum((weights != before.get_parameter(name)).sum().item() for name, weights in layers)
    assert moved / sum(weights.numel() for _, weights in layers) > 0.99


@pytest.mark.parametrize(
    ("launched", "given", "real"), [("bf16", {}, "bf16"), ("no", {"bf16": True}, "bf16"), ("no", {}, None)]
)
def test_the_precision_of_a_run_is_what_really_happens(launched, given, real, tmp_path, monkeypatch):
    """`accelerate launch --mixed_precision bf16` sets this variable, and so does a configuration file."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    settings = run_settings(MDLMTrainingArguments(output_dir=str(tmp_path), **given))
    assert {name: settings[name] for name in ("bf16", "fp16")} == {"bf16": real == "bf16", "fp16": False}


def test_fp16_on_a_cpu_is_refused(tmp_path, monkeypatch):
    """accelerate would train in float32, and the card would say fp16."""
    with pytest.raises(ValueError, match="fp16 does nothing on a CPU"):
        MDLMTrainingArguments(output_dir=str(tmp_path), fp16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 does nothing on a CPU"):
        MDLMTrainingArguments(output_dir=str(tmp_path))


@pytest.mark.parametrize("scaled", [True, False])
def test_an_overflow_ends_a_run_unless_a_loss_scaler_skips_it(scaled, trainer_of, monkeypatch):
    """Training in fp16 begins with a scale so high that gradients overflow. The scaler works on a CPU too, where
    accelerate makes none.
    """
    trainer = trainer_of(max_steps=3, learning_rate=1e-3, logging_steps=1)
    if scaled:
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", property(lambda self: "fp16"))
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    weight, overflows = trainer.model.lm_head.weight, iter([True])
    weight.register_hook(lambda gradient: gradient * torch.inf if next(overflows, False) else gradient)
    before = weight.detach().clone()
    if not scaled:
        with pytest.raises(FloatingPointError, match="the gradient norm is (inf|nan) at step 0"):
            trainer.train()
        assert torch.equal(weight, before)
    else:
        trainer.train()
        assert weight.isfinite().all() and not torch.equal(weight, before)
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert not math.isfinite(norms[0]) and all(map(math.isfinite, norms[1:]))
