"""The benchmarks: each can be started, and at a tiny size their sides compute the same thing."""

import argparse
import copy
import importlib
import itertools
import math
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from tiny_run import ROOT

import benchmarks
from benchmarks import (
    bound_table,
    coupling_ablation,
    coupling_levers,
    distillation_step,
    divergence,
    load_checkpoint,
    measuring,
    pretraining,
    sampling,
    scale_costs,
    sharded_memory,
    workloads,
)
from trainers.adapters import with_adapter


TINY = {"batch_size": 2, "length": 16, "layers": 1, "hidden_size": 32, "vocab_size": 48, "steps": 4, "device": "cpu"}


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)])
def test_every_benchmark_can_be_imported_and_has_a_way_in(name):
    """Benchmarks import from the whole library, so a name that moves there breaks them."""
    module = importlib.import_module(f"benchmarks.{name}")
    assert name in ("measuring", "paper_report") or callable(module.main)


@pytest.mark.parametrize(("module", "words"), [(bound_table, ["--blocks", "0"]), (sampling, ["--steps", "4", "-1"])])
def test_a_number_out_of_range_is_refused_in_one_line(module, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    with pytest.raises(SystemExit) as end:
        module.main()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        end.value.code == 2 and line == f"benchmark: error: argument {words[0]}: must be at least 1, not {words[-1]}"
    )


def test_chains_on_remembered_rows_are_those_on_new_ones(build):
    """The ablation of the coupling runs the network once for all its chains."""
    blocks, remembered, shape = torch.randint(46, (48, 12)), {}, {"states": 3, "levels": 2}
    model = build().float()
    plain, first, again = (
        coupling_ablation.train_chain(copy.deepcopy(model), blocks, 2, rows, disable_tqdm=True, **shape)
        for rows in (None, remembered, remembered)
    )
    assert len(remembered) == 2 and plain.coupling.start.all(), "all of it has been trained: a new chain has zeros"
    for name, value in plain.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]) and torch.equal(value, again.state_dict()[name]), name
    wider = coupling_ablation.train_chain(copy.deepcopy(model), blocks, 2, remembered, disable_tqdm=True, states=5)
    assert wider.coupling.start.shape == (1, 5)


@pytest.mark.parametrize("sharing", ["gates", 2])
def test_a_chain_that_levels_share(build, sharing):
    """All levels are the same at first; what a level learns is its own, and what all learn is everyone's."""
    blocks, shape = (
        torch.randint(46, (144, 12), generator=torch.Generator().manual_seed(0)),
        {"states": 3, "levels": 2, "shared": False},
    )
    model = build().float()
    model.add_coupling(shape | {"emission": "table", "window": None})
    fresh = coupling_ablation.SharedCoupling(model.config, sharing)
    for weight in fresh(None)[:3]:
        assert weight.shape[0] == 2 and torch.equal(weight[0], weight[1])
    rate = {"learning_rate": 0.3, "warmup_steps": 0, "disable_tqdm": True}
    trained = coupling_ablation.train_chain(build().float(), blocks, 6, sharing=sharing, **shape, **rate)
    weights = trained.coupling(None)
    assert (weights.transition[0] - weights.transition[1]).abs().max() > 1e-3
    assert trained.coupling.transition.shape == (1, 3, 3) and trained.coupling.transition.abs().max() > 1e-3
    assert torch.equal(weights.emission[0], weights.emission[1]) == (sharing == "gates")


@pytest.mark.parametrize("options", [{}, {"width": 6}, {"topics": 2}, {"width": 6, "joins": False}])
def test_every_lever_is_a_law(options):
    """The probabilities of two revealed tokens of four sum to one, beside one that is seen and one that is summed out."""
    generator, tokens, states = torch.Generator().manual_seed(0), 3, 4
    shapes = (states,), (states, states), (states, tokens), (3, tokens), (3, 6)
    *chain, logits, hidden = (2 * torch.randn(shape, generator=generator) for shape in shapes)
    level = coupling_levers.Level(*chain, **options)
    if level.context is not None:
        level.context.data.normal_(std=0.3, generator=generator)
    pairs = torch.tensor(list(itertools.product(range(tokens), repeat=2)))
    texts = torch.tensor([[0, 1, 2, 0]]).repeat(len(pairs), 1)
    texts[:, :2] = pairs
    masked, revealed = (
        torch.tensor([row]).expand(len(pairs), 4) for row in ([True, True, False, True], [True, True, False, False])
    )
    p = logits.softmax(dim=-1)
    canvas = texts, masked, revealed, p.repeat(len(pairs), 1), hidden.repeat(len(pairs), 1)
    gain = level.log_gain(*canvas)
    law = gain.exp() * p[0, pairs[:, 0]] * p[1, pairs[:, 1]]
    assert law.sum().item() == pytest.approx(1, abs=1e-5)
    marginals = law.view(tokens, tokens).sum(dim=1)[:, None] * law.view(tokens, tokens).sum(dim=0)
    alone = level.log_gain_of_single_tokens(*canvas).sum(dim=1).exp() * p[0, pairs[:, 0]] * p[1, pairs[:, 1]]
    torch.testing.assert_close(alone.view(tokens, tokens), marginals)
    joined = (law.view(tokens, tokens) - marginals).abs().max().item()
    assert joined < 1e-6 if options.get("joins") is False else joined > 1e-4


def test_a_lever_that_updates_the_network_is_a_law(build):
    """The probabilities of two revealed tokens sum to one, and they are those of the updated network under the chain."""
    generator, states = torch.Generator().manual_seed(0), 4
    model = build(vocab_size=5, bos_token_id=3, eos_token_id=3).requires_grad_(False)  # the last token is [MASK]
    network = with_adapter(copy.deepcopy(model), LoraConfig(r=2, lora_alpha=2))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    chain = [2 * torch.randn(shape, generator=generator) for shape in ((states,), (states, states), (states, 5))]
    pairs = torch.tensor(list(itertools.product(range(4), repeat=2)))
    texts = torch.tensor([[0, 1, 2, 0]]).repeat(len(pairs), 1)
    texts[:, :2] = pairs
    masked = torch.tensor([True, True, False, True]).expand(len(pairs), 4)
    revealed = torch.tensor([True, True, False, False]).expand(len(pairs), 4)
    told = coupling_levers.seen(model, texts, masked)
    with torch.no_grad():
        laws = {}
        for name, trained in {"frozen": None, "updated": network}.items():
            gain = coupling_levers.Level(*chain, network=trained).gain(texts, masked, revealed, *told)
            alone = (coupling_levers.log_of(told[0], texts, masked) * revealed).sum(dim=1)
            laws[name] = (gain + alone).exp()
            assert laws[name].sum().item() == pytest.approx(1, abs=1e-5), name
        own = coupling_levers.seen(network, texts, masked)
        gain = coupling_levers.Level(*chain).log_gain(texts, masked, revealed, *own)
        expected = gain + (coupling_levers.log_of(own[0], texts, masked) * revealed).sum(dim=1)
    torch.testing.assert_close(laws["updated"].log(), expected)
    assert (laws["updated"] - laws["frozen"]).abs().max() > 1e-3
    coupling_levers.Level(*chain, network=network).gain(texts, masked, revealed, *told).sum().backward()
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("workload", workloads.WORKLOADS)
def test_a_workload_gives_the_same_result_each_time(tmp_path, workload):
    first, again = (workloads.WORKLOADS[workload](argparse.Namespace(**TINY), str(tmp_path)) for _ in range(2))
    values = [first(), first()]
    assert [again(), again()] == values
    assert (values[0] == values[1]) == (workload == "sampling"), "a step of training changes the next loss"


def test_the_sides_of_the_step_have_the_same_losses():
    options = argparse.Namespace(**TINY | {"steps": 2}, warmup=1)
    plain, ours, bare = (distillation_step.measure(side, options)["losses"] for side in distillation_step.SIDES[:3])
    assert len(plain) == 3 and ours == pytest.approx(plain, rel=1e-4) and bare == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("kind", ["student_first", "teacher_first"])
def test_the_sides_of_the_divergence_agree(kind):
    options = argparse.Namespace(rows=8, hidden_size=8, vocab_size=32, kind=kind)
    plain, chunked = (divergence.measure(side, options) for side in ("plain", "chunked"))
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-4) and plain["loss"] > 0.01
    assert chunked["gradient_norms"] == pytest.approx(plain["gradient_norms"], rel=1e-4)


def test_the_sides_of_loading_read_the_same_weights(tmp_path, monkeypatch):
    config = load_checkpoint.MDLMConfig
    small = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(load_checkpoint, "MDLMConfig", lambda: config(**small))
    load_checkpoint.write_checkpoints(tmp_path, "mdlm")
    plain = load_checkpoint.measure(load_checkpoint.plain, tmp_path / "plain")
    assert load_checkpoint.measure(load_checkpoint.load_model, tmp_path / "load_model")["sum"] == plain["sum"] != 0


def test_the_full_canvas_leaves_no_mask_at_the_end():
    shape = argparse.Namespace(hidden_size=32, layers=1, dtype="float32", device="cpu")
    model = sampling.build(shape, length=16, vocab=48)
    for timed in (1, 4):
        canvas = sampling.full_canvas(model, 2, 16, 4, timed, "float64")
        assert ((canvas == model.config.mask_token_id).any()) == (timed == 1)


def test_a_locking_is_timed_beside_independent_reveals():
    options = argparse.Namespace(hidden_size=32, layers=1, dtype="float32", device="cpu", length=16, plain_steps=2)
    options.compile, options.no_warm_up, options.repeats, options.locking = False, True, 1, ["spread", "interleaved"]
    row = sampling.compare(sampling.build(options, 16, 48), options, 2, 4, "float64")
    assert row["independent_over_spread"] == row["seconds"]["generate"] / row["seconds"]["spread"]
    assert row["independent_over_interleaved"] > 0


def test_sides_are_measured_in_turn():
    calls = []
    runs = measuring.alternate("ab", 3, lambda side: calls.append(side) or {"seconds": float(len(calls))})
    assert calls == list("ababab")
    assert measuring.medians(runs, "seconds") == {"a": {"seconds": 3.0}, "b": {"seconds": 4.0}}


@pytest.mark.slow
def test_before_and_after_compares_two_trees(tmp_path):
    words = "--before HEAD --layers 1 --hidden_size 32 --vocab_size 48 --length 16 --processes 1 --pairs 2".split()
    words += ["--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.before_after", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.count("the same results") == 2 and len(list(tmp_path.glob("before_after_*.json"))) == 2


@pytest.mark.slow
def test_ways_to_pre_train_differ_and_learn(monkeypatch):
    monkeypatch.setattr(pretraining, "SHAPE", pretraining.SHAPE | {"num_hidden_layers": 1, "hidden_size": 48})
    nelbo = {name: pretraining.measure(5, 0.01, way)["nelbo"] for name, way in pretraining.WAYS.items()}
    assert len(set(nelbo.values())) == 3 and max(nelbo.values()) < math.log(3071)


def test_what_a_run_costs_is_counted_by_hand():
    """The 169M shape: 12 layers of 12 d^2 weights, attention over 1,024 tokens, half the positions before the head."""
    job = scale_costs.jobs()["Table 1: MCD of the 169M model (small.yaml)"]
    width, length, vocabulary = 768, 1024, 50258
    forward = 12 * (2 * 12 * width**2 + 4 * length * width)
    assert job.flops() == 4 * forward + 4 * vocabulary * width
    assert job.sent()["DDP"] == 8 * job.network.num_parameters()
    # Dividing among more processes never costs memory, and FSDP2 of two needs less than DDP.
    each = [sharded_memory.bytes_of(mode, 1, 8) for mode in ("ddp", "zero1", "zero2", "zero3", "fsdp2")]
    assert each == sorted(each, reverse=True) and each[0] == 28 and each[-1] == 3
