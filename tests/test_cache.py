"""What is kept between loads is bounded in bytes, and forgets what was not asked for longest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from neuron_fp8_loader.host import cache


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cache.forget()
    monkeypatch.setattr(cache, "LIMIT", 100)
    yield
    cache.forget()


def test_made_once() -> None:
    made: list[int] = []
    for _ in range(3):
        assert cache.cached("a", lambda: made.append(1) or "value", 10) == "value"
    assert made == [1]


def test_bounded_in_bytes_not_in_entries() -> None:
    for n in range(50):
        cache.keep(n, n, 1)
    cache.keep("large", "large", 90)
    kept = [n for n in range(50) if cache.cached(n, lambda: None, 1000) is not None]
    assert kept == list(range(40, 50))
    assert cache.cached("large", lambda: None, 1000) == "large"


def test_the_one_asked_for_longest_ago_goes_first() -> None:
    cache.keep("a", 1, 50)
    cache.keep("b", 2, 50)
    assert cache.cached("a", lambda: 0, 1000) == 1
    cache.keep("c", 3, 50)
    assert cache.cached("b", lambda: 0, 1000) == 0
    assert cache.cached("a", lambda: 0, 1000) == 1


def test_what_is_too_large_is_not_kept_and_what_fails_is_not_either() -> None:
    cache.keep("a", 1, 101)
    assert cache.cached("a", lambda: 0, 1000) == 0
    with pytest.raises(ZeroDivisionError):
        cache.cached("b", lambda: 1 // 0, 1)
    assert cache.cached("b", lambda: 2, 1) == 2


def test_kept_anew_counts_once() -> None:
    for n in range(100):
        cache.keep("a", n, 60)
    cache.keep("b", 1, 40)
    assert cache.cached("a", lambda: None, 1000) == 99
    assert cache.cached("b", lambda: None, 1000) == 1
