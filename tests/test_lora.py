"""LoRA: what is trained, what follows it, what is in memory and on the disk, and how it is loaded again."""

import copy
import importlib.util
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_run import mcd_arguments, mdlm_arguments, save_judge, write_inputs
from toy_backbones import MASK, NETWORKS, SHIFT, make_network
from toy_distillers import METHODS, ROWS, blocks
from transformers import AutoModel, TrainerCallback

import modeling_mcd
from evaluation import run_eval
from modeling_mcd import as_masked_diffusion
from modeling_mcd.convert_checkpoints import convert
from modeling_mcd.loading import load_model
from trainers import run_mcd, run_mdlm
from trainers.adapters import OUR_TARGETS, AdapterFollower, default_targets, with_adapter
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.runs.adapter_options import AdapterArguments


ALL = METHODS | {"mdlm": (MDLMTrainer, MDLMTrainingArguments, {})}
LORA = {"r": 4, "lora_alpha": 8}
DATA = [{"input_ids": row.tolist()} for row in blocks()] * 8
SETTINGS = {
    "per_device_train_batch_size": ROWS,
    "ema_decay": 0.9,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "seed": 11,
}
SETTINGS |= {"logging_steps": 1, "save_steps": 1, "save_total_limit": 9, "disable_tqdm": True, "report_to": "none"}


def build(networks, folder, method="mcd", model=None, adapter=LORA, **settings):
    """A trainer of two rounds of two steps, in float32, with an adapter of rank 4."""
    trainer_class, arguments_class, own = ALL[method]
    kind = getattr(trainer_class, "diffusion_kind", "absorbing")
    model = copy.deepcopy(networks[kind][0]).float() if model is None else model
    rounds = {"max_steps": 4} if method == "mdlm" else {"num_rounds": 2, "steps_per_round": 2}
    arguments = arguments_class(output_dir=str(folder), **SETTINGS | own | rounds | settings)
    config = None if adapter is None else LoraConfig(**adapter)
    return trainer_class(model, arguments, peft_config=config, train_dataset=DATA)


@pytest.fixture
def trainer_of(networks, tmp_path):
    return partial(build, networks, tmp_path)


def base_weights(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" not in name}


def factors(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def snapshot(weights):
    return {name: weight.detach().clone() for name, weight in weights.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def logits_of(model, canvas=None):
    canvas = torch.where(torch.arange(32) % 3 == 0, MASK, blocks()) if canvas is None else canvas
    was_training = model.training
    logits = model.eval()(input_ids=canvas, timesteps=torch.full((len(canvas),), 0.5)).logits
    model.train(was_training)
    return logits


def filled(model, seed=0):
    """Values in the factors B, which are zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in factors(model).items():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


# --- What is trained


@pytest.mark.parametrize("method", sorted(ALL.keys() - {"coupling"}))
def test_the_adapter_alone_is_trained(method, trainer_of):
    trainer = trainer_of(method, save_strategy="no")
    base, adapter = snapshot(base_weights(trainer.model)), snapshot(factors(trainer.model))
    assert trainer.train().global_step == 4
    assert same(base_weights(trainer.model), base)
    assert len(adapter) == 16 and all(not torch.equal(p, adapter[n]) for n, p in factors(trainer.model).items())
    trained = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in factors(trainer.model).values()}


@pytest.mark.parametrize("network", ["ours", "qwen3", "bert"])
def test_gradients_are_those_of_the_weights(network, trainer_of):
    """Where B is zero, W + s B A has dL/dB = s dL/dW A^T and dL/dA = 0: against a trainer of all weights."""

    def model():
        return None if network == "ours" else as_masked_diffusion(make_network(network, dtype=torch.float32), MASK)

    adapted, plain = trainer_of(model=model()), trainer_of(model=model(), adapter=None)
    for trainer in (adapted, plain):
        batch = trainer.data_collator(DATA[:ROWS])
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
    full = {name: p.grad for name, p in plain.model.named_parameters()}
    for name, parameter in factors(adapted.model).items():
        weight = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        if ".lora_A." in name:
            assert parameter.grad.abs().max() == 0
            expected = 2.0 * full[weight] @ parameter.detach().T
            ours = adapted.model.get_parameter(name.replace(".lora_A.", ".lora_B.")).grad
            assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-5 * expected.abs().max()), name
            assert expected.abs().max() > 0


def test_the_start_depends_on_the_seed_alone(trainer_of):
    first = snapshot(factors(trainer_of().model))
    torch.manual_seed(99)
    assert same(factors(trainer_of().model), first)
    assert not same(factors(trainer_of(seed=12).model), first)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"gemma2", "openai-gpt"}))
def test_wrapped_networks_have_defaults(name, trainer_of):
    """Every linear layer of the trunk, and none of the head."""
    network = make_network(name, dtype=torch.float32)
    model = as_masked_diffusion(network, MASK, logits_shift=SHIFT.get(name, 0))
    if name == "llama":
        layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert default_targets(model) == layers
    trainer = trainer_of(model=model, save_strategy="no", num_rounds=1, steps_per_round=1, ema_decay=None)
    before = snapshot(factors(trainer.model))
    trainer.train()
    changed = {n for n, p in factors(trainer.model).items() if ".lora_B." in n and not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".lora_B." in n}
    assert trainer.model.get_output_embeddings() is network.get_output_embeddings()


def test_a_base_of_half_precision_stays_so(trainer_of, networks):
    model = copy.deepcopy(networks["absorbing"][0]).bfloat16()
    trainer = trainer_of(model=model, save_strategy="no", num_rounds=1)
    trainer.train()
    assert {p.dtype for p in base_weights(trainer.model).values()} == {torch.bfloat16}
    assert {p.dtype for p in factors(trainer.whole_student()).values()} == {torch.float32}


# --- Teacher and EMA


def test_at_first_the_teacher_is_the_base(trainer_of, networks):
    base = logits_of(copy.deepcopy(networks["absorbing"][0]).float())
    trainer = trainer_of()
    for network in (trainer.model, trainer.teacher, trainer.whole_student()):
        assert torch.equal(logits_of(network), base)
    filled(trainer.model)
    assert torch.equal(logits_of(trainer.teacher), base) and not torch.equal(logits_of(trainer.model), base)


def test_the_base_is_in_memory_once(trainer_of):
    trainer = trainer_of()
    trainer.companions["teacher"].follow(trainer.model)
    without_ema = trainer_of(ema_decay=None)
    for student, network in (
        (trainer.model, trainer.teacher),
        (trainer.model, trainer.whole_student()),
        (without_ema.model, without_ema.whole_student()),
    ):
        theirs, ours = base_weights(student), base_weights(network)
        assert theirs.keys() == ours.keys() and all(ours[name] is theirs[name] for name in theirs)
        theirs, ours = factors(student), factors(network)
        assert same(theirs, ours) and not {p.data_ptr() for p in theirs.values()} & {
            p.data_ptr() for p in ours.values()
        }
        assert not any(p.requires_grad for p in ours.values()) and not network.training


def test_a_teacher_moves_at_a_rounds_edge(trainer_of):
    trainer, seen = trainer_of(save_strategy="no"), []

    def compute_loss(model, inputs, *args, **kwargs):
        seen.append((logits_of(trainer.teacher), logits_of(trainer.model), len(factors(trainer.teacher))))
        return MCDTrainer.compute_loss(trainer, model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert [count for *_, count in seen] == [0] * 2 + [16] * 2
    assert torch.equal(seen[1][0], seen[0][0])
    assert torch.equal(seen[2][0], seen[2][1]) and not torch.equal(seen[2][0], seen[0][0])
    assert torch.equal(seen[3][0], seen[2][0])
    assert torch.equal(logits_of(trainer.teacher), logits_of(trainer.model))  # the last round has ended too


def test_the_ema_follows_the_factors(trainer_of):
    trainer = trainer_of(save_strategy="no", teacher_update="ema", teacher_ema_decay=0.75)
    expected = snapshot(factors(trainer.model))
    teacher = {name: torch.zeros_like(p) if ".lora_B." in name else None for name, p in expected.items()}

    class ByHand(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            n = state.global_step
            for name, parameter in factors(model).items():
                expected[name].lerp_(parameter, 1 - min(0.9, n / (9 + n)))
                if teacher[name] is None:
                    teacher[name] = parameter.detach().clone()
                teacher[name].lerp_(parameter, 0.25)

    trainer.add_callback(ByHand())
    trainer.train()
    for follower, values in (("ema", expected), ("teacher", teacher)):
        for name, parameter in factors(trainer.companions[follower].model).items():
            assert torch.allclose(parameter, values[name], rtol=1e-6, atol=1e-8), (follower, name)


def test_a_teacher_that_never_moves_has_no_adapter(trainer_of, tmp_path):
    trainer = trainer_of("dscd", save_steps=4)
    trainer.train()
    assert not factors(trainer.teacher)
    assert load_file(tmp_path / "checkpoint-4" / "teacher" / "model.safetensors") == {}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("teacher", ["base", "adapter"])
def test_a_teacher_between_forward_and_backward(checkpointing, teacher, trainer_of):
    """The student's gradients are the same whether the teacher runs before its forward, or between forward and backward."""
    trainer = trainer_of(gradient_checkpointing=checkpointing)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    if teacher == "adapter":
        trainer.companions["teacher"].follow(filled(trainer.model, seed=1))
    filled(trainer.model)
    x_0, gradients = blocks(), []
    canvas = {"input_ids": torch.where(torch.arange(32) % 3 == 0, MASK, x_0), "timesteps": torch.full((ROWS,), 0.5)}
    for order in ("before", "between"):
        trainer.model.train().zero_grad()
        if order == "before":
            logits_of(trainer.teacher)
        loss = trainer.model(**canvas, labels=x_0).loss
        if order == "between":
            logits_of(trainer.teacher)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in factors(trainer.model).items()})
    assert len(gradients[0]) == 16 and all(g.abs().max() > 0 for g in gradients[0].values())
    assert same(*gradients)


def test_what_peft_does_when_it_is_not_switched_back(networks):
    """Why no adapter is ever switched here: a student that is not switched back in time has no gradient, and no error."""
    model = get_peft_model(
        copy.deepcopy(networks["absorbing"][0]).float(), LoraConfig(target_modules=OUR_TARGETS, **LORA)
    )
    model.add_adapter("other", LoraConfig(target_modules=OUR_TARGETS, **LORA))
    model.set_adapter("default")
    loss = model(input_ids=blocks(), timesteps=torch.full((ROWS,), 0.5), labels=blocks()).loss
    model.set_adapter("other")
    loss.backward()
    assert all(p.grad is None for name, p in factors(model).items() if ".default." in name)


# --- What is refused


HEAD = {"target_modules": ["qkv_proj", "lm_head"]}
REFUSED = {
    "head": (HEAD, "target_modules names the head .lm_head."),
    "head, by a pattern": ({"target_modules": r".*(qkv_proj|lm_head)"}, "target_modules names the head"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "target_modules names the embeddings .model.embed_tokens."),
    "dropout": ({"lora_dropout": 0.1}, "lora_dropout is 0.1, but must be 0"),
    "dora": ({"use_dora": True}, "use_dora is True, but must be False"),
    "biases": ({"bias": "all"}, "bias is 'all', but must be 'none'"),
    "other modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], but must be None"),
    "an init that changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "a task": ({"task_type": "CAUSAL_LM"}, "task_type is 'CAUSAL_LM', but must be None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_trained_are_refused(case, trainer_of, networks):
    settings, message = REFUSED[case]
    model = copy.deepcopy(networks["absorbing"][0]).float()
    with pytest.raises(ValueError, match=message):
        trainer_of(model=model, adapter=LORA | settings)
    assert not factors(model)


def test_other_adapters_are_refused(networks, trainer_of):
    base, lora = networks["absorbing"][0], LoraConfig(target_modules=OUR_TARGETS, **LORA)
    with pytest.raises(ValueError, match="of the type IA3, but only LORA"):
        with_adapter(copy.deepcopy(base), IA3Config(target_modules=["qkv_proj"], feedforward_modules=[]))
    for name in ("teacher", "ema", "mine"):
        model = get_peft_model(copy.deepcopy(base), lora)
        model.add_adapter(name, lora)
        reason = "is a name of ours, in checkpoints" if name != "mine" else "there must be one, called 'default'"
        with pytest.raises(ValueError, match=rf"adapters are \['default', '{name}'\].*{reason}"):
            trainer_of(model=model, adapter=None)
    with pytest.raises(ValueError, match="CouplingTrainer does not train the network: give no adapter"):
        trainer_of("coupling")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA, **HEAD))
    with pytest.raises(ValueError, match="target_modules names the head"):
        trainer_of(model=model, adapter=None)
    model = get_peft_model(copy.deepcopy(base), lora)
    with pytest.raises(ValueError, match="peft_config is given, but the model has an adapter already"):
        trainer_of(model=model)
    with pytest.raises(ValueError, match="holds an adapter without being a PeftModel: load it by PeftModel"):
        trainer_of(model=model.get_base_model(), adapter=None)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="adapter is frozen: load it with is_trainable=True"):
        trainer_of(model=model, adapter=None)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_teacher_beside_an_adapter_is_refused(wrapped, networks, tmp_path):
    teacher, student = (copy.deepcopy(network).float() for network in networks["absorbing"])
    config = LoraConfig(target_modules=OUR_TARGETS, **LORA)
    given = {} if wrapped else {"peft_config": config}
    student = get_peft_model(student, config) if wrapped else student
    with pytest.raises(ValueError, match="a teacher is given beside a student with an adapter"):
        MCDTrainer(student, MCDTrainingArguments(output_dir=str(tmp_path)), teacher=teacher, **given)


# --- Checkpoints and resume


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    save_judge(folder / "judge")
    return folder


@pytest.fixture(scope="module")
def whole(networks, tmp_path_factory):
    trainer = build(networks, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_inside_and_at_the_edge_of_a_round(step, trainer_of, whole, tmp_path):
    """Bitwise: student, teacher, EMA, optimizer and losses, from a checkpoint that holds the adapters alone."""
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    torch.manual_seed(77)
    resumed = trainer_of()
    resumed.train(True)
    for network in ("model", "teacher"):
        assert same(factors(getattr(resumed, network)), factors(getattr(whole, network))), network
    assert same(factors(resumed.whole_student()), factors(whole.whole_student()))
    ends = [trainer.optimizer.state_dict()["state"] for trainer in (resumed, whole)]
    assert all(torch.equal(ends[0][i][key], ends[1][i][key]) for i in ends[1] for key in ends[1][i])
    losses = [[entry for entry in t.state.log_history if "loss" in entry] for t in (resumed, whole)]
    assert [[e["loss"], e["grad_norm"]] for e in losses[0]] == [[e["loss"], e["grad_norm"]] for e in losses[1]]


def test_a_checkpoint_holds_no_base(whole):
    folder = Path(whole.args.output_dir)
    weights = {
        str(file.relative_to(folder)): load_file(file) for file in folder.glob("checkpoint-[14]/**/*.safetensors")
    }
    files = ("adapter_model.safetensors", "ema/model.safetensors", "teacher/model.safetensors")
    assert weights.keys() == {f"checkpoint-{step}/{file}" for step in (1, 4) for file in files}
    for name, state in weights.items():
        assert len(state) == (0 if name == "checkpoint-1/teacher/model.safetensors" else 16), name
        assert all(".lora_" in key for key in state)
    assert same(weights["checkpoint-4/ema/model.safetensors"], factors(whole.whole_student()))


def test_the_best_step_is_handed_on(trainer_of):
    """`load_best_model_at_end` brings back student and EMA of that step; the best is here the first, whose loss is highest."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer_class, arguments_class, _ = ALL["mdlm"]
    trainer = trainer_of("mdlm", save_strategy="no")
    arguments = arguments_class(
        output_dir=trainer.args.output_dir,
        per_device_eval_batch_size=ROWS,
        **SETTINGS | steps | {"metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 3},
    )
    trainer = trainer_class(trainer.model, arguments, train_dataset=DATA, eval_dataset=DATA[: 2 * ROWS])
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[1] == max(losses.values()) and trainer.evaluate()["eval_loss"] == losses[1]


# --- Recipes, what they export, and how it is loaded

ADAPTER = {"lora_r": 4, "lora_alpha": 8, "num_rounds": 2, "steps_per_round": 2, "save_steps": 1}
ADAPTER_FILES = {"adapter_model.safetensors", "adapter_config.json"}
FILES = ADAPTER_FILES | {"tokenizer.json", "tokenizer_config.json"}


def distil(inputs, output, *more, **changes):
    run_mcd.main([*mcd_arguments(inputs, output, **ADAPTER | {"report_to": "none"} | changes), *more])
    return output


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """The same run, once with adapters alone and once with merged networks beside."""
    folder = tmp_path_factory.mktemp("runs")
    return distil(inputs, folder / "adapter"), distil(inputs, folder / "merged", merge_adapters=True)


def test_what_is_exported(inputs, runs):
    adapter, merged = runs
    size = (inputs / "teacher" / "model.safetensors").stat().st_size
    for folder in (
        adapter,
        adapter / "round-1",
        adapter / "round-2",
        merged / "adapter",
        merged / "round-2" / "adapter",
    ):
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert names >= (FILES if adapter in (folder, folder.parent) else ADAPTER_FILES)
        assert "model.safetensors" not in names and (folder / "adapter_model.safetensors").stat().st_size < size / 2
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(inputs / "teacher") and settings["r"] == 4
        assert (folder / "README.md").exists() == (adapter in (folder, folder.parent))  # ours, none of PEFT's
    saved = json.loads((adapter / "checkpoint-4" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] is None  # transformers' name for what was not loaded by a name is "None"
    assert not (adapter / "teacher").exists()
    for folder in (merged, merged / "round-1"):
        assert (folder / "model.safetensors").stat().st_size == size and (folder / "modeling_mdlm.py").exists()
    assert not list(adapter.rglob("*mdlm.py"))


def test_every_way_of_loading_gives_one_network(inputs, runs):
    adapter, merged = runs
    base = AutoModel.from_pretrained(inputs / "teacher")
    for name in ("", "round-1"):
        networks = {
            "PeftModel": PeftModel.from_pretrained(copy.deepcopy(base), adapter / name),
            "AutoModel of the adapter": AutoModel.from_pretrained(adapter / name),
            "load_model of the adapter": load_model(str(adapter / name)),
            "AutoModel of the merged": AutoModel.from_pretrained(merged / name),
        }
        logits = {way: logits_of(network) for way, network in networks.items()}
        for way, values in logits.items():
            assert (values - logits["PeftModel"]).abs().max() < 1e-4, way
        assert (logits_of(base) - logits["PeftModel"]).abs().max() > 1e-2
        assert networks["PeftModel"].generate(steps=4, seed=0).shape == (1, 32)
    assert isinstance(load_model(str(adapter)), modeling_mcd.MDLMForMaskedDiffusion)


def test_a_wrapped_base_and_an_adapter_as_the_base_of_another(inputs, tmp_path):
    """Qwen2 with its shift; a student of it; a student of that student's adapter folder; and what mcd-convert makes of it."""
    model = as_masked_diffusion(make_network("qwen2", dtype=torch.float32), MASK, logits_shift=1)
    model.save_pretrained(tmp_path / "base")
    short = {"steps_per_round": 1, "num_rounds": 1, "save_strategy": "no", "warmup_steps": 0}
    for teacher, student in (("base", "one"), ("one", "two")):
        distil(inputs, tmp_path / student, teacher=tmp_path / teacher, **short)
    base, expected = logits_of(model), PeftModel.from_pretrained(model, tmp_path / "one")
    assert (logits_of(load_model(str(tmp_path / "one"))) - logits_of(expected)).abs().max() < 1e-4
    expected = PeftModel.from_pretrained(expected.merge_and_unload(), tmp_path / "two")
    convert(str(tmp_path / "two"), str(tmp_path / "converted"), to="ours")
    for folder in ("two", "converted"):
        found = logits_of(load_model(str(tmp_path / folder)))
        assert (found - logits_of(expected)).abs().max() < 1e-4 < (found - base).abs().max(), folder


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_by_hand(rslora, trainer_of, tmp_path, networks):
    """W + s B A of every layer, with s = alpha / r or alpha / sqrt(r): as PEFT merges."""
    copy.deepcopy(networks["absorbing"][0]).float().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    trainer = trainer_of(model=copy.deepcopy(base), adapter=LORA | {"use_rslora": rslora}, ema_decay=None)
    filled(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_model(str(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
    assert all(torch.allclose(p, loaded.get_parameter(n), atol=1e-6) for n, p in theirs.named_parameters())
    weight, layer = "model.layers.0.mlp.up_proj.weight", "base_model.model.model.layers.0.mlp.up_proj"
    a, b = (trainer.model.get_parameter(f"{layer}.lora_{x}.default.weight").detach() for x in "AB")
    by_hand = base.get_parameter(weight).detach() + 8 / (2 if rslora else 4) * b @ a
    assert torch.allclose(loaded.get_parameter(weight), by_hand, atol=1e-6)


def test_adapters_that_cannot_be_loaded(runs, tmp_path):
    def refused(message, name="adapter_config.json", **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(runs[0] / "round-1", folder)
        settings = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message) as error:
            load_model(str(folder))
        assert "\n" not in str(error.value)

    refused("does not name the base", base_model_name_or_path=None)
    refused("model '/nowhere' is not a local", base_model_name_or_path="/nowhere")
    refused("of the type 'LOHA', and only LORA", peft_type="LOHA")
    refused("has use_dora True, which cannot be merged", use_dora=True)
    refused("names the adapter's own folder as its base", base_model_name_or_path=str(tmp_path / "4"))


def test_cards_say_what_the_folder_is(runs, tmp_path):
    adapter, merged = ((folder / "README.md").read_text() for folder in runs)
    assert "base_model_relation: adapter" in adapter and "library_name: peft" in adapter
    assert 'load_model(".")' in adapter and "AutoModel.from" not in adapter
    assert "base_model_relation: finetune" in merged and "library_name: transformers" in merged
    assert "AutoModel.from_pretrained" in merged and "load_model" not in merged
    for card in (adapter, merged):
        assert "lora_r: 4" in card and "lora_alpha: 8" in card and "base_model: " not in card  # it is not on the Hub


def test_a_run_is_judged_and_its_adapters_again(inputs, tmp_path):
    judged = {"judge": inputs / "judge", "evaluation_samples": 2, "save_strategy": "no"}
    output = distil(inputs, tmp_path / "run", "--evaluation_steps", "2", **judged)
    rows = {row["model"]: row for row in json.loads((output / "eval.json").read_text())["results"]}
    assert rows.keys() == {"teacher", "round-1", "round-2"}
    words = [
        f"--judge={inputs / 'judge'}",
        "--steps=2",
        "--samples=2",
        "--seeds=1",
        f"--output_dir={tmp_path / 'eval'}",
    ]
    run_eval.main([f"round-2={output / 'round-2'}", f"teacher={inputs / 'teacher'}", *words])
    again = {row["model"]: row for row in json.loads((tmp_path / "eval" / "eval.json").read_text())["results"]}
    for name in ("round-2", "teacher"):
        assert again[name]["gen_ppl"] == pytest.approx(rows[name]["gen_ppl"], rel=1e-3)


def test_a_run_is_stopped_and_started_again(inputs, runs, tmp_path):
    halves = shutil.copytree(runs[0], tmp_path / "halves")
    for name in ("checkpoint-4", "adapter_model.safetensors", "round-2"):
        (shutil.rmtree if (halves / name).is_dir() else Path.unlink)(halves / name)
    distil(inputs, halves)
    for name in (
        "adapter_model.safetensors",
        "round-2/adapter_model.safetensors",
        "checkpoint-4/adapter_model.safetensors",
    ):
        assert same(*(load_file(run / name) for run in (halves, runs[0]))), name


def test_a_base_of_four_bits(inputs, tmp_path, capsys):
    """Where bitsandbytes is: the base in nf4, close to that of float32, and in memory once."""
    quantized = pytest.importorskip("bitsandbytes").nn.Linear4bit
    base = AdapterArguments(lora_r=4, load_in_4bit=True).load_base(str(inputs / "teacher"))
    assert type(base.model.layers[0].mlp.up_proj) is quantized and type(base.lm_head) is torch.nn.Linear
    follower = AdapterFollower(with_adapter(base, LoraConfig(**LORA)))
    ours, theirs = (dict(network.named_parameters()) for network in (follower.model, base))
    weight = "model.layers.0.mlp.up_proj.base_layer.weight"
    assert ours[f"base_model.model.{weight}"] is theirs[weight]
    loaded = logits_of(load_model(str(inputs / "teacher")))
    assert 0 < (logits_of(follower.model) - loaded).abs().max() < 0.2 * loaded.abs().max()
    losses = []
    for quantise in (False, True):
        output = distil(inputs, tmp_path / f"{quantise}", load_in_4bit=quantise)
        history = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_pretraining_takes_an_adapter(inputs, tmp_path):
    words = mdlm_arguments(inputs, tmp_path / "run", model=inputs / "teacher")
    run_mdlm.main([*words, "--lora_r", "2", "--validation_text", str(inputs / "text.txt"), "--report_to", "none"])
    settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 2 and sorted(settings["target_modules"]) == sorted(OUR_TARGETS)
    assert "base_model_relation: adapter" in (tmp_path / "run" / "README.md").read_text()
    trained, base = load_model(str(tmp_path / "run")), load_model(str(inputs / "teacher"))
    assert not torch.equal(logits_of(trained), logits_of(base))


RECIPES = {
    "an option without its adapter": (
        {"lora_r": "null", "lora_alpha": 3},
        2,
        "lora_alpha is 3, but there is no adapter",
    ),
    "dropout": ({"lora_dropout": 0.1}, 2, "lora_dropout is 0.1, but must be 0"),
    "no rank": ({"lora_r": 0}, 2, "lora_r must be at least 1, not 0"),
    "a student": ({"student": "x"}, 1, "student is 'x', but with lora_r the student is the teacher with an adapter"),
    "the head": ({"lora_target_modules": "lm_head"}, 1, "target_modules names the head"),
    "4 bits without their package": (
        {"load_in_4bit": True},
        2,
        "load_in_4bit is true, but needs the package bitsandbytes",
    ),
    "a layer that is not there": ({"lora_target_modules": "nothing"}, 1, "nothing"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_refused_in_one_line(case, inputs, tmp_path, capsys, monkeypatch):
    changes, status, message = RECIPES[case]
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(SystemExit) as stop:
        distil(inputs, tmp_path / "run", **changes)
    line = capsys.readouterr().err.strip() if status == 2 else stop.value.code
    assert message in line and "\n" not in line and not (tmp_path / "run").exists()


def test_a_folder_belongs_to_an_adapter_or_to_all_weights(inputs, runs, tmp_path):
    with pytest.raises(SystemExit) as stop:
        distil(inputs, runs[0], lora_r="null", lora_alpha="null")
    assert "lora_alpha was 8 there and is None here" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        distil(inputs, runs[0], lora_r=8)
    assert "lora_r was 4 there and is 8 here" in stop.value.code
