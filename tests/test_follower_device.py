"""Teacher and EMA that stay in main memory: the same run, bit for bit, and no module's weights leave it but for its forward."""

import copy

import pytest
import torch
from peft import LoraConfig
from toy_distillers import ROWS, blocks

from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.runs.output_folder import run_settings


ROW = [{"input_ids": row.tolist()} for row in blocks()]


def trainer_of(networks, folder, **settings):
    settings = {
        "num_rounds": 2,
        "steps_per_round": 2,
        "ema_decay": 0.9,
        "save_strategy": "no",
        "delta": 0.125,
    } | settings
    settings |= {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "warmup_steps": 0, "seed": 11}
    lora = settings.pop("lora", None)
    arguments = MCDTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=ROWS, per_device_eval_batch_size=ROWS, **settings
    )
    teacher, student = (copy.deepcopy(network).float() for network in networks["absorbing"])
    networks = {"peft_config": lora} if lora else {"teacher": teacher}
    return MCDTrainer(student, arguments, train_dataset=ROW * 8, eval_dataset=ROW, **networks)


def test_the_same_bits_as_on_the_device(networks, tmp_path):
    found = []
    for device in (None, "cpu"):
        trainer = trainer_of(networks, tmp_path, follower_device=device)
        trainer.train()
        weights = [*(dict(f.model.named_parameters()) for f in trainer.companions.values())]
        student = trainer.whole_student()
        loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        facts = (
            loss,
            trainer.evaluate()["eval_loss"],
            student.generate(steps=4, seed=0, num_return_sequences=2).tolist(),
        )
        found.append((facts, [*weights, dict(student.named_parameters())]))
    assert len(found[0][0][0]) == 4 and found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


def test_weights_are_on_the_device_in_their_forward_alone(networks, tmp_path):
    """Here the device is main memory too: what is brought there is a copy."""
    trainer = trainer_of(networks, tmp_path, follower_device="cpu")
    teacher, used = trainer.teacher, {}
    homes = {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()}

    def look(module, name):
        def hook(*of_hook):
            now = dict(teacher.named_parameters())
            used[name] = sorted(key for key, parameter in now.items() if parameter.data_ptr() != homes[key])

        module.register_forward_hook(hook, prepend=True)

    for name, module in teacher.named_modules():
        if name.endswith("qkv_proj") or name == "":
            look(module, name)
    ids = torch.tensor([row["input_ids"] for row in ROW])
    rows = teacher(input_ids=ids, timesteps=torch.ones(len(ids)), hidden_rows=torch.ones_like(ids).bool())
    head = ["lm_head.bias", "lm_head.weight"]
    own = sorted(name for name, _ in teacher.named_parameters(recurse=False))
    assert used.pop("") == sorted(head + own) and len(used) == 2
    for name, names in used.items():
        of_module = [f"{name}.{key}" for key, _ in teacher.get_submodule(name).named_parameters()]
        assert set(head + of_module) <= set(names) and not [key for key in names if "qkv" in key and name not in key]
    assert {name: parameter.data_ptr() for name, parameter in teacher.named_parameters()} == homes
    assert rows.weight.data_ptr() != homes["lm_head.weight"]


def test_it_does_not_identify_a_run(networks, tmp_path):
    arguments = [MCDTrainingArguments(output_dir=str(tmp_path), follower_device=device) for device in (None, "cpu")]
    assert run_settings(arguments[0]) == run_settings(arguments[1])


def test_where_it_would_do_nothing_it_is_refused(networks, tmp_path):
    with pytest.raises(
        ValueError, match="follower_device is 'cpu', .* with an adapter they are adapters: leave it out"
    ):
        trainer_of(networks, tmp_path, follower_device="cpu", lora=LoraConfig(r=2))
    with pytest.raises(ValueError, match="follower_device must be one of .* not 'disk'"):
        MCDTrainingArguments(output_dir=str(tmp_path), follower_device="disk")
