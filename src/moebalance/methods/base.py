"""The contract every balancing method signs, and the one formula behind those that charge a price.

A method holds hyper-parameters only. Its functions are pure: state goes in, state comes out; where
the state lives, which ranks share it and when a step ends is the body's business (`layer.py`).

A method can pull two levers. It can *charge* a price q in the loss,

    penalty = E · ⟨stop_grad(q), mean_t p_t⟩,

or it can *subtract* a price from the affinities before top-k, never from the weights.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.potentials import Potential
from moebalance.proportions import Proportions, check_proportions
from moebalance.routing import Batch, Routing, Sums, measure, real_rows, route

State = Any
"""A NamedTuple of float32 tensors, or of such NamedTuples; () for a method without memory."""


Coupling = Literal["token", "sequence", "batch", "step"]
"""What of a step a method looks at together, from the least to the most."""


class MeanPrice(NamedTuple):
    """A price α λ (∇φ(m) − ⟨m, ∇φ(m)⟩) as data, for a kernel that forms it in one go (`kernels`).

    Attributes:
        potential: φ.
        mean: m (E,), the average of the finished steps.
        weight: (), its accumulated weight; see `Ema`.
        hard: whether m averages the hard load instead of the mean scores.
        peek: whether m takes in the batch it is charged on.
        strength: α.
        rate: η, of a step; None for that of a memory in tokens.
        memory_tokens: M in place of a rate.
        multiplier: λ (); None for 1.
    """

    potential: Potential
    mean: Float[Tensor, "E"]
    weight: Float[Tensor, ""]
    hard: bool
    peek: bool
    strength: float
    rate: float | None
    memory_tokens: float | None = None
    multiplier: Float[Tensor, ""] | None = None


class Method:
    """Base of all methods. A subclass is a frozen dataclass that overrides what it needs.

    `charged` alone makes a loss-lever method, `price` alone a selection-lever method; a term that
    is no price times the scores overrides `penalty`, and `logit_gradient` where speed matters.
    `update` says how memory follows the sums of a finished step; `extra` adds sums beyond scores
    and counts.
    """

    def __repr__(self) -> str:
        return described(self)

    def init(self, num_experts: int) -> State:
        """Make the state before the first step, float32.

        Raises:
            ValueError: the method is made for another number of experts.
        """
        check_proportions(self.aim, num_experts)
        return ()

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of what `extra` returns."""
        return ()

    def extra(self, state: State, routing: Routing) -> tuple[Tensor, ...]:
        """Sum what this method needs beyond scores, counts and tokens.

        LAW: for equal state, extra(a ++ b) = extra(a) + extra(b), and padding adds nothing.
        """
        return ()

    def observe(self, state: State, routing: Routing) -> Sums:
        """Take the additive statistics of one batch."""
        return measure(routing, self.extra(state, routing))

    def update(self, state: State, sums: Sums) -> State:
        """Advance the state by one optimizer step, given the sums of the whole step.

        LAW: a step without tokens leaves the state as it was.
        """
        return state

    def price(self, state: State) -> Float[Tensor, "E"] | None:
        """Price subtracted from the affinities before top-k; None leaves the choice alone."""
        return None

    def adopt(self, state: State, price: Float[Tensor, "E"]) -> State:
        """Take over a selection price that a model was trained with; ignored by other methods."""
        return state

    def preference(
        self,
        state: State,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"] | None:
        """What top-k ranks in place of the affinities; None leaves the choice alone."""
        price = self.price(state)
        return None if price is None else gate.affinities(logits) - price

    def charged(self, state: State, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """Price charged on the scores in the loss, (E,) or (T, E), strength included."""
        return None

    def penalty(self, state: State, batch: Batch) -> Float[Tensor, ""] | None:
        """The term this method adds to the loss: a token mean over the batch."""
        price = self.charged(state, batch)
        return None if price is None else charge(price, batch.routing)

    def logit_gradient(
        self, state: State, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """`scale` times the gradient of `penalty` with respect to the logits, in closed form.

        LAW: equal to autograd of `penalty`. The body injects this, so that no graph is kept, or of
        a method `from_sums` the same from its price.
        """
        if _overrides(self, "penalty"):
            found = _differentiated(self, state, batch)
            return None if found is None else found * scale
        price = self.charged(state, batch)
        if price is None:
            return None
        routing = batch.routing
        price = price * per_token(batch, scale)
        gradient = routing.gate.pull_back(price, routing.scores, routing.logits)
        return real_rows(gradient, routing.mask)

    def readings(self, state: State) -> dict[str, Float[Tensor, ""]]:
        """Numbers of its own that a log should have, by name."""
        return {}

    @property
    def from_sums(self) -> bool:
        """Whether `charged` (E,), read from state and sums alone, is all the gradient there is.

        The body then counts the batch and charges it from the affinities, and has no
        `batch.routing` for it: it is the fast way (`tally.py`). Say so where it holds, with no sums
        beyond scores, counts and tokens: `observe`, `extra` and `logit_gradient` are not called.
        """
        return False

    def mean_price(self, state: State) -> MeanPrice | None:
        """What `charged` forms if that is a price of an average, as data; None if it is not.

        LAW: the price so described is that of `charged`.
        """
        return None

    @property
    def charges(self) -> bool:
        """Whether the method works through the router's gradient."""
        return any(_overrides(self, name) for name in ("charged", "penalty", "logit_gradient"))

    @property
    def prices_selection(self) -> bool:
        """Whether the method keeps a price that a model's own selection bias could hold."""
        return _overrides(self, "price")

    @property
    def reads(self) -> frozenset[str]:
        """Which of the sums' `scores` and `counts` the update reads; ranks need share no other.

        LAW: the update is the same whatever stands in the others.
        """
        return frozenset({"scores", "counts"} if _overrides(self, "update") else ())

    @property
    def coupling(self) -> Coupling:
        """What another layout must leave together for gradient and choice to stay the same.

        - "token": nothing. Micro-batches and ranks may share a step's tokens out in any way.
        - "sequence": whole sequences, in batches that weigh as many as they hold: one with fewer
          real tokens counts no less.
        - "batch": the tokens of a micro-batch. On which rank it is does not matter.
        - "step": all micro-batches of a step, in their order and in one process.

        The state is the same under every layout.
        """
        return "token"

    @property
    def aim(self) -> Proportions | None:
        """The shares of the load that the method aims at; None where they are equal."""
        return vars(self).get("proportions")

    @property
    def selects(self) -> bool:
        """Whether the method changes which experts are chosen."""
        return self.prices_selection or _overrides(self, "preference")


def charge(price: Float[Tensor, "*rows E"], routing: Routing) -> Float[Tensor, ""]:
    """E · ⟨stop_grad(price), mean_t p_t⟩ over real tokens.

    With price = α·f this is the Switch loss, with price = α·∇φ(m) the φ-balancing term.

    Args:
        price: (E,) or (T, E); treated as a constant.
        routing: the batch whose scores carry the gradient.

    >>> from moebalance.gates import Softmax
    >>> from moebalance.routing import route
    >>> logits = torch.zeros(2, 4)
    >>> charge(torch.full((4,), 0.5), route(logits, logits.topk(1).indices, Softmax())).item()
    2.0
    """
    worth = (routing.scores * price.detach()).sum(dim=-1)
    return real_rows(worth, routing.mask).sum() * (
        routing.num_experts / routing.tokens.clamp(min=1)
    )


def described(parameters: Any) -> str:
    """The repr of a dataclass of hyper-parameters, without those that are None: not given."""
    values = ((name, value) for name, value in vars(parameters).items() if value is not None)
    inside = ", ".join(f"{name}={value!r}" for name, value in values)
    return f"{type(parameters).__name__}({inside})"


def more_coupled(first: Coupling, second: Coupling) -> Coupling:
    """The one of the two that leaves layouts less freedom."""
    return max(first, second, key=get_args(Coupling).index)


def per_token(batch: Batch, scale: float | Tensor) -> float | Tensor:
    """scale · E / tokens, (): what turns a price into the gradient of a score."""
    return scale * (batch.sums.scores.shape[-1] / batch.tokens)


def read(number: Tensor) -> Any:
    """A number, or a list of a few, where reading it waits for no device; elsewhere the tensor.

    On a processor arithmetic on numbers is free beside a kernel for each operation.
    """
    here = number.device.type == "cpu" and not torch.compiler.is_compiling()
    return number.tolist() if here else number


def where_seen(tokens: Float[Tensor, ""], value: Tensor, otherwise: Tensor) -> Tensor:
    """`value` where the step saw a token, `otherwise` where it saw none."""
    return torch.where(tokens > 0, value.to(otherwise.dtype), otherwise)


def check_positive(name: str, value: float, *, zero: bool = True) -> None:
    """Refuse a negative, infinite or NaN hyper-parameter.

    Raises:
        ValueError: if `value` is not a finite number ≥ 0 (> 0 where `zero` is False).
    """
    _check_number(name, value)
    good = 0 <= value < float("inf") if zero else 0 < value < float("inf")
    if not good:
        bound = "at least 0" if zero else "greater than 0"
        raise ValueError(f"{name}={value!r}: must be a finite number {bound}.")


def check_rate(name: str, value: float) -> None:
    """Refuse an averaging rate outside (0, 1].

    Raises:
        ValueError: if `value` is not in (0, 1].
    """
    _check_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name}={value!r}: must lie in (0, 1]; it is the weight of the newest step "
            "(0.3 remembers about 3 steps, 1 remembers none)."
        )


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}.")


def _differentiated(method: Method, state: State, batch: Batch) -> Float[Tensor, "T E"] | None:
    """Gradient of a penalty that gives none itself, by autograd on a graph of its own."""
    old = batch.routing
    with torch.enable_grad():
        logits = old.logits.detach().requires_grad_()
        routing = route(logits, old.experts, old.gate, mask=old.mask, sequences=old.sequences)
        penalty = method.penalty(state, batch._replace(routing=routing))
        return None if penalty is None else torch.autograd.grad(penalty, logits)[0]


def _overrides(method: Method, name: str) -> bool:
    return getattr(type(method), name) is not getattr(Method, name)
