"""The order of micro-batches: their domains, their shares, their seed; no text is read here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moebalance.lab.text.batches import ordered_indices

# Three domains of very unequal size, sequence labels as a packed data set has them.
LABELS = torch.arange(3).repeat_interleave(torch.tensor([500, 120, 37]))


def shares(order: Tensor) -> list[int]:
    return LABELS[order].bincount(minlength=3).tolist()


def test_one_domain_batches_hold_one_domain():
    order = ordered_indices(LABELS, batch_size=4, num_batches=50, batching="one-domain")
    assert all(len(batch.unique()) == 1 for batch in LABELS[order].view(50, 4))
    firsts = LABELS[order].view(50, 4)[:, 0].tolist()
    assert len({tuple(firsts[i : i + 3]) for i in range(0, 48, 3)}) > 4  # shuffled, not in turn


def test_mixed_batches_are_mixed():
    order = ordered_indices(LABELS, batch_size=16, num_batches=96, batching="mixed")
    counts = torch.stack([b.bincount(minlength=3) for b in LABELS[order].view(96, 16)]).double()
    assert (counts > 0).all(dim=1).float().mean() > 0.95
    # As spread as independent draws: variance n p (1 − p), within the noise of 96 batches.
    assert counts.var(dim=0).mean() == pytest.approx(16 * 2 / 9, rel=0.3)


def test_shift_goes_from_half_of_the_domains_to_the_other_half_way():
    order = ordered_indices(LABELS, batch_size=2, num_batches=13, batching="shift", seed=5)
    assert len(order) == 26
    assert set(LABELS[order[:14]].tolist()) == {0, 1}
    assert set(LABELS[order[14:]].tolist()) == {2}
    again = ordered_indices(LABELS, batch_size=2, num_batches=13, batching="shift", seed=5)
    assert torch.equal(order, again)


def test_shift_needs_domains_to_shift_between():
    with pytest.raises(ValueError, match=r"1 domain\(s\) and 4 micro-batch"):
        ordered_indices(torch.zeros(9).long(), batch_size=1, num_batches=4, batching="shift")


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_both_batchings_read_the_same_sequences(batch_size):
    """After whole rounds (8 micro-batches a domain) with equal weights."""
    orders = [
        ordered_indices(LABELS, batch_size=batch_size, num_batches=72, batching=batching, seed=3)
        for batching in ("mixed", "one-domain")
    ]
    assert shares(orders[0]) == shares(orders[1]) == [24 * batch_size] * 3
    assert torch.equal(orders[0].sort().values, orders[1].sort().values)


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
def test_proportional_weights_follow_the_sizes(batching):
    sizes = LABELS.bincount().double()
    order = ordered_indices(
        LABELS, batch_size=4, num_batches=2400, batching=batching, domain_weights="proportional"
    )
    seen = torch.tensor(shares(order)).double() / len(order)
    assert torch.allclose(seen, sizes / sizes.sum(), atol=0.01)


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
@pytest.mark.parametrize("domain_weights", ["equal", "proportional"])
def test_order_is_fixed_by_the_seed_and_begins_a_longer_one(batching, domain_weights):
    def order(num_batches: int, seed: int) -> Tensor:
        return ordered_indices(
            LABELS,
            batch_size=4,
            num_batches=num_batches,
            batching=batching,
            seed=seed,
            domain_weights=domain_weights,
        )

    long = order(101, 0)
    assert len(long) == 404
    assert torch.equal(long, order(101, 0))
    assert not torch.equal(long, order(101, 1))
    # 10 steps of 3 micro-batches, 30 of 1, or the first 30 of a longer run: the same order.
    assert torch.equal(long[:120], order(30, 0))


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
def test_no_sequence_returns_before_its_domain_is_used_up(batching):
    order = ordered_indices(LABELS, batch_size=4, num_batches=300, batching=batching)
    for domain, size in enumerate(LABELS.bincount().tolist()):
        drawn = order[LABELS[order] == domain]
        passes = [part.tolist() for part in drawn.split(size)]
        assert all(len(set(part)) == len(part) for part in passes)
        assert len(passes) < 2 or passes[0] != passes[1]


def test_order_ignores_the_global_random_state():
    first = ordered_indices(LABELS, batch_size=4, num_batches=9)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(first, ordered_indices(LABELS, batch_size=4, num_batches=9))
    assert torch.equal(before, torch.get_rng_state())


def test_a_domain_without_sequences_gets_no_turn():
    labels = torch.tensor([0, 0, 2, 2])
    order = ordered_indices(labels, batch_size=2, num_batches=16, batching="one-domain")
    assert labels[order].bincount().tolist() == [16, 0, 16]


def test_order_errors():
    with pytest.raises(ValueError, match="Did you mean 'one-domain'"):
        ordered_indices(LABELS, batch_size=1, num_batches=1, batching="one_domain")
    with pytest.raises(ValueError, match="domain_weights 'same' is unknown"):
        ordered_indices(LABELS, batch_size=1, num_batches=1, domain_weights="same")
    with pytest.raises(ValueError, match="batch_size is 0"):
        ordered_indices(LABELS, batch_size=0, num_batches=1)
    with pytest.raises(ValueError, match="num_batches is -1"):
        ordered_indices(LABELS, batch_size=1, num_batches=-1)
    with pytest.raises(ValueError, match="no sequences"):
        ordered_indices(LABELS[:0], batch_size=1, num_batches=1)
