"""How long many processes take to resume from one checkpoint folder at once, and to step together.

    PYTHONPATH=src python benchmarks/resume.py 64

Gloo processes on this machine, forked, each with 8 layers of 16 experts. Prints seconds of the
slowest process, and whether all of them ended with the same state.
"""

import datetime
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.integrations.huggingface import state_file
from moebalance.methods import recommended
from moebalance.routing import Sums

STEPS = 3


def handle() -> Balancing:
    method = recommended()
    layers = {f"layers.{i}": LayerBalance(method, 16) for i in range(8)}
    return Balancing(method, layers)


def step(balancing: Balancing) -> None:
    load = torch.arange(16.0)
    for layer in balancing.layers.values():
        layer.count(Sums(load, load, load.sum()))
    balancing.step()


def rank(number: int, ranks: int, folder: Path, answers: "multiprocessing.Queue") -> None:
    torch.set_num_threads(1)
    minutes = datetime.timedelta(minutes=5)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, minutes, ranks, number)
    start = time.monotonic()
    balancing = handle()
    state_file.load(balancing, folder)
    loaded = time.monotonic() - start
    for _ in range(STEPS):
        step(balancing)
    total = sum(
        t.double().sum().item()
        for s in balancing.state_dict()["layers"].values()
        for t in s.values()
    )
    answers.put((loaded, time.monotonic() - start, balancing.steps, total))
    dist.destroy_process_group()


def main(ranks: int) -> None:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = handle()
        step(saved)
        state_file.save(saved, folder)
        answers = fork.Queue()
        processes = [
            fork.Process(target=rank, args=(number, ranks, folder, answers))
            for number in range(ranks)
        ]
        for process in processes:
            process.start()
        found = [answers.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
    loads, whole, steps, totals = zip(*found, strict=True)
    same = len(set(totals)) == 1 and set(steps) == {1 + STEPS}
    print(
        f"{ranks} processes: loaded in {max(loads):.1f} s, {STEPS} steps after {max(whole):.1f} s"
    )
    print("all with the same state" if same else "THE STATES DIFFER")


if __name__ == "__main__":
    main(int(sys.argv[1]))
