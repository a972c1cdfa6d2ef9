"""What the caches of `generate` save, and what the approximate ones change.

    python -m benchmarks.block_cache                    # two minutes of a CPU core
    python -m benchmarks.block_cache --hidden_size 1024 --layers 28 --length 1024 --device cuda --dtype bfloat16

Speed: a Qwen3 of random weights fills a canvas block by block, as a block model without a cache and with the exact one, and
as a network in which every token sees every other without a cache and with the two approximate ones. Medians of `--repeats`
runs of every side in turn, after one that warms up: seconds of the processor, so that others on the machine do not count,
and on a GPU seconds of the clock. Tokens computed are those that the trunk ran on, over all forwards.

Distribution: a trained model, the tiny teacher, under the approximate caches. The N-step bound of the sampler with its cache
on held-out text, in nats per token, minus that of the same sampler without, paired by block; and the share of the tokens
of samples that stay the same under the same seed.

Writes `benchmarks/results/block_cache.json` and `block_cache.md`.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.measuring import count, synchronize, write_result
from evaluation import read_texts, step_bound, text_blocks
from modeling_mcd import as_masked_diffusion
from modeling_mcd.cache_mdlm import APPROXIMATE
from modeling_mcd.loading import load_model


VOCABULARY = 32768
SIDES = {"block": ("none", "exact"), "full": ("none", *APPROXIMATE)}  # attention -> its caches


def random_model(options: argparse.Namespace, attention: str):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=options.length,
        tie_word_embeddings=True,
    )
    network = Qwen3ForCausalLM(config).eval().to(options.device, getattr(torch, options.dtype))
    blocks = {"attention": "block", "block_size": options.block} if attention == "block" else {}
    return as_masked_diffusion(network, VOCABULARY - 1, **blocks)


def speed(options: argparse.Namespace) -> list[dict]:
    rows, clock = [], time.process_time if options.device == "cpu" else time.perf_counter
    for attention, caches in SIDES.items():
        model = random_model(options, attention)
        times, outputs = {cache: [] for cache in caches}, {}
        for repeat in range(options.repeats + 1):
            for cache in caches:
                start = clock()
                outputs[cache] = model.generate(
                    length=options.length,
                    block_length=options.block,
                    steps=options.steps,
                    cache=cache,
                    seed=0,
                    return_dict_in_generate=True,
                )
                synchronize()
                if repeat:
                    times[cache].append(clock() - start)
        plain = statistics.median(times["none"])
        for cache in caches:
            output, seconds = outputs[cache], statistics.median(times[cache])
            row = {
                "attention": attention,
                "cache": cache,
                "seconds": seconds,
                "times_as_fast": plain / seconds,
                "forwards": output.nfe.item(),
                "tokens_computed": output.computed.item(),
                "same_tokens": (output.sequences == outputs["none"].sequences).double().mean().item(),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def distribution(options: argparse.Namespace) -> list[dict]:
    model, tokenizer = load_model(options.model).eval(), AutoTokenizer.from_pretrained(options.model)
    length = model.config.max_position_embeddings
    text, rows = text_blocks(read_texts(options.text), tokenizer, length, options.blocks), []
    for steps in options.bound_steps:
        shared = {"steps": steps, "block_length": options.block, "locking": "spread", "seed": 0}
        bounds, samples = {}, {}
        for cache in ("none", *APPROXIMATE):
            bounds[cache] = step_bound(model, text, cache=cache, batch_size=8, **shared)
            samples[cache] = model.generate(num_return_sequences=options.samples, cache=cache, **shared)
            difference, error = bounds[cache].minus(bounds["none"])
            row = {
                "steps": steps,
                "cache": cache,
                "bound": bounds[cache].mean,
                "more": difference,
                "standard_error": error,
                "same_tokens": (samples[cache] == samples["none"]).double().mean().item(),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def table(content: dict) -> str:
    options = content["settings"]
    lines = [
        f"A Qwen3 of random weights, {options['layers']} layers of {options['hidden_size']}, {options['dtype']} on "
        f"{options['device']}: {options['length']} tokens in blocks of {options['block']}, {options['steps']} steps each.",
        "",
        "| attention | cache | seconds | times as fast | forwards | tokens computed | tokens as without |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in content["speed"]:
        lines.append(
            f"| {row['attention']} | {row['cache']} | {row['seconds']:.2f} | {row['times_as_fast']:.2f} | {row['forwards']} | "
            f"{row['tokens_computed']:,} | {row['same_tokens']:.1%} |"
        )
    lines += [
        "",
        f"{options['model']}, blocks of {options['block']}, spread locking: the bound on {options['blocks']} held-out blocks, "
        f"nats per token, and {options['samples']} samples under one seed.",
        "",
        "| steps a block | cache | bound | more than without | tokens as without |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in content["distribution"]:
        error = "" if row["cache"] == "none" else f"{row['more']:+.4f} ± {row['standard_error']:.4f}"
        lines.append(f"| {row['steps']} | {row['cache']} | {row['bound']:.4f} | {error} | {row['same_tokens']:.1%} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden_size", type=count, default=256)
    parser.add_argument("--layers", type=count, default=4)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--block", type=count, default=32)
    parser.add_argument("--steps", type=count, default=8, help="Of each block.")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", default="recipes/tiny/teacher")
    parser.add_argument("--text", default="recipes/tiny/text/validation")
    parser.add_argument("--blocks", type=count, default=8)
    parser.add_argument("--bound_steps", type=count, nargs="+", default=[2, 4])
    parser.add_argument("--samples", type=count, default=4)
    parser.add_argument("--output", help="The result file; under benchmarks/results/ by default.")
    options = parser.parse_args(arguments)
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    content = {"speed": speed(options), "distribution": distribution(options), "settings": settings}
    path = Path(options.output or Path(__file__).parent / "results" / "block_cache.json")
    write_result("block_cache", content, path)
    path.with_suffix(".md").write_text(table(content), encoding="utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
