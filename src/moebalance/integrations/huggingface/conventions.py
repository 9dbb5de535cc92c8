"""How Transformers' routers answer: where the logits, the weights and the chosen experts are.

Nearly every router returns `(logits, weights, experts, …)`; what it computes from the logits is
found out by experiment (`integrations.rule.recognise`). The few that answer otherwise stand in the
tables at the end of this file, keyed by class name so that no model's code is imported for them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moebalance.gates import Gate, Sigmoid, Softmax
from moebalance.integrations.rule import Rule


class Answer(NamedTuple):
    """What a router said about one batch.

    Attributes:
        logits: z (T, E).
        carrier: the differentiable output that the loss depends on: the weights, of any shape.
        experts: (T, K), chosen before any token is dropped for capacity.
    """

    logits: Float[Tensor, "T E"]
    carrier: Tensor
    experts: Int[Tensor, "T K"]


@dataclass(frozen=True)
class Convention:
    """`(logits, weights, experts, …)`, and how to answer so.

    Args:
        gate: affinities from logits; None to find out by experiment.
        why_fixed: why the choice cannot be replaced from outside; empty if it can.
        probabilities: whether softmax probabilities stand in the logits' place, as in Gemma 4 and
            in most families before Transformers 5.6.
        why_shares: why a method must be told the shares of the load; empty if equal use is sound.
    """

    gate: Gate | None = None
    why_fixed: str = ""
    probabilities: bool = False
    why_shares: str = ""

    def top_k(self, router: nn.Module, block: nn.Module) -> int:
        """Experts per token."""
        return cast(int, router.top_k)

    def read(self, output: Any, top_k: int) -> Answer:
        """Take a router's output apart."""
        logits, weights, experts, *_ = output
        if self.probabilities:
            # log p is as good as the logits, up to a constant; clamped, for log 0 has no gradient.
            logits = logits.clamp(min=torch.finfo(logits.dtype).tiny).log()
        return Answer(logits, weights, experts)

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        """Put it together again, with another carrier and choice."""
        logits, _, _, *rest = output
        return (logits, carrier, experts, *rest)

    def weigh(
        self,
        rule: Rule,
        router: nn.Module,
        logits: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
    ) -> Tensor:
        """The carrier this router would give for any choice of experts, differentiable."""
        return self._carrier(router, rule.weigh(logits, experts), experts)

    def _carrier(
        self, router: nn.Module, weights: Float[Tensor, "T K"], experts: Int[Tensor, "T K"]
    ) -> Tensor:
        """Weights in the form in which this router gives them."""
        return weights


@dataclass(frozen=True)
class _Scaled(Convention):
    """Gemma 4: a trained factor for each expert on the weights."""

    def top_k(self, router: nn.Module, block: nn.Module) -> int:
        return cast(int, cast(Any, router).config.top_k_experts)

    def _carrier(
        self, router: nn.Module, weights: Float[Tensor, "T K"], experts: Int[Tensor, "T K"]
    ) -> Tensor:
        return weights * cast(Tensor, router.per_expert_scale)[experts]


@dataclass(frozen=True)
class _Scattered(Convention):
    """Llama 4: `(weights (T, E), 0 where not chosen; logits)`."""

    def read(self, output: Any, top_k: int) -> Answer:
        weights, logits = output
        return Answer(logits, weights, weights.detach().topk(top_k, dim=-1).indices)

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        return carrier, output[1]

    def _carrier(
        self, router: nn.Module, weights: Float[Tensor, "T K"], experts: Int[Tensor, "T K"]
    ) -> Tensor:
        columns = cast(int, router.num_experts)
        return weights.new_zeros(len(weights), columns).scatter(-1, experts, weights)


@dataclass(frozen=True)
class _LogitsOnly(Convention):
    """DBRX: logits, from which the block around the router makes everything else."""

    def top_k(self, router: nn.Module, block: nn.Module) -> int:
        return cast(int, block.top_k)

    def read(self, output: Any, top_k: int) -> Answer:
        # A view, for Dynamo takes no tensor twice into one autograd function.
        return Answer(output, output.view_as(output), output.topk(top_k, dim=-1).indices)

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        return carrier


@dataclass(frozen=True)
class _Sorted(Convention):
    """JetMoE: assignments sorted by expert, `(order, tokens, weights (T·K,), sizes, logits)`."""

    def read(self, output: Any, top_k: int) -> Answer:
        logits = output[4]
        return Answer(logits, output[2], logits.topk(top_k, dim=-1).indices)

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        return (*output[:2], carrier, *output[3:])


@dataclass(frozen=True)
class _Dispatched(Convention):
    """Switch Transformers, NLLB-MoE: `(dispatch mask, weights, logits (…, E))`, with a capacity."""

    chosen: int = 1

    def top_k(self, router: nn.Module, block: nn.Module) -> int:
        return self.chosen

    def read(self, output: Any, top_k: int) -> Answer:
        _, weights, logits = output
        logits = logits.reshape(-1, logits.shape[-1])
        return Answer(logits, weights, logits.topk(top_k, dim=-1).indices)

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        return (output[0], carrier, output[2])


@dataclass(frozen=True)
class _Skipping(Convention):
    """Zaya: the last column skips the layer; who chooses it is sent to expert 0 with weight 0."""

    def read(self, output: Any, top_k: int) -> Answer:
        logits, weights, experts, *_ = output
        # A softmax weight is never 0 by itself.
        return Answer(logits, weights, experts.masked_fill(weights == 0, logits.shape[-1] - 1))

    def write(self, output: Any, carrier: Tensor, experts: Int[Tensor, "T K"]) -> Any:
        return (output[0], carrier, *output[2:])


_CAPACITY = "drops tokens over an expert's capacity as it chooses"

COMMON = Convention()

BY_CLASS: dict[str, Convention] = {
    "DbrxRouter": _LogitsOnly(Softmax(), "leaves the choice to the block around it"),
    "Gemma4TextRouter": _Scaled(probabilities=True),
    "DiffusionGemmaTextRouter": _Scaled(probabilities=True),
    "InklingTopkRouter": Convention(Sigmoid(), "weighs its shared experts together with the rest"),
    "JetMoeTopKGating": _Sorted(Softmax(), "returns its choice sorted by expert"),
    "Llama4Router": _Scattered(),
    "LongcatFlashTopkRouter": Convention(
        why_shares="some of its experts compute nothing, and equal use of all would change how "
        "much work a token gets"
    ),
    "NllbMoeTop2Router": _Dispatched(Softmax(), _CAPACITY, chosen=2),
    "PhimoeTopKRouter": Convention(Softmax(), "chooses by SparseMixer, one expert after the other"),
    "SwitchTransformersTop1Router": _Dispatched(Softmax(), _CAPACITY, chosen=1),
    "ZayaRouter": _Skipping(
        Softmax(),
        "hides the choice of the class that skips the layer",
        why_shares="besides its experts it has a class that skips the layer, and equal use of all "
        "would make tokens skip",
    ),
}
"""Routers that do not follow the common convention, or whose rule no experiment finds."""

NOT_ROUTED = frozenset({"DeepseekV4HashRouter"})
"""Routers whose choice is a fixed table: there is nothing to balance, so they are passed over."""

REFUSED: dict[str, str] = {
    "DogeCDMoE": "it finds experts by product keys, so that no router has one logit an expert",
}
"""Modules that cannot be balanced as things are, and why."""
