"""Learning rate schedules: the options, the table, the checks at start and `build`.

Everything is counted in optimizer steps: one scheduler step per optimizer step, whatever the number of processes, and
the rate of optimizer step k (from 0) is the curve at k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, Problems, did_you_mean, foreign_errors
from library.core.options import Ignored, option, without_effect
from library.core.registry import Registry, is_path
from library.training.keyword_args import argument_problems, parse_keyword_args
from library.training.optimizers import OptimizerChoice, OptimizerOptions, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.training.optimizers import OptimizerBuild
    from library.training.protocols import LrSchedule

    Curve = Callable[[int], float]
    """multiplier of a group's own rate at optimizer step k"""

STEP_OPTIONS = ("lr_warmup_steps", "lr_decay_steps")
SHAPE_OPTIONS = (
    *STEP_OPTIONS,
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)

SCHEDULERS: Registry[type] = Registry(
    "learning rate scheduler", option="lr_scheduler", group="schedulers", takes=("settings",),
    info={"uses": SHAPE_OPTIONS, "args": None},
    wanted="a function of CurveSettings that gives a curve: optimizer step -> factor of the rate",
)
"""The target makes a curve from a CurveSettings. `uses`: options that have an effect; `args`: keys of
--lr_scheduler_args, None = any."""
_CURVES = "library.training.schedulers.curves:"
SCHEDULERS.add("constant", _CURVES + "constant", uses=("lr_warmup_steps",), args=())
SCHEDULERS.add("none", _CURVES + "constant", uses=(), args=())
SCHEDULERS.add("constant_with_warmup", _CURVES + "constant", uses=("lr_warmup_steps",), args=())
SCHEDULERS.add("linear", _CURVES + "linear", uses=("lr_warmup_steps",), args=())
SCHEDULERS.add("cosine", _CURVES + "cosine", uses=("lr_warmup_steps",), args=("eta_min",))
SCHEDULERS.add(
    "cosine_with_restarts",
    _CURVES + "cosine_with_restarts",
    uses=("lr_warmup_steps", "lr_scheduler_num_cycles"),
    args=(),
)
SCHEDULERS.add("cosine_with_warmup", _CURVES + "cosine_to_rate", uses=("lr_warmup_steps",), args=("eta_min",))
SCHEDULERS.add(
    "cosine_with_warm_restarts", _CURVES + "cosine_with_longer_arcs", uses=("lr_warmup_steps",),
    args=("T_0", "T_mult", "eta_min"),
)
SCHEDULERS.add("polynomial", _CURVES + "polynomial", uses=("lr_warmup_steps", "lr_scheduler_power"), args=("lr_end",))
SCHEDULERS.add("inverse_sqrt", _CURVES + "inverse_sqrt", uses=("lr_warmup_steps", "lr_scheduler_timescale"), args=())
SCHEDULERS.add(
    "cosine_with_min_lr", _CURVES + "cosine_with_min_lr",
    uses=("lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"), args=(),
)
SCHEDULERS.add(
    "warmup_stable_decay", _CURVES + "warmup_stable_decay",
    uses=("lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"),
    args=("warmup_type", "decay_type"),
)
SCHEDULERS.add("piecewise_constant", _CURVES + "piecewise_constant", uses=(), args=("step_rules",))
SCHEDULERS.add("rex", _CURVES + "rex", uses=("lr_warmup_steps",), args=("rex_alpha", "rex_beta", "min_lr"))
SCHEDULERS.add("adafactor", "library.training.schedulers.adafactor:AdafactorRates", uses=(), args=())

NOT_OFFERED = {
    "reduce_lr_on_plateau": "it needs a metric after every step, which training does not have",
    "cosine_warmup_with_min_lr": "it needs a warm-up rate that has no option; use cosine_with_min_lr",
}
ELSEWHERE = {"cosine_with_restart": "cosine_with_warm_restarts"}
"""names of other trainers whose meaning is that of one here"""
RAMP_TYPES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class StepCount:
    """A number of optimizer steps, given as such or as a fraction of all steps."""

    steps: int | None = None
    fraction: float | None = None

    def resolve(self, total: int) -> int:
        return self.steps if self.fraction is None else int(self.fraction * total)


def parse_step_count(value: str | int | float) -> StepCount:
    """`10` or `10.0` = 10 steps, `0.1` or `10%` = a tenth of all steps, `100%` = all. Raises ValueError."""
    text = str(value).strip()
    try:
        number = float(text[:-1] if text.endswith("%") else text)
    except ValueError:
        raise ValueError(f"'{value}' is not a number of steps; use e.g. 100, 0.1 or 10%") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value} is not a number of steps; 0 or more is needed")
    if text.endswith("%"):
        if number > 100:
            raise ValueError(f"{value} is more than all steps; use 0% to 100%")
        return StepCount(fraction=number / 100)
    if 0 < number < 1:
        return StepCount(fraction=number)
    if number != int(number):
        raise ValueError(
            f"{value} is not a number of steps; above 1 only whole numbers, below 1 a fraction of all steps"
        )
    return StepCount(steps=int(number))


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions:
    """Learning rate schedule."""

    lr_scheduler: str = option(
        "constant",
        help="curve of the learning rate: "
        + ", ".join(SCHEDULERS.names())
        + ", or a path package.module:function; adafactor:1e-3 gives the rate that is shown first",
    )
    lr_warmup_steps: str | int | float = option(
        0, convert=str, metavar="STEPS", help="warm-up in optimizer steps; below 1, or with %, a fraction of all steps"
    )
    lr_decay_steps: str | int | float = option(
        0, convert=str, metavar="STEPS", help="decay of warmup_stable_decay at the end, written like --lr_warmup_steps"
    )
    lr_scheduler_num_cycles: int = option(1, help="restarts or waves of the cosine curves")
    lr_scheduler_power: float = option(1.0, help="power of polynomial")
    lr_scheduler_timescale: int | None = option(
        None, help="time scale of inverse_sqrt (default: the warm-up, or 10000)"
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, help="lowest rate as a share of the rate, for cosine_with_min_lr and warmup_stable_decay"
    )
    lr_scheduler_type: str = option(
        "", help="class of torch.optim.lr_scheduler or dotted class path; replaces --lr_scheduler"
    )
    lr_scheduler_args: list[str] | None = option(
        None, nargs="*", metavar="KEY=VALUE", help="arguments of the schedule, e.g. T_max=100"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in STEP_OPTIONS:
            try:
                parse_step_count(getattr(self, name))
            except ValueError as error:
                problems.add(f"--{name}: {error}")
        ratio = self.lr_scheduler_min_lr_ratio
        if ratio is not None and not 0 <= ratio <= 1:
            problems.add(f"--lr_scheduler_min_lr_ratio is {ratio}; a number from 0 to 1 is needed")
        if self.lr_scheduler_num_cycles < 1:
            problems.add(f"--lr_scheduler_num_cycles is {self.lr_scheduler_num_cycles}; 1 or more is needed")
        if self.lr_scheduler_timescale is not None and self.lr_scheduler_timescale < 1:
            problems.add(f"--lr_scheduler_timescale is {self.lr_scheduler_timescale}; 1 or more is needed")
        if not (math.isfinite(self.lr_scheduler_power) and self.lr_scheduler_power > 0):
            problems.add(f"--lr_scheduler_power is {self.lr_scheduler_power}; a number above 0 is needed")
        try:
            parse_keyword_args(self.lr_scheduler_args, "lr_scheduler_args")
        except ConfigError as error:
            problems.absorb(error)
        if not self.lr_scheduler_type:
            self._check_name(problems)
        problems.raise_if_any()

    @property
    def curve(self) -> str:
        """The name in --lr_scheduler, without a rate; a path as it is."""
        if self._is_path:
            return self.lr_scheduler.strip()
        return self.lr_scheduler.partition(":")[0].strip().lower()

    @property
    def _is_path(self) -> bool:
        text = self.lr_scheduler.strip()
        return is_path(text) and text.partition(":")[0] not in SCHEDULERS

    @property
    def first_rate(self) -> float | None:
        """The rate in `adafactor:1e-3`: shown before the first step, when the optimizer has found none yet."""
        name, colon, rate = self.lr_scheduler.partition(":")
        return float(rate) if colon and not self._is_path else None

    def _check_name(self, problems: Problems) -> None:
        name = self.curve
        try:
            if self.first_rate is not None and (name != "adafactor" or not 0 <= self.first_rate < math.inf):
                raise ValueError
        except ValueError:
            problems.add(
                f"--lr_scheduler is {self.lr_scheduler}; a rate behind a colon has adafactor alone, e.g. adafactor:1e-3"
            )
            return
        if name in NOT_OFFERED:
            problems.add(f"--lr_scheduler {name} is not offered: {NOT_OFFERED[name]}")
        elif SCHEDULERS.problem(name) is not None:
            known, other = SCHEDULERS.names(), ELSEWHERE.get(name)
            near = f"; here it is called {other}." if other else did_you_mean(name, known) or "."
            # arguments of what is not known cannot be looked at, and are no second problem
            later = " --lr_scheduler_args are those of the schedule that it will be" if self.lr_scheduler_args else ""
            problems.add(
                f"unknown learning rate scheduler '{self.lr_scheduler}' (--lr_scheduler){near}"
                f" Known: {', '.join(known)}.{later}"
            )
        elif name == "cosine_with_min_lr" and self.lr_scheduler_min_lr_ratio is None:
            problems.add("--lr_scheduler cosine_with_min_lr needs --lr_scheduler_min_lr_ratio, e.g. 0.1")


@dataclass(frozen=True)
class CurveSettings:
    """What a curve is made from. `warmup`, `decay` and `total` are optimizer steps, `rate` is the optimizer's own
    rate."""

    warmup: int
    decay: int
    total: int
    rate: float
    options: SchedulerOptions
    args: dict[str, Any]

    @classmethod
    def of(cls, options: SchedulerOptions, *, rate: float, max_train_steps: int) -> CurveSettings:
        warmup, decay = (parse_step_count(getattr(options, name)).resolve(max_train_steps) for name in STEP_OPTIONS)
        return cls(
            warmup,
            decay,
            max_train_steps,
            rate,
            options,
            parse_keyword_args(options.lr_scheduler_args, "lr_scheduler_args"),
        )


def name_in_use(options: SchedulerOptions, optimizer: OptimizerOptions) -> str:
    """The schedule that will act: "none" for an optimizer that follows none, `adafactor:<rate shown before the first step>`,
    the class of --lr_scheduler_type, or the name."""
    choice = choose(optimizer)
    if choice.no_schedule:
        return "none"
    if choice.finds_own_rate:
        return f"adafactor:{optimizer.learning_rate if options.first_rate is None else options.first_rate}"
    if options.lr_scheduler_type:
        return options.lr_scheduler_type
    name = SCHEDULERS.entry(options.curve).name
    return "constant_with_warmup" if name == "constant" and _has_warmup(options) else name


def _has_warmup(options: SchedulerOptions) -> bool:
    count = parse_step_count(options.lr_warmup_steps)
    return bool(count.steps or count.fraction)


def check(options: SchedulerOptions, optimizer: OptimizerOptions, max_train_steps: int | None = None) -> None:
    """Everything that can be known before data and models are loaded; ConfigError with every problem.

    `max_train_steps` is given as soon as it is known; without it the curve is tried on a run of 1000 steps.
    """
    choice = choose(optimizer)
    if choice.no_schedule or choice.finds_own_rate:
        return  # the schedule is not used; see `notices`
    problems = Problems()
    if options.lr_scheduler_type:
        _check_class(options, problems)
    else:
        entry = SCHEDULERS.entry(options.curve)
        if entry.name == "adafactor":
            problems.add(_adafactor_problem(choice))
        _check_args(entry.name, options, problems)
        if not problems.messages and entry.name != "adafactor":
            _try_curve(options, optimizer, max_train_steps, problems)
    name = options.lr_scheduler_type or options.curve
    own_length = bool(options.lr_scheduler_type) or name in ("none", "adafactor", "piecewise_constant")
    if own_length and _has_warmup(options):
        problems.add(
            f"--lr_warmup_steps is {options.lr_warmup_steps}; {name} has no warm-up of this kind, leave it out"
        )
    problems.raise_if_any()


def _adafactor_problem(choice: OptimizerChoice) -> str:
    if choice.is_adafactor:
        return "--lr_scheduler adafactor needs relative_step=True in --optimizer_args (AdaFactor with its own rates)"
    return f"--lr_scheduler adafactor goes only with --optimizer_type AdaFactor; the optimizer is {choice.name}"


def _check_args(name: str, options: SchedulerOptions, problems: Problems) -> None:
    args = parse_keyword_args(options.lr_scheduler_args, "lr_scheduler_args")
    known = SCHEDULERS.entry(name).info["args"]
    for key in args if known is not None else ():
        if key not in known:
            has = f"It has: {', '.join(known)}" if known else "It has no arguments"
            problems.add(
                f"--lr_scheduler_args sets {key}, which {name} does not have{did_you_mean(key, known) or '.'} {has}"
            )
    if name == "piecewise_constant" and "step_rules" not in args:
        problems.add(
            "--lr_scheduler piecewise_constant needs step_rules in --lr_scheduler_args, e.g. "
            "step_rules=1:10,0.1:20,0.01"
        )


def _try_curve(
    options: SchedulerOptions, optimizer: OptimizerOptions, max_train_steps: int | None, problems: Problems
) -> None:
    """Make the curve once: it checks its own arguments."""
    settings = CurveSettings.of(options, rate=optimizer.learning_rate, max_train_steps=max_train_steps or 1000)
    if max_train_steps is not None and options.curve == "warmup_stable_decay":
        if settings.warmup + settings.decay > max_train_steps:
            problems.add(
                f"--lr_warmup_steps and --lr_decay_steps are {settings.warmup} and {settings.decay} of "
                f"{max_train_steps} steps;"
                " together they must not be longer than the run"
            )
    problems.attempt(lambda: curve_of(options, settings))


def curve_of(options: SchedulerOptions, settings: CurveSettings) -> Curve:
    """The curve of --lr_scheduler. ConfigError when it refuses the settings, or one from outside gives no numbers."""
    make = SCHEDULERS.resolve(options.curve)
    if not SCHEDULERS.entry(options.curve).is_outside:
        return make(settings)
    where = f"--lr_scheduler is {options.lr_scheduler}, which"
    with foreign_errors(ConfigError, f"{where} fails for these settings"):
        curve = make(settings)
        factors = [curve(step) for step in (0, settings.total)]  # torch asks for one more than there are steps
    if not all(isinstance(factor, (int, float)) and math.isfinite(factor) for factor in factors):
        raise ConfigError(
            f"{where} gives {factors[0]!r} at the first step and {factors[1]!r} after the last; needed: finite numbers"
        )
    return curve


def _check_class(options: SchedulerOptions, problems: Problems) -> None:
    from library.training.schedulers.factory import scheduler_class

    try:
        cls = scheduler_class(options.lr_scheduler_type)
    except ConfigError as error:
        problems.absorb(error)
        return
    args = parse_keyword_args(options.lr_scheduler_args, "lr_scheduler_args")
    for problem in argument_problems(
        cls, args, "lr_scheduler_args", supplied=("optimizer",), what=options.lr_scheduler_type
    ):
        problems.add(problem)
    if not problems.messages:
        _try_class(cls, args, options, problems)


def _try_class(cls: type, settings: dict[str, Any], options: SchedulerOptions, problems: Problems) -> None:
    """One step of the schedule, for an optimizer of one value: the class checks its own arguments."""
    from torch import nn, optim, zeros

    optimizer = optim.SGD([nn.Parameter(zeros(1))], lr=0.1)
    try:
        schedule = cls(optimizer, **settings)
        optimizer.step()
        schedule.step()
    except Exception as error:  # whatever a class of the user's raises
        given = ", ".join(f"{key}={value}" for key, value in settings.items()) or "not given"
        problems.add(f"--lr_scheduler_args is {given}; {options.lr_scheduler_type} refuses it: {error}")


def notices(options: SchedulerOptions) -> list[str]:
    """Lines for the log at start: a changed meaning."""
    if not options.lr_scheduler_type and options.curve == "constant" and _has_warmup(options):
        return ["--lr_scheduler constant with --lr_warmup_steps acts as constant_with_warmup"]
    return []


def idle(options: SchedulerOptions, optimizer: OptimizerOptions) -> list[Ignored]:
    """Settings that the schedule of this run does not read."""
    choice, default = choose(optimizer), SchedulerOptions()
    given = [n for n in default.__dataclass_fields__ if str(getattr(options, n)) != str(getattr(default, n))]
    if choice.no_schedule:
        unused, reason = given, choice.no_schedule
    elif choice.finds_own_rate:
        unused, reason = given, f"{choice.name} with relative_step follows its own schedule"
    elif options.lr_scheduler_type:
        unused = [n for n in given if n not in ("lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps")]
        reason = f"--lr_scheduler_type {options.lr_scheduler_type} is used"
    else:
        entry = SCHEDULERS.entry(options.curve)
        unused = [n for n in given if n in SHAPE_OPTIONS and n not in entry.info["uses"] and n != "lr_warmup_steps"]
        reason = f"--lr_scheduler {entry.name} does not use it"
    return without_effect(unused, reason)


def build(
    options: SchedulerOptions, optimizer: OptimizerBuild, *, learning_rate: float, max_train_steps: int
) -> LrSchedule:
    """The scheduler of a run: `step()` once per optimizer step, `get_last_lr()`; see `schedulers/factory.py`."""
    from library.training.schedulers.factory import build_scheduler

    def curve() -> Curve:
        return curve_of(options, CurveSettings.of(options, rate=learning_rate, max_train_steps=max_train_steps))

    return build_scheduler(options, optimizer, curve, learning_rate=learning_rate)
