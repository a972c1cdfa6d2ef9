"""A chat tokenizer for tests: single characters, the marks of a chat template, and a template that says what is generated."""

from trainers.character_tokenizer import character_tokenizer


MARKS = ("<|start|>", "<|say|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ m['role'] }}<|say|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|say|>{% endif %}"
)


def chat_tokenizer(model_max_length: int = 32):
    """48 tokens of the character tokenizer, three marks, and a template in which a turn ends with `<|end|>`."""
    tokenizer = character_tokenizer(model_max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def talk(*turns: str) -> list[dict]:
    """Turns "role: content" as messages."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
