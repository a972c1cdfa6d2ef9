"""Makes a tokenizer of sub-words (byte-level BPE) from a folder of text, ready for masked diffusion.

python -m trainers.subword_tokenizer recipes/novels/tokenizer --text NOVELS/train --vocabulary 8192 --characters 20000000
"""

import argparse
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from evaluation.text_sources import open_text
from modeling_mcd.command_line import one_line_errors
from trainers.character_tokenizer import END_OF_TEXT, MASK


SMALLEST = 256 + 2  # every byte, so that any text has ids, and the two special tokens
PIECE = 2**16  # characters given to the training of the BPE at a time


def subword_tokenizer(
    texts: Iterable[str], vocabulary: int, model_max_length: int, lower_case: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens, the last two being `<|endoftext|>` (BOS = EOS) and `[MASK]`.

    Any text has ids, and decoding them gives the text again (lower-cased if so asked). The same texts give the same tokens.

    Raises:
        ValueError: a vocabulary that has no room for the 256 bytes and the two special tokens, or that the texts cannot fill.
    """
    if vocabulary < SMALLEST:
        raise ValueError(f"vocabulary is {vocabulary}, but the bytes and the special tokens alone are {SMALLEST}")
    backend = Tokenizer(models.BPE())
    if lower_case:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocabulary - 2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocabulary - 2:
        raise ValueError(
            f"vocabulary is {vocabulary}, but the text has only {backend.get_vocab_size() + 2} sub-words: "
            "give more text or a smaller vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        mask_token=MASK,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def evenly(documents: list[str], characters: int | None) -> Iterator[str]:
    """Pieces of the documents, at most `characters` in all, the same share of each document from its start."""
    share = 1.0 if characters is None else min(1.0, characters / max(1, sum(map(len, documents))))
    for document in documents:
        kept = round(len(document) * share)
        for start in range(0, kept, PIECE):
            yield document[start : min(start + PIECE, kept)]


@one_line_errors
def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Where the tokenizer is saved.")
    parser.add_argument("--text", required=True, help="Text file or folder of .txt files.")
    parser.add_argument("--vocabulary", type=int, required=True, help="Tokens in all, the special ones included.")
    parser.add_argument("--characters", type=int, help="Use only so much of the text, evenly over its documents.")
    parser.add_argument("--model_max_length", type=int, default=256, help="Block length of the models it is for.")
    parser.add_argument("--lower_case", action="store_true", help="Read all text as lower case.")
    options = parser.parse_args(arguments)
    documents = ["".join(document) for document in open_text(options.text).documents()]
    texts = evenly(documents, options.characters)
    tokenizer = subword_tokenizer(texts, options.vocabulary, options.model_max_length, options.lower_case)
    tokenizer.save_pretrained(options.folder)
    print(f"{len(tokenizer)} tokens in {options.folder}")


if __name__ == "__main__":
    main()
