"""Learning rates of layers, for whatever is trained: by patterns of their paths, and by curves over numbered blocks.

A rate that a pattern gives stands alone; the factor of a block multiplies the rate of the part. `optimizer_groups` makes
the groups of one part from parameters that know what their rate hangs on (adapters plan that with their layers),
`rate_groups` from parameters with their paths.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, did_you_mean
from library.core.options import number_problem
from library.core.patterns import NUMBER_FORM, number, pattern_values

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Rates = Sequence[tuple["re.Pattern[str]", float]]
Curve = tuple[str, float]
"""(name of a curve, base that is added)"""
BlockCurves = Sequence[tuple["re.Pattern[str]", Curve]]

CURVES: dict[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi * x / 2),
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
"""name -> factor at place x of the part, 0 = first block, 1 = last"""
_CURVE = r"([a-z_]+)\s*(?:\+\s*([\d.]+))?"


# -- what users write --------------------------------------------------------------------------------------------------


def rate(value: Any) -> float:
    """A learning rate; ValueError."""
    result = number(value)
    if not result >= 0:
        raise ValueError("a learning rate of 0 or more is needed")
    return result


def factor(text: str) -> float:
    """A factor of a learning rate, nothing is 0; ValueError."""
    try:
        result = float(text or 0)
    except ValueError:
        raise ValueError(f"'{text}' is no number") from None
    if not result >= 0 or number_problem(result, is_whole=False):
        raise ValueError(f"{text} is no factor of a learning rate; needed: 0 or more")
    return result


def curve(text: str) -> Curve | None:
    """`sine`, `linear+.25`; None when it is written as no curve. ValueError for an unknown name."""
    match = re.fullmatch(rf"\s*{_CURVE}\s*", text)
    if match is None:
        return None
    if match[1] not in CURVES:
        known = ", ".join(CURVES)
        raise ValueError(
            f"there is no curve '{match[1]}'{did_you_mean(match[1], CURVES) or '.'} Known: {known}, or numbers with commas"
        )
    return match[1], float(match[2] or 0)


def _curve_or_factor(value: Any) -> Curve:
    """One factor for all blocks is a curve that is its base everywhere."""
    return curve(str(value)) or ("zeros", factor(str(value)))


def curve_factors(shape: Curve, count: int) -> list[float]:
    """The factors of `count` blocks."""
    name, base = shape
    return [CURVES[name](i / max(count - 1, 1)) + base for i in range(count)]


def factor_parser(count: int) -> Callable[[Any], list[float]]:
    """Parser of the factors of a part with `count` blocks: a curve, or numbers with commas. Factors that a list leaves
    out at its end are 1, empty ones 0, a single one is for all; more than `count` are an error."""

    def parse(value: Any) -> list[float]:
        if isinstance(value, (list, tuple)):
            items = [str(item) for item in value]
        else:
            shape = curve(str(value))
            if shape is not None:
                return curve_factors(shape, count)
            items = [item.strip() for item in str(value).strip().removeprefix("[").removesuffix("]").split(",")]
        if len(items) > count:
            raise ValueError(f"there are {len(items)} factors for {count} blocks; needed: one for all, or one for each")
        factors = [factor(item) for item in items]
        return factors * count if len(factors) == 1 else factors + [1.0] * (count - len(factors))

    return parse


def parse_rates(text: str | None, option: str) -> Rates:
    """Patterns with their rates in the order in which they are written; ConfigError that names the option."""
    if not text:
        return ()
    try:
        return pattern_values(text, rate)
    except ValueError as error:
        raise ConfigError(f"--{option} is {text}; needed: regex=rate,regex=rate ({error})") from error


def parse_block_curves(text: str | None, option: str) -> BlockCurves:
    """Patterns whose first group is the number of a block, with the curve of these blocks or one factor for all of
    them; ConfigError that names the option."""
    if not text:
        return ()
    try:
        found = pattern_values(text, _curve_or_factor, rf"{_CURVE}|{NUMBER_FORM}")
        without = next((pattern.pattern for pattern, _ in found if not pattern.groups), None)
        if without is not None:
            raise ValueError(rf"'{without}' has no group for the number of a block, as in blocks\.(\d+)\.")
        return found
    except ValueError as error:
        raise ConfigError(f"--{option} is {text}; needed: regex=curve,regex=curve ({error})") from error


# -- groups of the optimizer -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A parameter with what its rate hangs on: `rule` is (number of a pattern, rate); `is_fast`: it learns `ratio` times
    as fast as the others (LoRA+); `is_undecayed`: no weight decay draws it to 0."""

    parameter: Any
    rule: tuple[int, float] | None = None
    block: int | None = None
    is_fast: bool = False
    is_undecayed: bool = False


def optimizer_groups(
    members: Iterable[Member], base: float | None, *, name: str, factors: Sequence[float] | None = None,
    ratio: float | None = None, title: Callable[[int], str] = "reg_lr_{}".format,
) -> list[dict[str, Any]]:
    """Groups (`params`, `lr`, `name`) of one part, whose rate is `base`: first what no pattern and no block speaks of,
    then by block, then by pattern, each split into ordinary and fast parameters, and these into those that decay and those that do not
    (`weight_decay` 0). A pattern wins over a block. What has no rate is in no group. `factors`: of the blocks; `title`: what a group is called by the number of its pattern."""
    places: dict[tuple[int, int], list[Member]] = {}
    for member in members:
        block = -1 if factors is None or member.block is None else member.block
        places.setdefault((-1, block) if member.rule is None else (member.rule[0], -1), []).append(member)
    groups = []
    for number_of_rule, block in sorted(places):
        own = places[number_of_rule, block]
        lr, label = base, name
        if number_of_rule >= 0:
            lr, label = own[0].rule[1], f"{name} {title(number_of_rule)}"
        elif block >= 0:
            lr, label = None if base is None else base * factors[block], f"{name}_block{block}"
        for is_fast, is_undecayed in itertools.product((False, True), repeat=2):
            params = [m.parameter for m in own if (m.is_fast, m.is_undecayed) == (is_fast, is_undecayed)]
            if params and lr:
                group = {"params": params, "lr": lr * ratio if is_fast and ratio else lr}
                group["name"] = label + (" plus" if is_fast else "") + (" undecayed" if is_undecayed else "")
                groups.append(group | ({"weight_decay": 0.0} if is_undecayed else {}))
    return groups


def rate_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], default: float, rates: Rates = (), curves: BlockCurves = (), *,
    name: str,
) -> list[dict[str, Any]]:
    """Optimizer groups of parameters with their paths. The first pattern that is found in a path gives its rate, else its
    block a factor of `default`, else it is that; parameters of rate 0 are frozen and in no group."""
    named = list(named)
    blocks, factors = _numbered([path for path, _ in named], curves)
    members = [Member(parameter, rule_of(path, rates), blocks.get(path)) for path, parameter in named]
    for pattern, _ in (*rates, *curves):
        if named and not any(pattern.search(path) for path, _ in named):
            found = "the expression '%s' of learning rates is found in no path of the %s (the first path: %s)"
            logger.warning(found, pattern.pattern, name, named[0][0])
    groups = optimizer_groups(members, default, name=name, factors=factors, title=lambda i: rates[i][0].pattern)
    chosen = {id(parameter) for group in groups for parameter in group["params"]}
    for _, parameter in named:
        parameter.requires_grad_(id(parameter) in chosen)
    return groups


def rule_of(path: str, rates: Rates) -> tuple[int, float] | None:
    """(number of the first pattern that is found in a path, its rate)."""
    return next(((i, value) for i, (pattern, value) in enumerate(rates) if pattern.search(path)), None)


def _numbered(paths: Sequence[str], curves: BlockCurves) -> tuple[Mapping[str, int], list[float]]:
    """(path -> its place among all blocks that the patterns number, the factor of each). The first pattern counts."""
    blocks: dict[str, int] = {}
    factors: list[float] = []
    for pattern, shape in curves:
        found = {path: pattern.search(path) for path in paths if path not in blocks}
        numbers = {path: int(match[1]) for path, match in found.items() if match and (match[1] or "").isdigit()}
        places = {block: len(factors) + i for i, block in enumerate(sorted(set(numbers.values())))}
        blocks.update({path: places[block] for path, block in numbers.items()})
        factors += curve_factors(shape, len(places))
    return blocks, factors
