"""MCD's schedules, teachers, EMA and accumulation, the MDLM loss, and numbers that are not finite."""

import copy
import math

import pytest
import torch
from tiny_run import BLOCK, save_teacher, write_inputs
from transformers import AutoModel, TrainerCallback

from trainers.checkpoints import fault_of
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.trajectories import step_noise


SETTINGS = {
    "num_rounds": 3,
    "steps_per_round": 4,
    "delta": 0.125,
    "ema_decay": None,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "seed": 11,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    return AutoModel.from_pretrained(folder / "teacher").eval()


def make_trainer(teacher, tmp_path, eval_dataset=None, **changes):
    student = type(teacher)(teacher.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(teacher.get_parameter(name) + 0.1 * torch.randn(parameter.shape, generator=generator))
    arguments = MCDTrainingArguments(output_dir=str(tmp_path), **{**SETTINGS, **changes})
    return MCDTrainer(student, arguments, teacher=teacher, eval_dataset=eval_dataset)


def blocks():
    return torch.randint(0, 46, (4, BLOCK), generator=torch.Generator().manual_seed(2))


def test_a_batch_with_nothing_masked_costs_nothing(teacher, tmp_path):
    trainer = make_trainer(teacher, tmp_path, delta=1e-9, delta_growth=1.0)
    trainer.model.train()
    trainer.noise_of_batch = lambda maskable: (
        torch.full((4,), 1 - 1e-9, dtype=torch.float64),
        torch.zeros(4, BLOCK, dtype=torch.float64),
    )
    loss = trainer.compute_loss(trainer.model, {"input_ids": blocks()})
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.eq(0).all() for parameter in trainer.model.parameters())


def test_schedules_are_functions_of_the_step():
    args = MCDTrainingArguments(output_dir="unused", num_rounds=5, steps_per_round=10)
    assert args.max_steps == 50
    assert [args.round_of(step) for step in (0, 9, 10, 49, 50)] == [0, 0, 1, 4, 4]
    assert [args.delta_of(r) for r in range(5)] == [1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32]
    assert [args.tau_of(r) for r in range(5)] == [0.96, 0.93, 0.90, 0.87, 0.84]
    assert MCDTrainingArguments(output_dir="unused", tau=[0.5]).tau_of(3) == 0.5


def test_teacher_and_student_of_different_vocabulary(teacher, tmp_path):
    save_teacher(tmp_path / "other", vocab_size=60)
    student = AutoModel.from_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ in vocab_size: 48 and 60"):
        MCDTrainer(student, MCDTrainingArguments(output_dir=str(tmp_path / "run"), **SETTINGS), teacher=teacher)


def test_accumulated_gradients_are_those_of_the_complete_batch(teacher, tmp_path):
    """Same step, same noise: 1 x 4 rows against 2 micro-batches of 2."""
    data = [{"input_ids": row.tolist()} for row in blocks()]
    results = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = make_trainer(
            teacher,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_steps=1,
            learning_rate=1e-3,
            warmup_steps=0,
        )
        trainer.train_dataset = data
        trainer.train()
        log = trainer.state.log_history[0]
        results.append((log["loss"], log["grad_norm"], trainer.model.lm_head.bias.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4)
    assert torch.allclose(results[0][2], results[1][2], atol=1e-5)


@pytest.mark.parametrize("update", ["snapshot", "ema"])
def test_teacher_follows_the_student_as_asked(teacher, tmp_path, update):
    trainer = make_trainer(
        teacher,
        tmp_path,
        teacher_update=update,
        teacher_ema_decay=0.5 if update == "ema" else None,
        steps_per_round=2,
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
    )
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((model.lm_head.bias.detach().clone(), trainer.teacher.lm_head.bias.clone()))

    trainer.add_callback(Watch())
    trainer.train_dataset = [{"input_ids": row.tolist()} for row in blocks()] * 3
    before = teacher.lm_head.bias.detach().clone()
    trainer.train()
    (s1, t1), (s2, t2), (s3, t3) = seen
    if update == "snapshot":
        assert torch.equal(t1, before) and torch.equal(t2, s2) and torch.equal(t3, s2)
    else:
        assert torch.allclose(t1, (before + s1) / 2) and torch.allclose(t2, (t1 + s2) / 2)
        assert torch.allclose(t3, (t2 + s3) / 2)


def test_non_finite_loss_stops_with_step_and_round(teacher, tmp_path):
    trainer = make_trainer(teacher, tmp_path, max_steps=6, steps_per_round=2)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.lm_head.bias.data[0] = math.nan

    trainer.add_callback(Break())
    trainer.train_dataset = [{"input_ids": row.tolist()} for row in blocks()] * 6
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3 \(round 2 of 3\)"):
        trainer.train()


def data(rounds: int = 6):
    return [{"input_ids": row.tolist()} for row in blocks()] * rounds


def test_the_ema_is_the_recursion_with_warm_up(teacher, tmp_path):
    """EMA_k = d EMA_(k-1) + (1 - d) student_k with d = min(decay, k / (9 + k)): 1/10, 2/11, 3/12, then the decay 0.3."""
    changes = {"ema_decay": 0.3, "max_steps": 6, "learning_rate": 1e-2, "warmup_steps": 0}
    trainer = make_trainer(teacher, tmp_path, **changes)
    students = [copy.deepcopy(trainer.model.state_dict())]

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            students.append(copy.deepcopy(model.state_dict()))

    trainer.add_callback(Watch())
    trainer.train_dataset = data()
    trainer.train()
    assert len(students) == 7
    for name, value in trainer.whole_student().named_parameters():
        expected = students[0][name].double()
        for decay, student in zip((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3), students[1:], strict=True):
            expected = decay * expected + (1 - decay) * student[name].double()
        assert torch.allclose(value.double(), expected, atol=1e-6), name
        assert not torch.allclose(value, students[-1][name], atol=1e-4), name


@pytest.mark.parametrize("fault", ["loss", "gradient norm"])
def test_a_run_that_is_stopped_by_nan_goes_on_from_its_last_checkpoint(teacher, tmp_path, fault):
    changes = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_steps": 6, "ema_decay": 0.9}

    def trainer_of(folder):
        trainer = make_trainer(teacher, tmp_path / folder, learning_rate=1e-2, warmup_steps=0, **changes)
        trainer.train_dataset = data()
        return trainer

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            bias = model.lm_head.bias
            if state.global_step == 3 and fault == "loss":
                bias.data[0] = math.nan
            if state.global_step == 3 and fault == "gradient norm":
                bias.register_hook(lambda gradient: gradient * math.nan)

    broken = trainer_of("broken")
    broken.add_callback(Break())
    with pytest.raises(FloatingPointError, match=rf"{fault} is nan at step 3 \(round 1 of 3\)"):
        broken.train()
    assert [path.name for path in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-2"]
    assert fault_of(tmp_path / "broken" / "checkpoint-2") is None
    resumed, whole = trainer_of("broken"), trainer_of("whole")
    resumed.train(True)
    whole.train()
    for one, other in ((resumed.model, whole.model), (resumed.whole_student(), whole.whole_student())):
        assert all(torch.equal(value, other.get_parameter(name)) for name, value in one.named_parameters())


def test_mdlm_loss_equals_the_nelbo_by_hand(teacher, tmp_path):
    arguments = MDLMTrainingArguments(
        output_dir=str(tmp_path), ema_decay=None, per_device_train_batch_size=4, save_strategy="no", seed=11
    )
    trainer = MDLMTrainer(type(teacher)(teacher.config), arguments)
    trainer.model.load_state_dict(teacher.state_dict())
    trainer.model.train()
    x_0 = blocks()
    times, u = step_noise(11, 0, range(4), 4, BLOCK)
    t = 1e-3 + (1 - 1e-3) * times
    z_t = torch.where(u > (1 - (1 - 1e-3) * t)[:, None], 47, x_0)
    with torch.no_grad():
        logits = trainer.model(z_t).logits.double()
    logits[..., 47] = -math.inf
    nll = -logits.log_softmax(-1).gather(-1, x_0[..., None])[..., 0]
    by_hand = (nll / t[:, None])[z_t == 47].sum() / x_0.numel()
    assert trainer.compute_loss(trainer.model, {"input_ids": x_0}).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_evaluation_repeats_and_leaves_the_training_noise_alone(teacher, tmp_path):
    trainer = make_trainer(teacher, tmp_path)
    trainer.eval_dataset = [{"input_ids": row.tolist()} for row in blocks()] * 4
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second and first > 0
    other = make_trainer(teacher, tmp_path)
    after, alone = (one.compute_loss(one.model.train(), {"input_ids": blocks()}) for one in (trainer, other))
    assert torch.equal(after, alone)


def test_fewer_validation_blocks_than_one_batch_are_refused(teacher, tmp_path):
    few = [{"input_ids": row.tolist()} for row in blocks()][:3]
    message = "per_device_eval_batch_size is 8, a batch of 8 in all, but the validation set has only 3 blocks"
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher, tmp_path, eval_strategy="steps", eval_dataset=few)
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher, tmp_path).evaluate(few)
