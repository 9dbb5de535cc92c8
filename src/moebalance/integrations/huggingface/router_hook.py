"""What happens after each call of one router."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebalance.core.autograd import choose
from moebalance.core.layer import LayerBalance
from moebalance.gates import top_experts
from moebalance.integrations.copies import Hook, Origin
from moebalance.integrations.huggingface.forward import Forward
from moebalance.integrations.huggingface.instead import form_of
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.tokens import Layout, pack


class RouterHook(Hook):
    """Choose again under the price where the model does not, and count and charge in training.

    Args:
        layer: the layer's state.
        site: the router.
        forward: masks, layouts and weight of the forward in progress.
        stack: which of the model's stacks the router belongs to.
        reselect: whether to choose the experts again under the price.
        by_sequence: whether the method looks at single sequences.
        place: what moves layers to devices, by name.
    """

    def __init__(
        self,
        layer: LayerBalance,
        site: Site,
        forward: Forward,
        *,
        stack: int,
        reselect: bool,
        by_sequence: bool,
        place: Callable[[dict[str, torch.device]], None],
    ) -> None:
        self.place = place
        self.layer, self.site, self.forward = layer, site, forward
        self.stack, self.reselect, self.by_sequence = stack, reselect, by_sequence
        self.calls = 0
        traits = layer.traits
        charges_alone = traits.charges and traits.from_sums and not traits.selects
        form = form_of(site) if reselect or charges_alone else None
        self.form = form if form is not None and (reselect or form.exact) else None
        self.answered = False
        self.origin: Origin | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterHook":
        """Come to rest, and remember where from."""
        twin = super().__deepcopy__(memo)
        twin.layer.watched = twin.layer.weighing = None
        twin.origin = self.origin or Origin(self.layer, self.site.router.parameters())
        return twin

    def after_router(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Choose again if the method says so, and inject in training."""
        if self.answered:  # by `route`
            self.answered = False
            self._called()
            return output
        logits, carrier, experts = self.site.read(output)
        if logits.is_meta:  # shapes alone are asked for
            return output
        self._called()
        self._follow(logits)
        training = self._trains(router)
        layout = self._layout(logits, strict=training)
        if self.reselect and not self.forward.reference:
            preference = self.layer.preference(logits, layout.mask, training=router.training)
            if preference is not None:
                experts = top_experts(preference, logits.detach(), experts.shape[-1])
                carrier = self.site.weigh(logits, experts).to(carrier.dtype)
        if training:
            carrier = self._inject(carrier, logits, experts, layout)
        elif not router.training:
            self.layer.watch(logits, experts, mask=layout.mask)
        return self.site.convention.write(output, carrier, experts)

    def stand_in(self) -> Callable[[], None]:
        """Route in the router's place from now on, if it can be done; returns how to stop."""
        if self.form is None:
            return _nothing
        # A bound method, so that a copy of the model routes by the copied weights.
        vars(self.site.router)["forward"] = self.route
        return self._stand_down

    def _stand_down(self) -> None:
        self.form = None  # where another wrapper holds `route`, it calls the router from now on
        state = vars(self.site.router)
        if state.get("forward") == self.route:
            del state["forward"]

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What stands in for the router's `forward`."""
        router, found = self.site.router, None
        plain = not (args or kwargs or hidden_states.is_meta or self.forward.reference)
        if plain and self.form is not None:
            found = self._instead(router, hidden_states)
        # Set at every call: who calls `forward` itself runs no hook that would take it back.
        self.answered = found is not None
        if found is None:
            return type(router).forward(router, hidden_states, *args, **kwargs)
        return found

    def _instead(self, router: nn.Module, hidden: Tensor) -> Any:
        """Logits, weights and experts as the router would give them under the price."""
        layer, rule, form = self.layer, self.site.rule, self.form
        assert rule is not None
        assert form is not None
        training = self._trains(router)
        # Choosing, counting and charging can be one node of the graph.
        at_once = training and layer.traits.from_sums and not self.by_sequence
        at_once = at_once and layer.weighing is None
        if not (self.reselect or at_once):
            return None
        logits = form.logits(router, hidden)
        self._follow(logits)
        layout = self._layout(logits, strict=training)
        at_once = at_once and logits.requires_grad
        if not (self.reselect or at_once):
            return None
        preference = None  # a price is subtracted by that node
        if self.reselect and not (at_once and layer.has_price):
            preference = layer.preference(logits, layout.mask, training=router.training)
            if preference is None:  # as Sinkhorn in evaluation
                return None
        if at_once:
            how = layer.pass_for(
                logits,
                self.site.top_k,
                normalize=rule.normalized,
                ordered=not self.reselect,
                dtype=form.dtype,
                weight=self._weight(logits),
            )
            weights, experts = choose(logits, how, preference=preference, mask=layout.mask)
            weights = weights * rule.scaling if rule.scaling != 1 else weights
        else:
            assert preference is not None
            experts = top_experts(preference, logits.detach(), self.site.top_k)
            weights = rule.weigh(logits, experts)
        weights = weights.to(form.dtype or logits.dtype)
        if not router.training:
            layer.watch(logits, experts, mask=layout.mask)
        elif training and not at_once:
            weights = self._inject(weights, logits, experts, layout)
        return logits, weights, experts

    def _called(self) -> None:
        if not torch.compiler.is_compiling():
            self.calls += 1

    def _trains(self, router: nn.Module) -> bool:
        """Whether this call is counted and charged."""
        return router.training and torch.is_grad_enabled() and not self.at_rest

    def _follow(self, logits: Tensor) -> None:
        """Move the state to the logits. In an averaged copy, take the original's state."""
        if torch.compiler.is_compiling():
            return
        if self.layer.running.device != logits.device:
            self.place({self.layer.name: logits.device})
        if self.origin is not None and self.reselect:
            self.origin.follow(self.layer, self.site.router.parameters())

    def _weight(self, logits: Tensor) -> Tensor | None:
        weight = self.forward.context.weight
        return None if weight is None else weight.to(logits.device)

    def _inject(self, carrier: Tensor, logits: Tensor, experts: Tensor, layout: Layout) -> Tensor:
        mask, rows = layout.mask, layout.rows
        if self.by_sequence and layout.starts is not None:
            index, mask, rows = pack(layout)
            index, mask = index.to(logits.device), mask.to(logits.device)
            logits, experts = logits[index], experts[index]
        return self.layer.tie(
            carrier,
            logits,
            experts,
            mask=mask,
            sequences=rows,
            weight=self._weight(logits),
        )

    def _layout(self, logits: Tensor, *, strict: bool) -> Layout:
        layout = self.forward.context.layouts[self.stack]
        if layout.images is not None and len(logits) != len(layout.images):
            layout = layout.part(images="vision" in self.layer.name)
        mask = layout.mask
        if mask is None:
            return layout
        if len(mask) != len(logits):
            if not strict:  # generation between training steps: nothing is counted there
                return Layout()
            raise ValueError(
                f"{self.layer.name} saw {len(logits)} tokens under an attention mask for "
                f"{len(mask)}: moebalance needs a mask (batch, sequence) of the very tokens that "
                "are routed, to leave padding out of the statistics."
            )
        return layout._replace(mask=mask.to(logits.device))


def _nothing() -> None:
    pass
