"""One training step's tokens, laid out over micro-batches and ranks in every way that people do.

`python tests/layouts.py` prints the table of docs/layout.md, `… phi switch` the rows of those two.
On a busy machine a row may need more than 150 seconds: LIMIT_S=600 gives it ten minutes.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import moebalance as mb
from cases import METHODS, POTENTIALS
from layout_cases import ALONE, LENGTH, ONE, PAIRS, QUADS, SEQUENCES, Layout
from layout_models import TOP_K, WIDTH, Stack, losses
from moebalance import Method
from processes import run

STEPS = 3

SAME_STATE, SAME_GRADIENT = 1e-6, 1e-5
"""Absolute and relative differences that rounding may make."""

ROWS = [
    name
    for name in METHODS
    if name == "phi-negative-entropy" or name.removeprefix("phi-") not in POTENTIALS
]
"""What the table shows: of the nine potentials, which all behave alike here, one."""


class Seen(NamedTuple):
    """What one rank knows of one layer at the end.

    Attributes:
        state: the method's state.
        sums: scores and counts of the last step, of all ranks.
        gradient: of the router's weight (E, D), as the optimizer saw it.
        term: what the balancing term added to it.
    """

    state: dict[str, Tensor]
    sums: tuple[Tensor, Tensor]
    gradient: Tensor
    term: Tensor


def additive(method: Method) -> bool:
    """Whether training is promised to be the same under every layout, cut sequences included."""
    return method.traits.coupling == "token"


def train(layout: Layout, method: Method) -> dict[str, Seen]:
    """Some optimizer steps; each layer of this rank by name.

    Methods whose gradient depends on the layout do not train: all layouts see the same logits, and
    so the state must still be the same.
    """
    run = (_Staged if layout.staged else _Run)(layout, method)
    rate = 0.2 if additive(method) else 0.0
    optimizer = torch.optim.SGD(run.model.parameters(), lr=rate)
    for step in range(STEPS):
        run.backward(step)
        optimizer.step()
        optimizer.zero_grad()
        run.balancing.step()
    run.balancing.set_loss_scale(0.0)
    run.backward(STEPS, follow=False)
    without = run.gradients()
    run.balancing.discard()
    optimizer.zero_grad()
    run.balancing.set_loss_scale(1.0)
    run.backward(STEPS)
    run.balancing.step()
    seen = {}
    for (name, layer), whole, task in zip(
        run.balancing.layers.items(), run.gradients(), without, strict=True
    ):
        state = {k: v.clone() for k, v in layer.state_dict().items() if k.startswith("state_")}
        sums = layer.last_sums.scores, layer.last_sums.counts
        seen[name] = Seen(state, sums, whole, whole - task)
    return seen


def real_tokens(tokens: str, step: int) -> Tensor:
    """Mask (B, S), True for a real token."""
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    if tokens == "ragged":
        generator = torch.Generator().manual_seed(1000 + step)
        return positions < torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    if tokens == "left half":
        return positions < LENGTH // 2
    real = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    if tokens == "first half":
        real[SEQUENCES // 2 :] = False
    return real


class _Run:
    """A model laid out, and its balancing."""

    def __init__(self, layout: Layout, method: Method) -> None:
        self.layout = layout
        self.rank = dist.get_rank() if len(layout.batches) > 1 else 0
        self.model = Stack(method, layout.block, self.layers())
        group = _alone() if layout.alone else None
        named: dict[str, Any] = {"routers": "*.gate", "top_k": TOP_K, "normalize": True}
        named |= {"method": method, "mask": "mask"}
        if any(hasattr(layer, "gate") for layer in self.model.layers.values()):
            more = named if layout.named else {}
            self.balancing = mb.attach(self.model, group=group, **more)
        else:  # a stage without experts has nothing to attach to
            self.balancing = mb.Balancing(method, {}, group=group)
        self.wrapped = self.model if layout.wrap is None else layout.wrap(self.model)

    def layers(self) -> list[int]:
        return [0, 1]

    def backward(self, step: int, *, follow: bool = True) -> None:
        """The gradient of a whole step, as the optimizer is to see it."""
        x, real = self.data(step)
        batches = self.layout.batches[self.rank]
        for number, cut in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last or self.layout.wrap is None else self.wrapped.no_sync():
                mask = None if self.layout.tokens == "all" else real[cut]
                loss = _mean(losses(self.wrapped(x[cut], mask)), real[cut])
                if follow:
                    loss = self.balancing.follow(loss)
                (loss * self.weight(real[cut], real)).backward()
        for name, weight in self.model.named_parameters():
            if name.endswith(self.layout.summed):
                dist.all_reduce(weight.grad)

    def data(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator, dtype=torch.float64) + 0.5
        return x, real_tokens(self.layout.tokens, step)

    def weight(self, part: Tensor, whole: Tensor) -> float:
        """What a batch's mean loss counts: its share of the tokens, made up for averaging."""
        averaged = 1 if self.layout.wrap is None else len(self.layout.batches)
        return averaged * (part.sum() / whole.sum()).item()

    def gradients(self) -> list[Tensor]:
        gates = (layer.gate for layer in self.model.layers.values() if hasattr(layer, "gate"))
        found = [getattr(gate, "weight", gate).grad for gate in gates]
        return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in found]


class _Staged(_Run):
    """One layer a rank, under torch's own pipeline schedule."""

    def __init__(self, layout: Layout, method: Method) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        super().__init__(layout, method)
        batches = layout.batches[self.rank]
        # With examples given, torch need not find the shapes out by a run on the meta device.
        example = self.data(0)[0][batches[0]]
        stage = PipelineStage(
            self.model,
            self.rank,
            len(layout.batches),
            torch.device("cpu"),
            input_args=example.clone().requires_grad_(self.rank > 0),
            output_args=example.clone().requires_grad_(),
        )
        self.follow = True
        self.schedule = Schedule1F1B(stage, len(batches), loss_fn=self.loss)

    def layers(self) -> list[int]:
        return [self.rank]

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        loss = _mean(losses(hidden), target)
        return self.balancing.follow(loss) if self.follow else loss

    def backward(self, step: int, *, follow: bool = True) -> None:
        x, real = self.data(step)
        self.follow = follow
        mask = {} if self.layout.tokens == "all" else {"mask": real}
        if self.rank == 0:
            self.schedule.step(x, **mask)
        else:
            self.schedule.step(target=real, **mask)


def _mean(values: Tensor, real: Tensor) -> Tensor:
    return torch.where(real, values, 0).sum() / real.sum().clamp(min=1)


@functools.cache
def _alone() -> dist.ProcessGroup:
    """A group of this rank only; one for all layouts, since each holds threads and sockets."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def train_all(
    layouts: Mapping[str, Layout], methods: Iterable[str]
) -> dict[tuple[str, str], dict[str, Seen]]:
    """Every method under every layout, in this process as one of its ranks."""
    return {
        (name, method): train(layout, METHODS[method])
        for name, layout in layouts.items()
        for method in methods
    }


class Difference(NamedTuple):
    """How far a layout's outcome lies from that of one process, the largest of layers and ranks.

    Attributes:
        state: absolute, and relative where a state is larger than 1.
        sums: of the step's scores and counts, relative to the largest.
        gradient: of the router's gradient, relative.
        effective: of the balancing term's part of it, or of the whole where there is no term.
    """

    state: float
    sums: float
    gradient: float
    effective: float


def difference(
    ranks: Sequence[Mapping[str, Seen]], one: Mapping[str, Seen], method: Method
) -> Difference:
    """Hold what every rank saw against what one process saw."""
    found = [Difference(0, 0, 0, 0)]
    for rank in ranks:
        for name, seen in rank.items():
            own = one[name]
            states = [
                (seen.state[key] - state).abs().max() / state.abs().max().clamp(min=1)
                for key, state in own.state.items()
            ]
            sums = [_relative(a, b) for a, b in zip(seen.sums, own.sums, strict=True)]
            gradient = _relative(seen.gradient, own.gradient)
            effective = _relative(seen.term, own.term) if method.traits.charges else gradient
            found.append(Difference(float(max(states, default=0)), max(sums), gradient, effective))
    return Difference(*(max(column) for column in zip(*found, strict=True)))


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def table(rows: Sequence[str]) -> str:
    """Markdown: each method's difference from one process under each layout."""
    one = train_all({"one": ONE["all"]}, rows)
    limit_s = float(os.environ.get("LIMIT_S", "150"))
    pairs, quads = (
        run(train_all, ranks, layouts, rows, limit_s=limit_s)
        for ranks, layouts in ((2, PAIRS), (4, QUADS))
    )
    sides = [train_all(ALONE, rows)], pairs, quads
    names = [*ALONE, *PAIRS, *QUADS]
    heads = ["method", "coupling", *names, "state"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in rows:
        found = [
            difference([rank[name, method] for rank in side], one["one", method], METHODS[method])
            for side, layouts in zip(sides, (ALONE, PAIRS, QUADS), strict=True)
            for name in layouts
        ]
        cells = ["=" if d.effective <= SAME_GRADIENT else f"{d.effective:.2g}" for d in found]
        state = max(d.state for d in found)
        cells = [method, METHODS[method].traits.coupling, *cells, f"{state:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(sys.argv[1:] or ROWS))
