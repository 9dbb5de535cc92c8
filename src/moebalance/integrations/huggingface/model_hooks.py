"""What happens as a model is entered and left: tokens, prices, the batch's weight, its loss."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moebalance.core.handle import Balancing
from moebalance.integrations.compiled import compiled_part
from moebalance.integrations.copies import CopyReminder, Hook
from moebalance.integrations.huggingface.forward import Context, Entrance, Forward
from moebalance.integrations.huggingface.native_loss import adds_native_loss
from moebalance.integrations.huggingface.price import Policy, Prices
from moebalance.integrations.huggingface.router_hook import RouterHook
from moebalance.integrations.huggingface.storage import home
from moebalance.integrations.huggingface.tokens import layout
from moebalance.integrations.outputs import tensors
from moebalance.integrations.reminders import CallReminder, StepReminder

logger = logging.getLogger("moebalance")

_UNDIVIDED = (
    "moebalance: the trainer adds up the mean losses of %d micro-batches, so that a step's loss is "
    "%d times a mean. Its compute_loss ignores num_items_in_batch, and nobody divides. The "
    "balancing term stays a mean over the step, and is weaker next to this loss. Give "
    "num_items_in_batch to the model, or set loss_is_scaled_for_ga = False in the trainer."
)


class ModelHooks(Hook):
    """Hooks on the entrances of a model, and what they share with those on its routers.

    Args:
        balancing: the handle.
        forward: the forward in progress.
        entrances: the modules through which it may begin.
        routers: hooks of the routers.
        prices: selection prices that the model's own biases carry.
        policy: tells the trained adapters from a reference.
        packed: whether the method looks at single sequences.
        keep_native_loss: whether to leave the model's own balancing loss on.
    """

    def __init__(
        self,
        balancing: Balancing,
        forward: Forward,
        entrances: Sequence[Entrance],
        routers: Sequence[RouterHook],
        *,
        prices: Prices,
        policy: Policy,
        packed: bool,
        keep_native_loss: bool,
    ) -> None:
        self.balancing, self.forward, self.routers = balancing, forward, list(routers)
        self.prices, self.policy, self.packed = prices, policy, packed
        self.keep_native_loss = keep_native_loss
        self.entrances = list(entrances)
        self._shifts = {e.number: _shifts_labels(e.module) for e in entrances}
        self.micro_batches = 1
        """In this step, as its trainer says."""
        self.scaler = 1.0
        """What a gradient scaler multiplies the loss by, as its trainer says."""
        self.undivided: bool | None = None
        """Whether the trainer adds up means of micro-batches; None before the first backward."""
        self.divided_again = False
        """Whether the trainer divides by them a loss that knows the labels of its step already."""
        weights = [p for r in self.routers for p in r.site.router.parameters() if p.requires_grad]
        self.steps = StepReminder(weights[0] if weights else None)
        self.calls, self.copies = CallReminder(), CopyReminder()
        self._blank = forward.context
        self._kept: Context | None = None
        self._called = 0

    def before(
        self, entrance: Entrance, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A module is entered."""
        given = entrance.named(args, kwargs)
        trains = self._trains(module)
        if self.forward.enter(entrance, given):
            self._begin(module, trains=trains)
        if trains:
            self._weigh(given, shifted=self._shifts[entrance.number])
        if entrance.stack is not None:
            self._lay_out(entrance, entrance.stack, trains=trains)
        asked = trains and kwargs.get("output_router_logits") and not self.keep_native_loss
        if asked and given.get("labels") is not None and adds_native_loss(module):
            if not torch.compiler.is_compiling():
                self.calls.saw_router_logits(type(module).__name__)
            return args, {**kwargs, "output_router_logits": False}
        return None

    def after(
        self, entrance: Entrance, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        """A module is left."""
        calls = self.forward.calls
        asked = len(calls) > 0 and calls[-1].given.get("output_router_logits")
        ends = self.forward.leave(entrance)
        trains = self._trains(module)
        silent = trains and asked and not self.keep_native_loss
        if silent and isinstance(output, ModelOutput) and output.get("aux_loss") is not None:
            output["aux_loss"] = None  # for nobody to add to a loss
        found = self._hand_out(output) if trains and (entrance.outermost or ends) else None
        if ends:
            self._end(module, trains=trains)
        return found

    def _trains(self, module: nn.Module) -> bool:
        trains = module.training and torch.is_grad_enabled()
        if trains and self.at_rest:
            self.copies.saw_training()
        return trains and not self.at_rest

    def _weigh(self, given: Mapping[str, Any], *, shifted: bool) -> None:
        """Note this batch's share of its step's labels, if the trainer says how many there are."""
        total, labels = given.get("num_items_in_batch"), given.get("labels")
        if total is None or labels is None:
            return
        targets = given.get("shift_labels")
        if targets is None:
            targets = labels[..., 1:] if shifted else labels
        count = (targets != -100).sum()
        share = count / (total.to(count.device) if isinstance(total, Tensor) else total)
        # A loss of the trainer's own is charged at 1 / micro_batches: what is left is the share.
        weight = share if self.micro_batches == 1 else share * self.micro_batches
        self.forward.context = self.forward.context._replace(weight=weight)

    def _begin(self, module: nn.Module, *, trains: bool) -> None:
        self._kept = None
        if trains or not module.training:
            self.forward.context = self._blank
        else:  # a forward on the side, between training forwards: they go on where they were
            self._kept, self.forward.context = self.forward.context, self._blank
        if torch.compiler.is_compiling():
            return  # once compiled, a model has found its place
        self._called = sum(router.calls for router in self.routers)
        self.balancing.place(
            {r.layer.name: to for r in self.routers if (to := home(r.site.router)) is not None}
        )
        self._forget_reference()  # of a forward that an exception ended
        if trains:
            self.policy.trains()
            self.prices.follow()
            self.steps.saw_forward()
        elif self.policy.is_another:
            self.forward.reference = True
            self.prices.set_aside()

    def _end(self, module: nn.Module, *, trains: bool) -> None:
        if self._kept is not None:
            self.forward.context, self._kept = self._kept, None
        if torch.compiler.is_compiling():
            return
        reference = self.forward.reference  # it may call PEFT's originals of the routers
        self._forget_reference()
        none = self._called == sum(router.calls for router in self.routers)
        if none and not reference and self._is_eager():
            names = [router.layer.name for router in self.routers]
            self.calls.saw_forward(names, training=module.training)

    def _forget_reference(self) -> None:
        if self.forward.reference:
            self.forward.reference = False
            self.prices.resume()

    def _is_eager(self) -> bool:
        """Whether no part is compiled: there, calls are not counted. Nor do shapes count."""
        if any(compiled_part(entrance.module) is not None for entrance in self.entrances):
            return False
        return not any(next(r.site.router.parameters()).is_meta for r in self.routers)

    def _lay_out(self, entrance: Entrance, number: int, *, trains: bool) -> None:
        config = getattr(entrance.module, "config", None)
        pad = getattr(config, "pad_token_id", None)
        found = layout(
            self.forward.sources(decodes=entrance.decodes),
            pad=pad,
            decodes=entrance.decodes,
            packed=self.packed,
        )
        layouts = list(self.forward.context.layouts)
        layouts[number] = found
        self.forward.context = self.forward.context._replace(layouts=tuple(layouts))
        if trains and not found.known and not torch.compiler.is_compiling():
            self.calls.saw_unknown_padding(type(entrance.module).__name__)

    def _hand_out(self, output: Any) -> Any:
        """Follow the loss, and tell the backward of this output which forward it belongs to."""
        if not torch.compiler.is_compiling():
            # A trainer may make the loss from any of the outputs.
            resume = partial(self.forward.resume, self.forward.context)
            for value in tensors(output):
                if value.requires_grad:
                    value.register_hook(resume)  # type: ignore[no-untyped-call]
        weighed = self.forward.context.weight is not None and not self.divided_again
        factor = 1 / self.micro_batches if weighed else 1.0
        if isinstance(output, ModelOutput) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self._follow(output["loss"], factor)
            return output
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (self._follow(output[0], factor), *output[1:])
        return None

    def _follow(self, loss: Tensor, factor: float) -> Tensor:
        a_mean = self.forward.context.weight is None and self.micro_batches > 1
        doubtful = a_mean and self.undivided is not False and not torch.compiler.is_compiling()
        if doubtful and loss.requires_grad:
            # Called after the line below has noted the gradient, before any router's backward.
            loss.register_hook(partial(self._divide, self.micro_batches))  # type: ignore[no-untyped-call]
        return self.balancing.follow(loss, factor=factor, optional=True)

    def _divide(self, micro_batches: int, gradient: Tensor) -> None:
        """Charge the mean over a step, where its trainer forgot to divide the loss."""
        if self.undivided is None:
            self.undivided = math.isclose(gradient.item(), self.scaler, rel_tol=1e-3)
            if self.undivided:
                logger.warning(_UNDIVIDED, micro_batches, micro_batches)
        if self.undivided:
            for cell in self.balancing.loss_scales():
                cell.div_(micro_batches)


def _shifts_labels(module: nn.Module) -> bool:
    """Whether a Trainer counts this model's labels from the second on, as for causal models."""
    models = (m for m in module.modules() if isinstance(m, PreTrainedModel))
    model = next(models, None)
    if model is None:
        return False
    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(model.config, "is_encoder_decoder", False)
