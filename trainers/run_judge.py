"""Trains a small autoregressive judge (GPT-2 architecture) from text, for generative perplexity where none can be had.

accelerate launch trainers/run_judge.py recipes/tiny_judge.yaml
"""

from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from trainers.recipe import parse_recipe
from trainers.run import TokenizerArguments, load_tokenizer, one_line_errors
from trainers.text_blocks import TextArguments, load_blocks


@dataclass
class JudgeArguments:
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    num_layers: int = field(default=6, metadata={"help": "Blocks."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads."})


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


@one_line_errors
def main(arguments: list[str] | None = None):
    judge, tokenizer_arguments, text, training = parse_recipe(
        (JudgeArguments, TokenizerArguments, TextArguments, TrainingArguments), arguments
    )
    tokenizer = load_tokenizer(tokenizer_arguments)
    with training.main_process_first():
        train, validation = load_blocks(text, tokenizer)
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
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    if validation is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
