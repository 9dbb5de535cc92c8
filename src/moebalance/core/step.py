"""What ends a step: the layers' sums are added up over ranks, judged, and handed to the method.

All layers of one size are rows of one matrix here, so that a step takes a handful of kernels, one
message and at most one wait for the device, whatever the number of layers. On a CUDA device there
is no wait either: the verdict is read when the next step ends, and until then a state that would
advance by NaN is kept back on the device itself.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.core import agreement, distributed
from moebalance.core.agreement import Account, Clock
from moebalance.core.commit import commit_rows
from moebalance.core.distributed import Group, Reduction, group_size, sharing, start_sum
from moebalance.core.layer import LayerBalance
from moebalance.core.packing import shared_part
from moebalance.methods.base import Method

logger = logging.getLogger("moebalance")

_BLIND = (
    "moebalance: %s counted no token in step %d and keeps its state. If it should take part, see "
    "that its layer trains."
)


class Bank(NamedTuple):
    """Layers of one size on one device, and what they hold, a row a layer.

    Attributes:
        names: of the layers.
        layers: themselves.
        sums: (L, N), their packed sums when this was made.
    """

    names: list[str]
    layers: list[LayerBalance]
    sums: Tensor

    @property
    def tokens(self) -> Tensor:
        """Tokens counted, (L,), a view."""
        return self.sums[:, 2 * self.layers[0].num_experts]

    @property
    def batches(self) -> Tensor:
        """Batches counted, (L,), a view."""
        return self.sums[:, 2 * self.layers[0].num_experts + 1]


class Verdict(NamedTuple):
    """What is to be said of a step, on its way from the device.

    Attributes:
        step: which one.
        names: of the layers, in the order of the columns.
        flags: (2, L): the sums are finite, a token was seen. With other ranks (6, L): these of all
            ranks, this rank's sums are finite, nothing was counted late, no rank has loaded a state
            or strayed, all ranks are in the same step.
        account: where this rank is; None if it sent no message.
        arrived: recorded behind the copy; None if the flags are here.
    """

    step: int
    names: list[str]
    flags: Tensor
    account: Account | None
    arrived: Any = None


class Ledger:
    """The sums of a step over all layers and ranks.

    Args:
        method: the method.
        layers: the layers by name.
        group: ranks that hold these same layers and disjoint tokens; None for the default group.
        everything: whether metrics over all ranks are wanted too.
    """

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, LayerBalance],
        group: Group | None,
        *,
        everything: bool,
    ) -> None:
        self.method, self.layers = method, layers
        self.group, self.everything = group, everything
        self._agreed = self._loaded = self._closed = False
        self._clock = Clock(layers)
        self._account: Account | None = None
        self._reduction: Reduction | None = None
        self._sent: list[Bank] = []
        self._verdict: Verdict | None = None
        self._known_blind: set[str] = set()

    @torch.no_grad()
    def reduce(self, step: int) -> None:
        """Begin to add up what all ranks counted in step `step`.

        Raises:
            RuntimeError: batches were counted since the last call, and `close` was not called. The
                other ranks err as they end their step.
        """
        if self._reduction is None:
            self._start(step, early=True)
        elif self._grown():
            # The others have ended the step: meet them in their next one, so that all of them err.
            self._read_verdict()
            self._judge(step, forgive_late=True)
            self._read_verdict()
            self._start(step, stray=True)
            self._judge(step)
            self._read_verdict()

    @torch.no_grad()
    def close(self, step: int) -> None:
        """Advance every layer by the sums of step `step`.

        Raises:
            RuntimeError: no layer counted a token, on any rank; one did after `reduce`; or ranks
                are in different steps.
            FloatingPointError: a layer saw NaN or infinite logits, on any rank; nothing is changed.
        """
        self._read_verdict()
        if self._reduction is None:
            self._start(step)
        if not self.layers:
            return
        banks, good, replayed = self._judge(step)
        if good is None:
            self._read_verdict()  # raises if they are not
        for bank in banks:
            commit_rows(bank.layers, bank.sums, good=good, replayed=replayed)
        counted = [layer.running for layer in self.layers.values()]
        torch._foreach_zero_([*counted, *self._cells()])
        self._clock.begin()
        self._closed = True

    def discard(self) -> None:
        """Forget what was counted since the last step; the other ranks must do so too."""
        self._clock.drop()
        self._forget()

    def load(self) -> None:
        """A state was loaded: begin with empty sums."""
        self._forget()
        self._clock.begin()
        self._loaded = True

    def _forget(self) -> None:
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
        for layer in self.layers.values():
            layer.discard()

    def _give_up(self) -> None:
        """Forget a step that ends in an error, on all ranks."""
        self._forget()
        self._clock.begin()

    def _start(self, step: int, *, early: bool = False, stray: bool = False) -> None:
        """Send this rank's sums of a step to the others, if there are any."""
        group = sharing(self.group)
        if group is None:
            return
        if not self._agreed:
            self._agree(group, step - 1)
        if not self.layers:
            return
        banks = self._banks()
        parts = [bank.sums[:, part].reshape(-1) for bank in banks for part in self._shared(bank)]
        device = parts[0].device
        # What stays here may be sick where the message is sound: 0 · NaN tells the others. A load
        # on this rank, which need not be one on theirs, adds 1, and so does a rank astray.
        sick = sum((0 * bank.sums).sum().to(device) for bank in banks)
        notice = torch.as_tensor(sick).reshape(1) + float(self._loaded or stray)
        replayed = self._replayed().to(device).reshape(1)
        counted = self._clock.read(early=early and not self._closed)
        self._account = Account(step, *counted, self._clock.updates, self._loaded, stray)
        place = agreement.told(self._account, group_size(group)).to(device)
        self._sent = banks
        what = f"their sums of {_some(list(self.layers))} in step {step}"
        self._reduction = start_sum([*parts, notice, replayed, place], group, what)

    def _grown(self) -> bool:
        """Whether a batch was counted since the message was sent."""
        pairs = zip(self._banks(), self._sent, strict=True)
        return any(bool((now.batches > sent.batches).any()) for now, sent in pairs)

    def _judge(
        self, step: int, *, forgive_late: bool = False
    ) -> tuple[list[Bank], Tensor | None, Tensor]:
        """The sums over all ranks, whether they are good, and whether any choice was replayed.

        What is to be said of them is on its way to the host, or there; then the second is None.
        """
        banks, flags, replayed = self._totals()
        if forgive_late:
            flags[3].fill_(True)
        names = [name for bank in banks for name in bank.names]
        self._verdict = _send(Verdict(step, names, flags, self._account))
        good = None
        if self._verdict.arrived is not None:
            good = (flags[0] if self._account is None else flags[0] & flags[5]).all()
        self._account = None
        return banks, good, replayed

    def _banks(self) -> list[Bank]:
        rows: dict[Any, list[str]] = {}
        for name, layer in self.layers.items():
            rows.setdefault((layer.running.device, layer.num_experts), []).append(name)
        found = []
        for names in rows.values():
            layers = [self.layers[name] for name in names]
            found.append(Bank(names, layers, torch.stack([layer.running for layer in layers])))
        return found

    def _shared(self, bank: Bank) -> tuple[slice, ...]:
        """Where in a row that lies which ranks add up."""
        return shared_part(self.method, bank.layers[0].num_experts, everything=self.everything)

    def _cells(self) -> list[Tensor]:
        """Where backward notes that a choice came from elsewhere: one for each device."""
        return list({id(x.replayed): x.replayed for x in self.layers.values()}.values())

    def _replayed(self) -> Tensor:
        """Above 0 if a batch of this rank was routed by choices from elsewhere, ()."""
        first, *others = self._cells()
        return first if not others else sum((o.to(first.device) for o in others), first)

    def _totals(self) -> tuple[list[Bank], Tensor, Tensor]:
        """The sums over all ranks (what is not shared is this rank's own), and a verdict's flags.

        Last, above 0 if any batch of the step was routed by choices from elsewhere.
        """
        now = self._banks()
        own = [_finite(bank.sums) for bank in now]
        if self._reduction is None:
            columns = [
                torch.stack([finite, bank.tokens > 0])
                for bank, finite in zip(now, own, strict=True)
            ]
            return now, _side_by_side(columns), self._replayed()
        banks, self._sent = self._sent, []
        timely = [a.batches == b.batches for a, b in zip(banks, now, strict=True)]
        reduction, self._reduction = self._reduction, None
        *parts, notice, replayed, place = reduction.wait()
        here = agreement.together(place, reduction.ranks)
        self._fill(banks, iter(parts), notice)
        columns = []
        for bank, *mine in zip(banks, own, timely, strict=True):
            settled = ~(notice.to(bank.sums.device) > 0).expand_as(mine[0])
            same = here.to(settled.device).expand_as(settled)
            all_ranks = _finite(bank.sums), bank.tokens > 0
            columns.append(torch.stack([*all_ranks, *mine, settled, same]))
        return banks, _side_by_side(columns), replayed

    def _fill(self, banks: Sequence[Bank], message: Iterator[Tensor], notice: Tensor) -> None:
        """Put what came back from all ranks in the place of this rank's own."""
        for bank in banks:
            device = bank.sums.device
            for part in self._shared(bank):
                bank.sums[:, part] = next(message).view(len(bank.names), -1).to(device)
            bank.sums.add_(0 * notice.to(device))
            bank.batches.add_(2)  # with several ranks a step is never one batch

    def _agree(self, group: Group, steps: int) -> None:
        """Refuse to go on if another rank balances something else, or is in another step."""
        sizes = [(name, layer.num_experts) for name, layer in self.layers.items()]
        mine = {"method": repr(self.method), "layers": sizes, "steps": steps}
        mine |= {"metrics": self.everything}
        distributed.agree(mine, group, f"what they balance in step {steps + 1}")
        self._agreed, self._loaded = True, False

    def _compare(self, verdict: Verdict, group: Group) -> None:
        """Find out why ranks do not look alike: a load, which is fine, or ranks astray."""
        assert verdict.account is not None
        accounts = agreement.gathered(verdict.account, group)
        if any(account.loaded for account in accounts):
            self._agree(group, verdict.step - 1)
        apart = agreement.apart(accounts)
        if apart:
            self._give_up()
            raise RuntimeError(apart)

    def _read_verdict(self) -> None:
        """Say what is to be said of the last step judged."""
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        if bool(verdict.flags.all()):
            return
        finite, seen, *among_ranks = verdict.flags.tolist()
        alone = finite, *3 * [[True] * len(finite)]
        own, timely, settled, here = among_ranks or alone
        group = sharing(self.group)
        if not all(settled + here) and group is not None:
            self._compare(verdict, group)
        if not all(timely):
            self._give_up()
            raise RuntimeError(
                f"Tokens were counted between reduce() and step() in step {verdict.step}, too "
                "late for the message to the other ranks; the step's sums were dropped. Call "
                "reduce() after the last backward of a step."
            )
        if not all(finite):
            mine = [name for name, good in zip(verdict.names, own, strict=True) if not good]
            where = distributed.by_rank(mine, group)
            self._give_up()
            raise FloatingPointError(
                f"NaN or infinite router logits in {where} during step {verdict.step}. "
                "The balancing state was left as it was; this step's sums were dropped. Lower the "
                "learning rate, clip gradients, or look for the layer's input."
            )
        blind = {name for name, saw in zip(verdict.names, seen, strict=True) if not saw}
        if blind != set(verdict.names):
            for name in sorted(blind - self._known_blind):
                logger.warning(_BLIND, name, verdict.step)
            self._known_blind |= blind
            return
        self._give_up()
        raise RuntimeError(
            f"No token was counted in {_some(list(self.layers))} during step {verdict.step}. "
            "Tokens are counted in the backward pass of a model in training mode: call step() once "
            "after each optimizer step, attach before compiling, and give each step at least one "
            "real token. A layer whose output the loss does not use has no backward pass either. "
            "Of two callbacks on one handle the second finds nothing: give the trainer one."
        )


def _finite(sums: Float[Tensor, "L sums"]) -> Bool[Tensor, "L"]:
    """Whether the sums of each layer are finite, in three kernels."""
    total = sums.sum(dim=1)  # of shares and counts of tokens: far from an overflow
    return total - total == 0


def _side_by_side(columns: Sequence[Bool[Tensor, "flags layers"]]) -> Bool[Tensor, "flags L"]:
    """The flags of all banks on one device, a column a layer."""
    first, *others = columns
    return torch.cat([first, *(o.to(first.device) for o in others)], dim=1) if others else first


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _send(verdict: Verdict) -> Verdict:
    """Bring the flags to the host: at once, or from a CUDA device behind the work under way."""
    if not verdict.flags.is_cuda:
        return verdict._replace(flags=verdict.flags.cpu())
    host = torch.empty(verdict.flags.shape, dtype=torch.bool, pin_memory=True)
    host.copy_(verdict.flags, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return verdict._replace(flags=host, arrived=arrived)
