"""Every kind of bad input, as one table: each ends in one line that names what is wrong, and leaves no file behind.

    python tests/bad_input.py [ROOM ...] [--list]

A case is a call that must be refused, and the words that its message must hold: the field, file or row at fault and its
value. Allowed are ValueError, an error of a missing file, and an exit of the command line with one line on standard error;
any other exception (TypeError, KeyError, IndexError, ...) fails the case, and so does a call that is accepted, a message of
several lines, or a file that is there afterwards and was not before, or has changed. Types of `MDLMConfig` are checked by
transformers itself, whose StrictDataclassError takes two lines.

Prints the number of cases of each room and every failure; exits with status 1 when there is one.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import conftest  # noqa: E402, F401 - no network and an empty Hugging Face home, before anything is imported
import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from chat import chat_tokenizer, talk  # noqa: E402
from datasets import Dataset  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from small_model import MASK  # noqa: E402
from tiny_run import BLOCK, reverse_letters, save_judge, write_inputs  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from evaluation import (  # noqa: E402
    EvaluationProtocol,
    causal_loss,
    distinct_n,
    generative_perplexity,
    known_words,
    load_report,
    read_texts,
    save_results,
    sequence_nll,
    text_blocks,
    unigram_entropy,
    validation_nelbo,
)
from evaluation.judge import load_judge  # noqa: E402
from evaluation.run_eval import main as run_eval  # noqa: E402
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion, MDLMGenerationConfig  # noqa: E402
from modeling_mcd.convert_checkpoints import convert  # noqa: E402
from modeling_mcd.convert_checkpoints import main as convert_main  # noqa: E402
from modeling_mcd.head_mdlm import HeadRows  # noqa: E402
from modeling_mcd.loading import load_model  # noqa: E402
from modeling_mcd.noise_schedule_mdlm import CosineSchedule, LogLinearSchedule  # noqa: E402
from trainers import (  # noqa: E402
    DCDTrainingArguments,
    DSCDTrainingArguments,
    MCDTrainer,
    MCDTrainingArguments,
    MDLMTrainer,
    MDLMTrainingArguments,
    MPDCTrainingArguments,
    SDTTTrainingArguments,
    run_judge,
    run_mcd,
    run_mdlm,
)
from trainers.batches import collate_blocks  # noqa: E402
from trainers.character_tokenizer import character_tokenizer  # noqa: E402
from trainers.divergences import cross_entropy, divergence, divergence_from_token  # noqa: E402
from trainers.runs.inputs import TokenizerArguments, load_run_tokenizer  # noqa: E402
from trainers.runs.text_arguments import TextArguments  # noqa: E402
from trainers.runs.text_blocks import load_blocks  # noqa: E402


DATA = Path(__file__).parent / "data"
NAN, INFINITY = float("nan"), float("inf")
SHAPES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPES |= {"conditioning_size": 16, "max_position_embeddings": BLOCK, "bos_token_id": 46, "eos_token_id": 46}


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        label: what is bad, in a few words.
        call: what must be refused; it is given an empty folder of its own.
        words: what the message must hold; `{folder}` is that folder.
        build: writes bad files into the folder before the call.
    """

    label: str
    call: Callable[[Path], object]
    words: tuple[str, ...]
    build: Callable[[Path], object] | None = None


ROOMS: dict[str, Callable[["World"], list[Case]]] = {}


def room(name: str):
    def register(cases_of: Callable[["World"], list[Case]]):
        ROOMS[name] = cases_of
        return cases_of

    return register


class World:
    """Good inputs, made once: a tiny model of each kind, its tokenizer and text on disk, a judge."""

    def __init__(self, folder: Path):
        self.folder = write_inputs(folder)
        self.teacher, self.tokenizer_folder, self.text = (
            folder / name for name in ("teacher", "tokenizer", "text.txt")
        )
        self.judge_folder = save_judge(folder / "judge")
        self.tokenizer = character_tokenizer(BLOCK)
        self.model = MDLMForMaskedDiffusion(MDLMConfig(**SHAPES)).eval()
        self.uniform = MDLMForMaskedDiffusion(MDLMConfig(**SHAPES, diffusion_kind="uniform")).eval()
        self.judge, self.judge_tokenizer = load_judge(str(self.judge_folder))


def says(value) -> str:
    """A value as messages write it."""
    return f"{value}"


def fields(call: Callable, table: dict[str, list], **base) -> list[Case]:
    """One case for each value of each keyword; the message must hold the keyword and the value."""
    return [
        Case(f"{name}={value!r}", lambda _, name=name, value=value: call(**base | {name: value}), (name, says(value)))
        for name, values in table.items()
        for value in values
    ]


# --- The model


@room("configuration")
def configuration(world: World) -> list[Case]:
    counts = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "conditioning_size",
        "max_position_embeddings",
    )
    cases = fields(
        MDLMConfig,
        {
            "vocab_size": [0, -1, "many", 2.5, True],
            **{name: [0, -4] for name in counts},
            "intermediate_size": [0, -4, 1.5],
            "hidden_dropout": [-0.1, 1.0, 1.5, NAN],
            "layer_norm_eps": [-1e-5, NAN, INFINITY],
            "rope_theta": [0.0, -1.0, NAN, INFINITY],
            "initializer_range": [-0.02, NAN, INFINITY],
            "rotary_precision": ["double"],
            "diffusion_kind": ["gaussian"],
            "time_conditioning": ["yes"],
            "noise_schedule": ["linear"],
            "noise_epsilon": [0.0, 1.0, 2.0, -1.0, NAN, "small"],
            "mask_token_id": [48, -1, "[MASK]"],
            "bos_token_id": [48, -1],
            "eos_token_id": [48, -1],
            "pad_token_id": [48, -1],
            "hiden_size": [64],
            "noise_eps": [1e-3],
            "num_layers": [3],
        },
        **SHAPES,
    )
    cases += [
        Case("heads do not divide the width", lambda _: MDLMConfig(**SHAPES | {"num_attention_heads": 3}),
             ("hidden_size (32)", "num_attention_heads (3)")),
        Case("an odd width of a head", lambda _: MDLMConfig(**SHAPES | {"num_attention_heads": 32}),
             ("hidden_size (32)", "num_attention_heads (32)")),
        Case("a mask under uniform noise", lambda _: MDLMConfig(**SHAPES, diffusion_kind="uniform", mask_token_id=5),
             ("mask_token_id", "5", "uniform")),
        Case("one of several EOS outside", lambda _: MDLMConfig(**SHAPES | {"eos_token_id": [46, 99]}),
             ("eos_token_id", "99")),
    ]  # fmt: skip
    return cases


@room("noise schedules")
def noise_schedules(world: World) -> list[Case]:
    return [
        Case(f"{schedule.__name__}({epsilon})", lambda _, s=schedule, e=epsilon: s(e), ("epsilon", says(epsilon)))
        for schedule in (LogLinearSchedule, CosineSchedule)
        for epsilon in (0.0, 1.0, 2.0, -1.0, NAN)
    ]


@room("forward")
def forward(world: World) -> list[Case]:
    model, ids = world.model, torch.randint(0, 46, (2, 8), generator=torch.Generator().manual_seed(0))

    def refuse(label, *words, network=model, **inputs):
        inputs = {"input_ids": ids} | inputs
        return Case(label, lambda _: network(**inputs), words)

    timed = MDLMForMaskedDiffusion(MDLMConfig(**SHAPES, time_conditioning=True)).eval()
    mask = torch.zeros(2, 8, dtype=torch.bool)
    return [
        refuse("nothing", "input_ids", "inputs_embeds", input_ids=None),
        refuse("ids and embeddings", "input_ids", "inputs_embeds", inputs_embeds=torch.zeros(2, 8, 32)),
        refuse("longer than the context", "33", "32", input_ids=torch.zeros(1, 33, dtype=torch.long)),
        refuse("embeddings longer than the context", "33", "32", input_ids=None, inputs_embeds=torch.zeros(1, 33, 32)),
        refuse("labels of another length", "labels", "(2, 7)", labels=ids[:, 1:]),
        refuse("labels of another batch", "labels", "(1, 8)", labels=ids[:1]),
        refuse("a label outside the vocabulary", "labels", "48", labels=torch.full_like(ids, 48)),
        refuse("a negative label", "labels", "-5", labels=torch.full_like(ids, -5)),
        refuse("an index outside", "hidden_rows", "16", hidden_rows=torch.tensor([16])),
        refuse("a negative index outside", "hidden_rows", "-17", hidden_rows=torch.tensor([-17])),
        refuse("a mask of another shape", "hidden_rows", "(2, 7)", hidden_rows=mask[:, 1:]),
        refuse("a mask of another batch", "hidden_rows", "(1, 8)", hidden_rows=mask[:1]),
        refuse("rows that are no indices", "hidden_rows", "float", hidden_rows=torch.zeros(3)),
        refuse("labels and rows", "labels", "hidden_rows", labels=ids, hidden_rows=mask),
        refuse("attentions under sdpa", "output_attentions", "eager", "sdpa", output_attentions=True),
        Case(
            "a position of the trunk outside",
            lambda _: model.model(ids, hidden_rows=torch.tensor([[8], [0]])),
            ("hidden_rows", "8"),
        ),
        Case(
            "positions of another batch",
            lambda _: model.model(ids, hidden_rows=torch.tensor([[0]])),
            ("hidden_rows", "(1, 1)"),
        ),
        refuse("a list for rows", "hidden_rows", "[0, 1]", hidden_rows=[0, 1]),
        refuse("no noise level", "timesteps", network=timed),
        refuse("as many noise levels as tokens", "timesteps", "(2, 8)", network=timed, timesteps=torch.zeros(2, 8)),
        refuse("three noise levels for two rows", "timesteps", "(3,)", network=timed, timesteps=torch.zeros(3)),
        refuse("ids that are floats", "input_ids", "float", input_ids=ids.float()),
        refuse("one row without a batch", "input_ids", "(8,)", input_ids=ids[0]),
        refuse("an attention mask of another width", "attention_mask", "(2, 7)", attention_mask=torch.ones(2, 7)),
    ]


# --- generate


BAD_OPTIONS = {
    **{
        name: [0, -1, 2.5, "4", True, NAN]
        for name in (
            "steps",
            "length",
            "block_length",
            "num_return_sequences",
            "top_k",
            "min_tokens",
            "max_tokens",
            "max_steps",
            "suppress_above",
        )
    },
    **{
        name: [-1, NAN, INFINITY, "hot", True]
        for name in ("temperature", "order_temperature", "entropy_bound", "guidance_scale")
    },
    **{name: [-0.1, 1.1, NAN, "half"] for name in ("threshold", "eta", "kappa")},
    **{name: [0, 1, NAN, "late"] for name in ("t_on", "t_off", "alpha_on")},
    "top_p": [0, 1.5, NAN, "most"],
    "eos_after": [-0.1, 1, NAN, "late"],
    **{name: ["best", 3] for name in ("sampler", "locking", "last_step", "remasking", "order", "precision")},
    **{name: ["yes", 2] for name in ("stop_at_eos", "return_dict_in_generate", "output_reveal_steps", "compile")},
    "suppress_tokens": [3, "ab", [1.5], [True]],
    "reveal_counts": [
        3,
        [1.0],
        {"two": [1.0]},
        {"2": [1.0]},
        {"2": [0.5, 0.5]},
        {"2": [0.5, 0.9]},
        {"2": [True, 1.0]},
    ],
}


@room("generate")
def generate(world: World) -> list[Case]:
    ids = torch.full((2, 8), MASK)
    cases = fields(
        lambda **options: world.model.generate(**{"steps": 2, "length": 8} | options),
        BAD_OPTIONS | {"seed": [-1, 2.5, "one", 2**64, [0, "a"]]},
    )

    def refuse(label, *words, network=None, **options):
        options = {"steps": 2, "length": 8} | options
        options = {name: value for name, value in options.items() if value is not None}
        return Case(label, lambda _: (network or world.model).generate(**options), words)

    cases += [
        refuse("a misspelt option", "stepz", stepz=4),
        refuse("an option of other models", "num_beams", num_beams=4),
        refuse("a token to suppress outside", "suppress_tokens", "48", suppress_tokens=[48]),
        refuse("a negative token to suppress", "suppress_tokens", "-1", suppress_tokens=[-1]),
        refuse("a list for input_ids", "input_ids", "[[1, 2]]", input_ids=[[1, 2]]),
        refuse("floats for input_ids", "input_ids", input_ids=ids.float()),
        refuse("one row without a batch", "input_ids", "(8,)", input_ids=ids[0]),
        refuse("no row", "input_ids", "(0, 8)", input_ids=ids[:0]),
        refuse("three dimensions", "input_ids", "(2, 8, 1)", input_ids=ids[..., None]),
        refuse("an id outside", "input_ids", "48", input_ids=torch.full((1, 4), 48)),
        refuse("a negative id", "input_ids", "-1", input_ids=torch.full((1, 4), -1)),
        refuse("no mask to fill", "input_ids", "mask", "47", input_ids=torch.zeros(1, 8, dtype=torch.long)),
        refuse("wider than the length", "input_ids", "8", "length is 4", input_ids=ids, length=4),
        refuse("a list for attention_mask", "attention_mask", input_ids=ids, attention_mask=[[1] * 8] * 2),
        refuse("another shape", "attention_mask", "(2, 7)", input_ids=ids, attention_mask=torch.ones(2, 7)),
        refuse("longer than the context", "length is 33", "32", length=33),
        refuse("blocks longer than the context", "block_length is 64", "32", block_length=64, length=64),
        refuse("too few seeds", "seed", "1", "2", seed=[3], input_ids=ids),
        refuse("seed and generator", "seed", "generator", seed=3, generator=torch.Generator()),
        refuse("a number for a generator", "generator", "3", generator=3),
        refuse("guidance without a prompt", "guidance_scale (2.0)", "prompt", guidance_scale=2.0),
        refuse("reveal steps without their place", "output_reveal_steps", output_reveal_steps=True),
        refuse("EOS outside", "eos_token_id", "99", stop_at_eos=True, eos_token_id=99),
        refuse("EOS that is the mask", "eos_token_id", "47", stop_at_eos=True, eos_token_id=47),
        refuse("padding outside", "pad_token_id", "-3", stop_at_eos=True, pad_token_id=-3),
        refuse("nothing left to draw", "suppress_tokens", suppress_tokens=list(range(47))),
        refuse("min above max", "min_tokens (3)", "max_tokens (2)", sampler="adaptive", steps=None, min_tokens=3, max_tokens=2),
        refuse("eta under confidence", "eta (0.5)", sampler="remdm", remasking="confidence", eta=0.5),
        refuse("t_on without loop", "t_on (0.5)", "loop", sampler="remdm", t_on=0.5),
        refuse("t_off above t_on", "t_off (0.5)", "t_on (0.2)", sampler="remdm", remasking="loop", t_on=0.2, t_off=0.5),
        refuse("legacy with an order", "sampler", "legacy_float32", sampler="random", precision="legacy_float32"),
        refuse("legacy with top_k", "top_k", "legacy_float32", top_k=3, precision="legacy_float32"),
        refuse("legacy with top_p", "top_p", "legacy_float32", top_p=0.5, precision="legacy_float32"),
        refuse("legacy and greedy", "temperature", "legacy_float32", temperature=0, precision="legacy_float32"),
        refuse("threshold without adaptive", "threshold (0.5)", "ancestral", threshold=0.5),
        refuse("kappa without psi", "kappa (0.5)", "random", sampler="random", kappa=0.5),
        refuse("a locking of confidence", "locking ('spread')", "confidence", sampler="confidence", locking="spread"),
        refuse("interleaved in random order", "locking 'interleaved'", "random", sampler="random", locking="interleaved"),
        refuse("interleaved counts", "reveal_counts", "interleaved", locking="interleaved", reveal_counts={"2": [0.5, 1.0]}),
        refuse("a last step after interleaved", "last_step", "greedy", locking="interleaved", last_step="greedy"),
        refuse("counts of first_hitting", "reveal_counts", "first_hitting", sampler="first_hitting", steps=None, reveal_counts={}),
        refuse("legacy with a locking", "locking", "legacy_float32", locking="spread", precision="legacy_float32"),
        refuse("steps of first_hitting", "steps (2)", "first_hitting", sampler="first_hitting"),
        refuse("a uniform model by confidence", "sampler", "confidence", network=world.uniform, sampler="confidence"),
        refuse("a uniform model, guided", "guidance_scale", network=world.uniform, guidance_scale=2.0),
        refuse("a uniform model, legacy", "precision", "legacy", network=world.uniform, precision="legacy_float32"),
        refuse("a full prompt of a uniform model", "input_ids", "8", network=world.uniform, input_ids=torch.ones(1, 8, dtype=torch.long)),
        refuse("a configuration of transformers", "generation_config", "GenerationConfig", generation_config=GenerationConfig()),
        refuse("a mapping for a configuration", "generation_config", "dict", generation_config={"steps": 4}),
        refuse("a number for a processor", "logits_processor", "3", logits_processor=3),
        refuse("a number for a callback", "callback", "3", callback=3),
        refuse("a streamer that takes no drafts", "streamer", streamer=object()),
    ]  # fmt: skip
    return cases


@room("generation config")
def generation_config(world: World) -> list[Case]:
    def file(content: str):
        return lambda folder: (folder / "generation_config.json").write_text(content)

    cases = fields(MDLMGenerationConfig, {"steps": [0], "top_p": [2.0], "sampler": ["best"]}) + [
        Case("an option of other models", lambda _: MDLMGenerationConfig(num_beams=4), ("num_beams",))
    ]
    for label, content, *words in (
        ("a list", "[]", "generation_config.json"),
        ("cut off", '{"steps": 4', "generation_config.json"),
        ("a number", "3", "generation_config.json"),
        ("a bad value", '{"steps": -4}', "steps", "-4"),
        ("a wrong type", '{"steps": "4"}', "steps", "4"),
        ("an unknown option", '{"stepz": 4}', "stepz"),
    ):

        def build(folder, content=content):
            shutil.copytree(world.teacher, folder / "model")
            file(content)(folder / "model")

        cases.append(Case(f"beside a model: {label}", lambda folder: load_model(str(folder / "model")), words, build))
    return cases


# --- Models on disk


@room("converter and loading")
def loading(world: World) -> list[Case]:
    weights = load_file(world.teacher / "model.safetensors")
    name = "model.norm.weight"

    def changed(**config) -> Callable:
        def build(folder: Path):
            shutil.copytree(world.teacher, folder / "model")
            content = json.loads((folder / "model" / "config.json").read_text())
            (folder / "model" / "config.json").write_text(json.dumps(content | config))

        return build

    def with_file(file: str, content: bytes | str, without: str | None = None) -> Callable:
        def build(folder: Path):
            shutil.copytree(world.teacher, folder / "model")
            if without:
                (folder / "model" / without).unlink()
            content_bytes = content.encode() if isinstance(content, str) else content
            (folder / "model" / file).write_bytes(content_bytes)

        return build

    def with_weights(state: dict) -> Callable:
        def build(folder: Path):
            shutil.copytree(world.teacher, folder / "model")
            save_file(state, folder / "model" / "model.safetensors")

        return build

    def with_pickle(content, file: str = "weights.ckpt") -> Callable:
        def build(folder: Path):
            (folder / "model").mkdir()
            shutil.copy(world.teacher / "config.json", folder / "model")
            torch.save(content, folder / "model" / file)

        return build

    def index(weight_map) -> Callable:
        content = json.dumps({"weight_map": weight_map})
        return with_file("model.safetensors.index.json", content, without="model.safetensors")

    def two_files(folder: Path):
        (folder / "model").mkdir()
        for file in ("a.safetensors", "b.safetensors"):
            save_file(weights, folder / "model" / file)

    def outside(folder: Path):
        index({name: "../secret.safetensors"})(folder)
        save_file(weights, folder / "secret.safetensors")

    def empty(folder: Path):
        (folder / "model").mkdir()

    safetensors = (world.teacher / "model.safetensors").read_bytes()
    cases = []
    for label, build, *words in (
        ("an empty folder", empty, "no weights"),
        ("no such folder", None, "model"),
        ("config.json cut off", with_file("config.json", '{"vocab_size": 4'), "config.json"),
        ("config.json a list", with_file("config.json", "[]"), "config.json", "list"),
        ("config.json not UTF-8", with_file("config.json", b"\xff\xfe"), "config.json"),
        ("weights cut off", with_file("model.safetensors", safetensors[:1000]), "model.safetensors"),
        ("weights empty", with_file("model.safetensors", b""), "model.safetensors"),
        ("a git-lfs pointer", with_file("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
        ("a missing parameter", with_weights({k: v for k, v in weights.items() if k != name}), name, "missing"),
        ("an extra parameter", with_weights(weights | {"extra": torch.zeros(1)}), "extra"),
        ("another shape", with_weights(weights | {name: torch.zeros(7)}), name, "(7,)", "(32,)"),
        ("whole numbers", with_weights(weights | {name: torch.zeros(32, dtype=torch.int8)}), name, "int8"),
        ("a width of 0", changed(hidden_size=0), "hidden_size", "0"),
        ("a width in words", changed(hidden_size="wide"), "hidden_size", "wide"),
        ("no heads", changed(num_attention_heads=0), "num_attention_heads", "0"),
        ("an epsilon of 2", changed(noise_epsilon=2.0), "noise_epsilon", "2.0"),
        ("another type of model", changed(model_type="gpt2"), "gpt2"),
        ("a shard that is a number", index({name: 3}), "index.json", "3"),
        ("a shard in a list", index({name: ["a"]}), "index.json", "a"),
        ("a shard outside the folder", outside, "../secret.safetensors"),
        ("a shard by an absolute path", index({name: "/etc/hostname"}), "/etc/hostname"),
        ("a shard that is missing", index({name: "part-1.safetensors"}), "part-1.safetensors", "missing"),
        ("an index without shards", index({}), "index.json"),
        ("an index that is a list", index([]), "index.json"),
        ("an index cut off", with_file("model.safetensors.index.json", "{", "model.safetensors"), "index.json"),
        ("two files of weights", two_files, "a.safetensors", "b.safetensors"),
        ("a pickle that is none", lambda f: (empty(f), (f / "model" / "weights.ckpt").write_bytes(b"x")), "weights.ckpt"),
        ("a pickle that runs code", with_pickle({"state_dict": partial(print, "code ran")}), "weights.ckpt", "trust"),
        ("a pickle of a list", with_pickle([1, 2]), "weights.ckpt", "list"),
        ("a pickle of a number", with_pickle({"state_dict": 3}), "weights.ckpt", "int"),
        ("a pickle of no tensors", with_pickle({"state_dict": {"a": 3}}), "weights.ckpt", "'a'", "int"),
        ("a name that is a number", with_pickle({"state_dict": {3: torch.zeros(1)}}), "weights.ckpt", "3"),
    ):  # fmt: skip
        cases.append(
            Case(f"load_model: {label}", lambda folder: load_model(str(folder / "model")), (*words, "model"), build)
        )
        cases.append(
            Case(
                f"convert: {label}",
                lambda folder: convert_main([str(folder / "model"), str(folder / "out")]),
                tuple(words),
                build,
            )
        )
    teacher = str(world.teacher)
    cases += [
        Case("a revision of a folder", lambda _: load_model(teacher, revision="main"), ("revision", "main")),
        Case("two revisions", lambda _: load_model("a/b@c", revision="d"), ("'c'", "'d'")),
        Case("an EMA of safetensors", lambda _: load_model(teacher, ema=True), ("EMA", "model.safetensors")),
        Case("another kind", lambda _: load_model(teacher, diffusion_kind="uniform"), ("absorbing", "uniform")),
        Case("an unknown kind", lambda _: load_model(teacher, diffusion_kind="gaussian"), ("gaussian",)),
        Case("a folder that is there", lambda f: convert(teacher, str(f)), ("already there", "{folder}")),
        Case("an unknown layout", lambda f: convert(teacher, str(f / "o"), to="llama"), ("llama",)),
        Case("--to llama", lambda f: convert_main([teacher, str(f / "o"), "--to", "llama"]), ("--to", "llama")),
        Case("--dtype int8", lambda f: convert_main([teacher, str(f / "o"), "--dtype", "int8"]), ("--dtype", "int8")),
        Case("--kind gaussian", lambda f: convert_main([teacher, str(f / "o"), "--kind", "gaussian"]), ("--kind", "gaussian")),
        Case("no OUT", lambda f: convert_main([teacher]), ("OUT",)),
        Case("an unknown option", lambda f: convert_main([teacher, str(f / "o"), "--fast"]), ("--fast",)),
        Case("not a name of the Hub", lambda f: convert_main(["a/b/c/d", str(f / "o")]), ("a/b/c/d",)),
    ]  # fmt: skip
    return cases


# --- Recipes and command lines


TRAINING = {
    "learning_rate": ["nan", -1, 0, "fast", None],
    "weight_decay": ["inf", -1],
    "adam_beta1": [2, -0.1],
    "adam_beta2": [1],
    "adam_epsilon": [-1e-8],
    "max_grad_norm": [-1, "nan"],
    "per_device_train_batch_size": [0, -4, 2.5],
    "gradient_accumulation_steps": [0],
    "dataloader_num_workers": [-1],
    "max_steps": [0, 2.5, "many"],
    "seed": [-1],
    "save_steps": [-5],
    "logging_steps": [-1],
    "warmup_steps": [-1],
    "lr_scheduler_type": ["zigzag"],
    "report_to": ["tensorbord"],
    "optim": ["adamx"],
    "save_strategy": ["sometimes"],
    "block_length": ["long"],
    "max_validation_blocks": [0],
    "train_text": [""],
    "validation_text": [""],
    "learning_rat": [1e-3],
    "tokeniser": ["a"],
}
OF_ENTRY = {
    "run_mcd": {
        "num_rounds": [0],
        "steps_per_round": [0, "ten"],
        "delta": [0, 1.0, "nan"],
        "delta_growth": [0, "nan"],
        "tau": [0, -1, "nan", "cold"],
        "ema_decay": [1, -0.1, "nan"],
        "trainer": ["mcdd"],
        "divergence": ["jeffreys"],
        "reveal": ["all"],
        "reduction": ["some"],
        "teacher_update": ["never"],
        "teacher_ema_decay": [1.5, 0.9],
        "evaluation_steps": [0, [8, -1], "few"],
        "evaluation_samples": [0],
        "evaluation_seeds": [0],
        "evaluation_temperatures": [-1],
        "evaluation_length": [1],
        "convention": ["tokens"],
        "entropy_unit": ["letters"],
        "judge_dtype": ["int8"],
        "anchor_fraction": [0.3],
        "teacher_steps": [4],
        "padding": ["zeros"],
        "loss_norm": ["batch"],
        "evaluation_answer_length": [0, 4],
    },
    "run_mdlm": {
        "num_hidden_layers": [-1, 0, "deep"],
        "num_attention_heads": [0],
        "hidden_size": [0],
        "conditioning_size": [-1],
        "hidden_dropout": ["nan", 1],
        "noise_schedule": ["sigmoid"],
        "diffusion_kind": ["gaussian"],
        "sampling_epsilon": [0, 1, "nan"],
        "ema_decay": [1, "nan"],
        "tau": [0.9],
        "loss_norm": ["rows"],
    },
    "run_judge": {"num_heads": [0, -2], "num_layers": [0], "hidden_size": [0, "wide"], "ema_decay": [0.9]},
}
FAULTY_FILES = {
    "a list": ("- max_steps", "list"),
    "a word": ("max_steps", "str"),
    "cut off": ("max_steps: [1, 2", "YAML"),
    "a tab": ("a:\n\tb: 1", "YAML"),
    "a key twice": ("seed: 1\nseed: 2", "seed", "twice"),
    "not UTF-8": (b"seed: \xff\xfe", "YAML"),
    "a number for a key": ("4: 8", "4"),
    "a list where one value belongs": ("max_steps: [1, 2]", "max_steps", "2"),
    "a mapping where a number belongs": ("max_steps: {a: 1}", "max", "a"),
    "a mapping in a list": ("train_text: [{a: 1}, 2]", "train_text"),
    "a nested list": ("learning_rate: [[1]]", "learning"),
    "an empty list": ("learning_rate: []", "learning_rate", "0"),
    "a switch in words": ("streaming: perhaps", "streaming", "perhaps"),
    "an object of Python": ("seed: !!python/object:os.system 1", "YAML"),
    "two documents": ("seed: 1\n---\nseed: 2", "YAML"),
}  # fmt: skip
ENTRIES = {"run_mcd": run_mcd.main, "run_mdlm": run_mdlm.main, "run_judge": run_judge.main}


@room("recipes")
def recipes(world: World) -> list[Case]:
    base = {"tokenizer": "/nowhere", "train_text": "/nowhere", "block_length": BLOCK}
    cases = []
    for entry, main in ENTRIES.items():
        settings = base | ({"teacher": "/nowhere"} if entry == "run_mcd" else {})

        def run(folder: Path, main=main):
            main([str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), "--disable_tqdm", "true"])

        table = TRAINING if entry == "run_mcd" else {k: TRAINING[k][:1] for k in TRAINING}
        for key, values in (table | OF_ENTRY[entry]).items():
            for value in values:
                content = yaml.safe_dump(settings | {key: value})
                known = key not in ("learning_rat", "tokeniser", "report_to") and key in table | OF_ENTRY[entry]
                foreign = key in ("anchor_fraction", "teacher_steps") or (entry, key) in (
                    ("run_mdlm", "tau"),
                    ("run_judge", "ema_decay"),
                )
                shown = (
                    says(value[-1] if isinstance(value, list) else value)
                    if known and not foreign and value is not None
                    else ""
                )
                # argparse names an option by its spelling with dashes
                name = key if entry != "run_judge" else key.split("_")[0]
                build = lambda folder, c=content: (folder / "recipe.yaml").write_text(c)  # noqa: E731
                cases.append(Case(f"{entry}: {key}: {value}", run, (name.split("_")[0], shown), build))
        for label, (content, *words) in FAULTY_FILES.items():
            content = content if isinstance(content, bytes) else content.encode()
            build = lambda folder, c=content: (folder / "recipe.yaml").write_bytes(c)  # noqa: E731
            cases.append(Case(f"{entry}: a recipe that is {label}", run, tuple(words), build))
        good = [f"--{key}={value}" for key, value in settings.items()]
        for label, words, *expected in (
            ("a recipe that is not there", ["nowhere.yaml"], "nowhere.yaml"),
            ("a key of the command line", [*good, "--learning_rat=1"], "learning_rat", "learning_rate"),
            ("a word too many", [*good, "recipe.yaml"], "recipe.yaml"),
            ("a key without a value", [*good, "--learning_rate"], "learning"),
            ("nothing", [], "required"),
        ):
            cases.append(
                Case(
                    f"{entry}: {label}",
                    lambda folder, w=words, m=main: m([*w, f"--output_dir={folder / 'run'}"] if w else w),
                    tuple(expected),
                )
            )
    together = (
        ("run_mcd", {"delta": 0.125, "num_rounds": 4}, "delta (0.125)", "4 rounds"),
        ("run_mcd", {"tau": [0.9] * 7, "num_rounds": 5}, "tau", "7", "5"),
        ("run_mcd", {"max_steps": 13, "num_rounds": 3, "steps_per_round": 4}, "max_steps (13)"),
        ("run_mcd", {"save_steps": 3, "logging_steps": 2}, "save_steps (3)", "logging_steps (2)"),
        ("run_mcd", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"foo": 1}, "teacher": str(world.teacher),
                     "tokenizer": str(world.tokenizer_folder), "train_text": str(world.text)}, "lr_scheduler_kwargs", "foo"),
        ("run_mcd", {"hub_model_id": "a/b/c", "push_to_hub": True}, "hub_model_id", "a/b/c"),
        ("run_mcd", {"hub_model_id": "tiny", "push_to_hub": True}, "hub_model_id", "tiny"),
        ("run_mcd", {"hub_strategy": "checkpoint", "push_to_hub": True, "hub_model_id": "a/b"}, "hub_strategy"),
        ("run_mcd", {"trainer": "sdtt", "teacher_steps": 600, "delta": 0.002, "num_rounds": 1}, "teacher_steps", "600"),
        ("run_mdlm", {"model": str(world.teacher), "hidden_size": 64}, "hidden_size", "64", "model"),
        ("run_mdlm", {"model": str(world.teacher), "noise_schedule": "cosine"}, "noise_schedule", "cosine", "model"),
        ("run_mdlm", {"streaming": True, "max_steps": -1, "tokenizer": str(world.tokenizer_folder),
                      "train_text": str(world.text), "hidden_size": 32, "num_attention_heads": 2}, "streaming"),
        ("run_mdlm", {"hidden_size": 30, "num_attention_heads": 4, "tokenizer": str(world.tokenizer_folder)},
         "hidden_size (30)", "num_attention_heads (4)"),
        ("run_judge", {"num_heads": 3, "hidden_size": 16}, "hidden_size (16)", "num_heads (3)"),
        ("run_judge", {"hub_model_id": "a/b/c", "push_to_hub": True}, "hub_model_id", "a/b/c"),
    )  # fmt: skip
    for entry, changes, *words in together:
        settings = base | ({"teacher": "/nowhere"} if entry == "run_mcd" else {}) | changes
        content = yaml.safe_dump(settings)

        def run(folder: Path, main=ENTRIES[entry]):
            main([str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), "--disable_tqdm", "true"])

        build = lambda folder, c=content: (folder / "recipe.yaml").write_text(c)  # noqa: E731
        cases.append(Case(f"{entry}: {', '.join(changes)}", run, tuple(words), build))
    return cases


@room("run_eval")
def evaluation_commands(world: World) -> list[Case]:
    model, judge = str(world.teacher), str(world.judge_folder)
    reverse_letters(save_judge(world.folder / "judge_of_others"))
    good = {"--judge": judge, "--steps": "2", "--samples": "2", "--seeds": "1"}

    def refuse(label, *words, models=(model,), extra=(), build=None, **changes):
        options = good | {f"--{name}": value for name, value in changes.items()}

        def call(folder: Path):
            filled = [word for name, value in options.items() if value is not None for word in (name, *value.split())]
            run_eval(
                [m.format(folder=folder) for m in (*models, *filled)] + ["--output_dir", str(folder / "out"), *extra]
            )

        return Case(label, call, words, build)

    cases = [
        refuse(f"{name} {value}", name, value, **{name: value})
        for name, values in {
            "steps": ["0", "-1", "2.5", "many"],
            "samples": ["0", "-1", "some"],
            "seeds": ["0", "-1", "one"],
            "length": ["0", "1", "long", "64"],
            "temperatures": ["-1", "nan", "inf", "hot"],
            "batch_size": ["0", "all"],
            "judge_dtype": ["int8"],
            "convention": ["tokens"],
            "entropy_unit": ["letters"],
            "sampler": ["first_hitting", "best"],
            "last_step": ["random"],
            "precision": ["float16"],
            "judge": ["/nowhere", "a/b/c"],
            "tokenizer": ["/nowhere"],
        }.items()
        for value in values
    ]

    def report(content: str) -> Callable:
        def build(folder: Path):
            (folder / "out").mkdir()
            (folder / "out" / "eval.json").write_text(content)

        return build

    def text_table(folder: Path):
        (folder / "text.csv").write_text("text\na\n")

    def file_at_out(folder: Path):
        (folder / "out").write_text("a file")

    def without_tokenizer(folder: Path):
        shutil.copytree(world.teacher, folder / "bare")
        for file in (folder / "bare").glob("tokenizer*"):
            file.unlink()

    def short(folder: Path):
        (folder / "short.txt").write_text("too short")

    cases += [
        refuse("no judge and no answers", "--judge", "--answers", judge=None),
        refuse("answers that are not there", "/nowhere.jsonl", answers="/nowhere.jsonl"),
        refuse("answers without prompts", "text.csv", "prompt", answers="{folder}/text.csv", build=text_table),
        refuse("a length and no answers", "evaluation_answer_length", "4", answer_length="4"),
        refuse("no steps", "--steps", "required", steps=None),
        refuse("no model", "MODEL", models=()),
        refuse("an unknown option", "--stepz", "--steps", stepz="4"),
        refuse("a model that is not there", "/nowhere", models=("/nowhere",)),
        refuse("not a name of the Hub", "a/b/c", models=("a/b/c",)),
        refuse("a model twice", "teacher", models=(model, model)),
        refuse("two models with one label", "label 'a'", models=(f"a={model}", f"a={judge}")),
        refuse("a judge for a model", "judge", models=(judge,)),
        refuse("no rounds", "round-", "--rounds", models=(model,), extra=("--rounds",)),
        refuse("a model without a tokenizer", "tokenizer", "bare", models=("{folder}/bare",), build=without_tokenizer),
        refuse("greedy under legacy", "temperature", "legacy_float32", precision="legacy_float32", temperatures="0"),
        refuse("an order under legacy", "legacy_float32", precision="legacy_float32", sampler="random"),
        refuse("a report that is none", "eval.json", build=report("[]")),
        refuse("a report that is cut off", "eval.json", build=report('{"results": [')),
        refuse("a report of other rows", "eval.json", build=report('{"results": [{"a": 1}]}')),
        refuse("a file for a folder", "out", build=file_at_out),
        Case(
            "a short reference text",
            lambda f: run_eval([model, "--judge", judge, "--steps", "2", "--output_dir", str(f / "out"),
                                "--reference_text", str(f / "short.txt")]),
            ("text", str(BLOCK)),
            short,
        ),
        Case(
            "a model of the Hub and no folder",
            lambda f: run_eval(["a/b", "--judge", judge, "--steps", "2"]),
            ("a/b", "--output_dir"),
        ),
        refuse("a reference text that is not there", "/nowhere", reference_text="/nowhere"),
        refuse("a vocabulary text that is not there", "/nowhere", vocabulary_text="/nowhere"),
        refuse("a text that is no text", "model.safetensors", reference_text=str(world.teacher / "model.safetensors")),
        refuse("one bad number of steps", "steps", "[4, 0]", steps="4 0"),
        refuse("one bad temperature", "temperatures", "[1.0, -2.0]", temperatures="1 -2"),
        refuse("another vocabulary", "raw_ids", convention="raw_ids", judge=str(world.folder / "judge_of_others")),
    ]  # fmt: skip
    return cases


# --- Text, tokenizers, judges


@room("text")
def texts(world: World) -> list[Case]:
    good = "a good text that is long enough for a block or two. " * 8

    def load(folder: Path, source: str = "text.txt", tokenizer=None, **options):
        path = str(folder / source) if source != "acme/nowhere" else source
        return load_blocks(
            TextArguments(train_text=path, **{"block_length": BLOCK} | options), tokenizer or world.tokenizer
        )

    def write(name: str, content: bytes | str) -> Callable:
        def build(folder: Path):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

        return build

    def table(rows: dict, save=Dataset.to_parquet, name: str = "text.parquet") -> Callable:
        return lambda folder: save(Dataset.from_dict(rows), str(folder / name))

    def nothing(folder: Path):
        (folder / "a").mkdir()

    def mixed(folder: Path):
        write("a/one.txt", good)(folder)
        write("a/two.jsonl", json.dumps({"text": good}))(folder)

    files = (
        ("missing", None, "text.txt", "text.txt", "no such file"),
        ("empty", write("text.txt", ""), "text.txt", "less text", str(BLOCK)),
        ("space alone", write("text.txt", " \n"), "text.txt", "less text", str(BLOCK)),
        ("shorter than a block", write("text.txt", "short"), "text.txt", "less text", str(BLOCK)),
        ("Latin-1", write("text.txt", good.encode() + b"\xe9"), "text.txt", "not UTF-8", "0xe9", str(len(good))),
        ("UTF-16", write("text.txt", good.encode("utf-16")), "text.txt", "not UTF-8", "UTF-16"),
        ("UTF-16 without a mark", write("text.txt", good.encode("utf-16-le")), "text.txt", "zero bytes"),
        ("binary", write("text.txt", bytes(range(1, 256)) * 9), "text.txt", "not UTF-8", "0x80"),
        ("a folder without text", nothing, "a", "no text file"),
        ("a folder with a bad file", write("a/b.txt", b"good \xc3"), "a", "b.txt", "not UTF-8", "0xc3"),
        ("a folder of several kinds", mixed, "a", "one.txt", "two.jsonl"),
        ("JSON in a text file", write("text.txt", json.dumps({"text": good})), "text.txt", "JSON"),
        ("JSON that is cut off", write("text.jsonl", '{"text": "ab'), "text.jsonl", "json"),
        ("JSON of numbers", write("text.json", "[1, 2]"), "text.json", "text"),
        ("JSON without the column", write("text.jsonl", json.dumps({"body": good})), "text.jsonl", "'text'", "['body']"),
        ("CSV without the column", write("text.csv", f"body\n{good}\n"), "text.csv", "'text'", "['body']"),
        ("Parquet that is none", write("text.parquet", "text"), "text.parquet", "parquet"),
        ("Parquet without the column", table({"body": [good]}), "text.parquet", "'text'", "['body']"),
        ("a column of numbers", table({"text": [1, 2]}), "text.parquet", "'text'", "int64"),
        ("a column of lists", table({"text": [["a"], ["b"]]}), "text.parquet", "'text'", "not text"),
        ("a row of nothing", table({"text": [good, None]}), "text.parquet", "row 1", "'text'", "nothing"),
        ("a saved dataset without the column", table({"body": [good]}, Dataset.save_to_disk, "a"), "a", "'text'", "['body']"),
        ("a text in an archive", write("text.txt.gz", b"\x1f\x8b"), "text.txt.gz", "unpack"),
        ("a document of another kind", write("text.pdf", b"%PDF"), "text.pdf", ".pdf"),
    )  # fmt: skip
    cases = []
    for label, build, source, *words in files:
        cases.append(Case(f"to train on: {label}", partial(load, source=source), (source, *words), build))
        read = lambda folder, s=source: text_blocks(read_texts(folder / s), world.tokenizer, BLOCK, 8)  # noqa: E731
        # What was read does not know its file any more: of a text that is too short, only the length is named.
        named = () if "less text" in words else (source,)
        cases.append(Case(f"to judge: {label}", read, (*named, *words), build))

    bare = character_tokenizer(BLOCK)
    bare.bos_token = bare.eos_token = None
    no_eos = character_tokenizer(BLOCK)
    no_eos.eos_token = None
    text = write("text.txt", good)
    cases += [
        Case("a block of 2", partial(load, block_length=2), ("block_length", "2"), text),
        Case("a block of -1", partial(load, block_length=-1), ("block_length", "-1"), text),
        Case("no BOS", partial(load, tokenizer=bare), ("bos_token",), text),
        Case("no EOS", partial(load, tokenizer=no_eos), ("eos_token",), text),
        Case("a dataset that is not there", partial(load, source="acme/nowhere"), ("acme/nowhere",)),
        Case("a bad validation text", lambda f: load(f, validation_text=str(f / "nowhere.txt")), ("nowhere.txt",), text),
        Case("a streamed text that is too short", partial(load, streaming=True), ("text.txt", "less text"), write("text.txt", "short")),
        Case("a streamed text that is not UTF-8", partial(load, streaming=True), ("text.txt", "0xe9"), write("text.txt", good.encode() + b"\xe9")),
        Case("a bad name", lambda f: TextArguments(train_text=""), ("train_text",)),
        Case("no blocks to validate with", lambda f: TextArguments(train_text="a", validation_text="b", max_validation_blocks=0), ("max_validation_blocks", "0")),
        Case("a column that plain text has not", partial(load, text_column="body"), ("text_column", "body"), text),
        Case("a split that plain text has not", partial(load, train_split="test"), ("train_split", "test"), text),
        Case("a validation split and no text", partial(load, validation_split="test"), ("validation_split", "test"), text),
        Case("validation blocks and no text", partial(load, max_validation_blocks=4), ("max_validation_blocks", "4"), text),
        Case("rows: no input_ids", lambda f: collate_blocks([{"text": "a"}]), ("input_ids", "text")),
        Case("rows: none", lambda f: collate_blocks([]), ("row",)),
        Case("rows: None", lambda f: collate_blocks([{"input_ids": None}]), ("input_ids", "None")),
        Case("rows: text", lambda f: collate_blocks([{"input_ids": "abc"}]), ("input_ids", "abc")),
        Case("rows: fractions", lambda f: collate_blocks([{"input_ids": [1.5, 2.0]}]), ("input_ids", "1.5")),
        Case("rows: labels of another length", lambda f: collate_blocks([{"input_ids": [1, 2], "labels": [1]}]), ("labels", "1", "2")),
        Case("rows: labels in one of two", lambda f: collate_blocks([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}]), ("labels",)),
        Case("rows: a mask of another length", lambda f: collate_blocks([{"input_ids": [1, 2], "attention_mask": [1]}]), ("attention_mask", "1", "2")),
    ]  # fmt: skip
    return cases


@room("instruction data")
def instruction_data(world: World) -> list[Case]:
    chat, good = chat_tokenizer(BLOCK), {"prompt": "a", "completion": "b"}
    answered = talk("user: a", "assistant: b")

    def refuse(label: str, bad, *words, first=good, tokenizer=world.tokenizer, **options) -> Case:
        """Rows of which row 1 is bad; `bad` is a row, or the text of its line."""

        def build(folder: Path):
            line = bad if isinstance(bad, str) else json.dumps(bad)
            (folder / "rows.jsonl").write_text(json.dumps(first) + "\n" + line + "\n")

        def call(folder: Path):
            load_blocks(TextArguments(str(folder / "rows.jsonl"), **{"block_length": BLOCK} | options), tokenizer)

        return Case(label, call, ("rows.jsonl", *words), build)

    def of_talk(label: str, messages, *words) -> Case:
        return refuse(label, {"messages": messages}, "row 1", *words, first={"messages": answered}, tokenizer=chat)

    rows = (
        ("no completion", {"prompt": "a"}, "row 1", "'completion'", "nothing"),
        ("no prompt", {"completion": "b"}, "row 1", "'prompt'", "nothing"),
        ("a number for a prompt", {"prompt": 7, "completion": "b"}, "row 1", "'prompt'"),
        ("a mapping for a completion", {"prompt": "a", "completion": {"b": 1}}, "row 1", "'completion'"),
        ("an empty completion", {"prompt": "a", "completion": " \n"}, "row 1", "'completion'", "empty"),
        ("text beside messages", {"prompt": "a", "completion": answered[1:]}, "row 1", "'prompt'", "messages"),
        ("a line cut off", '{"prompt": "a", "compl', "row 1", "line 2", "JSON"),
        ("a line of a list", "[1]", "row 1", "line 2", "mapping"),
    )
    cases = [refuse(label, bad, *words) for label, bad, *words in rows]
    cases += [
        of_talk("no message", [], "'messages'", "empty list"),
        of_talk("no assistant", talk("user: a"), "'messages'", "assistant"),
        of_talk("a message without content", [{"role": "user"}, answered[1]], "'messages'", "content", "message 0"),
        of_talk("a message without a role", [{"content": "a"}, answered[1]], "'messages'", "role", "message 0"),
        of_talk("an empty answer", talk("user: a", "assistant: "), "'messages'", "message 1"),
        of_talk("a role that the template refuses", talk("tool: a", "assistant: b"), "'messages'", "no tools here"),
        of_talk("the mask in a message", talk("user: [MASK]", "assistant: b"), "mask"),
        refuse("messages without a template", {"messages": answered}, "row 0", "chat template", first={"messages": answered}),
        refuse("a prompt that answers itself", {"prompt": answered[:1], "completion": answered[:1]}, "row 1", "'completion'",
               "'user'", first={"prompt": answered[:1], "completion": answered[1:]}, tokenizer=chat),
        refuse("a prompt column that is not there", good, "'question'", "prompt_column", prompt_column="question"),
        refuse("packing", good, "packing", packing=True),
        refuse("text without prompts", {"text": "b"}, "completion_only", first={"text": "a"}, completion_only=True),
    ]  # fmt: skip
    return cases


@room("tokenizers and judges")
def tokenizers_and_judges(world: World) -> list[Case]:
    def judge(label: str, build: Callable | None, *words) -> Case:
        return Case(label, lambda folder: load_judge(str(folder / "judge")), ("judge", *words), build)

    def without_half(folder: Path):
        save_judge(folder / "judge")
        file = folder / "judge" / "model.safetensors"
        state = load_file(file)
        save_file({name: state[name] for name in sorted(state)[::2]}, file, {"format": "pt"})

    def of(model) -> Callable:
        def build(folder: Path):
            model.save_pretrained(folder / "judge")
            character_tokenizer(BLOCK).save_pretrained(folder / "judge")

        return build

    def with_number(value: float) -> Callable:
        def build(folder: Path):
            save_judge(folder / "judge")
            file = folder / "judge" / "model.safetensors"
            state = load_file(file)
            state["transformer.h.0.mlp.c_fc.weight"][0, 0] = value
            save_file(state, file, {"format": "pt"})

        return build

    def with_file(name: str, content: str | None) -> Callable:
        def build(folder: Path):
            save_judge(folder / "judge")
            if content is None:
                for file in (folder / "judge").glob(name):
                    file.unlink()
            else:
                (folder / "judge" / name).write_text(content)

        return build

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertConfig(vocab_size=48, max_position_embeddings=BLOCK, **small)
    gpt = GPT2Config(vocab_size=40, n_positions=BLOCK, n_embd=16, n_layer=1, n_head=2)
    cases = [
        judge("no such judge", None),
        judge("half of its weights", without_half, "weights"),
        judge("a BertModel", of(BertModel(bert)), "BertLMHeadModel"),
        judge("a BertForMaskedLM", of(BertForMaskedLM(bert)), "causal"),
        judge("a model of masked diffusion", of(world.model), "masked diffusion model"),
        judge("a vocabulary that is too small", of(GPT2LMHeadModel(gpt)), "48", "40"),
        judge("NaN in its weights", with_number(NAN), "not finite"),
        judge("infinity in its weights", with_number(INFINITY), "not finite"),
        judge("config.json cut off", with_file("config.json", "{")),
        judge("weights cut off", with_file("model.safetensors", "x")),
        judge("no weights", with_file("*.safetensors", None)),
        judge("no tokenizer", with_file("tokenizer*", None), "tokenizer"),
        judge("a tokenizer cut off", with_file("tokenizer.json", "{")),
        Case("an unknown dtype", lambda f: load_judge(str(world.judge_folder), "int7"), ("dtype", "int7")),
    ]

    def tokenizer(label: str, change: Callable | None, *words, **options) -> Case:
        def build(folder: Path):
            (folder / "tokenizer").mkdir()
            if change is not None:
                made = character_tokenizer(BLOCK)
                made = change(made) or made
                made.save_pretrained(folder / "tokenizer")

        def call(folder: Path):
            settings = {"teacher": world.teacher, "train_text": world.text, "block_length": BLOCK}
            settings |= {"tokenizer": folder / "tokenizer", "output_dir": folder / "run", "use_cpu": True} | options
            run_mcd.main([f"--{name}={value}" for name, value in settings.items()])

        return Case(label, call, ("tokenizer", *words), build)

    def no_mask(made):
        made.mask_token = None

    def more(made):
        made.add_tokens(["<one more>"])

    def no_eos(made):
        made.bos_token = made.eos_token = None

    def shuffled(made):
        content = json.loads(made.backend_tokenizer.to_str())
        words = content["model"]["vocab"]
        letters = [word for word in words if len(word) == 1]
        ids = [words[word] for word in letters]
        words.update(zip(letters, reversed(ids), strict=True))
        made._tokenizer = type(made._tokenizer).from_str(json.dumps(content))

    cases += [
        tokenizer("an empty folder", None, "cannot be loaded"),
        tokenizer("no mask", no_mask, "mask"),
        tokenizer("more tokens than the model", more, "49", "48"),
        tokenizer("no BOS and no EOS", no_eos, "bos_token"),
        tokenizer("other letters", shuffled, "the one saved with"),
        Case("not a name of the Hub", lambda f: load_run_tokenizer(TokenizerArguments("a/b/c")), ("a/b/c",)),
        Case("an empty name", lambda f: load_run_tokenizer(TokenizerArguments("")), ("tokenizer",)),
        Case("a file", lambda f: load_run_tokenizer(TokenizerArguments(str(world.text))), ("text.txt",)),
    ]
    return cases


# --- From Python


@room("training arguments")
def training_arguments(world: World) -> list[Case]:
    numbers = {
        "learning_rate": [-1.0, 0.0, NAN, INFINITY],
        "weight_decay": [-1.0, NAN],
        "adam_beta1": [1.0, -0.1],
        "adam_beta2": [1.5],
        "max_grad_norm": [-1.0, NAN],
        "per_device_train_batch_size": [0, -1],
        "gradient_accumulation_steps": [0],
        "max_steps": [0],
        "seed": [-1, 2**32],
        "ema_decay": [1.0, -0.5, NAN],
    }
    distilled = {"num_rounds": [0, -1], "steps_per_round": [0]}
    gaps = {"delta": [0.0, -0.1, NAN, 1.0], "delta_growth": [0.0, NAN]}

    def of(arguments_class, **table) -> list[Case]:
        cases = []
        for case in fields(lambda **options: arguments_class(**options), table, output_dir="run", report_to="none"):
            cases.append(dataclasses.replace(case, label=f"{arguments_class.__name__}: {case.label}"))
        return cases

    cases = of(MCDTrainingArguments, **numbers, **distilled, **gaps)
    cases += of(MCDTrainingArguments, tau=[[], [0.0], [NAN], [0.9, -1.0]], teacher_ema_decay=[0.9, 1.0])
    cases += of(SDTTTrainingArguments, teacher_steps=[0], sampling_epsilon=[0.0, 1.0], delta=[0.0])
    cases += of(DCDTrainingArguments, log_snr=[[1.0], [1.0, 2.0], [1.0, NAN]])
    cases += of(DSCDTrainingArguments, num_rounds=[0], steps_per_round=[-1])
    cases += of(MPDCTrainingArguments, anchor_fraction=[-0.1, 1.1, NAN])
    cases += of(MDLMTrainingArguments, sampling_epsilon=[0.0, 1.0, NAN])
    # An enumeration of the command line, given in Python, is checked too.
    for arguments_class, name in (
        (MCDTrainingArguments, "divergence"),
        (MCDTrainingArguments, "reveal"),
        (MCDTrainingArguments, "reduction"),
        (MCDTrainingArguments, "teacher_update"),
        (SDTTTrainingArguments, "divergence"),
        (SDTTTrainingArguments, "time_grid"),
        (DCDTrainingArguments, "divergence"),
    ):
        cases += of(arguments_class, **{name: ["other"]})

    def trainer(trainer_class, arguments_class, student, **inputs) -> Callable:
        def call(folder: Path):
            arguments = arguments_class(
                output_dir=str(folder / "run"), report_to="none", per_device_train_batch_size=2
            )
            trainer_class(student, arguments, **inputs)

        return call

    other = MDLMForMaskedDiffusion(MDLMConfig(**SHAPES | {"num_hidden_layers": 2}))
    words = MDLMForMaskedDiffusion(MDLMConfig(**SHAPES | {"vocab_size": 64}))
    short = Dataset.from_dict({"input_ids": [[1] * BLOCK]})
    mcd = partial(trainer, MCDTrainer, MCDTrainingArguments)
    cases += [
        Case("a teacher of another depth", mcd(world.model, teacher=other), ("num_hidden_layers", "2", "1")),
        Case("a teacher of another vocabulary", mcd(world.model, teacher=words), ("vocab_size", "64", "48")),
        Case("a uniform student for MCD", mcd(world.uniform), ("uniform", "absorbing")),
        Case("a uniform teacher for MCD", mcd(world.model, teacher=world.uniform), ("uniform",)),
        Case("less text than a batch", mcd(world.model, train_dataset=short), ("per_device_train_batch_size", "2", "1")),
        Case("less text than a batch to pre-train", trainer(MDLMTrainer, MDLMTrainingArguments, world.model, train_dataset=short),
             ("per_device_train_batch_size", "2", "1")),
    ]  # fmt: skip
    return cases


@room("head rows and divergences")
def head_rows_and_divergences(world: World) -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def rows(count: int = 3, width: int = 4, vocabulary: int = 8) -> HeadRows:
        shapes = (count, width), (vocabulary, width), (vocabulary,)
        return HeadRows(*(torch.randn(shape, generator=generator) for shape in shapes), vocabulary - 1)

    student, teacher, tokens = rows(), rows(), torch.tensor([0, 1, 2])
    kind = next(iter(MCDTrainingArguments.__dataclass_fields__["divergence"].type.__args__))

    def compare(label, *words, student=student, teacher=teacher, kind=kind, **options):
        return Case(label, lambda _: divergence(kind, student, teacher, **options), words)

    def score(label, *words, student=student, tokens=tokens, **options):
        return Case(label, lambda _: cross_entropy(student, tokens, **options), words)

    return [
        compare("another kind", "jeffreys", kind="jeffreys"),
        compare("the old name of a kind", "student", kind="student_teacher"),
        *[compare(f"beta {beta}", "beta", says(beta), kind="jensen_shannon", beta=beta) for beta in (-0.1, 1.1, NAN)],
        *[compare(f"temperature {t}", "temperature", says(t), temperature=t) for t in (0, -1, NAN, INFINITY)],
        compare("other numbers of rows", "3", "2", teacher=rows(2)),
        compare("other vocabularies", "8", "9", teacher=rows(vocabulary=9)),
        score("fewer tokens than rows", "3", "2", tokens=tokens[:2]),
        score("a token outside", "8", tokens=torch.tensor([0, 1, 8])),
        score("a negative token", "-1", tokens=torch.tensor([0, 1, -1])),
        score("tokens that are fractions", "float", tokens=tokens.float()),
        score("weights of another number", "weights", "2", "3", weights=torch.ones(2)),
        Case("rows of another head", lambda _: student.put(torch.tensor([0]), rows(1)), ("head",)),
        Case("more rows than places", lambda _: student.put(torch.tensor([0]), student.at(slice(2))), ("1", "2")),
        Case("a place outside", lambda _: student.put(torch.tensor([7]), student.at(slice(1))), ("places", "7")),
        Case("a row outside", lambda _: student.at(torch.tensor([5])), ("rows", "5")),
        Case("a mask of another length", lambda _: student.at(torch.ones(4, dtype=torch.bool)), ("4", "3")),
        Case("a point mass under MSE", lambda _: divergence_from_token("mse", student, tokens), ("mse",)),
        *[Case(f"log-probabilities at {t}", lambda _, t=t: student.log_probabilities(t), ("temperature", says(t)))
          for t in (0, -1.0, NAN)],
    ]  # fmt: skip


@room("metrics")
def metrics(world: World) -> list[Case]:
    blocks = torch.randint(0, 46, (2, 8), generator=torch.Generator().manual_seed(0))
    judge, tokenizer = world.judge, world.judge_tokenizer
    row = {"model": "a", "steps": 4}
    protocol = partial(EvaluationProtocol, judge, tokenizer)

    def nelbo(label, *words, blocks=blocks, **options):
        return Case(f"validation_nelbo: {label}", lambda _: validation_nelbo(world.model, blocks, **options), words)

    def gen_ppl(label, *words, samples=("abc",), tokenizer=tokenizer, **options):
        return Case(
            f"generative_perplexity: {label}",
            lambda _: generative_perplexity(samples, judge, tokenizer, **options),
            words,
        )

    def report(content: str) -> Callable:
        return lambda folder: (folder / "eval.json").write_text(content)

    return [
        nelbo("one row without a batch", "blocks", "(8,)", blocks=blocks[0]),
        nelbo("no blocks", "blocks", "(0, 8)", blocks=blocks[:0]),
        nelbo("an id outside", "48", blocks=torch.full((1, 4), 48)),
        nelbo("a negative id", "-1", blocks=torch.full((1, 4), -1)),
        nelbo("longer than the context", "33", "32", blocks=torch.zeros(1, 33, dtype=torch.long)),
        nelbo("no draws", "draws", "0", draws=0),
        nelbo("no batch", "batch_size", "0", batch_size=0),
        gen_ppl("another convention", "tokens", convention="tokens"),
        gen_ppl("no tokenizer", "tokenizer", tokenizer=None),
        gen_ppl("nothing", "sample", samples=()),
        gen_ppl("nothing to score", "score", samples=("",)),
        gen_ppl("an id outside", "48", convention="raw_ids", samples=[[1, 48]]),
        gen_ppl("a negative id", "-1", convention="raw_ids", samples=[[1, -1]]),
        gen_ppl("no batch", "batch_size", "0", batch_size=0),
        Case("sequence_nll: an id outside", lambda _: sequence_nll([[1, 99]], judge), ("99", "48")),
        Case("causal_loss: nothing", lambda _: causal_loss(judge, blocks[:0]), ("block",)),
        Case("unigram_entropy: another unit", lambda _: unigram_entropy(["a"], "letters"), ("unit", "letters")),
        Case("unigram_entropy: nothing", lambda _: unigram_entropy([], "words"), ("no samples",)),
        Case("distinct_n: 0", lambda _: distinct_n(["a b"], 0), ("n", "0")),
        Case("distinct_n: one text", lambda _: distinct_n("a b c d"), ("texts", "str")),
        Case("known_words: one text", lambda _: known_words("a b c d", {"a"}), ("texts", "str")),
        *[
            Case(f"EvaluationProtocol: {name}={value!r}", lambda _, o={name: value}: protocol(**o), (name, says(value)))
            for name, values in {
                "samples": [0], "seeds": [0], "length": [1], "batch_size": [0], "convention": ["tokens"],
                "entropy_unit": ["letters"], "sampler": ["best"], "precision": ["float16"], "last_step": ["random"],
            }.items()
            for value in values
        ],
        *[
            Case(f"load_report: {label}", lambda folder: load_report(folder), ("eval.json",), report(content))
            for label, content in (("cut off", "{"), ("a list", "[]"), ("no rows", "{}"), ("other rows", '{"results": [1]}'))
        ],
        Case("save_results: a row without its key", lambda folder: save_results(folder, [row]), ("row",)),
        Case("text_blocks: a block of 2", lambda _: text_blocks(["abc"], world.tokenizer, 2, 4), ("2",)),
        Case("text_blocks: no block", lambda _: text_blocks(["abc" * 40], world.tokenizer, 8, 0), ("count", "0")),
    ]  # fmt: skip


# --- Running the table


def quiet():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file; empty folders, which the Trainer makes, are nothing."""
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def fault_of(case: Case, folder: Path) -> str | None:
    """What is wrong with the way in which a bad input is refused; None when nothing is."""
    folder.mkdir()
    if case.build is not None:
        case.build(folder)
    before, errors = contents(folder), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            case.call(folder)
            return "accepted"
        except SystemExit as stop:
            message = stop.code
        except (ValueError, FileNotFoundError, FloatingPointError) as error:
            if type(error) not in (ValueError, FileNotFoundError, FloatingPointError, NotADirectoryError):
                return f"{type(error).__name__}: {error}"
            message = str(error)
        except StrictDataclassError as error:
            message = " ".join(str(error).split())
        except Exception as error:  # whatever a stranger would see as a traceback
            return f"a traceback of {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not isinstance(message, str):
        lines = [line for line in errors.getvalue().splitlines() if "error: " in line]
        message = (
            "\n".join(lines) if message in (1, 2) and lines else f"exit with {message} and: {errors.getvalue()[-200:]}"
        )
    if len(message.splitlines()) != 1:
        return f"{len(message.splitlines())} lines: {message!r}"
    missing = [word for word in (w.replace("{folder}", str(folder)) for w in case.words) if word not in message]
    if missing:
        return f"does not say {missing}: {message}"
    if contents(folder) != before:
        return f"left behind or changed {sorted(contents(folder).items() ^ before.items())}"
    return None


def check(names: list[str] | None = None) -> dict[str, tuple[int, dict[str, str]]]:
    """Room -> number of its cases, and label -> fault of those that are not refused as they should be."""
    report = {}
    with tempfile.TemporaryDirectory(prefix="bad_input_") as home:
        world = World(Path(home) / "good")
        for name in names or ROOMS:
            torch.manual_seed(0)
            np.random.seed(0)
            cases = ROOMS[name](world)
            before, faults = contents(world.folder), {}
            for number, case in enumerate(cases):
                fault = fault_of(case, Path(home) / f"{name}-{number}")
                if fault is not None:
                    faults[case.label] = fault
            if contents(world.folder) != before:
                faults["the good inputs"] = "were changed"
            report[name] = len(cases), faults
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; all by default")
    options = parser.parse_args()
    quiet()
    start, total, failed = time.perf_counter(), 0, 0
    for name in options.rooms or ROOMS:
        began = time.perf_counter()
        ((count, faults),) = check([name]).values()
        total, failed = total + count, failed + len(faults)
        print(
            f"{name:>26}: {count - len(faults):3d} of {count:3d} held, {time.perf_counter() - began:.1f} s", flush=True
        )
        for label, fault in faults.items():
            print(f"    {label}: {fault}")
    print(f"{total - failed} of {total} bad inputs held, in {time.perf_counter() - start:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
