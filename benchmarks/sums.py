"""Right answers in few steps: the teachers of additions and every distiller, under every order of reveals, at 1, 2, 4 and 8 steps.

    python -m benchmarks.sums [--methods mcd sdtt dscd mpdc nelbo dcd uniform_nelbo] [--questions 500]
    python -m benchmarks.sums --ship runs/tiny_sums_teacher

Each method starts from the shipped teacher of its kind of diffusion, with its recipe tiny_sums_*.yaml; `nelbo` and
`uniform_nelbo` are the controls: the teacher goes on with its own loss for as many steps. Greedy (temperature 0), so that an
order is all that differs between the rows of one network. Uniform-state models have the sampler ancestral alone, here without a
last step: N steps are N forwards, as of a masked model.

`--ship` rounds a finished run of tiny_sums_teacher.yaml or tiny_sums_uniform_teacher.yaml to bfloat16, as the teacher that
ships, and does nothing else.

Kill it at any time and start it again: a training resumes, and what was asked is not asked again. It writes
`benchmarks/results/sums.{json,md}`.
"""

import argparse
import shutil
from pathlib import Path

import yaml

from benchmarks.paper_tables import ROOT
from evaluation import RunReport, load_report
from evaluation.answers import AnswerProtocol, open_questions
from evaluation.answers_table import answers_markdown, with_aup
from modeling_mcd.files import new_folder, read_object, write_atomically, write_json
from modeling_mcd.loading import load_model, load_tokenizer
from trainers import run_mcd, run_mdlm


RECIPES = ROOT / "recipes"
FOLDER = RECIPES / "tiny_sums"
TEACHERS = {"absorbing": ("teacher", FOLDER / "teacher"), "uniform": ("uniform teacher", FOLDER / "uniform_teacher")}
METHODS = {"mcd": "absorbing", "sdtt": "absorbing", "dscd": "absorbing", "mpdc": "absorbing", "nelbo": "absorbing"}
METHODS |= {"dcd": "uniform", "uniform_nelbo": "uniform"}
CONTROLS = {"nelbo": "nelbo goes on", "uniform_nelbo": "uniform nelbo goes on"}
STEPS = [1, 2, 4, 8]
LOCKINGS = ("independent", "spread")
ORDERS = {
    "absorbing": {"confidence": LOCKINGS[:1], "adaptive": LOCKINGS[:1], "ancestral": LOCKINGS},
    "uniform": {"ancestral": LOCKINGS},
}


def train(method: str, folder: Path, words: list[str]):
    """Trains one student from the shipped teacher of its kind, unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    recipe = RECIPES / ("tiny_sums.yaml" if method == "mcd" else f"tiny_sums_{method}.yaml")
    words = ["--output_dir", folder, "--disable_tqdm", True, *words]
    if method not in CONTROLS:
        run_mcd.main([str(word) for word in (recipe, "--evaluation_answers", "null", *words)])
        return
    of_mcd = yaml.safe_load((RECIPES / "tiny_sums.yaml").read_text(encoding="utf-8"))
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "conditioning_size", "hidden_dropout")
    defaults = {name: run_mdlm.ModelArguments.__dataclass_fields__[name].default for name in shape}
    same = ("learning_rate", "warmup_steps", "per_device_train_batch_size", "ema_decay", "logging_steps", "save_steps")
    kind = METHODS[method]
    settings = defaults | {name: of_mcd[name] for name in same} | {"model": TEACHERS[kind][1], "adam_beta2": 0.999}
    settings |= {
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": of_mcd["num_rounds"] * of_mcd["steps_per_round"],
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    recipe = "tiny_sums_teacher.yaml" if kind == "absorbing" else "tiny_sums_uniform_teacher.yaml"
    run_mdlm.main([str(word) for word in (RECIPES / recipe, *options, *words)])


def ship(run: Path):
    """Puts the network of a run in the place of the shipped teacher of its kind, in bfloat16 and without the code beside it."""
    model = load_model(run).bfloat16()
    _, place = TEACHERS[model.config.diffusion_kind]
    with new_folder(place.with_suffix(".new")) as folder:
        model.save_pretrained(folder)
        load_tokenizer(FOLDER / "tokenizer").save_pretrained(folder)
        for code in folder.glob("*.py"):  # the package beside it is what the shipped weights are loaded with
            code.unlink()
        settings = read_object(folder / "config.json")
        settings.pop("auto_map", None)
        write_json(folder / "config.json", settings)
        (folder / "model.safetensors").chmod(0o644)
    shutil.rmtree(place, ignore_errors=True)
    place.with_suffix(".new").rename(place)


def ask(name: str, folder: Path, options: argparse.Namespace):
    """Asks one network under every order of its kind, and adds what is new to the report."""
    model, tokenizer = load_model(folder).float().eval(), load_tokenizer(folder)
    kind = model.config.diffusion_kind
    for sampler, lockings in ORDERS[kind].items():
        protocol = AnswerProtocol(
            open_questions(str(FOLDER / "questions.jsonl")),
            count=options.questions,
            sampler=sampler,
            last_step="none" if kind == "uniform" else None,
            batch_size=100,
        )
        report = RunReport(options.output_dir / "report", None, STEPS, [0.0], lockings=lockings, answers=protocol)
        report.judge(name, model, tokenizer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--ship", type=Path, metavar="RUN")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "sums")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "sums")
    options, words = parser.parse_known_args()  # the rest goes to the trainings
    if options.ship is not None:
        return ship(options.ship)
    kinds = {METHODS[method] for method in options.methods}
    networks = [(*teacher, None) for kind, teacher in TEACHERS.items() if kind in kinds]
    networks += [(CONTROLS.get(method, method), options.output_dir / method, method) for method in options.methods]
    orders = ["confidence", "adaptive", "ancestral"]
    for name, folder, method in networks:
        if method is not None:
            train(method, folder, words)
        ask(name, folder, options)
        rows = list(load_report(options.output_dir / "report")["answers"].values())
        rows.sort(key=lambda row: (orders.index(row["sampler"].split(",")[0]), LOCKINGS.index(row["locking"])))
        write_atomically(options.results.with_suffix(".md"), answers_markdown(rows) + "\n")
        content = [{"network": name, "aup": aup, "rows": of_curve} for name, of_curve, aup in with_aup(rows)]
        write_json(options.results.with_suffix(".json"), content)
    print(answers_markdown(rows))


if __name__ == "__main__":
    main()
