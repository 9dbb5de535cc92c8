"""OLMo-core's routers without what it reads from clouds with."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def _without_clouds() -> dict[str, ModuleType]:
    """cached_path, as much of it as OLMo-core's modules ask for when they are imported."""
    whole, schemes = ModuleType("cached_path"), ModuleType("cached_path.schemes")
    whole.cached_path = None
    schemes.SchemeClient = type("SchemeClient", (), {})
    schemes.S3Client = type("S3Client", (schemes.SchemeClient,), {"recoverable_errors": ()})
    schemes.add_scheme_client = lambda client: None
    return {"cached_path": whole, "cached_path.schemes": schemes}


sys.modules.update(_without_clouds())

from olmo_core.nn.moe.loss import MoELoadBalancingLossGranularity as Granularity  # noqa: E402
from olmo_core.nn.moe.router import MoELinearRouter as MoELinearRouter  # noqa: E402
from olmo_core.nn.moe.router import MoERouterConfig  # noqa: E402

from moebalance.integrations import olmo_core as olmo_core  # noqa: E402

EXPERTS, TOP_K, WIDTH, SEQUENCES, LENGTH = 8, 2, 16, 4, 8


class Tower(nn.Module):
    """Routers on top of one another, each with experts that scale their token."""

    def __init__(self, layers: int = 2, *, top_k: int = TOP_K, **options: Any) -> None:
        super().__init__()
        per_sequence = options.pop("per_sequence", False)
        losses = {
            "lb_loss_weight": options.pop("lb_loss_weight", None),
            "lb_loss_granularity": Granularity.instance
            if per_sequence
            else Granularity.local_batch,
        }
        config = MoERouterConfig(top_k=top_k, normalize_expert_weights=1.0, **options)
        self.routers = nn.ModuleList(config.build(WIDTH, EXPERTS, **losses) for _ in range(layers))
        for number, router in enumerate(self.routers):
            generator = torch.Generator().manual_seed(number)
            router.weight.data = torch.randn(EXPERTS * WIDTH, generator=generator) / 2
        self.scales = torch.linspace(0.5, 1.5, EXPERTS)

    def forward(self, x: Tensor, divisor: Any = None) -> tuple[Tensor, Tensor]:
        """The output, and OLMo-core's own auxiliary loss."""
        total = x.new_zeros(())
        for router in self.routers:
            weights, experts, _, loss = router(x, loss_div_factor=divisor)
            total = total if loss is None else total + loss
            x = x + x * (weights * self.scales[experts]).sum(-1, keepdim=True)
        return x, total

    def post_batch(self, dry_run: bool = False) -> None:
        for router in self.routers:
            router.post_batch(dry_run=dry_run)


def batch(seed: int = 0, sequences: int = SEQUENCES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, LENGTH, WIDTH, generator=generator) + 0.3


def gradients(model: Tower, parts: list[Tensor], divisor: Any = None) -> list[Tensor]:
    """Of a step's batches: of the routers, by the balancing alone and with its own loss if any."""
    model.zero_grad()
    for part in parts:
        output, loss = model(part, divisor)
        (0 * output.sum() + loss).backward()
    return [router.weight.grad.clone() for router in model.routers]
