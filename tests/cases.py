"""The methods that every shared law is held against, and the batches that they are shown.

A new method is one line in `METHODS`; `test_laws.py` does the rest. Those with shares or
groups fit one number of experts, and stand in `OF_EIGHT`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebalance import (
    SMEBU,
    EmaSwitchLoss,
    Euclidean,
    GlobalBatchLoss,
    LossFree,
    MaxVio,
    Method,
    NegativeEntropy,
    NoBalancing,
    PhiBalancing,
    PlugInLoss,
    QuantileBalancing,
    Scheduled,
    SequenceLoss,
    Sigmoid,
    Sinkhorn,
    Softmax,
    SwitchLoss,
    Targeted,
    Together,
    ZLoss,
)
from moebalance.core.commit import commit_rows
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate
from moebalance.methods import observe
from moebalance.potentials import (
    LogCosh,
    LpNorm,
    Potential,
    PseudoHuber,
    Renyi,
    SoftL1,
    Softplus,
    Tsallis,
)
from moebalance.routing import Batch, Routing, Sums, route

POTENTIALS: dict[str, Potential] = {
    "euclidean": Euclidean(),
    "lp": LpNorm(2.5),
    "soft-l1": SoftL1(delta=0.3),
    "negative-entropy": NegativeEntropy(),
    "tsallis": Tsallis(alpha=1.3),
    "renyi": Renyi(alpha=0.7),
    "pseudo-huber": PseudoHuber(delta=0.4),
    "log-cosh": LogCosh(beta=3.0),
    "softplus": Softplus(),
}

METHODS: dict[str, Method] = {
    **{f"phi-{name}": PhiBalancing(p, strength=0.05) for name, p in POTENTIALS.items()},
    "phi-unit-slope": PhiBalancing(NegativeEntropy().unit_slope(), strength=0.2, rate=0.7),
    "phi-hard": PhiBalancing(strength=0.05, rate=0.5, load="hard"),
    "phi-no-peek": PhiBalancing(Tsallis(), strength=0.05, rate=0.6, peek=False),
    "phi-hard-no-peek": PhiBalancing(Euclidean(), strength=0.3, load="hard", peek=False),
    "phi-token-memory": PhiBalancing(strength=0.05, memory_tokens=100.0),
    "phi-token-memory-no-peek": PhiBalancing(strength=0.05, memory_tokens=100.0, peek=False),
    "phi-adaptive-memory": PhiBalancing(strength=0.05, rate="auto"),
    "phi-no-memory": PhiBalancing(strength=0.05, rate=1.0),
    "plug-in": PlugInLoss(strength=0.03),
    "plug-in-hard-step": PlugInLoss(strength=0.03, load="hard", window="step"),
    "switch": SwitchLoss(strength=0.03),
    "global-batch": GlobalBatchLoss(strength=0.02),
    "sequence": SequenceLoss(strength=0.04),
    "ema-switch": EmaSwitchLoss(strength=0.03, rate=0.4),
    "ema-switch-token-memory": EmaSwitchLoss(strength=0.03, memory_tokens=100.0),
    "ema-switch-adaptive-memory": EmaSwitchLoss(strength=0.03, rate="auto"),
    "loss-free": LossFree(),
    "loss-free-fast": LossFree(speed=0.05),
    "loss-free-proportional": LossFree(speed=0.02, rule="proportional"),
    "loss-free-recentred": LossFree(speed=0.02, recentre=True),
    "quantile": QuantileBalancing(),
    "quantile-coarse": QuantileBalancing(bins=64),
    "smebu": SMEBU(speed=0.01),
    "smebu-nats": SMEBU(scale="nats"),
    "loss-free-nats": LossFree(scale="nats"),
    "loss-free-scheduled": Scheduled(LossFree(speed=0.05), relax_after=800.0),
    "quantile-nats": QuantileBalancing(bins=128, scale="nats", memory=0.5),
    "sinkhorn": Sinkhorn(),
    "sinkhorn-sharp": Sinkhorn(iterations=3, temperature=0.5),
    "z-loss": ZLoss(strength=0.02),
    "phi-targeted": Targeted(PhiBalancing(strength=0.05, load="hard"), MaxVio(0.3), gain=0.5),
    "sequence-targeted": Targeted(SequenceLoss(strength=0.04), MaxVio(0.2, load="soft"), gain=0.5),
    "phi-warmed-up": Scheduled(PhiBalancing(strength=0.05), warmup_tokens=400.0),
    "switch-relaxed": Scheduled(
        SwitchLoss(strength=0.03), relax_after=100.0, relax_tokens=400.0, floor=0.1
    ),
    "none": NoBalancing(),
    "phi-and-loss-free": Together(PhiBalancing(strength=0.05), LossFree(speed=0.01)),
    "switch-z-and-quantile": Together(
        SwitchLoss(strength=0.03), ZLoss(strength=0.02), QuantileBalancing(bins=128)
    ),
}

PROPORTIONS = (4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0)

OF_EIGHT: dict[str, Method] = {
    "phi-shares": PhiBalancing(NegativeEntropy().relative_to(PROPORTIONS), strength=0.05),
    "phi-euclidean-shares": PhiBalancing(
        Euclidean().relative_to(PROPORTIONS), strength=0.3, peek=False
    ),
    "phi-groups": PhiBalancing(NegativeEntropy().grouped(4), strength=0.05),
    "phi-groups-by-name": PhiBalancing(
        Tsallis().grouped((0, 1, 2, 0, 1, 1, 2, 0)), strength=0.05, unit="paper"
    ),
    "phi-levels": PhiBalancing(
        NegativeEntropy().grouped(2) + 0.1 * NegativeEntropy().relative_to(PROPORTIONS),
        strength=0.05,
    ),
    "plug-in-shares": PlugInLoss(NegativeEntropy().relative_to(PROPORTIONS), strength=0.03),
    "switch-shares": SwitchLoss(strength=0.03, proportions=PROPORTIONS),
    "global-batch-shares": GlobalBatchLoss(strength=0.02, proportions=PROPORTIONS),
    "sequence-shares": SequenceLoss(strength=0.04, proportions=PROPORTIONS),
    "ema-switch-shares": EmaSwitchLoss(strength=0.03, rate=0.4, proportions=PROPORTIONS),
    "loss-free-shares": LossFree(proportions=PROPORTIONS),
    "loss-free-proportional-shares": LossFree(
        speed=0.02, rule="proportional", proportions=PROPORTIONS
    ),
    "smebu-shares": SMEBU(speed=0.01, proportions=PROPORTIONS),
    "quantile-shares": QuantileBalancing(bins=64, proportions=PROPORTIONS),
    "sinkhorn-shares": Sinkhorn(proportions=PROPORTIONS),
    "targeted-shares": Targeted(
        PhiBalancing(NegativeEntropy().relative_to(PROPORTIONS), strength=0.05, load="hard"),
        MaxVio(0.3, proportions=PROPORTIONS),
        gain=0.5,
    ),
    "shares-together": Together(
        SwitchLoss(strength=0.03, proportions=PROPORTIONS), LossFree(proportions=PROPORTIONS)
    ),
}

GATES: dict[str, Gate] = {"softmax": Softmax(), "sigmoid": Sigmoid()}


def random_logits(
    tokens: int, num_experts: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits (T, E) of a router that prefers its last experts."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, num_experts, generator=generator, dtype=torch.float64)
    return (noise + torch.linspace(-1, 1, num_experts, dtype=torch.float64)).to(dtype)


def random_routing(
    tokens: int = 24,
    num_experts: int = 8,
    top_k: int = 2,
    *,
    gate: Gate | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padded: bool = False,
    sequences: int = 1,
) -> Routing:
    """Plain top-k routing of `random_logits`; `padded` makes about a third of the tokens padding.

    The first token of every sequence is real.
    """
    logits = random_logits(tokens, num_experts, seed=seed, dtype=dtype)
    mask = None
    if padded:
        generator = torch.Generator().manual_seed(seed + 1)
        mask = torch.rand(tokens, generator=generator) > 0.35
        mask.view(sequences, -1)[:, 0] = True
    return plain_top_k(logits, top_k, gate=gate, mask=mask, sequences=sequences)


def plain_top_k(
    logits: Tensor,
    top_k: int,
    *,
    gate: Gate | None = None,
    mask: Tensor | None = None,
    sequences: int = 1,
) -> Routing:
    """Route each token to its K largest logits."""
    experts = logits.detach().topk(top_k, dim=-1).indices
    return route(logits, experts, gate or Softmax(), mask=mask, sequences=sequences)


def skewed_state(method: Method, num_experts: int, *, gate: Gate | None = None) -> Any:
    """A state that has seen three unbalanced steps."""
    state = method.init(num_experts)
    for seed in (101, 102, 103):
        routing = random_routing(64, num_experts, 2, gate=gate, seed=seed)
        state = method.update(state, observe(method, state, routing))
    return state


def one_batch(method: Method, state: Any, routing: Routing, share: float = 1.0) -> Batch:
    """The batch of `routing`, alone in its step."""
    sums = observe(method, state, routing)
    return Batch(routing, sums, sums, share)


def tensors(state: Any) -> list[Tensor]:
    """The tensors of a state, or of sums, in order."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in tensors(part)]


def to_double(state: Any) -> Any:
    """The same state in float64, for tests of mathematics."""
    if isinstance(state, Tensor):
        return state.double()
    parts = [to_double(part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def add(a: Sums, b: Sums) -> Sums:
    """Sums of two batches together."""
    extra = tuple(x + y for x, y in zip(a.extra, b.extra, strict=True))
    return Sums(a.scores + b.scores, a.counts + b.counts, a.tokens + b.tokens, extra)


def permute(value: Any, order: Tensor) -> Any:
    """Renumber the experts of a state or of sums: their expert axis comes first."""
    if isinstance(value, Tensor):
        return value[order] if value.dim() else value
    parts = [permute(part, order) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def parts(method: Method) -> list[Method]:
    """The methods that a composition is made of."""
    if isinstance(method, Together):
        return [inner for part in method.methods for inner in parts(part)]
    return [method]


def charging_parts(method: Method) -> list[Method]:
    """Those parts that charge a price on the scores."""
    return [part for part in parts(method) if type(part).loss_price is not Method.loss_price]


def commit(layer: LayerBalance) -> Sums:
    """End the step of one layer by itself; the sums of the step."""
    commit_rows([layer], layer.running.clone().unsqueeze(0), replayed=layer.replayed)
    layer.discard()
    assert layer.last_sums is not None
    return layer.last_sums
