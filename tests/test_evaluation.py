"""The figures: generative perplexity, diversity, likelihood; and run_eval.py from the command line to the files."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
)

from evaluation import (
    EvaluationProtocol,
    RunReport,
    causal_loss,
    distinct_n,
    evaluate_held_out_text,
    evaluate_model,
    generative_perplexity,
    known_words,
    sequence_nll,
    text_blocks,
    unigram_entropy,
    validation_nelbo,
    vocabulary_of,
)
from evaluation.measure import plain_texts
from evaluation.options import EvaluationArguments
from evaluation.run_eval import main, parser
from evaluation.table import example_of
from evaluation.writing import WRITING
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.replay import Replay


EOS = 46  # of the character tokenizer; it writes <|endoftext|>
TEXTS = [
    "the cat sat.",
    "<|endoftext|>a dog<|endoftext|>ran",
    "x",
    "it was a dark and stormy night; the rain fell in torrents",
]
SHAPES = {"vocab_size": 48, "n_positions": 16, "n_embd": 16, "n_head": 2, "bos_token_id": EOS, "eos_token_id": EOS}


@pytest.fixture(scope="module")
def judge() -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, **SHAPES))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def nll_by_hand(judge, ids: list[int]) -> list[float]:
    """-log p of the tokens 1 .. of one window, in float64 from the logits, one forward for this window alone."""
    log_p = judge(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-log_p[i - 1, ids[i]].item() for i in range(1, len(ids))]


def test_retokenized_perplexity_is_that_of_a_computation_by_hand(judge, tokenizer):
    """Windows of the context scored apart; an EOS only where it is a window's first; micro average over all tokens."""
    totals, counts = [], []
    for text in TEXTS:
        ids, losses = tokenizer(text)["input_ids"], []
        for start in range(0, len(ids), 16):
            window = ids[start : start + 16]
            first = window.index(EOS) if EOS in window else None
            hand = nll_by_hand(judge, window) if len(window) > 1 else []
            losses += [loss for i, loss in enumerate(hand, start=1) if window[i] != EOS or i == first]
        totals.append(sum(losses))
        counts.append(len(losses))
    result = generative_perplexity(TEXTS, judge, tokenizer)
    assert result.tokens.tolist() == counts == [11, 8, 0, 57 - 4]
    assert result.nll.tolist() == pytest.approx(totals, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(totals) / sum(counts)), rel=1e-5)


def test_a_first_eos_inside_a_text_is_scored_and_a_second_is_not(judge, tokenizer):
    result = generative_perplexity(["ab<|endoftext|>c<|endoftext|>d"], judge, tokenizer)
    assert result.tokens.tolist() == [4]  # b, EOS, c, d


@pytest.mark.parametrize("template", [None, "<|endoftext|> $A", "<|endoftext|> $A <|endoftext|>"])
def test_a_judge_reads_the_name_of_its_mask_as_letters(judge, template):
    """Only BOS and EOS may be named in a text. What the tokenizer puts around a text stays."""
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate("ab [MASK]?")}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"eos_token": "<|endoftext|>", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special)
    eos, before, after = tokenizer.eos_token_id, [], []
    if template is not None:
        names = [("<|endoftext|>", eos)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=names
        )
        before, after = [eos], [eos] * template.endswith(">")
    plain, named = "ab a<|endoftext|>b", "a[MASK] b<|endoftext|>b[MASK]"
    for text in (plain, named):
        pieces = [[backend.token_to_id(c) for c in piece] for piece in text.split("<|endoftext|>")]
        ids = [*before, *pieces[0], eos, *pieces[1], *after]
        result = generative_perplexity([text], judge, tokenizer)
        nll, tokens = sequence_nll([ids], judge, eos_token_id=eos)
        assert torch.equal(result.nll, nll) and torch.equal(result.tokens, tokens), text


def test_raw_ids_perplexity_is_that_of_a_computation_by_hand(judge):
    """Every id counts, EOS too; the mean over L - 1 of each sample, then over samples."""
    samples = torch.tensor([[EOS, 3, EOS, 5, EOS], [1, 2, 3, 4, 5]])
    means = [sum(nll_by_hand(judge, ids)) / 4 for ids in samples.tolist()]
    result = generative_perplexity(samples, judge, convention="raw_ids")
    assert result.perplexity == pytest.approx(math.exp(sum(means) / 2), rel=1e-5)
    assert result.tokens.tolist() == [4, 4]


def test_the_two_conventions_average_differently(judge):
    """Samples of unequal length: the mean over samples is not the mean over tokens."""
    samples = [[1, 2], [5, 6, 7, 8, 9, 10, 11, 12]]
    nll, tokens = sequence_nll(samples, judge)
    macro = generative_perplexity(samples, judge, convention="raw_ids").perplexity
    assert macro == pytest.approx(math.exp((nll / tokens).mean()))
    assert abs(macro / math.exp(nll.sum() / tokens.sum()) - 1) > 0.01


def test_neither_batch_size_nor_padding_nor_company_changes_a_score(judge, tokenizer):
    together = generative_perplexity(TEXTS, judge, tokenizer, batch_size=8)
    one_by_one = generative_perplexity(TEXTS, judge, tokenizer, batch_size=1)
    assert together.nll.tolist() == pytest.approx(one_by_one.nll.tolist(), rel=1e-5)
    assert together.tokens.tolist() == one_by_one.tokens.tolist()
    alone = generative_perplexity(TEXTS[1:2], judge, tokenizer)
    assert alone.nll.item() == pytest.approx(together.nll[1].item(), rel=1e-5)


def test_a_judge_in_training_mode_still_gives_its_evaluation_score(tokenizer):
    judge = GPT2LMHeadModel(GPT2Config(n_layer=1, **SHAPES)).train()
    twice = [generative_perplexity(TEXTS, judge, tokenizer).perplexity for _ in range(2)]
    assert twice[0] == twice[1]


def test_what_cannot_be_scored_is_refused_by_name(judge, tokenizer):
    with pytest.raises(ValueError, match="nothing to score"):
        generative_perplexity(["x"], judge, tokenizer)
    with pytest.raises(ValueError, match="token id 48 is outside the judge's vocabulary of 48"):
        generative_perplexity([[1, 48]], judge, convention="raw_ids")
    with pytest.raises(ValueError, match="convention must be one of"):
        generative_perplexity(["ab"], judge, tokenizer, convention="macro")


def test_unigram_entropy_of_known_counts():
    assert unigram_entropy([[7, 7, 7, 7]]) == 0
    assert unigram_entropy([range(8)]) == pytest.approx(math.log(8))
    # Averaged over samples, not over the pooled counts (those would give log 2).
    assert unigram_entropy([[1, 1], [2, 2]]) == 0
    assert unigram_entropy([[1, 1, 2]]) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert unigram_entropy(["ababab", "ab abc"], "trigrams") == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert unigram_entropy(["a b  a\nb", "to be or not"], "words") == pytest.approx((math.log(2) + math.log(4)) / 2)
    with pytest.raises(ValueError, match="unit must be one of"):
        unigram_entropy([[1]], "characters")


def test_distinct_n_of_known_texts():
    assert distinct_n(["a b c d"], 3) == 1
    assert distinct_n(["a b c", "a b c"], 3) == 0.5
    assert distinct_n(["a a a a"], 2) == pytest.approx(1 / 3)
    assert distinct_n(["a b"], 3) == 0  # no trigram, and no division by zero


def test_known_words_ignore_case_and_punctuation():
    vocabulary = vocabulary_of(["The dog's bone, 1843; well-known."])
    assert vocabulary == {"the", "dog's", "bone", "well", "known"}
    assert known_words(["'THE' boan: dog's dogs", "boan, boan"], vocabulary) == pytest.approx(1 / 3)
    assert known_words(["1843 ..."], vocabulary) == 0


def test_nelbo_of_an_untrained_model_is_that_of_a_uniform_guess():
    """All logits are zero at the start, so every masked token costs log(V - 1), [MASK] left out of the normaliser.

    The expected weight times the masked share integrates to 1 - epsilon under the log-linear schedule.
    """
    shapes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "conditioning_size": 4}
    blocks = torch.randint(0, 8, (512, 32), generator=torch.Generator().manual_seed(0))
    figures = []
    for vocab_size in (9, 48):
        model = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=vocab_size, max_position_embeddings=32, **shapes))
        figures.append(validation_nelbo(model, blocks, draws=8, batch_size=512))
    assert figures[0] == pytest.approx(0.999 * math.log(8), rel=0.03)
    # The noise is the same for both, so the ratio has no sampling error at all.
    assert figures[1] / figures[0] == pytest.approx(math.log(47) / math.log(8), rel=1e-6)


def test_nelbo_is_the_any_order_loss_on_a_toy(build):
    """L = 2: half of (both masked: mean cost of the two) plus half of (one masked: cost given the other), enumerated."""
    model = build(vocab_size=4, max_position_embeddings=2, noise_epsilon=1e-9, bos_token_id=None, eos_token_id=None)
    model.lm_head.weight.data *= 4
    x = torch.tensor([[0, 2]])

    @torch.no_grad()
    def cost(canvas: list[int], position: int) -> float:
        logits = model(input_ids=torch.tensor([canvas])).logits[0, position, :3].double()
        return -logits.log_softmax(-1)[x[0, position]].item()

    both = (cost([3, 3], 0) + cost([3, 3], 1)) / 2
    one = (cost([3, 2], 0) + cost([0, 3], 1)) / 2
    estimate = validation_nelbo(model, x.expand(2**15, 2), draws=1, batch_size=2**15)
    assert estimate == pytest.approx((both + one) / 2, rel=0.03)
    assert abs(both - one) > 0.15 * estimate  # or the test would say nothing


def test_nelbo_depends_on_the_seed_but_not_on_the_batch_size(model):
    blocks = torch.randint(0, 46, (10, 32), generator=torch.Generator().manual_seed(0))
    figure = validation_nelbo(model, blocks, draws=2, batch_size=10)
    assert validation_nelbo(model, blocks, draws=2, batch_size=3) == pytest.approx(figure, rel=1e-6)
    assert validation_nelbo(model, blocks, draws=2, seed=1) != pytest.approx(figure, rel=1e-3)
    model.train()
    assert validation_nelbo(model, blocks, draws=2, batch_size=10) == pytest.approx(figure, rel=1e-6)  # no dropout
    assert model.training


def test_causal_loss_is_the_loss_that_the_judge_was_trained_with(judge):
    blocks = torch.randint(0, 46, (5, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert causal_loss(judge, blocks, batch_size=2) == pytest.approx(
            judge(blocks, labels=blocks).loss.item(), rel=1e-5
        )


def test_held_out_blocks_are_bos_text_eos_spread_over_the_text(tokenizer):
    blocks = text_blocks(["abcdefgh", "ijklmnop"], tokenizer, length=5, count=3)
    assert tokenizer.batch_decode(blocks[:, 1:-1]) == [
        "abc",
        "gh<|endoftext|>",
        "op<|endoftext|>",
    ]  # 1st, 3rd, last of 6
    assert blocks[:, 0].eq(EOS).all() and blocks[:, -1].eq(EOS).all()
    with pytest.raises(ValueError, match="holds 3 tokens, less text than one block of 6"):
        text_blocks(["ab"], tokenizer, length=6, count=1)


def protocol_of(judge, tokenizer, **options) -> EvaluationProtocol:
    return EvaluationProtocol(judge, tokenizer, **{"samples": 6, "seeds": 2, "length": 12} | options)


def test_rows_are_what_the_plain_functions_say_of_the_samples(model, judge, tokenizer):
    (row,) = evaluate_model("m", model, tokenizer, protocol_of(judge, tokenizer, batch_size=4), [3], [0.7])
    per_seed, nfe = [], []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        arguments = {"steps": 3, "temperature": 0.7, "length": 12, "num_return_sequences": 6}
        out = model.generate(**arguments, generator=generator, return_dict_in_generate=True)
        per_seed.append(
            (generative_perplexity(tokenizer.batch_decode(out.sequences), judge, tokenizer).perplexity, out.sequences)
        )
        nfe.append(out.nfe.double().mean().item())
    first, second = per_seed[0][0], per_seed[1][0]
    assert row["gen_ppl"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert row["gen_ppl_std"] == pytest.approx(abs(first - second) / math.sqrt(2), rel=1e-4)
    assert row["judge_nll"] == pytest.approx(math.log(first * second) / 2, rel=1e-5)
    assert row["entropy"] == pytest.approx(sum(unigram_entropy(ids.tolist()) for _, ids in per_seed) / 2)
    assert row["nfe"] == pytest.approx(sum(nfe) / 2)
    assert (row["steps"], row["samples"], row["seeds"], row["precision"]) == (3, 6, 2, "float64")
    json.dumps(row, allow_nan=False)


def test_a_row_names_its_sampler_and_last_step(model, judge, tokenizer):
    rows = []
    for arguments in ({}, {"last_step": "greedy"}, {"sampler": "confidence"}):
        rows += evaluate_model("m", model, tokenizer, protocol_of(judge, tokenizer, **arguments), [2], known_rows=rows)
    assert [row["sampler"] for row in rows] == ["ancestral", "ancestral, last step greedy", "confidence"]
    assert rows[2]["gen_ppl"] != rows[0]["gen_ppl"]


def test_a_known_row_is_left_out_only_for_the_same_weights_and_protocol(model, judge, tokenizer):
    def again(protocol: EvaluationProtocol) -> int:
        return len(list(evaluate_model("m", model, tokenizer, protocol, [2], known_rows=rows)))

    rows = list(evaluate_model("m", model, tokenizer, protocol_of(judge, tokenizer), [2]))
    assert again(protocol_of(judge, tokenizer, batch_size=1)) == 0
    assert again(protocol_of(judge, tokenizer, samples=5)) == 1
    assert again(protocol_of(judge, tokenizer, entropy_unit="words")) == 1
    model.lm_head.bias.data[0] += 1
    assert again(protocol_of(judge, tokenizer)) == 1


def test_held_out_text_is_judged_as_samples_are(judge, tokenizer):
    blocks = text_blocks(["the cat sat on the mat. " * 9], tokenizer, length=12, count=4)
    row = evaluate_held_out_text(blocks, tokenizer, protocol_of(judge, tokenizer, vocabulary={"cat", "mat"}))
    assert row["gen_ppl"] == pytest.approx(
        generative_perplexity(tokenizer.batch_decode(blocks), judge, tokenizer).perplexity
    )
    assert (row["model"], row["steps"], row["samples"]) == ("held-out text", None, 4)
    assert 0 < row["known_words"] < 1


def test_raw_ids_are_refused_when_the_judge_names_them_otherwise(judge, tokenizer, model):
    other = tokenizer.__class__.from_pretrained(Path(__file__).parents[1] / "recipes" / "tiny" / "tokenizer")
    assert list(evaluate_model("m", model, tokenizer, protocol_of(judge, other, convention="raw_ids"), [1]))
    reordered = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = reordered["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other._tokenizer = other._tokenizer.from_str(json.dumps(reordered))
    with pytest.raises(ValueError, match="raw_ids needs a judge with the model's own tokenizer"):
        list(evaluate_model("m", model, tokenizer, protocol_of(judge, other, convention="raw_ids"), [1]))


def report_of(folder: Path, judge, tokenizer, **options) -> RunReport:
    return RunReport(folder, protocol_of(judge, tokenizer, **options), [2, 4])


def test_the_picture_is_of_the_text_that_the_card_shows(model, judge, tokenizer, tmp_path, monkeypatch):
    """It is the row's sample, drawn again for other weights alone, and of the folder's own model alone."""
    canvases = []
    monkeypatch.setattr(
        Replay, "save", lambda self, *a, f=Replay.save, **k: canvases.append(self.canvases) or f(self, *a, **k)
    )
    report = report_of(tmp_path, judge, tokenizer)
    report.judge("teacher", model, tokenizer)
    assert not canvases and not (tmp_path / WRITING).exists()
    report.judge("round-1", model, tokenizer, label="round-1")
    row = example_of(report.known_rows(), "round-1")
    assert row["steps"] == 4 and plain_texts(torch.tensor(canvases[0][-1:]), tokenizer)[0].strip() == row["example"]
    with Image.open(tmp_path / WRITING) as picture:
        assert picture.n_frames == len(canvases[0]) > 2
    drawn = (tmp_path / WRITING).read_bytes()
    report.judge("round-1", model, tokenizer, label="round-1")
    report_of(tmp_path, judge, tokenizer, precision="legacy_float32").judge(
        "round-1", model, tokenizer, label="round-1"
    )
    assert len(canvases) == 1
    model.lm_head.weight.data.mul_(2)
    report.judge("round-1", model, tokenizer, label="round-1")
    assert len(canvases) == 2 and (tmp_path / WRITING).read_bytes() != drawn
    (tmp_path / "config.json").write_text("{}")
    report.write()
    assert "](writing.gif)" in (tmp_path / "README.md").read_text()


def test_a_picture_that_cannot_be_written_costs_no_figure(model, judge, tokenizer, tmp_path, caplog):
    (tmp_path / WRITING / "in the way").mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    report = report_of(tmp_path, judge, tokenizer)
    report.judge("round-1", model, tokenizer, label="round-1")
    assert "round-1" in report.write() and WRITING not in (tmp_path / "README.md").read_text()
    assert "there is no picture of round-1 writing: " in caplog.text and "\n" not in caplog.messages[-1]


@pytest.fixture
def folders(tmp_path, build, judge, tokenizer) -> Path:
    """A run's output folder with its teacher and two rounds, a judge, and texts."""
    run = tmp_path / "run"
    for folder, scale in ((run / "teacher", 1.0), (run / "round-1", 0.9), (run / "round-2", 0.8), (run, 0.8)):
        model = build()
        model.lm_head.weight.data *= scale
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "held_out.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path


def arguments_for(folders: Path) -> list[str]:
    text = str(folders / "held_out.txt")
    arguments = [
        str(folders / "run"),
        "--rounds",
        "--steps",
        "2",
        "4",
        "--temperatures",
        "0.5",
        "1",
        "--judge",
        str(folders / "judge"),
    ]
    arguments += ["--samples", "4", "--seeds", "2", "--entropy_unit", "words"]
    return [*arguments, "--reference_text", text, "--vocabulary_text", text]


def test_run_eval_writes_everything_and_goes_on_where_it_was(folders, capsys):
    main(arguments_for(folders))
    run = folders / "run"
    report = json.loads((run / "eval.json").read_text())
    assert {(row["model"], row["steps"], row["temperature"]) for row in report["results"]} == {
        ("held-out text", None, None),
        *((model, n, t) for model in ("teacher", "round-1", "round-2") for n in (2, 4) for t in (0.5, 1.0)),
    }
    assert report["label"] == "round-2"
    table = (run / "eval.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| round-2, matched |" in table
    assert (run / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert "model-index" in (run / "README.md").read_text()

    # Killed after some rows: these are kept to the last digit (a mark on one shows it), the others come back the same.
    kept = [row for row in report["results"] if row["model"] != "round-1"]
    kept[1]["example"] = "kept"
    (run / "eval.json").write_text(json.dumps(report | {"results": kept, "repository": "someone/tiny"}))
    main(arguments_for(folders))
    assert 'AutoModel.from_pretrained("someone/tiny",' in (run / "README.md").read_text()
    again = {
        tuple(row[k] for k in ("model", "steps", "temperature")): row
        for row in json.loads((run / "eval.json").read_text())["results"]
    }
    assert again.pop(tuple(kept[1][k] for k in ("model", "steps", "temperature")))["example"] == "kept"
    before = {tuple(row[k] for k in ("model", "steps", "temperature")): row for row in report["results"]}
    assert all(before[key] == row for key, row in again.items())


def test_run_eval_keeps_a_readme_of_the_users(folders):
    """In the model's own folder, where the report goes when nothing else is said."""
    teacher = folders / "run" / "teacher"
    (teacher / "README.md").write_text("my own words\n")
    main([str(teacher), "--judge", str(folders / "judge"), "--steps", "2", "--samples", "2", "--seeds", "1"])
    assert (teacher / "README.md").read_text() == "my own words\n"
    assert "Gen-PPL" in (teacher / "eval_card.md").read_text() and (teacher / "eval.json").is_file()


def test_run_eval_takes_the_options_of_a_recipe_and_shorter_ones():
    values = {"evaluation_steps": "3", "evaluation_temperatures": "1.0", "evaluation_samples": "7", "judge": "j"}
    values |= {"evaluation_seeds": "2", "evaluation_length": "9", "evaluation_sampler": "confidence"}
    values |= {"evaluation_last_step": "greedy", "evaluation_precision": "float32", "evaluation_batch_size": "5"}
    values |= {"evaluation_lockings": "spread+coupling", "evaluation_coupled_up_to": "4", "evaluation_bound": "6"}
    values |= {"convention": "raw_ids", "entropy_unit": "words", "judge_dtype": "bfloat16"}
    values |= {"evaluation_answers": "a.jsonl", "evaluation_answer_length": "4"}
    assert values.keys() == {option.name for option in dataclasses.fields(EvaluationArguments)}
    long = parser().parse_args(["m", *(f"--{name}={value}" for name, value in values.items())])
    short = parser().parse_args(
        ["m", *(f"--{name.removeprefix('evaluation_')}={value}" for name, value in values.items())]
    )
    (recipe,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(
        [f"--{name}={value}" for name, value in values.items()]
    )
    assert vars(long) == vars(short)
    assert parser().parse_args(["m", "--steps", "3", "--judge", "j", "--bound"]).evaluation_bound == 64
    assert {name: getattr(long, name) for name in values} == dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--judge", "no/such/judge"], "judge 'no/such/judge' is not a local file or folder"),
        (["--steps", "0"], "evaluation_steps must be one or more numbers of at least 1, not [0]"),
        (["--steps", "many"], "argument --steps/--evaluation_steps: invalid int value: 'many'"),
        (
            ["--temperatures", "-1"],
            "evaluation_temperatures must be one or more finite numbers of at least 0, not [-1.0]",
        ),
        (["--length", "64"], "length is 64, but the context of"),
        (
            ["--lockings", "loose"],
            "evaluation_lockings must be one or more of ['independent', 'spread', 'interleaved', ",
        ),
        (["--coupled_up_to", "0", "--lockings", "spread+coupling"], "evaluation_coupled_up_to must be at least 1"),
        (["--coupled_up_to", "4"], "evaluation_coupled_up_to (4) is for lockings with +coupling, but"),
        (["--bound", "-1"], "evaluation_bound must be at least 0 and finite, not -1"),
        (["--bound", "--temperatures", "0.5"], "evaluation_bound (64) is of temperature 1"),
        (["--bound", "--reference_text", ""], "--bound needs held-out text: give --reference_text"),
        (["--reference_text", "nowhere.txt"], "text 'nowhere.txt': no such file or folder"),
        (["--convention", "macro"], "argument --convention: invalid choice: 'macro'"),
        (["--sampels=3"], "unknown argument '--sampels'; the nearest valid one is '--samples'"),
    ],
)
def test_run_eval_refuses_bad_input_in_one_line_and_writes_nothing(folders, capsys, changes, message):
    before = sorted(folders.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main([*arguments_for(folders), *changes])
    error = capsys.readouterr().err
    assert exit.value.code in (1, 2)  # 2: wrong as written
    assert message in error and error.count("\n") == 1
    assert sorted(folders.rglob("*")) == before


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["no/such/model", "--output_dir", "out"], "model 'no/such/model' is not a local file or folder"),
        (["no/such/model"], "'no/such/model' is not a folder: say with --output_dir where the report goes"),
        (["judge"], "model 'judge' cannot be loaded: its model_type is 'gpt2', and its config.json does not say"),
        (["judge", "--rounds"], "'judge' holds no round-* folder"),
        (["a=run", "a=run/teacher"], "two models would have the row label 'a'"),
        (["broken"], "model 'broken' cannot be loaded"),
        (["run", "bare", "--output_dir", "out"], "model 'bare' cannot be loaded"),
        (["run", "--tokenizer", "larger"], "the tokenizer has 49 tokens, more than the model's vocab_size 48"),
        (["run", "--tokenizer", "permuted"], "mask token has the id 4, but the model's mask_token_id is 47"),
        (["run", "--output_dir", "held_out.txt"], "held_out.txt: File exists"),
    ],
)
def test_run_eval_refuses_models_that_it_cannot_judge(folders, capsys, monkeypatch, models, message):
    monkeypatch.chdir(folders)
    MDLMForMaskedDiffusion.from_pretrained("run").save_pretrained("bare")
    larger = AutoTokenizer.from_pretrained("run")
    larger.add_tokens("one more")
    larger.save_pretrained("larger")
    AutoTokenizer.from_pretrained("run", mask_token="d").save_pretrained("permuted")
    (folders / "broken").mkdir()
    (folders / "broken" / "config.json").write_text("{")
    capsys.readouterr()
    before = sorted(folders.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main([*models, "--steps", "2", "--judge", "judge"])
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert message in error.splitlines()[-1] and "Traceback" not in error
    assert sorted(folders.rglob("*")) == before


def test_a_truncated_checkpoint_is_named_in_one_line(folders, capsys):
    weights = folders / "run" / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(SystemExit):
        main([str(folders / "run" / "teacher"), "--steps", "2", "--judge", str(folders / "judge")])
    error = capsys.readouterr().err
    assert "teacher' cannot be loaded: " in error.splitlines()[-1]
    assert not (folders / "run" / "teacher" / "eval.json").exists()


def test_a_judge_of_another_vocabulary_reads_the_text(model, tokenizer, folders):
    """The model's EOS becomes the judge's own, and is scored as an EOS, not as the characters of its name."""
    judge_tokenizer = tokenizer.__class__.from_pretrained(folders / "judge", eos_token="<end>", bos_token="<end>")
    judge = AutoModelForCausalLM.from_pretrained(folders / "judge")
    judge.resize_token_embeddings(len(judge_tokenizer), mean_resizing=False)
    blocks = pad(torch.full((1, 4), 1), (1, 1), value=EOS)  # <|endoftext|>aaaa<|endoftext|>
    row = evaluate_held_out_text(blocks, tokenizer, protocol_of(judge, judge_tokenizer, samples=1, length=6))
    end = judge_tokenizer.convert_tokens_to_ids("<end>")
    assert end == 48
    by_hand = nll_by_hand(judge, [end, 1, 1, 1, 1, end])[:4]
    assert row["judge_nll"] == pytest.approx(sum(by_hand) / 4, rel=1e-5)
