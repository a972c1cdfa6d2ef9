"""recipes/accelerate: each file is what its name says, for eight processes here or for more on several machines."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny_run import ROOT

from trainers.sharded_trainer import check_fsdp


FOLDER = ROOT / "recipes" / "accelerate"
SEVERAL = ("--num_machines", "4", "--num_processes", "32", "--machine_rank", "2")
SEVERAL += ("--main_process_ip", "10.0.0.1", "--main_process_port", "29500")


def read(name: str, *words: str):
    """What `accelerate launch` makes of a file and of words beside it."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), *words, "run.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_what_its_name_says(path):
    arguments, (mode, device) = read(path.name), (path.stem.split("_") + ["gpu"])[:2]
    assert arguments.num_processes == {"gpu": 8, "cpu": 2}[device]
    assert (arguments.multi_gpu, arguments.use_deepspeed, arguments.use_fsdp) == (
        mode == "ddp",
        mode.startswith("zero"),
        mode == "fsdp2",
    )
    if mode.startswith("zero"):
        assert arguments.zero_stage == int(mode[-1])
        assert (str(arguments.zero3_init_flag).lower() == "true") == (mode == "zero3")


def test_fsdp_on_several_machines(monkeypatch):
    arguments = read("fsdp2.yaml", *SEVERAL)
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("4", "8", 2)
    assert arguments.rdzv_endpoint == "10.0.0.1:29500"
    for name in ("ACCELERATE_USE_FSDP", *(name for name in environment if name.startswith("FSDP_"))):
        monkeypatch.setenv(name, environment[name])
    assert environment["FSDP_VERSION"] == "2" and environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"
    settings = {"fsdp": None, "fsdp_config": None, "save_on_each_node": False}
    check_fsdp(SimpleNamespace(**settings, device=torch.device("cuda")))  # raises nothing
    with pytest.raises(ValueError, match="FSDP needs GPUs"):
        check_fsdp(SimpleNamespace(**settings, device=torch.device("cpu")))
