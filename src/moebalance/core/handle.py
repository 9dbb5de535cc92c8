"""The handle on a model's balanced layers: step it, read it, save it, detach it.

It knows layers by name, and no framework.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance import metrics
from moebalance.core.distributed import Group, check_group
from moebalance.core.layer import LayerBalance
from moebalance.core.loss_scale import follow
from moebalance.core.state import FORMAT, check_fit, check_values, method_name, under_names_of
from moebalance.core.step import Ledger
from moebalance.core.weighing import Weighing, gradient_ratio
from moebalance.methods.base import Method
from moebalance.metrics.expert_parallel import contiguous, rank_violation
from moebalance.metrics.summary import summary
from moebalance.routing import Sums

logger = logging.getLogger("moebalance")

Loads = tuple[Float[Tensor, "E"], Float[Tensor, "E"]]
"""Hard and soft load of one layer."""


class Balancing:
    """All balanced layers of one model under one method.

    `attach` makes it. Call `step()` once after each optimizer step, or let a trainer's callback do
    so. Used as a context manager, it detaches at the end.

    Args:
        method: the method.
        layers: the layers by name.
        group: ranks that hold the same layers and disjoint tokens; None for the default process
            group, if there is one.
        global_metrics: whether metrics and loads cover all ranks. The message of a step then has
            2E + 1 numbers per layer, instead of the E + 1 that most methods need.
        plain: what of a layer's name counts when a state is loaded; all, unless told otherwise.
    """

    at_rest = False
    """Whether it came into being with a copy of a model, and nobody steps it."""

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, LayerBalance],
        *,
        group: Group | None = None,
        global_metrics: bool = True,
        plain: Callable[[str], str] = str,
    ) -> None:
        self.method = method
        self.layers = dict(layers)
        self.plain = plain
        self.steps = 0
        self._ledger = Ledger(method, self.layers, group, everything=global_metrics)
        self._loss_scale = 1.0
        self._on_step: list[Callable[[], None]] = []
        self._on_detach: list[tuple[Callable[[], None], bool]] = []
        self.price_outside: set[str] = set()
        """Names of layers whose selection price is in no weight of the model."""
        check_group(group)
        for layer in self.layers.values():
            layer.settle()
        self.share_cells()

    def place(self, devices: Mapping[str, torch.device]) -> None:
        """Move each named layer to the device of its router."""
        strays = [name for name, to in devices.items() if self.layers[name].running.device != to]
        for name in strays:
            layer = self.layers[name]
            move = layer.to_empty if layer.running.is_meta else layer.to  # meta: makes first values
            move(device=devices[name])
        if strays:
            self.share_cells()

    def on_step(self, call: Callable[[], None]) -> None:
        """Call `call` after each step and each load, for example to write prices into a model."""
        self._on_step.append(call)

    def on_detach(self, call: Callable[[], None], *, restores_price: bool = False) -> None:
        """Call `call` once in `detach`, the last registered first.

        Args:
            call: undoes one change.
            restores_price: whether it undoes a price written into the model; a user may keep that.
        """
        self._on_detach.append((call, restores_price))

    @torch.no_grad()
    def reduce(self) -> None:
        """Start to add up the sums of all ranks; `step` waits for the result.

        Call it after the last backward and before `optimizer.step()`: the one message of a step
        then travels while the optimizer works. Without this call `step` does it. One process has
        nothing to add up.

        Raises:
            RuntimeError: at the first step, if the ranks balance different layers or methods; or
                batches were counted since the last call, and `step` was not called.
        """
        self._ledger.reduce(self.steps + 1)

    def step(self) -> None:
        """End an optimizer step: advance the state of every layer by its sums.

        A layer that counted no token keeps its state and is named once in a warning. For example,
        experts for images see no token in a step of text.

        Raises:
            RuntimeError: no layer counted a token since the last step, on any rank; a layer did
                between `reduce` and this call; ranks are in different steps; or one never came.
            FloatingPointError: a layer saw NaN or infinite logits, on any rank; nothing is changed.
                On a CUDA device both errors come at the end of the next step, so that no step waits
                for the device.
        """
        self._ledger.close(self.steps + 1)
        self.steps += 1
        for layer in self.layers.values():
            if layer.weighing is not None:
                layer.weighing.close()
        self._reset_loss_scale()
        self._publish()
        if self.steps == 1 and self.layers:
            self._announce()

    def discard(self) -> None:
        """Forget the sums since the last step, for example of a step that you gave up.

        Several ranks must all do so, or none. Call it after the warm-up passes before a
        CUDA graph is captured: they are real forward and backward passes, and are counted.
        """
        self._ledger.discard()

    def follow(
        self, loss: Float[Tensor, ""], *, factor: float = 1.0, optional: bool = False
    ) -> Float[Tensor, ""]:
        """Return `loss`; the balancing term is from now on scaled as this loss is, times `factor`.

        Wrap the mean loss of a batch before you divide it by accumulation steps or give it to a
        gradient scaler. You do not need it for the loss that a Transformers model computes, nor
        under a trainer with a callback of ours. A model behind `routers=` needs it in a loop of
        your own, also where it computes its loss.

        Args:
            loss: ().
            factor: how much stronger the term is.
            optional: whether the loss may go unused, as one that a model returns. A gradient of
                exactly 0 then says nothing; otherwise it switches the term off for this batch.
        """
        for scale in self.loss_scales():
            loss = follow(loss, scale, factor, optional=optional)
        return loss

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor of the balancing term for losses that are not followed; 1 at first."""
        self._loss_scale = scale
        self._reset_loss_scale()

    @torch.no_grad()
    def loads(self) -> dict[str, Loads]:
        """Hard and soft load (E,) of each layer in the last step, fractions that sum to 1."""
        return _loads({name: layer.last_sums for name, layer in self.layers.items()})

    @torch.no_grad()
    def metrics(self, *, ep_size: int | None = None) -> dict[str, float]:
        """About ten numbers on the last finished step: means over layers, unless named otherwise.

        Args:
            ep_size: number of expert-parallel ranks, for `rankvio`: how far the busiest rank is
                above its part, with experts on ranks in order (`metrics.expert_parallel`).

        Returns:
            `maxvio`, `maxvio_worst` (largest over layers), `minvio`, `cv`, `gini`, `entropy`
            (1 is uniform), `dead` (share of experts) on the hard load; `soft_maxvio` and
            `soft_hard_gap`; `aim_maxvio` and `aim_gap`, relative to a method's proportions if it
            has some; `price_spread` of a selection price; `tokens` per layer; the method's own
            readings, for example `multiplier`, with `_least` and `_most` over layers;
            `gradient_ratio` and `gradient_ratio_worst`, if `weigh_gradient` is on. Empty before the
            first step.
        """
        sums = [layer.last_sums for layer in self.layers.values()]
        found = summary(sums, self.method.traits.aim)
        if not found:
            return {}
        # Not `layer.price`: who reads that chooses under it.
        states = [layer.state for layer in self.layers.values()]
        prices = [p for state in states if (p := self.method.selection_price(state)) is not None]
        if prices:
            spreads = torch.stack([metrics.price_spread(p).to(prices[0].device) for p in prices])
            found["price_spread"] = spreads.mean().item()
        found |= self._readings()
        weighed = ((n, w) for n, layer in self.layers.items() if (w := layer.weighing) is not None)
        found |= gradient_ratio(weighed)
        if ep_size is not None:
            loads = [hard.tolist() for hard, _ in self.loads().values() if hard.sum() > 0]
            violations = [rank_violation(load, contiguous(load, ep_size)) for load in loads]
            found["rankvio"] = sum(violations) / len(violations)
        return found

    def _readings(self) -> dict[str, float]:
        """What the method reads of itself: the mean, least and most over layers."""
        layers = [self.method.readings(layer.state) for layer in self.layers.values()]
        found = {}
        for name in layers[0] if layers else ():
            first = layers[0][name].device
            values = torch.stack([reading[name].to(first) for reading in layers]).tolist()
            found[name] = sum(values) / len(values)
            found |= {f"{name}_least": min(values), f"{name}_most": max(values)}
        return found

    def watch(self) -> None:
        """From now on also count in evaluation mode; see `evaluation`."""
        for layer in self.layers.values():
            layer.start_watching()

    def weigh_gradient(self, on: bool = True) -> None:
        """From now on measure how much of the router's gradient is balancing; off at first.

        `metrics()` then has `gradient_ratio`: ‖balance‖ / ‖task‖ of the gradients at the logits,
        over all tokens of this process in the step, and `gradient_ratio_worst`, the largest of one
        layer. The pressure that a method puts on the choice has no gradient and counts as 0.
        It costs a few passes over the logits of each layer, and a router of ours takes its path
        without fused kernels. Not under torch.compile.
        """
        for layer in self.layers.values():
            layer.weighing = Weighing() if on else None

    @torch.no_grad()
    def evaluation(self) -> tuple[dict[str, float], dict[str, Loads]]:
        """Metrics and loads of all evaluation forwards since the last call.

        They never enter the balancing. They are of this process alone: ranks may evaluate different
        numbers of batches, or only one of them may.

        Raises:
            RuntimeError: `watch` was not called before.
        """
        seen = {name: layer.watched for name, layer in self.layers.items()}
        if None in seen.values():
            raise RuntimeError("Nothing was counted in evaluation: call watch() before it.")
        self.watch()
        return summary(list(seen.values()), self.method.traits.aim), _loads(seen)

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs: format, method, steps and each layer's tensors."""
        return {
            "format": FORMAT,
            "method": method_name(self.method),
            "method_repr": repr(self.method),
            "steps": self.steps,
            "layers": {
                name: {key: tensor.clone() for key, tensor in layer.state_dict().items()}
                for name, layer in self.layers.items()
            },
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        *,
        parents: Sequence[int | Sequence[int]] | None = None,
    ) -> None:
        """Go on from a saved state. A state that does not fit is refused whole, with the reason.

        Args:
            state: from `state_dict`.
            parents: if experts were copied, merged, added or removed since: for each expert of this
                model its parents among the saved experts (`Lineage`). Give one number, several in
                brackets, or `()` for a new expert. Means split and add up; prices are passed on.

        Raises:
            ValueError: another format, method, set of layers or number of experts.
        """
        check_values(state)
        state = under_names_of(self.layers, state, self.plain)
        lineages = check_fit(state, self.method, self.layers, parents=parents)
        for name, layer in self.layers.items():
            saved = state["layers"][name]
            if name in lineages:
                layer.inherit(saved, lineages[name])
            else:
                layer.load_state_dict(saved)
            layer.last_total = None
        self._ledger.load()
        self.steps = state["steps"]
        self._publish()

    def detach(self, *, keep_price: bool = False) -> None:
        """Undo `attach`: the model's outputs are again as they were before it.

        Args:
            keep_price: leave the trained price in the model's own selection bias, so that the model
                routes as it was trained, and is saved so.

        Raises:
            ValueError: `keep_price`, and no bias of the model holds the price; nothing is undone.
        """
        if keep_price and self.price_outside:
            raise ValueError(
                f"{self.method!r} trained a selection price, and the weights of "
                f"{min(self.price_outside)} (of {len(self.price_outside)} such routers) do not "
                "hold it: without this handle the model sends tokens to other experts than in "
                "training. Keep the handle's state and attach again, or train with a method that "
                "charges in the loss, such as PhiBalancing."
            )
        while self._on_detach:
            call, restores_price = self._on_detach.pop()
            if not (keep_price and restores_price):
                call()
        self._on_step.clear()

    def __enter__(self) -> Balancing:
        """Stay attached for a block of code."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Balancing:
        """Copy the layers. What detaches the model, and the ranks, are the original's alone."""
        twin = Balancing(self.method, copy.deepcopy(self.layers, memo), plain=self.plain)
        memo[id(self)] = twin
        twin.steps, twin.price_outside, twin.at_rest = self.steps, set(self.price_outside), True
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a handle that was pickled, with its model or alone."""
        vars(self).update(state)
        self.at_rest = True

    def __repr__(self) -> str:
        """Show the method and the number of layers."""
        return f"Balancing({self.method!r}, layers={len(self.layers)}, steps={self.steps})"

    def _publish(self) -> None:
        for call in self._on_step:
            call()

    def _announce(self) -> None:
        first = next(iter(self.layers.values()))
        found = self.metrics()
        logger.info(
            "moebalance: %r on %d routers (first: %d experts, %s); step 1 counted %d tokens a "
            "router, MaxVio %.2f.",
            self.method,
            len(self.layers),
            first.num_experts,
            first.gate,
            int(found["tokens"]),
            found["maxvio"],
        )

    def share_cells(self) -> None:
        """Let layers on one device share the cells of the loss scale and of replays.

        Following a loss then costs one copy.
        """
        cells: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for layer in self.layers.values():
            own = layer.loss_scale, layer.replayed
            layer.loss_scale, layer.replayed = cells.setdefault(own[0].device, own)

    def _reset_loss_scale(self) -> None:
        for cell in self.loss_scales():
            cell.fill_(self._loss_scale)

    def loss_scales(self) -> list[Tensor]:
        """The factor () of the balancing term on each device."""
        return list(
            {id(layer.loss_scale): layer.loss_scale for layer in self.layers.values()}.values()
        )


def _loads(sums: Mapping[str, Sums | None]) -> dict[str, Loads]:
    return {name: (s.hard_load, s.soft_load) for name, s in sums.items() if s is not None}
