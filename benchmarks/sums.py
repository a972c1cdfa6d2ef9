"""Right answers in few steps: the teacher of additions and every distiller, under four orders of reveals, at 1, 2, 4 and 8 steps.

    python -m benchmarks.sums [--methods mcd sdtt dscd mpdc nelbo] [--questions 500]
    python -m benchmarks.sums --ship runs/tiny_sums_teacher

Each method starts from the shipped teacher, with its recipe tiny_sums_*.yaml; `nelbo` is the control: the teacher goes on with
its own loss for as many steps. Greedy (temperature 0), so that an order is all that differs between the rows of one network.

`--ship` rounds a finished run of tiny_sums_teacher.yaml to bfloat16, as the teacher that ships, and does nothing else.

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
DISTILLERS = ("mcd", "sdtt", "dscd", "mpdc")
CONTROL = "nelbo"
STEPS = [1, 2, 4, 8]
ORDERS = {"confidence": ("independent",), "adaptive": ("independent",), "ancestral": ("independent", "spread")}


def train(method: str, folder: Path, words: list[str]):
    """Trains one student from the shipped teacher, unless it is there."""
    if (folder / "model.safetensors").exists():
        return
    recipe = RECIPES / ("tiny_sums.yaml" if method == "mcd" else f"tiny_sums_{method}.yaml")
    words = ["--output_dir", folder, "--disable_tqdm", True, *words]
    if method != CONTROL:
        run_mcd.main([str(word) for word in (recipe, "--evaluation_answers", "null", *words)])
        return
    of_mcd = yaml.safe_load((RECIPES / "tiny_sums.yaml").read_text(encoding="utf-8"))
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "conditioning_size", "hidden_dropout")
    defaults = {name: run_mdlm.ModelArguments.__dataclass_fields__[name].default for name in shape}
    same = ("learning_rate", "warmup_steps", "per_device_train_batch_size", "ema_decay", "logging_steps", "save_steps")
    settings = defaults | {name: of_mcd[name] for name in same} | {"model": FOLDER / "teacher", "adam_beta2": 0.999}
    settings |= {
        "lr_scheduler_type": "constant_with_warmup",
        "max_steps": of_mcd["num_rounds"] * of_mcd["steps_per_round"],
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    run_mdlm.main([str(word) for word in (RECIPES / "tiny_sums_teacher.yaml", *options, *words)])


def ship(run: Path):
    """Puts the network of a run into recipes/tiny_sums/teacher, in bfloat16 and without the code beside it."""
    with new_folder(FOLDER / "teacher.new") as folder:
        load_model(run).bfloat16().save_pretrained(folder)
        load_tokenizer(FOLDER / "tokenizer").save_pretrained(folder)
        for code in folder.glob("*.py"):  # the package beside it is what the shipped weights are loaded with
            code.unlink()
        settings = read_object(folder / "config.json")
        settings.pop("auto_map", None)
        write_json(folder / "config.json", settings)
        (folder / "model.safetensors").chmod(0o644)
    shutil.rmtree(FOLDER / "teacher", ignore_errors=True)
    (FOLDER / "teacher.new").rename(FOLDER / "teacher")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=[*DISTILLERS, CONTROL], choices=[*DISTILLERS, CONTROL])
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--ship", type=Path, metavar="RUN")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "sums")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "sums")
    options, words = parser.parse_known_args()  # the rest goes to the trainings
    if options.ship is not None:
        return ship(options.ship)
    networks = {"teacher": FOLDER / "teacher"}
    networks |= {method: options.output_dir / method for method in options.methods}
    source = open_questions(str(FOLDER / "questions.jsonl"))
    for name, folder in networks.items():
        if name != "teacher":
            train(name, folder, words)
        model, tokenizer = load_model(folder).float().eval(), load_tokenizer(folder)
        for sampler, lockings in ORDERS.items():
            protocol = AnswerProtocol(source, count=options.questions, sampler=sampler, batch_size=100)
            RunReport(options.output_dir / "report", None, STEPS, [0.0], lockings=lockings, answers=protocol).judge(
                "nelbo goes on" if name == CONTROL else name, model, tokenizer
            )
        rows = list(load_report(options.output_dir / "report")["answers"].values())
        rows.sort(key=lambda row: list(ORDERS).index(row["sampler"]))
        write_atomically(options.results.with_suffix(".md"), answers_markdown(rows) + "\n")
        content = [{"network": name, "aup": aup, "rows": of_curve} for name, of_curve, aup in with_aup(rows)]
        write_json(options.results.with_suffix(".json"), content)
    print(answers_markdown(rows))


if __name__ == "__main__":
    main()
