"""Pre-trains a diffusion language model from text.

    accelerate launch trainers/run_mdlm.py recipes/tiny_teacher.yaml [--key value ...]

If it is killed, the same command resumes from the last complete checkpoint.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel, set_seed

from evaluation import validation_nelbo, write_report
from evaluation.team import ALONE, Ranks
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.checks_mdlm import AT_LEAST_1, BELOW_1, check_numbers
from modeling_mcd.command_line import one_line_errors
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.adapter_options import AdapterArguments
from trainers.runs.inputs import (
    TokenizerArguments,
    check_block_length,
    check_shift,
    check_tokenizer,
    load_data,
    load_run_tokenizer,
    open_data,
)
from trainers.runs.recipe import parse_recipe
from trainers.runs.run import Run
from trainers.runs.text_arguments import TextArguments
from trainers.runs.together import together


@dataclass
class ModelArguments:
    """The network: a saved one to continue training, or the shape of a new one.

    Raises:
        ValueError: a value is out of range, or both are given; names the field.
    """

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a network to continue training; null: a new one."}
    )
    hidden_size: int = field(default=768, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Blocks."})
    num_attention_heads: int = field(default=12, metadata={"help": "Attention heads."})
    conditioning_size: int = field(default=128, metadata={"help": "Width of the noise embedding."})
    hidden_dropout: float = field(default=0.1, metadata={"help": "Dropout."})
    noise_schedule: Literal["log_linear", "cosine"] = field(
        default="log_linear",
        metadata={"help": "Noise schedule gamma(t): the fraction of tokens that is still visible at time t."},
    )
    diffusion_kind: Literal["absorbing", "uniform"] | None = field(
        default=None,
        metadata={
            "help": "What noise turns a token into: absorbing: [MASK] (MDLM; the default); uniform: any token (Duo)."
        },
    )

    def __post_init__(self):
        shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "conditioning_size")
        check_numbers(self, **dict.fromkeys(shape, AT_LEAST_1), hidden_dropout=BELOW_1)
        if self.model is None:
            MDLMConfig(
                **{name: getattr(self, name) for name in (*shape, "hidden_dropout")}
            )  # has the rules of a shape
            return
        for name in (*shape, "hidden_dropout", "noise_schedule"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name} is {value!r}, but the model {self.model!r} has its own: leave one of them out"
                )


def build_model(arguments: ModelArguments, tokenizer, context: int) -> PreTrainedModel:
    """A new network of the given shape, with random weights."""
    kind = arguments.diffusion_kind or "absorbing"
    return MDLMForMaskedDiffusion(
        MDLMConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=context,
            mask_token_id=tokenizer.mask_token_id if kind == "absorbing" else None,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_hidden_layers,
            num_attention_heads=arguments.num_attention_heads,
            conditioning_size=arguments.conditioning_size,
            hidden_dropout=arguments.hidden_dropout,
            noise_schedule=arguments.noise_schedule,
            diffusion_kind=kind,
        )
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    model_arguments, adapter, tokenizer_arguments, text, training = parse_recipe(
        (ModelArguments, AdapterArguments, TokenizerArguments, TextArguments, MDLMTrainingArguments), arguments
    )
    if adapter.lora_r is not None and model_arguments.model is None:
        raise ValueError(f"lora_r is {adapter.lora_r}, but a new network has no weights to adapt: give model")
    run = Run(training, model_arguments, adapter, tokenizer_arguments, text, base=model_arguments.model)
    tokenizer = load_run_tokenizer(tokenizer_arguments)
    source = open_data(text, training)
    set_seed(training.seed)
    run.identify(source, tokenizer)
    if model_arguments.model is None:
        model = build_model(model_arguments, tokenizer, text.block_length)
    else:
        model = adapter.load_base(model_arguments.model, diffusion_kind=model_arguments.diffusion_kind)
    check_tokenizer(tokenizer, model.config, model_arguments.model)
    check_block_length(text.block_length, "model", model.config)
    train, validation = load_data(source, tokenizer, training)
    if model_arguments.model is not None:
        check_shift(model, train, training)
    peft_config = adapter.config()
    trainer = MDLMTrainer(model, training, peft_config=peft_config, train_dataset=train, eval_dataset=validation)

    with run.start():
        trainer.train(run.checkpoint)
        run.save(trainer.whole_student(everywhere=False), tokenizer)
        model, nelbo = trainer.handed_on(), None
        with together(model, Ranks() if training.world_size > 1 else ALONE):
            if run.is_first and validation is not None:
                # Rows that are not packed: their completions, given the prompts.
                rows = trainer.data_collator([validation[i] for i in range(len(validation))])
                masks = {"prompt_mask": rows["labels"] == -100} if "labels" in rows else {}
                masks |= {"attention_mask": rows["attention_mask"]} if "attention_mask" in rows else {}
                nelbo = validation_nelbo(model, rows["input_ids"], **masks)
        if run.is_first:
            figures = None
            if nelbo is not None:
                run.save_figures(nelbo=nelbo)
                figures = [f"NELBO on the validation text: {nelbo:.4f} nats per token"]
                print(figures[0])
            about = {"figures": figures, "training": trainer.meter.total()}
            report = run.save_about(text, method="Trained by the continuous-time NELBO.", **about)
            write_report(training.output_dir, report)
        run.push()
    trainer.end()


if __name__ == "__main__":
    main()
