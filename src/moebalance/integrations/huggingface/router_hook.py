"""What happens after each call of one router."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moebalance.core.layer import LayerBalance
from moebalance.gates import top_experts
from moebalance.integrations.huggingface.forward import Forward
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.tokens import Layout, pack


class RouterHook:
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

    def after_router(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Choose again if the method says so, and inject in training."""
        logits, carrier, experts = self.site.read(output)
        if logits.is_meta:  # shapes alone are asked for
            return output
        if not torch.compiler.is_compiling():
            self.calls += 1
            if self.layer.running.device != logits.device:
                self.place({self.layer.name: logits.device})
        training = router.training and torch.is_grad_enabled()
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

    def _inject(self, carrier: Tensor, logits: Tensor, experts: Tensor, layout: Layout) -> Tensor:
        mask, rows = layout.mask, layout.rows
        if self.by_sequence and layout.starts is not None:
            index, mask, rows = pack(layout)
            index, mask = index.to(logits.device), mask.to(logits.device)
            logits, experts = logits[index], experts[index]
        weight = self.forward.context.weight
        return self.layer.tie(
            carrier,
            logits,
            experts,
            mask=mask,
            sequences=rows,
            weight=None if weight is None else weight.to(logits.device),
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
