"""After each call of a router: take its logits, choose as its layer does, count and charge.

A method that charges leaves the logits as they are. A method that selects acts on the logits: the
experts that it does not choose get −∞, so that the layer's own top-k has no other choice. The K
logits that are left are unchanged, and so are the K weights that follow from them:

    softmax, normalised      a_e / Σ_chosen a       the same, also if softmax comes after top-k
    sigmoid, √softplus       a_e, normalised or not the same
    softmax, not normalised  a_e                    would be a_e / Σ_chosen a: refused
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.core.sequences import Lay, packed
from moebalance.gates import top_experts
from moebalance.integrations.compiled import refuse_compiled
from moebalance.integrations.copies import CopyReminder, Hook, Origin, release
from moebalance.integrations.named.evidence import Witness
from moebalance.integrations.named.finding import Named, Rule
from moebalance.integrations.named.places import listen
from moebalance.integrations.named.surround import Surround
from moebalance.integrations.names import without_adapters
from moebalance.integrations.reminders import StepReminder
from moebalance.methods.base import Method, sees_sequences

_BALANCED: weakref.WeakKeyDictionary[nn.Module, dict[str | None, LayerBalance]] = (
    weakref.WeakKeyDictionary()
)
"""What is balanced of each module, and the state: itself (None), methods, parameters."""

_INSTEAD = (
    "Take BalancedRouter for the layer, which returns weights and experts; or take a method that "
    "charges in the loss, such as PhiBalancing."
)


def attach(
    model: nn.Module,
    method: Method,
    routers: list[Named],
    how: Rule,
    *,
    group: Group | None = None,
    fused: bool = True,
) -> Balancing:
    """Balance modules that return logits; see `moebalance.attach`."""
    check_weights(method, how)
    release(model)
    _refuse_second(routers)
    refuse_compiled(model)
    surround = Surround(model, how.mask, how.cu_seqlens)
    layers = {}
    for one in routers:
        layer = LayerBalance(method, one.num_experts, gate=how.gate, fused=fused, name=one.name)
        device = next((weight.device for weight in one.weights), None)
        layers[one.name] = layer if device is None else layer.to(device)
    balancing = Balancing(method, layers, group=group, plain=without_adapters)
    if how.mask or how.cu_seqlens or sees_sequences(method):
        for remove in surround.hook(model):
            balancing.on_detach(remove)
    trained = [w for one in routers for w in one.weights if w.requires_grad]
    reminder = StepReminder(trained[0] if trained else None)
    balancing.on_step(reminder.saw_step)
    for place, one in enumerate(routers):
        counts = reminder if place == 0 else None
        hook = LogitHook(balancing, layers[one.name], how, surround, counts, one.weights)
        _BALANCED.setdefault(one.module, {})[one.member] = layers[one.name]
        balancing.on_detach(partial(_let_go, one))
        balancing.on_detach(listen(one.module, one.member, one.num_experts, hook.after))
        if layers[one.name].trains_price:
            balancing.price_outside.add(one.name)
    return balancing


def _let_go(one: Named) -> None:
    _BALANCED[one.module].pop(one.member)


def layers_of(module: nn.Module) -> list[LayerBalance]:
    """The states of the routers that `routers=` named in this very module."""
    return list(_BALANCED.get(module, {}).values())


def check_weights(method: Method, how: Rule) -> None:
    """Refuse a method that selects where its choice would change the weights.

    Raises:
        ValueError: softmax weights that are not normalised, or not known to be.
    """
    if not (method.traits.selects and how.gate.sums_to_one) or how.normalize:
        return
    if how.normalize is None:
        raise ValueError(
            f"{method!r} chooses experts. Behind routers= it can do so only where the K weights of "
            "a token are divided by their sum (or softmax comes after top-k). If your layer does "
            f"so, say normalize=True. If not: {_INSTEAD}"
        )
    raise ValueError(
        f"{method!r} chooses experts, and with normalize=False your layer's weights are softmax "
        "over all experts. Without a change to the layer, another choice would change these "
        f"weights too. {_INSTEAD}"
    )


class LogitHook(Hook):
    """What happens after each call of one router.

    Args:
        balancing: the handle.
        layer: the layer's state.
        how: how the layer chooses.
        surround: what the model's call tells of the tokens.
        reminder: told of each training forward; None for none.
        weights: that the logits are made with.
    """

    def __init__(
        self,
        balancing: Balancing,
        layer: LayerBalance,
        how: Rule,
        surround: Surround,
        reminder: StepReminder | None,
        weights: Sequence[Tensor] = (),
    ) -> None:
        self.balancing, self.layer, self.how = balancing, layer, how
        self.surround, self.reminder = surround, reminder
        self.witness = Witness(layer.name, how)
        self.weights, self.copies = list(weights), CopyReminder()
        self.origin: Origin | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LogitHook:
        """Come to rest, and remember where from."""
        twin = super().__deepcopy__(memo)
        twin.layer.watched = twin.layer.weighing = None
        twin.origin = self.origin or Origin(self.layer, self.weights)
        return twin

    def after(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Choose, count and charge; return the output with other logits, or None to keep it."""
        logits = self._logits(output)
        if logits.is_meta:  # shapes alone are asked for
            return None
        self._follow(router, logits)
        flat = logits.reshape(-1, self.layer.num_experts)  # (T,E)
        training = router.training and torch.is_grad_enabled() and not self.at_rest
        lay = self._lay(logits, flat, strict=training)
        mask = lay.mask
        experts = self._choose(flat, mask, training=router.training)
        new = flat
        if self.layer.traits.selects:
            new = flat.masked_fill(_others(flat, experts), float("-inf"))
        if training:
            own, chosen, real = lay.arranged(flat, experts)
            new = self.layer.tie(new, own, chosen, mask=real, sequences=lay.sequences)
            if not self.layer.traits.selects:
                self.witness.listen(new, experts, mask)
        elif not router.training:
            self.layer.watch(flat, experts, mask=mask)
        return None if new is flat else _replaced(output, new.view(logits.shape))

    def _logits(self, output: Any) -> Tensor:
        found = output[0] if isinstance(output, tuple | list) and output else output
        experts = self.layer.num_experts
        if (
            isinstance(found, Tensor)
            and found.is_floating_point()
            and found.dim() >= 2
            and found.shape[-1] == experts
        ):
            return found
        shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{self.layer.name} returned {shown}; routers= needs a module that returns logits (…, "
            f"{experts}), or a tuple whose first tensor is the logits. Name another module, or "
            "give the right num_experts."
        )

    def _follow(self, router: nn.Module, logits: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if self.layer.running.device != logits.device:
            self.balancing.place({self.layer.name: logits.device})
        if self.origin is not None and self.layer.traits.selects:
            self.origin.follow(self.layer, self.weights)
        if self.reminder is not None and router.training and torch.is_grad_enabled():
            told = self.copies.saw_training if self.at_rest else self.reminder.saw_forward
            told()

    @torch.no_grad()
    def _choose(
        self, flat: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None, *, training: bool
    ) -> Int[Tensor, "T K"]:
        """The choice that the layer will make."""
        layer, order = self.layer, None
        if layer.traits.selects:
            order = layer.preference(flat, mask, training=training)
        if order is None and self.how.limit is None:
            order = flat  # every gate keeps the order of the logits
        elif order is None:
            order = layer.gate.affinities(flat)
        return top_experts(order, flat, self.how.top_k, self.how.limit)

    def _lay(self, logits: Tensor, flat: Float[Tensor, "T E"], *, strict: bool) -> Lay:
        """Which tokens are real, and where sequences begin and end."""
        mask, bounds = self._mask(flat, strict=strict), self.surround.now.bounds
        if bounds is not None:
            rows = self.layer.by_sequence and strict
            return packed(bounds, len(flat), mask, rows=rows, name=self.layer.name)
        return Lay(mask, self._rows(logits) if strict else 1)

    def _mask(self, flat: Float[Tensor, "T E"], *, strict: bool) -> Bool[Tensor, "T"] | None:
        mask = self.surround.now.mask
        if mask is None:
            return None
        if mask.numel() != len(flat):
            if not strict:  # generation with a cache: nothing is counted there
                return None
            raise ValueError(
                f"{self.layer.name} saw {len(flat)} tokens under {self.how.mask} of shape "
                f"{tuple(mask.shape)}: the mask must have one entry for each token that is routed, "
                "True for real tokens. Name another argument as mask=…, or mask=None to count all."
            )
        return mask.reshape(-1).to(flat.device)

    def _rows(self, logits: Tensor) -> int:
        """In how many sequences the tokens lie."""
        if not self.layer.by_sequence:
            return 1
        if logits.dim() == 3:
            return logits.shape[0]
        tokens = logits.numel() // logits.shape[-1]
        rows = self.surround.rows(tokens)
        if rows is None:
            raise ValueError(
                f"{self.layer.method!r} needs to know where sequences end, but {self.layer.name} "
                f"returned {tokens} tokens in one row, and the model was not given a tensor (B, S) "
                "of as many. Let the router return (B, S, E), call the model with tokens (B, S), "
                "name the argument with the boundaries of packed text as cu_seqlens=…, or take a "
                "method whose coupling is not 'sequence'."
            )
        return rows


def _others(flat: Float[Tensor, "T E"], experts: Int[Tensor, "T K"]) -> Bool[Tensor, "T E"]:
    """The experts that were not chosen."""
    return torch.ones_like(flat, dtype=torch.bool).scatter_(-1, experts, False)


def _replaced(output: Any, logits: Tensor) -> Any:
    if isinstance(output, Tensor):
        return logits
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: logits})
    return type(output)((logits, *output[1:]))


def _refuse_second(routers: list[Named]) -> None:
    for one in routers:
        if one.member in _BALANCED.get(one.module, {}):
            raise ValueError(
                f"{one.name} is balanced already: detach() the first Balancing before attaching "
                "again, or give it to monitor() to watch it."
            )
