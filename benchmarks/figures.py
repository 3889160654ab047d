"""Figures: what was measured, beside what it is compared with, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

HEADER = ("subject", "case", "unit", "ours", "baseline", "its value", "ours / it", "wanted", "")


@dataclass(frozen=True)
class Spread:
    """Values of several rounds: the median, and the quartiles between which half of them lie."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "values": list(self.values)}


def spread(values: Iterable[float] | float) -> Spread:
    return Spread((float(values),) if isinstance(values, (int, float)) else tuple(map(float, values)))


@dataclass(frozen=True)
class Baseline:
    """What a figure is compared with. With as many values as the figure has, those of one round are compared with each
    other, so that what slowed a round down slows both; otherwise the medians are. `at_most`: the wanted ratio.
    `is_bound`: no way of doing it could take less, so that the share of it is told too."""

    name: str
    its: Spread
    at_most: float | None = None
    is_bound: bool = False

    def ratio_of(self, ours: Spread) -> Spread:
        if len(ours.values) == len(self.its.values):
            return Spread(tuple(a / b if b else float("inf") for a, b in zip(ours.values, self.its.values)))
        return Spread((ours.median / self.its.median if self.its.median else float("inf"),))


@dataclass(frozen=True)
class Figure:
    """One thing that was measured. `wanted` is a limit of its own value, for figures that are compared with a number
    and not with a measurement; `at_least` turns it round. `notes` go into the JSON and below the table."""

    subject: str
    case: str
    unit: str
    ours: Spread
    baselines: Sequence[Baseline] = ()
    wanted: float | None = None
    at_least: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def misses(self) -> list[str]:
        """What is not as it should be, in words."""
        name, value = f"{self.subject}: {self.case}", self.ours.median
        found = []
        if self.wanted is not None and (value < self.wanted if self.at_least else value > self.wanted):
            bound = "at least" if self.at_least else "at most"
            found.append(f"{name} is {number(value)} {self.unit}; wanted: {bound} {number(self.wanted)}")
        for baseline in self.baselines:
            ratio = baseline.ratio_of(self.ours).median
            if baseline.at_most is not None and ratio > baseline.at_most:
                found.append(f"{name} is {ratio:.2f} times {baseline.name}; wanted: at most {baseline.at_most}")
        return found

    def json(self) -> dict[str, Any]:
        return {
            "subject": self.subject, "case": self.case, "unit": self.unit, "ours": self.ours.json(),
            "wanted": self.wanted, "at_least": self.at_least, "notes": self.notes, "misses": self.misses(),
            "baselines": [
                {
                    "name": b.name, **b.its.json(), "at_most": b.at_most, "is_bound": b.is_bound,
                    "ratio": b.ratio_of(self.ours).json(),
                }
                for b in self.baselines
            ],
        }  # fmt: skip


def number(value: float) -> str:
    """Three digits that count, and whole numbers whole: 0.00123, 1.23, 123, 1,024."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1000 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):.10g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def with_spread(values: Spread) -> str:
    low, high = values.quartiles
    return number(values.median) + ("" if len(values.values) == 1 else f" ({number(low)}-{number(high)})")


def table(figures: Sequence[Figure]) -> str:
    """The figures as text: a line for each baseline, and one where there is none."""
    rows: list[Sequence[str]] = [HEADER]
    for figure in figures:
        first = (figure.subject, figure.case, figure.unit, with_spread(figure.ours))
        own = "" if figure.wanted is None else f"{'>=' if figure.at_least else '<='} {number(figure.wanted)}"
        if own or not figure.baselines:
            missed = own and (figure.ours.median < figure.wanted) == figure.at_least
            rows.append((*first, "", "", "", own, "missed" if missed and figure.ours.median != figure.wanted else ""))
            first = ("", "", "", "")
        for baseline in figure.baselines:
            ratio = baseline.ratio_of(figure.ours)
            wanted = "" if baseline.at_most is None else f"<= {baseline.at_most}"
            missed = baseline.at_most is not None and ratio.median > baseline.at_most
            told = with_spread(ratio) + (f" = {1 / ratio.median:.3g} of it" if baseline.is_bound else "")
            compared = (baseline.name, with_spread(baseline.its), told, wanted, "missed" if missed else "")
            rows.append((*first, *compared))
            first = ("", "", "", "")
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
