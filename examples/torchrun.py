"""Data-parallel training of a balanced model, with gradient accumulation and a checkpoint.

    torchrun --nproc-per-node 2 examples/torchrun.py 100 checkpoint.pt

Run again with more steps it goes on from its checkpoint, on as many ranks as one likes that divide
the batch: the tokens of a step, and so the training, do not depend on their number.
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain_pytorch import HIDDEN, VOCABULARY, MoE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moebalance as mb

ACCUMULATION, SEQUENCES, LENGTH, SAVE_EVERY = 2, 8, 64, 10


def batch(step: int) -> Tensor:
    """The token ids of a step on all ranks: a few words are frequent."""
    generator = torch.Generator().manual_seed(step)
    frequency = 1.0 / torch.arange(1, VOCABULARY + 1)
    ids = torch.multinomial(frequency, SEQUENCES * LENGTH, replacement=True, generator=generator)
    return ids.view(SEQUENCES, LENGTH)


def train(steps: int, checkpoint: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    # Without peeking at the batch in hand, the price is the same on all ranks.
    method = mb.PhiBalancing(strength=0.04, peek=False)
    words, head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
    model = nn.Sequential(words, MoE(method), MoE(method), head).to(device)
    balancing = mb.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (balancing, "balancing")):
            part.load_state_dict(saved[name])
    parallel = DistributedDataParallel(model)
    for step in range(balancing.steps, steps):
        mine = batch(step)[rank::ranks].to(device)
        for number, ids in enumerate(mine.chunk(ACCUMULATION), start=1):
            with parallel.no_sync() if number < ACCUMULATION else nullcontext():
                logits = parallel(ids).flatten(0, 1)
                loss = F.cross_entropy(logits, (ids * 7 % VOCABULARY).flatten())
                (balancing.follow(loss) / ACCUMULATION).backward()
        balancing.reduce()  # its message travels while the optimizer works
        optimizer.step()
        optimizer.zero_grad()
        balancing.step()
        if rank == 0 and balancing.steps % SAVE_EVERY == 0:
            parts = {"model": model, "optimizer": optimizer, "balancing": balancing}
            torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
            seen = balancing.metrics()
            print(
                f"step {balancing.steps}  MaxVio {seen['maxvio']:.2f}  tokens {seen['tokens']:.0f}"
            )


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    steps, checkpoint = sys.argv[1:] or ("20", "checkpoint.pt")
    train(int(steps), Path(checkpoint))
    dist.destroy_process_group()
