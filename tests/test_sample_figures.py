"""Figures of samples: repetition, self-BLEU, copies of the training text, MAUVE, two judges; and all as `evaluate` modules."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_run import save_teacher
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation import (
    distinct_n,
    generative_perplexity,
    known_words,
    load_judge,
    load_report,
    rep_n,
    self_bleu,
    unigram_entropy,
    unique_share,
    vocabulary_of,
)
from evaluation import mauve as mauve_room
from evaluation.gradient_moment import Gradients, gradient_moment, text_gradients
from evaluation.mauve import curve_area, frontier_integral, k_means, mauve, principal_components, text_features
from evaluation.memorisation import TrainingNgrams
from evaluation.run_eval import main
from modeling_mcd import MDLMForMaskedDiffusion


TEXTS = ["a rose is a rose is a rose", "the cat sat on the mat", "the cat sat on the cat", "to be or not to be"]


def tiny_judge(seed: int) -> GPT2LMHeadModel:
    shapes = {"vocab_size": 48, "n_positions": 64, "n_embd": 16, "n_head": 2, "n_layer": 1}
    judge = GPT2LMHeadModel(GPT2Config(bos_token_id=46, eos_token_id=46, **shapes)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in judge.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return judge


@pytest.fixture(scope="module")
def judges(tmp_path_factory, tokenizer):
    """Folders of two judges."""
    folders = []
    for seed in (1, 2):
        folders.append(str(tmp_path_factory.mktemp("judge")))
        tiny_judge(seed).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


# --- Repetition and diversity


def test_rep_n_of_known_counts():
    assert rep_n(["a b a b a b"], 2) == pytest.approx(1 - 2 / 5)
    assert rep_n(["a b c d e"], 2) == 0 and rep_n(["a"], 2) == 0
    assert rep_n([[1, 2, 1, 2, 1, 2], [5, 6, 7]], 2) == pytest.approx((3 / 5 + 0) / 2)
    assert rep_n(["a b a b", "x"], 2) == pytest.approx(1 / 3), "a text without n-grams does not count"
    with pytest.raises(ValueError, match="not one str"):
        rep_n("a b")


def test_unique_share_counts_different_samples():
    assert unique_share([[1, 2], [1, 2], [2, 1], [3]]) == 0.75
    assert unique_share(["a  b", "a b"]) == 0.5, "white space is no difference between texts"


def bleu(sample: list[str], references: list[list[str]], n: int) -> float:
    """BLEU by its definition, smoothing method 1."""
    precisions = []
    for order in range(1, n + 1):
        grams = [Counter(tuple(t[i : i + order]) for i in range(len(t) - order + 1)) for t in (sample, *references)]
        matched = sum(min(count, max(other[gram] for other in grams[1:])) for gram, count in grams[0].items())
        if order == 1 and matched == 0:
            return 0.0
        precisions.append((matched or 0.1) / max(grams[0].total(), 1))
    nearest = min((abs(len(other) - len(sample)), len(other)) for other in references)[1]
    penalty = 1.0 if len(sample) > nearest else math.exp(1 - nearest / len(sample))
    return penalty * math.prod(precisions) ** (1 / n)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_self_bleu_is_the_mean_of_bleu_by_its_definition(n):
    generator = torch.Generator().manual_seed(n)
    texts = [
        torch.randint(6, (int(torch.randint(3, 30, (), generator=generator)),), generator=generator) for _ in range(20)
    ]
    texts = [[str(token) for token in text.tolist()] for text in texts]
    by_definition = [bleu(text, texts[:i] + texts[i + 1 :], n) for i, text in enumerate(texts)]
    assert self_bleu([" ".join(text) for text in texts], n) == pytest.approx(sum(by_definition) / len(texts))


def test_self_bleu_of_copies_and_of_strangers():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1)
    assert self_bleu(["a b c d", "e f g h"]) == 0
    with pytest.raises(ValueError, match="give at least 2, not 1"):
        self_bleu(["a"])


# --- Memorisation


def test_overlap_counts_the_ngrams_that_stand_in_the_training_text():
    words = [f"w{i}" for i in range(40)]
    known = TrainingNgrams([" ".join(words[:20]), " ".join(words[20:])])
    assert known.share([" ".join(words[:20])], 8) == known.share([" ".join(words[3:17])], 13) == 1
    assert known.share([" ".join(words[:8] + ["x"])], 8) == 0.5
    assert known.share([" ".join(words[13:28])], 8) == pytest.approx(1 / 8), "none crosses the end of a document"
    assert known.share([" ".join(reversed(words))], 8) == 0, "the order counts"
    assert known.share(["too short"], 8) is None
    assert known.digest != TrainingNgrams([" ".join(words)]).digest
    with pytest.raises(ValueError, match="holds no 8 words in a row"):
        TrainingNgrams(["short"])


# --- MAUVE


def histograms(*counts) -> list[torch.Tensor]:
    return [torch.tensor(count, dtype=torch.float64) / sum(count) for count in counts]


def test_the_curve_of_equal_and_of_disjoint_histograms():
    p, q = histograms([1, 2, 3], [3, 1, 1])
    assert curve_area(p, p) == pytest.approx(1) and frontier_integral(p, p) == 0
    assert 0 < curve_area(p, q) < 1 and curve_area(p, q) == pytest.approx(curve_area(q, p))
    # Disjoint: the curve is (1 - w)^c, w^c, whose area is c B(c, c + 1) = Gamma(6)^2 / Gamma(11) for c = 5.
    apart = histograms([1, 0], [0, 1])
    assert curve_area(*apart, points=10_000) == pytest.approx(math.gamma(6) ** 2 / math.gamma(11), rel=1e-3)
    assert frontier_integral(*apart) == pytest.approx(1)


def test_the_frontier_integral_is_its_integral():
    p, q = histograms([1, 2, 3, 0], [3, 1, 0, 4])
    weights = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    mixture = weights * p + (1 - weights) * q
    p_part, q_part = ((torch.xlogy(one, one) - torch.xlogy(one, mixture)).sum(1) for one in (p, q))
    integral = 2 * (weights[:, 0] * p_part + (1 - weights[:, 0]) * q_part).mean().item()
    assert frontier_integral(p, q) == pytest.approx(integral, rel=1e-4)


def test_k_means_finds_clusters_that_lie_apart():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(7, 3, generator=generator, dtype=torch.float64)
    truth = torch.arange(7).repeat(30)
    rows = centres[truth] + 0.01 * torch.randn(210, 3, generator=generator, dtype=torch.float64)
    found = k_means(rows, 7, torch.Generator().manual_seed(1))
    assert len(set(zip(truth.tolist(), found.tolist(), strict=True))) == 7


def test_principal_components_keep_the_variance_and_no_more():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(400, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.1, 0.1])
    kept = principal_components(rows)
    assert kept.shape == (400, 1) or kept.shape == (400, 2)
    variance = (rows - rows.mean(0)).square().sum()
    assert kept.square().sum() >= 0.9 * variance > kept[:, :-1].square().sum()


def gaussians(gap: float, count: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(2, count, 8, generator=generator)
    return p, q + gap


def test_mauve_falls_with_the_distance_and_lies_near_one_for_equal_laws():
    figures = [mauve(*gaussians(gap)).mauve for gap in (0.0, 0.3, 3.0)]
    assert figures[0] > 0.9 and figures[0] > figures[1] > figures[2] and figures[2] < 0.1
    same = mauve(gaussians(0)[0], gaussians(0)[0])
    assert same.mauve == pytest.approx(1) and same.frontier_integral == 0 and same.buckets == 40
    with pytest.raises(ValueError, match="at least 2 rows"):
        mauve(torch.ones(1, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="not finite"):
        mauve(torch.full((5, 3), math.nan), torch.ones(5, 3))


@pytest.mark.parametrize("gap", [0.0, 0.2, 0.5])
def test_mauve_is_that_of_the_package(gap):
    """Either differs by some hundredths between seeds of its own k-means, so their means are compared."""
    package = pytest.importorskip("mauve")
    p, q = gaussians(gap, 600)
    theirs, ours = [], []
    for seed in range(4):
        their = package.compute_mauve(p_features=p.numpy(), q_features=q.numpy(), verbose=False, seed=seed)
        our = mauve(p, q, seed=seed)
        theirs.append(torch.tensor([their.mauve, their.mauve_star, their.frontier_integral]))
        ours.append(torch.tensor([our.mauve, our.smoothed, our.frontier_integral]))
        assert our.buckets == their.num_buckets
        histograms = torch.from_numpy(their.p_hist).double(), torch.from_numpy(their.q_hist).double()
        assert curve_area(*histograms) == pytest.approx(their.mauve, abs=1e-6)
        assert frontier_integral(*histograms) == pytest.approx(their.frontier_integral, abs=1e-6)
    difference = torch.stack(theirs).mean(0) - torch.stack(ours).mean(0)
    assert difference.abs().max() < 0.04


def test_features_are_the_hidden_states_at_the_last_token(tokenizer):
    judge = tiny_judge(1)
    texts = ["the cat", "a", " it was a dark and stormy night "]
    features = text_features(texts, judge, tokenizer, batch_size=2)
    for text, feature in zip(texts, features, strict=True):
        ids = torch.tensor([tokenizer(text.strip())["input_ids"]])
        with torch.no_grad():
            by_hand = judge.transformer(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(feature, by_hand, rtol=1e-4, atol=1e-5)
    assert text_features([""], judge, tokenizer).equal(text_features(["<|endoftext|>"], judge, tokenizer))


# --- The gradient moment


def test_the_gradient_moment_is_that_of_all_pairs_of_different_texts(tokenizer):
    """By hand, from the loss that transformers computes. A text of one token has no gradient."""
    judge, texts = tiny_judge(1), ["it was a dark night", "the rain fell", "no"]
    others = ["to be or not to be", "the cat sat", "it ran"]
    rows = []
    for text in (*texts, *others):
        judge.zero_grad()
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        judge(input_ids=ids, labels=ids).loss.backward()
        rows.append(torch.cat([weight.grad.flatten().double() for weight in judge.parameters()]))
    p, q = torch.stack(rows[:3]), torch.stack(rows[3:])
    apart = ~torch.eye(3, dtype=torch.bool)
    expected = (p @ p.T)[apart].mean() + (q @ q.T)[apart].mean() - 2 * (p @ q.T).mean()
    judge.zero_grad()
    found = [text_gradients(some, judge, tokenizer) for some in ((*texts, "a"), others)]
    assert found[0].count == 3 and gradient_moment(*found) == pytest.approx(expected.item(), rel=1e-4)
    assert all(weight.grad is None for weight in judge.parameters()), "the judge keeps no gradient"
    with pytest.raises(ValueError, match="at least 2 texts of 2 tokens on either side, not 1 and 3"):
        gradient_moment(text_gradients(["it was"], judge, tokenizer), found[1])


def test_the_gradient_moment_has_no_bias():
    """Vectors of two normal distributions: over many draws its mean is the squared distance of the means."""
    generator = torch.Generator().manual_seed(0)

    def drawn(mean: float, count: int) -> Gradients:
        g = mean + torch.randn(count, 4, generator=generator)
        return Gradients(g.sum(dim=0), g.square().sum().item(), count)

    for gap in (0.0, 1.0):
        found = torch.tensor([gradient_moment(drawn(0.5, 3), drawn(0.5 + gap, 5)) for _ in range(4000)])
        assert abs(found.mean().item() - 4 * gap**2) < 4.42 * found.std().item() / 4000**0.5
        assert found.min() < 0 or gap


def test_the_gradient_moment_sees_samples_that_repeat_each_other(tokenizer):
    """Each is as likely as before: Gen-PPL within the spread of text, and the entropy of a sample is that of text."""
    text = (Path(__file__).parents[1] / "recipes/tiny/text/validation").glob("*.txt")
    letters = " ".join(next(iter(sorted(text))).read_text().lower().split())
    pieces = [
        "".join(c for c in letters[at : at + 60] if c in tokenizer.get_vocab()) for at in range(2000, 14000, 300)
    ]
    judge = tiny_judge(2)
    reference = text_gradients(pieces[::2], judge, tokenizer)
    other = gradient_moment(text_gradients(pieces[1::2], judge, tokenizer), reference)
    repeated = gradient_moment(text_gradients([pieces[1]] * 20, judge, tokenizer), reference)
    assert repeated > 5 * abs(other)


# --- In a report


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, judges, tokenizer):
    """An evaluation with the bound, then again with everything that takes longer, in one folder."""
    home = tmp_path_factory.mktemp("evaluated")
    save_teacher(home / "model")
    tokenizer.save_pretrained(home / "model")
    (home / "text.txt").write_text("to be or no to be; it is so, as we do. " * 60)
    words = [str(home / "model"), "--judge", judges[0], "--steps", "2", "--samples", "6", "--seeds", "2"]
    words += ["--reference_text", str(home / "text.txt"), "--vocabulary_text", str(home / "text.txt")]
    reports = []
    for more in (
        ["--bound", "3"],
        ["--mauve", "--memorised", "--second_judge", judges[1], "--gradient_moment"],
    ):
        main([*words, *more])
        reports.append(load_report(home / "model")["results"])
    return home, words, reports


def test_what_is_asked_for_is_measured_and_the_bound_is_kept(evaluated):
    _, _, (before, after) = evaluated
    assert len(before) == len(after) == 2
    for plain, row in zip(before, after, strict=True):
        assert "mauve_reference" not in plain and plain["mauve"] is None and plain["second_gen_ppl"] is None
        assert 0 <= row["mauve"] <= 1 and row["second_gen_ppl"] > 1 and row["note"] is None
        assert plain["gradient_moment"] is None and "gradient_text" not in plain
        for name, value in plain.items():
            assert value is None or row[name] == value, name
    held_out, sampled = after
    assert sampled["bound"] is not None and sampled["memorised_8"] in (0, None)
    assert 0.2 < held_out["memorised_8"] < 1, "all but n-grams with the words that a block's ends cut"


def test_the_second_judge_and_mauve_are_those_of_the_samples(evaluated, judges, tokenizer):
    home, _, (_, (_, row)) = evaluated
    model = MDLMForMaskedDiffusion.from_pretrained(home / "model")
    perplexities = []
    for seed in (0, 1):
        ids = model.generate(steps=2, seed=seed, num_return_sequences=6)
        perplexities.append(generative_perplexity(tokenizer.batch_decode(ids), *load_judge(judges[1])).perplexity)
    assert row["second_gen_ppl"] == pytest.approx(sum(perplexities) / 2, rel=1e-5)
    assert row["second_gen_ppl_std"] == pytest.approx(abs(perplexities[0] - perplexities[1]) / math.sqrt(2), rel=1e-3)
    assert row["second_judge"] != row["judge"] and "6 held-out texts" in row["mauve_reference"]


def test_the_table_names_the_second_judge_and_the_ceiling(evaluated):
    home, _, (_, (held_out, row)) = evaluated
    table = (home / "model" / "eval.md").read_text()
    assert "MAUVE; Gen-PPL of the second judge; gradient moment |" in table
    assert abs(held_out["gradient_moment"]) < row["gradient_moment"], "text against other text, and random samples"
    assert f"gradient moment {held_out['gradient_moment']:.3g}" in table and "0 is best" in table
    assert f"Second judge: {row['second_judge']}" in table
    assert f"MAUVE {held_out['mauve']:.3f}" in table, "the ceiling: held-out text against other held-out text"


def test_rows_with_more_figures_serve_those_who_ask_for_fewer(evaluated, monkeypatch):
    _, words, _ = evaluated
    monkeypatch.setattr(MDLMForMaskedDiffusion, "generate", lambda *a, **k: pytest.fail("a sample was drawn"))
    main(words)
    main([*words, "--mauve", "--memorised"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--mauve", "--samples", "56"],
            "samples are compared with held-out text beyond the 56 blocks of its own",
        ),
        (["--mauve", "--reference_text", ""], "--mauve needs held-out text: give --reference_text"),
        (["--memorised", "--vocabulary_text", ""], "--memorised needs training text: give --vocabulary_text"),
        (
            ["--gradient_moment"],
            "--gradient_moment is of a model that neither wrote the samples nor judges them: give",
        ),
        (
            ["--gradient_moment", "--reference_text", ""],
            "--gradient_moment needs held-out text: give --reference_text",
        ),
        (["--second_judge", "no/such"], "judge 'no/such' is not a local file or folder"),
    ],
)
def test_figures_without_what_they_need_are_refused(evaluated, capsys, more, message):
    home, words, _ = evaluated
    (home / "text.txt").write_text(("to be or no to be; it is so, as we do. " * 60)[: 56 * 30])
    with pytest.raises(SystemExit):
        main([*words, *more])
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


# --- Modules of the evaluate library


METRICS = Path(mauve_room.__file__).parent / "metrics"
EXPECTED = {
    "gen_ppl": lambda judge: (
        {"judge": judge},
        {"gen_ppl": generative_perplexity(TEXTS, *load_judge(judge)).perplexity},
    ),
    "unigram_entropy": lambda _: ({}, {"unigram_entropy": unigram_entropy(TEXTS, "words")}),
    "distinct_n": lambda _: ({"n": 2}, {"distinct_n": distinct_n(TEXTS, 2)}),
    "known_words": lambda _: (
        {"vocabulary_texts": TEXTS[:1]},
        {"known_words": known_words(TEXTS, vocabulary_of(TEXTS[:1]))},
    ),
    "rep_n": lambda _: ({"n": 2}, {"rep_n": rep_n(TEXTS, 2)}),
    "self_bleu": lambda _: ({}, {"self_bleu": self_bleu(TEXTS)}),
    "unique_share": lambda _: ({}, {"unique_share": 1.0}),
    "ngram_overlap": lambda _: (
        {"training_texts": ["then a rose is a rose is a rose", "x"]},
        {"memorised_8": 1.0, "memorised_13": None},
    ),
    "gradient_moment": lambda judge: (
        {"model": judge, "references": TEXTS[::-1]},
        {
            "gradient_moment": pytest.approx(
                gradient_moment(*[text_gradients(texts, *load_judge(judge)) for texts in (TEXTS, TEXTS[::-1])]),
                rel=1e-4,
            )
        },
    ),
    "mauve": lambda judge: (
        {"model": judge, "references": TEXTS[::-1]},
        {"mauve": pytest.approx(1.0), "smoothed": pytest.approx(1.0), "frontier_integral": 0.0, "buckets": 2},
    ),
}


def test_every_module_folder_is_tested():
    assert {folder.name for folder in METRICS.iterdir() if folder.name != "__pycache__"} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_module_loads_offline_by_its_folder_and_gives_the_figure(name, judges, monkeypatch):
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    evaluate = pytest.importorskip("evaluate")
    options, expected = EXPECTED[name](judges[0])
    found = evaluate.load(str(METRICS / name)).compute(predictions=TEXTS, **options)
    assert {key: found[key] for key in expected} == expected
