"""The arithmetic of the table: medians, ratios within a round, what is missed."""

from __future__ import annotations

from benchmarks.figures import Baseline, Figure, number, spread, table


def test_rounds_are_compared_with_themselves():
    """A round in which the machine was slow slows both; the ratio of medians would be 2.5."""
    ours, its = spread([1.0, 20.0, 5.0]), spread([1.0, 10.0, 2.0])
    assert Baseline("x", its).ratio_of(ours).median == 2.0
    assert Baseline("x", spread(2.0)).ratio_of(ours).values == (2.5,)  # one value: median with median


def test_what_is_missed_is_told():
    slow = Figure("step", "tiny", "ms", spread([2.0, 2.0]), (Baseline("bare", spread([1.0, 1.0]), 1.03),))
    assert slow.misses() == ["step: tiny is 2.00 times bare; wanted: at most 1.03"]
    assert "<= 1.03  missed" in table([slow])
    busy = Figure("caching", "tiny", "share", spread(0.8), wanted=0.9, at_least=True)
    assert busy.misses() == ["caching: tiny is 0.8 share; wanted: at least 0.9"] and ">= 0.9  missed" in table([busy])
    for fine in (Figure("a", "b", "s", spread(0.9), wanted=0.9, at_least=True), Figure("a", "b", "s", spread(1.0))):
        assert fine.misses() == [] and "missed" not in table([fine])


def test_numbers_have_three_digits_that_count():
    assert [number(x) for x in (0.0012345, 1.2345, 123.45, 1024, 3.21e7, 0.00001234, 0.0)] == [
        "0.00123", "1.23", "123", "1,024", "3.21e+07", "1.23e-05", "0",
    ]  # fmt: skip


def test_the_json_has_every_value():
    figure = Figure("a", "b", "s", spread([3.0, 1.0, 2.0]), (Baseline("c", spread([1.0, 1.0, 1.0])),), notes={"n": 1})
    found = figure.json()
    assert found["ours"] == {"median": 2.0, "low": 1.5, "high": 2.5, "values": [3.0, 1.0, 2.0]}
    assert found["baselines"][0]["ratio"]["median"] == 2.0 and found["notes"] == {"n": 1}
