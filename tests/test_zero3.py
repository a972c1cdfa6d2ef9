"""ZeRO-3 in two processes on a CPU: each holds and saves its part of every network, and none is ever gathered completely.

The losses, the resumed run and the judged one are in `test_launch.py`.
"""

import json
import shutil

import pytest
from tiny_run import ROOT, run_python, write_inputs
from transformers import AutoModel

from evaluation.judge import fingerprint
from modeling_mcd.files import read_object
from trainers.checkpoints import MANIFEST, fault_of
from trainers.teacher import saved_weights


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("ninja") is None,
        reason="DeepSpeed builds its gloo extension with g++ and ninja",
    ),
]
SCRIPT = """
import json, sys
from pathlib import Path
import deepspeed, torch
from evaluation.judge import fingerprint
from evaluation.team import Ranks
from modeling_mcd.loading import load_model
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.runs.together import together
from trainers.sharding import parameters_of, part_of

inputs, output = map(Path, sys.argv[1:])
settings = {"num_rounds": 2, "steps_per_round": 2, "per_device_train_batch_size": 2, "ema_decay": 0.9, "save_steps": 4}
settings |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "delta": 0.125, "learning_rate": 1e-2}
arguments = MCDTrainingArguments(output_dir=str(output), **settings)
student = load_model(str(inputs / "teacher"))

class Watched(deepspeed.zero.GatheredParameters):
    now = most = 0

    def __enter__(self):
        if self.enabled:
            Watched.now += sum(parameter.ds_numel for parameter in self.params)
            Watched.most = max(Watched.now, Watched.most)
        return super().__enter__()

    def __exit__(self, *of_error):
        if self.enabled:
            Watched.now -= sum(parameter.ds_numel for parameter in self.params)
        return super().__exit__(*of_error)

deepspeed.zero.GatheredParameters = Watched
trainer = MCDTrainer(student, arguments, train_dataset=[{"input_ids": [i % 40] * 32} for i in range(32)])
trainer.train()
ema, rank = trainer.handed_on(), arguments.process_index
outer = [ema.get_input_embeddings(), ema.get_output_embeddings()]
own = max(sum(p.ds_numel for p in module.parameters(recurse=False)) for module in ema.modules())
with together(ema, Ranks()) as team:
    for _ in range(1 + 2 * rank):  # not equally often
        tokens = ema.generate(steps=4, seed=rank, num_return_sequences=2).tolist()
    weights = fingerprint(ema, team)
    tokens = team.gather(tokens)
most = Watched.most
saved = trainer.whole_student(everywhere=False)
assert {p.device.type for p in saved.parameters()} == {"meta" if rank else "cpu"}
complete = trainer.whole_student()
if rank == 0:
    complete.save_pretrained(output / "ema")
    networks = [student, *(follower.model for follower in trainer.companions.values())]
    facts = {
        "parts": [sum(part_of(p).numel() for p in parameters_of(network).values()) for network in networks],
        "complete": sum(p.numel() for p in complete.parameters()),
        "most": most,
        "allowed": sum(p.ds_numel for module in outer for p in module.parameters()) + own,
        "left open": Watched.now,
        "weights": weights,
        "tokens": tokens,
        "expected": [complete.generate(steps=4, seed=i, num_return_sequences=2).tolist() for i in range(2)],
    }
    (output / "facts.json").write_text(json.dumps(facts))
trainer.end()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, and what its first process found."""
    folder = tmp_path_factory.mktemp("zero3")
    (folder / "script.py").write_text(SCRIPT)
    config = str(ROOT / "recipes/accelerate/zero3_cpu.yaml")
    words = ["--config_file", config, str(folder / "script.py"), str(write_inputs(folder)), str(folder / "run")]
    result = run_python("accelerate.commands.launch", *words, launcher=("-m",))
    assert result.returncode == 0, result.stderr[-6000:]
    return folder / "run", json.loads((folder / "run" / "facts.json").read_text())


def test_every_process_holds_and_saves_its_part(run):
    """Student, teacher and EMA each; the files hold complete tensors, and the manifest knows them all."""
    folder, facts = run
    assert all(0.45 < part / facts["complete"] < 0.55 for part in facts["parts"]) and len(facts["parts"]) == 3
    files = [f"{name}/model-0000{k}-of-00002.safetensors" for name in ("ema", "teacher") for k in (1, 2)]
    checkpoint = folder / "checkpoint-4"
    assert set(files) <= read_object(checkpoint / MANIFEST)["files"].keys() and fault_of(checkpoint) is None
    ema = dict(AutoModel.from_pretrained(folder / "ema").named_parameters())
    saved = saved_weights(checkpoint / "ema")
    assert saved.keys() == ema.keys() and all(saved[name].equal(value) for name, value in ema.items())


def test_never_more_than_a_layer_head_and_embeddings_at_once(run):
    """In training, in checkpoints and while all processes generate."""
    assert 0 < run[1]["most"] <= run[1]["allowed"] < 0.6 * run[1]["complete"] and run[1]["left open"] == 0


def test_each_process_generates_for_itself_from_a_divided_network(run):
    folder, facts = run
    assert facts["tokens"] == facts["expected"]
    assert facts["weights"] == fingerprint(AutoModel.from_pretrained(folder / "ema"))
