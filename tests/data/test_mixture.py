"""The order of draws: shares, passes, caps, determinism."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsevlm.data.mixture import capped, draws, epoch_order, shares
from sparsevlm.recipe.schema import Mixture

SIZES = {"a": 100, "b": 25, "c": 4}


def test_shares_by_hand() -> None:
    assert shares(SIZES, None, Mixture(sampling="sqrt_size")) == {"a": 10 / 17, "b": 5 / 17, "c": 2 / 17}
    assert shares(SIZES, {"a": 1, "b": 3, "c": 0}, Mixture(sampling="weight")) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert shares(SIZES, None, Mixture(sampling="temperature", temperature=2)) == pytest.approx(
        shares(SIZES, None, Mixture(sampling="sqrt_size"))
    )
    assert shares(SIZES, None, Mixture())["b"] == 25 / 129


def test_weights_that_mean_nothing_are_refused() -> None:
    for weights in ({"a": 0.0, "b": 0.0, "c": 0.0}, {"a": -1.0, "b": 1.0, "c": 1.0}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            shares(SIZES, weights, Mixture(sampling="weight"))


@given(st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_is_every_row_once(seed: int, epoch: int) -> None:
    order = epoch_order(SIZES, Mixture(), seed, epoch)
    assert sorted(order) == sorted((name, row) for name, size in SIZES.items() for row in range(size))
    assert order == epoch_order(SIZES, Mixture(), seed, epoch)
    assert order != epoch_order(SIZES, Mixture(), seed, epoch + 1)
    assert order != epoch_order(SIZES, Mixture(), seed + 10, epoch)


def test_caps_take_other_rows_in_later_epochs() -> None:
    mixture = Mixture(caps={"a": 30, "b": 500})
    assert capped(SIZES, mixture) == {"a": 30, "b": 25, "c": 4}
    seen: Counter[int] = Counter()
    for epoch in range(10):  # three passes over a's 100 rows
        rows = [row for name, row in epoch_order(SIZES, mixture, 0, epoch) if name == "a"]
        assert len(rows) == 30
        seen.update(rows)
    assert set(seen.values()) == {3}
    assert len(seen) == 100


@pytest.mark.parametrize("sampling", ["weight", "temperature", "sqrt_size"])
def test_shares_hold_after_any_number_of_draws(sampling: str) -> None:
    mixture, weights = (
        Mixture(sampling=sampling, **({"temperature": 3} if sampling == "temperature" else {})),
        {"a": 1.0, "b": 2.0, "c": 0.5},
    )
    share = shares(SIZES, weights, mixture)
    count: Counter[str] = Counter()
    for n, (name, _) in enumerate(islice(draws(SIZES, weights, mixture, seed=1), 500), start=1):
        count[name] += 1
        assert all(abs(count[s] - share[s] * n) <= 2 for s in SIZES)


def test_sources_are_gone_through_before_they_repeat() -> None:
    rows = [row for name, row in islice(draws(SIZES, None, Mixture(sampling="weight"), seed=0), 200) if name == "c"]
    assert len(rows) >= 60
    for start in range(0, len(rows) - 3, 4):
        assert sorted(rows[start : start + 4]) == [0, 1, 2, 3]


def test_concat_draws_are_epochs_in_a_row() -> None:
    mixture = Mixture()
    want = epoch_order(SIZES, mixture, 5, 0) + epoch_order(SIZES, mixture, 5, 1)
    assert list(islice(draws(SIZES, None, mixture, seed=5), len(want))) == want
