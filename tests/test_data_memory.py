"""Memory of the processes that tokenise a text and of the one that reads its blocks: it does not grow with the text."""

import json
import random
from pathlib import Path

import pytest
from tiny_run import ROOT, run_python
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from benchmarks.data_pipeline import write_corpus


MEMORY = """
import json, resource, sys
from datasets import disable_progress_bars
from transformers import AutoTokenizer
from trainers.runs import parallel_text
from trainers.runs.text_arguments import TextArguments
from trainers.runs.text_blocks import load_blocks
disable_progress_bars()
parallel_text.PART_BYTES = 2**19
file, tokenizer, ways = sys.argv[1], AutoTokenizer.from_pretrained(sys.argv[2]), json.loads(sys.argv[3])
text = TextArguments(file, block_length=1024, **ways)
tokens = sum(len(row["input_ids"]) for row in load_blocks(text, tokenizer)[0])
who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(tokens, *(resource.getrusage(one).ru_maxrss / 1024 for one in who))
"""


def tokens_and_peaks(text: Path, tokenizer: Path, ways: dict) -> tuple[float, float, float]:
    """How many tokens the blocks of a text hold, the most MB of the process that reads them, and of those that tokenise for it."""
    result = run_python(MEMORY, str(text), str(tokenizer), json.dumps(ways))
    assert result.returncode == 0, result.stderr
    return tuple(map(float, result.stdout.split()))


@pytest.mark.slow
@pytest.mark.parametrize("ways", [{"num_proc": 2}, {"streaming": True}], ids=str)
def test_memory_does_not_grow_with_the_text(tmp_path, ways):
    """Eight times the text, hardly more memory. Tokens take 200 bytes until they are integers."""
    peaks = []
    for megabytes in (1, 8):
        write_corpus(tmp_path / "corpus.txt", megabytes)
        tokens, *both = tokens_and_peaks(tmp_path / "corpus.txt", ROOT / "recipes" / "bible" / "tokenizer", ways)
        assert tokens > megabytes * 1e5
        peaks.append(max(both))
    assert peaks[1] - peaks[0] < 150, peaks


@pytest.mark.slow
def test_a_gigabyte_goes_through_in_bounded_memory(tmp_path):
    """Of long words, each of them a token, so that it takes minutes. As Python's numbers the tokens would be 13 GB."""
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=14)) for _ in range(5000)]
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<mask>", "<unk>", *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "mask", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path / "tokenizer")
    some = "".join(word + letters.choice("    \n") for word in letters.choices(words, k=2**19)).encode()
    readers, workers = [], []
    for copies in (1, 10**9 // len(some) + 1):
        with (tmp_path / "corpus.txt").open("wb") as file:
            for _ in range(copies):
                file.write(some)
        tokens, reader, worker = tokens_and_peaks(tmp_path / "corpus.txt", tmp_path / "tokenizer", {"num_proc": 2})
        assert tokens > 0.99 * copies * 2**19
        readers.append(reader)
        workers.append(worker)
    assert (tmp_path / "corpus.txt").stat().st_size > 1e9
    mapped = 2 * 2 * tokens / 2**20  # the cached tokens and blocks, of 2 bytes, whose pages the system can take back
    assert readers[1] - readers[0] < 100 + mapped, (readers, mapped)
    assert workers[1] - workers[0] < 50, workers
