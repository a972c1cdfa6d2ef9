"""Own data: whatever yields texts becomes blocks of tokens, and a model learns them.

python examples/own_data.py [STEPS]
"""

import sys
from collections.abc import Iterator

from datasets import Dataset

from evaluation.text import pack
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers import MDLMTrainer, MDLMTrainingArguments
from trainers.character_tokenizer import character_tokenizer


def texts() -> Iterator[str]:
    """Rows of a database, lines of a log, files of your own format: anything that can be written as text."""
    for n in range(500):
        yield f"{n} and {n} are {n + n}."


def main(steps: int = 100) -> MDLMForMaskedDiffusion:
    tokenizer = character_tokenizer(model_max_length=32)
    blocks = pack(([text] for text in texts()), tokenizer, length=32)  # BOS, 30 tokens, EOS; EOS between texts
    dataset = Dataset.from_dict({"input_ids": list(blocks)})
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shapes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    model = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=len(tokenizer), **shapes, **special))
    arguments = MDLMTrainingArguments(
        "runs/own_data", max_steps=steps, warmup_steps=0, learning_rate=3e-3, per_device_train_batch_size=32,
        bf16=False, save_strategy="no", report_to="none", logging_steps=max(steps // 5, 1),
    )  # fmt: skip
    MDLMTrainer(model, arguments, train_dataset=dataset).train()
    print(tokenizer.decode(model.generate(steps=16, seed=0)[0], skip_special_tokens=True))
    return model


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
