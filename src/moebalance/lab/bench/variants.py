"""Routers to be timed: a bare one, ours under any method, and the ways others add a balancing term.

Each is a function of the logits (T, E) that returns the weights (T, K), its balancing term tied to
their gradient as its authors do it: ours on the way back, theirs as a second output that the loss
adds. Functions of other packages are imported where they are installed; where not, the formula is
written down anew and the name says so.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebalance.core.autograd import choose
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate, Sigmoid, Softmax, top_experts
from moebalance.integrations import rule as recognised
from moebalance.methods import Method
from moebalance.router import BalancedRouter

Rule = Literal["softmax", "softmax, normalised", "sigmoid, normalised"]
RULES: tuple[Rule, ...] = ("softmax", "softmax, normalised", "sigmoid, normalised")

Outputs = tuple[Tensor, Tensor | None]
"""Weights (T, K), and a balancing term () to be added to the loss."""

STRENGTH = 1e-2


class BareRouter:
    """Affinities, top-k and weights, and nothing else: what everything is measured against.

    Args:
        rule: how affinities become weights.
        top_k: K.
        ordered: whether a token's experts are named from the best to the worst, as top-k does if it
            is not told otherwise. Ours does not ask for it.
    """

    def __init__(self, rule: Rule, top_k: int, *, ordered: bool = True) -> None:
        self.sigmoid, self.normalized = rule.startswith("sigmoid"), rule.endswith("normalised")
        self.top_k, self.ordered = top_k, ordered

    def __call__(self, logits: Tensor) -> Outputs:
        """Weights without a term."""
        return self.route(logits)[1], None

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Affinities (T, E), weights (T, K) and experts (T, K)."""
        wide = logits.float()
        affinities = wide.sigmoid() if self.sigmoid else wide.softmax(dim=-1)
        chosen, experts = affinities.topk(self.top_k, dim=-1, sorted=self.ordered)
        return affinities, self._weigh(chosen), experts

    def _weigh(self, chosen: Tensor) -> Tensor:
        return chosen / chosen.sum(dim=-1, keepdim=True) if self.normalized else chosen


class Ours:
    """`BalancedRouter` under a method."""

    def __init__(
        self, method: Method, experts: int, top_k: int, rule: Rule, *, fused: bool = True
    ) -> None:
        gate: Gate = Sigmoid() if rule.startswith("sigmoid") else Softmax()
        normalize = rule.endswith("normalised")
        self.router = BalancedRouter(
            method, experts, top_k, gate=gate, normalize=normalize, fused=fused
        )

    def __call__(self, logits: Tensor) -> Outputs:
        """Weights, charged on the way back."""
        return self.router(logits, sequences=1)[0], None


class Attached:
    """A bare router of somebody else's model, with a method attached to its outputs.

    Args:
        method: the method.
        experts: E.
        top_k: K.
        rule: how affinities become weights.
        fused: whether the fused kernels may run.
        instead: whether our pass stands in for the router's, as `attach` does where it knows the
            router whole. If not, a method that only charges leaves the pass to the router.
    """

    def __init__(
        self,
        method: Method,
        experts: int,
        top_k: int,
        rule: Rule,
        *,
        fused: bool = True,
        instead: bool = True,
    ) -> None:
        self.instead = instead
        self.bare = BareRouter(rule, top_k)
        gate: Gate = Sigmoid() if self.bare.sigmoid else Softmax()
        self.layer = LayerBalance(method, experts, gate=gate, fused=fused)
        self.rule = recognised.Rule(gate, self.bare.normalized, 1.0, plain_top_k=True)

    def __call__(self, logits: Tensor) -> Outputs:
        """Weights, of another choice if the method has one, charged on the way back."""
        layer = self.layer
        left = not layer.traits.selects
        if layer.traits.from_sums and (layer.has_price or (left and self.instead)):
            about = {"normalize": self.bare.normalized, "ordered": left}
            how = layer.pass_for(logits, self.bare.top_k, **about)
            return choose(logits, how)[0], None
        preference = layer.preference(logits, None, training=True)
        if preference is None:
            _, weights, experts = self.bare.route(logits)
        else:
            experts = top_experts(preference, logits.detach(), self.bare.top_k)
            weights = self.rule.weigh(logits, experts)
        return self.layer.tie(weights, logits, experts), None


class LeanSwitch(BareRouter):
    """The Switch loss in as few operations as autograd allows."""

    def __call__(self, logits: Tensor) -> Outputs:
        """α E ⟨f, p̄⟩."""
        affinities, weights, experts = self.route(logits)
        mean = affinities.mean(dim=0)
        if self.sigmoid:
            mean = (affinities / affinities.sum(dim=-1, keepdim=True)).mean(dim=0)
        places = experts.reshape(-1)
        one = mean.new_ones(()).expand(places.numel())
        load = torch.zeros_like(mean).scatter_add(0, places, one) / places.numel()
        return weights, STRENGTH * load.numel() * (load @ mean)


class OneHotSwitch(BareRouter):
    """The Switch loss with the load from a one-hot mask, as GShard's descendants write it."""

    def __call__(self, logits: Tensor) -> Outputs:
        """α E Σ_e mean(mask_e) mean(p_e)."""
        affinities, weights, experts = self.route(logits)
        mask = F.one_hot(experts, affinities.shape[-1]).sum(dim=1).to(affinities.dtype)
        term = (mask.mean(dim=0) * affinities.mean(dim=0)).sum()
        return weights, STRENGTH * affinities.shape[-1] / self.top_k * term


class BiasRouter(BareRouter):
    """Loss-free as usually written: selection by affinity plus bias, a histogram of the choice."""

    def __init__(self, rule: Rule, top_k: int, experts: int) -> None:
        super().__init__(rule, top_k)
        self.bias, self.counts = torch.zeros(experts), torch.zeros(experts)

    def __call__(self, logits: Tensor) -> Outputs:
        """Weights by affinity, choice by affinity plus bias."""
        wide = logits.float()
        affinities = wide.sigmoid() if self.sigmoid else wide.softmax(dim=-1)
        self.bias, self.counts = self.bias.to(logits.device), self.counts.to(logits.device)
        _, experts = (affinities + self.bias).topk(self.top_k, dim=-1)
        places, last = experts.reshape(-1).float(), len(self.bias) - 1
        with torch.no_grad():
            self.counts += torch.histc(places, last + 1, 0, last)
        return self._weigh(affinities.gather(1, experts)), None


class TransformersLoss(BareRouter):
    """`load_balancing_loss_func` of Transformers, on the logits as its models return them."""

    def __init__(self, rule: Rule, top_k: int) -> None:
        super().__init__(rule, top_k)
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        self.function = load_balancing_loss_func

    def __call__(self, logits: Tensor) -> Outputs:
        """Its own softmax, top-k and one-hot, once more."""
        term = self.function((logits,), logits.shape[-1], self.top_k)
        assert isinstance(term, Tensor)
        return self.route(logits)[1], STRENGTH * term


class MegatronLoss(BareRouter):
    """The auxiliary loss of Megatron-Core's router: its scores for the loss, its Switch loss."""

    def __init__(self, rule: Rule, top_k: int) -> None:
        super().__init__(rule, top_k)
        from megatron.core.transformer.moe.moe_utils import (  # type: ignore[import-not-found]
            compute_routing_scores_for_aux_loss,
            switch_load_balancing_loss_func,
        )

        self.scores, self.function = (
            compute_routing_scores_for_aux_loss,
            switch_load_balancing_loss_func,
        )

    def __call__(self, logits: Tensor) -> Outputs:
        """Its scores and choice once more, as its router forms them for the loss, and the loss."""
        kind = "sigmoid" if self.sigmoid else "softmax"
        chosen, scores = self.scores(logits.float(), self.top_k, kind)
        term = self.function(
            probs=scores,
            tokens_per_expert=chosen.sum(dim=0),
            total_num_tokens=logits.shape[0],
            topk=self.top_k,
            num_experts=logits.shape[-1],
            moe_aux_loss_coeff=STRENGTH,
        )
        return self.route(logits)[1], term


class TorchtitanRouter:
    """torchtitan's own router with its selection bias, and the count of the choice its layer keeps.

    The linear map is taken out, for the logits are given; it would have returned float32.
    """

    def __init__(self, rule: Rule, top_k: int, experts: int) -> None:
        from torchtitan.models.common.linear import Linear  # type: ignore[import-not-found]
        from torchtitan.models.common.moe import (  # type: ignore[import-not-found]
            TokenChoiceTopKRouter,
        )

        config = TokenChoiceTopKRouter.Config(
            num_experts=experts,
            gate=Linear.Config(in_features=1, out_features=experts),
            top_k=top_k,
            score_func="sigmoid" if rule.startswith("sigmoid") else "softmax",
            route_norm=rule.endswith("normalised"),
        )
        self.router = TokenChoiceTopKRouter(config)
        self.router.gate = nn.Identity()
        self.bias, self.counts = torch.zeros(experts), torch.zeros(experts)

    def __call__(self, logits: Tensor) -> Outputs:
        """Weights by affinity, choice by affinity plus bias."""
        self.bias, self.counts = self.bias.to(logits.device), self.counts.to(logits.device)
        with warnings.catch_warnings():  # its autocast to float32 means nothing on a processor
            warnings.simplefilter("ignore")
            weights, experts, affinities = self.router(logits.float().unsqueeze(0), self.bias)
        with torch.no_grad():
            chosen = torch.zeros_like(affinities, dtype=torch.bool).scatter_(-1, experts, True)
            self.counts += chosen.sum(dim=(0, 1))
        return weights.squeeze(0), None


def others(experts: int, top_k: int, rule: Rule) -> dict[str, Callable[[Tensor], Outputs]]:
    """What others do under this rule, by name; imported functions only where they are installed."""
    found: dict[str, Callable[[Tensor], Outputs]] = {
        "Switch, leanest (restated)": LeanSwitch(rule, top_k),
        "Switch, one-hot (restated)": OneHotSwitch(rule, top_k),
        "loss-free (restated)": BiasRouter(rule, top_k, experts),
    }
    if not rule.startswith("sigmoid") and _installed("transformers"):
        found["Transformers' function"] = TransformersLoss(rule, top_k)
    if _installed("megatron.core.transformer.moe"):
        found["Megatron-Core's function"] = MegatronLoss(rule, top_k)
    if _installed("torchtitan.models.common.moe"):
        found["torchtitan's router"] = TorchtitanRouter(rule, top_k, experts)
    return found


def _installed(module: str) -> bool:
    """Whether there is such a module, in a package that lays its modules out so."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
