"""Iterating ahead in a thread: how it ends."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from statex_dist.data import prefetch as module
from statex_dist.data.prefetch import prefetch


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 1.0)


def stuck_after(count: int, asleep: threading.Event) -> Iterator[int]:
    yield from range(count)
    asleep.set()
    time.sleep(60)


@pytest.mark.usefixtures("patience")
def test_closing_does_not_wait_for_a_thread_that_is_stuck(caplog):
    caplog.set_level(logging.DEBUG)
    asleep = threading.Event()
    items = prefetch(stuck_after(1, asleep), 1)
    assert next(items) == 0
    assert asleep.wait(10)
    begin = time.monotonic()
    items.close()
    assert 0.9 < time.monotonic() - begin < 5
    assert "prefetching thread" in caplog.text


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("stuck", ["inner", "outer", "neither"])
def test_one_over_another_closes(stuck):
    """As the loader does: the planned steps ahead in one thread, those that are built from them in another."""
    before = threading.active_count()
    asleep = threading.Event()

    def build(item: int) -> int:
        if stuck == "outer" and item:
            asleep.set()
            time.sleep(60)
        return item

    inner = prefetch(stuck_after(1, asleep) if stuck == "inner" else iter(range(1000)), 2)
    outer = prefetch((build(item) for item in inner), 1)
    assert next(outer) == 0
    if stuck != "neither":
        assert asleep.wait(10)
    begin = time.monotonic()
    outer.close()
    inner.close()
    assert time.monotonic() - begin < 5
    assert next(inner, None) is None
    assert threading.active_count() == before + (stuck != "neither")


@pytest.mark.usefixtures("patience")
def test_a_prefetch_given_to_another_closes():
    before = threading.active_count()
    outer = prefetch(prefetch(iter(range(1000)), 2), 2)
    assert [next(outer) for _ in range(3)] == [0, 1, 2]
    outer.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before:  # the inner one ends when the garbage collector comes to it
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_order_and_failures(depth):
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("no more")

    found = prefetch(items(), depth)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(found)
