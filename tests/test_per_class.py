"""One price a class of tokens: each class is balanced by itself."""

import pytest
import torch

import moebalance as mb

E, K, T = 8, 2, 4096
CLASSES = ["text", "image"]


def two_kinds(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, E) of tokens whose class decides which experts they like, and the classes."""
    random = torch.Generator().manual_seed(seed)
    classes = (torch.arange(T) % 4 == 0).long()  # a quarter are images
    liked = torch.where(classes[:, None] == 1, torch.arange(E) < 2, torch.arange(E) >= 4)
    return torch.randn(T, E, generator=random) + 1.5 * liked, classes


def trained(method: mb.Method, steps: int = 300) -> mb.PerClassRouter:
    router = mb.PerClassRouter(method, E, K, classes=CLASSES)
    balancing = mb.attach(torch.nn.ModuleDict({"gate": router}))
    for step in range(steps):
        logits, classes = two_kinds(step)
        weights, _ = router(logits.requires_grad_(), classes)
        weights.sum().backward()
        balancing.step()
    return router.eval()


def maxvio(experts: torch.Tensor) -> float:
    counts = torch.bincount(experts.flatten(), minlength=E)
    return float(counts.max() * E / counts.sum() - 1)


def test_each_class_is_balanced_where_one_price_balances_only_their_sum():
    method = mb.LossFree(speed=0.002)
    logits, classes = two_kinds(999)
    _, experts = trained(method)(logits, classes)
    assert maxvio(experts[classes == 0]) < 0.15
    assert maxvio(experts[classes == 1]) < 0.15
    single = mb.BalancedRouter(method, E, K)
    balancing = mb.attach(torch.nn.ModuleDict({"gate": single}))
    for step in range(300):
        single(two_kinds(step)[0].requires_grad_())[0].sum().backward()
        balancing.step()
    _, experts = single.eval()(logits)
    assert maxvio(experts) < 0.15
    assert maxvio(experts[classes == 1]) > 1


def test_a_token_is_counted_and_charged_by_its_class_alone():
    """The gradient and the counts of each router on its own rows."""
    method = mb.SwitchLoss(strength=0.1)
    router = mb.PerClassRouter(method, E, K, classes=CLASSES)
    balancing = mb.attach(torch.nn.ModuleDict({"gate": router}))
    logits, classes = two_kinds()
    logits.requires_grad_()
    weights, experts = router(logits, classes)
    weights.sum().backward()
    balancing.step()
    for number, name in enumerate(CLASSES):
        here = classes == number
        alone = mb.BalancedRouter(method, E, K)
        handle = mb.attach(torch.nn.ModuleDict({"gate": alone}))
        rows = logits.detach()[here].requires_grad_()
        same_weights, same_experts = alone(rows)
        same_weights.sum().backward()
        handle.step()
        torch.testing.assert_close(weights[here], same_weights)
        assert torch.equal(experts[here], same_experts)
        torch.testing.assert_close(logits.grad[here], rows.grad)
        loads = balancing.loads()[f"gate.routers.{name}"]
        torch.testing.assert_close(loads, next(iter(handle.loads().values())))


def test_padding_counts_in_no_class():
    method = mb.NoBalancing()
    router = mb.PerClassRouter(method, E, K, classes=CLASSES)
    balancing = mb.attach(torch.nn.ModuleDict({"gate": router}))
    logits, classes = two_kinds()
    mask = torch.arange(T) < T // 2
    weights, experts = router(logits.requires_grad_(), classes, mask)
    weights.sum().backward()
    balancing.step()
    for number, name in enumerate(CLASSES):
        counted, _ = balancing.loads()[f"gate.routers.{name}"]
        chosen = experts[mask & (classes == number)]
        expected = torch.bincount(chosen.flatten(), minlength=E).float()
        torch.testing.assert_close(counted, expected / expected.sum())


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (torch.zeros(3, dtype=torch.long), r"classes of shape \(3,\)"),
        (torch.zeros(4), r"torch\.float32"),
        (torch.tensor([0, 1, 2, 0]), r"classes from 0 to 2, but there are 2: text, image"),
    ],
)
def test_classes_that_do_not_fit_are_refused(classes, said):
    router = mb.PerClassRouter(mb.LossFree(), E, K, classes=CLASSES)
    with pytest.raises(ValueError, match=said):
        router(torch.randn(4, E), classes)


def test_a_mask_that_would_be_broadcast_is_refused():
    router = mb.PerClassRouter(mb.LossFree(), E, K, classes=CLASSES)
    with pytest.raises(ValueError, match=r"mask of shape \(1,\) for classes of shape \(4,\)"):
        router(torch.randn(4, E), torch.zeros(4, dtype=torch.long), torch.ones(1, dtype=torch.bool))


def test_a_batch_without_a_class_moves_nothing_of_that_class():
    router = mb.PerClassRouter(mb.LossFree(speed=0.1), E, K, classes=CLASSES)
    balancing = mb.attach(torch.nn.ModuleDict({"gate": router}))
    logits = two_kinds()[0].requires_grad_()
    router(logits, torch.zeros(T, dtype=torch.long))[0].sum().backward()
    balancing.step()
    assert router.routers["text"].price.abs().max() > 0.05
    assert router.routers["image"].price.abs().max() == 0


@pytest.mark.parametrize("classes", [["text"], ["text", "text"], []])
def test_fewer_than_two_classes_are_refused(classes):
    with pytest.raises(ValueError, match="two names or more"):
        mb.PerClassRouter(mb.LossFree(), E, K, classes=classes)
