"""Divergences from hidden rows: the plain formula's values and gradients, nothing of rows x V, and every wrapper."""

import math
import shutil

import pytest
import torch
from tiny_run import run_python
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_mcd.head_mdlm as head_mdlm
from modeling_mcd.forward_process_mdlm import uniform_nelbo
from modeling_mcd.head_mdlm import HeadRows
from trainers.divergences import DIVERGENCES, cross_entropy, differentiated, divergence


V, D, MASK = 13, 5, 11
CASES = [(kind, tau, 0.5) for kind in DIVERGENCES for tau in (1.0, 0.7)]
CASES += [("jensen_shannon", 0.7, beta) for beta in (0.0, 0.2, 1.0)]


def make_rows(rows, seed, dtype=torch.float64, vocab_size=V, mask=MASK, size=D, learned=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, size), (vocab_size, size), (vocab_size,)
    tensors = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return HeadRows(*(tensor.requires_grad_(learned) for tensor in tensors), mask)


def leaves(rows):
    return rows.hidden, rows.weight, rows.bias


def plain(kind, student, teacher, tau, beta):
    """The definitions on whole probability tables without [MASK], and autograd."""

    def probabilities(rows, temperature):
        logits = (rows.hidden @ rows.weight.T + rows.bias) / temperature
        kept = [token for token in range(logits.shape[-1]) if token != rows.mask_token_id]
        return logits[:, kept].softmax(dim=-1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(dim=-1)

    p, q = probabilities(student, 1.0), probabilities(teacher, tau).detach()
    if kind == "jensen_shannon" and 0 < beta < 1:
        m = beta * q + (1 - beta) * p
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    if kind == "student_first" or (kind == "jensen_shannon" and beta == 1):
        return kl(p, q)
    if kind in ("teacher_first", "jensen_shannon"):
        return kl(q, p)
    if kind == "total_variation":
        return (p - q).abs().sum(dim=-1) / 2
    return (p.log() - q.log()).square().sum(dim=-1) / len(student.weight)


@pytest.fixture(params=[1, 3, 100], ids=lambda rows: f"{rows}_rows_a_chunk")
def chunk(request, monkeypatch):
    monkeypatch.setitem(head_mdlm.CHUNK, "cpu", request.param * V)


@pytest.mark.parametrize("mask", [MASK, None])
@pytest.mark.parametrize(("kind", "tau", "beta"), CASES)
def test_values_and_gradients_are_the_plain_formulas(chunk, kind, tau, beta, mask):
    """With one upstream gradient for all rows, as from a sum, and with different ones, for which the backward computes
    the rows again.
    """
    student, teacher = make_rows(8, 0, mask=mask), make_rows(8, 1, mask=mask)
    for upstream in (torch.full((8,), 0.3), torch.linspace(-1, 2, 8)):
        ours, theirs = divergence(kind, student, teacher, tau, beta), plain(kind, student, teacher, tau, beta)
        assert torch.allclose(ours, theirs, rtol=1e-10)
        found = torch.autograd.grad(ours, leaves(student), upstream.double())
        expected = torch.autograd.grad(theirs, leaves(student), upstream.double())
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert all(tensor.grad is None for tensor in leaves(teacher))


def test_a_vocabulary_wider_than_one_product_gives_the_same():
    """On a CPU logits are made in several products of some columns each."""
    assert 2 * head_mdlm.CPU_COLUMNS < 2500
    student, teacher = (make_rows(3, seed, vocab_size=2500, mask=2000) for seed in (0, 1))
    ours, theirs = (of("student_first", student, teacher, 0.7, 0.5) for of in (divergence, plain))
    assert torch.allclose(ours, theirs, rtol=1e-10)
    found, expected = (torch.autograd.grad(values.sum(), leaves(student)) for values in (ours, theirs))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_the_uniform_bound_in_chunks_is_the_one_on_all_logits(chunk):
    student, generator = make_rows(8, 0, mask=None), torch.Generator().manual_seed(2)
    z, x = torch.randint(V, (2, 8), generator=generator)
    alpha, slope = torch.linspace(0.1, 0.9, 8, dtype=torch.float64), torch.full((8,), -1.0, dtype=torch.float64)
    whole = uniform_nelbo((student.hidden @ student.weight.T + student.bias).log_softmax(-1), z, x, alpha, slope)
    parts = differentiated(
        lambda log_p, rows: uniform_nelbo(log_p, z[rows], x[rows], alpha[rows], slope[rows]), student
    )
    assert torch.allclose(parts, whole, rtol=1e-10)
    for upstream in (torch.full((8,), 0.3), torch.linspace(-1, 2, 8)):
        found, expected = (torch.autograd.grad(y, leaves(student), upstream.double(), True) for y in (parts, whole))
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, -1.0, 3.0, 0.0])])
def test_cross_entropy_is_the_plain_formulas(chunk, weights):
    student, tokens = make_rows(5, 0), torch.tensor([0, 3, 3, 12, 10])
    weights = None if weights is None else weights.double()
    logits = (student.hidden @ student.weight.T + student.bias).index_fill(1, torch.tensor(MASK), -math.inf)
    theirs = torch.nn.functional.cross_entropy(logits, tokens, reduction="none") * (1 if weights is None else weights)
    ours = cross_entropy(student, tokens, weights)
    assert torch.allclose(ours, theirs, rtol=1e-10)
    found, expected = (torch.autograd.grad(values.sum() / 7, leaves(student)) for values in (ours, theirs))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("kind", "tau", "beta"), CASES)
def test_gradcheck(kind, tau, beta):
    student, teacher = make_rows(3, 2), make_rows(3, 3, learned=False)
    assert torch.autograd.gradcheck(
        lambda *tensors: divergence(kind, HeadRows(*tensors, MASK), teacher, tau, beta), leaves(student)
    )


def test_gradcheck_of_cross_entropy():
    student, tokens = make_rows(3, 2), torch.tensor([0, 12, 4])
    assert torch.autograd.gradcheck(lambda *t: cross_entropy(HeadRows(*t, MASK), tokens), leaves(student))


@pytest.mark.parametrize(("kind", "tau", "beta"), [*CASES, ("cross_entropy", 1.0, 0.5)])
def test_float32_agrees_with_float64_to_a_millionth(kind, tau, beta):
    """The mean over 256 rows of 1000 tokens, and its gradients, relative to their norm."""

    def loss_and_gradients(dtype):
        rows = [make_rows(256, seed, torch.float32, 1000, 999, 64, learned=False).to(dtype) for seed in (4, 5)]
        for network in rows:
            network.weight /= 8  # logits of order 1
        student = HeadRows(*(tensor.requires_grad_() for tensor in leaves(rows[0])), 999)
        if kind == "cross_entropy":
            values = cross_entropy(student, torch.arange(256))
        else:
            values = divergence(kind, student, rows[1], tau, beta)
        assert values.dtype == dtype
        return [values.mean(), *torch.autograd.grad(values.mean(), leaves(student))]

    for single, double in zip(loss_and_gradients(torch.float32), loss_and_gradients(torch.float64), strict=True):
        assert (single.double() - double).norm() <= 1e-6 * double.norm()


@pytest.mark.parametrize("kind", [*DIVERGENCES, "cross_entropy"])
def test_no_rows_give_zero_and_zero_gradients(kind):
    student, teacher = make_rows(4, 0, torch.float32), make_rows(4, 1, torch.float32)
    none = torch.zeros(4, dtype=torch.bool)
    if kind == "cross_entropy":
        values = cross_entropy(student.at(none), torch.arange(0))
    else:
        values = divergence(kind, student.at(none), teacher.at(none), 0.9)
    assert values.shape == (0,) and values.sum() == 0
    values.sum().backward()
    assert all(tensor.grad.eq(0).all() for tensor in leaves(student))


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation under it returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("kind", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("alike", [True, False])
def test_nothing_is_larger_than_a_chunk_or_the_head(monkeypatch, kind, alike):
    rows, vocab_size = 64, 100
    monkeypatch.setitem(head_mdlm.CHUNK, "cpu", 8 * vocab_size)
    student, teacher = (make_rows(rows, seed, torch.float32, vocab_size, 99) for seed in (0, 1))
    with LargestTensor() as largest:
        if kind == "cross_entropy":
            values = cross_entropy(student, torch.arange(rows))
        else:
            values = divergence(kind, student, teacher, 0.9)
        values.backward(torch.ones(rows) if alike else torch.arange(rows).float())
    assert largest.numbers == 8 * vocab_size


class Products(TorchDispatchMode):
    """Counts the products of two matrices that are made under it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__.removesuffix("_") in ("mm", "addmm")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("training, products", [("everything", 4), ("all but the head", 3), ("nothing", 2)])
def test_no_gradient_is_made_that_nobody_wants(training, products):
    """Products of matrices: one for the logits of each network, one for each gradient that is needed."""
    student, teacher = make_rows(4, 0), make_rows(4, 1, learned=False)
    if training == "all but the head":  # an adapter is trained
        student = HeadRows(student.hidden, student.weight.detach(), student.bias.detach(), MASK)
    with Products() as made, torch.set_grad_enabled(training != "nothing"):
        total = divergence("student_first", student, teacher).sum()
        if training != "nothing":
            total.backward()
    assert made.count == products
    assert (student.hidden.grad is None) == (training == "nothing")
    assert (student.weight.grad is None) == (training != "everything")


def test_a_second_backward_through_the_same_graph():
    student, teacher = make_rows(4, 0), make_rows(4, 1)
    loss = divergence("student_first", student, teacher, 0.9).sum() / 3
    first = [gradient.clone() for gradient in torch.autograd.grad(loss, leaves(student), retain_graph=True)]
    second = torch.autograd.grad(loss, leaves(student))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first, second, strict=True))


def test_autocast_rounds_the_products_alone():
    """Under bf16 autocast the logits are made in bf16, and everything after them in float32."""
    student, teacher = make_rows(64, 0, torch.float32), make_rows(64, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = divergence("student_first", student, teacher)
        values.mean().backward()
        likelihoods = student.map(lambda log_p: torch.linalg.vecdot(log_p.exp(), log_p))

    def rounded(rows):
        logits = torch.addmm(*(t.bfloat16() for t in (rows.bias, rows.hidden, rows.weight.T)))
        return logits.float().index_fill(1, torch.tensor(MASK), -1e6).log_softmax(-1)

    log_p, log_q = rounded(student), rounded(teacher)
    assert values.dtype == likelihoods.dtype == torch.float32
    torch.testing.assert_close(values, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(likelihoods, (log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-6)
    exact = HeadRows(*(tensor.detach().double().requires_grad_() for tensor in leaves(student)), MASK)
    divergence("student_first", exact, teacher.to(torch.float64)).mean().backward()
    for ours, double in zip(leaves(student), leaves(exact), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - double.grad).norm() < 0.02 * double.grad.norm()


def test_subs_gives_the_mask_no_probability():
    rows = make_rows(50, 0)
    p = rows.log_probabilities(0.7).exp()
    assert (p[:, MASK] == 0).all() and torch.allclose(p.sum(1), torch.ones(50, dtype=torch.float64))
    powered = rows.log_probabilities().exp() ** (1 / 0.7)
    assert torch.allclose(p, powered / powered.sum(1, keepdim=True))


def test_rows_are_chosen_and_put_together():
    """SDTT collects its targets this way: rows of several passes of one network, each at its own places."""
    first, second = make_rows(6, 0), make_rows(6, 1)
    second = HeadRows(second.hidden, first.weight, first.bias, MASK)
    chosen = torch.tensor([True, False, False, True, True, False])
    merged = first.put(chosen, second.at(chosen))
    together = torch.where(chosen[:, None], second.log_probabilities(), first.log_probabilities())
    assert torch.equal(merged.log_probabilities(), together)
    assert torch.equal(first.log_probabilities(), make_rows(6, 0).log_probabilities())  # a copy
    with pytest.raises(ValueError, match="another head"):
        first.put(chosen, make_rows(3, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "'kl', but must be one of student_first, teacher_first"),
        ({"kind": "student_teacher"}, "student_teacher is now called student_first"),
        ({"beta": 1.5}, "beta must lie in .0, 1., not 1.5"),
        ({"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        ({"teacher": make_rows(3, 1)}, "the student has 4 rows and the teacher 3"),
    ],
)
def test_wrong_arguments_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        divergence(**{"kind": "student_first", "student": make_rows(4, 0), "teacher": make_rows(4, 1), **arguments})
    with pytest.raises(ValueError, match="4 rows, but 2 tokens"):
        cross_entropy(make_rows(4, 0), torch.arange(2))


# The model around it.


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 46, (2, 32), generator=generator)
    masked = torch.rand(2, 32, generator=generator) < 0.6
    return ids, masked, ids.masked_fill(masked, 47)


def test_rows_and_head_give_the_models_own_logits(build):
    model = build()
    ids, masked, z_t = batch()
    rows = model(z_t, hidden_rows=masked)
    logits = model(z_t).logits[masked].detach()
    assert rows.mask_token_id == 47
    assert torch.allclose(
        rows.log_probabilities(), logits.index_fill(1, torch.tensor(47), -1e6).log_softmax(-1), atol=1e-4
    )
    places = masked.flatten().nonzero()[:, 0]
    assert torch.equal(model(z_t, hidden_rows=places).hidden, rows.hidden)
    uniform = build(diffusion_kind="uniform", mask_token_id=None)
    assert uniform(ids, hidden_rows=masked, timesteps=torch.ones(2)).mask_token_id is None


def gradients_of(model, forward=None):
    ids, masked, z_t = batch()
    rows = (forward or model)(z_t, hidden_rows=masked)
    cross_entropy(rows, ids[masked]).sum().div(64).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def test_gradients_reach_every_parameter_as_through_logits(build):
    model = build()
    ids, masked, z_t = batch()
    logits = model(z_t).logits[masked].index_fill(1, torch.tensor(47), -1e6)
    torch.nn.functional.cross_entropy(logits, ids[masked], reduction="sum").div(64).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for name, gradient in gradients_of(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item()), name


@pytest.mark.parametrize("way", ["activation checkpointing", pytest.param("compiled trunk", marks=pytest.mark.slow)])
def test_the_same_gradients_in_every_way_to_run_the_trunk(build, way):
    model = build(hidden_dropout=0.0).train()
    expected = gradients_of(model)
    if way == "activation checkpointing":
        model.activation_checkpointing_enable()
    else:
        model.model.compile(backend="aot_eager")
    for name, gradient in gradients_of(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6 * expected[name].abs().max().item()), name


# Two processes, each with half of every batch, against one.
SCRIPT = """
import contextlib, os, sys
import torch
import torch.distributed as dist
from modeling_mcd.command_line import wait_for_gloo_threads
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.divergences import cross_entropy, divergence

def build(seed):
    shapes = dict(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, conditioning_size=16)
    config = MDLMConfig(**shapes, max_position_embeddings=16, bos_token_id=46, eos_token_id=46, hidden_dropout=0.0)
    model = MDLMForMaskedDiffusion(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model

def loss_of(model, teacher, ids, masked, uneven):
    z_t, tokens = ids.masked_fill(masked, 47), ids[masked]
    student = model(z_t, hidden_rows=masked)
    with torch.no_grad():
        targets = teacher(z_t, hidden_rows=masked)
    taught = tokens % 3 > 0
    kl = divergence("student_first", student.at(taught), targets.at(taught), 0.9)
    if uneven:  # the backward then goes over the head again
        kl = kl * (tokens[taught] / 46 - 0.3)
    return (kl.sum() + cross_entropy(student.at(~taught), tokens[~taught]).sum()) / ids.numel()

wrapper, out = sys.argv[1:]
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 46, (2, 4, 16), generator=generator)  # two micro-batches of four rows
masked = torch.rand(2, 4, 16, generator=generator) < 0.6
engine, teacher = build(0), build(1).requires_grad_(False)
optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
if wrapper == "ddp":
    dist.init_process_group("gloo")
    engine = torch.nn.parallel.DistributedDataParallel(engine)
elif wrapper.startswith("zero"):
    import deepspeed
    deepspeed.init_distributed("gloo")
    partition_all = dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
         "stage3_prefetch_bucket_size"), 0)
    settings = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0,
                "zero_optimization": {"stage": int(wrapper[4:]), **partition_all}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=engine, optimizer=optimizer, config=settings)
losses, mine = [], slice(rank * 4 // world, (rank + 1) * 4 // world)
for step in range(3):  # ZeRO-3 notes in the first step what is used when, and relies on it afterwards
    for micro in range(2):
        loss = loss_of(engine, teacher, ids[micro][mine], masked[micro][mine], uneven=micro == 1)
        total = loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item())
        if wrapper.startswith("zero"):
            engine.backward(loss)
            engine.step()
        else:
            (loss / 2).backward()
    if not wrapper.startswith("zero"):
        optimizer.step()
        optimizer.zero_grad()
model = engine if wrapper == "none" else engine.module
whole = contextlib.nullcontext()
if wrapper == "zero3":
    assert model.lm_head.weight.numel() == 0, "the head was never partitioned"
    whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
with whole:
    final = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
if rank == 0:
    torch.save((losses, final), out)
if world > 1:
    dist.barrier()
    dist.destroy_process_group()
    wait_for_gloo_threads()
"""
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None,
    reason="DeepSpeed builds its gloo extension with g++ and ninja",
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    (folder / "script.py").write_text(SCRIPT)
    result = run_python(str(folder / "script.py"), "none", str(folder / "none.pt"), launcher=())
    assert result.returncode == 0, result.stderr
    return folder, *torch.load(folder / "none.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrapper", ["ddp", *(pytest.param(f"zero{stage}", marks=needs_compiler) for stage in (1, 2, 3))]
)
def test_two_processes_take_the_steps_of_one(one_process, wrapper):
    """Both kinds of backward run, with gradient accumulation. Under ZeRO-3 the head is partitioned between its uses."""
    folder, losses, final = one_process
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    result = run_python(str(folder / "script.py"), wrapper, str(folder / f"{wrapper}.pt"), launcher=launch)
    assert result.returncode == 0, result.stderr
    ours, ours_final = torch.load(folder / f"{wrapper}.pt")
    assert ours == pytest.approx(losses, rel=1e-5)
    for name, parameter in final.items():
        assert torch.allclose(ours_final[name], parameter, atol=1e-5), name
