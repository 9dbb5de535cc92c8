"""The handle on a model's balanced layers: one object to step, read, save and take away.

It knows layers by name and nothing of the framework that they came from.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance import metrics
from moebalance.core.autograd import follow
from moebalance.core.distributed import Group
from moebalance.core.layer import LayerBalance
from moebalance.core.state import FORMAT, check_fit, method_name
from moebalance.core.step import Ledger
from moebalance.methods.base import Method
from moebalance.metrics.expert_parallel import contiguous, rank_violation
from moebalance.metrics.summary import summary
from moebalance.routing import Sums

logger = logging.getLogger("moebalance")

Loads = tuple[Float[Tensor, "E"], Float[Tensor, "E"]]
"""Hard and soft load of one layer."""


class Balancing:
    """All balanced layers of one model under one method.

    Made by `attach`. Call `step()` once after each optimizer step, or let a trainer's callback do
    it. As a context manager it detaches on leaving.

    Args:
        method: the method.
        layers: the layers by name.
        group: ranks that hold these same layers and disjoint tokens; None for the default group
            where there is one.
        global_metrics: whether metrics and loads are those of all ranks, for a message of 2E + 1
            numbers a layer instead of the E + 1 that most methods need.
    """

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, LayerBalance],
        *,
        group: Group | None = None,
        global_metrics: bool = True,
    ) -> None:
        self.method = method
        self.layers = dict(layers)
        self.steps = 0
        self._ledger = Ledger(method, self.layers, group, everything=global_metrics)
        self._loss_scale = 1.0
        self._on_step: list[Callable[[], None]] = []
        self._on_detach: list[tuple[Callable[[], None], bool]] = []
        self.price_outside: set[str] = set()
        """Layers whose selection price no weight of the model holds."""
        self._share_loss_scale()

    def place(self, devices: Mapping[str, torch.device]) -> None:
        """Move layers to where their routers are, by name."""
        strays = [name for name, to in devices.items() if self.layers[name].running.device != to]
        for name in strays:
            self.layers[name].to(devices[name])
        if strays:
            self._share_loss_scale()

    def on_step(self, call: Callable[[], None]) -> None:
        """Call this after each step and each load, for example to write prices into a model."""
        self._on_step.append(call)

    def on_detach(self, call: Callable[[], None], *, restores_price: bool = False) -> None:
        """Call this once on detaching, last come first.

        Args:
            call: what undoes something.
            restores_price: it undoes a price written into the model, which a user may keep.
        """
        self._on_detach.append((call, restores_price))

    @torch.no_grad()
    def reduce(self) -> None:
        """Begin to add up what all ranks counted; `step` waits for it.

        Called after the last backward and before `optimizer.step()`, it hides the one message of
        a step behind the optimizer. Left out, `step` does it. Nothing to do in one process.

        Raises:
            RuntimeError: at the first step, if the ranks balance different things.
        """
        self._ledger.reduce(self.steps + 1)

    def step(self) -> None:
        """End an optimizer step: advance every layer by what it counted.

        A layer that counted no token, such as that of experts for images in a step of text, keeps
        its state and is named in a warning once.

        Raises:
            RuntimeError: no layer counted a token since the last step, on any rank; or one did
                between `reduce` and this.
            FloatingPointError: a layer saw NaN or infinite logits, on any rank; nothing is changed.
                On a CUDA device each of these is raised when the next step ends, so that no step
                waits for the device.
        """
        self._ledger.close(self.steps + 1)
        self.steps += 1
        self._reset_loss_scale()
        self._publish()
        if self.steps == 1 and self.layers:
            self._announce()

    def discard(self) -> None:
        """Forget what was counted since the last step, for example of a step that was given up."""
        self._ledger.discard()

    def follow(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return `loss`; from now on the balancing term is scaled exactly as this loss is.

        Wrap the mean loss of a batch before dividing it by accumulation steps or handing it to a
        gradient scaler. Not needed where the model computes its own loss.
        """
        for scale in self._loss_scales():
            loss = follow(loss, scale)
        return loss

    def set_loss_scale(self, scale: float) -> None:
        """Fix the factor of the balancing term for losses that are not followed; 1 at first."""
        self._loss_scale = scale
        self._reset_loss_scale()

    @torch.no_grad()
    def loads(self) -> dict[str, Loads]:
        """Hard and soft load of each layer in the last finished step, fractions that sum to 1."""
        return _loads({name: layer.last_sums for name, layer in self.layers.items()})

    @torch.no_grad()
    def metrics(self, *, ep_size: int | None = None) -> dict[str, float]:
        """About ten numbers on the last finished step, means over layers unless named otherwise.

        Args:
            ep_size: ranks that the experts would be laid out on in order, for `rankvio`: by how
                much the busiest rank exceeds its share (`moebalance.metrics.expert_parallel`).

        Returns:
            `maxvio`, `maxvio_worst` (largest over layers), `minvio`, `cv`, `gini`, `entropy`
            (1 is uniform), `dead` (share of experts) on the hard load; `soft_maxvio` and
            `soft_hard_gap`; `aim_maxvio` and `aim_gap`, relative to the shares of a method that has
            some; `price_spread` where it prices selection; `tokens` per layer; what a method says
            of itself, as `multiplier`, with `_least` and `_most` over layers. Empty before the
            first step.
        """
        sums = [layer.last_sums for layer in self.layers.values()]
        found = summary(sums, self.method.traits.aim)
        if not found:
            return {}
        prices = [price for layer in self.layers.values() if (price := layer.price) is not None]
        if prices:
            spreads = [metrics.price_spread(price).item() for price in prices]
            found["price_spread"] = sum(spreads) / len(spreads)
        found |= self._readings()
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
            values = torch.stack([reading[name].cpu() for reading in layers]).tolist()
            found[name] = sum(values) / len(values)
            found |= {f"{name}_least": min(values), f"{name}_most": max(values)}
        return found

    def watch(self) -> None:
        """From now on count what the model does in evaluation mode too; see `evaluation`."""
        for layer in self.layers.values():
            layer.start_watching()

    @torch.no_grad()
    def evaluation(self) -> tuple[dict[str, float], dict[str, Loads]]:
        """Metrics and loads of all forwards in evaluation mode since the last call.

        Nothing of it enters the balancing.

        Raises:
            RuntimeError: `watch` was not called before.
        """
        seen = {name: layer.watched for name, layer in self.layers.items()}
        if None in seen.values():
            raise RuntimeError("Nothing was counted in evaluation: call watch() before it.")
        self.watch()
        return summary(list(seen.values()), self.method.traits.aim), _loads(seen)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: format, method, steps and each layer's tensors."""
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
        """Go on from a saved state. Refused whole, with the reason, if it does not fit.

        Args:
            state: what `state_dict` returned.
            parents: where experts were copied, merged, added or taken out since: for each expert of
                this model those of the saved one that it descends from (`Lineage`); one, several in
                brackets, or none, `()`. Means split and add up, prices are passed on.

        Raises:
            ValueError: another format, method, set of layers or number of experts.
        """
        lineages = check_fit(state, self.method, self.layers, parents=parents)
        for name, layer in self.layers.items():
            saved = state["layers"][name]
            if name in lineages:
                layer.inherit(saved, lineages[name])
            else:
                layer.load_state_dict(saved)
            layer.last_total = None
        self.discard()
        self.steps, self._ledger.loaded = state["steps"], True
        self._publish()

    def detach(self, *, keep_price: bool = False) -> None:
        """Take everything away: the model's outputs are again what they were before `attach`.

        Args:
            keep_price: leave the trained price in the model's own selection bias, so that it routes
                on as it was trained and is saved so.

        Raises:
            ValueError: `keep_price` where no bias of the model holds the price; nothing is undone.
        """
        if keep_price and self.price_outside:
            raise ValueError(
                f"{self.method!r} trained a selection price, and {min(self.price_outside)} "
                f"(of {len(self.price_outside)} such routers) has no selection bias to hold it: "
                "without this handle the model sends tokens to other experts than in training. "
                "Keep the handle's state and attach again, or train with a loss-lever method such "
                "as PhiBalancing."
            )
        while self._on_detach:
            call, restores_price = self._on_detach.pop()
            if not (keep_price and restores_price):
                call()
        self._on_step.clear()

    def __enter__(self) -> "Balancing":
        """Use the attachment for a block of code."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()

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

    def _share_loss_scale(self) -> None:
        """Give layers on one device one cell, so that following a loss costs one copy."""
        cells: dict[torch.device, Tensor] = {}
        for layer in self.layers.values():
            cell = cells.setdefault(layer.loss_scale.device, layer.loss_scale)
            layer.loss_scale = cell

    def _reset_loss_scale(self) -> None:
        for cell in self._loss_scales():
            cell.fill_(self._loss_scale)

    def _loss_scales(self) -> list[Tensor]:
        return list(
            {id(layer.loss_scale): layer.loss_scale for layer in self.layers.values()}.values()
        )


def _loads(sums: Mapping[str, Sums | None]) -> dict[str, Loads]:
    return {name: (s.hard_load, s.soft_load) for name, s in sums.items() if s is not None}
