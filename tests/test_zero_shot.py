"""Zero-shot perplexity: published detokenisers, windows, figures by hand, resumption, and pairs; all on local files."""

import json
import math
import time

import huggingface_hub
import pytest
import torch
from hub_server import CUT, HubServer
from small_model import make_context_matter
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation import causal_loss, sequence_nelbo
from evaluation.detokenizers import DETOKENIZERS, detokenize
from evaluation.run_eval import main
from evaluation.text import text_blocks
from evaluation.zero_shot import PRESETS, Corpus, corpus_of, score_windows, windows_of
from modeling_mcd.loading import load_model


LINES = ["the cat n't sat", "", "a dog ran to the <unk> 's house", "it was N N and $ 1 of rain"] * 6
PLAIN = ["the catn't sat", "", "a dog ran to the ?'s house", "it was 1 1 and $1 of rain"] * 6


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("wikitext", " = = Early life = = \n", " == Early life ==\n"),
        ("wikitext", 'the dogs \' 1 @,@ 000 @-@ odd ( or so ) 2 @.@ 5 ; " so " , he said .\n', None),
        ("wikitext", "at 20 ° N and [ x ] { y } ' z '\n it 's N ", "at 20°N and [x] {y} 'z'\nit's 1 "),
        ("ptb", "N N N dogs ' tails did n't cost $ N or <unk> 1\\/2 it 's", None),
        ("lm1b", 'He said : " go " , and ( then ) left . See http : / / x at $ 5 and / or £ 6 !', None),
        ("lambada", "\u201cgo\u201d he said \n", '\n"go" he said'),
        (None, " as it is , \n", " as it is , \n"),
    ],
)
def test_corpora_become_text_by_the_published_rules(name, text, expected):
    by_hand = {
        "the dogs": 'the dogs\' 1,000-odd (or so) 2.5; "so", he said .\n',
        "N N N": "N 1 1 dogs' tails didn't cost $1 or ? 1/2 it's",
        "He said": 'He said: "go", and (then) left. See http://x at $5 and/or £6!',
    }
    expected = expected or next(value for key, value in by_hand.items() if text.startswith(key))
    assert detokenize(text, name) == expected


def test_scientific_papers_take_two_sets_of_rules():
    text = "a ( b ) , c . d @-@ e ?"
    assert detokenize(text, "scientific_papers") == detokenize(detokenize(text, "wikitext"), "lm1b")
    assert {corpus.detokenizer for corpus in PRESETS.values()} == {*DETOKENIZERS, None}


def test_words_of_the_command_line_mean_corpora(tmp_path):
    assert corpus_of("wikitext103") == PRESETS["wikitext103"]
    named = corpus_of(f"ptb={tmp_path / 'ptb.txt'},split=test")
    assert (named.name, named.detokenizer, named.split, named.column) == ("ptb", "ptb", "test", "sentence")
    assert named.revision is None and named.folder is None, "those of the dataset that the file replaces"
    other = corpus_of("acme/novels,config=small,column=body,lines=kept,name=novels")
    assert other == Corpus("novels", "acme/novels", config="small", column="body", lines="kept")
    assert corpus_of("texts/my.txt").name == "my.txt"
    with pytest.raises(ValueError, match="'x,splitt=test' sets 'splitt', but a corpus has name, config"):
        corpus_of("x,splitt=test")
    with pytest.raises(ValueError, match="detokenizer of 'x' must be one of .*, not 'penn'"):
        corpus_of("x,detokenizer=penn")


def test_a_file_of_lines_and_a_table_give_the_same_windows(tokenizer, tmp_path):
    """Those of the detokenised documents in `text_blocks`, an EOS after each, empty ones included."""
    (tmp_path / "ptb.txt").write_text("\n".join(LINES) + "\n")
    (tmp_path / "ptb.jsonl").write_text("".join(json.dumps({"sentence": line}) + "\n" for line in LINES))
    expected = text_blocks(PLAIN, tokenizer, 20, 1000)
    size = sum(len(text) for text in PLAIN)
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in PLAIN)
    for file in ("ptb.txt", "ptb.jsonl"):
        found = windows_of(corpus_of(f"ptb={tmp_path / file}").documents(), tokenizer, 20, None)
        assert torch.equal(found.blocks, expected) and found.available == len(expected)
        assert found.size == pytest.approx(size * len(expected) * 18 / tokens)
        few = windows_of(corpus_of(f"ptb={tmp_path / file}").documents(), tokenizer, 20, 3)
        assert torch.equal(few.blocks, expected[[0, round((len(expected) - 1) / 2), len(expected) - 1]])
        assert few.size == pytest.approx(found.size * 3 / len(expected)) and few.available == len(expected)
    kept = Corpus("w", str(tmp_path / "ptb.txt"), lines="kept")
    assert list(kept.documents()) == [line + "\n" if line else "" for line in LINES]
    assert list(Corpus("w", str(tmp_path / "ptb.txt")).documents()) == ["\n".join(LINES) + "\n"]


def test_bytes_are_those_of_utf_8(tokenizer):
    few = windows_of(["äöü" * 20], tokenizer, 12, None)
    assert few.size == pytest.approx(120 * len(few.blocks) * 10 / 61)


# --- The Hub


@pytest.mark.parametrize("name", [name for name, corpus in PRESETS.items() if corpus.revision is not None])
@pytest.mark.parametrize("partial", ["", "partial-"])
def test_the_layout_of_a_parquet_branch_gives_the_split(name, partial, tmp_path):
    """CONFIGURATION/SPLIT/0000.parquet, with `partial-` before the split where the Hub converted the beginning alone."""
    datasets = pytest.importorskip("datasets")
    corpus, configurations = PRESETS[name], {"ptb": "penn_treebank", "lm1b": "plain_text"}
    for split in ("train", corpus.split):
        home = tmp_path / configurations.get(name, name) / f"{partial}{split}"
        home.mkdir(parents=True)
        rows = datasets.Dataset.from_dict({corpus.column: [f"it is {split}"]})
        rows.to_parquet(home / "0000.parquet")
    found = datasets.load_dataset(
        str(tmp_path), data_dir=corpus.folder, split=corpus.split, cache_dir=tmp_path / "cache"
    )
    assert found[corpus.column] == [f"it is {corpus.split}"]


@pytest.mark.parametrize("status", ["offline", "unreachable", 404, 401, 429, 500, CUT])
def test_a_corpus_that_cannot_be_downloaded_is_one_line(status, monkeypatch):
    """Whatever the Hub does, the message names the dataset and what to give instead."""
    datasets = pytest.importorskip("datasets")
    with HubServer("no token") as hub:
        endpoint = "http://127.0.0.1:9" if status == "unreachable" else hub.endpoint
        hub.broken = {} if status in ("offline", "unreachable", 404) else {".*": status}
        if status != "offline":
            monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
            for place in (huggingface_hub.constants, datasets.config):
                monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again, later and later
        with pytest.raises(FileNotFoundError) as found:
            list(PRESETS["lambada"].documents())
    message = str(found.value)
    assert message.startswith("text 'EleutherAI/lambada_openai' is not a local file or folder and could not be loaded")
    assert message.endswith("; give its file: lambada=FILE") and "\n" not in message
    assert bool(hub.requests) == (status not in ("offline", "unreachable"))


# --- From the command line to the files


@pytest.fixture
def folder(build, tokenizer, tmp_path, monkeypatch):
    """Two models, an autoregressive one with the same ids, and a text."""
    for name, seed in (("teacher", 0), ("student", 1)):
        model = build(max_position_embeddings=20)
        make_context_matter(model)
        model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    shapes = {"vocab_size": 48, "n_embd": 16, "n_head": 2, "n_layer": 1, "bos_token_id": 46, "eos_token_id": 46}
    GPT2LMHeadModel(GPT2Config(n_positions=20, **shapes)).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "ptb.txt").write_text("\n".join(LINES) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["teacher", "student", "--perplexity", "ptb=ptb.txt", "ptb.txt", "--output_dir", "out", "--judge", "judge"]


def test_the_figures_are_those_of_the_functions(folder, tokenizer, capsys):
    main([*WORDS, "--draws", "6"])
    rows = json.loads((folder / "out" / "perplexity.json").read_text())["results"]
    assert [(row["model"], row["corpus"]) for row in rows] == [
        (model, corpus) for model in ("teacher", "student", "judge (autoregressive)") for corpus in ("ptb", "ptb.txt")
    ]
    windows = windows_of(corpus_of("ptb=ptb.txt").documents(), tokenizer, 20, None)
    given = torch.zeros_like(windows.blocks, dtype=torch.bool)
    given[:, 0] = True
    bounds = {n: sequence_nelbo(load_model(n), windows.blocks, given, draws=6) for n in ("teacher", "student")}
    judge = GPT2LMHeadModel.from_pretrained("judge").eval()
    for row in rows[::2]:
        bound = bounds.get(row["model"])
        nats = causal_loss(judge, windows.blocks) if bound is None else bound.mean
        assert row["nats_per_token"] == pytest.approx(nats, rel=1e-5) and row["exact"] == (bound is None)
        assert row["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
        total = nats * len(windows.blocks) * 19
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / windows.size, rel=1e-5)
        assert row["windows"] == row["available"] == len(windows.blocks) and row["length"] == 20
        assert row["bits_per_byte_se"] / row["bits_per_byte"] == pytest.approx(
            row["nats_per_token_se"] / nats, rel=1e-5
        )
    difference, error = bounds["student"].minus(bounds["teacher"])
    shown = capsys.readouterr().out
    assert shown.startswith((folder / "out" / "perplexity.md").read_text().strip())
    assert f"| student less teacher, nats per token, paired | {difference:+.4f} ± {error:.4f} |" in shown
    assert (
        f"ptb: {len(windows.blocks)} of {len(windows.blocks)} windows of 20 tokens, the BOS given; ptb.txt, detoken"
        in shown
    )
    assert "teacher: upper bound, 6 draws a window; student: upper bound, 6 draws a window; judge (auto" in shown
    assert str(folder) not in (folder / "out" / "perplexity.json").read_text()


def test_what_is_known_is_not_measured_again(folder, monkeypatch):
    main(WORDS[:-2])
    before = (folder / "out" / "perplexity.json").read_text()
    calls = []

    def counted(*given, **options):
        calls.append(1)
        return score_windows(*given, **options)

    monkeypatch.setattr("evaluation.run_eval.score_windows", counted)
    main(WORDS[:-2])
    assert not calls and (folder / "out" / "perplexity.json").read_text() == before
    main([*WORDS, "--windows", "3"])
    assert len(calls) == 6, "other windows, and another model"
    rows = json.loads((folder / "out" / "perplexity.json").read_text())["results"]
    assert {(row["windows"], row["available"] > 3) for row in rows if row["model"] == "judge (autoregressive)"} == {
        (3, True)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draws", "3"], "--draws must be an even integer of at least 2, not 3"),
        (["--length", "40"], "length is 40, but the context of 'teacher' is 20 tokens"),
        (["--steps", "4"], "unknown argument '--steps'"),
        (["--perplexity", "missing.txt"], "text 'missing.txt': no such file or folder"),
        (["--perplexity", "short.txt"], "'short.txt' holds 4 tokens, less than one window of 20"),
        (["--perplexity", "ptb=ptb.txt", "ptb.txt,name=ptb"], "two texts would have the column 'ptb'"),
        (["--perplexity"], "--perplexity names no text"),
        (["--judge", "other"], "judge 'other' has other token ids than 'teacher'"),
        (["--judge", "narrow"], "judge 'narrow' sees 8 tokens, but a window has 20: give --length 8"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(folder, tokenizer, words, message, capsys):
    (folder / "short.txt").write_text("abc")
    judge = GPT2LMHeadModel.from_pretrained("judge")
    if "other" in words:
        judge.save_pretrained("other")
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        tokenizer.save_pretrained("other")
        (folder / "other" / "tokenizer.json").write_text(json.dumps(content))
    if "narrow" in words:
        judge.config.n_positions = 8
        judge.transformer.wpe = torch.nn.Embedding.from_pretrained(judge.transformer.wpe.weight[:8].clone())
        judge.save_pretrained("narrow")
        tokenizer.save_pretrained("narrow")
    with pytest.raises(SystemExit) as end:
        main(["teacher", "--perplexity", "ptb=ptb.txt", "--output_dir", "out", *words])
    printed = capsys.readouterr().err.strip().splitlines()
    assert end.value.code and message in printed[-1] and not (folder / "out" / "perplexity.json").exists()
