"""Every method for a few steps, in one process or under FSDP2 in several.

All cases share the processes, whose start takes longer than they do.
"""

import copy
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_run import mcd_arguments, save_judge
from torch import distributed
from toy_backbones import MASK, make_network
from toy_distillers import METHODS, blocks, make_networks

from benchmarks.sharded_memory import promote
from evaluation.judge import fingerprint
from evaluation.team import Ranks
from modeling_mcd import as_masked_diffusion
from trainers import MDLMTrainer, MDLMTrainingArguments, run_mcd
from trainers.runs.together import together
from trainers.sharded_trainer import ShardedTrainer
from trainers.sharding import has_parts, is_sharded, parameters_of, part_of


ROWS = 4  # of a global batch
FULL, SHARDED = {"state_dict_type": "FULL_STATE_DICT"}, {"state_dict_type": "SHARDED_STATE_DICT"}
SAVED = {"save_strategy": "steps", "save_steps": 3}
LORA = LoraConfig(r=4, lora_alpha=4)
# Case -> method, arguments beside the common ones, and FSDP's configuration; None: DDP.
CASES = {
    "mcd": ("mcd", {"ema_decay": 0.9, **SAVED}, FULL),
    "mcd, sharded files": (
        "mcd",
        {"ema_decay": 0.9, "teacher_update": "ema", "gradient_accumulation_steps": 2, **SAVED},
        SHARDED | {"activation_checkpointing": True},
    ),
    "mcd, lora": ("mcd", {"ema_decay": 0.9, "lora": True, **SAVED}, FULL),
    "mcd, lora, sharded files": ("mcd", {"lora": True, **SAVED}, SHARDED),
    "mcd, bf16": ("mcd", {"bf16": True, "ema_decay": 0.9}, FULL),
    "mcd, bf16, ddp": ("mcd", {"bf16": True, "ema_decay": 0.9}, None),
    "tied": ("mcd", {"network": "qwen3", "ema_decay": 0.9, "save_strategy": "steps", "save_steps": 4}, FULL),
    "wrapped": ("mcd", {"network": "llama"}, FULL),
    "sdtt": ("sdtt", {}, FULL),
    "sdtt, ddp": ("sdtt", {}, None),
    "dcd": ("dcd", {}, FULL),
    "dscd": ("dscd", {}, FULL),
    "dscd, ddp": ("dscd", {}, None),
    "mpdc": ("mpdc", {}, FULL),
    "coupling": ("coupling", {}, FULL),
    "mdlm": ("mdlm", {"eval_strategy": "steps", "eval_steps": 2}, FULL),
}


def make_trainer(case: str, networks: dict, folder: Path, processes: int):
    method, changes, fsdp = CASES[case]
    trainer_class, arguments_class, own = METHODS.get(method, (MDLMTrainer, MDLMTrainingArguments, {}))
    settings = {"num_rounds": 2, "steps_per_round": 2} if method != "mdlm" else {"max_steps": 4}
    settings |= {
        "ema_decay": None,
        "save_strategy": "no",
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    settings |= own | changes | {"disable_tqdm": True, "report_to": "none", "seed": 11}
    lora, network = settings.pop("lora", False), settings.pop("network", None)
    settings["per_device_train_batch_size"] = ROWS // processes // settings.get("gradient_accumulation_steps", 1)
    settings["per_device_eval_batch_size"] = ROWS // processes
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate sets, for the next case too
    if processes > 1 and fsdp is not None:
        settings |= {"fsdp": True, "fsdp_config": dict(fsdp)}
    arguments = arguments_class(output_dir=str(folder), **settings)
    if network is None:
        teacher, student = map(copy.deepcopy, networks[getattr(trainer_class, "diffusion_kind", "absorbing")])
        if settings.get("bf16"):
            teacher, student = teacher.float(), student.float()
    else:
        student = as_masked_diffusion(make_network(network, dtype=torch.float64), MASK)
        teacher = copy.deepcopy(student)
    more = {"teacher": teacher} if getattr(trainer_class, "has_teacher", False) else {}
    if lora:
        student, more = teacher, {"peft_config": LORA}
    rows = [{"input_ids": row} for _ in range(4) for row in blocks().tolist()]
    return trainer_class(student, arguments, train_dataset=rows, eval_dataset=rows[:8], **more)


def run(case: str, networks: dict, folder: Path, processes: int, resume: Path | None = None):
    """Trains, and writes what the run computed: its log, and the network that it hands on."""
    trainer = make_trainer(case, networks, folder, processes)
    divided = processes > 1 and CASES[case][2] is not None
    if divided and "ema" in trainer.companions and "lora" not in case:  # no process ever has it completely
        assert {p.device.type for p in trainer.companions["ema"].model.parameters()} == {"meta"}
    trainer.train(resume and str(resume))
    assert is_sharded(trainer.model) == divided
    student = trainer.whole_student()
    tokens = student.generate(steps=4, seed=0, num_return_sequences=2)
    facts = {"log": trainer.state.log_history, "tokens": tokens.tolist()}
    if divided:
        network, team = trainer.handed_on(), Ranks()
        with together(network, team) as crew:
            for _ in range(1 + 2 * team.rank):  # not equally often
                alone = network.generate(steps=4, seed=0, num_return_sequences=2)
            facts["tokens together"], facts["weights"] = alone.tolist(), fingerprint(network, crew)
        facts["weights complete"] = fingerprint(student)
        saved = trainer.whole_student(everywhere=False)
        assert {p.device.type for p in saved.parameters()} == {"meta" if team.rank else "cpu"}
    if divided and case == "mcd":
        networks = (trainer.model, *(follower.model for follower in trainer.companions.values()))
        facts["parts"] = [sum(part_of(p).numel() for p in parameters_of(network).values()) for network in networks]
        facts["complete"] = sum(p.numel() for p in student.parameters())
    if divided and case == "mcd, lora":
        own, theirs = parameters_of(trainer.model), parameters_of(trainer.teacher)
        facts["shared"] = [theirs[name] is p for name, p in own.items() if not p.requires_grad]
    if trainer.args.should_save:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "facts.json").write_text(json.dumps(facts))
        save_file(
            {name: value.contiguous() for name, value in student.named_parameters()}, folder / "student.safetensors"
        )
    if processes > 1:
        distributed.barrier()


def run_command(inputs: Path, output: Path, processes: int):
    """`run_mcd.py` as `accelerate launch` with recipes/accelerate/fsdp2.yaml would start it, judged after each round."""
    if processes > 1:
        complete = ShardedTrainer.complete

        def complete_to_save(self, network, everywhere: bool = True):
            assert not everywhere or not has_parts(network)
            return complete(self, network, everywhere)

        ShardedTrainer.complete = complete_to_save
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    settings = {"num_rounds": 2, "steps_per_round": 2, "per_device_train_batch_size": 8 // processes, "save_steps": 2}
    settings |= {"judge": inputs / "judge", "evaluation_steps": 2, "evaluation_samples": 5, "evaluation_batch_size": 2}
    run_mcd.main(mcd_arguments(inputs, output, report_to="none", **settings))


def main(root: str, rank: str, processes: str):
    """What one of the processes does; the only one, if there is one."""
    root, rank, processes = Path(root), int(rank), int(processes)
    torch.set_num_threads(1)
    inputs = root / f"inputs-{rank}-{processes}"
    networks = make_networks(inputs)
    save_judge(inputs / "judge")
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        store = f"file://{root / 'store'}"  # no port, which somebody else could take
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        promote()
    for case in CASES:
        folder = root / str(processes) / case
        run(case, networks, folder, processes)
        if processes > 1 and CASES[case][1].get("save_steps") == 3:
            run(case, networks, folder.with_name(f"{case}, resumed"), processes, folder / "checkpoint-3")
    run_command(root / f"inputs-0-{processes}", root / str(processes) / "command", processes)
