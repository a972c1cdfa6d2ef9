"""Trains a small autoregressive judge (GPT-2 architecture) from text, for generative perplexity where none is available.

    accelerate launch trainers/run_judge.py recipes/tiny_judge.yaml [--key value ...]

If it is killed, the same command resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from evaluation import write_report
from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from modeling_mcd.command_line import one_line_errors
from trainers.batches import check_training_batch
from trainers.exact_resume import ExactResumeTrainer
from trainers.resume_arguments import ExactResumeArguments
from trainers.runs.inputs import TokenizerArguments, load_data, load_run_tokenizer, open_data
from trainers.runs.recipe import parse_recipe
from trainers.runs.run import Run
from trainers.runs.text_arguments import TextArguments
from trainers.sharding import is_sharded
from trainers.teacher import Follower


@dataclass
class ShapeArguments:
    """The shape of the judge."""

    hidden_size: int = field(default=256, metadata={"help": "Width."})
    num_layers: int = field(default=6, metadata={"help": "Blocks."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})

    def __post_init__(self):
        check_numbers(self, hidden_size=AT_LEAST_1, num_layers=AT_LEAST_1, num_heads=AT_LEAST_1)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")


@dataclass
class JudgeTrainingArguments(ExactResumeArguments):
    """`TrainingArguments` of the judge."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "Blocks are not the model's arguments."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A non-finite loss stops the run instead."})


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def build_judge(shape: ShapeArguments, tokenizer, context: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=shape.hidden_size,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        )
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    shape, tokenizer_arguments, text, training = parse_recipe(
        (ShapeArguments, TokenizerArguments, TextArguments, JudgeTrainingArguments), arguments
    )
    run = Run(training, shape, tokenizer_arguments, text)
    tokenizer = load_run_tokenizer(tokenizer_arguments)
    source = open_data(text, training)
    source.check_packed("a judge", "give text, and leave out packing")
    run.identify(source, tokenizer)
    train, validation = load_data(source, tokenizer, training)
    check_training_batch(training, train)
    set_seed(training.seed)
    judge = build_judge(shape, tokenizer, text.block_length)
    trainer = ExactResumeTrainer(judge, training, collate, train_dataset=train, eval_dataset=validation)

    with run.start():
        trainer.train(run.checkpoint)
        complete = trainer.complete(judge if is_sharded(judge) else Follower(judge).model, everywhere=False)
        run.save(complete, tokenizer)
        figures = None
        if validation is not None:
            loss = trainer.evaluate()["eval_loss"]
            figures = [f"Loss on the validation text: {loss:.4f} nats per token"]
            if run.is_first:
                run.save_figures(loss=loss)
                print(figures[0])
        if run.is_first:
            write_report(training.output_dir, run.save_about(text, figures=figures, kind="causal"))
        run.push()
    trainer.end()


if __name__ == "__main__":
    main()
