"""Distillation: from a diffusion teacher to a student that needs fewer steps, by the method that `trainer` names.

    accelerate launch trainers/run_mcd.py recipes/tiny.yaml [--key value ...]

If it is killed, the same command resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import set_seed

from evaluation import save_results, write_report
from evaluation.options import EvaluationArguments
from evaluation.table import lowest_bounds
from evaluation.writing import WRITING
from modeling_mcd.command_line import one_line_errors
from modeling_mcd.loading import load_model
from trainers.coupling_trainer import CouplingTrainer, CouplingTrainingArguments
from trainers.dcd_trainer import DCDTrainer, DCDTrainingArguments
from trainers.distillation_trainer import DistillationTrainer, check_same_network, check_same_tokens
from trainers.dscd_trainer import DSCDTrainer, DSCDTrainingArguments
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.mpdc_trainer import MPDCTrainer, MPDCTrainingArguments
from trainers.runs.adapter_options import AdapterArguments
from trainers.runs.hub import CardArguments
from trainers.runs.inputs import (
    TokenizerArguments,
    check_block_length,
    check_shift,
    check_tokenizer,
    load_data,
    load_run_tokenizer,
    open_data,
)
from trainers.runs.output_folder import short_name
from trainers.runs.recipe import parse_recipe_of
from trainers.runs.rounds import RoundCallback, held_out_blocks, load_run_judge, start_report
from trainers.runs.run import Run
from trainers.runs.text_arguments import TextArguments
from trainers.sdtt_trainer import SDTTTrainer, SDTTTrainingArguments


METHODS = {
    "mcd": (MCDTrainer, MCDTrainingArguments, "Masked Consistency Distillation"),
    "sdtt": (SDTTTrainer, SDTTTrainingArguments, "Self-Distillation Through Time"),
    "dcd": (DCDTrainer, DCDTrainingArguments, "Discrete Consistency Distillation"),
    "dscd": (DSCDTrainer, DSCDTrainingArguments, "Discrete-Space Consistency Distillation"),
    "mpdc": (MPDCTrainer, MPDCTrainingArguments, "Multi-Path Discrete Consistency"),
    "coupling": (
        CouplingTrainer,
        CouplingTrainingArguments,
        "Coupling: maximum likelihood of a hidden Markov chain over its frozen head",
    ),
}


@dataclass
class MethodArguments:
    trainer: Literal[tuple(METHODS)] = field(default="mcd", metadata={"help": "The method."})


@dataclass
class NetworkArguments:
    teacher: str = field(metadata={"help": "Folder or Hub name of the first round's teacher."})
    student: str | None = field(default=None, metadata={"help": "Where the student starts; the teacher when null."})


@one_line_errors
def main(arguments: list[str] | None = None):
    method, networks, adapter, tokenizer_arguments, text, judging, card, training = parse_recipe_of(
        "trainer",
        {name: arguments_class for name, (_, arguments_class, _) in METHODS.items()},
        (
            MethodArguments,
            NetworkArguments,
            AdapterArguments,
            TokenizerArguments,
            TextArguments,
            EvaluationArguments,
            CardArguments,
        ),
        arguments,
    )
    trainer_class, _, title = METHODS[method.trainer]
    if training.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end is true, but a distillation hands on the student of its last round: choose by the table "
            "among the rounds, which are all exported"
        )
    if adapter.lora_r is not None and networks.student is not None:
        raise ValueError(
            f"student is {networks.student!r}, but with lora_r the student is the teacher with an adapter: leave student out"
        )
    run = Run(training, method, networks, adapter, tokenizer_arguments, text, base=networks.teacher)
    set_seed(training.seed)
    tokenizer = load_run_tokenizer(tokenizer_arguments)
    source = open_data(text, training)
    if judging.judge is not None:
        source.check_packed("judge", "leave it out, and ask questions by evaluation_answers")
    run.identify(source, tokenizer)
    teacher = adapter.load_base(networks.teacher)
    student = teacher if networks.student is None else load_model(networks.student)
    check_same_tokens(teacher.config, student.config, trainer_class.diffusion_kind)
    check_same_network(teacher.config, student.config)
    check_tokenizer(tokenizer, teacher.config, networks.teacher)
    check_block_length(text.block_length, "teacher", teacher.config)
    check_block_length(text.block_length, "student", student.config)
    judge = load_run_judge(judging, training)
    train, validation = load_data(source, tokenizer, training)
    check_shift(teacher, train, training)
    trainer = trainer_class(
        student,
        training,
        teacher=None if student is teacher else teacher,
        peft_config=adapter.config(),
        train_dataset=train,
        eval_dataset=validation,
    )
    report = None
    if judge is not None or judging.evaluation_answers is not None:
        report = start_report(judging, judge, tokenizer, teacher.config, text, training, validation)

    with run.start():
        first = trainer.first_teacher()
        if run.checkpoint is None and adapter.lora_r is None:  # the base of an adapter is where it was
            run.save(trainer.complete(first, everywhere=False), tokenizer, "teacher")
        if run.is_first:
            method_line = f"Distilled from {short_name(networks.teacher)} by {title}."
            run.save_about(text, judging, card, verb="Distilled", method=method_line, **card.about())
        if report is not None:  # all processes share the work
            if validation is not None and judge is not None:
                report.judge_text(held_out_blocks(validation), tokenizer)
            report.judge("teacher", first, tokenizer, label="teacher", plain=True)
            table = report.write()
            if run.is_first:
                print(f"\n{table}\n", flush=True)
        del first
        trainer.add_callback(RoundCallback(trainer, tokenizer, run.save, report, run.push_rounds))
        trainer.train(run.checkpoint)

        last = f"round-{training.round_of(trainer.state.global_step - 1) + 1}"
        rows, table = [], ""
        run.save(trainer.whole_student(everywhere=False), tokenizer)
        if report is not None:
            report.judge(last, trainer.handed_on(), tokenizer, label=last)
            rows, table = report.known_rows(), report.write(training=trainer.meter.total())
        elif run.is_first:
            write_report(training.output_dir, save_results(training.output_dir, training=trainer.meter.total()))
        if run.is_first:
            finish(trainer, student, last, rows, table)
        run.push()
    trainer.end()


def finish(trainer: DistillationTrainer, student, last: str, rows: list[dict], table: str):
    """Prints the table once more, what has the lowest bound, a sample of the teacher and one of the last round, and what was
    saved where.
    """
    folder = Path(trainer.args.output_dir)
    if table:
        print(f"\n{table}")
    texts = [row["bound_text"] for row in rows if row["model"] == last and row.get("bound") is not None]
    best = lowest_bounds([row for row in rows if texts and row.get("bound_text") == texts[0]])
    if best:
        points = (f"{name} at {row['steps']} steps ({row['bound']:.3f})" for name, row in best)
        print(f"\nLowest bound, nats per token: {', '.join(points)}.")
        if last not in (row["model"] for _, row in best):
            print(f"{last} has none of them: where its Gen-PPL is lower, its texts are sharper and not likelier.")
    for name in ("teacher", last):
        samples = [row for row in rows if row["model"] == name and row.get("example")]
        if samples:
            row = min(samples, key=lambda row: abs(row["steps"] - 8))
            print(f"\n{name}, {row['steps']} steps:\n  {row['example']}")
    # No plot without a judge, no round before its end, and neither teacher nor early rounds after another folder's checkpoint.
    rounds = [f"round-{k + 1}" for k in range(trainer.args.num_rounds)]
    names = [
        name for name in ("eval.json", "eval.md", "eval.png", WRITING, "teacher", *rounds) if (folder / name).exists()
    ]
    what, use = (
        "the student (model.safetensors, config.json)",
        "AutoModel.from_pretrained({!r}, trust_remote_code=True)",
    )
    if not (folder / "config.json").exists():
        what, use = "the student's adapter (adapter_model.safetensors)", "modeling_mcd.loading.load_model({!r})"
    print(
        f"\nSaved in {folder}: {what}, its card (README.md), {', '.join(names)}.\n"
        f"  {use.format(str(folder))}.generate(steps={student.generation_config.steps or 16})"
    )


if __name__ == "__main__":
    main()
