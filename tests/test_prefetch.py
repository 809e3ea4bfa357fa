"""Batches made ahead of the step: in order, as if made in place, errors where they belong."""

from __future__ import annotations

import contextlib
import threading

import pytest

from cartridges_jax.data.prefetch import prefetch


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_come_in_the_order_of_the_steps_each_made_once(depth):
    made = []

    def make(step):
        made.append(step)
        return step * step

    assert list(prefetch(make, range(3, 20), depth)) == [step * step for step in range(3, 20)]
    assert made == list(range(3, 20))
    assert list(prefetch(make, range(5, 5), depth)) == []


def test_the_next_item_is_made_while_the_last_is_in_use():
    second = threading.Event()

    def make(step):
        if step == 1:
            second.set()
        return step

    with contextlib.closing(prefetch(make, range(3), depth=1)) as items:
        assert next(items) == 0
        assert second.wait(timeout=60)  # nobody has asked for it yet


def test_an_error_is_raised_at_its_step_and_not_before():
    def make(step):
        if step == 2:
            raise ValueError("bad example")
        return step

    items = prefetch(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="bad example"):
        next(items)


def test_leaving_early_stops_the_thread():
    with contextlib.closing(prefetch(lambda step: step, range(1000))) as items:
        assert next(items) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare-ahead")]
