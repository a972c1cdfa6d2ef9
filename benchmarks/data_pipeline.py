"""Tokens per second of everything that feeds a training, beside what the training takes, and the memory that it needs.

    python -m benchmarks.data_pipeline                               # 1 GB of synthetic text; half an hour on two cores
    python -m benchmarks.data_pipeline --megabytes 20 --processes 1

A corpus of words with the frequencies of recipes/bible/text is written as one file, then each side runs in a process of its own:

    tokenise N    blocks into an empty cache, by N processes
    stream        batches of blocks that are tokenised as they are read, with a shuffle buffer
    blocks        batches of the cached blocks in a random order, memory-mapped, through the collator
    ids           the same of rows of token ids that are used as they are, the look at each of them included
    training      what MDLM takes: steps of a small network on this machine

`peak_megabytes` is the most that one process held, imports included; `imports_megabytes` what they are. Ratios are to
`training`. The hours for 10^13 tokens are those of one process that tokenises. Writes `benchmarks/results/data_pipeline.json`.
"""

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy
import torch
from transformers import AutoTokenizer

from benchmarks.measuring import in_its_own_process, write_result
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.batches import collate_blocks
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks


MODULE = "benchmarks.data_pipeline"
ROOT = Path(__file__).resolve().parent.parent
BATCH, STEPS = 4, 3
TEXT = ROOT / "recipes" / "bible" / "text" / "train"


def write_corpus(file: Path, megabytes: float):
    """Sentences and paragraphs of words drawn independently with the frequencies that they have in recipes/bible/text."""
    draw = numpy.random.default_rng(0)
    counts = Counter(re.findall(r"[a-z']+", " ".join(part.read_text() for part in sorted(TEXT.iterdir())).lower()))
    words, shares = numpy.array(list(counts), dtype=object), numpy.array(list(counts.values())) / counts.total()
    ends = numpy.array([" ", ". ", ".\n\n"], dtype=object)
    with file.open("w") as opened:
        while opened.tell() < megabytes * 1e6:
            size = 20_000
            opened.write("".join(draw.choice(words, size, p=shares) + draw.choice(ends, size, p=(0.93, 0.063, 0.007))))


def peak() -> float:
    """MB that this process, or one of its children, has held at most."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def measure(side: str, options: argparse.Namespace) -> dict:
    tokenizer, imports = AutoTokenizer.from_pretrained(options.tokenizer), peak()
    text = {"train_text": options.text, "block_length": options.block_length}
    start = time.perf_counter()
    if side == "tokenise":
        rows, _ = load_blocks(TextArguments(**text, num_proc=options.processes[0]), tokenizer)
        tokens = len(rows) * options.block_length
    elif side == "training":
        tokens, start = train(tokenizer, options)
    else:
        if side == "stream":
            rows, _ = load_blocks(TextArguments(**text, streaming=True, shuffle_buffer=1000), tokenizer)
        else:
            rows, _ = load_blocks(TextArguments(**text), tokenizer)
            if side == "ids":
                rows.save_to_disk(f"{options.text}.ids")
                start = time.perf_counter()
                rows, _ = load_blocks(
                    TextArguments(f"{options.text}.ids", block_length=options.block_length), tokenizer
                )
        loader = torch.utils.data.DataLoader(
            rows, BATCH, shuffle=None if side == "stream" else True, collate_fn=collate_blocks
        )
        tokens = sum(batch["input_ids"].numel() for batch in islice(loader, options.batches))
    seconds = time.perf_counter() - start
    return {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "peak_megabytes": round(peak()),
        "imports_megabytes": round(imports),
    }


def train(tokenizer, options: argparse.Namespace) -> tuple[int, float]:
    """Tokens of `STEPS` steps of training, and when they began: after two more."""
    shape = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers, "num_attention_heads": 4}
    model = MDLMForMaskedDiffusion(
        MDLMConfig(
            vocab_size=len(tokenizer), max_position_embeddings=options.block_length, conditioning_size=32, **shape
        )
    )
    rows = [{"input_ids": torch.randint(4, 400, (options.block_length,)).tolist()} for _ in range(BATCH * (STEPS + 2))]
    settings = {"per_device_train_batch_size": BATCH, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    began = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = MDLMTrainer(
            model, MDLMTrainingArguments(output_dir=folder, max_steps=STEPS + 2, **settings), train_dataset=rows
        )
        step = trainer.training_step
        trainer.training_step = lambda *words: (began.append(time.perf_counter()), step(*words))[1]
        trainer.train()
    return STEPS * BATCH * options.block_length, began[2]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(MODULE)
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--block_length", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=400, help="batches that the sides which read take")
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer", default=str(ROOT / "recipes" / "bible" / "tokenizer"))
    parser.add_argument("--output", help="where the JSON goes")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    words = [
        f"--{name}={getattr(options, name)}"
        for name in ("block_length", "batches", "hidden_size", "layers", "tokenizer")
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "corpus.txt")
        write_corpus(file, options.megabytes)
        runs = {"training": [1], "tokenise": options.processes, "stream": [1], "blocks": [1], "ids": [1]}
        results = {}
        for side, counts in runs.items():
            for count in counts:
                name = f"{side} {count}" if side == "tokenise" else side
                cache = Path(folder, f"cache-{count}" if side == "tokenise" else f"cache-{options.processes[-1]}")
                environment = {"HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
                environment["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
                more = ["--side", side, "--text", str(file), "--processes", str(count)]
                results[name] = in_its_own_process(MODULE, *words, *more, environment=environment)
                rate = results[name]["tokens_per_second"]
                results[name]["ratio"] = round(rate / results["training"]["tokens_per_second"], 2)
                print(f"{name:12} {json.dumps(results[name])}", file=sys.stderr, flush=True)
    settings = {
        name: getattr(options, name) for name in ("megabytes", "block_length", "hidden_size", "layers", "batches")
    }
    first = results[f"tokenise {options.processes[0]}"]["tokens_per_second"] / options.processes[0]
    content = {"settings": settings, "sides": results, "process_hours_for_1e13_tokens": round(1e13 / first / 3600)}
    write_result("data_pipeline", content, options.output)
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
