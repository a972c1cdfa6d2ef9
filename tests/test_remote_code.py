"""A saved model in a process that cannot import the package: loads, generates and saves with `trust_remote_code`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_backbones import MASK, make_network
from transformers import AutoModel, AutoModelForCausalLM

import modeling_mcd
from modeling_mcd import MDLMForMaskedDiffusion, as_masked_diffusion, requirements_mdlm
from modeling_mcd.convert_checkpoints import convert
from modeling_mcd.loading import load_model


PACKAGE = Path(modeling_mcd.__file__).parent


SCRIPT = """
import json, sys

sys.modules["modeling_mcd"] = None  # so that an installed package is out of reach too
try:
    import modeling_mcd
except ImportError:
    pass
else:
    sys.exit("the package can be imported")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from safetensors.torch import save_file

saved, again, backbone, out = sys.argv[1:]
report, tensors = {}, {}
for auto in (AutoModel, AutoModelForMaskedLM):
    for trust in (None, False):
        try:
            auto.from_pretrained(saved, **({} if trust is None else {"trust_remote_code": trust}))
        except Exception as error:
            report[f"{auto.__name__} {trust}"] = [type(error).__name__, str(error)]


def note(name, model):
    model.eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        tensors[f"{name} logits"] = model(ids).logits.contiguous()
    output = model.generate(seed=0, steps=4, return_dict_in_generate=True)
    tensors[f"{name} sequences"], tensors[f"{name} nfe"] = output.sequences, output.nfe
    tensors[f"{name} default nfe"] = model.generate(seed=0, return_dict_in_generate=True).nfe
    report[name] = [type(model).__name__, type(model).__module__, type(model.generation_config).__name__]


model = AutoModel.from_pretrained(saved, trust_remote_code=True)
note("AutoModel", model)
note("AutoModelForMaskedLM", AutoModelForMaskedLM.from_pretrained(saved, trust_remote_code=True))
report["config"] = type(AutoConfig.from_pretrained(saved, trust_remote_code=True)).__name__
try:
    model.generate(steps=0)
except ValueError as error:
    report["steps=0"] = str(error)
model.generation_config.steps = 3
model.save_pretrained(again)
note("again", AutoModel.from_pretrained(again, trust_remote_code=True))
note("backbone", AutoModel.from_pretrained(backbone, trust_remote_code=True))
report["package"] = sorted(name for name in sys.modules if name.split(".")[0] == "modeling_mcd" and sys.modules[name])
save_file(tensors, out + "/tensors.safetensors")
json.dump(report, open(out + "/report.json", "w"))
"""


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """What the other process saw: its report, its tensors, the folder it loaded and the folder it saved."""
    home = tmp_path_factory.mktemp("visit")
    torch.manual_seed(0)
    config = modeling_mcd.MDLMConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
    )
    model = MDLMForMaskedDiffusion(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.generation_config.steps = 2
    model.save_pretrained(home / "saved")
    as_masked_diffusion(make_network("qwen2", dtype=torch.float32), MASK, 1).save_pretrained(home / "backbone")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (home / "elsewhere").mkdir()
    (home / "visitor.py").write_text(SCRIPT)
    folders = [str(home / "saved"), str(home / "again"), str(home / "backbone"), str(home)]
    run = subprocess.run(
        [sys.executable, "-I", str(home / "visitor.py"), *folders],
        cwd=home / "elsewhere",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((home / "report.json").read_text())
    return model, report, load_file(home / "tensors.safetensors"), home / "saved", home / "again"


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForMaskedLM"])
def test_remote_code_gives_the_same_model(visit, name):
    model, report, tensors, *_ = visit
    kind, module, options = report[name]
    assert kind == "MDLMForMaskedDiffusion" and module.startswith("transformers_modules.")
    assert options == "MDLMGenerationConfig" and report["config"] == "MDLMConfig" and report["package"] == []
    with torch.no_grad():
        torch.testing.assert_close(tensors[f"{name} logits"], model(torch.arange(12).reshape(2, 6)).logits)
    ours = model.generate(seed=0, steps=4, return_dict_in_generate=True)
    assert torch.equal(tensors[f"{name} sequences"], ours.sequences) and tensors[f"{name} sequences"].shape == (1, 12)
    assert torch.equal(tensors[f"{name} nfe"], ours.nfe) and 2 < ours.nfe.item() <= 4
    assert tensors[f"{name} default nfe"].item() == 2, "the steps saved with the model"


def test_remote_code_gives_the_same_wrapped_backbone(visit):
    """A shifted Qwen2: its own class of transformers, behind our interface, and no file of another model beside it."""
    _, report, tensors, saved, _ = visit
    folder = saved.parent / "backbone"
    kind, module, options = report["backbone"]
    assert kind == "MDLMBackboneForMaskedDiffusion" and module.startswith("transformers_modules.")
    assert options == "MDLMGenerationConfig"
    model = modeling_mcd.MDLMBackboneForMaskedDiffusion.from_pretrained(folder)
    with torch.no_grad():
        expected = model(torch.arange(12).reshape(2, 6)).logits
    torch.testing.assert_close(tensors["backbone logits"], expected, rtol=0, atol=1e-5)
    assert torch.equal(tensors["backbone sequences"], model.generate(seed=0, steps=4))
    files = {file.name for file in folder.glob("*_mdlm.py")}
    assert "modeling_backbone_mdlm.py" in files and "modeling_mdlm.py" not in files


def test_remote_code_refuses_as_the_package_does(visit):
    assert visit[1]["steps=0"] == "steps must be an integer of at least 1, not 0"


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM"])
@pytest.mark.parametrize("trust", ["None", "False"])
def test_without_trust_nothing_is_run(visit, auto, trust):
    kind, message = visit[1][f"{auto} {trust}"]
    assert kind == "ValueError" and "trust_remote_code=True" in message


def test_a_model_saved_from_remote_code_is_whole(visit):
    _, report, tensors, saved, again = visit
    assert torch.equal(tensors["again logits"], tensors["AutoModel logits"])
    assert torch.equal(tensors["again sequences"], tensors["AutoModel sequences"])
    assert tensors["again default nfe"].item() == 3
    assert {file.name for file in again.iterdir()} == {file.name for file in saved.iterdir()}
    for folder in (saved, again):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert {name: target.split("--")[-1] for name, target in auto_map.items()} == {
            "AutoConfig": "configuration_mdlm.MDLMConfig",
            "AutoModel": "modeling_mdlm.MDLMForMaskedDiffusion",
            "AutoModelForMaskedLM": "modeling_mdlm.MDLMForMaskedDiffusion",
        }
    for name, tensor in load_file(saved / "model.safetensors").items():
        assert torch.equal(tensor, load_file(again / "model.safetensors")[name]), name


def test_the_code_beside_the_weights_is_the_package_s_own(visit):
    saved, package = visit[3], PACKAGE
    copied = {file.name for file in saved.glob("*.py")} - {"__init__.py"}
    backbones = {"configuration_backbone_mdlm.py", "modeling_backbone_mdlm.py"}
    assert copied == {file.name for file in package.glob("*_mdlm.py")} - backbones
    for name in copied:
        assert (saved / name).read_text() == (package / name).read_text(), name


def test_the_package_reads_what_remote_code_saved(visit):
    model, _, _, _, again = visit
    loaded = modeling_mcd.MDLMForMaskedDiffusion.from_pretrained(again)
    assert loaded.generation_config.steps == 3
    assert torch.equal(loaded.generate(seed=0, steps=4), model.generate(seed=0, steps=4))


# --- A transformers that is too old


@pytest.mark.parametrize("version", ["4.57.0", "5.0.1", "5.16.1"])
@pytest.mark.parametrize("module", ["modeling_mcd", "modeling_mcd.loading", "saved.configuration_mdlm"])
def test_an_old_transformers_is_refused_in_one_line(build, tmp_path, version, module):
    """The check comes before any import of a name that an old version lacks: the stub has none at all."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    build().save_pretrained(tmp_path / "saved")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    command = [sys.executable, "-c", f"import {module}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        f"ImportError: this model needs transformers >= 5.17, found {version}: "
        "pip install --upgrade 'transformers>=5.17'"
    )


def test_the_minimum_version_is_that_of_the_package():
    assert f'"transformers>={requirements_mdlm.MINIMUM},<6"' in (PACKAGE.parent / "setup.py").read_text()


# --- Whose code and which class


def test_someone_elses_auto_map_never_travels(build, tmp_path):
    build().save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    own = dict(config["auto_map"])
    config["auto_map"] |= {"AutoModelForMaskedLM": "evil/code--x.Y", "AutoModelForCausalLM": "evil/code--x.Y"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    load_model(tmp_path / "theirs").save_pretrained(tmp_path / "student")
    convert(tmp_path / "theirs", tmp_path / "converted")
    AutoModel.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "again")
    for folder in ("student", "converted", "again"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == own, folder


def test_asking_for_a_causal_model_names_the_right_class(build, tmp_path):
    build().save_pretrained(tmp_path)
    for ask in (AutoModelForCausalLM.from_pretrained, lambda path: AutoModelForCausalLM.from_config(build().config)):
        with pytest.raises(
            ValueError, match="not a causal .*: load it with AutoModel or AutoModelForMaskedLM"
        ) as error:
            ask(tmp_path)
        assert "\n" not in str(error.value)


def test_the_version_stands_once():
    built = subprocess.run(
        [sys.executable, "setup.py", "--version", "--name"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert built.stdout.split()[-2:] == [modeling_mcd.__version__, "mcd-diffusion"]
