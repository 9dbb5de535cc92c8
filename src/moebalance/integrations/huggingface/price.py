"""The selection price in a model's own bias, and the weights that it belongs to.

A trained bias is part of the weights: whoever loads other weights, averages or shards them after
`attach` means the bias that comes with them. The price therefore starts from the bias as it is at
the first training forward, and follows it whenever someone else has written it since.
"""

import logging
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from moebalance.core.distributed import Group, agree, sharing
from moebalance.core.layer import LayerBalance
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.storage import read, write

logger = logging.getLogger("moebalance")


class BiasPrice:
    """One router's price and the bias that carries it, as −price.

    Args:
        site: a router with a selection bias of its own.
        layer: its state.
    """

    def __init__(self, site: Site, layer: LayerBalance) -> None:
        self.site, self.layer = site, layer
        self.original: Tensor | None = None
        """The bias that came with the weights, (E,); None while it is on meta."""
        self.seen: tuple[Tensor, int] | None = None
        """The bias at the last training forward, and its version."""
        self._known: Tensor | None = None
        if not self.bias.is_meta:
            self._adopt(read(self.bias))

    @property
    def bias(self) -> Tensor:
        """The model's own selection bias."""
        bias = self.site.bias
        assert bias is not None
        return bias

    def follow(self) -> bool:
        """Take up a bias that someone else wrote; True if that was so. Called in each forward."""
        bias = self.bias
        seen = bias, bias._version  # what is written through `.data`, as by `write`, raises none
        same = self.seen is not None and self.seen[0] is bias and self.seen[1] == seen[1]
        if same or bias.is_meta:
            return False
        self.seen = seen
        held = read(bias)
        if self._known is not None and torch.equal(held, self._known.to(held)):
            return False
        self._adopt(held)
        return True

    def publish(self) -> None:
        """Write −price into the model."""
        price = self.layer.price
        if price is not None:
            self._write(-price)

    def restore(self) -> None:
        """Write the bias that came with the weights."""
        if self.original is not None:
            self._write(self.original)

    def _adopt(self, held: Tensor) -> None:
        self.original = self._known = held
        self.layer.adopt(-held.to(self.layer.running.device))

    def _write(self, values: Tensor) -> None:
        self._known = values
        if not self.bias.is_meta:
            write(self.bias, values)


class Prices:
    """All of a model's prices that its own biases carry.

    Args:
        prices: one for each router.
        group: the ranks that must hold the same.
    """

    def __init__(self, prices: Sequence[BiasPrice], group: Group | None) -> None:
        self.prices, self.group = list(prices), group
        self._to_compare = False
        self._set_aside = False

    def __deepcopy__(self, memo: dict[int, object]) -> "Prices":
        """In a copy of the model the biases are its own, and nobody writes them."""
        return Prices([], None)

    def follow(self) -> None:
        """Before a training forward: take up biases that were loaded since, and say so."""
        if self._set_aside:
            self.resume()
        first = any(price.seen is None for price in self.prices)
        loaded = [price.site.name for price in self.prices if price.follow()]
        self._to_compare |= first or bool(loaded)
        if loaded:
            logger.info(
                "moebalance: the selection bias of %d routers (first: %s) was loaded after "
                "attach(); the price goes on from it.",
                len(loaded),
                loaded[0],
            )

    def publish(self) -> None:
        """After a step or a load: write all prices into the model."""
        for price in self.prices:
            price.publish()

    def compare(self) -> None:
        """At the end of the first step after a bias was taken up: refuse ranks that differ.

        Raises:
            RuntimeError: they hold different prices.
        """
        group = sharing(self.group) if self._to_compare else None
        self._to_compare = False
        if group is None:
            return
        held = {f"the selection price of {p.site.name}": _shown(p.layer.price) for p in self.prices}
        agree(held, group)

    def set_aside(self) -> None:
        """Give the model its original biases, for the forward of a reference policy."""
        self._set_aside = True
        for price in self.prices:
            price.restore()

    def resume(self) -> None:
        """Undo `set_aside`."""
        self._set_aside = False
        self.publish()

    def restore(self) -> None:
        """On detaching: give the model its original biases."""
        for price in self.prices:
            price.restore()


class Policy:
    """Which adapters of PEFT are active: with others, the model is another policy.

    DPO, KTO and GRPO make their reference policy of the trained one by switching its adapters off,
    or to others. The price was trained with the adapters, and is no part of the reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._switches = [
            module
            for module in model.modules()
            if isinstance(getattr(type(module), "disable_adapters", None), property)
        ][:1]
        self._trained = self._now()

    def trains(self) -> None:
        """Note the adapters that are trained."""
        self._trained = self._now()

    @property
    def is_another(self) -> bool:
        """Whether the adapters in use now are not the trained ones."""
        return bool(self._switches) and self._now() != self._trained

    def _now(self) -> Hashable:
        return tuple(
            (bool(switch.disable_adapters), tuple(switch.active_adapters))  # type: ignore[arg-type]
            for switch in self._switches
        )


def _shown(price: Tensor | None) -> list[float]:
    return [] if price is None else [float(f"{value:.6g}") for value in price.tolist()]
