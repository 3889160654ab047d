"""Curves of the learning rate: functions from CurveSettings to `k -> multiplier of a group's own rate`.

W = warm-up steps, P = all steps, p = (k - W) / (P - W), k counts optimizer steps from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from library.core.errors import ConfigError
from library.core.options import number_problem, shortened
from library.training.schedulers import RAMP_TYPES, CurveSettings

Curve = Callable[[int], float]

POLYNOMIAL_END = 1e-7
INVERSE_SQRT_TIMESCALE = 10_000
ETA_MIN = 1e-6


def constant(settings: CurveSettings) -> Curve:
    """k / W, then 1."""
    return _after_warmup(settings, lambda k: 1.0)


def linear(settings: CurveSettings) -> Curve:
    """k / W, then down to 0 at P."""
    return _after_warmup(settings, lambda k: max(0.0, 1 - _progress(settings, k)))


def cosine(settings: CurveSettings) -> Curve:
    """k / W, then m + (1 - m) 0.5 (1 + cos(pi p)), m = eta_min / rate, 0 when not given."""
    return _cosine_to(settings, _lowest(settings, "eta_min", 0.0))


def cosine_to_rate(settings: CurveSettings) -> Curve:
    """The same with eta_min 1e-6 when not given."""
    return _cosine_to(settings, _lowest(settings, "eta_min", ETA_MIN))


def cosine_with_longer_arcs(settings: CurveSettings) -> Curve:
    """k / W, then arcs m + (1 - m) 0.5 (1 + cos(pi k' / T)) of T_0, T_0 T_mult, T_0 T_mult^2, ... steps.

    k' counts from the start of each arc; T_0 is 500, T_mult 2 and eta_min 1e-6 when not given. Source: arXiv
    1608.03983.
    """
    first, factor = _whole(settings, "T_0", 500), _whole(settings, "T_mult", 2)
    lowest = _lowest(settings, "eta_min", ETA_MIN)

    def multiplier(k: int) -> float:
        place, length = k - settings.warmup, first
        if factor == 1:
            place %= length
        while place >= length:
            place, length = place - length, length * factor
        return lowest + (1 - lowest) * _half_cosine(place / length)

    return _after_warmup(settings, multiplier)


def cosine_with_restarts(settings: CurveSettings) -> Curve:
    """k / W, then `num_cycles` cosine arcs from 1 to 0, and 0 from P on."""
    cycles = settings.options.lr_scheduler_num_cycles

    def multiplier(k: int) -> float:
        progress = _progress(settings, k)
        return 0.0 if progress >= 1 else _half_cosine((cycles * progress) % 1.0)

    return _after_warmup(settings, multiplier)


def polynomial(settings: CurveSettings) -> Curve:
    """k / W, then ((lr - end) (1 - p)^power + end) / lr with the optimizer's own rate lr; end = lr_end or 1e-7."""
    rate, power = settings.rate, settings.options.lr_scheduler_power
    end = _number(settings, "lr_end", POLYNOMIAL_END)
    if rate > 0 and not 0 <= end < rate:
        raise ConfigError(f"lr_end in --lr_scheduler_args is {end}; it must be below --learning_rate {rate}")
    if rate == 0:
        return _after_warmup(settings, lambda k: 1.0)

    def multiplier(k: int) -> float:
        rest = max(0.0, 1 - _progress(settings, k))
        return ((rate - end) * rest**power + end) / rate

    return _after_warmup(settings, multiplier)


def inverse_sqrt(settings: CurveSettings) -> Curve:
    """k / W, then 1 / sqrt((k + ts - W) / ts); ts = timescale, W, or 10000."""
    scale = settings.options.lr_scheduler_timescale or settings.warmup or INVERSE_SQRT_TIMESCALE
    return _after_warmup(settings, lambda k: 1 / math.sqrt((k + scale - settings.warmup) / scale))


def cosine_with_min_lr(settings: CurveSettings) -> Curve:
    """k / W, then 0.5 (1 + cos(pi num_cycles p)) (1 - r) + r with r = min_lr_ratio."""
    cycles, ratio = settings.options.lr_scheduler_num_cycles, settings.options.lr_scheduler_min_lr_ratio
    return _after_warmup(settings, lambda k: _half_cosine(cycles * _progress(settings, k)) * (1 - ratio) + ratio)


def warmup_stable_decay(settings: CurveSettings) -> Curve:
    """From r up to 1 over W, 1 until P - D, down to r over D, then r. Ramps by warmup_type and decay_type."""
    ratio = settings.options.lr_scheduler_min_lr_ratio or 0.0
    cycles = settings.options.lr_scheduler_num_cycles
    up, down = _ramp_type(settings, "warmup_type", "linear"), _ramp_type(settings, "decay_type", "cosine")
    decay_start = settings.total - settings.decay

    def multiplier(k: int) -> float:
        if k < settings.warmup:
            return _ramp(up, k / settings.warmup, 1) * (1 - ratio) + ratio
        if k < decay_start:
            return 1.0
        if k >= settings.total:
            return ratio
        p = (k - decay_start) / settings.decay
        falling = 1 - math.sqrt(p) if down == "1-sqrt" else 1 - _ramp(down, p, cycles)
        return max(0.0, falling * (1 - ratio) + ratio)

    return multiplier


def piecewise_constant(settings: CurveSettings) -> Curve:
    """step_rules "1:10,0.1:20,0.01": 1 below step 10, 0.1 below step 20, then 0.01."""
    borders, last = parse_step_rules(settings.args.get("step_rules"))

    def multiplier(k: int) -> float:
        return next((value for border, value in borders if k < border), last)

    return multiplier


def parse_step_rules(rules: Any) -> tuple[list[tuple[int, float]], float]:
    """[(border, multiplier), ...] with rising borders, and the multiplier after the last of them."""
    try:
        *pairs, last = [part.strip() for part in str(rules).split(",")]
        borders = [(int(step), float(value)) for value, step in (pair.split(":") for pair in pairs)]
        steps = [step for step, _ in borders]
        if steps != sorted(set(steps)) or any(step <= 0 for step in steps):
            raise ValueError("the steps must rise")
        return borders, float(last)
    except ValueError as error:
        raise ConfigError(
            f"step_rules in --lr_scheduler_args is '{rules}' ({error}); needed: multiplier:step, ... and a last "
            "multiplier,"
            " e.g. 1:10,0.1:20,0.01"
        ) from None


def rex(settings: CurveSettings) -> Curve:
    """From m up to 1 over W, then m + (1 - m) z / (alpha + beta z) with z = (P - k) / (P - W).

    m = min_lr / rate (min_lr is a hundredth of the rate when not given), alpha 0.1 and beta 0.9 by rex_alpha, rex_beta.
    Source: arXiv 2107.04197.
    """
    alpha, beta = _number(settings, "rex_alpha", 0.1), _number(settings, "rex_beta", 0.9)
    if alpha <= 0 or beta < 0:
        raise ConfigError(
            f"rex_alpha and rex_beta in --lr_scheduler_args are {alpha} and {beta}; alpha > 0 and beta >= 0 are needed"
        )
    lowest = 0.01 if "min_lr" not in settings.args else _lowest(settings, "min_lr", 0.0)

    def multiplier(k: int) -> float:
        if k < settings.warmup:
            return lowest + (1 - lowest) * k / settings.warmup
        z = max(0.0, 1 - _progress(settings, k))
        return lowest + (1 - lowest) * z / (alpha + beta * z)

    return multiplier


def _after_warmup(settings: CurveSettings, curve: Curve) -> Curve:
    return lambda k: k / settings.warmup if k < settings.warmup else curve(k)


def _cosine_to(settings: CurveSettings, lowest: float) -> Curve:
    return _after_warmup(
        settings, lambda k: lowest + (1 - lowest) * _half_cosine(_progress(settings, k))
    )


def _lowest(settings: CurveSettings, key: str, default: float) -> float:
    """A rate of --lr_scheduler_args as a share of --learning_rate; a default is the whole rate at most."""
    rate = _number(settings, key, default)
    if key in settings.args and not 0 <= rate <= (settings.rate or 1.0):
        raise ConfigError(
            f"{key} in --lr_scheduler_args is {settings.args[key]}; 0 to --learning_rate {settings.rate} is needed"
        )
    return min(1.0, rate / (settings.rate or 1.0))


def _progress(settings: CurveSettings, k: int) -> float:
    """p, 0 at the end of the warm-up and 1 at the end of the run."""
    return (k - settings.warmup) / max(1, settings.total - settings.warmup)


def _half_cosine(p: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * p)))


def _ramp(kind: str, p: float, cycles: int) -> float:
    """Rising from 0 at p = 0 to 1 at p = 1 (a cosine of several half waves goes up and down)."""
    if kind == "linear":
        return p
    if kind == "cosine":
        return 1 - _half_cosine(cycles * p)
    return 1 - math.sqrt(1 - p)


def _ramp_type(settings: CurveSettings, key: str, default: str) -> str:
    value = settings.args.get(key, default)
    if value not in RAMP_TYPES:
        raise ConfigError(f"{key} in --lr_scheduler_args is '{value}'; known: {', '.join(RAMP_TYPES)}")
    return value


def _whole(settings: CurveSettings, key: str, default: int) -> int:
    value = settings.args.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} in --lr_scheduler_args is {shortened(value)}; a whole number of 1 or more is needed")
    return value


def _number(settings: CurveSettings, key: str, default: float) -> float:
    value = settings.args.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{key} in --lr_scheduler_args is {value!r}; a number is needed")
    needed = number_problem(value, is_whole=False)
    if needed is not None:
        raise ConfigError(f"{key} in --lr_scheduler_args is {shortened(value)}; {needed} is needed")
    return float(value)
