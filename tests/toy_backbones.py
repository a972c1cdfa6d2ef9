"""Tiny random networks of transformers, of every kind that `as_masked_diffusion` knows, for the tests."""

import torch
import transformers as hf


K, MASK, LENGTH = 48, 47, 32
SHAPE = {"vocab_size": K, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NETWORKS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE, **GROUPED, max_position_embeddings=LENGTH)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SHAPE, **GROUPED, max_position_embeddings=LENGTH)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SHAPE, **GROUPED, head_dim=16, max_position_embeddings=LENGTH, tie_word_embeddings=True)
    ),
    "gemma": lambda: hf.GemmaForCausalLM(
        hf.GemmaConfig(**SHAPE, **GROUPED, head_dim=16, max_position_embeddings=LENGTH)
    ),
    # Layers with a sliding window of 4 tokens to each side, but for the first.
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **SHAPE, **TOKENS, local_attention=8, global_attn_every_n_layers=2, max_position_embeddings=LENGTH
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SHAPE, **NO_DROPOUT, max_position_embeddings=LENGTH)),
    "eurobert": lambda: hf.EuroBertForMaskedLM(
        hf.EuroBertConfig(**SHAPE, **TOKENS, num_key_value_heads=2, max_position_embeddings=LENGTH)
    ),
    "roberta": lambda: hf.RobertaForMaskedLM(
        hf.RobertaConfig(**SHAPE, **NO_DROPOUT, max_position_embeddings=LENGTH + 2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=K, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH, bos_token_id=1, eos_token_id=1)
    ),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=K, dim=32, hidden_dim=48, n_layers=1, n_heads=2, max_position_embeddings=LENGTH, dropout=0.0
        )
    ),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SHAPE, **GROUPED, head_dim=16, max_position_embeddings=LENGTH)
    ),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(vocab_size=K, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH)
    ),
}
SHIFT = {"qwen2": 1}  # as in Dream


def make_network(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """In eval mode, with weights large enough that every token looks at the others."""
    network = NETWORKS[name]()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return network.to(dtype).eval()


def tokens(*shape: int, seed: int = 0) -> torch.LongTensor:
    """None of them special in any of the networks."""
    return torch.randint(4, MASK, shape, generator=torch.Generator().manual_seed(seed))


def shifted(logits: torch.Tensor, shift: int) -> torch.Tensor:
    """The logits [B, L, V] of a network, moved to the positions of the tokens that they predict: by hand."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits
