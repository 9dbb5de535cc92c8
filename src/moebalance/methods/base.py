"""The contract of a balancing method.

A method is a frozen dataclass of hyper-parameters. Its functions are pure: state goes in, state
comes out. A method does not know where its state lives, which ranks share it, or when a step ends
(`moebalance.core` does). It has

    memory      `init`, `extra` (sums of its own), `update` once a step
    one lever   `loss_price`        a price q charged in the loss: E · ⟨stop_grad(q), mean_t p_t⟩
                `penalty`           or another term, by autograd or by its own `penalty_gradient`
                `selection_price`   or a price subtracted from the affinities before top-k, never
                                    from the weights; `price_in_nats`: from their logarithms
                `preference`        or whatever top-k should rank
    traits      facts that the body needs before it sees a batch, as data

Override the members that your method needs. `traits` follows from them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate, mild
from moebalance.proportions import Proportions, check_proportions
from moebalance.routing import Batch, Routing, Sums, measure, real_rows, route

State = Any
"""A NamedTuple of float32 tensors, or of such NamedTuples; () for a method without memory.

One whose values have limits may have `problem()`: what is wrong with them, empty if nothing. A
state from a file is refused then.
"""

MOST_PRICE = 1e6
"""Added to such a price, an affinity of 0.1 is rounded away in float32."""

_SPREAD = 30.0  # nats: e^−30 times the affinity of a mild logit is far from underflow

Member = TypeVar("Member", bound=Any)

Coupling = Literal["token", "sequence", "batch", "step"]
"""The part of a step that a method sees together, from the smallest to the largest."""


class Traits(NamedTuple):
    """What a method is, as data.

    Attributes:
        charges: it works through the router's gradient.
        selects: it changes which experts are chosen.
        balances: it pushes the load toward even parts, or toward the proportions of `aim`.
        has_selection_price: it keeps a price that a model's own selection bias could hold.
        from_sums: its `loss_price` has shape (E,), reads only state and sums, and is its only
            gradient. Then a batch is counted and charged from its affinities, which is fast, and
            `batch.routing` is None. Not possible with `extra` sums.
        shared: the sums, of `scores` and `counts`, that the update reads. Ranks add up no others.
        coupling: the tokens that must stay together for gradient and choice to be the same under
            another layout. The state is the same under every layout.

            - "token": none. Micro-batches and ranks may divide a step's tokens in any way.
            - "sequence": whole sequences, in batches weighted by their number of sequences.
            - "batch": the tokens of a micro-batch, on any rank.
            - "step": all micro-batches of a step, in order and in one process.
        aim: the proportions of the load that the method aims at; None if they are equal.
    """

    charges: bool
    selects: bool
    balances: bool
    has_selection_price: bool
    from_sums: bool
    shared: frozenset[str]
    coupling: Coupling
    aim: Proportions | None


class Method:
    """Base of all methods. A subclass is a frozen dataclass that overrides what it needs."""

    def __repr__(self) -> str:
        return described(self)

    @property
    def traits(self) -> Traits:
        """Derived from the members that the class overrides.

        Adjust the rest in your class: `return super().traits._replace(coupling="batch")`.
        """
        has_price = overrides(self, "selection_price")
        charges = overrides(self, "loss_price", "penalty", "penalty_gradient")
        selects = has_price or overrides(self, "price_in_nats", "preference")
        return Traits(
            charges=charges,
            selects=selects,
            balances=charges or selects,
            has_selection_price=has_price,
            from_sums=False,
            shared=frozenset({"scores", "counts"} if overrides(self, "update") else ()),
            coupling="token",
            aim=vars(self).get("proportions"),
        )

    def init(self, num_experts: int) -> State:
        """Make the state before the first step, float32.

        Raises:
            ValueError: the method is made for another number of experts.
        """
        check_proportions(self.traits.aim, num_experts)
        return ()

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors from `extra`."""
        return ()

    def extra(self, state: State, routing: Routing) -> tuple[Tensor, ...]:
        """Sum what this method needs in addition to scores, counts and tokens.

        LAW: for equal state, extra(a ++ b) = extra(a) + extra(b), and padding adds nothing.
        """
        return ()

    def update(self, state: State, sums: Sums) -> State:
        """Advance the state by one optimizer step, given the sums of the whole step.

        LAW: a step without tokens leaves the state as it was. Nothing but the `shared` sums, the
        tokens and the `extra` sums changes the result. It runs under `torch.vmap` over layers.
        """
        return state

    def held(self, before: State, after: State) -> State:
        """The state after a step that was routed by choices from elsewhere, as in a replay.

        The router's price had no effect on such a step. What integrates the load, such as a
        selection price, would run away: take it from `before`. Averages go on: take them from
        `after`. LAW: each tensor is one of `before` or of `after`.
        """
        return after

    def selection_price(self, state: State) -> Float[Tensor, "E"] | None:
        """Price (E,) subtracted from the affinities before top-k; None for no effect."""
        return None

    def price_in_nats(self, state: State) -> Float[Tensor, "E"] | None:
        """Price (E,) subtracted from the log-affinities before top-k; None for no effect."""
        return None

    def adopt(self, state: State, price: Float[Tensor, "E"]) -> State:
        """Take over a selection price (E,) that a model was trained with."""
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
        """Scores (T, E) for top-k to rank instead of the affinities; None for no effect.

        A method with a price need not override this. If it does, its own form is ranked.
        """
        return under_price(self, state, gate, logits)

    def loss_price(self, state: State, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """Price (E,) or (T, E) charged on the scores in the loss, strength included."""
        return None

    def penalty(self, state: State, batch: Batch) -> Float[Tensor, ""] | None:
        """The term that this method adds to the loss: a mean over the batch's tokens."""
        price = self.loss_price(state, batch)
        return None if price is None else charge(price, batch.routing)

    def penalty_gradient(
        self, state: State, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """`scale` times the gradient (T, E) of `penalty` with respect to the logits.

        In closed form for a price. A `penalty` of another kind is differentiated by autograd on a
        graph of its own, unless the method gives its gradient here.

        LAW: equal to autograd of `penalty`.
        """
        if overrides(self, "penalty"):
            found = _differentiated(self, state, batch)
            return None if found is None else found * scale
        price = self.loss_price(state, batch)
        if price is None:
            return None
        routing = batch.routing
        real = real_rows(routing.gate.affinities(routing.logits), routing.mask)
        rate = routing.gate.price_gradient(
            price * per_token(batch, scale), real, routing.gate.row_scale(real)
        )
        return real_rows(routing.gate.backward(rate, real), routing.mask)

    def readings(self, state: State) -> dict[str, Float[Tensor, ""]]:
        """The method's own numbers () for the log, by name."""
        return {}


def observe(method: Method, state: State, routing: Routing) -> Sums:
    """The additive statistics of one batch: scores, counts, tokens and the method's own."""
    return measure(routing, method.extra(state, routing))


def price_in_force(method: Method, state: State) -> tuple[Float[Tensor, "E"] | None, bool]:
    """The price that is subtracted before top-k, if any, and whether it is in nats."""
    price = method.selection_price(state)
    return (method.price_in_nats(state), True) if price is None else (price, False)


def forwarded(preference: Member) -> Member:
    """Mark a wrapper's `preference` that hands on the one of what it wraps, and adds nothing."""
    preference.forwarded = True
    return preference


def ranks_by_itself(method: Method) -> bool:
    """Whether the method, or a part of it, has a `preference` of its own."""
    own = type(method).preference
    forwards = own is Method.preference or getattr(own, "forwarded", False)
    return not forwards or any(map(ranks_by_itself, inner_methods(method)))


def under_price(
    method: Method,
    state: State,
    gate: Gate,
    logits: Float[Tensor, "T E"],
    affinities: Float[Tensor, "T E"] | None = None,
    *,
    summed: bool = True,
) -> Float[Tensor, "T E"] | None:
    """What top-k ranks under the method's price: a − price or log a − price. None without one.

    Args:
        method: the method.
        state: its state.
        gate: affinities from logits.
        logits: (T, E), detached.
        affinities: (T, E), if they are at hand; None to form them from the logits.
        summed: whether scores may be added up, for groups of experts, before they are ranked. If
            not, a e^−price ranks as log a − price does, and needs no logarithm of every score. It
            is taken where nothing can underflow.
    """
    price, in_nats = price_in_force(method, state)
    if price is None:
        return None
    affinities = None if affinities is None else affinities.detach()
    if not in_nats:
        return (gate.affinities(logits) if affinities is None else affinities) - price
    if summed or affinities is None or gate.sums_to_one or not mild(logits):
        return gate.log_affinity(logits) - price
    low, high = (float(end) for end in price.aminmax())
    if not high - low < _SPREAD:  # also if one is NaN or endless
        return gate.log_affinity(logits) - price
    return affinities * (low - price).exp()


def charge(price: Float[Tensor, "*rows E"], routing: Routing) -> Float[Tensor, ""]:
    """E · ⟨stop_grad(price), mean_t p_t⟩ over real tokens.

    With price = α·f this is the Switch loss, with price = α·∇φ(m) the φ-balancing term.

    Args:
        price: (E,) or (T, E); treated as a constant.
        routing: the batch whose scores carry the gradient.

    >>> from moebalance.gates import Softmax
    >>> logits = torch.zeros(2, 4)
    >>> charge(torch.full((4,), 0.5), route(logits, logits.topk(1).indices, Softmax())).item()
    2.0
    """
    worth = (routing.scores * price.detach()).sum(dim=-1)
    return real_rows(worth, routing.mask).sum() * (
        routing.num_experts / routing.tokens.clamp(min=1)
    )


def per_token(batch: Batch, scale: float | Tensor) -> float | Tensor:
    """scale · E / tokens, (): turns a price into the gradient of a score."""
    return scale * (batch.sums.scores.shape[-1] / batch.tokens)


def inner_methods(method: Method) -> tuple[Method, ...]:
    """The methods that a wrapper or a composition holds; empty for a method of its own.

    >>> from moebalance.methods import LossFree, NoBalancing, Together
    >>> inner_methods(Together(NoBalancing(), LossFree(speed=0.01)))[0]
    NoBalancing()
    """
    fields = (value if isinstance(value, tuple) else (value,) for value in vars(method).values())
    return tuple(one for value in fields for one in value if isinstance(one, Method))


def sees_sequences(method: Method) -> bool:
    """Whether the method, or a part of it, looks at single sequences."""
    own = method.traits.coupling == "sequence"
    return own or any(sees_sequences(part) for part in inner_methods(method))


def described(parameters: Any) -> str:
    """The repr of a dataclass of hyper-parameters, without the ones that are None."""
    values = ((name, value) for name, value in vars(parameters).items() if value is not None)
    inside = ", ".join(f"{name}={value!r}" for name, value in values)
    return f"{type(parameters).__name__}({inside})"


def overrides(method: Method, *names: str) -> bool:
    """Whether the method's class has its own form of one of these members."""
    return any(getattr(type(method), name) is not getattr(Method, name) for name in names)


def most_coupled(couplings: list[Coupling]) -> Coupling:
    """The coupling that allows the fewest layouts."""
    return max(couplings, key=get_args(Coupling).index, default="token")


def where_seen(tokens: Float[Tensor, ""], value: Tensor, otherwise: Tensor) -> Tensor:
    """`value` if the step saw a token, else `otherwise`."""
    return torch.where(tokens > 0, value.to(otherwise.dtype), otherwise)


def beyond(name: str, value: Tensor, most: float = MOST_PRICE, least: float | None = None) -> str:
    """Words for values outside of [least, most]; least is -most if not given. Empty if inside.

    >>> beyond("its load", torch.tensor([0.5, -0.5]), most=1.0, least=0.0)
    'its load goes from -0.5 to 0.5, and must lie in [0, 1]'
    """
    least = -most if least is None else least
    low, high = value.min().item(), value.max().item()
    if least <= low and high <= most:
        return ""
    return f"{name} goes from {low:.3g} to {high:.3g}, and must lie in [{least:.3g}, {most:.3g}]"


def check_positive(name: str, value: float, *, zero: bool = True) -> None:
    """Refuse a negative, infinite or NaN hyper-parameter.

    Raises:
        ValueError: `value` is not a finite number ≥ 0 (> 0 if `zero` is False).
    """
    _check_number(name, value)
    good = 0 <= value < float("inf") if zero else 0 < value < float("inf")
    if not good:
        bound = "at least 0" if zero else "greater than 0"
        raise ValueError(f"{name}={value!r}: must be a finite number {bound}.")


def check_rate(name: str, value: float) -> None:
    """Refuse an averaging rate outside (0, 1].

    Raises:
        ValueError: `value` is not in (0, 1].
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


def refuse_frozen(name: str, method: Method, *, trains: bool) -> None:
    """Refuse a router whose gradient nobody takes, under a method that works through it.

    Raises:
        ValueError: with the router's name and the remedy.
    """
    if method.traits.charges and not trains:
        raise ValueError(
            f"{method!r} works through the gradient of the router, but {name} is frozen. Train it "
            "(with PEFT: modules_to_save or target_parameters), leave it out, or use a "
            "method that selects, such as LossFree."
        )


def _differentiated(method: Method, state: State, batch: Batch) -> Float[Tensor, "T E"] | None:
    old = batch.routing
    with torch.enable_grad():
        logits = old.logits.detach().requires_grad_()
        routing = route(logits, old.experts, old.gate, mask=old.mask, sequences=old.sequences)
        penalty = method.penalty(state, batch._replace(routing=routing))
        return None if penalty is None else torch.autograd.grad(penalty, logits)[0]
