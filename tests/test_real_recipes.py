"""The recipes for published models: each runs to its end on a tiny random network of the same class, its own keys as they are."""

import json

import pytest
import torch
from toy_backbones import MASK, make_network
from transformers import TrainerState

from modeling_mcd import as_masked_diffusion
from modeling_mcd.convert_checkpoints import convert
from modeling_mcd.loading import load_model
from trainers import run_mcd
from trainers.character_tokenizer import character_tokenizer
from trainers.runs.recipe import RECIPE_FOLDER


# Recipe -> the network of transformers that its teacher is, and its shift.
RECIPES = {
    "llada_dscd": ("llama", 0),
    "llada_mcd_lora": ("llama", 0),
    "dream_mcd_lora": ("qwen2", 1),
    "a2d_qwen3_0.6b_mcd": ("qwen3", 0),
    "modernbert_mcd": ("modernbert", 0),
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }} {% generation %}{{ message['content'] }}{% endgeneration %} {% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
SMALL = {
    **{"block_length": 32, "steps_per_round": 2, "max_steps": 3, "warmup_steps": 0, "bf16": "false"},
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 3},
    **{"disable_tqdm": "true", "dataset_config": "null"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_published_model_runs(name, tmp_path, capsys):
    kind, shift = RECIPES[name]
    network = make_network(kind, dtype=torch.float32)
    tokenizer = character_tokenizer(model_max_length=32)
    tokenizer.chat_template = TEMPLATE
    as_masked_diffusion(network, MASK, shift).save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "teacher")
    rows = [(f"{a} and {b}", "so it is " * (1 + ord(a) % 2)) for a in "abcdefgh" for b in "xy"]
    text = RECIPE_FOLDER / f"{name}.yaml"
    if "question" in text.read_text():
        lines = [{"question": question, "answer": answer} for question, answer in rows]
    else:
        lines = [
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            for question, answer in rows
        ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = SMALL | {"teacher": tmp_path / "teacher", "tokenizer": tmp_path / "teacher"}
    settings |= {"train_text": tmp_path / "text.jsonl", "output_dir": tmp_path / "run"}
    settings |= {"lora_r": 2, "lora_alpha": 2} if "lora" in name else {}
    run_mcd.main([str(text), *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])
    state = TrainerState.load_from_json(tmp_path / "run" / "checkpoint-3" / "trainer_state.json")
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    student, teacher = load_model(tmp_path / "run"), load_model(tmp_path / "teacher")
    assert student.config.logits_shift == shift
    changed = [n for n, p in student.named_parameters() if not torch.equal(p, teacher.get_parameter(n))]
    assert changed and ("lora" not in name or all("proj" in n for n in changed))
