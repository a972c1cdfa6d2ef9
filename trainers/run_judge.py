"""Trains a small autoregressive judge (GPT-2 architecture) from text, for generative perplexity where none can be had.

accelerate launch trainers/run_judge.py recipes/tiny_judge.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from modeling_mcd.checks_mdlm import AT_LEAST_1, check_numbers
from trainers.diffusion_trainer import TRAINING_NUMBERS, check_training_batch
from trainers.runs.errors import one_line_errors
from trainers.runs.hub import push_to_hub, take_hub_api
from trainers.runs.inputs import TokenizerArguments, load_data, load_tokenizer
from trainers.runs.output_folder import check_output_dir, claim_output_dir, run_settings
from trainers.runs.recipe import parse_recipe
from trainers.runs.text_blocks import TextArguments


@dataclass
class JudgeArguments:
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    num_layers: int = field(default=6, metadata={"help": "Blocks."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})

    def __post_init__(self):
        check_numbers(self, hidden_size=AT_LEAST_1, num_layers=AT_LEAST_1, num_heads=AT_LEAST_1)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


@one_line_errors
def main(arguments: list[str] | None = None):
    judge, tokenizer_arguments, text, training = parse_recipe(
        (JudgeArguments, TokenizerArguments, TextArguments, TrainingArguments), arguments
    )
    check_numbers(training, **TRAINING_NUMBERS)
    hub = take_hub_api(training)  # we push once, when everything is saved
    output_dir, settings = Path(training.output_dir), run_settings(training, judge, tokenizer_arguments, text)
    check_output_dir(output_dir, settings)
    tokenizer = load_tokenizer(tokenizer_arguments)
    train, validation = load_data(text, tokenizer, training)
    check_training_batch(training, train)
    set_seed(training.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=text.block_length,
        n_embd=judge.hidden_size,
        n_layer=judge.num_layers,
        n_head=judge.num_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    trainer = Trainer(GPT2LMHeadModel(config), training, collate, train, validation, processing_class=tokenizer)

    with training.main_process_first(local=False):
        if training.process_index == 0:
            claim_output_dir(output_dir, settings)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if validation is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if hub is not None and training.process_index == 0:
        push_to_hub(training, hub)


if __name__ == "__main__":
    main()
