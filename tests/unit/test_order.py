"""The sample order: permutations, exact mixtures, and nothing but arithmetic."""

from __future__ import annotations

import hashlib
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from titan_dp.data.order import Order, permute
from titan_dp.errors import UserError

MIXTURE = Order(["a", "b"], [37, 91], [1.0, 3.0], 5)
SAMPLES = np.stack(MIXTURE.locate(np.arange(20_000)))


@given(st.integers(1, 5000), st.text())
def test_permute_is_a_permutation_of_any_size_under_any_key(size: int, key: str) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_an_older_run_goes_on_in_its_order() -> None:
    assert hashlib.sha256(SAMPLES.tobytes()).hexdigest().startswith("de781e31b989615b")


def test_every_epoch_visits_every_window_once_in_another_order_and_so_do_other_seeds_and_data() -> None:
    orders = [Order([name], [100], [1.0], seed) for name, seed in (("data", 1), ("data", 2), ("other", 1))]
    epochs = [epoch for order in orders for epoch in order.locate(np.arange(300))[1].reshape(3, 100)]
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 9


@given(st.lists(st.integers(0, 19_999), min_size=1))
def test_a_sample_does_not_depend_on_which_others_are_asked_for(some: list[int]) -> None:
    assert np.array_equal(np.stack(MIXTURE.locate(np.array(some))), SAMPLES[:, some])


def test_a_mixture_has_its_weights_exactly_in_every_block_and_reads_each_source_in_whole_epochs() -> None:
    source, window = Order(["a", "b"], [64, 6144], [1.0, 3.0], 0).locate(np.arange(2 * 4096))
    for block in source.reshape(2, 4096):
        assert np.bincount(block).tolist() == [1024, 3072]
    assert np.bincount(window[source == 0]).tolist() == [32] * 64
    assert np.bincount(window[source == 1]).tolist() == [1] * 6144


def test_no_step_takes_longer_to_reach_than_the_first() -> None:
    """Counted in calls, and in bytes that are held at once."""

    def cost(first: int) -> tuple[int, int]:
        order, calls = Order(["a", "b"], [10**9, 10**7], [0.7, 0.3], 0), 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        samples = np.arange(first, first + 256)
        tracemalloc.start()
        sys.setprofile(count)
        order.locate(samples)
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return calls, peak

    (calls, peak), (late_calls, late_peak) = cost(0), cost(10**12)
    assert late_calls < 2 * calls
    assert late_peak < 2 * peak


def test_a_weight_too_small_to_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"source 1 has less than 1/4096 of the total weight"):
        Order(["a", "b"], [10, 10], [1.0, 1e-9], 0)
