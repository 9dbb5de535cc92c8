"""State and running sums of one MoE layer: the only stateful class.

State is float32 whatever the model's dtype, and persistent. The running sums of a step are plain
tensors, not buffers: DistributedDataParallel broadcasts rank 0's buffers, which would overwrite
the counts of the other ranks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moebalance.core.autograd import Pass, Tally, tie
from moebalance.core.formed import find, join
from moebalance.core.leaves import leaves, refill
from moebalance.core.packing import pack, packed_size, unpack
from moebalance.core.sound import check_price, readable, tensors_problem, trial_problem
from moebalance.core.trial import trusted
from moebalance.core.weighing import Weighing
from moebalance.gates import Gate, Softmax, at_least_float32
from moebalance.kernels import new_tickets, supported
from moebalance.methods.base import (
    Method,
    State,
    observe,
    price_in_force,
    ranks_by_itself,
    sees_sequences,
)
from moebalance.methods.lineage import Lineage, inherit
from moebalance.routing import Sums, measure, route

_SOFTMAX = Softmax()

logger = logging.getLogger("moebalance")


class LayerBalance(nn.Module):
    """State and running sums of one MoE layer under one method.

    Args:
        method: the method.
        num_experts: E.
        gate: how this layer's scores come from its logits.
        fused: whether to use the fused kernels if they can run (`kernels.supported`).
        name: what errors and logs call this layer.

    Raises:
        TypeError: no method, no gate, or a method whose traits contradict its sums.
        ValueError: fewer than two experts, or a method for another number of experts.
    """

    at_rest = False
    """Whether it counts and charges nothing: after `detach`, or left out of `layers`."""

    def __init__(
        self,
        method: Method,
        num_experts: int,
        *,
        gate: Gate = _SOFTMAX,
        fused: bool = True,
        name: str = "router",
    ) -> None:
        super().__init__()
        if not isinstance(method, Method):
            raise TypeError(
                f"method={method!r}: must be a Method, for example PhiBalancing(strength=0.01)."
            )
        if not isinstance(gate, Gate):
            raise TypeError(f"gate={gate!r}: must be a Gate, for example Softmax() or Sigmoid().")
        if method.traits.from_sums and method.extra_shapes(num_experts):
            raise TypeError(
                f"{method!r} says `from_sums` (scores, counts and tokens alone) and has sums of "
                "its own (`extra_shapes`): keep one of the two."
            )
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: balancing needs at least 2 experts.")
        self.method, self.traits, self.num_experts = method, method.traits, num_experts
        self.gate, self.fused, self.name = gate, fused, name
        self.by_sequence = sees_sequences(method)
        self.last_step: Tensor
        self.last_total: Tensor | None
        self.watched: Sums | None = None
        self.weighing: Weighing | None = None
        self._reset()

    @property
    def state(self) -> State:
        """The method's state, built over this module's buffers."""
        buffers = self._buffers  # not by `get_buffer`: this is asked for at every batch
        return refill(self._template, iter([buffers[name] for name in self._state_names]))

    @property
    def last_sums(self) -> Sums | None:
        """Sums of the last finished step; None before the first."""
        if self.last_total is None:
            return None
        return unpack(self.last_total, self.method, self.num_experts)

    @property
    def price(self) -> Float[Tensor, "E"] | None:
        """The selection price in force, in units of the affinity, or None."""
        return self.method.selection_price(self.state)

    def preference(
        self, logits: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None, *, training: bool
    ) -> Float[Tensor, "T E"] | None:
        """Scores (T, E) for top-k to rank instead of the affinities, or None."""
        with torch.no_grad():
            return self.method.preference(
                self.state, self.gate, logits.detach(), mask=mask, training=training
            )

    def tie(
        self,
        carrier: Tensor,
        logits: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
        *,
        mask: Bool[Tensor, "T"] | None = None,
        sequences: int = 1,
        weight: Float[Tensor, ""] | None = None,
        replayed: bool = False,
    ) -> Tensor:
        """Tie this batch's counting and charge to the backward pass of `carrier`.

        Args:
            carrier: a differentiable output of the router that the loss depends on.
            logits: (T, E), which receive the gradient of the penalty.
            experts: (T, K), the choice.
            mask: (T,) True for real tokens, or None.
            sequences: number of equally long sequences in which the tokens lie.
            weight: this batch's weight in the mean over its step; None for 1.
            replayed: whether the choice came from elsewhere, not from this router. The step then
                moves no price (`Method.held`).

        Returns:
            `carrier`, unchanged.
        """
        if not (carrier.requires_grad or logits.requires_grad):
            # Nothing below is trained, so no backward will come by. A recomputation for activation
            # checkpointing runs inside of a backward, and is not a second batch.
            if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
                with torch.no_grad():
                    routing = route(logits, experts, self.gate, mask=mask, sequences=sequences)
                    self.count(observe(self.method, self.state, routing))
                    if replayed:
                        self.replayed.fill_(1)
            return carrier
        if self.weighing is not None and logits.requires_grad:
            logits = self.weighing.branch(logits)
        more = {"sequences": sequences, "replayed": replayed, "weight": weight}
        how = self.pass_for(logits, experts.shape[-1], **more)
        fits = how.fused and supported(logits, self.gate, how.top_k)
        if self.traits.from_sums and self.weighing is None and not fits:
            formed = find(carrier, logits, self.gate)
            if formed is not None:
                join(formed, how, experts, mask=mask)
                return carrier
        return tie(carrier, how, logits=logits, experts=experts, mask=mask)

    def count(self, sums: Sums) -> None:
        """Add a batch's sums to the running step by hand."""
        self.running.add_(pack(sums))

    @torch.no_grad()
    def watch(
        self,
        logits: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
        *,
        mask: Bool[Tensor, "T"] | None = None,
    ) -> None:
        """Count an evaluation batch if monitoring is on. Balancing state does not change."""
        if self.watched is not None:
            new = measure(route(logits, experts, self.gate, mask=mask))
            old = self.watched
            self.watched = Sums(
                old.scores + new.scores, old.counts + new.counts, old.tokens + new.tokens
            )

    def start_watching(self) -> None:
        """Start to count evaluation batches, from zero."""
        zeros = torch.zeros(self.num_experts, device=self.running.device)
        self.watched = Sums(zeros, zeros, zeros.new_zeros(()))

    @torch.no_grad()
    def adopt(self, price: Float[Tensor, "E"]) -> None:
        """Start from a selection price that the model was trained with; refuse a sick one."""
        check_price(price, self.name)
        self._write(self.method.adopt(self.state, price.float()))

    @torch.no_grad()
    def inherit(self, saved: Mapping[str, Tensor], lineage: Lineage) -> None:
        """Take over the state of a layer with other experts.

        Args:
            saved: the `state_dict` of the other layer.
            lineage: the parents of this layer's experts among the other's.
        """
        self._write(self._inherited(saved, lineage))
        self.last_step.copy_(saved["last_step"])

    @torch.no_grad()
    def problem(self, saved: Mapping[str, Tensor], lineage: Lineage | None = None) -> str:
        """Why a saved state of the right shapes cannot be trained with; empty if it can.

        Args:
            saved: the `state_dict` of this layer, or of one with other experts.
            lineage: the parents of this layer's experts among the other's.
        """
        found = tensors_problem(saved, self._buffers)  # type: ignore[arg-type]
        if found:
            return found
        here = {name: tensor.detach().cpu() for name, tensor in saved.items()}
        state = self._inherited(here, lineage) if lineage is not None else self._of(here)
        return trial_problem(self.method, state, self.gate, self.num_experts)

    def discard(self) -> None:
        """Forget what was counted since the last commit."""
        self.running.zero_()
        self.replayed.zero_()
        if self.weighing is not None:
            self.weighing.discard()

    def extra_repr(self) -> str:
        """Show the method and the size."""
        return f"{self.method}, num_experts={self.num_experts}, gate={self.gate}"

    @torch.inference_mode(False)  # what is made within it can never be trained with
    def _reset(self) -> None:
        """Make the state before the first step, on the device in force."""
        self._template = self._first_state()
        price, _ = price_in_force(self.method, self._template)
        # Whether tokens are chosen under a price that is trained, in affinities or in nats.
        self.trains_price = price is not None
        # Whether top-k ranks affinities, or their logarithms, less that price, and nothing else.
        self.has_price = self.trains_price and not ranks_by_itself(self.method)
        self._state_names = [f"state_{name}" for name, _ in leaves(self._template)]
        for name, (_, tensor) in zip(self._state_names, leaves(self._template), strict=True):
            self.register_buffer(name, tensor.clone())
        size = packed_size(self.method, self.num_experts)
        self.register_buffer("last_step", torch.zeros(2).float())
        self.running = torch.zeros(size).float()
        self.loss_scale = torch.ones(()).float()
        self.replayed = torch.zeros(()).float()
        self.tickets = new_tickets(self.running)
        self.last_total = None

    def _first_state(self) -> State:
        """The state before the first step, float32.

        Also within `deepspeed.zero.Init`, where torch's constructors give the model's dtype instead
        of the one that they are asked for.
        """
        made = self.method.init(self.num_experts)
        return refill(made, iter([at_least_float32(tensor) for _, tensor in leaves(made)]))

    def _of(self, saved: Mapping[str, Tensor]) -> State:
        return refill(self._template, iter([saved[name] for name in self._state_names]))

    def _inherited(self, saved: Mapping[str, Tensor], lineage: Lineage) -> State:
        return inherit(self._of(saved), lineage, self.gate)

    def settle(self) -> None:
        """Make what is not a buffer, where only the buffers have left the meta device.

        `load_state_dict(assign=True)`, Transformers and accelerate put buffers in place one by one.
        """
        device = self.last_step.device
        if self.running.is_meta and device.type != "meta":
            self.remake(partial(torch.zeros_like, device=device))
            self.loss_scale.fill_(1)
            self._template = self._first_state()
            # Transformers marks what it has read; the rest is memory that nobody wrote to.
            read = (getattr(x, "_is_hf_initialized", False) for x in self._buffers.values())
            if getattr(self, "_is_hf_initialized", False) and not all(read):
                self.begin_anew()

    def remake(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor that is no buffer by what `change` makes of it."""
        for name in ("running", "loss_scale", "replayed", "tickets"):
            setattr(self, name, change(getattr(self, name)))

    def reset_parameters(self) -> None:
        """Make the first state, as FSDP1 asks of a module that was made on the meta device."""
        self._write(self.method.init(self.num_experts))
        self.last_step.zero_()
        self.discard()

    def begin_anew(self) -> None:
        """Go back to the first state, for a checkpoint that has none, and say so."""
        self._write(self.method.init(self.num_experts))
        self.last_step.zero_()
        logger.info("moebalance: the checkpoint has no state of %s: it starts anew.", self.name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load a model's checkpoint, but no balancing state that cannot be trained with.

        From a whole checkpoint that was made without this module, start anew and say so. What is
        loaded with `strict=False` may be a part, and leaves the state as it is.
        """
        saved = {name: state_dict.get(prefix + name) for name in self._buffers}
        if all(readable(saved[name], own) for name, own in self._buffers.items()):
            found = self.problem(saved)
            if found:
                args[-1].append(f"The balancing state of {prefix or self.name} is refused: {found}")
                return
        there = [name for name, value in saved.items() if value is not None]
        if there:
            super()._load_from_state_dict(state_dict, prefix, *args)
            for name in there:  # assign=True also takes over what was rounded
                self._buffers[name] = at_least_float32(self.get_buffer(name))
        elif loads_strictly() and not self.last_step.is_meta:
            self.begin_anew()
        self.settle()

    def pass_for(self, logits: Float[Tensor, "T E"], top_k: int, **more: Any) -> Pass:
        """What a batch of this layer is counted and charged with, and `more` fields of a `Pass`."""
        if self.last_step.dtype in (torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"{self.name}: the balancing state was turned to {self.last_step.dtype}, in which "
                "prices stop to move. Keep buffers in float32: with FSDP1 give "
                "MixedPrecision(buffer_dtype=torch.float32), or use FSDP2."
            )
        tally = Tally(self.running, self.last_step, self.loss_scale, self.replayed, self.tickets)
        fused = self.fused and trusted(logits, self.gate, top_k)
        about = (self.method, self.traits, self.gate, self.state, tally, fused)
        return Pass(*about, top_k=top_k, **more)

    def _write(self, state: State) -> None:
        for name, (_, tensor) in zip(self._state_names, leaves(state), strict=True):
            # In place: compiled graphs and CUDA graphs hold on to these very tensors.
            self.get_buffer(name).copy_(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerBalance:
        """Follow the model to another device, but never to another dtype."""
        self.settle()
        device = fn(torch.empty(0, device=self.running.device)).device
        if self.running.is_meta and device.type != "meta":
            # Deferred initialisation: there are no values to move, so make the first ones.
            with torch.device(device):
                self._reset()
            return self
        for name, tensor in self._buffers.items():
            assert tensor is not None
            self._buffers[name] = tensor.to(device)
        self.remake(lambda tensor: tensor.to(device))
        if self.watched is not None:
            scores, counts, tokens, _ = self.watched
            self.watched = Sums(scores.to(device), counts.to(device), tokens.to(device))
        return self


def loads_strictly() -> bool:
    """Whether the `load_state_dict` in progress expects a whole checkpoint.

    Torch tells modules that it does, whatever it was asked for.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
        frame = frame.f_back
    return True
