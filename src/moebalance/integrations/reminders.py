"""Say once what would otherwise go wrong in silence: no step, or no router called."""

import logging
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from moebalance.core.updates import hear

logger = logging.getLogger("moebalance")

FORWARDS = 1000
"""Training forwards without a step after which a user is told; more than anyone accumulates."""
UPDATES = 10
"""The same in updates of a router's weight, or steps of an optimizer, which end a step."""


class StepReminder:
    """Warn once if a model trains and `step()` is never called.

    Args:
        weight: one that the optimizer updates, if any; it tells steps from micro-batches.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self.weight = weight
        self.forwards = self.updates = 0
        self._version, self._stepped = -1, False
        self._told = False
        self._holds: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        hear(self)

    def __getstate__(self) -> dict[str, Any]:
        """For a model that is copied or pickled with its hooks; optimizers stay behind."""
        return {key: value for key, value in vars(self).items() if key != "_holds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._holds = weakref.WeakKeyDictionary()

    def saw_update(self, optimizer: Optimizer) -> None:
        """An optimizer steps: a fused one leaves the version of a weight as it is."""
        if optimizer not in self._holds:
            held = (p for group in optimizer.param_groups for p in group["params"])
            self._holds[optimizer] = self.weight is None or any(p is self.weight for p in held)
        self._stepped |= self._holds[optimizer]

    def saw_forward(self) -> None:
        """Count a training forward."""
        if self._told:
            return
        self.forwards += 1
        version = -1 if self.weight is None else self.weight._version
        self.updates += (self._stepped or version != self._version) and self.forwards > 1
        self._version, self._stepped = version, False
        if self.forwards < FORWARDS and self.updates < UPDATES:
            return
        self._told = True
        logger.warning(
            "moebalance: %d training forwards, with %d updates of the router, and step() was not "
            "called since. Nothing is balanced by a price that never moves: call balancing.step() "
            "after each optimizer.step(), or give a Hugging Face trainer "
            "callbacks=[BalanceCallback(balancing)].",
            self.forwards,
            self.updates,
        )

    def saw_step(self) -> None:
        """Begin to count anew."""
        self.forwards = self.updates = 0


class CallReminder:
    """Warn once about forwards that are not counted, or not as they should be."""

    def __init__(self) -> None:
        self._told: set[bool | str] = set()

    def saw_forward(self, names: Sequence[str], *, training: bool) -> None:
        """A forward ended and called none of these routers."""
        self._tell(
            training,
            "moebalance: a forward in %s mode called none of the %d routers (first: %s), so "
            "nothing of it is counted or balanced. The block around a router may compute by "
            "itself, as MegaBlocks, ScatterMoE and MXFP4 kernels do: load the model without them "
            "(use_kernels=False, or dequantized), or check that this is the model that runs.",
            "training" if training else "evaluation",
            len(names),
            names[0],
        )

    def saw_unknown_padding(self, where: str) -> None:
        """A training forward told nothing of its padding."""
        self._tell(
            "padding",
            "moebalance: nothing says which tokens of %s are padding, so all are counted: no "
            "attention_mask, no labels, no pad_token_id in its configuration. If there is padding, "
            "give the model one of them.",
            where,
        )

    def saw_router_logits(self, where: str) -> None:
        """Router logits were asked for, and left out."""
        self._tell(
            "router logits",
            "moebalance: output_router_logits=True was left out of a training forward: with "
            "labels, %s would add its own balancing loss to its loss. To get the logits, set "
            "model.router_aux_loss_coef and model.config.router_aux_loss_coef to 0, or call the "
            "model without labels; to have both losses, attach(…, keep_native_loss=True).",
            where,
        )

    def _tell(self, what: bool | str, message: str, *words: object) -> None:
        """Warn of this once."""
        if what not in self._told:
            self._told.add(what)
            logger.warning(message, *words)
