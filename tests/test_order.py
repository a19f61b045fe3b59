"""Sample order and random numbers depend on their position alone."""

import numpy as np
import pytest

from train.data.order import Order, positions, rng


def test_each_epoch_is_another_permutation() -> None:
    order = Order(num_samples=101, seed=3)
    epochs = [order.samples(np.arange(epoch * 101, (epoch + 1) * 101)) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(101)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], Order(101, seed=4).samples(np.arange(101)))


def test_sample_at_a_position_does_not_depend_on_earlier_calls() -> None:
    used = Order(50, seed=0)
    for start in range(0, 500, 7):
        used.samples(np.arange(start, start + 7))
    some = np.array([499, 3, 250, 49, 50])
    assert np.array_equal(used.samples(some), Order(50, seed=0).samples(some))


@pytest.mark.parametrize(
    ("world_size", "micro_size"), [(1, 12), (1, 3), (2, 6), (2, 3), (3, 2), (4, 1), (12, 1)]
)
def test_workers_together_read_the_global_batch_once(world_size: int, micro_size: int) -> None:
    by_rank = [positions(5, 12, micro_size, rank, world_size) for rank in range(world_size)]
    micro_batches = [micro_batch for rank in by_rank for micro_batch in rank]
    assert sorted(np.concatenate(micro_batches)) == list(range(60, 72))
    assert {len(micro_batch) for micro_batch in micro_batches} == {micro_size}


def test_random_numbers_depend_on_their_key_alone() -> None:
    assert np.array_equal(rng(1, 2, 3).standard_normal(4), rng(1, 2, 3).standard_normal(4))
    drawn = {
        rng(*key).integers(2**62)
        for key in [(1, 2, 3), (1, 3, 2), (1, 2, 4), (2, 2, 3), (1, 2), (1, 2, 0), (1, 2, 0, 0)]
    }
    assert len(drawn) == 7
