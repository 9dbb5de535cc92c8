"""Trainers on two ranks of DistributedDataParallel: the strength and the counts of one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer

from families import tiny
from processes import run
from test_trl import dpo, sft
from training import BalanceCallback, FixedPrice, KeepGradient, Rows, agree, plain

LENGTHS = [60, 25, 22, 58, 23, 27, 44, 31]


def trained(folder: str, ranks: int) -> dict[str, tuple[Tensor, float]]:
    """The term's gradient and the tokens of one step of eight rows, by trainer."""
    makers = {
        "ragged": plain(Path(folder), Rows(8, LENGTHS)),
        "ragged-sft": sft(Path(folder), LENGTHS),
        "smoothed": plain(Path(folder), Rows(8), label_smoothing_factor=0.1),
        "dpo": dpo(Path(folder)),
    }
    sizes = {"per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2}
    found = {}
    for name, make in makers.items():
        gradients = []
        for strength in (1.0, 0.0):
            keep, callback = KeepGradient(), BalanceCallback(FixedPrice(strength))
            trainer: Trainer = make(tiny("mixtral"), [callback, keep], **sizes)
            trainer.train()
            gradients.append(keep.gradient)
        tokens = callback.balancing.metrics()["tokens"]
        found[name] = (gradients[0] - gradients[1], tokens)
    return found


def on_a_rank(folder: str) -> dict[str, tuple[Tensor, float]]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # As torchrun would have it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    warnings.simplefilter("ignore")  # the trainers' own, on gloo
    return trained(folder, ranks)


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_two_ranks_balance_as_one_process_does(tmp_path: Path) -> None:
    alone = trained(str(tmp_path), 1)
    first, second = run(on_a_rank, 2, str(tmp_path))
    for name, (whole, tokens) in alone.items():
        for parts, counted in (first[name], second[name]):
            assert counted == tokens, name
            # Ragged rows: other micro-batches are formed, whose means differ a little.
            ragged = name.startswith("ragged")
            assert agree(parts, whole, 2e-2 if ragged else 1e-3), name
            assert abs(parts.norm() / whole.norm() - 1) < 5e-3, name
