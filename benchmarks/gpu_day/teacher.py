"""Stage `teacher`: a masked model of sub-words and one of characters with their judges, as long as the minutes allow.

The number of steps is fixed first, from the pace of a few real steps, since a cosine schedule must know its end and a run that
is resumed must be the same run. Then the entry points of the library do the work, from recipes that are written for this
machine; killed at any moment, they go on from their last checkpoint. Each network is copied in bfloat16, in shards.
"""

import json
import shutil
import tarfile
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, TrainerCallback

import modeling_mcd  # noqa: F401 - registers the model with the Auto classes
from benchmarks.gpu_day.stage import ROOT, Day, Goal, Piece, Stage
from trainers import MDLMTrainer, MDLMTrainingArguments
from trainers.exact_resume import ExactResumeTrainer
from trainers.run_judge import JudgeTrainingArguments, ShapeArguments, build_judge, collate
from trainers.run_mdlm import ModelArguments, build_model
from trainers.runs.inputs import TokenizerArguments, load_run_tokenizer


# Label -> the recipe that it is derived from, its minutes of training by default, and its NELBO's or loss's goal in nats.
NETWORKS = {
    "teacher": ("novels_teacher", 7.0),
    "judge": ("novels_judge", 3.0),
    "character teacher": ("tiny_teacher", 5.0),
    "character judge": ("tiny_judge", 2.0),
    "uniform teacher": ("novels_uniform_teacher", 3.0),
}
CHARACTER_GOAL = 1.70  # nats per character
CHECKPOINTS = 20  # of a training: a cut costs a twentieth of it at most
# Of the rehearsal: everything small, nothing left out.
SMALL = {
    "block_length": 32,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "max_validation_blocks": 8,
}
SMALL_TEACHER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "conditioning_size": 8}
SMALL_JUDGE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}
SMALL_STEPS = 8


def is_judge(label: str) -> bool:
    return label.endswith("judge")


def folder_of(day: Day, label: str) -> Path:
    return day.runs / label.replace(" ", "_")


def texts(day: Day) -> Path:
    """The novels, `train/` and `validation/`: a folder as it is, or a packed one, unpacked once."""
    source = Path(day.options.novels or ROOT / "recipes" / "tiny" / "text").resolve()
    if source.is_dir() and not day.small:
        return source
    target = day.runs / "texts"
    if target.exists():
        return target
    part = target.with_name("texts.part")
    shutil.rmtree(part, ignore_errors=True)
    if source.is_dir():
        for file in source.rglob("*.txt"):
            place = part / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
        part.rename(target)
        return target
    with tarfile.open(source) as packed:
        packed.extractall(part, filter="data")
    inner = next(path.parent for path in sorted(part.rglob("train")) if path.is_dir())
    inner.rename(target)
    shutil.rmtree(part, ignore_errors=True)
    return target


def recipe_of(day: Day, name: str, **changes) -> dict:
    """A shipped recipe with the places of this machine."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    folder = texts(day)
    recipe |= {"train_text": str(folder / "train"), "validation_text": str(folder / "validation")}
    for key in ("tokenizer", "judge", "teacher"):
        if str(recipe.get(key, "")).startswith("./"):
            recipe[key] = str((ROOT / "recipes" / recipe[key]).resolve())
    if name.startswith("novels"):
        recipe["tokenizer"] = str(day.options.tokenizer or recipe["tokenizer"])
        if day.small and not Path(recipe["tokenizer"]).exists():
            recipe["tokenizer"] = str(ROOT / "recipes" / "tiny" / "tokenizer")
        recipe["bf16"] = True
    recipe |= {"report_to": "none", "disable_tqdm": False} | changes
    if day.small:
        recipe |= {key: value for key, value in SMALL.items() if key != "max_validation_blocks" or key in recipe}
        recipe |= {"bf16": False}
    return recipe


def training_recipe(day: Day, label: str) -> dict:
    recipe = recipe_of(day, NETWORKS[label][0], output_dir=str(folder_of(day, label)))
    recipe.pop("use_cpu", None)
    if label == "character teacher":  # what was best for small networks, docs/teachers.md; its recipe is older
        recipe |= {"muon": True, "locking": "spread"}
    if day.small:
        recipe |= SMALL_JUDGE if is_judge(label) else SMALL_TEACHER
        recipe |= {"use_cpu": True}
    return recipe


class Clock(TrainerCallback):
    """The time at which each step ended."""

    def __init__(self, day: Day):
        self.day, self.times = day, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.day.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def pace(day: Day, label: str) -> float:
    """Seconds for a step of a training, the Trainer's own work included: measured on random blocks, after a warm-up."""
    recipe, steps = training_recipe(day, label), 4 if day.small else 40
    tokenizer = load_run_tokenizer(TokenizerArguments(recipe["tokenizer"], recipe.get("add_mask_token", False)))
    length, batch = recipe["block_length"], recipe["per_device_train_batch_size"]
    blocks = torch.randint(0, len(tokenizer) - 2, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row} for row in blocks] * steps
    settings = {
        "output_dir": str(day.runs / "pace"),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "save_strategy": "no",
        "logging_steps": steps,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-4,
        "bf16": recipe["bf16"],
        "use_cpu": day.device == "cpu",
    }
    if is_judge(label):
        shape = ShapeArguments(**{name: recipe[name] for name in ("hidden_size", "num_layers", "num_heads")})
        arguments = JudgeTrainingArguments(**settings)
        trainer = ExactResumeTrainer(build_judge(shape, tokenizer, length), arguments, collate, train_dataset=rows)
    else:
        known = ModelArguments.__dataclass_fields__
        shape = ModelArguments(**{name: value for name, value in recipe.items() if name in known})
        own = {name: recipe[name] for name in ("ema_decay", "muon", "locking") if name in recipe}
        arguments = MDLMTrainingArguments(**settings, **own)
        trainer = MDLMTrainer(build_model(shape, tokenizer, length), arguments, train_dataset=rows)
    clock = Clock(day)
    trainer.add_callback(clock)
    trainer.train()
    shutil.rmtree(day.runs / "pace", ignore_errors=True)
    warm = steps // 4
    return (clock.times[-1] - clock.times[warm]) / (len(clock.times) - 1 - warm)


def planned(day: Day, label: str) -> dict:
    """How many steps fill the minutes of a training. Nine tenths: the rest is for text, evaluation and checkpoints."""
    seconds, recipe = pace(day, label), training_recipe(day, label)
    minutes = day.options.training_minutes or NETWORKS[label][1]
    steps = SMALL_STEPS if day.small else max(CHECKPOINTS, int(0.9 * 60 * minutes / seconds))
    steps -= steps % (2 if day.small else CHECKPOINTS)
    tokens = recipe["per_device_train_batch_size"] * recipe["block_length"]
    return {
        "seconds_per_step": seconds,
        "steps": steps,
        "tokens": steps * tokens,
        "tokens_per_second": tokens / seconds,
    }


def train(day: Day, label: str) -> dict:
    """Trains a network to the end of its plan; gives its bound (its loss, if it is a judge) against tokens seen."""
    plan = day.read("teacher")["pieces"][f"pace: {label}"].get("figures")
    if plan is None:
        raise RuntimeError(f"the pace of the {label} is not known: see its own failure")
    recipe, steps = training_recipe(day, label), plan["steps"]
    every = max(1, steps // (2 if day.small else CHECKPOINTS))
    recipe |= {"max_steps": steps, "save_strategy": "steps", "save_steps": every, "logging_steps": every}
    recipe |= {
        "warmup_steps": min(recipe["warmup_steps"], steps // 10),
        "save_total_limit": 2,
        "eval_strategy": "steps",
    }
    recipe |= {"eval_steps": max(every, steps // 10 // every * every)}
    file = day.runs / "recipes" / f"{label.replace(' ', '_')}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    folder = folder_of(day, label)
    if not (folder / "eval_results.json").exists():
        day.run(ROOT / "trainers" / ("run_judge.py" if is_judge(label) else "run_mdlm.py"), file, name=label)
    figures = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    tokens = plan["tokens"] / steps
    state = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    curve = [{"tokens": e["step"] * tokens, "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
    return {**figures, "tokens": plan["tokens"], "curve": curve, **shipped(day, label)}


def shipped(day: Day, label: str) -> dict:
    """Writes a network in bfloat16 for the way home and for shipping, in shards below the limit of a file."""
    folder = folder_of(day, label)
    auto_class = AutoModelForCausalLM if is_judge(label) else AutoModel
    network = auto_class.from_pretrained(folder, dtype=torch.bfloat16)
    assert isinstance(network, GPT2LMHeadModel) == is_judge(label)
    target = day.runs / "shipped" / folder.name
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    network.save_pretrained(part, max_shard_size=f"{int(1000 * (day.options.file_mb - 1))}KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(part)
    for code in part.glob("*.py"):  # the package beside it is what the weights are loaded with
        code.unlink()
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    return {"parameters": network.num_parameters(), "shipped_mb": size / 1e6}


def goals(figures: dict) -> list[Goal]:
    teacher, judge = figures.get("teacher", {}), figures.get("judge", {})
    character = figures.get("character teacher", {})
    sizes = [figures[label]["shipped_mb"] for label in ("character teacher", "character judge") if label in figures]
    ratio = teacher["nelbo"] / judge["loss"] if teacher.get("nelbo") and judge.get("loss") else None
    return [
        Goal("NELBO of the character teacher, nats", CHARACTER_GOAL, character.get("nelbo"), most=True),
        Goal("NELBO of the teacher over the judge's loss", 1.15, ratio, most=True),
        Goal("megabytes of the character models in bfloat16", 25, sum(sizes) if sizes else None, most=True),
    ]


def stage(day: Day) -> Stage:
    pieces = []
    for label, (_, minutes) in NETWORKS.items():
        pieces.append(Piece(f"pace: {label}", 0.4, partial(planned, day, label)))
        pieces.append(Piece(label, (day.options.training_minutes or minutes) + 0.5, partial(train, day, label)))
    return Stage(day, "teacher", pieces, goals, "python -m benchmarks.gpu_day students")
