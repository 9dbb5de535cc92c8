"""Why a run cannot go on from one of its checkpoints: each file is read as the Trainer reads it.

What is read is thrown away. Weights are read once more and compared on the meta device, where a
model takes no memory.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from moebalance.core.state import check_values
from moebalance.files import first_line
from moebalance.integrations.huggingface import STATE_FILE, find_sites
from moebalance.integrations.huggingface.scan import files_of
from moebalance.integrations.huggingface.sharded import is_distributed, missing_part
from moebalance.integrations.huggingface.state_file import read
from moebalance.lab.doctor.state import fit
from moebalance.lab.models import load_model, read_configuration, refusing


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was saved after; −1 for a folder of another name."""
    tail = checkpoint.name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else -1


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, without the balancing state."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != STATE_FILE)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if a run can go on from it."""
    try:
        _check(checkpoint)
    except Exception as error:  # files of any content
        return first_line(error)
    return None


def _check(checkpoint: Path) -> None:
    _check_progress(checkpoint)
    # One for each rank that there was.
    for path in sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]:
        _check_random_numbers(path)
    if is_distributed(checkpoint):
        if problem := missing_part(checkpoint):
            raise ValueError(problem)
        return
    for index in checkpoint.glob("*.index.json"):
        for name in files_of(index):
            _needed(checkpoint / name)
    _check_optimizer(checkpoint)
    _check_model(checkpoint)


def _check_progress(checkpoint: Path) -> None:
    path = _needed(checkpoint / "trainer_state.json")
    with refusing(f"{path.name} cannot be read"):
        step = TrainerState.load_from_json(str(path)).global_step
    if type(step) is not int or step != step_of(checkpoint):
        raise ValueError(f"{path.name} says step {str(step)[:60]}")


def _check_random_numbers(path: Path) -> None:
    with refusing(f"{path.name} holds no state of random numbers"):
        held = _loaded(path)
        random.Random().setstate(held["python"])
        np.random.RandomState().set_state(held["numpy"])
        torch.Generator().set_state(held["cpu"])


def _check_optimizer(checkpoint: Path) -> None:
    with refusing("optimizer.pt holds no state of an optimizer"):
        held = _loaded(checkpoint / "optimizer.pt")
        counts = [len(group["params"]) for group in held["param_groups"]]
        groups = [[nn.Parameter(torch.empty(0)) for _ in range(count)] for count in counts]
        optimizer = Optimizer([{"params": group} for group in groups], {"lr": 0.0})
        optimizer.load_state_dict(held)
    with refusing("scheduler.pt holds no state of a schedule"):
        LambdaLR(optimizer, lambda step: 1.0).load_state_dict(_loaded(checkpoint / "scheduler.pt"))
    if (checkpoint / "scaler.pt").exists():
        _loaded(checkpoint / "scaler.pt")


def _check_model(checkpoint: Path) -> None:
    for path in weight_files(checkpoint) or [checkpoint / "model.safetensors"]:
        _check_values(_needed(path))
    _needed(checkpoint / STATE_FILE)
    state = read(checkpoint)
    check_values(state)
    if (checkpoint / "adapter_config.json").is_file():
        return  # its model is elsewhere
    config = read_configuration(_needed(checkpoint / "config.json").parent)
    sites = find_sites(load_model(checkpoint, config, device_map="meta"))
    fit(state, sites)
    if len(state["layers"]) < len(sites):
        raise ValueError(f"{STATE_FILE} is of {len(state['layers'])} of {len(sites)} routers")


def _check_values(path: Path) -> None:
    with refusing(f"{path.name} is damaged"), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if not file.get_tensor(key).isfinite().all():
                raise ValueError(f"{key} is not finite")


def _loaded(path: Path) -> Any:
    """What a file of torch holds; reading is the test, and a truncated one fails."""
    with refusing(f"{_needed(path).name} cannot be read"), safe_globals():  # type: ignore[no-untyped-call]
        return torch.load(path, weights_only=True, map_location="cpu")


def _needed(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is missing")
    return path
