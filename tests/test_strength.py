"""One unit of strength: equal strengths push alike near the uniform load."""

from __future__ import annotations

import pytest
import torch

import moebalance as mb
from cases import POTENTIALS, to_double
from moebalance.methods.strength import alpha
from moebalance.potentials import LogCosh, LpNorm
from moebalance.routing import Batch, Sums

STRENGTH, TOKENS, TOP_K = 0.01, 4096.0, 2

CHARGING = {
    "switch": mb.SwitchLoss(STRENGTH),
    "global-batch": mb.GlobalBatchLoss(STRENGTH),
    "ema-switch": mb.EmaSwitchLoss(STRENGTH),
    "ema-switch-auto": mb.EmaSwitchLoss(STRENGTH, rate="auto"),
    **{f"phi-{name}": mb.PhiBalancing(p, STRENGTH) for name, p in POTENTIALS.items()},
    "phi-hard": mb.PhiBalancing(strength=STRENGTH, load="hard"),
    "phi-auto": mb.PhiBalancing(strength=STRENGTH, rate="auto"),
    "phi-unit-slope": mb.PhiBalancing(mb.NegativeEntropy().unit_slope(), STRENGTH),
    "phi-combined": mb.PhiBalancing(mb.NegativeEntropy() + 3.0 * mb.Euclidean(), STRENGTH),
    "phi-scheduled": mb.Scheduled(mb.PhiBalancing(strength=STRENGTH)),
    "phi-targeted": mb.Targeted(mb.PhiBalancing(strength=STRENGTH), mb.MaxVio(0.3)),
    **{f"plug-in-{name}": mb.PlugInLoss(p, STRENGTH) for name, p in POTENTIALS.items()},
    "plug-in-hard": mb.PlugInLoss(strength=STRENGTH, load="hard", pseudo_count=0.0),
    "together": mb.Together(mb.SwitchLoss(STRENGTH / 2), mb.PhiBalancing(strength=STRENGTH / 2)),
}


def push(method: mb.Method, experts: int, size: float = 1e-3) -> torch.Tensor:
    """Centred price per deviation of the load from uniform, (E,)."""
    direction = torch.linspace(-1, 1, experts, dtype=torch.float64)
    load = (1 + size * direction) / experts
    tokens = torch.tensor(TOKENS, dtype=torch.float64)
    sums = Sums(TOKENS * load, TOP_K * TOKENS * load, tokens)
    price = method.loss_price(to_double(method.init(experts)), Batch(None, sums, sums))
    price = price - price.mean()
    return price.double() / (size / experts)


@pytest.mark.parametrize("experts", [8, 32, 384])
@pytest.mark.parametrize("name", CHARGING)
def test_equal_strengths_push_alike_near_the_uniform_load(name, experts):
    wanted = STRENGTH * torch.linspace(-1, 1, experts, dtype=torch.float64)
    torch.testing.assert_close(push(CHARGING[name], experts), wanted, rtol=0, atol=0.01 * STRENGTH)


@pytest.mark.parametrize("name", POTENTIALS)
def test_the_paper_unit_is_alpha_of_algorithm_1(name):
    potential = POTENTIALS[name]
    for experts in (8, 64):
        method = mb.PhiBalancing(potential, 0.02, unit="paper")
        assert alpha(method, experts) == 0.02
        slope = potential.slope(experts)
        wanted = 0.02 * slope * torch.linspace(-1, 1, experts, dtype=torch.float64)
        found = push(method, experts)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * 0.02 * slope)


def test_the_sequence_loss_of_one_sequence_pushes_as_the_switch_loss():
    logits = torch.randn(64, 8)
    routing = mb.routing.route(logits, logits.topk(2).indices, mb.Softmax())
    sums = mb.routing.measure(routing)
    found, wanted = (
        method.penalty_gradient((), Batch(routing, sums, sums))
        for method in (mb.SequenceLoss(STRENGTH), mb.SwitchLoss(STRENGTH))
    )
    torch.testing.assert_close(found, wanted)


def test_a_potential_of_one_group_has_no_slope_and_pushes_nothing():
    method = mb.PhiBalancing(mb.NegativeEntropy().grouped(1), STRENGTH)
    assert push(method, 8).abs().max() == 0


@pytest.mark.parametrize(
    ("potential", "experts"),
    [(LogCosh(1e4), 8), (LogCosh(1e3), 8), (LpNorm(300), 64)],
    ids=str,
)
@pytest.mark.parametrize("build", [mb.PhiBalancing, mb.PlugInLoss])
def test_a_potential_that_is_flat_at_the_uniform_load_is_refused_and_not_switched_off(
    build, potential, experts
):
    with pytest.raises(ValueError, match="strengths are out of range"):
        build(potential).init(experts)
    build(potential, unit="paper").init(experts)


@pytest.mark.parametrize("build", [mb.PhiBalancing, mb.PlugInLoss])
def test_another_unit_is_refused_by_name(build):
    with pytest.raises(ValueError, match="unit='euro': must be 'switch' or 'paper'"):
        build(unit="euro")
