"""Rounds the tiny teacher and judge to bfloat16 for shipping, and writes their validation figures after the rounding.

python -m benchmarks.tiny_assets RUN_OF_TEACHER RUN_OF_JUDGE OUT VALIDATION_TEXT
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import modeling_mcd  # noqa: F401  (registers the model)
from evaluation import EvaluationProtocol, causal_loss, evaluate_model, read_texts, text_blocks, validation_nelbo


def main(teacher_run: str, judge_run: str, out: str, validation: str):
    out = Path(out)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    blocks = text_blocks(read_texts(validation), tokenizer, tokenizer.model_max_length, 512)
    models = {}
    for name, auto_class, run in (("teacher", AutoModel, teacher_run), ("judge", AutoModelForCausalLM, judge_run)):
        auto_class.from_pretrained(run, dtype=torch.bfloat16).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        for code in (out / name).glob("*.py"):  # the package beside it is what the shipped weights are loaded with
            code.unlink()
        models[name] = auto_class.from_pretrained(out / name, dtype=torch.float32).eval()
    nelbo, loss = validation_nelbo(models["teacher"], blocks), causal_loss(models["judge"], blocks)
    print(f"NELBO {nelbo:.4f}, judge's loss {loss:.4f} nats per character", flush=True)
    protocol = EvaluationProtocol(models["judge"], tokenizer, samples=48, seeds=1, entropy_unit="words", batch_size=48)
    by_steps = {
        row["steps"]: {name: row[name] for name in ("judge_nll", "entropy", "distinct_3", "nfe")}
        for row in evaluate_model("teacher", models["teacher"], tokenizer, protocol, [8, 32, 128])
    }
    figures = {
        "teacher_nelbo_nats_per_character": nelbo,
        "teacher_nelbo_bits_per_character": nelbo / math.log(2),
        "judge_loss_nats_per_character": loss,
        "nelbo_over_judge_loss": nelbo / loss,
        "teacher_parameters": models["teacher"].num_parameters(),
        "judge_parameters": models["judge"].num_parameters(),
        "validation_blocks": len(blocks),
        "samples_for_each_number_of_steps": protocol.samples,
        "teacher_by_steps": by_steps,
        "judge_nll_8_steps_above_128_steps": by_steps[8]["judge_nll"] - by_steps[128]["judge_nll"],
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
