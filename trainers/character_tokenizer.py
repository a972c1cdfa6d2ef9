"""The tokenizer of the tiny models: one token per character of lower-cased English prose.

python -m trainers.character_tokenizer recipes/tiny/tokenizer
"""

import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast


ALPHABET = " abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"-"
END_OF_TEXT, MASK = "<|endoftext|>", "[MASK]"


def character_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """46 characters, then `<|endoftext|>` (BOS = EOS), then `[MASK]`: 48 tokens.

    Text is lower-cased, accents are removed, and typographic quotes and dashes become plain ones. Every run of other characters
    (line ends too) becomes one space. So decoding ids and encoding the text again gives the same ids.
    """
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(ALPHABET)}, merges=[]))
    outside = "[^" + ALPHABET.replace("-", r"\-") + "]"
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
        + [normalizers.Replace(Regex(old), new) for old, new in (("[‘’`]", "'"), ("[“”«»]", '"'), ("[–—]", "-"))]
        + [normalizers.Replace(Regex(outside), " "), normalizers.Replace(Regex("  +"), " ")]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    character_tokenizer(model_max_length=256).save_pretrained(sys.argv[1])
