"""What a small teacher is worth: NELBO, its judge's loss, and texts at several numbers of steps; rounds both for shipping.

    python -m benchmarks.teacher_report RUN --judge RUN_OF_JUDGE --validation_text recipes/bible/text/validation --ship recipes/bible

All is measured after rounding to bfloat16. Writes `figures.json` into the folder of `--ship`, or prints it.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import modeling_mcd  # noqa: F401 - registers the model with the Auto classes
from benchmarks.measuring import count
from evaluation import causal_loss, read_texts, text_blocks, validation_nelbo
from modeling_mcd.command_line import one_line_errors
from modeling_mcd.files import write_json


def rounded(auto_class: type, source: str, tokenizer, ship: Path | None):
    """The network in float32 with its weights rounded to bfloat16, which are saved into `ship` first if it is given."""
    model = auto_class.from_pretrained(source, dtype=torch.bfloat16)
    if ship is not None:
        model.save_pretrained(ship)
        tokenizer.save_pretrained(ship)
        for code in ship.glob("*.py"):  # the package beside it is what the shipped weights are loaded with
            code.unlink()
        config = json.loads((ship / "config.json").read_text())
        config.pop("auto_map", None)
        write_json(ship / "config.json", config)
    return model.float().eval()


def figures_of(teacher, judge, tokenizer, texts: list[str], count: int) -> dict[str, float | int]:
    """Validation figures over at most `count` blocks of the teacher's context."""
    length = teacher.config.max_position_embeddings
    blocks = text_blocks(texts, tokenizer, length, count)
    nelbo = validation_nelbo(teacher, blocks)
    characters = sum(len(tokenizer.decode(block)) for block in blocks[:, 1:-1])
    of_character = (blocks.shape[1] - 2) * len(blocks) / characters
    figures = {
        "nelbo_nats_per_token": nelbo,
        "nelbo_nats_per_character": nelbo * of_character,
        "teacher_parameters": teacher.num_parameters(),
        "validation_blocks": len(blocks),
        "block_length": length,
    }
    if judge is not None:
        loss = causal_loss(judge, blocks)
        figures |= {
            "judge_loss_nats_per_token": loss,
            "judge_loss_bits_per_character": loss * of_character / math.log(2),
            "judge_parameters": judge.num_parameters(),
            "nelbo_over_judge_loss": nelbo / loss,
        }
    return figures


def texts_of(teacher, tokenizer, steps: list[int], temperatures: list[float], lockings: list[str], samples: int):
    """Yields one entry for each way to sample: the same seeds, so the same noise, for all."""
    for locking in lockings:
        for n in steps:
            for temperature in temperatures:
                ids = teacher.generate(
                    num_return_sequences=samples,
                    steps=n,
                    temperature=temperature,
                    locking=locking,
                    seed=list(range(samples)),
                )
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                yield {"steps": n, "temperature": temperature, "locking": locking, "texts": texts}


@one_line_errors
@torch.no_grad()
def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="Folder of the teacher, or of its run.")
    parser.add_argument("--judge", help="Folder of the autoregressive model with the same tokenizer.")
    parser.add_argument("--validation_text", required=True, help="Held-out text.")
    parser.add_argument("--blocks", type=count, default=192, help="Blocks of held-out text.")
    parser.add_argument("--steps", type=count, nargs="+", default=[8, 16])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8])
    parser.add_argument("--lockings", nargs="+", default=["independent", "spread"])
    parser.add_argument("--samples", type=count, default=2, help="Texts for each way to sample.")
    parser.add_argument("--ship", help="Save teacher/, judge/ and figures.json here.")
    options = parser.parse_args(arguments)
    ship = None if options.ship is None else Path(options.ship)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = rounded(AutoModel, options.teacher, tokenizer, ship and ship / "teacher")
    judge = options.judge and rounded(AutoModelForCausalLM, options.judge, tokenizer, ship and ship / "judge")
    figures = figures_of(teacher, judge, tokenizer, read_texts(options.validation_text), options.blocks)
    print(json.dumps(figures, indent=2), flush=True)
    samples = []
    for entry in texts_of(teacher, tokenizer, options.steps, options.temperatures, options.lockings, options.samples):
        samples.append(entry)
        print(json.dumps(entry, ensure_ascii=False), flush=True)
    if ship is not None:
        write_json(ship / "figures.json", {**figures, "samples": samples})


if __name__ == "__main__":
    main()
