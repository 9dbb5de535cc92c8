"""The price that the second fused pass forms, and that a batch is one launch each way."""

from __future__ import annotations

import pytest
import torch

from cases import skewed_state
from moebalance import (
    SMEBU,
    BalancedRouter,
    Euclidean,
    LossFree,
    MaxVio,
    Method,
    NegativeEntropy,
    NoBalancing,
    PhiBalancing,
    Scheduled,
    Sigmoid,
    Softmax,
    SwitchLoss,
    Targeted,
    Together,
    kernels,
    recommended,
)
from moebalance.core.autograd import Pass, Tally, _in_kernel, settle
from moebalance.kernels import router as passes
from moebalance.lab.bench.traffic import traffic
from moebalance.potentials import Softplus

STEPS = {"first step": (0, 0), "one batch a step": (64, 1), "four batches a step": (200, 4)}


ROWS = 9
"""More than one program's."""


def charged(
    method: Method, experts: int, tokens: float, last_step: tuple[int, int], *, fused: bool
) -> list[torch.Tensor]:
    """Gradients from a charge, and running sums, after a batch of these sums in mid-step.

    Scores are all 1 / E: then E times a gradient is the charge, but for its mean, which moves none.
    """
    generator = torch.Generator().manual_seed(experts)
    packed = torch.rand(2 * experts + 2, generator=generator)
    packed[experts : 2 * experts] = torch.arange(experts) % 5
    packed *= tokens > 0
    packed[-2], packed[-1] = tokens, 1
    running = torch.rand(2 * experts + 2, generator=generator)
    tally = Tally(running, torch.tensor(last_step).float(), torch.tensor(0.7), torch.zeros(()))
    state = skewed_state(method, experts)
    how = Pass(method, method.traits, Softmax(), state, tally)
    logits, mask = torch.zeros(ROWS, experts), torch.ones(1)
    if not fused:
        price = settle(how, packed, 0, mask)
        assert price is not None
        gradient = kernels.plain.pull(logits, Softmax(), price) * experts
        return [gradient, gradient, running, running]
    charge = _in_kernel(how, packed, 0, mask)
    assert isinstance(charge, kernels.Settlement)
    attached = kernels.pull(logits, Softmax(), charge)
    chosen, normaliser = torch.arange(2).repeat(ROWS, 1), logits.logsumexp(dim=-1)
    again = charge._replace(running=running.clone().sub_(packed))
    ours = kernels.pull_back(
        torch.zeros(ROWS, 2), logits, chosen, normaliser, Softmax(), normalize=True, charge=again
    )
    return [attached * experts, ours * experts, running, again.running]


@pytest.mark.parametrize("last_step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("peek", [True, False], ids=["peek", "no peek"])
@pytest.mark.parametrize("load", ["soft", "hard"])
@pytest.mark.parametrize("potential", [NegativeEntropy(), Euclidean()], ids=repr)
def test_the_launch_of_the_gradient_counts_and_charges_as_the_method_does(
    potential, load, peek, last_step, interpreted
):
    method = PhiBalancing(potential, strength=0.3, rate=0.2, load=load, peek=peek)
    same_launched(method, last_step, interpreted)


PHI = PhiBalancing(strength=0.3)
STEERED = Targeted(PHI, MaxVio(0.3))
COMPOSED = {
    "memory of many steps": PhiBalancing(memory_tokens=100_000),
    "memory of a step": PhiBalancing(memory_tokens=50),
    "targeted": STEERED,
    "scheduled": Scheduled(PHI, warmup_tokens=1e6),
    "targeted and scheduled": Scheduled(STEERED, warmup_tokens=1e6),
    "beside a bias": Together(PHI, LossFree()),
    "after a bias": Together(LossFree(), STEERED),
}


@pytest.mark.parametrize("method", COMPOSED.values(), ids=COMPOSED)
def test_so_does_it_where_phi_is_steered_scheduled_or_beside_a_bias(method, interpreted):
    same_launched(method, STEPS["four batches a step"], interpreted)


def same_launched(method: Method, last_step: tuple[int, int], interpreted) -> None:
    for experts, tokens in ((2, 5.0), (60, 0.0), (60, 33.0), (2304, 100.0)):
        assert kernels.forms(kernels.mean_price(method, skewed_state(method, experts)))
        case = (method, experts, tokens, last_step)
        found = interpreted(charged, *case, fused=True)
        for a, b in zip(found, charged(*case, fused=False), strict=True):
            assert b.abs().max() > 0 or experts == 2
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_what_the_launch_cannot_form_is_formed_in_torch():
    class Otherwise(PhiBalancing):
        def loss_price(self, state, batch):
            return -super().loss_price(state, batch)

    for method in (
        PhiBalancing(rate="auto"),
        PhiBalancing(Softplus()),
        SwitchLoss(),
        LossFree(),
        Together(PhiBalancing(), SwitchLoss()),
        Targeted(SwitchLoss(), MaxVio(0.3)),
        Otherwise(),
    ):
        assert not kernels.forms(kernels.mean_price(method, method.init(8)))


def kernels_of_a_batch(method: Method, monkeypatch, *, padded: bool = False) -> list[str]:
    """All that a GPU is sent for one batch, there and back, in order."""
    sent: list[str] = []

    def launch(program, grid, *arguments):
        sent.append(program.name)

    monkeypatch.setattr(kernels, "supported", lambda *_: True)
    monkeypatch.setattr(passes, "launch", launch)
    router = BalancedRouter(method, 64, 8)
    logits = torch.randn(32, 64, requires_grad=True)
    mask = torch.arange(32) < 20 if padded else None
    upstream = torch.ones(32, 8)
    seen = traffic(lambda: torch.autograd.grad(router(logits, mask)[0], logits, upstream), rows=1)
    assert not seen.small
    return sent[len(sent) // 2 :] + seen.large  # the first of two runs is to warm up


@pytest.mark.parametrize("padded", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("peek", [True, False], ids=["peek", "no peek"])
def test_phi_sends_a_gpu_one_launch_forward_and_one_backward(peek, padded, monkeypatch):
    """Counting and the price are inside, and nothing of torch is around; so is counting alone."""
    methods = (PhiBalancing(peek=peek), NoBalancing(), LossFree(), SMEBU(scale="nats"))
    for method in (*methods, recommended()):
        found = kernels_of_a_batch(method, monkeypatch, padded=padded)
        assert found == ["programs.choose", "programs.pull_back"]


@pytest.mark.parametrize("name", ["memory of many steps", "targeted", "beside a bias"])
def test_nor_do_a_target_a_memory_in_tokens_or_a_bias_send_more(name, monkeypatch):
    found = kernels_of_a_batch(COMPOSED[name], monkeypatch)
    assert found == ["programs.choose", "programs.pull_back"]


def test_a_price_formed_in_torch_shows_in_that_count(monkeypatch):
    """The control."""
    assert len(kernels_of_a_batch(PhiBalancing(Softplus()), monkeypatch)) > 8


def test_log_affinities_far_from_zero_are_ranked_as_exactly_as_others(interpreted):
    """σ(z) is 1 in float32 from z = 17 on; its logarithm is not 0 there, but −e^−z."""
    logits = torch.tensor([[12.0, 12.5, -40.0, 5.0], [19.0, 18.0, -3.0, 0.0]])
    for price in (2e-6 * torch.eye(4)[1], torch.tensor([0.0, 0.0, -50.0, 0.0])):
        found = interpreted(
            passes.choose, logits, Sigmoid(), 1, normalize=False, price=price, in_nats=True
        )
        wanted = torch.nn.functional.logsigmoid(logits.double()) - price.double()
        assert torch.equal(found.experts[:, 0], wanted.argmax(dim=-1))
